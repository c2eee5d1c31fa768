"""Loads the native libraries, registers ops and says what was built.

An op is declared once, in `pysal/ops/<stem>.py`, by `define(name, schema, reference)`. The reference becomes the op's
default kernel, so every op works on every device; `_C_cpu.so` and `_C_cuda.so` add native kernels beside it. They know
nothing of Python; `pysal._C`, which does, answers what they were built with.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pysal import _gpus
from pysal._names import PACKAGE

DISTRIBUTION = "pysal-saliency"
NAMESPACE = "pysal"
HERE = Path(__file__).resolve().parent
CPU_OPS = "_C_cpu.so"

# name -> schema, in order of definition; what build_info() reports and tests/test_registration.py walks over
SCHEMAS: dict[str, str] = {}
REFERENCES: dict[str, Callable[..., Any]] = {}

# a fragment, as a whole library could not be made again by an import that was interrupted after it
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_compiled = False
_native: ModuleType | None = None
_cuda_status = "not compiled"
_fell_back: dict[str, set[str]] = {}


def version() -> str:
    """Return the version of the installed distribution; in a bare checkout, that of pyproject.toml."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
        return str(project["version"])


def define(name: str, schema: str, reference: Callable[..., Any]) -> None:
    """Register the op `pysal::<name>` with its oracle as the default kernel.

    Args:
        name: the op's name, `guided_relu_backward`.
        schema: its signature, `(Tensor input, float upper, int rule) -> (Tensor output, Tensor gates)`.
        reference: the pure-torch function that runs on every device without a native kernel.
    """

    @functools.wraps(reference)
    def default_kernel(*args: Any, **kwargs: Any) -> Any:
        _warn_fallback(name, args)
        with without_autocast(_device_type(args)):
            return reference(*args, **kwargs)

    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, default_kernel, "CompositeExplicitAutograd")
    SCHEMAS[name] = schema
    REFERENCES[name] = reference


