"""fill="drop": patches that are left out are those of a loop by hand, and a model that has none to leave out is refused."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import Grid, metrics
from pysal.engine.request import patch_tokens
from pysal.explanation.result import Explanation

PATCH, SIDE, WIDTH = 4, 3, 8
PATCHES = SIDE * SIDE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class Transformer(nn.Module):
    """A vision transformer of a few numbers; `late` adds positions inside the blocks, by how many tokens there are."""

    def __init__(self, *, pooled: bool = False, last: bool = False, late: bool = False, leaks: bool = False) -> None:
        super().__init__()
        self.pooled, self.last, self.late, self.leaks = pooled, last, late, leaks
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, PATCHES + 1, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 4)

    def tokens(self, images: Tensor) -> Tensor:
        """The class token stands first, or last."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(patches), 1, WIDTH)
        found = torch.cat([patches, token] if self.last else [token, patches], 1)
        return found if self.late else found + self.positions

    def answer(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens + self.positions[:, : tokens.shape[1]] if self.late else tokens)
        if self.pooled:
            return self.head((tokens[:, :-1] if self.last else tokens[:, 1:]).mean(1))
        return self.head(tokens[:, -1] if self.last else tokens[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        found = self.answer(self.tokens(images))
        return found + images.mean((1, 2, 3))[:, None] if self.leaks else found


def transformer(**options: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**options).double().eval()


def images(count: int = 2, size: int = PATCH * SIDE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def without(model: Transformer, image: Tensor, gone: set[int]) -> Tensor:
    """The class scores (K,) of an image without some patches, by the model's own parts."""
    patches = [place for place in range(PATCHES) if place not in gone]
    kept = [*patches, PATCHES] if model.last else [0, *(place + 1 for place in patches)]
    with torch.no_grad():
        return model.answer(model.tokens(image[None])[:, kept])[0]


def explained(model: Any, inputs: Tensor, **options: Any) -> Explanation:
    wanted = {"leave_one_out": {"fill": "drop", **options}}
    return pysal.explain(model, inputs, 1, methods="leave_one_out", score="logit", method_options=wanted)


def close(found: Tensor, expected: Tensor) -> None:
    """To float64 rounding of a few thousand additions of numbers around 1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"pooled": True}, {"last": True}, {"last": True, "pooled": True}], ids=str)
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_drops_are_those_of_a_loop_by_hand(options: dict[str, bool], batch_size: int | None) -> None:
    model, inputs = transformer(**options), images()
    with torch.no_grad():
        clean = model(inputs)
    segments = Grid(SIDE, SIDE)
    wanted = {"leave_one_out": {"fill": "drop", "segments": segments}}
    found = pysal.explain(
        model, inputs, 1, methods="leave_one_out", score="logit", method_options=wanted, batch_size=batch_size
    )["leave_one_out"]
    expected = torch.stack(
        [
            torch.stack([clean[row] - without(model, image, {place}) for place in range(PATCHES)])
            for row, image in enumerate(inputs)
        ]
    )
    for row in range(len(inputs)):
        close(found.details["drops"][row], expected[row, :, 1])
        close(found.details["class_drops"][row], expected[row].t())
    at_pixels = expected[:, :, 1].view(-1, 1, SIDE, SIDE).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    close(found.map, at_pixels)


@pytest.mark.parametrize("mode", ["in", "both"])
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_gains_are_those_of_a_loop_by_hand(mode: str, batch_size: int | None) -> None:
    model, inputs = transformer(last=True), images()
    labels = torch.arange(SIDE).repeat_interleave(PATCH)[:, None] % 2 * 2 + torch.arange(12) // 8  # of 1 to 4 patches
    patches = labels[::PATCH, ::PATCH].flatten()
    wanted = {"leave_one_out": {"fill": "drop", "segments": labels, "mode": mode}}
    found = pysal.explain(
        model, inputs, 1, methods="leave_one_out", score="logit", method_options=wanted, batch_size=batch_size
    )["leave_one_out"]
    everything = set(range(PATCHES))
    for row, image in enumerate(inputs):
        nothing, clean = without(model, image, everything), without(model, image, set())
        own = [{place for place in everything if patches[place] == segment} for segment in range(4)]
        gains = torch.stack([without(model, image, everything - some) - nothing for some in own])
        drops = torch.stack([clean - without(model, image, some) for some in own])
        close(found.details["gains"][row], gains[:, 1])
        close(found.details["class_gains"][row], gains.t())
        close(found.details["fill_scores"][row], nothing[1])
        means = (gains + drops)[:, 1] / 2
        assert ("drops" in found.details) == (mode == "both")
        if mode == "both":
            close(found.details["drops"][row], drops[:, 1])
            close(found.details["means"][row], means)
        close(found.map[row, 0], (means if mode == "both" else gains[:, 1])[labels])
    assert found.passes == 1 + (1 + 4 if mode == "in" else 1 + 8)


def test_a_model_is_looked_at_once_as_long_as_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    find = patch_tokens._find
    monkeypatch.setattr(patch_tokens, "_find", lambda plan: looks.append(plan) or find(plan))
    model, inputs = transformer(), images(1)
    options: dict[str, Any] = {"segments": Grid(SIDE, SIDE), "fill": "drop", "score": "logit"}
    first = pysal.leave_one_out(model, inputs, 1, **options)
    assert torch.equal(pysal.leave_one_out(model, inputs, 1, **options), first)
    pysal.leave_one_out(model, inputs.flip(3), 2, **options)
    assert len(looks) == 1
    model.blocks = nn.Sequential(Block(), Block()).double().eval()
    close(pysal.leave_one_out(model, inputs, 1, **options)[0, 0, 0, 0], (model(inputs) - without(model, inputs[0], {0}))[0, 1])
    assert len(looks) == 2
    model.late = True  # since then its positions depend on how many tokens there are
    with pytest.raises(ValueError, match=PLACES):
        pysal.leave_one_out(model, inputs, 1, **options)
    assert len(looks) == 3
    with pytest.raises(ValueError, match=PLACES):
        pysal.leave_one_out(model, inputs, 1, **options)
    assert len(looks) == 3
    gone = weakref.ref(model)
    del model, looks[:]
    gc.collect()
    assert gone() is None


def test_a_patch_goes_with_a_segment_that_covers_half_of_it_or_else_most() -> None:
    model, inputs = transformer(), images(1)
    labels = torch.full((12, 12), -1)
    labels[:4, :6] = 0  # patch 0 whole, half of patch 1
    labels[0, 6:9] = 1  # two pixels of patch 1, one of patch 2
    labels[4:12, :7] = 2  # three quarters of patches 4 and 7
    labels[4:12, 7:9] = 3  # a quarter of patches 4, 5, 7 and 8: the first of them
    found = pysal.explain(
        model,
        inputs,
        1,
        methods="leave_one_out",
        method_options={"leave_one_out": {"segments": labels, "fill": "drop"}},
        score="logit",
    )
    with torch.no_grad():
        clean = model(inputs)[0, 1]
    expected = [{0, 1}, {1}, {3, 4, 6, 7}, {4}]
    close(
        found["leave_one_out"].details["drops"][0],
        torch.stack([clean - without(model, inputs[0], gone)[1] for gone in expected]),
    )


def test_ragged_label_maps_and_windows_that_overlap() -> None:
    model, inputs = transformer(), images(2)
    labels = torch.zeros(2, 12, 12, dtype=torch.int64)
    labels[1, :, 4:] = 1
    labels[1, 8:, 8:] = 2
    found = explained(model, inputs, segments=labels)["leave_one_out"].details["drops"]
    with torch.no_grad():
        clean = model(inputs)[:, 1]
    gone = [[set(range(9))], [{0, 3, 6}, {1, 2, 4, 5, 7}, {8}]]
    for row, sets in enumerate(gone):
        close(found[row], torch.stack([clean[row] - without(model, inputs[row], one)[1] for one in sets]))
    windows = explained(model, inputs, segments=pysal.Window(8, 4))["leave_one_out"].details["drops"]
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    squares = [{(top + y) * SIDE + left + x for y in (0, 1) for x in (0, 1)} for top, left in corners]
    for row in range(2):
        close(windows[row], torch.stack([clean[row] - without(model, inputs[row], one)[1] for one in squares]))


def test_pixels_beyond_the_patches_are_no_ones() -> None:
    model, inputs = transformer(), images(1, 14)
    labels = torch.zeros(14, 14, dtype=torch.int64)
    labels[12:] = 1
    labels[:4, 4:8] = 2
    found = explained(model, inputs, segments=labels)["leave_one_out"].details["drops"][0]
    with torch.no_grad():
        clean = model(inputs)[0, 1]
    gone = [set(range(9)) - {1}, set[int](), {1}]
    close(found, torch.stack([clean - without(model, inputs[0], one)[1] for one in gone]))


@pytest.mark.parametrize("pooled", [False, True])
def test_curves_leave_patches_out_in_the_order_of_the_map(pooled: bool) -> None:
    model, inputs = transformer(pooled=pooled), images(2)
    maps = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_patch = maps.view(2, SIDE, PATCH, SIDE, PATCH).sum((2, 4)).flatten(1)
    most = PATCHES - 1 if pooled else PATCHES  # one stays where their mean is asked for
    for steps in (8, 3):
        deleted = metrics.deletion(model, inputs, maps, 1, substrate="drop", steps=steps, score="logit")
        inserted = metrics.insertion(model, inputs, maps, 1, substrate="drop", steps=steps, score="logit")
        numbers = [step * most // steps for step in range(steps + 1)]
        for row in range(2):
            order = by_patch[row].argsort(descending=True).tolist()
            gone = [set(order[:number]) for number in numbers]
            left = [set(order[number + PATCHES - most :]) for number in numbers]
            close(deleted.scores[row], torch.stack([without(model, inputs[row], one)[1] for one in gone]))
            close(inserted.scores[row], torch.stack([without(model, inputs[row], one)[1] for one in left]))
        close(deleted.shares, torch.tensor(numbers, dtype=torch.float64) / most)


def test_tokens_may_come_before_rows() -> None:
    torch.manual_seed(0)

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Linear(WIDTH, 4)
            self.positions = nn.Parameter(torch.randn(PATCHES, 1, WIDTH))
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16), 2, enable_nested_tensor=False)

        def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
            tokens = self.embed(inputs).flatten(2).permute(2, 0, 1) + self.positions
            return self.head(self.encoder(tokens if kept is None else tokens[kept]).mean(0))

    model, inputs = TokensFirst().double().eval(), images(9)  # as many rows as there are tokens
    found = explained(model, inputs, segments=Grid(SIDE, SIDE))["leave_one_out"].details["drops"]
    with torch.no_grad():
        clean = model(inputs)[:, 1]
        kept = [torch.tensor([place for place in range(PATCHES) if place != one]) for one in range(PATCHES)]
        expected = torch.stack([clean - model(inputs, one)[:, 1] for one in kept], 1)
    close(torch.stack(found), expected)


def test_wrappers_and_prepared_models_run_the_layers_inside() -> None:
    plain, inputs = transformer(), images(2)
    expected = pysal.leave_one_out(plain, inputs, 1, segments=Grid(SIDE, SIDE), fill="drop", score="logit")
    normalised = pysal.Normalized(plain, (0.0,) * 3, (1.0,) * 3)
    for model in (normalised, pysal.prepare(plain, inputs), torch.compile(plain, backend="eager")):
        close(pysal.leave_one_out(model, inputs, 1, segments=Grid(SIDE, SIDE), fill="drop", score="logit"), expected)


def test_model_and_random_numbers_stay_as_they_were() -> None:
    model, inputs = transformer(), images(2)
    before = torch.get_rng_state()
    kept = inputs.clone()
    pysal.leave_one_out(model, inputs, 1, segments=Grid(SIDE, SIDE), fill="drop")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inputs, kept)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).double().eval()


def overlapping() -> nn.Module:
    model = transformer()
    model.embed = nn.Conv2d(3, WIDTH, PATCH + 1, PATCH, padding=1).double()
    return model


NO_TOKENS = "one where no layer is given a row of tokens, each of one patch"
PLACES = "one where layers need all tokens, each in its place, as with relative or rotary positions"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (convolutional, NO_TOKENS),
        (overlapping, NO_TOKENS),
        (lambda: transformer(late=True), PLACES),
        (lambda: transformer(leaks=True), "one where the answer depends on pixels of patches whose tokens are left out"),
        (lambda: transformer().forward, "one where Python runs no layers that tokens could be taken from"),
    ],
)
def test_what_has_no_patch_tokens_to_leave_out_is_refused(make: Any, why: str) -> None:
    model, inputs = make(), images(2)
    sentence = "must be another than 'drop' for a model without patch tokens to leave out, got " + why
    with pytest.raises(ValueError, match=f"^pysal.leave_one_out: fill {sentence}$"):
        pysal.leave_one_out(model, inputs, 1, segments=Grid(SIDE, SIDE), fill="drop")
    with pytest.raises(ValueError, match=f"^pysal.metrics.deletion: substrate {sentence}$"):
        metrics.deletion(model, inputs, inputs, 1, substrate="drop", steps=2)


def test_other_arguments_that_do_not_go_with_it_are_refused() -> None:
    model, inputs = transformer(pooled=True), images(1)
    with pytest.raises(
        ValueError, match=r"segments must leave a patch each .*, got segment 0 of image 0, which covers all of them$"
    ):
        pysal.leave_one_out(model, inputs, 1, segments=Grid(1, 1), fill="drop")
    with pytest.raises(ValueError, match=r"approximate must be None with fill='drop', which paints no boxes, got 0.5$"):
        pysal.leave_one_out(model, inputs, 1, segments=Grid(2, 2), fill="drop", approximate=0.5)
    sentence = "mode must be 'out' with fill='drop' for a model that has no answer to no patches, got 'both'$"
    with pytest.raises(ValueError, match=sentence):  # the mean of no patches is no number
        pysal.leave_one_out(model, inputs, 1, segments=Grid(2, 2), fill="drop", mode="both")
    with pytest.raises(ValueError, match=r"steps must be at most the 9 patches of an image, with substrate='drop', got 10$"):
        metrics.insertion(model, inputs, inputs, 1, substrate="drop", steps=10)
    with pytest.raises(ValueError, match=r"float16 rounds too coarsely to tell what depends on what$"):
        pysal.leave_one_out(transformer().half(), images(1).half(), 1, segments=Grid(2, 2), fill="drop")
    with pytest.raises(ValueError, match=r"did you mean 'drop'"):
        pysal.leave_one_out(model, inputs, 1, fill="drops")
