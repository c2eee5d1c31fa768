"""The same calls of PAIR and of pysal.pair, side by side, and where PAIR is wrong."""

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import saliency.core as theirs
import torch
from torch import Tensor, nn

import pysal
import pysal.pair as ours

USED_BY_GUIDED_IG = "abs asarray errstate expand_dims float64 inf isnan logical_and nan where zeros_like".split()
EXACT = 1e-9  # of the largest value, float64
CLASSES = ["GradientSaliency", "IntegratedGradients", "BlurIG", "GuidedIG", "GradCam", "Occlusion"]


def network(relu: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2)
        return (
            nn.Sequential(first, relu(), second, relu(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6))
            .double()
            .eval()
        )


MODEL = network()
IMAGE = np.random.default_rng(3).random((15, 12, 3))


def call_model(batch: np.ndarray, call_model_args: Any = None, expected_keys: Sequence[str] = ()) -> dict[str, Any]:
    """The usual call_model_function of a PyTorch program."""
    images = torch.from_numpy(np.moveaxis(batch, -1, 1).copy()).double().requires_grad_()
    activation = MODEL[:3](images)
    scores = MODEL[3:](activation)[:, call_model_args["target"]]
    of_images, of_layer = torch.autograd.grad(scores.sum(), (images, activation))
    channels_last: Callable[[Tensor], np.ndarray] = lambda value: np.moveaxis(value.detach().numpy(), 1, -1)  # noqa: E731
    found = {
        ours.INPUT_OUTPUT_GRADIENTS: channels_last(of_images),
        ours.CONVOLUTION_LAYER_VALUES: channels_last(activation),
        ours.CONVOLUTION_OUTPUT_GRADIENTS: channels_last(of_layer),
        ours.OUTPUT_LAYER_VALUES: scores.detach().numpy(),
    }
    return {key: found[key] for key in expected_keys}


@pytest.fixture(autouse=True)
def quantile_of_older_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """PAIR's GuidedIG calls `np.quantile` by an argument that NumPy 2.4 has no more."""
    numpy = vars(theirs.guided_ig)["np"]
    older = types.SimpleNamespace(**{name: getattr(numpy, name) for name in USED_BY_GUIDED_IG})
    older.quantile = lambda values, share, interpolation: np.quantile(values, share, method=interpolation)
    monkeypatch.setattr(theirs.guided_ig, "np", older)


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(expected - found).max() / np.abs(expected).max())


# class -> every option, each with values beside its default
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "GradientSaliency": [{}],
    "IntegratedGradients": [
        {}, {"x_steps": 7}, {"x_steps": 10, "batch_size": 4}, {"batch_size": 100}, {"x_baseline": IMAGE[::-1].copy()},
    ],
    "BlurIG": [
        {}, {"max_sigma": 9, "steps": 20}, {"steps": 13, "batch_size": 5}, {"steps": 10, "sqrt": True},
        {"steps": 5, "grad_step": 0.5},
    ],
    "GuidedIG": [
        {"x_steps": 12}, {"x_steps": 9, "fraction": 0.1, "max_dist": 0.5}, {"x_steps": 6, "max_dist": 1.0},
        {"x_steps": 5, "x_baseline": IMAGE[::-1].copy(), "max_dist": 0.0}, {"x_steps": 7, "fraction": 1.0},
    ],
    "GradCam": [{}, {"should_resize": False}, {"three_dims": False}, {"should_resize": False, "three_dims": False}],
    "Occlusion": [{"size": 5}, {"size": 12, "value": 0.5}, {"size": 4, "value": 1}, {"size": 13}],
}  # fmt: skip
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name: str) -> None:
    for method in ("GetMask", "GetSmoothedMask"):
        found, expected = (inspect.signature(getattr(getattr(one, name), method)) for one in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in found.parameters.values()] == [
            (p.name, p.default, p.kind) for p in expected.parameters.values()
        ]


@pytest.mark.parametrize("target", [0, 4])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_masks(name: str, options: dict[str, Any], target: int) -> None:
    """GradCam is float32 in PAIR, IntegratedGradients adds up in float32."""
    expected, found = (getattr(one, name)().GetMask(IMAGE, call_model, {"target": target}, **options) for one in (theirs, ours))
    single = name in ("GradCam", "IntegratedGradients")
    if not expected.any():
        assert not found.any()
    else:
        assert difference(expected, found) <= (8 * np.finfo(np.float32).eps if single else EXACT)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("name", ["GradientSaliency", "IntegratedGradients", "BlurIG", "GradCam"])
def test_smoothed_masks(name: str, magnitude: bool) -> None:
    options = {"IntegratedGradients": {"x_steps": 3}, "BlurIG": {"steps": 3}}.get(name, {})
    found = []
    for one in (theirs, ours):
        np.random.seed(4)
        smoothed = getattr(one, name)().GetSmoothedMask(
            IMAGE, call_model, {"target": 1}, stdev_spread=0.2, nsamples=4, magnitude=magnitude, **options
        )
        assert smoothed.dtype == np.float32
        found.append(smoothed)
    assert difference(*found) <= 8 * np.finfo(np.float32).eps


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_model_on_its_device_is_the_same_model(name: str, options: dict[str, Any]) -> None:
    expected = getattr(ours, name)().GetMask(IMAGE, call_model, {"target": 4}, **options)
    whole = ours.torch_model(MODEL, layer="2")
    for target in ({"target": 4}, None):
        model = whole if target else ours.torch_model(MODEL, 4, layer="2")
        found = getattr(ours, name)().GetMask(IMAGE, model, target, **options)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize("name", CLASSES)
