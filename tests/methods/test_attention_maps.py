"""LeGrad and gradient x attention beside loops written by hand, and in models that call attention in every way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.model.not_applicable import NotApplicable
from tests.methods.networks import assert_rounding, images, seeded, smooth
from tests.methods.test_no_side_effects import MODES, assert_same, assert_two_threads_agree, snapshot

# Of a gradient at the attention of three small blocks, in one chain.
ROUNDINGS = 2000
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "legrad": pysal.legrad,
    "gradient_attention": pysal.gradient_attention,
}
# As many channels as patches: rows of tokens and of channels have one shape.
HEIGHT, WIDTH, CHANNELS, HEADS = 4, 3, 12, 3
# Orders in which attention of three dimensions has its first.
FLAT = ("rows, heads", "heads, rows")


class Attention(nn.Module):
    """Attention of tokens among each other, called in one of several ways."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.weights = call, torch.empty(0)
        if call == "module":
            self.inner = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        else:
            self.into, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.call == "module":
            found: Tensor = self.inner(tokens, tokens, tokens, need_weights=False)[0]
            return found
        query, key, value = self.into(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.call == "fused":
            heads = F.scaled_dot_product_attention(query, key, value)
        elif self.call in FLAT:  # one dimension for rows and heads
            heads_lead = self.call == "heads, rows"
            flat = [(one.transpose(0, 1) if heads_lead else one).flatten(0, 1) for one in (query, key, value)]
            found = (flat[0] @ flat[1].mT / query.shape[-1] ** 0.5).softmax(-1) @ flat[2]
            heads = found.unflatten(0, (HEADS, -1)).transpose(0, 1) if heads_lead else found.unflatten(0, (-1, HEADS))
        else:
            scores = query @ key.mT / query.shape[-1] ** 0.5
            self.weights = scores.softmax(-1) if self.call == "softmax" else nn.Softmax(dim=-1)(scores)
            heads = self.weights @ value
        out: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, call: str, answer: str) -> None:
        super().__init__()
        self.norm, self.attention, self.answer = nn.LayerNorm(CHANNELS), Attention(call), answer
        self.rest = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 20), nn.GELU(), nn.Linear(20, CHANNELS))

    def forward(self, tokens: Tensor) -> Any:
        tokens = tokens + self.attention(self.norm(tokens))
        tokens = tokens + self.rest(tokens)
        return (tokens,) if self.answer == "tuple" else tokens


