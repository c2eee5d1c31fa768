"""Attention and its gradient are as close to the truth as softmax and products in float32, wherever their inputs lie."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pysal
from pysal.engine.graph.exported import capture
from pysal.engine.graph.fold import fold_graph, trace
from pysal.engine.graph.fused_attention import FusedAttention, available, fits
from pysal.engine.graph.lowered import lower
from pysal.engine.graph.shapes import shapes_of
from pysal.engine.prepared.gains import Gains
from pysal.engine.tape.attention import AttentionOperator
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, required, sample

compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")
# images, heads, queries, keys, width, width of the values
SHAPES = {
    "as in a vision transformer": (2, 3, 197, 197, 64, 64),
    "a window": (4, 2, 49, 49, 32, 32),
    "fewest keys": (1, 2, 16, 16, 16, 16),
    "one query": (3, 1, 1, 17, 16, 16),
    "more queries than keys": (1, 2, 60, 31, 48, 16),
    "tiles of every size": (1, 1, 29, 47, 80, 96),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[int, int, int, int, int, int]


def inputs(shape: Shape) -> list[Tensor]:
    images, heads, queries, keys, width, value_width = shape
    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [sample(images, heads, *size, seed=seed) for seed, size in enumerate(sizes)]


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype).repeat(len(scores) // len(bias), 1, 1, 1)
    return torch.softmax(scores, -1) @ value


def gradients(grad: Tensor, given: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in given]
    return list(torch.autograd.grad(formula(*leaves, *rest), leaves, grad))


def in_panels(bias: Tensor) -> Tensor:
    padded = FusedAttention(1.0, bias).bias
    assert padded is not None
    return padded


def biases(shape: Shape) -> dict[str, Tensor | None]:
    """Of one window or of one for each image, of one head or of each, and one that hides keys."""
    images, heads, queries, keys = shape[:4]
    hidden = sample(1, heads, queries, keys, seed=7).masked_fill(torch.arange(keys) % 3 == 1, -math.inf)
    return {
        "none": None,
        "of all": sample(1, 1, queries, keys, seed=5),
        "of each": 3 * sample(images, heads, queries, keys, seed=6),
        "hidden": hidden,
    }


@compiled
@shapes
@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("kind", ["none", "of all", "of each", "hidden"])
def test_as_close_as_float32(shape: Shape, scale: float | None, kind: str) -> None:
    given, bias = inputs(shape), biases(shape)[kind]
    factor = 1 / math.sqrt(shape[4]) if scale is None else scale
    exact, own = [each.double() for each in given], None if bias is None else in_panels(bias)
    got = torch.ops.pysal_attention.attention(*given, own, factor).transpose(1, 2)
    assert_no_worse(got, formula(*exact, factor, bias), formula(*given, factor, bias))
    grad = sample(*got.shape, seed=8)
    found = torch.ops.pysal_attention.attention_backward(grad, *given, own, factor)
    truth, plain = gradients(grad.double(), exact, factor, bias), gradients(grad, given, factor, bias)
    for one, best, base in zip(found, truth, plain, strict=True):
        assert_no_worse(one.transpose(1, 2), best, base)


@compiled
def test_a_bias_takes_a_scale_below_zero() -> None:
    given = inputs((2, 2, 17, 18, 16, 16))
    bias = sample(2, 1, 17, 18, seed=5)
    got = torch.ops.pysal_attention.attention(*given, in_panels(bias), -0.5).transpose(1, 2)
    exact = [each.double() for each in given]
    assert_no_worse(got, formula(*exact, -0.5, bias), formula(*given, -0.5, bias))


@compiled
def test_inputs_may_lie_anywhere() -> None:
    images, heads, tokens, width = 2, 3, 21, 32
    joint = sample(images, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    given, dense = list(joint.unbind(0)), [each.contiguous() for each in joint.unbind(0)]
    shared = [dense[0], dense[1][:, :1].expand(-1, heads, -1, -1), dense[2][:1].expand(images, -1, -1, -1)]
    wide = sample(images, heads, 2 * tokens, width, seed=3)[:, :, ::2]
    for apart in (given, shared, [given[0], wide, given[2]]):
        together = [each.contiguous() for each in apart]
        got, expected = (torch.ops.pysal_attention.attention(*each, None, 0.3) for each in (apart, together))
        assert torch.equal(got, expected)
        grad = sample(images, tokens, heads, width, seed=4).transpose(1, 2)
        for grads in (grad, grad[:, :, :1].expand_as(grad)):
            found = torch.ops.pysal_attention.attention_backward(grads, *apart, None, 0.3)
            whole = torch.ops.pysal_attention.attention_backward(grads.contiguous(), *together, None, 0.3)
            assert all(map(torch.equal, found, whole))


@compiled
def test_gradients_of_several_classes_share_the_images_weights() -> None:
    shape = (2, 2, 18, 18, 16, 16)
    given, grad = inputs(shape), sample(6, 2, 18, 16, seed=6)
    bias = in_panels(sample(2, 2, 18, 18, seed=7))
    whole = torch.ops.pysal_attention.attention_backward(grad, *given, bias, 0.25)
    for first in (0, 2, 4):
        part = torch.ops.pysal_attention.attention_backward(grad[first : first + 2], *given, bias, 0.25)
        assert all(torch.equal(all_[first : first + 2], one) for all_, one in zip(whole, part, strict=True))


@compiled
def test_large_scores_do_not_overflow_and_nan_comes_through() -> None:
    query, key, value = inputs((1, 1, 20, 20, 16, 16))
    got = torch.ops.pysal_attention.attention(1e6 * query, 1e6 * key, value, None, 1.0).transpose(1, 2)
    best = (query.double() @ key.double().transpose(2, 3)).argmax(-1)[0, 0]
    assert torch.equal(got[0, 0], value[0, 0, best])
    query[0, 0, 3, 4] = torch.nan
    for bias in (None, in_panels(torch.zeros(1, 1, 20, 20))):
        rows = torch.ops.pysal_attention.attention(query, key, value, bias, 1.0)[0].isnan().all(-1)[:, 0]
        assert rows.nonzero().flatten().tolist() == [3]


@compiled
def test_what_memory_safety_needs_is_refused() -> None:
    query, key, value = inputs((2, 2, 18, 18, 16, 16))
    grad = torch.zeros_like(query)
    bias = torch.zeros(2, 2, 18, 32)
    wrong: list[tuple[Any, ...]] = [
        (query.double(), key, value, None),
        (query, key[:1], value, None),
        (query, key, value[:, :, :17], None),
        (query, key[:, :, :15], value[:, :, :15], None),
        (query[..., :8], key[..., :8], value[..., :8], None),
        (query, key, torch.cat([value, value[..., :8]], -1), None),
        (query.transpose(2, 3), key, value, None),
        (query[0], key, value, None),
        (query, key, value, bias[..., :18]),
        (query, key, value, bias[:, :, :17]),
        (query, key, value, bias.double()),
        (query, key, value, bias[0]),
        (query, key, value, bias.repeat(2, 1, 1, 1)),
        (query, key, value, bias.repeat(1, 2, 1, 1)),
        (query, key, value, bias[:0]),
    ]
    for given in wrong:
        with pytest.raises(RuntimeError, match="pysal_attention::attention: "):
            torch.ops.pysal_attention.attention(*given, 1.0)
        with pytest.raises(RuntimeError, match="pysal_attention::attention_backward: "):
            torch.ops.pysal_attention.attention_backward(grad, *given, 1.0)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(RuntimeError, match="scale must be above 0 where there is no bias"):
            torch.ops.pysal_attention.attention(query, key, value, None, scale)
    for other in (grad[:1], grad[:, :1], grad[:, :, :17], grad.double(), grad[..., :8], grad.transpose(2, 3)):
        with pytest.raises(RuntimeError, match="pysal_attention::attention_backward: "):
            torch.ops.pysal_attention.attention_backward(other, query, key, value, None, 1.0)


class Attending(nn.Module):
    """A convolution into 8 x 8 tokens of two heads, attention, and its mean."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.width, self.options = width, options
        self.embed = nn.Conv2d(3, 6 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).unflatten(1, (3, 2, self.width)).transpose(3, 4)
        query, key, value = tokens[:, 0], tokens[:, 1], tokens[:, 2]
        return F.scaled_dot_product_attention(query, key, value, **self.options).mean(2).flatten(1)


