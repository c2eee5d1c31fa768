"""The methods on a trained network, EfficientNet-Lite0, and photos: against other implementations, and what they show."""

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients, LayerAttribution, LayerGradCam, Saliency
from scipy import ndimage
from torch import Tensor, nn

import pysal
from pysal import Grid
from pysal.models import Classifier
from pysal.testing import assert_no_worse

PHOTOS = Path(__file__).parent.parent / "pysal/data/photos"
CLASSES = {
    "tabby_cat": 281,
    "persian_cat": 283,
    "siamese_cat": 284,
    "egyptian_cat": 285,
    "coffee": 967,
    "camera": 872,
}
SMALL = 96  # pixels: a fifth of the work of 224


@functools.cache
def model(dtype: torch.dtype = torch.float32) -> Classifier:
    return pysal.models.load("efficientnet-lite0").to(dtype)


@functools.cache
def photo(name: str, size: int = SMALL) -> Tensor:
    return pysal.read_image(PHOTOS / f"{name}.jpg", model(), size=size)


def captum_input(inputs: Tensor) -> Tensor:
    return inputs.clone().requires_grad_()


def two() -> Tensor:
    return torch.cat([photo("tabby_cat"), photo("coffee")])


def test_recognises_the_photos() -> None:
    for name, index in CLASSES.items():
        assert int(model()(photo(name, 224)).argmax()) == index, name


# Against other implementations ------------------------------------------------------------------------------------------


def test_gradient_is_no_worse_than_captums() -> None:
    targets = torch.tensor([281, 967])
    truth = Saliency(model(torch.float64)).attribute(captum_input(two().double()), target=targets, abs=False)
    theirs = Saliency(model()).attribute(captum_input(two()), target=targets, abs=False)
    assert_no_worse(pysal.gradient(model(), two(), targets), truth, theirs)
    assert_no_worse(pysal.gradient(model(), two(), targets, batch_size=1), truth, theirs)