class Transformer(nn.Module):
    """A vision transformer of 12 patches with `first` tokens before them; reads the first token, or the mean of the patches."""

    def __init__(self, blocks: int = 3, call: str = "softmax", first: int = 1, answer: str = "tensor") -> None:
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(3, CHANNELS, 4, stride=4)
        self.more = nn.Parameter(torch.randn(1, first, CHANNELS))
        self.places = nn.Parameter(torch.randn(1, first + HEIGHT * WIDTH, CHANNELS))
        self.blocks = nn.ModuleList(Block(call, answer) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 5)

    def tokens(self, inputs: Tensor) -> Tensor:
        rows = self.stem(inputs).flatten(2).mT
        return torch.cat([self.more.expand(len(inputs), -1, -1), rows], 1) + self.places

    def read(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        found: Tensor = self.head(tokens[:, 0] if self.first else tokens.mean(1))
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.tokens(inputs)
        for block in self.blocks:
            tokens = block(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.read(tokens)


def by_hand(name: str, model: Transformer, inputs: Tensor, target: int, layers: int | None = None) -> Tensor:
    """The map of a model whose attention is a softmax of its own: one image, one block, one gradient at a time."""
    maps = []
    for image in inputs:
        tokens, after = model.tokens(image[None]), []
        for block in model.blocks:
            tokens = block(tokens)
            after.append(tokens)
        total = torch.zeros(model.first + HEIGHT * WIDTH, dtype=torch.float64)
        counted = range(len(after))[slice(0, None) if layers is None else slice(-layers, None)]
        for index in counted:
            score = model.read(after[index] if name == "legrad" else after[-1])[0, target]
            attention = model.blocks[index].attention.weights
            (slope,) = torch.autograd.grad(score, attention, retain_graph=True)
            for head in range(HEADS):
                for looking in range(len(total)):
                    part = slope[0, head, looking].clamp_min(0)
                    part = part * attention[0, head, looking].detach() if name == "gradient_attention" else part
                    total += part / (HEADS * len(total) * len(counted))
        maps.append(total[model.first :].reshape(1, 1, HEIGHT, WIDTH))
    return F.interpolate(torch.cat(maps), inputs.shape[2:], mode="bilinear")


def transformer(**how: Any) -> Transformer:
    model = seeded(lambda: Transformer(**how))
    assert isinstance(model, Transformer)
    return model


def spelled_out(model: Transformer) -> Transformer:
    """The same network with attention as a softmax of its own."""
    found = transformer(blocks=len(model.blocks), first=model.first)
    names = {"inner.in_proj_weight": "into.weight", "inner.in_proj_bias": "into.bias", "inner.out_proj": "out"}
    for ours, name in ((key, key) for key in model.state_dict()):
        own = ours
        for theirs, mine in names.items():
            own = own.replace(theirs, mine)
        found.state_dict()[own].copy_(model.state_dict()[name])
    return found


INPUTS = images(3, 3, 16, 12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"call": "fused"},
        {"call": "module"},
        {"call": "layer"},
        {"call": "rows, heads"},
        {"call": "heads, rows"},
        {"blocks": 1},
        {"blocks": 2, "first": 0},
        {"first": 3, "call": "fused"},
        {"answer": "tuple", "call": "module"},
    ],
    ids=str,
)
def test_maps_are_those_of_a_loop(name: str, how: dict[str, Any]) -> None:
    model = transformer(**how)
    expected = by_hand(name, spelled_out(model), INPUTS, 2)
    for batch_size in (None, 2, 3):
        assert_rounding(FUNCTIONS[name](model, INPUTS, 2, batch_size=batch_size), expected, ROUNDINGS)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_blocks_alone(name: str, layers: int) -> None:
    model = transformer(call="fused")
    assert_rounding(
        FUNCTIONS[name](model, INPUTS[:1], 2, layers=layers),
        by_hand(name, spelled_out(model), INPUTS[:1], 2, layers),
        ROUNDINGS,
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_frozen_weights_and_no_grad_change_nothing(name: str) -> None:
    model = transformer(call="fused")
    expected = FUNCTIONS[name](model, INPUTS, [0, 1, 2])
    model.requires_grad_(False)
    with torch.no_grad():
        assert_rounding(FUNCTIONS[name](model, INPUTS, [0, 1, 2]), expected, ROUNDINGS)


def test_blocks_that_are_one_module() -> None:
    """As ALBERT has them: each run is a block of its own."""
    model, apart = transformer(call="fused"), transformer()
    for index in range(3):
        model.blocks[index] = model.blocks[0]
        apart.blocks[index].load_state_dict(model.blocks[0].state_dict())
    for name, function in FUNCTIONS.items():
        assert_rounding(function(model, INPUTS, 1), by_hand(name, apart, INPUTS, 1), ROUNDINGS)


class Named(Transformer):
    """Calls its blocks by keyword alone, as wrappers of a checkpoint's layers do, with more before the tokens."""

    class Block(Block):
        def forward(self, *, scale: float, hidden_states: Tensor) -> Any:  # type: ignore[override]
            return super().forward(scale * hidden_states)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block("fused", "tensor") for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.tokens(inputs)
        for block in self.blocks:
            tokens = block(scale=1.0, hidden_states=tokens)
        return self.read(tokens)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_blocks_that_are_called_by_keyword_alone(name: str) -> None:
    model, plain = seeded(Named), seeded(Transformer)
    plain.load_state_dict(model.state_dict())
    assert_rounding(FUNCTIONS[name](model, INPUTS, 2), FUNCTIONS[name](plain, INPUTS, 2), ROUNDINGS)


class Skipping(Block):
    """A block that may be given what another returned before the last."""

    def forward(self, tokens: Tensor, skip: Tensor | None = None) -> Any:
        return super().forward(tokens if skip is None else tokens + skip / 2)


class Bridged(Transformer):
    """The first block's tokens go to the last block, too, as in a U-ViT."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named, self.blocks = named, nn.ModuleList(Skipping("softmax", "tensor") for _ in range(3))

    def after(self, tokens: Tensor) -> list[Tensor]:
        first = self.blocks[0](tokens)
        second = self.blocks[1](first)
        return [first, second, self.blocks[2](second, skip=first) if self.named else self.blocks[2](second, first)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.read(self.after(self.tokens(inputs))[-1])


@pytest.mark.parametrize("named", [False, True])
def test_blocks_that_are_given_what_earlier_ones_returned(named: bool) -> None:
    """What the last block is given of the first does not count as the first block's own score."""
    model = seeded(lambda: Bridged(named))
    expected = torch.zeros(1 + HEIGHT * WIDTH, dtype=torch.float64)
    for block, tokens in zip(model.blocks, model.after(model.tokens(INPUTS[:1])), strict=True):
        (slope,) = torch.autograd.grad(model.read(tokens)[0, 2], block.attention.weights, retain_graph=True)
        expected += slope.clamp_min(0).mean((0, 1, 2)) / 3
    expected = F.interpolate(expected[1:].reshape(1, 1, HEIGHT, WIDTH), (16, 12), mode="bilinear")
    assert_rounding(pysal.legrad(model, INPUTS[:1], 2), expected, ROUNDINGS)


class AllRead(Transformer):
    """The head reads the mean of what all blocks returned."""

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.tokens(inputs)
        after = [tokens := block(tokens) for block in self.blocks]
        return self.read((after[0] + after[1] + after[2]) / 3)  # which would broadcast a row


def test_a_head_that_reads_all_blocks() -> None:
    """A block's own score has its tokens in the place of the last's, and the other blocks' of the same image as they are."""
    model, plain = seeded(AllRead), transformer()
    model.load_state_dict(plain.state_dict())
    maps = []
    for image in INPUTS:
        tokens = plain.tokens(image[None])
        after = [tokens := block(tokens) for block in plain.blocks]
        others = torch.stack([one.detach() for one in after[:-1]]).sum(0)
        total = torch.zeros(1 + HEIGHT * WIDTH, dtype=torch.float64)
        for block, own in zip(plain.blocks, after, strict=True):
            score = plain.read((others + own) / 3)[0, 2]
            (slope,) = torch.autograd.grad(score, block.attention.weights, retain_graph=True)
            total += slope.clamp_min(0).mean((0, 1, 2)) / 3
        maps.append(total[1:].reshape(1, 1, HEIGHT, WIDTH))
    expected = F.interpolate(torch.cat(maps), (16, 12), mode="bilinear")
    for batch_size in (1, 3):
        assert_rounding(pysal.legrad(model, INPUTS, 2, batch_size=batch_size), expected, ROUNDINGS)


class Centred(Transformer):
    """The head takes the mean of the batch away."""

    def read(self, tokens: Tensor) -> Tensor:
        return super().read(tokens - tokens.mean((0, 1)) / 2)


def test_a_head_whose_rows_depend_on_each_other() -> None:
    """It must not read the tokens of several blocks in one pass."""
    model = seeded(Centred)
    for inputs in (INPUTS, INPUTS[:1]):
        with pytest.raises(ValueError, match=r"^pysal\.legrad: model must answer for each row of a pass as if it were alone"):
            pysal.legrad(model, inputs, 2)
    found = pysal.legrad(model, INPUTS[:1], 2, batch_size=1)
    assert_rounding(found, by_hand("legrad", model, INPUTS[:1], 2), ROUNDINGS)


class Beside(Transformer):
    """Blocks hand on a second row of tokens, as those that leave their sums to the next block's norm."""

    class Block(Block):
        def forward(self, tokens: Tensor, sums: Tensor | None = None) -> Any:
            sums = tokens if sums is None else tokens + sums
            sums = sums + self.attention(self.norm(sums))
            return self.rest(sums), sums

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Beside.Block("softmax", "tensor") for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens, sums = self.blocks[1](*self.blocks[0](self.tokens(inputs)))
        return self.read(tokens + sums)


def test_blocks_that_hand_on_more_than_their_tokens() -> None:
    """The head reads both rows, so what one block returned cannot be put in the last one's place; without that it can."""
    model = seeded(Beside)
    with pytest.raises(NotApplicable, match=r"got blocks that hand on more than one row of tokens; grad_cam explains such"):
        pysal.legrad(model, INPUTS, 1)
    scores = model(INPUTS)[:, 1]
    slope = torch.autograd.grad(scores.sum(), model.blocks[1].attention.weights)[0]
    expected = slope.clamp_min(0).mean((1, 2))[:, 1:].reshape(3, 1, HEIGHT, WIDTH)
    assert_rounding(pysal.legrad(model, INPUTS, 1, layers=1), F.interpolate(expected, (16, 12), mode="bilinear"), ROUNDINGS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_that_was_given_other_blocks(name: str) -> None:
    """What a call found out of the model is not held against the next."""
    model = transformer()
    FUNCTIONS[name](model, INPUTS, 1)
    more = transformer(blocks=4).blocks[3]
    for blocks in ([*model.blocks][:2], [*model.blocks, more]):
        model.blocks = nn.ModuleList(blocks)
        assert_rounding(FUNCTIONS[name](model, INPUTS, 1), by_hand(name, model, INPUTS, 1), ROUNDINGS)


def test_a_block_that_is_given_rows_of_its_own_runs_on_all() -> None:
    """Where a block is handed a mask for each image, a row alone would not fit it."""

    class Masked(Transformer):
        def forward(self, inputs: Tensor) -> Tensor:
            tokens, weight = self.tokens(inputs), inputs.new_ones(len(inputs), 1, 1)
            for block in self.blocks:
                tokens = block(tokens, weight)
            return self.read(tokens)

    class Weighted(Block):
        def forward(self, tokens: Tensor, weight: Tensor | None = None) -> Any:
            found: Tensor = super().forward(tokens)
            assert weight is None or len(weight) == len(tokens)
            return found if weight is None else found * weight

    plain = transformer()
    model = seeded(lambda: Masked())
    model.blocks = nn.ModuleList(Weighted("softmax", "tensor") for _ in range(3)).double()
    model.load_state_dict(plain.state_dict())
    assert_rounding(pysal.legrad(model.eval(), INPUTS, 1), by_hand("legrad", plain, INPUTS, 1), ROUNDINGS)


def test_the_score_of_a_block_is_of_the_kind_that_is_asked_for() -> None:
    model = transformer(blocks=1)
    tokens = model.blocks[0](model.tokens(INPUTS[:1]))
    probability = model.read(tokens).softmax(1)[0, 3]
    (slope,) = torch.autograd.grad(probability, model.blocks[0].attention.weights)
    expected = slope.clamp_min(0).mean((1, 2))[:, 1:].reshape(1, 1, HEIGHT, WIDTH)
    found = pysal.legrad(model, INPUTS[:1], 3, score="softmax")
    assert_rounding(found, F.interpolate(expected, (16, 12), mode="bilinear"), ROUNDINGS)


def test_explain_names_the_blocks() -> None:
    model = transformer(call="fused")
    found = pysal.explain(model, INPUTS, 1, methods=["legrad", "gradient_attention", "gradient"])
    for name, function in FUNCTIONS.items():
        assert torch.equal(found.maps[name], function(model, INPUTS, 1))
        assert found[name].details["layer"] == "blocks.0 to blocks.2"
        assert found[name].details["native"].shape == (3, 1, HEIGHT, WIDTH)


class Windows(nn.Module):
    """Attention inside windows of four patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        windows = self.stem(inputs).flatten(2).mT.unflatten(1, (-1, 4)).flatten(0, 1)
        seen = F.scaled_dot_product_attention(windows, windows, windows)
        return self.head(seen.unflatten(0, (len(inputs), -1)).mean((1, 2)))


class Twice(nn.Module):
    """Two attentions of the patches in the model itself, in no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.stem(inputs).flatten(2).mT
        for _ in range(2):
            tokens = tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.head(tokens.mean(1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no attention": (smooth, "no attention that torch shows"),
    "windows": (lambda: seeded(Windows), "4 tokens that are no patches of the image"),
    "no modules": (lambda: seeded(Twice), "attention that no module of its own has"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what", REFUSED)
def test_other_models_are_refused(name: str, what: str) -> None:
    build, got = REFUSED[what]
    requirement = "attend from every patch to every patch, in a stack of blocks each of which takes what the last returned"
    with pytest.raises(NotApplicable) as raised:
        FUNCTIONS[name](build(), INPUTS, 1)
    assert str(raised.value) == f"pysal.{name}: model must {requirement}, got {got}; grad_cam explains such a model"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers must be a whole number of at least 1, got 0"),
        (4, "layers must be at most the model's 3 blocks, got 4"),
    ],
)
def test_layers_that_there_are_not(layers: int, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        pysal.legrad(transformer(), INPUTS, 1, layers=layers)
    assert str(raised.value) == f"pysal.legrad: {message}"


def test_a_function_has_no_blocks() -> None:
    with pytest.raises(
        NotApplicable, match=r"pysal\.legrad: model must be an nn\.Module, whose layers can be captured, got function"
    ):
        pysal.legrad(lambda batch: batch.mean((2, 3)), INPUTS, 1)


# What every method promises


class Marked(nn.Module):
    """A transformer with hooks, gradients and frozen weights of its own, which says when a pass reaches its last block."""

    def __init__(self, call: str, reached: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.net = transformer(call=call)
        self.net.blocks[0].requires_grad_(False)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
        self.net.blocks[1].register_forward_hook(lambda *_: None)
        self.net.blocks[2].register_forward_pre_hook(lambda *_: reached())
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["softmax", "fused", "module"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_as_before(name: str, call: str, mode: str) -> None:
    model, inputs = Marked(call), INPUTS.clone()
    expected = FUNCTIONS[name](model, inputs, 1)
    with MODES[mode]():
        before = snapshot(model, inputs)
        found = FUNCTIONS[name](model, inputs, 1)
        assert_same(before, snapshot(model, inputs))
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", ["softmax", "fused", "module"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_as_before_a_call_that_ended_early(name: str, call: str, error: type[BaseException]) -> None:
    passes, fatal = [0], [0]

    def reached() -> None:
        passes[0] += 1
        if passes[0] == fatal[0]:
            raise error

    model, inputs = Marked(call, reached), INPUTS.clone()
    expected = FUNCTIONS[name](model, inputs, 1, batch_size=1)
    asked = passes[0]  # by a first call, which also looks at how the model works
    for number in range(1, asked + 1):
        model = Marked(call, reached)
        passes[0], fatal[0] = 0, number
        before = snapshot(model, inputs)
        try:
            found = FUNCTIONS[name](model, inputs, 1, batch_size=1)
        except error:
            found = None
        assert_same(before, snapshot(model, inputs))
        if found is not None:  # a shortcut failed, and the long way was gone
            assert error is not KeyboardInterrupt
            assert_rounding(found, expected, ROUNDINGS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_batch_size_any_company_and_any_layout_give_the_same(name: str) -> None:
    model, inputs, classes = transformer(call="fused"), images(5, 3, 16, 12), [0, 3, 1, 4, 2]
    expected = torch.cat([FUNCTIONS[name](model, inputs[[row]], classes[row]) for row in range(5)])
    assert float(expected.abs().max()) > 0
    for batch_size in (1, 2, 3, 1000, None):
        assert_rounding(FUNCTIONS[name](model, inputs, classes, batch_size=batch_size), expected, ROUNDINGS)
    rows = [4, 2, 0]
    assert_rounding(FUNCTIONS[name](model, inputs[rows], [classes[row] for row in rows]), expected[rows], ROUNDINGS)
    channels_last = inputs.contiguous(memory_format=torch.channels_last)
    assert_rounding(FUNCTIONS[name](model, channels_last, classes), expected, ROUNDINGS)
    wide = torch.cat([inputs, inputs], 3)
    assert_rounding(FUNCTIONS[name](model, wide[..., :12], classes), expected, ROUNDINGS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_threads_explain_the_same_model(name: str) -> None:
    assert_two_threads_agree(FUNCTIONS[name], Marked("fused"), INPUTS)
