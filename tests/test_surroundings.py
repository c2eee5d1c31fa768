"""What is found depends on what is given, not on torch's settings around the call: autocast, default device, default dtype."""

import ast
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import ops
from pysal._library import REFERENCES, define_derivative
from pysal.metrics.curves import rise_blur
from tests.every_call import FACES, IMAGES, MODEL, WORK
from tests.methods.calls import CALLS

CALLS_OF_ALL_KINDS = {**WORK, **FACES}


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def numbers(found: Any) -> Iterator[tuple[str, Any]]:
    """Yield what can be compared of whatever a call returned, with dtype and device."""
    if isinstance(found, Tensor):
        yield f"{found.dtype} {found.device}", found.detach().double().numpy()
    elif isinstance(found, np.ndarray):
        yield str(found.dtype), found
    elif isinstance(found, (float, int)):
        yield type(found).__name__, np.array(found)
    elif isinstance(found, dict):
        for value in found.values():
            yield from numbers(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from numbers(value)
    elif is_dataclass(found):
        for field in fields(found):
            if field.name not in ("seconds", "build"):
                yield from numbers(getattr(found, field.name))


def same(first: Any, second: Any) -> bool:
    pairs = list(zip(numbers(first), numbers(second), strict=True))
    assert pairs
    return all(kind == other and np.array_equal(a, b, equal_nan=True) for (kind, a), (other, b) in pairs)


@pytest.mark.parametrize("name", CALLS_OF_ALL_KINDS)
def test_settings_around_a_call_change_nothing(name: str) -> None:
    def call() -> Any:
        torch.manual_seed(0)  # of noise whose seed captum's users set so
        return CALLS_OF_ALL_KINDS[name](MODEL, IMAGES.clone())

    expected = call()
    for around, enter in AROUND.items():
        if around in ("inference mode", "no gradients") and name not in WORK:
            continue  # the peers' own classes run as their caller says
        if around == "default dtype" and name.startswith("Occlusion"):
            continue  # captum's result has the default dtype where that is wider, and so has its face's
        with enter():
            found = call()
        assert same(found, expected), around


@pytest.mark.parametrize("name", CALLS)
def test_a_callable_target_is_a_part_of_the_pass(name: str) -> None:
    """It runs in the arithmetic of the model, in every method alike: here a product that autocast would round."""
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def target(output: Tensor) -> Tensor:
        return (output @ weights)[:, 0]

    expected = CALLS[name](MODEL, IMAGES, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[name](MODEL, IMAGES, target), expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_model_prepared_inside_autocast_is_the_same_model(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = pysal.prepare(MODEL, IMAGES)
    assert torch.equal(CALLS[name](inside, IMAGES, 1), CALLS[name](pysal.prepare(MODEL, IMAGES), IMAGES, 1))


def test_oracles_and_derivatives_of_ops_know_no_autocast() -> None:
    """Products in an op's oracle, which runs where there is no kernel, and in what autograd calls."""
    seen = []
    library = torch.library.Library("pysal", "FRAGMENT")
    library.define("doubled_in_a_test(Tensor input) -> Tensor")
    library.impl("doubled_in_a_test", lambda input: 2 * input, "CompositeExplicitAutograd")
    define_derivative(
        "doubled_in_a_test",
        lambda _ctx, grad: seen.append(torch.is_autocast_enabled("cpu")) or 2 * grad,
        lambda ctx, inputs, output: None,
    )
    leaf = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.ops.pysal.doubled_in_a_test(leaf).sum().backward()
    assert seen == [False]
    oracle = REFERENCES["gaussian_scale_space"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = oracle(IMAGES, [2.0, 2.0], 1)  # on its own it follows its caller
        blurred = ops.gaussian_scale_space(IMAGES, [2.0, 2.0], boundary="reflect")
        wide = rise_blur(IMAGES)
    assert not torch.equal(rounded, oracle(IMAGES, [2.0, 2.0], 1))
    assert torch.equal(blurred, ops.gaussian_scale_space(IMAGES, [2.0, 2.0], boundary="reflect"))
    assert torch.equal(wide, rise_blur(IMAGES))


def test_one_channel_and_all_channels_are_left_out_in_the_same_arithmetic() -> None:
    """FeatureAblation and Occlusion have two ways to run; both are as near to float64 inside autocast as outside."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()
    double = pysal.captum.Occlusion(lambda x: nn.Sequential(*model).double()(x))
    for window in ((3, 4, 4), (1, 4, 4)):
        expected = double.attribute(IMAGES.double(), window, window, target=1)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = pysal.captum.Occlusion(model).attribute(IMAGES, window, window, target=1)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


MAKERS = frozenset("zeros ones empty full rand randn randint randperm arange linspace eye tensor as_tensor Generator".split())
FLOATING = frozenset("zeros ones empty rand randn linspace eye".split())
# What makes a module of the caller's, on the caller's device and in the caller's dtype, as torch.nn does.
OF_THE_CALLER = {"pysal/models/classifier.py", "pysal/models/spec.py"}


def test_what_makes_a_tensor_says_where_and_of_which_dtype() -> None:
    """Else torch.set_default_device and torch.set_default_dtype decide."""
    root = Path(pysal.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        if (name := f"pysal/{path.relative_to(root).as_posix()}") in OF_THE_CALLER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch" or node.func.attr not in MAKERS:
                continue
            given = {keyword.arg for keyword in node.keywords}
            if "device" not in given or (node.func.attr in FLOATING and "dtype" not in given):
                found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert found == []
