"""A device that has no float64, as Apple's GPUs: nothing there is of that dtype unless the images are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pysal import _library
from tests import every_call
from tests.every_call import WORK
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


# Kernels of blurs are made on the CPU in float64, which the pretence mistakes for the device's.
BLURRED = ("blur_integrated_gradients", "blur_integrated_gradients to a tolerance", "leave_one_out of superpixels", "explain")


@pytest.mark.filterwarnings("ignore:.*has no native kernel")
@pytest.mark.parametrize("name", [name for name in WORK if name not in BLURRED])
def test_nothing_is_float64_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor

    def made(values: Any, *, device: Any = None, **more: Any) -> Tensor:
        return tensor(values, device="cpu", **more).to(device or "cpu")

    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(_library, "WITHOUT_FLOAT64", [DEVICE.type])
    model, batch = row_by_row().float(), images(2, 3, 8, 8).float()
    expected = WORK[name](model, batch)
    monkeypatch.setattr(every_call, "MAPS", Elsewhere(every_call.MAPS))
    monkeypatch.setitem(every_call.FIGURES["mass_in_mask"], "masks", Elsewhere(every_call.IMAGES.sum(1) > 1))
    with Pretended():
        moved = row_by_row().float()
        for module in moved.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = torch.nn.Parameter(Elsewhere(parameter.detach().clone()))
        found = WORK[name](moved, Elsewhere(batch))
    if isinstance(expected, Tensor):  # float32 on both sides, in other kernels
        size = float(expected.abs().max())
        assert float((found.cpu() - expected).abs().max()) <= 1000 * torch.finfo(torch.float32).eps * size