def test_the_target_of_a_model_is_fixed_on_the_clean_image(name: str) -> None:
    images = torch.from_numpy(np.moveaxis(IMAGE, -1, 0)[None].copy())
    target = int(MODEL(images).argmax())
    options = OPTIONS[name][0]
    expected = getattr(ours, name)().GetMask(IMAGE, ours.torch_model(MODEL, target, layer="2"), **options)
    assert np.array_equal(getattr(ours, name)().GetMask(IMAGE, ours.torch_model(MODEL, layer="2"), **options), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_pairs_classes_take_our_model(name: str) -> None:
    options = OPTIONS[name][0]
    expected = getattr(theirs, name)().GetMask(IMAGE, call_model, {"target": 3}, **options)
    for model, arguments in (
        (ours.torch_model(MODEL, 3, layer="2"), None),
        (ours.torch_model(MODEL, layer="2"), {"target": 3}),
    ):
        assert difference(expected, getattr(theirs, name)().GetMask(IMAGE, model, arguments, **options)) < 1e-6


def test_a_model_called_step_by_step_wants_a_target() -> None:
    with pytest.raises(ValueError, match="target must be given"):
        theirs.GradientSaliency().GetMask(IMAGE, ours.torch_model(MODEL))
    with pytest.raises(ValueError, match="expected_keys must hold keys"):
        ours.torch_model(MODEL, 1)(IMAGE[None], expected_keys=["LOGITS"])


def test_native_gradient() -> None:
    images = torch.from_numpy(np.moveaxis(IMAGE, -1, 0)[None].copy())
    expected = pysal.gradient(MODEL, images, 2)[0].movedim(0, -1).numpy()
    assert np.array_equal(ours.GradientSaliency().GetMask(IMAGE, ours.torch_model(MODEL, 2)), expected)


def test_plain_lists_vectors_and_whole_numbers() -> None:
    def squares(batch: np.ndarray, call_model_args: Any = None, expected_keys: Sequence[str] = ()) -> dict[str, Any]:
        return {ours.INPUT_OUTPUT_GRADIENTS: 2.0 * batch}

    value = [3, 2, 1]
    assert ours.GradientSaliency().GetMask(value, squares).tolist() == [6, 4, 2]
    np.testing.assert_allclose(ours.IntegratedGradients().GetMask(value, squares), [9, 4, 1], rtol=1e-6)
    flat = ours.Occlusion().GetMask(np.ones((4, 3)), lambda batch, **_: {ours.OUTPUT_LAYER_VALUES: batch.sum((1, 2))}, size=2)
    assert flat.tolist() == [[4, 8, 4], [8, 16, 8], [8, 16, 8], [4, 8, 4]]


def test_guided_ig_runs_on_this_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(TypeError, match="interpolation"):
        theirs.GuidedIG().GetMask(IMAGE, call_model, {"target": 1}, x_steps=2)
    assert ours.GuidedIG().GetMask(IMAGE, call_model, {"target": 1}, x_steps=2).any()


def test_native_guided_integrated_gradients() -> None:
    images = torch.from_numpy(np.moveaxis(IMAGE, -1, 0)[None].copy())
    found = ours.GuidedIG().GetMask(IMAGE, call_model, {"target": 2}, x_steps=9, max_dist=0.1)
    expected = pysal.guided_integrated_gradients(MODEL, images, 2, steps=9, max_distance=0.1)[0].movedim(0, -1).numpy()
    assert difference(expected, found) < EXACT


@pytest.mark.parametrize("size", [7, 40])
def test_blur_ig_does_not_depend_on_the_batch_size(size: int) -> None:
    """PAIR multiplies a whole batch by the width of its last step: nothing changes where all steps are equally wide."""
    options = {"max_sigma": 20, "steps": 40, "sqrt": True}
    one_by_one, together = (
        [one.BlurIG().GetMask(IMAGE, call_model, {"target": 1}, batch_size=batch, **options) for one in (theirs, ours)]
        for batch in (1, size)
    )
    assert difference(one_by_one[0], one_by_one[1]) < EXACT
    assert difference(one_by_one[1], together[1]) < 1e-12
    assert difference(one_by_one[0], together[0]) > 0.1


def test_one_step_of_a_larger_batch() -> None:
    """PAIR never runs a batch that is not full at the end of the path, which one step does not reach."""
    expected = IMAGE * call_model(0 * IMAGE[None], {"target": 1}, [ours.INPUT_OUTPUT_GRADIENTS])[ours.INPUT_OUTPUT_GRADIENTS][0]
    options = {"x_steps": 1, "batch_size": 2}
    assert difference(expected, ours.IntegratedGradients().GetMask(IMAGE, call_model, {"target": 1}, **options)) < EXACT
    assert not theirs.IntegratedGradients().GetMask(IMAGE, call_model, {"target": 1}, **options).any()


def test_whole_number_images_are_not_truncated() -> None:
    """PAIR blurs an image of integers in integers."""
    image = (IMAGE * 9).astype(np.int64)
    found = ours.BlurIG().GetMask(image, call_model, {"target": 1}, steps=5)
    assert difference(ours.BlurIG().GetMask(image.astype(np.float64), call_model, {"target": 1}, steps=5), found) < EXACT
    with pytest.raises(TypeError):
        theirs.BlurIG().GetMask(image, call_model, {"target": 1}, steps=5)
