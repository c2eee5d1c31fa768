"""What is refused, in which words, and that it is refused before the model is run."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pysal
from pysal.engine.model.not_applicable import NotDifferentiable
from pysal.engine.request.score import SCORE_KINDS
from tests.methods.calls import CALLS, Watched, row_by_row
from tests.methods.networks import images

INPUTS = images(3, 3, 8, 8, dtype=torch.float32)
NAN, INF = float("nan"), float("inf")
METHODS: dict[str, Callable[..., Any]] = {
    **CALLS,
    "explain": functools.partial(pysal.explain, methods=["gradient"]),
    "explain all": functools.partial(pysal.explain, methods="all"),
}


class Watching:
    """A model and how many times it was run."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.passes = 0
        self.model = Watched(row_by_row().float() if model is None else model, self.count)

    def count(self, batch: Tensor) -> None:
        self.passes += 1


def refusal(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert type(caught.value) is error
    assert "\n" not in message
    assert not message.endswith(".")


def where(method: str) -> str:
    return f"pysal.{method.split()[0]}"


def with_value(value: float) -> Tensor:
    inputs = INPUTS.clone()
    inputs[1, 2, 3, 4] = value
    return inputs


BAD_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (None, TypeError, "be a torch.Tensor, got NoneType"),
    "an array": (INPUTS.numpy(), TypeError, "be a torch.Tensor, got ndarray"),
    "a list": ([INPUTS], TypeError, "be a torch.Tensor, got list"),
    "one image": (INPUTS[0], ValueError, "be a batch of images (B, C, H, W), got shape (3, 8, 8)"),
    "a video": (INPUTS[None], ValueError, "be a batch of images (B, C, H, W), got shape (1, 3, 3, 8, 8)"),
    "bytes": (INPUTS.byte(), TypeError, "have dtype float32 or float64 or float16 or bfloat16, got uint8"),
    "integers": (INPUTS.long(), TypeError, "have dtype float32 or float64 or float16 or bfloat16, got int64"),
    "booleans": (INPUTS > 0, TypeError, "have dtype float32 or float64 or float16 or bfloat16, got bool"),
    "complex": (INPUTS.cfloat(), TypeError, "have dtype float32 or float64 or float16 or bfloat16, got complex64"),
    "sparse": (INPUTS.to_sparse(), TypeError, "be a dense tensor with values, got one that is of layout sparse_coo"),
    "mkldnn": (INPUTS.to_mkldnn(), TypeError, "be a dense tensor with values, got one that is of layout _mkldnn"),
    "meta": (INPUTS.to("meta"), TypeError, "be a dense tensor with values, got one that is on the meta device"),
    "fake": (
        FakeTensorMode(allow_non_fake_inputs=True).from_tensor(INPUTS),
        TypeError,
        "be a dense tensor with values, got one that is of FakeTensorMode",
    ),
    "nested": (
        torch.nested.nested_tensor([INPUTS[0], INPUTS[1]], layout=torch.jagged),
        TypeError,
        "be a dense tensor with values, got one that is nested",
    ),
    "NaN": (with_value(NAN), ValueError, "be finite, got NaN or infinity in image 1"),
    "infinity": (with_value(-INF), ValueError, "be finite, got NaN or infinity in image 1"),
    "no image": (INPUTS[:0], ValueError, "hold at least one image, got shape (0, 3, 8, 8)"),
    "no channel": (INPUTS[:, :0], ValueError, "be images of more than one pixel, got shape (3, 0, 8, 8)"),
    "no line": (INPUTS[:, :, :0], ValueError, "be images of more than one pixel, got shape (3, 3, 0, 8)"),
    "a pixel": (INPUTS[:, :, :1, :1], ValueError, "be images of more than one pixel, got shape (3, 3, 1, 1)"),
    "float64": (INPUTS.double(), TypeError, "have the model's dtype float32, got float64"),
    "float16": (INPUTS.half(), TypeError, "have the model's dtype float32, got float16"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("method", METHODS)
def test_images(method: str, name: str) -> None:
    inputs, error, sentence = BAD_IMAGES[name]
    if name == "an array" and method.startswith("explain"):  # which takes photos of models that say how they want them
        wanted = "be a tensor (B, C, H, W) for a model that does not say how it wants photos"
        sentence = f"{wanted} (see pysal.models.wrap), got ndarray"
    watching = Watching()
    refusal(lambda: METHODS[method](watching.model, inputs, target=1), error, f"{where(method)}: inputs must {sentence}")
    assert watching.passes == 0


@pytest.mark.parametrize("method", METHODS)
def test_models(method: str) -> None:
    call = METHODS[method]
    refusal(lambda: call("resnet50", INPUTS), TypeError, f"{where(method)}: model must be callable, got str")
    refusal(
        lambda: call(row_by_row().to("meta"), INPUTS.double()),
        ValueError,
        f"{where(method)}: model must have weights with values, got weights on the meta device",
    )
    watching = Watching(nn.Sequential(row_by_row().float(), nn.Dropout()))
    sentence = f"{where(method)}: model must be in eval mode, got %s in training mode: call model.eval() first"
    watching.model.train()
    refusal(lambda: call(watching.model, INPUTS), ValueError, sentence % "module 'model.1' (Dropout)")
    watching.model.eval()
    watching.model.model[1].train()  # type: ignore[operator, index]
    refusal(lambda: call(watching.model, INPUTS), ValueError, sentence % "module 'model.1' (Dropout)")
    refusal(lambda: call(nn.Dropout(), INPUTS), ValueError, sentence % "Dropout")
    assert watching.passes == 0


INDICES = "target must be None, a class index or name, one per image, or a callable"
DENSE = "target must be a dense tensor with values"
UNNAMED = "target must be a class index for a model that carries no class names"
BAD_TARGETS: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "target must be a class index of 0 or more, got -1"),
    ([0, 1, -2], ValueError, "target must be a class index of 0 or more, got -2"),
    (torch.tensor(-3), ValueError, "target must be a class index of 0 or more, got -3"),
    (1.0, TypeError, f"{INDICES}, got 1.0"),
    (True, TypeError, f"{INDICES}, got True"),
    (np.float32(1), TypeError, f"{INDICES}, got {np.float32(1)!r}"),
    (np.bool_(True), TypeError, f"{INDICES}, got {np.bool_(True)!r}"),
    ("cat", ValueError, f"{UNNAMED}, got 'cat'"),
    (["cat", 0, 1], ValueError, f"{UNNAMED}, got 'cat'"),
    (pysal.Margin(1, "cat"), ValueError, f"{UNNAMED.replace('target', 'target.b')}, got 'cat'"),
    (pysal.Margin(1, -1), ValueError, "target.b must be a class index of 0 or more, got -1"),
    (pysal.Margin([1, 2], 0), ValueError, "target.a must have one index for each of the 3 images, got 2"),
    (pysal.Margin([1, 2, 3], 2), ValueError, "target must be a Margin of two different classes, got class 2 twice"),
    (pysal.Margin(None, 2), TypeError, f"{INDICES.replace('target', 'target.a')}, got None"),
    ([pysal.Margin(1, 2), 0, 1], TypeError, "target must hold class indices, got Margin(a=1, b=2)"),
    (2**70, ValueError, f"target must be a class index below 2^63, got {2**70}"),
    ([0, 2**64, 0], ValueError, f"target must be a class index below 2^63, got {2**64}"),
    (np.array([1, 2**63, 0], dtype=np.uint64), ValueError, f"target must be a class index below 2^63, got {2**63}"),
    (np.array([0, "a", None], dtype=object), ValueError, f"{UNNAMED}, got 'a'"),
    (np.array([0, 1.5, 1], dtype=object), TypeError, "target must hold class indices, got 1.5"),
    (np.array(["NaT"], dtype="datetime64[s]"), TypeError, f"{INDICES}, got an array of dtype datetime64[s]"),
    (torch.zeros(3, dtype=torch.long, device="meta"), TypeError, f"{DENSE}, got one that is on the meta device"),
    (torch.ones(3, dtype=torch.long).to_sparse(), TypeError, f"{DENSE}, got one that is of layout sparse_coo"),
    ([lambda out: out[:, 0]] * 2, ValueError, "target must have one callable for each of the 3 images, got 2"),
    ([lambda out: out[:, 0], 1, 2], ValueError, "target must hold callables alone or classes alone, got both"),
    ({0: 1}, TypeError, f"{INDICES}, got {{0: 1}}"),
    (bytearray(3), TypeError, f"{INDICES}, got bytearray(b'\\x00\\x00\\x00')"),
    (b"cat", TypeError, f"{INDICES}, got b'cat'"),
    ({0, 1, 2}, TypeError, f"{INDICES}, got {{0, 1, 2}}"),
    (torch.tensor([0.0, 1.0, 2.0]), TypeError, f"{INDICES}, got a tensor of dtype float32"),
    (torch.tensor([True, False, True]), TypeError, f"{INDICES}, got a tensor of dtype bool"),
    (np.zeros(3), TypeError, f"{INDICES}, got an array of dtype float64"),
    (torch.zeros(3, 1, dtype=torch.long), ValueError, "target must have shape (3,), got (3, 1)"),
    ([0, 1.0, 2], TypeError, "target must hold class indices, got 1.0"),
    ([0, True, 2], TypeError, "target must hold class indices, got True"),
    ([0, None, 2], TypeError, "target must hold class indices, got None"),
    ([0, 1], ValueError, "target must have one index for each of the 3 images, got 2"),
    ([], ValueError, "target must have one index for each of the 3 images, got 0"),
    (torch.tensor([0, 1, 2, 3]), ValueError, "target must have one index for each of the 3 images, got 4"),
]


