"""Integrated Gradients: closed forms, completeness, orders of convergence, error control and captum."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from captum.attr._utils.approximation_methods import approximation_parameters
from scipy import ndimage
from torch import Tensor

import pysal
from pysal.testing import assert_no_worse
from tests.methods.networks import (
    Counting,
    assert_rounding,
    images,
    linear,
    rectified,
    relative_error,
    smooth,
    weights,
)

QUADRATURES = ["gauss_legendre", "midpoint", "left", "right", "trapezoid"]
CAPTUMS = {
    "gauss_legendre": "gausslegendre",
    "midpoint": "riemann_middle",
    "left": "riemann_left",
    "right": "riemann_right",
    "trapezoid": "riemann_trapezoid",
}
# each gradient of the small networks sums at most 9 * 6 products in each of two layers, forward and back
OPERATIONS = 4 * 54


def explained(model: Any, inputs: Tensor, target: Any = 1, **options: Any) -> Any:
    name = "integrated_gradients"
    return pysal.explain(model, inputs, target, methods=[name], method_options={name: options}, batch_size=512)[name]


def textbook(quadrature: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a rule on [0, 1]."""
    k = np.arange(steps)
    if quadrature == "gauss_legendre":
        nodes, heights = np.polynomial.legendre.leggauss(steps)
        return (1 + nodes) / 2, heights / 2
    if quadrature == "trapezoid":
        return k / (steps - 1), np.where((k == 0) | (k == steps - 1), 0.5, 1.0) / (steps - 1)
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[quadrature]
    return (k + shift) / steps, np.full(steps, 1 / steps)


def by_hand(model: Any, inputs: Tensor, baseline: Tensor, target: int, nodes: np.ndarray, heights: np.ndarray) -> Tensor:
    """(x - b) times the weighted sum of the gradients at all nodes, one image after the other."""
    places = torch.from_numpy(nodes).to(inputs)[:, None, None, None]
    found = []
    for image, start in zip(inputs, baseline, strict=True):
        points = (start + places * (image - start)).requires_grad_()
        (slopes,) = torch.autograd.grad(model(points)[:, target].sum(), points)
        found.append((image - start) * torch.einsum("n,nchw->chw", torch.from_numpy(heights).to(inputs), slopes))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("placement", "steps"),
    [(placement, steps) for placement in ("uniform", "squared") for steps in (1, 2, 50)] + [("adaptive", 8), ("adaptive", 50)],
)
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_of_a_linear_model_is_weights_times_the_way(quadrature: str, placement: str, steps: int) -> None:
    # exact for any rule whose weights sum to 1
    inputs, model = images(2, 3, 5, 4), linear(3, 5, 4)
    baseline = images(2, 3, 5, 4, seed=9)
    found = explained(model, inputs, 2, baseline=baseline, steps=steps, quadrature=quadrature, placement=placement)
    w = weights(model, inputs)[2]
    assert_rounding(found.map, w * (inputs - baseline), 4 * steps + 10)
    # the map's 60 numbers and the score's 60 products
    assert_rounding(found.details["residual"], torch.zeros(2, dtype=torch.float64), 4 * steps + 130, scale=float(w.abs().sum()))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 4, 6), (3, 4, 5, 5)], ids=str)
def test_baselines(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), linear(*shape[1:])
    colour = torch.linspace(0.1, 0.4, shape[1], dtype=torch.float64)
    sigma = max(shape[2:]) / 16
    blurred = torch.from_numpy(ndimage.gaussian_filter(inputs.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=4.0))
    picture, stack = images(*shape[1:], seed=1), images(*shape, seed=2)
    expected: list[tuple[Any, Tensor]] = [
        (0.1, torch.full_like(inputs, 0.1)),
        (tuple(colour.tolist()), colour[:, None, None].expand(shape)),
        (colour, colour[:, None, None].expand(shape)),
        ("black", torch.zeros_like(inputs)),
        ("white", torch.ones_like(inputs)),
        ("mean", inputs.mean((2, 3), keepdim=True).expand(shape)),
        ("blur", blurred),
        (picture, picture.expand(shape)),
        (stack, stack),
    ]
    w = weights(model, inputs)[1]
    for baseline, meant in expected:
        found = pysal.integrated_gradients(model, inputs, 1, baseline=baseline, steps=3)
        # at most H W additions make a mean, at most 9 + 9 taps a blur
        assert_rounding(found, w * (inputs - meant), shape[2] * shape[3] + 30, scale=float(w.abs().max()))
    assert torch.equal(
        pysal.integrated_gradients(model, inputs, 1), pysal.integrated_gradients(model, inputs, 1, baseline="black")
    )


