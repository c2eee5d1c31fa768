"""A device that has no float64, as Apple's GPUs: nothing there is of that dtype unless the images are."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import pysal
from pysal import _library
from tests import every_call
from tests.every_call import FACES, WORK
from tests.methods.calls import row_by_row
from tests.methods.networks import images

DEVICE = torch.device("meta")


class Elsewhere(Tensor):
    """A tensor that says it lies on the device; its numbers lie on the CPU."""

    held: Tensor
    device = DEVICE
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=False,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Pretended():
            return func(*args, **(kwargs or {}))


def here(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


class Pretended(TorchDispatchMode):
    """Makes tensors of the device where they are asked for, and refuses float64 there, as it does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().split(".")[0]
        if name.startswith("pysal::"):  # the device has no kernels: the oracle runs
            with self:
                return _library.REFERENCES[name.removeprefix("pysal::")](*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # below autograd these are not yet taken apart, and name a device by position
                return func.decompose(*args, **kwargs)
        asked = kwargs.get("device")
        asked = torch.device(asked) if asked is not None else None
        there = any(isinstance(one, Elsewhere) for one in torch.utils._pytree.tree_leaves((args, kwargs)))
        if asked is not None:
            there = asked.type in (DEVICE.type, "meta")
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(here, args), **tree_map(here, kwargs))
        if not there:
            return result
        written = {id(here(one)): one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Elsewhere)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in written:
                return written[id(value)]
            assert value.dtype != torch.float64, f"{func} made float64 on a device that has none"
            return Elsewhere(value)

        return tree_map(wrap, result)


def moved() -> nn.Module:
    """The network of these tests, as `.to(device)` leaves it."""
    model = row_by_row().float()
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = nn.Parameter(Elsewhere(parameter.detach().clone()))
    return model


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(values: Any, *, device: Any = None, **more: Any) -> Tensor:
            if isinstance(values, Tensor):
                return values.to(device=device or values.device, **more)
            return make(values, device="cpu", **more).to(device or "cpu")

        return made

    monkeypatch.setattr(torch, "tensor", there(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", there(torch.as_tensor))
    monkeypatch.setattr(_library, "WITHOUT_FLOAT64", [DEVICE.type])
    monkeypatch.setattr(every_call, "MAPS", Elsewhere(every_call.MAPS))
    monkeypatch.setattr(every_call, "MASK", Elsewhere(every_call.MASK))
    monkeypatch.setitem(every_call.FIGURES["mass_in_mask"], "masks", Elsewhere(every_call.IMAGES.sum(1) > 1))


CALLS = {**WORK, **FACES}


def asked(name: str, model: Any, batch: Tensor) -> Any:
    torch.manual_seed(0)  # captum's noise is drawn from torch's own generator
    return CALLS[name](model, batch)


@functools.cache
def expected_of(name: str) -> Any:
    return asked(name, row_by_row().float(), images(2, 3, 8, 8).float())


def assert_same(found: Any, expected: Any) -> None:
    """Float32 on both sides, in other kernels."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (Tensor, np.ndarray)):
        found, expected = (torch.as_tensor(here(one)).detach().double() for one in (found, expected))
        size = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1000 * torch.finfo(torch.float32).eps * size


@pytest.mark.filterwarnings("ignore:.*has no native kernel")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_is_float64_there(name: str, prepared: bool, request: pytest.FixtureRequest) -> None:
    expected = expected_of(name)
    request.getfixturevalue("without_float64")
    batch = Elsewhere(images(2, 3, 8, 8).float())
    with Pretended():
        model = moved()
        found = asked(name, pysal.prepare(model, batch[:1]) if prepared else model, batch)
    assert_same(found, expected)