@pytest.mark.parametrize(("target", "error", "sentence"), BAD_TARGETS, ids=lambda value: repr(value).split(" at 0x")[0][:30])
@pytest.mark.parametrize("method", METHODS)
def test_targets(method: str, target: Any, error: type[Exception], sentence: str) -> None:
    watching = Watching()
    refusal(lambda: METHODS[method](watching.model, INPUTS, target=target), error, f"{where(method)}: {sentence}")
    assert watching.passes == 0


@pytest.mark.parametrize("method", METHODS)
def test_target_beyond_the_classes_is_refused_by_the_first_pass(method: str) -> None:
    for target, shown in ((4, 4), ([0, 9, 1], 9)):
        watching = Watching()
        # Grad-CAM looks for its layer with a pass over the first image
        passes = 2 if "grad_cam" in method or method == "explain all" else 1
        sentence = f"{where(method)}: target must be below the model's 4 classes, got {shown}"
        refusal(lambda t=target, w=watching: METHODS[method](w.model, INPUTS, target=t), ValueError, sentence)
        assert watching.passes <= passes


SCORES = f"score must be one of {', '.join(map(repr, SCORE_KINDS))}"
PRECISIONS = "precision must be one of 'float32', 'tf32', 'mixed', 'bf16'"
ROWS = "batch_size must be None or a whole number of at least 1"
BAD_SHARED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"score": "margin"}, ValueError, f"{SCORES}, got 'margin'"),
    ({"score": 3}, ValueError, f"{SCORES}, got 3"),
    ({"precision": "float16"}, ValueError, f"{PRECISIONS} (did you mean 'float32'?), got 'float16'"),
    ({"precision": torch.float32}, ValueError, f"{PRECISIONS}, got torch.float32"),
    ({"batch_size": 0}, ValueError, f"{ROWS}, got 0"),
    ({"batch_size": -4}, ValueError, f"{ROWS}, got -4"),
    ({"batch_size": 1.5}, ValueError, f"{ROWS}, got 1.5"),
    ({"batch_size": True}, ValueError, f"{ROWS}, got True"),
    ({"batch_size": "8"}, ValueError, f"{ROWS}, got '8'"),
    ({"extra_inputs": None}, TypeError, "extra_inputs must be a sequence or a mapping, got NoneType"),
    ({"extra_inputs": INPUTS}, TypeError, "extra_inputs must be a sequence or a mapping, got Tensor"),
    ({"extra_inputs": "what?"}, TypeError, "extra_inputs must be a sequence or a mapping, got str"),
    ({"extra_inputs": 7}, TypeError, "extra_inputs must be a sequence or a mapping, got int"),
    ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point torch.dtype or None, got torch.int32"),
    ({"dtype": "float32"}, TypeError, "dtype must be a floating-point torch.dtype or None, got float32"),
    ({"dtype": torch.complex64}, TypeError, "dtype must be a floating-point torch.dtype or None, got torch.complex64"),
]