def define_derivative(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register what autograd does for the op `pysal::<name>`.

    Args:
        name: the op's name.
        backward: (ctx, *gradients of the outputs) -> the gradients of the inputs, None where there is none.
        setup_context: (ctx, inputs, output) -> None, keeps in `ctx` what `backward` needs.
    """

    @functools.wraps(backward)
    def in_own_dtype(ctx: Any, *gradients: Any) -> Any:
        with without_autocast(_device_type(gradients)):
            return backward(ctx, *gradients)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", in_own_dtype, setup_context=setup_context)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context that runs in the dtypes that are written there, also inside the caller's `torch.autocast`."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


# Types of devices that have no float64: Apple's GPUs.
WITHOUT_FLOAT64 = ["mps"]


def widest(device: torch.device) -> torch.dtype:
    """Return the dtype of sums, weights and figures on a device: float64, or float32 where it has none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the widest dtype of its device."""
    return tensor.to(widest(tensor.device))


def has_kernel(name: str, device_type: str, namespace: str = NAMESPACE) -> bool:
    """Return whether a native kernel, not the oracle, runs the op on that type of device.

    Args:
        name: an op's name without its namespace.
        device_type: "cpu" or "cuda".
        namespace: "pysal", or "pysal_emu" for the emulated CUDA kernels.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", device_type.upper()))


def build_info() -> dict[str, Any]:
    """Return what was compiled and what runs.

    Returns:
        A dict with `version`, `torch` (running), `compiled` (whether `_C_cpu.so` is there), `cuda` (state of the CUDA
        library), `kernels` (op -> device type -> "native" or "reference"), `fell_back` (op -> device types on which the
        reference ran although native libraries are present) and, where pysal._C is compiled for this Python, `simd`
        (instruction set in use), `simd_compiled`, `matrix_unit` (whether convolutions can run on that of x86), `compiler`,
        `build_type`, `sanitizer`, `version_built`, `torch_built_with`, `torch_target`, `cuda_archs`, `cuda_version`.
    """
    info: dict[str, Any] = {
        "version": version(),
        "torch": torch.__version__,
        "compiled": _compiled,
        "cuda": _cuda_status,
        "kernels": {
            name: {device: "native" if has_kernel(name, device) else "reference" for device in ("cpu", "cuda")}
            for name in SCHEMAS
        },
        "fell_back": {name: sorted(devices) for name, devices in _fell_back.items()},
    }
    if _native is not None:
        info |= _native.build_info()
    return info


def load_cuda(force: bool = False) -> str:
    """Load `_C_cuda.so` where this torch has CUDA and the GPUs run what is in it; return what happened, never raise.

    A kernel that is registered hides the reference, so one that cannot run is not registered.

    Args:
        force: load it into a torch without CUDA too, where its kernels register but cannot run. For tests.
    """
    global _cuda_status
    path = HERE / "_C_cuda.so"
    if _cuda_status == "loaded":
        return _cuda_status
    if not path.exists():
        _cuda_status = "not compiled"
    elif torch.version.cuda is None and not force:
        _cuda_status = "compiled, not loaded: this torch has no CUDA"
    elif not force and (reason := _refused_by_gpus()) is not None:
        _cuda_status = f"compiled, not loaded: {reason}"
    else:
        try:
            torch.ops.load_library(os.fspath(path))
            _cuda_status = "loaded"
        except OSError as error:
            _cuda_status = f"failed to load: {error}"
    return _cuda_status


def _load_ops() -> bool:
    """Load `_C_cpu.so`, whose static initialisers register the CPU kernels; return whether it is there.

    Raises:
        ImportError: it is there, and this torch or this system cannot load it, or PYSAL_SIMD names no instruction set.
    """
    path = HERE / CPU_OPS
    if not path.exists():
        return False
    level = os.environ.get("PYSAL_SIMD")
    if level and level not in ("baseline", "avx2", "avx512"):  # in a kernel it would be an error in torch's words
        raise ImportError(f"pysal: PYSAL_SIMD must be baseline, avx2 or avx512, got {level}")
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        raise ImportError(f"pysal: {path} must load beside torch {torch.__version__}, got: {error}") from error
    return True


def _refused_by_gpus() -> str | None:
    """Return why the CUDA kernels do not run on the GPUs there are; None where they do, or where there is no GPU."""
    found = None if _native is None else _gpus.machine()
    if found is None or _native is None:
        return None
    built = _native.build_info()
    return _gpus.refused(found, built["cuda_archs"], built["cuda_version"])


def _warn_without_cuda_kernels() -> None:
    """Say, where there is a GPU, that its kernels are not there."""
    if _cuda_status == "loaded" or _gpus.machine() is None:
        return
    remedy = f": {_gpus.how_to_compile()}, then install pysal again" if _cuda_status == "not compiled" else ""
    warnings.warn(
        f"pysal: this machine has a GPU, and the CUDA kernels are {_cuda_status}, so every op on it runs its slower PyTorch "
        f"reference{remedy}",
        stacklevel=2,
    )


def _load_native() -> ModuleType | None:
    """Return `pysal._C`, or None where it is not compiled for this version of Python."""
    module = f"{PACKAGE}._C"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def _why_not_compiled() -> str:
    """Return what runs, why it is slow, and the command that ends it."""
    slow = f"pysal is not compiled in {HERE}, so every op runs its slower PyTorch reference"
    root = HERE.parent
    sources = (root / "setup.py").exists()
    build = f"pip install --no-build-isolation --editable {root if sources else 'FOLDER_OF_THE_SOURCES'}"
    for hidden in (Path(folder) / name for folder in sys.path for name in ("pysal", "pysal_saliency")):
        if (hidden / CPU_OPS).exists() and hidden.resolve() != HERE:
            leave = f"run Python from another folder than {root}"
            return f"{slow}. It hides the compiled one in {hidden}: {leave}, or compile this one as well with {build}"
    return f"{slow}: compile it with {build}" if sources else f"{slow}: compile its sources with {build}"


def _device_type(args: tuple[Any, ...]) -> str:
    return next((arg.device.type for arg in args if isinstance(arg, torch.Tensor)), "cpu")


def _warn_fallback(name: str, args: tuple[Any, ...]) -> None:
    """Warn once per op and device type that the oracle runs although native libraries are there."""
    if not _compiled:
        return
    device = _device_type(args)
    if device == "meta" or device in _fell_back.get(name, ()):
        return
    _fell_back.setdefault(name, set()).add(device)
    if device == "cuda" and _gpus.machine() is not None and _cuda_status != "loaded":
        return  # which was said on import
    warnings.warn(
        f"pysal::{name} has no native kernel for {device} tensors, so its slow reference runs: see pysal.build_info()",
        stacklevel=3,
    )


if _compiled := _load_ops():
    _native = _load_native()
    load_cuda()
    _warn_without_cuda_kernels()
else:
    warnings.warn(_why_not_compiled(), stacklevel=2)
