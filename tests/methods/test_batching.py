"""Every method: any batch size, any split of the images over calls and any order give the same result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysal
from pysal import Grid, Slic, Window
from pysal.methods.registry import METHODS
from pysal.testing import assert_no_worse
from tests.methods.networks import Answer, Counting, assert_rounding, images, rectified, seeded, smooth

# two convolutions there and back, sums of at most 9 * 6 products each, and up to 40 steps or samples
OPERATIONS = 4 * 54 + 40
IMAGES = 5
SHAPES = [(3, 9, 7), (1, 8, 12), (4, 7, 7)]

# a few logits of a small network may all lie in [0, 1], where nobody could tell them from probabilities
SOFTMAX = {"score": "softmax"}
# case: method and, for the images `rows` of the five, its options
Options = Callable[[list[int], Tensor], dict[str, Any]]
CASES: dict[str, tuple[str, Options]] = {
    "leave_one_out in a grid": ("leave_one_out", lambda rows, x: {"segments": Grid(3, 2), **SOFTMAX}),
    "leave_one_out in windows": ("leave_one_out", lambda rows, x: {"segments": Window(4, 3), "fill": "mean", "score": "logit"}),
    "leave_one_out in superpixels": (
        "leave_one_out",
        lambda rows, x: {"segments": Slic(12, 1.0, 0.5), "fill": x.flip(2), **SOFTMAX},
    ),
    "leave_one_out in ragged segments": (
        "leave_one_out",
        lambda rows, x: {
            "segments": [torch.arange(x[0, 0].numel()).view(x.shape[2:]) // (9 + 5 * row) - 1 for row in rows],
            **SOFTMAX,
        },
    ),
    "gradient": ("gradient", lambda rows, x: {}),
    "gradient of a probability": ("gradient", lambda rows, x: SOFTMAX),
    "guided_backprop": ("guided_backprop", lambda rows, x: {}),
    "grad_cam": ("grad_cam", lambda rows, x: {}),
    "guided_grad_cam": ("guided_grad_cam", lambda rows, x: {}),
    "smooth_grad": ("smooth_grad", lambda rows, x: {"samples": 4, "image_ids": rows}),
    "smooth_grad over Integrated Gradients": (
        "smooth_grad",
        lambda rows, x: {
            "samples": 3,
            "image_ids": rows,
            "base": "integrated_gradients",
            "method_options": {"steps": 4, "baseline": x.flip(3)},
        },
    ),
    "smooth_grad, variance": ("smooth_grad", lambda rows, x: {"samples": 4, "image_ids": rows, "kind": "variance"}),
    "integrated_gradients": ("integrated_gradients", lambda rows, x: {"steps": 9}),
    "integrated_gradients from several": (
        "integrated_gradients",
        lambda rows, x: {"steps": 5, "baseline": [0.5, x.flip(2)], "placement": "squared"},
    ),
    "integrated_gradients, adaptive": ("integrated_gradients", lambda rows, x: {"steps": 11, "placement": "adaptive"}),
    "integrated_gradients to a tolerance": ("integrated_gradients", lambda rows, x: {"tolerance": 0.05}),
    "blur_integrated_gradients": ("blur_integrated_gradients", lambda rows, x: {"steps": 9, "max_sigma": 4.0}),
    "blur_integrated_gradients over roots": (
        "blur_integrated_gradients",
        lambda rows, x: {"steps": 9, "max_sigma": 4.0, "sqrt": True, "boundary": "reflect"},
    ),
}


def run(case: str, model: Any, inputs: Tensor, rows: list[int], **more: Any) -> Tensor:
    method, options_of = CASES[case]
    own = inputs[rows]
    return getattr(pysal, method)(model, own, [row % 4 for row in rows], **options_of(rows, own), **more)


def alone(case: str, model: Any, inputs: Tensor) -> Tensor:
    return torch.cat([run(case, model, inputs, [row], batch_size=1) for row in range(len(inputs))])


def test_every_method_is_here() -> None:
    assert {method for method, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("independence_is_known")
def test_any_batch_size_and_any_split_give_the_same(case: str, shape: tuple[int, int, int]) -> None:
    inputs, model = images(IMAGES, *shape), rectified(shape[0])
    expected = alone(case, model, inputs)
    assert float(expected.abs().max()) > 0
    scale = max(1.0, float(expected.abs().max()))  # probabilities and logits of up to 1 are subtracted
    for batch_size in (1, 2, 3, 7, 1000, None):
        counting = Counting(model)
        found = run(case, counting, inputs, list(range(IMAGES)), batch_size=batch_size)
        assert_rounding(found, expected, OPERATIONS, scale)
        assert batch_size is None or max(counting.passes) <= batch_size
    for split in ([0, 1], [2, 3, 4]), ([4, 2, 0], [3, 1]):
        for rows in split:
            assert_rounding(run(case, model, inputs, rows, batch_size=4), expected[rows], OPERATIONS, scale)
    channels_last = inputs.contiguous(memory_format=torch.channels_last)
    assert_rounding(run(case, model, channels_last, list(range(IMAGES))), expected, OPERATIONS, scale)


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_open_targets_are_each_images_own_class(method: str, batch_size: int) -> None:
    inputs = images(IMAGES, 3, 9, 7)
    for row in range(IMAGES):  # the brightest channel decides
        inputs[row, row % 3] += 1
    model = rectified()
    model[7].weight.data.copy_(30 * (torch.arange(20).view(4, 5) % 7 - 3))
    model[7].bias.data.copy_(-model(inputs).detach().mean(0))
    classes = model(inputs).argmax(1).tolist()
    assert len(set(classes)) > 1
    options = {"samples": 3} if method == "smooth_grad" else {"segments": Grid(2, 2)} if method == "leave_one_out" else {}
    expected = getattr(pysal, method)(model, inputs, classes, **options)
    found = getattr(pysal, method)(model, inputs, batch_size=batch_size, **options)
    assert_rounding(found, expected, OPERATIONS, scale=100 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_further_inputs_go_with_their_images(case: str, by_name: bool) -> None:
    inputs, model = images(IMAGES, 3, 9, 7), seeded(Answer)
    questions = torch.arange(10).view(IMAGES, 2) * 3 % 7

    def extra(rows: list[int]) -> Any:
        return pysal.PerImage({"question": questions[rows]} if by_name else (questions[rows],))

    expected = torch.cat([run(case, model, inputs, [row], extra_inputs=extra([row])) for row in range(IMAGES)])
    found = run(case, model, inputs, list(range(IMAGES)), extra_inputs=extra(list(range(IMAGES))), batch_size=3)
    assert float(expected.abs().max()) > 0
    assert_rounding(found, expected, OPERATIONS, scale=max(1.0, float(expected.abs().max())))
    # another question, another answer
    turned = run(case, model, inputs, list(range(IMAGES)), extra_inputs=extra(list(range(IMAGES))[::-1]))
    assert float((turned - expected).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("target", [1, lambda output: output[:, 1]], ids=["class", "callable"])
@pytest.mark.parametrize("method", ["leave_one_out", "integrated_gradients", "blur_integrated_gradients"])
def test_a_model_may_answer_into_one_buffer(method: str, target: Any) -> None:
    # as captured CUDA graphs do: what the last pass returned is overwritten by the next
    inputs, model, buffer = images(IMAGES, 3, 9, 7), rectified(), torch.empty(100, 4, dtype=torch.float64)

    def buffered(batch: Tensor) -> Tensor:
        scores = model(batch)
        return scores if torch.is_grad_enabled() else buffer[: len(batch)].copy_(scores)

    options = {"segments": Grid(2, 2)} if method == "leave_one_out" else {"steps": 8}
    expected, found = (
        pysal.explain(each, inputs, target, methods=[method], method_options={method: options}, batch_size=2)
        for each in (model, buffered)
    )
    assert torch.equal(found[method].map, expected[method].map)
    assert torch.equal(found.scores, expected.scores)
    if method != "leave_one_out":
        assert torch.equal(found[method].details["residual"], expected[method].details["residual"])


@pytest.mark.parametrize("batch_size", [3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_no_worse_in_batches_than_alone(case: str, batch_size: int) -> None:
    if METHODS[CASES[case][0]].name.startswith("guided"):
        double, single = rectified(), rectified().float()
    else:
        double, single = smooth(), smooth().float()
    inputs = images(IMAGES, 3, 9, 7)
    if case == "integrated_gradients to a tolerance":  # which steps are taken hangs on comparisons: one that no rounding turns
        assert_steps_do_not_hang_on_rounding(double, inputs)
    found = run(case, single, inputs.float(), list(range(IMAGES)), batch_size=batch_size)
    assert_no_worse(found, alone(case, double, inputs), alone(case, single, inputs.float()))


def assert_steps_do_not_hang_on_rounding(model: Any, inputs: Tensor) -> None:
    name = "integrated_gradients"
    found = pysal.explain(model, inputs, methods=[name], method_options={name: {"tolerance": 0.05}})[name]
    assert float((found.details["error"] / 0.05 - 1).abs().min()) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_details_are_those_of_each_image_alone(case: str) -> None:
    method, options_of = CASES[case]
    inputs, model = images(IMAGES, 3, 9, 7), rectified()

    def details(rows: list[int], batch_size: int) -> dict[str, Any]:
        options = options_of(rows, inputs[rows])
        score = options.pop("score", None)
        return pysal.explain(
            model, inputs[rows], methods=[method], score=score, method_options={method: options}, batch_size=batch_size
        )[method].details

    together, apart = details(list(range(IMAGES)), 7), [details([row], 2) for row in range(IMAGES)]
    for name, value in together.items():
        for row in range(IMAGES):
            if not isinstance(value, (Tensor, list)) or name == "boxes":  # said of the whole call
                assert str(value) == str(apart[row][name])
            elif torch.is_floating_point(value[row]):
                # a residual sums 189 numbers
                assert_rounding(value[row].double(), apart[row][name][0].double(), OPERATIONS + 189, scale=10.0)
            else:
                assert torch.equal(value[row], apart[row][name][0])
