"""SmoothGrad over every other method, against loops over the noisy copies: its moments, its noise, any chunks."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysal
from pysal import Grid, Slic, Window, ops
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified, smooth, weights

# two convolutions there and back, sums of at most 9 * 6 products each, and the passes before them
OPERATIONS = 16 * 54


def explained(model: Any, inputs: Tensor, target: Any = None, **options: Any) -> Any:
    return pysal.explain(model, inputs, target, methods=["smooth_grad"], method_options={"smooth_grad": options})["smooth_grad"]


def noisy_copies(inputs: Tensor, noise: float, samples: int, seed: int, image_ids: list[int]) -> Tensor:
    """x + n_i for each image and sample, one at a time, (B, samples, C, H, W)."""
    copies = torch.empty(len(inputs), samples, *inputs.shape[1:], dtype=inputs.dtype)
    for image, own in enumerate(inputs):
        scale = torch.tensor([noise * float(own.max() - own.min())], dtype=torch.float64)
        for sample in range(samples):
            row, identity, draw = torch.tensor([0]), torch.tensor([image_ids[image]]), torch.tensor([sample])
            copies[image, sample] = ops.gaussian_noise(own[None], scale, seed, row, identity, draw)[0]
    return copies


def labels_of(inputs: Tensor, segments: Slic) -> Tensor:
    return segments.cut(inputs).labels


MODEL = rectified()
INPUTS = images(3, 3, 9, 8)
PICTURES = images(3, 3, 9, 8, seed=7)
BLACKENED = torch.where(INPUTS > 0.5, INPUTS, 0.0)
LABELS = [
    torch.arange(72).view(9, 8) // 36,
    torch.arange(72).view(9, 8) // 10 - 1,
    torch.arange(8).repeat(9, 1) // 3,
]

# name: base, its options, and the map of copies of image b of the call: (copies, b, its target) -> (n, ., H, W)
Maps = Callable[[Tensor, int, int], Tensor]
BASES: dict[str, tuple[str, dict[str, Any], Maps]] = {
    "gradient": ("gradient", {}, lambda x, b, t: pysal.gradient(MODEL, x, t)),
    "guided_backprop": ("guided_backprop", {}, lambda x, b, t: pysal.guided_backprop(MODEL, x, t)),
    "deconvnet": (
        "guided_backprop",
        {"rule": "deconvnet"},
        lambda x, b, t: pysal.guided_backprop(MODEL, x, t, rule="deconvnet"),
    ),
    "grad_cam": ("grad_cam", {}, lambda x, b, t: pysal.grad_cam(MODEL, x, t, layer="3")),
    "grad_cam of a layer": ("grad_cam", {"layer": "0"}, lambda x, b, t: pysal.grad_cam(MODEL, x, t, layer="0")),
    "guided_grad_cam": ("guided_grad_cam", {"layer": "1"}, lambda x, b, t: pysal.guided_grad_cam(MODEL, x, t, layer="1")),
    "integrated_gradients": (
        "integrated_gradients",
        {"steps": 5},
        lambda x, b, t: pysal.integrated_gradients(MODEL, x, t, steps=5),
    ),
    "integrated_gradients from pictures": (
        "integrated_gradients",
        {"steps": 4, "baseline": [PICTURES, "mean", "blur", PICTURES[1]]},
        lambda x, b, t: pysal.integrated_gradients(MODEL, x, t, steps=4, baseline=[PICTURES[b], "mean", "blur", PICTURES[1]]),
    ),
    "integrated_gradients to a tolerance": (
        "integrated_gradients",
        {"tolerance": 0.03, "placement": "adaptive"},
        lambda x, b, t: pysal.integrated_gradients(MODEL, x, t, tolerance=0.03, placement="adaptive"),
    ),
    "blur_integrated_gradients": (
        "blur_integrated_gradients",
        {"steps": 6, "max_sigma": 3.0},
        lambda x, b, t: pysal.blur_integrated_gradients(MODEL, x, t, steps=6, max_sigma=3.0),
    ),
    "leave_one_out in windows": (
        "leave_one_out",
        {"segments": Window(4, 3), "fill": PICTURES},
        lambda x, b, t: pysal.leave_one_out(MODEL, x, t, segments=Window(4, 3), fill=PICTURES[b], score="logit"),
    ),
    "leave_one_out in a grid, mean": (
        "leave_one_out",
        {"segments": Grid(2, 2), "fill": "mean"},
        lambda x, b, t: pysal.leave_one_out(MODEL, x, t, segments=Grid(2, 2), fill="mean", score="logit"),
    ),
    "leave_one_out in ragged segments": (
        "leave_one_out",
        {"segments": LABELS},
        lambda x, b, t: pysal.leave_one_out(MODEL, x, t, segments=LABELS[b], score="logit"),
    ),
    "leave_one_out in superpixels of the clean image": (
        "leave_one_out",
        {"segments": Slic(12, 1.0, 0.5)},
        lambda x, b, t: pysal.leave_one_out(MODEL, x, t, segments=labels_of(INPUTS, Slic(12, 1.0, 0.5))[b], score="logit"),
    ),
}


def moments(maps: Tensor, kind: str) -> Tensor:
    """Of maps (samples, ...)."""
    if kind == "mean":
        return maps.mean(0)
    return maps.square().mean(0) if kind == "squared" else (maps - maps.mean(0)).square().mean(0)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.usefixtures("independence_is_known")
def test_is_the_moment_of_the_base_over_the_noisy_copies(name: str, batch_size: int | None) -> None:
    base, options, maps_of = BASES[name]
    identities = [4, 0, 2**40]
    copies = noisy_copies(INPUTS, 0.2, 4, 11, identities)
    targets = MODEL(INPUTS).argmax(1).tolist()  # of the clean images
    maps = [maps_of(copies[b], b, targets[b]) for b in range(3)]
    scale = max(float(own.abs().max()) for own in maps)
    for kind in ("mean", "squared", "variance"):
        found = pysal.smooth_grad(
            MODEL,
            INPUTS,
            base=base,
            method_options=options,
            noise=0.2,
            samples=4,
            kind=kind,
            seed=11,
            image_ids=identities,
            batch_size=batch_size,
        )
        expected = torch.stack([moments(own, kind) for own in maps])
        if name == "integrated_gradients to a tolerance":  # the same steps, or a comparison with the tolerance fell otherwise
            assert float((found - expected).abs().max()) <= 0.03 * max(scale, scale**2)
        assert_rounding(found, expected, OPERATIONS, scale=max(scale, scale**2))


def test_standard_error() -> None:
    found = explained(MODEL, INPUTS, 1, samples=6, noise=0.2, seed=3)
    copies = noisy_copies(INPUTS, 0.2, 6, 3, [0, 1, 2])
    maps = torch.stack([pysal.gradient(MODEL, copies[:, sample], 1) for sample in range(6)])
    expected = maps.std(0, correction=1) / math.sqrt(6)
    assert_rounding(found.details["standard_error"].square(), expected.square(), OPERATIONS, scale=float(maps.abs().max()) ** 2)
    assert found.details["base"] == "gradient"
    assert "standard_error" not in explained(MODEL, INPUTS, 1, samples=1).details


@pytest.mark.parametrize("name", BASES)
def test_without_noise_is_the_base(name: str) -> None:
    base, options, maps_of = BASES[name]
    targets = MODEL(INPUTS).argmax(1).tolist()
    expected = torch.cat([maps_of(INPUTS[b : b + 1], b, targets[b]) for b in range(3)])
    for samples in (1, 3):
        found = pysal.smooth_grad(MODEL, INPUTS, base=base, method_options=options, noise=0.0, samples=samples)
        assert_rounding(found, expected, OPERATIONS, scale=max(1.0, float(expected.abs().max())))
        still = pysal.smooth_grad(MODEL, INPUTS, base=base, method_options=options, noise=0.0, samples=samples, kind="variance")
        assert float(still.abs().max()) <= (OPERATIONS * 2.3e-16 * max(1.0, float(expected.abs().max()))) ** 2


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 4, 6), (3, 4, 5, 5)], ids=str)
def test_of_a_linear_model_is_its_weights(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), linear(*shape[1:])
    w = weights(model, inputs)[2].expand(shape)
    assert torch.equal(pysal.smooth_grad(model, inputs, 2, samples=7), w)
    assert (pysal.smooth_grad(model, inputs, 2, samples=7, kind="variance") == 0).all()
    assert_rounding(pysal.smooth_grad(model, inputs, 2, samples=7, kind="squared"), w**2, 7)


def test_noise_is_normal_and_in_multiples_of_each_images_range() -> None:
    # f = sum x^2 / 2 has the gradient x: the variance of the maps is that of the noise
    inputs = images(3, 3, 24, 20) * torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)[:, None, None, None]
    found = pysal.smooth_grad(lambda x: x.square().sum((1, 2, 3)) / 2, inputs, 0, noise=0.3, samples=64, kind="variance")
    for own, image in zip(found, inputs, strict=True):
        variance = (0.3 * float(image.max() - image.min())) ** 2 * 63 / 64
        # the mean of 1440 variances of 64 normals each has a relative standard deviation of sqrt(2 / (63 * 1440))
        assert float(own.mean()) == pytest.approx(variance, rel=5 * math.sqrt(2 / (63 * 1440)))


def test_defaults_are_fifty_copies_with_noise_of_15_percent() -> None:
    model = Counting(MODEL)
    found = pysal.smooth_grad(model, INPUTS, 1)
    assert sum(model.differentiated) == 150
    assert torch.equal(found, pysal.smooth_grad(MODEL, INPUTS, 1, noise=0.15, samples=50, kind="mean", seed=0, base="gradient"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_variance_is_never_negative_and_survives_a_large_offset(dtype: torch.dtype) -> None:
    # gradient 1e6 + cos x: mean of squares minus square of mean would lose 1e12 eps, 1e-4 in float64 and all in float32
    inputs = images(2, 3, 6, 5, dtype=dtype)
    offset = 1e6 if dtype == torch.float64 else 1e3

    def model(batch: Tensor) -> Tensor:
        return offset * batch.sum((1, 2, 3)) + torch.sin(batch).sum((1, 2, 3))

    found = pysal.smooth_grad(model, inputs, 0, samples=20, kind="variance").double()
    assert (found >= 0).all()
    copies = noisy_copies(inputs, 0.15, 20, 0, [0, 1])
    expected = torch.cos(copies.double()).var(1, correction=0)
    # each gradient is rounded to eps * offset, and so is each update of the mean
    rounding = 2 * torch.finfo(dtype).eps * offset
    spread = expected.sqrt()
    assert ((found - expected).abs() <= 2 * spread * rounding + rounding**2 + 20 * torch.finfo(dtype).eps * expected).all()


def test_same_seed_gives_the_same_noise_in_any_chunks_company_and_order() -> None:
    model = smooth()
    options: dict[str, Any] = {"samples": 9, "noise": 0.2, "seed": -5}
    expected = pysal.smooth_grad(model, INPUTS, [0, 1, 2], **options, batch_size=1)
    for batch_size in (2, 3, 7, 100):
        assert_rounding(pysal.smooth_grad(model, INPUTS, [0, 1, 2], **options, batch_size=batch_size), expected, OPERATIONS)
    turned = pysal.smooth_grad(model, INPUTS.flip(0), [2, 1, 0], **options, image_ids=[2, 1, 0])
    assert_rounding(turned.flip(0), expected, OPERATIONS)
    for image in range(3):
        alone = pysal.smooth_grad(model, INPUTS[image : image + 1], image, **options, image_ids=torch.tensor([image]))
        assert_rounding(alone, expected[image : image + 1], OPERATIONS)


def test_other_seeds_other_images_and_more_samples_have_other_noise() -> None:
    twice = INPUTS[:1].expand(2, -1, -1, -1)
    found = pysal.smooth_grad(MODEL, twice, 1, samples=2)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(*pysal.smooth_grad(MODEL, twice, 1, samples=2, image_ids=[5, 5]))
    maps = [pysal.smooth_grad(MODEL, INPUTS, 1, samples=2, seed=seed) for seed in (0, 1, -1, 2**63 - 1, 2**32)]
    assert all(not torch.equal(one, other) for i, one in enumerate(maps) for other in maps[:i])
    # the first copies are the same however many follow
    few, more = (noisy_copies(INPUTS, 0.15, samples, 0, [0, 1, 2]) for samples in (2, 5))
    assert torch.equal(few, more[:, :2])


def test_half_precision_maps_are_averaged_in_single() -> None:
    inputs, model = INPUTS.float(), smooth().float()
    options: dict[str, Any] = {"samples": 50, "noise": 0.2}
    single = pysal.smooth_grad(model, inputs, 1, **options)
    assert torch.equal(pysal.smooth_grad(model, inputs, 1, **options, dtype=torch.float16), single.half())


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ([0, 2**70], f"[0, {2**70}]"),
        ([None, 1], "[None, 1]"),
        (["a", "b"], "['a', 'b']"),
        (np.array([0, 2**63], dtype=np.uint64), "array([ 0, 9223372036854775808], dtype=uint64)"),
    ],
)
def test_ids_that_are_no_numbers(ids: Any, shown: str) -> None:
    with pytest.raises(TypeError) as caught:
        pysal.smooth_grad(lambda x: pytest.fail("the model is not asked"), images(2, 3, 4, 4), 0, samples=2, image_ids=ids)
    assert str(caught.value) == f"pysal.smooth_grad: image_ids must be whole numbers below 2^63, got {shown}"


def test_more_samples_than_anybody_waits_for() -> None:
    with pytest.raises(ValueError, match=rf"^pysal.smooth_grad: samples must be at most {2**31 - 1}, got {10**30}$"):
        pysal.smooth_grad(lambda x: pytest.fail("the model is not asked"), images(2, 3, 4, 4), 0, samples=10**30)
    with pytest.raises(ValueError, match=rf"^pysal.integrated_gradients: steps must be at most {2**31 - 1}, got {10**30}$"):
        pysal.integrated_gradients(lambda x: pytest.fail("the model is not asked"), images(2, 3, 4, 4), 0, steps=10**30)


def test_noise_may_be_a_number_of_numpy() -> None:
    model, inputs = linear(3, 8, 6), images(2, 3, 8, 6)
    noise: Any = np.float32(0.1)
    found, expected = (pysal.smooth_grad(model, inputs, 1, noise=one) for one in (noise, float(noise)))
    assert torch.equal(found, expected)
