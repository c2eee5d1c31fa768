"""Attention and its gradient are as close to the truth as softmax and products in float32, wherever their inputs lie."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.graph.fold import fold_graph, trace
from pysal.engine.graph.lowered import lower
from pysal.engine.prepared.gains import Gains
from pysal.engine.tape.attention import AttentionOperator, available, fits
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, required, sample

compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")
# images, heads, queries, keys, width
SHAPES = {
    "as in a vision transformer": (2, 3, 197, 197, 64),
    "a window": (4, 2, 49, 49, 32),
    "fewest keys": (1, 2, 16, 16, 16),
    "one query": (3, 1, 1, 17, 16),
    "more queries than keys": (1, 2, 60, 31, 48),
    "tiles of every size": (1, 1, 29, 47, 80),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[int, int, int, int, int]


def inputs(shape: Shape) -> list[Tensor]:
    images, heads, queries, keys, width = shape
    return [sample(images, heads, count, width, seed=seed) for seed, count in enumerate((queries, keys, keys))]


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key.transpose(2, 3) * scale, -1) @ value


def gradients(grad: Tensor, given: list[Tensor], scale: float) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in given]
    return list(torch.autograd.grad(formula(*leaves, scale), leaves, grad))  # type: ignore[misc]


@compiled
@shapes
@pytest.mark.parametrize("scale", [None, 1.5])
def test_as_close_as_float32(shape: Shape, scale: float | None) -> None:
    given = inputs(shape)
    factor = 1 / math.sqrt(shape[-1]) if scale is None else scale
    exact = [each.double() for each in given]
    got = torch.ops.pysal_attention.attention(*given, factor).transpose(1, 2)
    assert_no_worse(got, formula(*exact, factor), formula(*given, factor))  # type: ignore[misc]
    grad = sample(*got.shape, seed=5)
    found = torch.ops.pysal_attention.attention_backward(grad, *given, factor)
    for one, truth, plain in zip(found, gradients(grad.double(), exact, factor), gradients(grad, given, factor), strict=True):
        assert_no_worse(one.transpose(1, 2), truth, plain)


@compiled
def test_inputs_may_lie_anywhere() -> None:
    images, heads, tokens, width = 2, 3, 21, 32
    joint = sample(images, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    given, dense = list(joint.unbind(0)), [each.contiguous() for each in joint.unbind(0)]
    shared = [dense[0], dense[1][:, :1].expand(-1, heads, -1, -1), dense[2][:1].expand(images, -1, -1, -1)]
    wide = sample(images, heads, 2 * tokens, width, seed=3)[:, :, ::2]
    for apart in (given, shared, [given[0], wide, given[2]]):
        together = [each.contiguous() for each in apart]
        got, expected = (torch.ops.pysal_attention.attention(*each, 0.3) for each in (apart, together))
        assert torch.equal(got, expected)
        grad = sample(images, tokens, heads, width, seed=4).transpose(1, 2)
        for grads in (grad, grad[:, :, :1].expand_as(grad)):
            found = torch.ops.pysal_attention.attention_backward(grads, *apart, 0.3)
            whole = torch.ops.pysal_attention.attention_backward(grads.contiguous(), *together, 0.3)
            assert all(map(torch.equal, found, whole))


@compiled
def test_gradients_of_several_classes_share_the_images_weights() -> None:
    given = inputs((2, 2, 18, 18, 16))
    grad = sample(6, 2, 18, 16, seed=6)
    whole = torch.ops.pysal_attention.attention_backward(grad, *given, 0.25)
    for first in (0, 2, 4):
        part = torch.ops.pysal_attention.attention_backward(grad[first : first + 2], *given, 0.25)
        assert all(torch.equal(all_[first : first + 2], one) for all_, one in zip(whole, part, strict=True))


@compiled
def test_large_scores_do_not_overflow_and_nan_comes_through() -> None:
    query, key, value = inputs((1, 1, 20, 20, 16))
    got = torch.ops.pysal_attention.attention(1e6 * query, 1e6 * key, value, 1.0).transpose(1, 2)
    best = (query.double() @ key.double().transpose(2, 3)).argmax(-1)[0, 0]
    assert torch.equal(got[0, 0], value[0, 0, best])
    query[0, 0, 3, 4] = torch.nan
    rows = torch.ops.pysal_attention.attention(query, key, value, 1.0)[0].isnan().all(-1)[:, 0]
    assert rows.nonzero().flatten().tolist() == [3]


@compiled
def test_what_memory_safety_needs_is_refused() -> None:
    query, key, value = inputs((2, 2, 18, 18, 16))
    grad = torch.zeros_like(query)
    wrong: list[tuple[Any, ...]] = [
        (query.double(), key, value),
        (query, key[:1], value),
        (query, key, value[:, :, :17]),
        (query, key[:, :, :15], value[:, :, :15]),
        (query[..., :8], key[..., :8], value[..., :8]),
        (query.transpose(2, 3), key, value),
        (query[0], key, value),
    ]
    for given in wrong:
        with pytest.raises(RuntimeError, match="pysal_attention::attention: "):
            torch.ops.pysal_attention.attention(*given, 1.0)
        with pytest.raises(RuntimeError, match="pysal_attention::attention_backward: "):
            torch.ops.pysal_attention.attention_backward(grad, *given, 1.0)
    for other in (grad[:1], grad[:, :1], grad[:, :, :17], grad.double(), grad[..., :8], grad.transpose(2, 3)):
        with pytest.raises(RuntimeError, match="pysal_attention::attention_backward: "):
            torch.ops.pysal_attention.attention_backward(other, query, key, value, 1.0)


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


@compiled
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"dropout_p": 0.0}, {"attn_mask": None}], ids=str)
def test_on_the_tape(options: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("pysal.engine.tape.attention.available", lambda: False)
    assert_gradient(Attending(16, **options), 1)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": -0.5}, {"attn_mask": torch.eye(64) * 3}], ids=str)
def test_other_attention_runs_under_autograd(options: dict[str, Any]) -> None:
    assert_gradient(Attending(16, **options), 0)


def test_other_widths_run_under_autograd() -> None:
    assert_gradient(Attending(12), 1)
    narrow = [torch.zeros(1, 2, 64, 12)] * 3
    assert not fits(*narrow)
    assert not fits(*[torch.zeros(1, 2, 64, 16, dtype=torch.float64)] * 3)
    assert not fits(*[torch.zeros(0, 2, 64, 16)] * 3)


def assert_gradient(model: Attending, operators: int) -> None:
    torch.manual_seed(0)
    graph = fold_graph(trace(model.eval())[0])
    x = sample(2, 3, 10, 10)
    lower(graph, x[:1])
    program = Program(graph)
    assert sum(isinstance(each, AttentionOperator) for each in program.operators.values()) == operators
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