MASKED = torch.ones(64, 64, dtype=torch.bool).tril_(3)


@compiled
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"dropout_p": 0.0},
        {"attn_mask": None},
        {"is_causal": True},
        {"attn_mask": torch.eye(64) * 3},
        {"attn_mask": torch.eye(64) * 3, "scale": -0.5},
        {"attn_mask": MASKED},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_on_the_tape(options: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("pysal.engine.graph.fused_attention.available", lambda: False)
    assert_gradient(Attending(16, **options), int(native))


NOBODY = MASKED.clone()
NOBODY[3] = False


@pytest.mark.parametrize("options", [{"scale": -0.5}, {"attn_mask": NOBODY}], ids=str)
def test_other_attention_runs_under_autograd(options: dict[str, Any]) -> None:
    assert_gradient(Attending(16, **options), 0)


def test_other_widths_run_under_autograd() -> None:
    assert_gradient(Attending(12), 0)
    narrow, wide = (2, 2, 64, 12), (2, 2, 64, 16)
    assert not fits(narrow, narrow, narrow)
    assert not fits(wide, wide, narrow)
    assert not fits(wide, wide[1:], wide)
    assert not fits(wide, (2, 2, 15, 16), (2, 2, 15, 16))
    double, none = torch.zeros(wide, dtype=torch.float64), torch.zeros(0, 2, 64, 16)
    assert not FusedAttention(1.0, None).fits(double, double, double)
    assert not FusedAttention(1.0, None).fits(none, none, none)


class Spelt(nn.Module):
    """Windows of 4 x 4 of an 8 x 8 map, whose attention is spelt out in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.embed = way, nn.Conv2d(3, 96, 3)
        self.table = nn.Parameter(sample(49, 2, seed=3))
        self.register_buffer("places", torch.arange(16)[:, None] - torch.arange(16) + 15)
        self.register_buffer("mask", torch.where(sample(4, 16, 16, seed=4) > 0.3, -100.0, 0.0))
        self.register_buffer("hidden", torch.ones(16, 16, dtype=torch.bool).triu_(1))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        factor = 32**-0.5
        if self.way == "before":
            return (query * factor) @ key.transpose(-2, -1)
        if self.way == "divided":
            return torch.matmul(query, key.permute(0, 1, 3, 2)) / 5.0
        if self.way == "sum then product":
            return (torch.matmul(query, key.transpose(2, 3)) + self.bias()) * factor
        if self.way == "hidden":
            return (query @ key.transpose(-1, -2)).mul(factor).masked_fill(self.hidden, float("-inf"))
        scores = factor * query.matmul(key.transpose(-1, -2)) + self.bias()
        if self.way == "windows":
            scores = scores.view(-1, 4, 2, 16, 16) + self.mask[None, :, None]
            scores = scores.reshape(-1, 2, 16, 16)
        return scores + query.mean((1, 2, 3), keepdim=True) if self.way == "an image's own" else scores

    def bias(self) -> Tensor:
        return self.table[self.places.view(-1)].view(16, 16, 2).permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.embed(x).unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1)
        tokens = windows.reshape(-1, 16, 96).reshape(-1, 16, 3, 2, 16)
        query, key, value = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.scores(query, key).softmax(dim=-1)
        joined = (weights @ value).transpose(1, 2).reshape(-1, 4, 16, 32)
        return joined.sin().mean((1, 2))


@compiled
@pytest.mark.parametrize("way", ["before", "divided", "sum then product", "hidden", "bias", "windows", "an image's own"])
def test_attention_spelt_out(way: str) -> None:
    assert_gradient(Spelt(way), int(way != "an image's own"))


class MaskedForAll(Attending):
    """Attention whose mask is made in the pass, and expanded to as many images as there are."""

    def __init__(self, way: str) -> None:
        super().__init__(16)
        self.way = way
        self.register_buffer("bias", sample(1, 2, 64, 64, seed=3))

    def mask(self, images: int) -> Tensor:
        numbers = torch.arange(64)
        shown = (numbers[:, None] >= numbers[None] - (64 if self.way == "all" else 0)).expand(images, 1, 64, 64)
        return self.bias + shown if self.way == "sum" else shown

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).unflatten(1, (3, 2, self.width)).transpose(3, 4)
        query, key, value = tokens.unbind(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(x.shape[0])).mean(2).flatten(1)


@compiled
@pytest.mark.parametrize("way", ["all", "causal", "sum"])
def test_a_mask_that_is_the_same_for_all_images(way: str) -> None:
    model = MaskedForAll(way).eval()
    graph, _ = capture(model, sample(2, 3, 10, 10), any_number=True)
    operator = assert_gradient(model, 1, graph)
    assert (operator.module.bias is None) == (way == "all")


def assert_gradient(model: nn.Module, operators: int, graph: fx.GraphModule | None = None) -> Any:
    torch.manual_seed(0)
    x = sample(2, 3, 10, 10)
    graph = trace(model.eval())[0] if graph is None else graph
    shapes_of(graph, x)
    fold_graph(graph)
    lower(graph, x[:1])
    program = Program(graph)
    attentions = [each for each in program.operators.values() if isinstance(each, AttentionOperator)]
    assert len(attentions) == operators
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    grad = sample(*output.shape, seed=1)
    (expected,) = torch.autograd.grad(output, leaf, grad, retain_graph=True)
    tape = program.record(x)
    torch.testing.assert_close(tape.output, output.detach(), rtol=1e-5, atol=1e-6)
    for times in (1, 2):  # swept twice, too
        found, _ = tape.sweep(torch.cat([grad] * times))
        assert found is not None
        torch.testing.assert_close(found, torch.cat([expected] * times), rtol=1e-4, atol=1e-6)
    return attentions[0] if attentions else None


@compiled
def test_a_prepared_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention, self.head = nn.Conv2d(3, 32, 4, 4), layer.self_attn, nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return self.head(tokens.mean(1))  # type: ignore[no-any-return]

    model, x = Transformer().eval(), sample(2, 3, 24, 24)
    fast = pysal.prepare(model, x[:1], batch_size=2, gains=Gains(2.0, 2.0))
    assert fast.program is not None, fast.report()
    assert any(isinstance(each, AttentionOperator) for each in fast.program.operators.values())
    torch.testing.assert_close(pysal.gradient(fast, x, 3), pysal.gradient(model, x, 3), rtol=1e-4, atol=1e-6)