@pytest.mark.parametrize(
    ("method", "options", "error", "sentence"),
    # an explanation has no dtype to choose
    [(method, *case) for method in METHODS for case in BAD_SHARED if not ("dtype" in case[0] and "explain" in method)],
    ids=lambda value: str(value).split(" at 0x")[0][:40],
)
def test_options_of_every_method(method: str, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    watching = Watching()
    refusal(lambda: METHODS[method](watching.model, INPUTS, **options), error, f"{where(method)}: {sentence}")
    assert watching.passes == 0


def fills(argument: str) -> list[tuple[dict[str, Any], type[Exception], str]]:
    shapes = f"{argument} must be a number, a colour of 3 channels or an image of shape (3, 8, 8)"
    kinds = f"{argument} must be a number, a colour, a name or an image tensor"
    words = "'black', 'white', 'mean', 'blur'" + (", 'drop'" if argument == "fill" else "")
    names = f"{argument} must be one of {words}, a number, a colour or an image"
    return [
        ({argument: "red"}, ValueError, f"{names}, got 'red'"),
        ({argument: (0.5, 0.5)}, ValueError, f"{shapes}, got shape (2,)"),
        ({argument: ()}, ValueError, f"{shapes}, got shape (0,)"),
        ({argument: torch.zeros(3, 4, 4)}, ValueError, f"{shapes}, got shape (3, 4, 4)"),
        ({argument: torch.zeros(8, 8)}, ValueError, f"{shapes}, got shape (8, 8)"),
        ({argument: torch.zeros(2, 3, 8, 8)}, ValueError, f"{shapes}, got shape (2, 3, 8, 8)"),
        ({argument: torch.zeros(4, 3, 8, 8)}, ValueError, f"{shapes}, got shape (4, 3, 8, 8)"),
        ({argument: NAN}, ValueError, f"{argument} must be finite, got NaN or infinity"),
        ({argument: (0.0, INF, 0.0)}, ValueError, f"{argument} must be finite, got NaN or infinity"),
        ({argument: torch.full((3,), NAN)}, ValueError, f"{argument} must be finite, got NaN or infinity"),
        ({argument: None}, TypeError, f"{kinds}, got None"),
        ({argument: True}, TypeError, f"{kinds}, got True"),
        ({argument: ("a", "b", "c")}, TypeError, f"{kinds}, got ('a', 'b', 'c')"),
    ]


def steps(least: int = 33) -> list[tuple[dict[str, Any], type[Exception], str]]:
    rules = "'gauss_legendre', 'midpoint', 'left', 'right', 'trapezoid'"
    halves = "quadrature must be 'trapezoid' or None with a tolerance, which halves its steps"
    return [
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, got 0"),
        ({"steps": -5}, ValueError, "steps must be a whole number of at least 1, got -5"),
        ({"steps": 1.5}, ValueError, "steps must be a whole number of at least 1, got 1.5"),
        ({"steps": True}, ValueError, "steps must be a whole number of at least 1, got True"),
        ({"steps": "50"}, ValueError, "steps must be a whole number of at least 1, got '50'"),
        ({"quadrature": "simpson"}, ValueError, f"quadrature must be one of {rules}, got 'simpson'"),
        ({"quadrature": "midpoint", "tolerance": 0.1}, ValueError, f"{halves}, got 'midpoint'"),
        ({"tolerance": 0}, ValueError, "tolerance must be None or between 0 and 1, got 0"),
        ({"tolerance": 1}, ValueError, "tolerance must be None or between 0 and 1, got 1"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be None or between 0 and 1, got -0.1"),
        ({"tolerance": NAN}, ValueError, "tolerance must be None or between 0 and 1, got nan"),
        ({"tolerance": "small"}, ValueError, "tolerance must be None or between 0 and 1, got 'small'"),
        ({"max_steps": 32}, ValueError, f"max_steps must be a whole number of at least {least}, got 32"),
        ({"max_steps": 1e3}, ValueError, f"max_steps must be a whole number of at least {least}, got 1000.0"),
    ]


def layers() -> list[tuple[dict[str, Any], type[Exception], str]]:
    tokens = "tokens must be None, 'vit', 'swin' or a callable"
    name = "layer must be the name of a module of the model"
    return [
        ({"layer": "second"}, ValueError, f"{name} (did you mean 'model.second'?), got 'second'"),
        (
            {"layer": "model.secnod"},
            ValueError,
            f"{name} (did you mean 'model.second'?), got 'model.secnod'",
        ),
        ({"layer": "modle.relu"}, ValueError, f"{name} (did you mean 'model.relu'?), got 'modle.relu'"),
        ({"layer": "xyzzy"}, ValueError, f"{name}, got 'xyzzy'"),
        ({"layer": nn.ReLU()}, ValueError, "layer must belong to the model, got ReLU"),
        ({"layer": 3}, TypeError, "layer must be a module or its name, got 3"),
        ({"tokens": "bert"}, ValueError, f"{tokens}, got 'bert'"),
        ({"tokens": 7, "layer": "model.second"}, ValueError, f"{tokens}, got 7"),
    ]


OTHERS = "other_activations must be one of 'error', 'plain', 'generalised', got 'ignore'"
BASES = (
    "'gradient', 'guided_backprop', 'grad_cam', 'guided_grad_cam', 'integrated_gradients', 'blur_integrated_gradients', "
    "'leave_one_out'"
)
LABELS = torch.zeros(8, 8, dtype=torch.long)
Cases = list[tuple[dict[str, Any], type[Exception], str]]
BAD_OPTIONS: dict[str, Cases] = {
    "leave_one_out": [
        *fills("fill"),
        (
            {"segments": "grid:2x2"},
            TypeError,
            "segments must be a Grid, Window, Slic or a map of whole-number labels, got 'grid:2x2'",
        ),
        ({"segments": 9}, TypeError, "segments must be a Grid, Window, Slic or a map of whole-number labels, got 9"),
        ({"segments": LABELS.float()}, TypeError, "segments must hold whole-number labels, got float32"),
        ({"segments": LABELS.bool().numpy()}, TypeError, "segments must hold whole-number labels, got bool"),
        ({"segments": LABELS[:4]}, ValueError, "segments must have the images' height and width (8, 8), got (4, 8)"),
        ({"segments": LABELS[0]}, ValueError, "segments must have the images' height and width (8, 8), got (8,)"),
        (
            {"segments": LABELS[None, None]},
            ValueError,
            "segments must have the images' height and width (8, 8), got (1, 1, 8, 8)",
        ),
        (
            {"segments": LABELS.expand(2, 8, 8)},
            ValueError,
            "segments must be one label map or one for each of 3 images, got 2",
        ),
        ({"segments": []}, ValueError, "segments must be one label map or one for each of 3 images, got 0"),
        (
            {"segments": LABELS - 1},
            ValueError,
            "segments must have at least one label of 0 or more, got only negative labels",
        ),
    ],
    "gradient": [],
    "guided_backprop": [
        ({"rule": "plain"}, ValueError, "rule must be 'guided' or 'deconvnet', got 'plain'"),
        ({"rule": None}, ValueError, "rule must be 'guided' or 'deconvnet', got None"),
        ({"other_activations": "ignore"}, ValueError, OTHERS),
    ],
    "grad_cam": layers(),
    "guided_grad_cam": [*layers(), ({"other_activations": "ignore"}, ValueError, OTHERS)],
    "smooth_grad": [
        ({"base": "smooth_grad"}, ValueError, f"base must be one of {BASES}, got 'smooth_grad'"),
        ({"base": ["gradient"]}, ValueError, f"base must be one of {BASES}, got ['gradient']"),
        ({"method_options": {"steps": 3}}, ValueError, "method_options must hold options out of none, got 'steps'"),
        ({"method_options": {"rules": None}}, ValueError, "method_options must hold options out of none, got 'rules'"),
        (
            {"base": "guided_backprop", "method_options": {"target": 3}},
            ValueError,
            "method_options must hold options out of rule, other_activations, got 'target'",
        ),
        (
            {"method_options": ["steps"]},
            TypeError,
            "method_options must be a mapping of option names to values, got ['steps']",
        ),
        (
            {"base": "integrated_gradients", "method_options": {"steps": 0}},
            ValueError,
            "steps must be a whole number of at least 1, got 0",
        ),
        ({"base": "guided_backprop", "method_options": {"other_activations": "ignore"}}, ValueError, OTHERS),
        (
            {"base": "grad_cam", "method_options": {"layer": "xyzzy"}},
            ValueError,
            "layer must be the name of a module of the model, got 'xyzzy'",
        ),
        ({"noise": -0.1}, ValueError, "noise must be a finite number of at least 0, got -0.1"),
        ({"noise": NAN}, ValueError, "noise must be a finite number of at least 0, got nan"),
        ({"noise": INF}, ValueError, "noise must be a finite number of at least 0, got inf"),
        ({"noise": "some"}, ValueError, "noise must be a finite number of at least 0, got 'some'"),
        ({"noise": True}, ValueError, "noise must be a finite number of at least 0, got True"),
        ({"samples": 0}, ValueError, "samples must be a whole number of at least 1, got 0"),
        ({"samples": 2.0}, ValueError, "samples must be a whole number of at least 1, got 2.0"),
        ({"samples": True}, ValueError, "samples must be a whole number of at least 1, got True"),
        ({"kind": "median"}, ValueError, "kind must be 'mean', 'squared' or 'variance' (did you mean 'mean'?), got 'median'"),
        ({"seed": 2**63}, ValueError, f"seed must be a whole number in [-2^63, 2^63), got {2**63}"),
        ({"seed": 1.0}, ValueError, "seed must be a whole number in [-2^63, 2^63), got 1.0"),
        ({"seed": False}, ValueError, "seed must be a whole number in [-2^63, 2^63), got False"),
        ({"image_ids": [0, 1]}, ValueError, "image_ids must have one id for each of the 3 images, got shape (2,)"),
        ({"image_ids": [0, 1, -1]}, ValueError, "image_ids must be 0 or more, got -1"),
        ({"image_ids": [0.0, 1.0, 2.0]}, TypeError, "image_ids must be whole numbers, got float32"),
        ({"image_ids": [True, True, False]}, TypeError, "image_ids must be whole numbers, got bool"),
    ],
    "integrated_gradients": [
        *fills("baseline"),
        *steps(),
        ({"baseline": []}, ValueError, "baseline must hold at least one baseline, got an empty list"),
        ({"baseline": [0.0, NAN]}, ValueError, "baseline must be finite, got NaN or infinity"),
        (
            {"placement": "random"},
            ValueError,
            "placement must be one of 'uniform', 'squared', 'adaptive', got 'random'",
        ),
        ({"placement": "adaptive", "steps": 7}, ValueError, "steps must be at least 8 with placement='adaptive', got 7"),
    ],
    "blur_integrated_gradients": [
        *steps(),
        ({"max_sigma": 0}, ValueError, "max_sigma must be a finite number of pixels above 0, got 0"),
        ({"max_sigma": -1.0}, ValueError, "max_sigma must be a finite number of pixels above 0, got -1.0"),
        ({"max_sigma": INF}, ValueError, "max_sigma must be a finite number of pixels above 0, got inf"),
        ({"max_sigma": NAN}, ValueError, "max_sigma must be a finite number of pixels above 0, got nan"),
        ({"max_sigma": True}, ValueError, "max_sigma must be a finite number of pixels above 0, got True"),
        ({"max_sigma": "wide"}, ValueError, "max_sigma must be a finite number of pixels above 0, got 'wide'"),
        ({"boundary": "wrap"}, ValueError, "boundary must be 'constant' or 'reflect', got 'wrap'"),
        ({"derivative": "exact"}, ValueError, "derivative must be 'difference' or 'analytic', got 'exact'"),
    ],
}
FLAT = [(method, *case) for method, cases in BAD_OPTIONS.items() for case in cases]


def test_every_method_is_here() -> None:
    assert BAD_OPTIONS.keys() == CALLS.keys()


@pytest.mark.parametrize("target", [None, 1], ids=["open target", "target"])
@pytest.mark.parametrize(("method", "options", "error", "sentence"), FLAT, ids=lambda value: str(value).split(" at 0x")[0][:30])
def test_options_of_a_method(
    method: str, options: dict[str, Any], error: type[Exception], sentence: str, target: int | None
) -> None:
    watching, call = Watching(), getattr(pysal, method)
    refusal(lambda: call(watching.model, INPUTS, target, **options), error, f"pysal.{method}: {sentence}")
    assert watching.passes == 0


@pytest.mark.parametrize(("method", "options", "error", "sentence"), FLAT, ids=lambda value: str(value).split(" at 0x")[0][:30])
def test_explain_refuses_options_of_any_method_before_the_first_runs(
    method: str, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    watching = Watching()
    for methods in ("all", [*[name for name in CALLS if name != method], method]):
        call = functools.partial(pysal.explain, watching.model, INPUTS, methods=methods, method_options={method: options})
        refusal(call, error, f"pysal.{method}: {sentence}")
    assert watching.passes == 0


def test_segments_that_do_not_fit_the_images() -> None:
    watching = Watching()
    for segments, shown in ((pysal.Grid(9, 2), "9 x 2"), (pysal.Grid(1, 9), "1 x 9")):
        call = functools.partial(pysal.leave_one_out, watching.model, INPUTS, segments=segments)
        refusal(call, ValueError, f"pysal.segments.Grid: rows and cols must be at most 8 x 8 pixels, got {shown}")
    assert watching.passes == 0


@pytest.mark.parametrize("method", CALLS)
def test_unknown_options_are_pythons_own_errors(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_steps'"):
        getattr(pysal, method)(row_by_row(), INPUTS, n_steps=3)
    with pytest.raises(TypeError, match="positional argument"):
        getattr(pysal, method)(row_by_row(), INPUTS, 1, "guided")


@pytest.mark.parametrize("method", ["grad_cam", "guided_grad_cam"])
def test_layer_of_a_function(method: str) -> None:
    def model(batch: Tensor) -> Tensor:
        raise AssertionError("was run")

    refusal(
        lambda: getattr(pysal, method)(model, INPUTS, 1, layer="head"),
        TypeError,
        f"pysal.{method}: model must be an nn.Module, whose layers can be captured, got function",
    )


@pytest.mark.parametrize("method", [name for name in CALLS if name not in ("leave_one_out", "grad_cam", "guided_grad_cam")])
@pytest.mark.parametrize("how", ["no graph", "a graph to the parameters alone"])
def test_model_without_gradients(method: str, how: str) -> None:
    net = row_by_row().float()

    def model(batch: Tensor) -> Tensor:
        if how == "no graph":
            with torch.no_grad():
                return net(batch)
        return net(torch.from_numpy(batch.detach().numpy().copy()))

    refusal(
        lambda: CALLS[method](model, INPUTS, 1),
        NotDifferentiable,
        f"pysal.{method}: model must be differentiable, got a score that does not depend on the inputs through torch; "
        "leave_one_out explains such a model",
    )
    assert pysal.leave_one_out(model, INPUTS, segments=pysal.Grid(2, 2)).any()
