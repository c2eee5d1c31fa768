"""Infidelity against captum's, given the same perturbations, and in closed form on linear models."""

from typing import Any

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from torch import Tensor

import pysal
from pysal import metrics, ops
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.metrics.registry import figure_of
from tests.methods.networks import assert_rounding, images, linear, rectified, weights

SAMPLES = 6
# the passes, integral sums over 72 pixels of 3 channels, and a mean of squares
OPERATIONS = 16 * 54 + 4 * 72 * 3 + SAMPLES


class Recorded(torch.nn.Module):
    """Keeps every batch a model saw."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.batches = model, []
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        self.batches.append(batch.clone())
        return self.model(batch)


def perturbed_images(model: torch.nn.Module, inputs: Tensor, maps: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The figure, and what the model was shown after the clean images: (B, samples, C, H, W)."""
    recorded = Recorded(model)
    found = metrics.infidelity(recorded, inputs, maps, 1, samples=SAMPLES, score="logit", **options)
    seen = torch.cat(recorded.batches)
    return found, seen[len(inputs) :].unflatten(0, (len(inputs), SAMPLES))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"perturbation": "noise", "meaning": "slopes"},
        {"perturbation": "squares", "meaning": "slopes", "fill": 0.3},
        {"perturbation": "squares", "meaning": "shares"},
        {"perturbation": "squares", "meaning": "shares", "fill": "mean"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.usefixtures("independence_is_known")
def test_is_captums(options: dict[str, Any], scaled: bool) -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 3, 9, 8, seed=4)
    found, seen = perturbed_images(model, inputs, maps, scaled=scaled, **options)
    assert seen.shape == (3, SAMPLES, 3, 9, 8)
    shares = options["meaning"] == "shares"

    def perturb(expanded: Tensor) -> tuple[Tensor, Tensor]:
        changed = seen.flatten(0, 1)
        # captum repeats each image; what share of a pixel went is 1 where it was filled in
        perturbation = (expanded != changed).double() if shares else expanded - changed
        return perturbation, changed

    expected = captum_infidelity(model, perturb, inputs, maps, target=1, n_perturb_samples=SAMPLES, normalize=scaled)
    assert_rounding(found, expected.detach(), OPERATIONS, scale=max(1.0, float(maps.sum((1, 2, 3)).max()) ** 2))
    assert (found > 0).all()


@pytest.mark.usefixtures("independence_is_known")
def test_squares_are_squares_inside_the_image_of_every_allowed_size_and_place() -> None:
    inputs = torch.ones(1, 1, 16, 21, dtype=torch.float64)
    recorded = Recorded(linear(1, 16, 21))
    metrics.infidelity(recorded, inputs, inputs, 0, samples=4000, score="logit")
    filled = (torch.cat(recorded.batches)[1:, 0] == 0).long()
    rows, columns = filled.amax(2), filled.amax(1)
    heights, widths = rows.sum(1), columns.sum(1)
    assert torch.equal(heights, widths)
    assert torch.equal(filled.sum((1, 2)), heights * widths)  # nothing but the square
    assert sorted(set(heights.tolist())) == [2, 3, 4, 5, 6, 7, 8]
    tops, lefts = rows.argmax(1), columns.argmax(1)
    for side in range(2, 9):
        own = heights == side
        assert set(tops[own].tolist()) == set(range(16 - side + 1))
        assert set(lefts[own].tolist()) == set(range(21 - side + 1))
        # uniform: 4000 draws at p = 1/7, five standard deviations
        assert abs(int(own.sum()) - 4000 / 7) < 5 * (4000 * 6 / 49) ** 0.5


@pytest.mark.usefixtures("independence_is_known")
def test_noise_has_the_deviation_asked_for() -> None:
    inputs = images(2, 3, 9, 8)
    _, seen = perturbed_images(linear(3, 9, 8), inputs, inputs, perturbation="noise", meaning="slopes", noise=0.2)
    expected = 0.2 * (inputs.flatten(1).amax(1) - inputs.flatten(1).amin(1))
    noise = (seen - inputs[:, None]).flatten(1)
    count = noise.shape[1]
    # the estimate's own standard error is sigma / sqrt(2 n)
    assert ((noise.std(1) / expected - 1).abs() < 5 / (2 * count) ** 0.5).all()


@pytest.mark.parametrize("perturbation", ["squares", "noise"])
def test_the_gradient_of_a_linear_model_predicts_exactly(perturbation: str) -> None:
    model, inputs = linear(3, 9, 8), images(3, 3, 9, 8)
    slopes = weights(model, inputs)[1].expand(3, -1, -1, -1)
    for scaled in (False, True):
        for factor in (1.0, 5.0):
            options = {"perturbation": perturbation, "meaning": "slopes", "scaled": scaled}
            found = metrics.infidelity(model, inputs, factor * slopes, 1, samples=SAMPLES, score="logit", **options)
            if scaled or factor == 1.0:
                assert float(found.max()) < OPERATIONS * torch.finfo(torch.float64).eps * 20
            else:
                assert float(found.min()) > 1e-3
    # and the shares that leave-one-out of single pixels gives are exact too
    shares = pysal.leave_one_out(model, inputs, 1, segments=pysal.Grid(9, 8), score="logit")
    found = metrics.infidelity(model, inputs, shares, 1, samples=SAMPLES, score="logit", scaled=False)
    assert float(found.max()) < 72 * OPERATIONS * torch.finfo(torch.float64).eps