def test_several_baselines_are_averaged() -> None:
    inputs, model = images(2, 3, 6, 7), smooth()
    picture = images(3, 6, 7, seed=5)
    several: list[Any] = [0.0, "white", picture, (0.2, 0.5, 0.7)]
    found = explained(model, inputs, baseline=several, steps=6)
    alone = [explained(model, inputs, baseline=one, steps=6) for one in several]
    assert_rounding(found.map, torch.stack([one.map for one in alone]).mean(0), OPERATIONS)
    residuals = torch.stack([one.details["residual"] for one in alone]).mean(0)
    assert_rounding(found.details["residual"], residuals, 1000, scale=1.0)  # a sum of 126 numbers of less than 1
    assert found.details["steps"].tolist() == [24, 24]


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_polynomials_are_integrated_exactly_up_to_the_rules_degree(quadrature: str) -> None:
    # f = sum x^d: the map is x^d - b^d where the rule integrates degree d - 1 exactly
    inputs, baseline = images(2, 2, 4, 5), images(2, 2, 4, 5, seed=3)
    exact_degree = {"gauss_legendre": 2 * 3 - 1, "midpoint": 1, "trapezoid": 1, "left": 0, "right": 0}[quadrature]
    for degree in range(1, 8):
        found = pysal.integrated_gradients(
            lambda x, d=degree: (x**d).sum((1, 2, 3)),
            inputs,
            0,
            baseline=baseline,
            steps=3,
            quadrature=quadrature,
            placement="uniform",
        )
        closed = inputs**degree - baseline**degree
        if degree - 1 <= exact_degree:
            assert_rounding(found, closed, 20 * degree)
        else:
            assert float((found - closed).abs().max()) > 1e-9


@pytest.mark.parametrize("steps", [2, 5, 12])
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_is_the_weighted_sum_of_gradients(quadrature: str, steps: int) -> None:
    inputs, baseline, model = images(2, 3, 6, 7), images(2, 3, 6, 7, seed=4), smooth()
    expected = by_hand(model, inputs, baseline, 2, *textbook(quadrature, steps))
    options: dict[str, Any] = {"steps": steps, "quadrature": quadrature, "placement": "uniform"}
    found = pysal.integrated_gradients(model, inputs, 2, baseline=baseline, **options)
    assert_rounding(found, expected, OPERATIONS + 2 * steps)

    small = smooth().float()
    plain = by_hand(small, inputs.float(), baseline.float(), 2, *textbook(quadrature, steps))
    narrow = pysal.integrated_gradients(small, inputs.float(), 2, baseline=baseline, **options)
    assert_no_worse(narrow, expected, plain)


@pytest.mark.parametrize("quadrature", ["gauss_legendre", "midpoint", "trapezoid"])
def test_squared_placement_substitutes_the_square(quadrature: str) -> None:
    # integral of g(a) da = integral of g(t^2) 2t dt
    inputs, model = images(2, 3, 6, 7), smooth()
    nodes, heights = textbook(quadrature, 7)
    expected = by_hand(model, inputs, torch.zeros_like(inputs), 2, nodes**2, 2 * nodes * heights)
    found = pysal.integrated_gradients(model, inputs, 2, steps=7, quadrature=quadrature, placement="squared")
    assert_rounding(found, expected, OPERATIONS + 20)


def test_default_is_the_midpoint_rule_on_squared_places() -> None:
    inputs, model = images(2, 3, 6, 7), smooth()
    nodes, heights = textbook("midpoint", 50)
    expected = by_hand(model, inputs, torch.zeros_like(inputs), 2, nodes**2, 2 * nodes * heights)
    assert_rounding(pysal.integrated_gradients(model, inputs, 2), expected, OPERATIONS + 100)


