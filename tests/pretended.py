"""A device that is not there: tensors that say they lie on it, whose numbers lie on the CPU.

Everything runs for real, with torch's CPU kernels and, for a GPU, this package's CUDA kernels under emulation. So results can
be compared, an operation on tensors of two devices is refused as CUDA refuses it, and every place is seen where a GPU would
have to finish all it was given before the host goes on.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pysal import _library
from pysal.engine.model.model_state import unusual
from pysal.engine.prepared import exactness
from pysal.testing import emulation

GPU = torch.device("cuda", 0)
PACKAGE = Path(_library.__file__).parent
# What a GPU answers only once it has done all before: how many elements there are, or a number that Python asked for.
ANSWERS = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2"),
    *("aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A value of lists, tuples and dicts, as operators take and return them, with a function applied to what is in them."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, one) for one in value)
    return {name: mapped(function, one) for name, one in value.items()} if type(value) is dict else function(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in such a value."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if type(value) is dict else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in inside for tensor in tensors_in(one)]


@functools.cache
def taken_apart(func: Any) -> bool:
    """Whether an operator is made of others, on every device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


class Elsewhere(Tensor):
    """A tensor that says it lies on a device; its numbers lie on the CPU."""

    held: Tensor
    place: torch.device
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # autograd, for one, would look for the threads of a device that is not there
            requires_grad=False,
        )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.place.type == "cuda"

    def tolist(self) -> Any:
        _saw("tolist")
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy: Tensor = Elsewhere(self.held.clone(), self.place)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        found: Tensor = memo[id(self)]
        return found

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError(f"cannot pin 'torch.{self.place.type}.Tensor', only dense CPU tensors can be pinned")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = next(one.place for one in tensors_in((args, kwargs)) if isinstance(one, Elsewhere))
        with Pretended(place):
            return func(*args, **(kwargs or {}))


def here(value: Any) -> Any:
    """The tensor that holds the numbers; another value as it is."""
    return value.held if isinstance(value, Elsewhere) else value


_watching: list[Counter[str]] = []


def _saw(what: str) -> None:
    if _watching:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}" if frame else "outside"
        _watching[-1][f"{what} in {place}"] += 1


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count, by what and where in the package, how often the host waits for the device inside the block."""
    _watching.append(Counter())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


class Pretended(TorchDispatchMode):
    """Makes tensors of the device where they are asked for, refuses what mixes devices, and notes where the host waits."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().split(".")[0]
        own = name.startswith("pysal::")
        if own and self.place.type != "cuda":  # the device has no kernels: the oracle runs
            with self:
                return _library.REFERENCES[name.removeprefix("pysal::")](*args, **kwargs)
        if taken_apart(func):
            with self:  # below autograd these are not yet taken apart, and name a device by position
                return func.decompose(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if lost := [one for one in given if not isinstance(one, Elsewhere) and one.is_meta and self.place.type != "meta"]:
            # as a list of indices does; on a GPU it would be copied there in every pass
            raise AssertionError(f"{name} got a tensor {tuple(lost[0].shape)} that torch made on the device below every mode")
        there = any(isinstance(one, Elsewhere) for one in given)
        asked = kwargs.get("device")
        if asked is not None:
            asked = torch.device(asked)
            there_asked = asked.type in (self.place.type, "meta")
            if name in MOVES and there != there_asked:
                self._moved(given, to_cpu=there, at_once=not kwargs.get("non_blocking", False))
            there, kwargs["device"] = there_asked, torch.device("cpu")
        elif there and name not in MOVES:
            self._refuse_two_devices(name, args, given)
        elif name == "aten::copy_" and isinstance(args[0], Elsewhere) != isinstance(args[1], Elsewhere):
            self._moved(given[1:], to_cpu=isinstance(args[1], Elsewhere), at_once=not (len(args) > 2 and args[2]))
            there = isinstance(args[0], Elsewhere)
        if there and name in ANSWERS:
            _saw(name.removeprefix("aten::_").removeprefix("aten::"))
        if own:
            emulation()
            func = getattr(torch.ops.pysal_emu, name.removeprefix("pysal::")).default
        result = func(*mapped(here, args), **mapped(here, kwargs))
        if not there:
            return result
        written = {id(here(one)): one for one in given if isinstance(one, Elsewhere)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in written:
                return written[id(value)]
            assert value.dtype != torch.float64 or self.place.type not in _library.WITHOUT_FLOAT64, (
                f"{func} made float64 on a device that has none"
            )
            return Elsewhere(value, self.place)

        return mapped(wrap, result)

    def _moved(self, given: list[Tensor], *, to_cpu: bool, at_once: bool) -> None:
        """Note a copy between host and device. One to the device need not be waited for if the memory is pinned."""
        if not given or given[0].numel() == 0:
            return
        if to_cpu:
            _saw("copy to the host")
        elif at_once or not getattr(given[0], "pinned", False):
            _saw("copy from the host")

    def _refuse_two_devices(self, name: str, args: Any, given: list[Tensor]) -> None:
        strange = [one for one in given if not isinstance(one, Elsewhere) and one.ndim > 0]
        if name in INDEXED:
            indices = [one for one in args[1] if one is not None]
            strange = [one for one in strange if not any(one is index for index in indices)]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                _saw("index by a mask")
            elif not all(isinstance(one, Elsewhere) for one in indices):
                _saw("index from the host")
        if strange:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {self.place} and cpu! ({name})"
            )


class _Stream:
    """The one stream of a device that is not there."""

    def wait_stream(self, other: "_Stream") -> None:
        pass


class _Block(contextlib.nullcontext[None]):
    """A context for a device or a stream."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    """The numbers again, as memory that a GPU reads by itself."""
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def moved(model: nn.Module, place: torch.device = GPU) -> nn.Module:
    """The model, as `.to(device)` leaves it."""
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                held = Elsewhere(parameter.detach().clone(), place)
                module._parameters[key] = nn.Parameter(held, requires_grad=parameter.requires_grad)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = Elsewhere(buffer.clone(), place)
    return model


def made_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` or `torch.as_tensor`, which make numbers below every mode: made on the host and moved."""

    def made(values: Any, *, device: Any = None, **more: Any) -> Tensor:
        if isinstance(values, Tensor):
            return values.to(device=device or values.device, **more)
        return make(values, device="cpu", **more).to(device or "cpu")

    return made


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `torch.cuda` answer for one GPU with 80 GB, as far as this package asks it."""
    monkeypatch.setattr(torch, "tensor", made_there(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made_there(torch.as_tensor))
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    # weights are prepared as ordinary ones are, and converted to another dtype as a whole
    monkeypatch.setattr(exactness, "unusual", lambda tensor: None if isinstance(tensor, Elsewhere) else unusual(tensor))
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    has_kernel = _library.has_kernel  # those of CUDA are there, emulated
    monkeypatch.setattr(
        _library,
        "has_kernel",
        lambda name, kind, *rest: (kind == "cuda" and name in _library.SCHEMAS) or has_kernel(name, kind, *rest),
    )
    stream = _Stream()
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: _saw("synchronize"),
        "current_stream": lambda *_: stream,
        "set_stream": lambda *_: None,
        "device": _Block,
        "stream": _Block,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