def test_the_scale_is_the_best_there_is() -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 3, 9, 8, seed=4) - 0.3
    best = metrics.infidelity(model, inputs, maps, 1, samples=SAMPLES)
    nothing = metrics.infidelity(model, inputs, torch.zeros_like(maps), 1, samples=SAMPLES)
    assert (best <= nothing).all()
    for factor in (-1.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0):
        assert (best <= metrics.infidelity(model, inputs, factor * maps, 1, samples=SAMPLES, scaled=False)).all()
        assert_rounding(metrics.infidelity(model, inputs, factor * maps, 1, samples=SAMPLES), best, OPERATIONS)


@pytest.mark.parametrize("perturbation", ["squares", "noise"])
def test_draws_belong_to_the_image(perturbation: str) -> None:
    model, inputs, maps = rectified(), images(4, 3, 9, 8), images(4, 3, 9, 8, seed=4)
    options: dict[str, Any] = {"perturbation": perturbation, "meaning": "slopes", "samples": SAMPLES}
    whole = metrics.infidelity(model, inputs, maps, 1, image_ids=[7, 3, 2**40, 5], seed=3, **options)
    order = [2, 0, 3, 1]
    for batch_size in (1, 3, 100):
        other = metrics.infidelity(
            model,
            inputs[order],
            maps[order],
            1,
            image_ids=torch.tensor([2**40, 7, 5, 3]),
            seed=3,
            batch_size=batch_size,
            **options,
        )
        assert_rounding(other, whole[order], OPERATIONS, scale=float(maps.sum((1, 2, 3)).max()) ** 2)
    assert (metrics.infidelity(model, inputs, maps, 1, image_ids=[8, 4, 9, 6], seed=3, **options) != whole).all()
    assert (metrics.infidelity(model, inputs, maps, 1, image_ids=[7, 3, 2**40, 5], seed=4, **options) != whole).all()


def test_nan_stays_with_its_image() -> None:
    model, inputs, maps = rectified(), images(3, 3, 9, 8), images(3, 1, 9, 8, seed=1)
    maps[0, 0, 0, 0] = torch.inf
    assert metrics.infidelity(model, inputs, maps, 1, samples=2).isnan().tolist() == [True, False, False]


IMAGE, MAP = images(2, 3, 9, 8), images(2, 1, 9, 8, seed=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"maps": MAP[:, :, 1:]}, ValueError, "maps must have shape (2, 1 or 3, 9, 8), got shape (2, 1, 8, 8)"),
        ({"perturbation": "holes"}, ValueError, "perturbation must be 'squares' or 'noise', got 'holes'"),
        ({"meaning": "truth"}, ValueError, "meaning must be 'shares' or 'slopes', got 'truth'"),
        ({"perturbation": "noise"}, ValueError, "meaning must be 'slopes' where the perturbation is 'noise', got 'shares'"),
        ({"noise": 0.0}, ValueError, "noise must be a finite number above 0, got 0.0"),
        ({"samples": 0}, ValueError, "samples must be a whole number of at least 1, got 0"),
        ({"seed": 2**63}, ValueError, f"seed must be a whole number in [-2^63, 2^63), got {2**63}"),
        ({"image_ids": [1]}, ValueError, "image_ids must have one id for each of the 2 images, got shape (1,)"),
        ({"image_ids": [1, -1]}, ValueError, "image_ids must be 0 or more, got -1"),
        ({"image_ids": [1.0, 2.0]}, TypeError, "image_ids must be whole numbers, got float32"),
    ],
)  # fmt: skip
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    def never(batch: Tensor) -> Tensor:
        raise AssertionError("the model was run")

    given = {"maps": MAP, **arguments}
    with pytest.raises(error) as caught:
        metrics.infidelity(never, IMAGE, given.pop("maps"), 0, **given)
    assert str(caught.value) == f"pysal.metrics.infidelity: {message}"


def test_uniform_numbers_are_philoxs_words() -> None:
    from pysal.metrics._maps import uniform

    ids, draws = torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0])
    numbers = uniform(9, ids, draws, 4)
    assert torch.equal(numbers * 2**32 - 0.5, ops.gaussian_noise_bits(9, ids, draws, 4).double())
    assert (numbers > 0).all()
    assert (numbers < 1).all()


def test_maps_of_one_request_share_the_passes() -> None:
    model, inputs, calls = rectified(), images(2, 3, 9, 8), []
    model.register_forward_hook(lambda *_: calls.append(1))
    plan = Plan("x", model, inputs, [0, 1], Running("logit", (), None, "float32", None))
    options: dict[str, Any] = {"seed": 3, "image_ids": [4, 7], "method_options": None, "masks": None, "options": {"samples": 6}}
    found = []
    for number, method in enumerate(("integrated_gradients", "gradient")):
        map = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(number), dtype=inputs.dtype)
        calls.clear()
        found.append(figure_of("infidelity", plan.renamed("y", "logit"), map, method=method, **options))
        assert bool(calls) == (number == 0)
        alone = metrics.per_image(
            "infidelity",
            model,
            inputs,
            map,
            [0, 1],
            seed=3,
            image_ids=[4, 7],
            method=method,
            options={"samples": 6},
            score="logit",
        )
        assert torch.equal(found[-1], alone)
    calls.clear()
    for changed in ({"seed": 4}, {"image_ids": [4, 8]}, {"options": {"samples": 6, "fill": 0.5}}, {"options": {"samples": 7}}):
        figure_of("infidelity", plan.renamed("y", "logit"), map, method=method, **{**options, **changed})
        assert calls, "another question takes passes of its own"
        calls.clear()
    figure_of("infidelity", plan.renamed("y", "softmax"), map, method=method, **options)
    assert calls