@pytest.mark.parametrize("placement", ["uniform", "squared"])
@pytest.mark.parametrize(("quadrature", "order"), [("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)], ids=str)
def test_error_and_residual_fall_with_the_order_of_the_rule(quadrature: str, order: int, placement: str) -> None:
    inputs, model = images(2, 3, 6, 7), smooth()
    truth = explained(model, inputs, steps=64, quadrature="gauss_legendre").map
    errors, residuals = [], []
    for intervals in (32, 64, 128):
        steps = intervals + (quadrature == "trapezoid")
        found = explained(model, inputs, steps=steps, quadrature=quadrature, placement=placement)
        errors.append(float((found.map - truth).norm()))
        residuals.append(float(found.details["residual"].norm()))
    # error = c h^p (1 + d h): with 32 steps and more the ratio of two is within a tenth of 2^p
    for values in (errors, residuals):
        for coarse, fine in itertools.pairwise(values):
            assert coarse / fine == pytest.approx(2**order, rel=0.1), (quadrature, values)


@pytest.mark.parametrize("placement", ["uniform", "squared", "adaptive"])
def test_completeness_on_a_smooth_network(placement: str) -> None:
    inputs, model = images(2, 3, 6, 7), smooth()
    truth = explained(model, inputs, steps=128, quadrature="gauss_legendre").map
    with torch.no_grad():
        change = (model(inputs) - model(torch.zeros_like(inputs)))[:, 1]
    assert_rounding(truth.flatten(1).sum(1), change, 2 * OPERATIONS, scale=float(truth.abs().flatten(1).sum(1).max()))

    residuals, errors = [], []
    for steps in (8, 16, 32, 64):
        found = explained(model, inputs, steps=steps, quadrature="gauss_legendre", placement=placement)
        residual = found.map.flatten(1).sum(1) - change
        assert_rounding(found.details["residual"], residual, OPERATIONS, scale=float(truth.abs().flatten(1).sum(1).max()))
        residuals.append(float((residual / change).abs().max()))
        errors.append(float(relative_error(found.map, truth).max()))
    for values in (residuals, errors):
        assert values[-1] <= 1e-6
        # adaptive: a rule of 2 nodes in each of 8 intervals has order 4, and longer ones more, until rounding is all there is
        for coarse, fine in itertools.pairwise(values):
            assert fine <= max(coarse / 4, 1e-13)


@pytest.mark.usefixtures("independence_is_known")
def test_adaptive_placement_puts_the_steps_where_the_score_changes() -> None:
    # f rises within the first eighth of the path; elsewhere nothing happens
    def model(batch: Tensor) -> Tensor:
        return torch.tanh(200 * (batch.mean((1, 2, 3)) - 0.03))[:, None]

    inputs = images(2, 1, 4, 5)
    truth = pysal.integrated_gradients(model, inputs, 0, steps=2000, quadrature="midpoint", placement="uniform")
    counting = Counting(model)
    errors = {}
    for placement in ("uniform", "adaptive"):
        counting.passes.clear()
        counting.differentiated.clear()
        found = explained(counting, inputs, 0, steps=24, quadrature="midpoint", placement=placement)
        assert sum(counting.differentiated) == 2 * 24
        assert found.details["steps"].tolist() == [24, 24]
        # the clean images, the baselines, and for adaptive placement 9 probes of each path
        assert sum(counting.passes) - 2 * 24 == 2 + 2 + (2 * 9 if placement == "adaptive" else 0)
        errors[placement] = relative_error(found.map, truth)
    # all but a step each of 7 intervals go to one of 8: 17 steps instead of 3, which even a rule of order 1 makes use of
    assert (errors["adaptive"] < errors["uniform"] / (17 / 3)).all()


@pytest.mark.parametrize("placement", ["uniform", "squared", "adaptive"])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_tolerance_is_reached_on_a_smooth_network(tolerance: float, placement: str) -> None:
    inputs, model = images(3, 3, 6, 7), smooth()
    truth = explained(model, inputs, steps=128, quadrature="gauss_legendre").map
    found = explained(model, inputs, tolerance=tolerance, placement=placement, max_steps=10_000)
    assert (found.details["error"] <= tolerance).all()
    # the estimate |T(h/2) - T(h)| is three times the error of T(h/2) for a rule of order 2
    assert (relative_error(found.map, truth) <= tolerance).all()


@functools.cache
def fine_map_of_relu_network() -> Tensor:
    return explained(rectified(), images(4, 3, 6, 7), steps=10_000, quadrature="midpoint").map


@pytest.mark.parametrize("placement", ["uniform", "squared", "adaptive"])
@pytest.mark.parametrize("tolerance", [5e-2, 1e-2, 2e-3])
def test_tolerance_is_reached_on_a_relu_network(tolerance: float, placement: str) -> None:
    inputs, model = images(4, 3, 6, 7), rectified()
    # Along the path the gradient jumps where a ReLU switches. A jump J in an interval of length h is put by T(h/2) at most
    # h/4 from its place, and moves by exactly h/4 between T(h) and T(h/2): error vector sum e_i J_i with |e_i| <= h/4, estimate
    # sum +-h/4 J_i. For one jump the estimate is a bound. For many, of independent direction, the two norms are close to
    # root-sum-squares, the error's being 1/sqrt(3) of the estimate's; a factor of 2 leaves room for jumps that cancel.
    found = explained(model, inputs, tolerance=tolerance, placement=placement, max_steps=20_000)
    truth = fine_map_of_relu_network()
    assert (found.details["error"] <= tolerance).all()
    assert (relative_error(found.map, truth) <= 2 * tolerance).all()


def test_refinement_uses_every_gradient_and_stops_for_each_image_alone() -> None:
    inputs = images(3, 3, 6, 7)
    inputs[0] *= 0.02  # hardly a way to go: the gradient does not change on it
    model = Counting(rectified())
    found = explained(model, inputs, tolerance=2e-2, max_steps=5000)
    steps = found.details["steps"].tolist()
    assert sum(model.differentiated) == sum(steps)
    assert steps[0] < min(steps[1:])
    for image, count in enumerate(steps):
        assert count - 1 in [16 * 2**level for level in range(1, 10)]
        # what was reused makes the trapezoid rule of all the steps
        own = inputs[image : image + 1]
        nodes, heights = textbook("trapezoid", count)
        expected = by_hand(model.model, own, torch.zeros_like(own), 1, nodes**2, 2 * nodes * heights)
        assert_rounding(found.map[image : image + 1], expected, OPERATIONS + 2 * count)


def test_refinement_stops_at_max_steps_and_says_what_it_reached() -> None:
    inputs, model = images(2, 3, 6, 7), Counting(rectified())
    for max_steps, reached in ((33, 33), (64, 33), (65, 65), (128, 65), (129, 129)):
        model.differentiated.clear()
        found = explained(model, inputs, tolerance=1e-9, max_steps=max_steps)
        assert found.details["steps"].tolist() == [reached] * 2
        assert sum(model.differentiated) == 2 * reached
        assert (found.details["error"] > 1e-9).all()
        truth = explained(model, inputs, steps=reached, quadrature="trapezoid").map
        assert_rounding(found.map, truth, OPERATIONS + 2 * reached)


def test_tolerance_holds_for_each_of_several_baselines() -> None:
    inputs, model = images(2, 3, 6, 7), smooth()
    several: list[Any] = [0.0, "white", inputs.flip(0)]
    found = explained(model, inputs, baseline=several, tolerance=1e-4)
    alone = [explained(model, inputs, baseline=one, tolerance=1e-4) for one in several]
    assert found.details["steps"].tolist() == [sum(int(one.details["steps"][image]) for one in alone) for image in range(2)]
    assert torch.equal(found.details["error"], torch.stack([one.details["error"] for one in alone]).amax(0))
    assert_rounding(found.map, torch.stack([one.map for one in alone]).mean(0), OPERATIONS)


def test_an_image_that_is_its_baseline_has_a_map_of_zero() -> None:
    inputs, model = images(2, 3, 6, 7), rectified()
    for options in ({"steps": 8}, {"tolerance": 1e-3}, {"steps": 8, "placement": "adaptive"}):
        found = explained(model, inputs, baseline=inputs.clone(), **options)
        assert (found.map == 0).all()
        assert (found.details["residual"] == 0).all()
    assert found.details["steps"].tolist() == [8, 8]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.usefixtures("independence_is_known")
def test_memory_grows_with_the_chunk_and_not_with_the_steps(batch_size: int) -> None:
    model = Counting(smooth())
    pysal.integrated_gradients(model, images(3, 3, 6, 7), 1, steps=200, batch_size=batch_size)
    assert max(model.passes) == batch_size
    assert sum(model.differentiated) == 600


@pytest.mark.parametrize("steps", [2, 9, 40])
@pytest.mark.parametrize("quadrature", ["gauss_legendre", "left", "right", "midpoint"])
@pytest.mark.parametrize("model", [smooth(), rectified()], ids=["smooth", "rectified"])
def test_equals_captum(model: torch.nn.Module, quadrature: str, steps: int) -> None:
    inputs, baseline = images(3, 3, 6, 7), images(3, 3, 6, 7, seed=3)
    theirs = captums(model, inputs, baseline, 1, quadrature, steps)
    options: dict[str, Any] = {"steps": steps, "quadrature": quadrature, "placement": "uniform"}
    found = pysal.integrated_gradients(model, inputs, 1, baseline=baseline, **options)
    # captum keeps weights, and the nodes of Riemann sums, in float32: with them the same formula gives its result,
    nodes, heights = captums_rule(quadrature, steps)
    assert_rounding(theirs, by_hand(model, inputs, baseline, 1, nodes, heights), OPERATIONS + 2 * steps)
    # and but for their rounding they are the ones that give this package's
    exact_nodes, exact_heights = textbook(quadrature, steps)
    eps = torch.finfo(torch.float32).eps
    assert np.abs(nodes - exact_nodes).max() <= eps
    assert np.abs(heights - exact_heights).max() <= eps
    assert_rounding(found, by_hand(model, inputs, baseline, 1, exact_nodes, exact_heights), OPERATIONS + 2 * steps)


def captums(model: torch.nn.Module, inputs: Tensor, baseline: Tensor, target: int, quadrature: str, steps: int) -> Tensor:
    explainer = IntegratedGradients(model)
    leaf = inputs.clone().requires_grad_()
    return explainer.attribute(leaf, baseline, target=target, n_steps=steps, method=CAPTUMS[quadrature]).detach()


def captums_rule(quadrature: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    heights, nodes = (function(steps) for function in approximation_parameters(CAPTUMS[quadrature]))
    return np.array(nodes, dtype=np.float64), np.array(heights, dtype=np.float32).astype(np.float64)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_captums_trapezoid_weights_do_not_sum_to_one_and_these_do(steps: int) -> None:
    inputs, model = images(2, 3, 5, 4), linear(3, 5, 4)
    exact = weights(model, inputs)[1] * inputs
    theirs = captums(model, inputs, torch.zeros_like(inputs), 1, "trapezoid", steps)
    total = captums_rule("trapezoid", steps)[1].sum()
    assert_rounding(theirs, exact * total, 4 * steps + 10)
    assert total == pytest.approx((steps - 1) / steps, abs=steps * torch.finfo(torch.float32).eps)
    ours = pysal.integrated_gradients(model, inputs, 1, steps=steps, quadrature="trapezoid")
    assert_rounding(ours, exact, 4 * steps + 10)


@pytest.mark.parametrize("name", ["integrated_gradients", "blur_integrated_gradients"])
@pytest.mark.usefixtures("independence_is_known")
def test_a_plain_call_makes_no_pass_beyond_its_steps(name: str) -> None:
    """The residual, which only `explain` reports, would take two more."""
    counting = Counting(lambda batch: batch.square().mean((2, 3)))
    getattr(pysal, name)(counting, images(2, 3, 6, 5), 1, steps=7)
    assert sum(counting.passes) == sum(counting.differentiated) == 2 * 7


@pytest.mark.parametrize("steps", [10, 3000])
def test_a_sum_of_many_steps_is_as_exact_as_one_of_few(steps: int) -> None:
    """Of a linear function every gradient is the weight: all there is to lose is one rounding of x * w."""
    weights = torch.randn(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(1))

    def model(batch: torch.Tensor) -> torch.Tensor:
        return (batch * weights).flatten(1).sum(1, keepdim=True)

    found = pysal.integrated_gradients(model, images, 0, baseline=0.0, steps=steps)
    right = images.double() * weights.double()
    assert bool(((found.double() - right).abs() <= torch.finfo(torch.float32).eps / 2 * right.abs() * (1 + 1e-6)).all())