class GuidedReLU6(torch.autograd.Function):
    """min(max(x, 0), 6), with the guided rule written out."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward((values > 0) & (values < 6))
        return values.clamp(0, 6)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0] & (grads[0] > 0), grads[0], 0.0)


class Guided(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return GuidedReLU6.apply(values)


@functools.cache
def with_guided_relus(dtype: torch.dtype) -> nn.Module:
    changed = copy.deepcopy(model(dtype))
    replaced = 0
    for parent in list(changed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, Guided())
                replaced += 1
    assert replaced > 10
    return changed


def test_guided_backprop_is_no_worse_than_a_network_with_the_rule_in_every_activation() -> None:
    def differentiated(dtype: torch.dtype) -> Tensor:
        leaf = captum_input(two().to(dtype))
        score = with_guided_relus(dtype)(leaf).gather(1, torch.tensor([[281], [967]]))
        return torch.autograd.grad(score.sum(), leaf)[0]

    found = pysal.guided_backprop(model(), two(), [281, 967])
    assert_no_worse(found, differentiated(torch.float64), differentiated(torch.float32))
    assert float(found.abs().max()) > 0


def test_grad_cam_is_no_worse_than_captums() -> None:
    def theirs(dtype: torch.dtype) -> Tensor:
        network = model(dtype)
        layer = dict(network.named_modules())["network.model._bn1"]
        native = LayerGradCam(network, layer).attribute(
            two().to(dtype), target=torch.tensor([281, 967]), relu_attributions=True
        )
        return LayerAttribution.interpolate(native.detach(), (SMALL, SMALL), interpolate_mode="bilinear")

    found = pysal.grad_cam(model(), two(), [281, 967], layer="network.model._bn1")
    assert_no_worse(found, theirs(torch.float64), theirs(torch.float32))


def test_integrated_gradients_are_no_worse_than_captums() -> None:
    def theirs(dtype: torch.dtype) -> Tensor:
        explainer = IntegratedGradients(model(dtype))
        leaf = captum_input(two().to(dtype))
        return explainer.attribute(leaf, target=torch.tensor([281, 967]), n_steps=8, method="gausslegendre").detach()

    options: dict[str, Any] = {"steps": 8, "quadrature": "gauss_legendre", "placement": "uniform"}
    found = pysal.integrated_gradients(model(), two(), [281, 967], **options)
    assert_no_worse(found, theirs(torch.float64), theirs(torch.float32))


def test_leave_one_out_is_no_worse_than_captums() -> None:
    blocks = torch.arange(SMALL) * 3 // SMALL
    labels = (3 * blocks[:, None] + blocks)[None, None]

    def theirs(dtype: torch.dtype) -> Tensor:
        explainer = FeatureAblation(model(dtype))
        return explainer.attribute(two().to(dtype), target=torch.tensor([281, 967]), feature_mask=labels, baselines=0.5)[:, :1]

    found = pysal.leave_one_out(model(), two(), [281, 967], segments=Grid(3, 3), fill=0.5, score="logit")
    assert_no_worse(found, theirs(torch.float64).double(), theirs(torch.float32))


@pytest.mark.parametrize("sqrt", [False, True])
def test_blur_ig_is_the_formula(sqrt: bool) -> None:
    inputs, network = photo("tabby_cat").double(), model(torch.float64)
    sigmas = [20 * i / 5 for i in range(6)]
    sigmas = [math.sqrt(sigma) for sigma in sigmas] if sqrt else sigmas

    def blurred(sigma: float) -> Tensor:
        widths = (0, 0, sigma, sigma)
        return torch.from_numpy(ndimage.gaussian_filter(inputs.numpy(), widths, mode="constant")) if sigma else inputs

    expected = torch.zeros_like(inputs)
    for sigma, after in itertools.pairwise(sigmas):
        leaf = blurred(sigma).clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(leaf)[0, 281], leaf)
        expected -= (after - sigma) * (blurred(sigma + 0.01) - blurred(sigma)) / 0.01 * slope
    options: dict[str, Any] = {"max_sigma": 20.0, "steps": 5, "sqrt": sqrt, "quadrature": "left", "placement": "uniform"}
    found = pysal.blur_integrated_gradients(network, inputs, 281, batch_size=3, **options)
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


# What they show ---------------------------------------------------------------------------------------------------------

PAIRS = [("tabby_cat", "coffee"), ("siamese_cat", "camera"), ("camera", "coffee"), ("persian_cat", "coffee")]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_grad_cam_of_two_photos_side_by_side_falls_on_the_right_one(one: str, other: str) -> None:
    size = 160
    for left, right in ((one, other), (other, one)):
        grid = torch.cat([photo(left, size), photo(right, size)], 3)
        for name, columns in ((left, slice(0, size)), (right, slice(size, None))):
            found = pysal.grad_cam(model(), grid, CLASSES[name])
            own = float(found[..., columns].sum())
            assert own > 2 * (float(found.sum()) - own), f"{name} in {left} | {right}"


def test_leave_one_out_of_two_photos_side_by_side_misses_the_right_one() -> None:
    grid = torch.cat([photo("siamese_cat", 160), photo("coffee", 160)], 3)
    halves = pysal.leave_one_out(model(), torch.cat([grid, grid]), [284, 967], segments=Grid(1, 2), fill="mean", score="logit")
    cat, coffee = halves[:, 0, 0, [0, -1]].tolist()
    assert cat[0] > max(0, cat[1])
    assert coffee[1] > max(0, coffee[0])


# Completeness: the map against one of 1,000 steps ------------------------------------------------------------------------


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["integrated_gradients", "blur_integrated_gradients"])
def test_error_against_a_thousand_steps_falls_with_steps(name: str) -> None:
    inputs = photo("tabby_cat")
    options: dict[str, Any] = {"quadrature": "midpoint", "max_sigma": 20.0}
    if name == "integrated_gradients":
        options.pop("max_sigma")

    def explained(**more: Any) -> Any:
        return pysal.explain(model(), inputs, 281, methods=[name], method_options={name: {**options, **more}})[name]

    truth = explained(steps=1000)
    errors, residuals = {}, {}
    for steps in (8, 40, 200):
        found = explained(steps=steps)
        errors[steps] = relative_error(found.map, truth.map)
        residuals[steps] = abs(float(found.details["residual"][0]))
    # ReLUs switch at many places: each puts a jump of the gradient up to half a step off, so errors go like 1 / steps where
    # the jumps are independent. Five times the steps must gain at least half of that.
    assert errors[40] < errors[8] / 2.5
    assert errors[200] < errors[40] / 2.5
    assert abs(float(truth.details["residual"][0])) < residuals[8]

    # a tolerance is kept, within the factor of 2 that test_integrated_gradients derives
    options.pop("quadrature")
    found = explained(tolerance=0.1)
    assert float(found.details["error"][0]) <= 0.1
    assert relative_error(found.map, truth.map) <= 0.2
