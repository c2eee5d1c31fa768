"""DeepLIFT's rule at the operator: shares of what a function changes by, whatever spelling it has."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal.engine.model.rescale_rules import LEAST_NODES, MOST_NODES, NODES_PER_UNIT, RescaleRules

EPS = torch.finfo(torch.float64).eps


def multipliers(function: Callable[..., Tensor], point: Tensor, reference: Tensor) -> Tensor:
    leaf = point.clone().requires_grad_()
    output = RescaleRules("test", 1e-10).run(function, (leaf,), (reference,))
    return torch.autograd.grad(output.sum(), leaf)[0]


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    point, reference = (torch.randn(*shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return point, reference


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": lambda x: nn.ReLU(inplace=True)(x * 1),
    "function": F.relu,
    "function in place": lambda x: F.relu(x * 1, True),
    "torch": torch.relu,
    "torch in place": lambda x: torch.relu_(x * 1),
    "method": lambda x: x.relu(),
    "method in place": lambda x: (x * 1).relu_(),
    "by name": lambda x: F.relu(input=x),
    "clamp": lambda x: x.clamp(min=0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "pairwise maximum of a stack": lambda x: torch.stack([x, x * 0]).amax(0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_relu_by_any_name(spelling: str) -> None:
    point, reference = drawn(3, 40)
    right = (point.clamp_min(0) - reference.clamp_min(0)) / (point - reference)
    found = multipliers(SPELLINGS[spelling], point, reference)
    assert float((found - right).abs().max()) <= 8 * EPS


SCALAR: list[Callable[[Tensor], Tensor]] = [
    F.relu6, F.elu, F.selu, F.celu, F.leaky_relu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.softplus, F.logsigmoid,
    F.softsign, F.hardtanh, F.tanhshrink, F.softshrink, torch.sigmoid, torch.tanh, torch.exp, torch.sin, torch.cos,
    torch.square, nn.PReLU(dtype=torch.float64),
    lambda x: x**3, lambda x: 1 / x, lambda x: (x * x.detach().sign()).sqrt(), lambda x: x.abs(),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SCALAR)))
def test_functions_of_one_number_have_their_slope(number: int) -> None:
    function = SCALAR[number]
    point, reference = (one.abs() + 0.1 for one in drawn(2, 50))
    away, change = point - reference, (function(point) - function(reference)).detach()
    found = multipliers(function, point, reference)
    # each difference is off by the roundings of what it is made of
    allowed = 64 * EPS * (function(point).abs() + function(reference).abs() + found.abs() * (point + reference)) / away.abs()
    assert bool(((found - change / away).abs() <= allowed).all())


def test_where_nothing_changes_the_derivative_stands() -> None:
    point = drawn(2, 9)[0]
    found, right = multipliers(torch.tanh, point, point), 1 - torch.tanh(point) ** 2
    assert float((found - right).abs().max()) <= 4 * EPS
    assert torch.equal(multipliers(F.relu, point, point + 1e-12), (point > 0).double())


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "apart": lambda x: F.max_pool2d(x, 2),
    "overlapping": nn.MaxPool2d(3, 2, 1),
    "dilated": nn.MaxPool2d(2, 1, dilation=2),
    "series": lambda x: F.max_pool1d(x.flatten(2), 3, 2),
    "adaptive": nn.AdaptiveMaxPool2d(2),
    "whole": lambda x: x.amax((2, 3)),
    "behind an activation": lambda x: F.max_pool2d(torch.tanh(x), 2),
    "before one": lambda x: torch.tanh(F.max_pool2d(x, 2)),
}


@pytest.mark.parametrize("kind", POOLS)
def test_shares_of_a_maximum_add_up(kind: str) -> None:
    point, reference = drawn(2, 3, 7, 7)
    shares = multipliers(POOLS[kind], point, reference) * (point - reference)
    change = POOLS[kind](point) - POOLS[kind](reference)
    total = shares.sum((1, 2, 3)) - change.flatten(1).sum(1)
    assert float(total.abs().max()) <= 1000 * EPS * float(shares.abs().sum())


def test_a_maximum_that_moves_gives_both_places_their_part() -> None:
    """From (1, 3) to (4, 2): what rises above the old maximum is of the new place, and nothing fell below it."""
    point, reference = torch.tensor([[[4.0, 2.0]]]).double(), torch.tensor([[[1.0, 3.0]]]).double()
    found = multipliers(lambda x: F.max_pool1d(x, 2), point, reference) * (point - reference)
    assert found.tolist() == [[[1.0, 0.0]]]
    found = multipliers(lambda x: F.max_pool1d(x, 2), reference, point) * (reference - point)
    assert found.tolist() == [[[-1.0, 0.0]]]


@pytest.mark.parametrize(
    "function", [lambda x: torch.softmax(x, 1), nn.Softmax(1), nn.LogSoftmax(1), lambda x: x.softmax(dim=-1)]
)
@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0])
def test_shares_of_a_softmax_add_up(function: Callable[[Tensor], Tensor], scale: float) -> None:
    """To the error of Gauss-Legendre: 64/15 M rho^-2n / (1 - rho^-2) on an ellipse where shares are at most 2."""
    point, reference = (scale * one for one in drawn(5, 7))
    weights = torch.arange(7.0, dtype=torch.float64)
    away = point - reference
    shares = multipliers(lambda x: function(x) @ weights, point, reference) * away
    change = (function(point) - function(reference)) @ weights
    spread = float((away.amax(1) - away.amin(1)).max())
    rho = (2 * math.pi / 3 / spread) + math.sqrt(1 + (2 * math.pi / 3 / spread) ** 2)
    nodes = max(LEAST_NODES, math.ceil(spread * NODES_PER_UNIT))
    assert nodes < MOST_NODES
    largest = 2 * 3 * float(weights.sum())  # of a derivative
    quadrature = 64 / 15 * largest * rho ** (-2 * nodes) / (1 - rho**-2) * float(away.abs().sum(1).max())
    rounding = 100 * EPS * float(shares.abs().sum(1).max() + change.abs().max()) * scale
    assert float((shares.sum(1) - change).abs().max()) <= quadrature + rounding


def test_a_number_that_stays_gets_no_large_share() -> None:
    """Of a softmax of which only others move, an input that stays has about nothing to account for."""
    reference = torch.zeros(1, 3, dtype=torch.float64)
    point = reference + torch.tensor([[1e-7, 5.0, 0.0]])
    found = multipliers(lambda x: torch.softmax(x, 1)[:, 0], point, reference)
    assert float(found.abs().max()) <= 0.25  # as every derivative of a softmax
    assert float((found * (point - reference)).sum() - (torch.softmax(point, 1) - 1 / 3)[0, 0]) == pytest.approx(0, abs=1e-12)


def test_rows_and_time_may_lie_anywhere() -> None:
    """A function of a transposed batch is the function."""
    point, reference = drawn(4, 5)
    straight = multipliers(lambda x: torch.tanh(x).sum(1), point, reference)
    turned = multipliers(lambda x: torch.tanh(x.T).sum(0), point, reference)
    assert torch.equal(straight, turned)
    alone = torch.cat([multipliers(torch.tanh, *pair) for pair in zip(point.split(1), reference.split(1), strict=True)])
    assert torch.equal(straight, alone)


def test_a_module_that_runs_twice() -> None:
    torch.manual_seed(0)
    act, first, second = nn.Tanh(), nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    point, reference = drawn(4, 5)

    def model(value: Tensor) -> Tensor:
        return act(second(act(first(value)))).sum(1)

    shares = multipliers(model, point, reference) * (point - reference)
    assert float((shares.sum(1) - (model(point) - model(reference)).detach()).abs().max()) <= 100 * EPS * float(
        shares.abs().sum()
    )


def test_another_way_through_the_model_is_refused() -> None:
    point, reference = drawn(2, 3)
    ways: list[Callable[[Tensor], Any]] = [
        lambda x: torch.tanh(torch.tanh(x)) if float(x.detach().sum()) == float(point.sum()) else torch.tanh(x),
        lambda x: torch.tanh(x) if float(x.detach().sum()) == float(point.sum()) else torch.tanh(torch.tanh(x)),
        lambda x: torch.tanh(x) if float(x.detach().sum()) == float(point.sum()) else torch.sigmoid(x),
        lambda x: torch.tanh(x[x.detach() > 0.5]),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="test: baselines must take the same way through the model as the inputs, got"):
            multipliers(way, point, reference)


def test_what_torch_runs_in_one_piece_is_told() -> None:
    torch.manual_seed(0)
    point, reference = drawn(2, 4, 3)
    memory = nn.LSTM(3, 5, batch_first=True).double()
    with pytest.warns(UserWarning, match="test: the rule does not reach (Sigmoid, Tanh|Tanh, Sigmoid)"):
        multipliers(lambda x: memory(x)[0].sum((1, 2)), point, reference)


def test_inputs_stay_as_they_were() -> None:
    point, reference = drawn(2, 3)
    before = point.clone(), reference.clone()
    multipliers(lambda x: torch.relu(x) * 2, point, reference)
    assert torch.equal(point, before[0])
    assert torch.equal(reference, before[1])


def test_at_the_baseline_the_derivative_stands_whatever_eps() -> None:
    leaf = torch.tensor([1.5, 0.0], dtype=torch.float64, requires_grad=True)
    output = RescaleRules("test", 0.0).run(torch.tanh, (leaf,), (torch.tensor([1.5, 2.0], dtype=torch.float64),))
    (found,) = torch.autograd.grad(output.sum(), leaf)
    expected = torch.tensor([1 - math.tanh(1.5) ** 2, math.tanh(2.0) / 2], dtype=torch.float64)
    assert float((found - expected).abs().max()) <= 10 * EPS
