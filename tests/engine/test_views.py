"""Views, sums and products with constants and layer norms on the tape: autograd's gradients, without autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal.engine.graph.fold import fold_graph, trace
from pysal.engine.graph.shapes import shapes_of
from pysal.engine.tape.operators import AutogradOperator
from pysal.engine.tape.tape import Program
from pysal.testing import sample

EPS = torch.finfo(torch.float64).eps


def padded(x: Tensor, *sides: int) -> Tensor:
    return F.pad(x, sides)


def merged(parts: Tensor, *numbers: int) -> Tensor:
    return torch.cat([parts[number] * (number + 1) for number in numbers], -1)


# of (N, 4, 6, 4)
VIEWS: dict[str, Callable[["Viewed", Tensor], Tensor]] = {
    "reshape": lambda _, x: torch.reshape(x, (-1, 24, 4)),
    "rows of windows": lambda _, x: x.reshape(-1, 12, 4).view(-1, 3, 4, 4).reshape(-1, 4, 6, 4),
    "flatten": lambda _, x: x.flatten(2).unflatten(2, (3, 8)),
    "squeeze": lambda _, x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "permute": lambda _, x: x.permute(2, 0, 3, 1),
    "permute by a tuple": lambda _, x: torch.permute(x, (0, 3, -2, 1)),
    "transpose": lambda _, x: x.transpose(1, -1).contiguous().swapaxes(0, 1),
    "roll": lambda _, x: torch.roll(x, shifts=(-1, 2), dims=(1, 3)),
    "roll images": lambda _, x: x.roll(1, 0),
    "slice": lambda _, x: x[:, 1:, ::2],
    "slices of one": lambda _, x: x[:, :2] * x[:, 2:] + x[:, 1:3],
    "at an index": lambda _, x: x[:, -1, ..., None] + x.select(1, 0)[..., None],
    "narrow": lambda _, x: x.narrow(2, 1, 3),
    "whole": lambda _, x: x[:, :4, :, :] * 2,
    "pad": lambda _, x: padded(x, 1, 0, 2, 3),
    "pad by nothing": lambda _, x: padded(x, 0, 0, 0, 0, 0, 0).clone(),
    "pad by a value": lambda _, x: F.pad(x, (0, 1), value=3.0),
    "crop": lambda _, x: padded(x, 1, -1),
    "unbind": lambda _, x: merged(x.unbind(2), *range(6)),  # type: ignore[arg-type]
    "unbind first": lambda _, x: merged(x.permute(1, 0, 2, 3).unbind(0), 0, 1, 2, 3),  # type: ignore[arg-type]
    "one of several": lambda _, x: torch.unbind(x, 1)[2] * 2,
    "chunk": lambda _, x: merged(x.chunk(3, dim=2), 0, 1, 2),  # type: ignore[arg-type]
    "split": lambda _, x: torch.split(x, [1, 3, 2], 2)[1].sin(),
    "product": lambda m, x: 0.5 * x * m.factor * 3,
    "sum": lambda m, x: m.term + x + 1,
    "layer norm": lambda m, x: m.norm(x),
    "layer norm without weights": lambda _, x: F.layer_norm(x.transpose(1, 2), [4, 4], eps=1e-3),
}


class Viewed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.norm = name, nn.LayerNorm([6, 4])
        self.weight = nn.Parameter(sample(4, 3, 1, 1, seed=2))
        self.factor, self.term = nn.Parameter(sample(6, 1, seed=5)), nn.Parameter(sample(1, 4, 6, 4, seed=6))
        nn.init.normal_(self.norm.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return VIEWS[self.name](self, F.conv2d(x, self.weight).sin()).cos()


@pytest.mark.parametrize("name", VIEWS)
def test_gradient(name: str) -> None:
    model, x = Viewed(name).double().eval(), sample(2, 3, 6, 4, dtype=torch.float64)
    graph, _ = trace(model)
    shapes_of(graph, x)
    program = Program(fold_graph(graph))
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    tape = program.record(x)
    assert torch.equal(tape.output, output)
    operators = {node: type(operator) for node, operator in program.operators.items() if node in program.needed}
    slow = [node.name.split("_")[0] for node, kind in operators.items() if kind is AutogradOperator]
    between = {"slices of one": ["mul", "add"], "at an index": ["add"]}.get(name, [])
    assert sorted(set(slow) - {"sin", "cos", "folded"}) == sorted(between)
    for times in (1, 3):
        grad = sample(times * len(output), *output.shape[1:], seed=7, dtype=torch.float64)
        own = [torch.autograd.grad(output, leaf, part, retain_graph=True)[0] for part in grad.split(len(output))]
        expected, kept = torch.cat(own), grad.clone()
        for _ in range(2):
            found, _ = tape.sweep(grad)
            assert found is not None
            assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()
        assert torch.equal(grad, kept)


class WrittenInto(nn.Module):
    """Writes into what another part reads before it was written into."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.copy, self.convolution = copy, nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        z = y.clone() if self.copy else F.pad(y, (0, 0))
        y = y.add_(1.0)
        return (y * z).mean((2, 3))


@pytest.mark.parametrize("copy", [True, False])
def test_a_copy_stays_one_where_something_is_written(copy: bool) -> None:
    torch.manual_seed(0)
    model, x = WrittenInto(copy).double().eval(), sample(2, 3, 5, 5, dtype=torch.float64)
    graph, _ = trace(model)
    shapes_of(graph, x)
    program = Program(fold_graph(graph))
    assert torch.equal(program.record(x).output, model(x))
