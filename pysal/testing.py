"""Internal: what the tests of ops share: the tolerance rule, the backends under test, samples, dtypes and layouts."""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pysal.ops  # noqa: F401  importing the cards defines the ops
from pysal import _library

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EMULATION = _library.HERE / "_C_emu.so"


def assert_no_worse(kernel: Tensor, reference64: Tensor, baseline: Tensor) -> None:
    """Assert that a kernel is at most twice as far from the truth as plain torch in the same dtype, plus rounding.

    With r the truth, b the baseline and k the kernel: max|k - r| <= 2 max|b - r| + 4 eps max|r|, eps that of k's dtype.
    Where r is not finite, k must hold the same value.

    Args:
        kernel: what is tested, any floating dtype and device.
        reference64: the oracle's float64 result for the same inputs.
        baseline: the oracle's result in the kernel's dtype.

    Raises:
        AssertionError: shapes or dtypes differ, or the bound is exceeded.
    """
    assert reference64.dtype == torch.float64, f"reference64 must be float64, got {reference64.dtype}"
    assert kernel.dtype == baseline.dtype, f"kernel is {kernel.dtype}, baseline {baseline.dtype}"
    assert kernel.shape == reference64.shape == baseline.shape, (
        f"shapes differ: {tuple(kernel.shape)}, {tuple(reference64.shape)}, {tuple(baseline.shape)}"
    )
    k, r, b = (values.detach().cpu().double() for values in (kernel, reference64, baseline))
    finite = r.isfinite()
    torch.testing.assert_close(k[~finite], r[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    k, r, b = k[finite], r[finite], b[finite]
    error = (k - r).abs().max().item()
    baseline_error = (b - r).abs().max().item()
    limit = 2 * baseline_error + 4 * torch.finfo(kernel.dtype).eps * r.abs().max().item()
    assert error <= limit, f"off by {error:.3g}, more than {limit:.3g}; plain {kernel.dtype} is off by {baseline_error:.3g}"


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops, and where its tensors live."""

    name: str
    device: str

    def op(self, name: str) -> Callable[..., Any]:
        """Return the op on this backend; fail where what would run is not this backend's own kernel."""
        if self.name == "reference":
            return _library.REFERENCES[name]
        require_native(name, self.name)
        namespace = torch.ops.pysal_emu if self.name == "emulated" else torch.ops.pysal
        return getattr(namespace, name)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return self.name


def required() -> frozenset[str]:
    """Return the backends that PYSAL_REQUIRE names.

    Raises:
        ValueError: PYSAL_REQUIRE names no known backend.
    """
    names = frozenset(filter(None, os.environ.get("PYSAL_REQUIRE", "").split(",")))
    if unknown := names - {"cpu", "emulated", "cuda"}:
        raise ValueError(f"PYSAL_REQUIRE must name cpu, emulated or cuda, got {', '.join(sorted(unknown))}")
    return names


def backends(native_only: bool = False) -> list[Backend]:
    """Return the backends an op's tests run on: those that are built here and those that PYSAL_REQUIRE names.

    A backend that is built but lacks an op's kernel is in the list, and `Backend.op` fails for it.

    Args:
        native_only: leave out the reference; for tests that compare with it.
    """
    found = [Backend("reference", "cpu")]
    if _library.build_info()["compiled"] or "cpu" in required():
        found.append(Backend("cpu", "cpu"))
    if EMULATION.exists() or "emulated" in required():
        found.append(Backend("emulated", "cpu"))
    if torch.cuda.is_available() or "cuda" in required():
        found.append(Backend("cuda", "cuda"))
    return found[1:] if native_only else found


def require_native(op: str, backend: str = "cpu") -> None:
    """Fail unless the op's kernel on that backend is a native one.

    Args:
        op: an op's name without its namespace.
        backend: "cpu", "emulated" or "cuda".

    Raises:
        AssertionError: the oracle would run, unless the package is uncompiled and PYSAL_REQUIRE does not ask for it.
    """
    if backend == "emulated":
        emulation()
    elif not _library.build_info()["compiled"] and backend not in required():
        return
    namespace, device = ("pysal_emu", "cpu") if backend == "emulated" else ("pysal", backend)
    assert _library.has_kernel(op, device, namespace), f"{namespace}::{op} has no native {device} kernel"


@functools.cache
def emulation() -> ctypes.CDLL:
    """Load the emulated CUDA kernels, which register as `pysal_emu::<op>` for CPU tensors, and return their library."""
    library = torch.library.Library("pysal_emu", "DEF")
    for name, schema in _library.SCHEMAS.items():
        library.define(name + schema)
    torch.ops.load_library(os.fspath(EMULATION))
    _keep_alive.append(library)
    return ctypes.CDLL(os.fspath(EMULATION))


_keep_alive: list[torch.library.Library] = []


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return uniform random numbers, the same ones in every dtype up to its rounding.

    Args:
        *shape: the tensor's shape.
        dtype: of the result.
        seed: two samples of one test want two seeds.
        low: lower end of the range.
        high: upper end of the range.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")).to(dtype)


def with_last_row(row: Tensor, device: str = "cpu") -> Tensor:
    """Return rows of zeros and, after more than 2^31 elements, `row`: what 32-bit offsets do not reach.

    On a CPU the zeros take no memory before they are read.

    Args:
        row: (...), the last of the rows.
        device: where they lie; a GPU must have the memory.

    Returns:
        (B, ...) in row's dtype.
    """
    shape = (2**31 // row.numel() + 2, *row.shape)
    if device == "cpu":
        rows = torch.from_numpy(np.zeros(shape, np.uint16 if row.element_size() == 2 else np.uint32)).view(row.dtype)
    else:
        rows = torch.zeros(shape, dtype=row.dtype, device=device)
    rows[-1] = row
    return rows


def layouts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the same values in other memory layouts: name and tensor, each equal to `values`.

    Contiguous; with a storage offset of one element, so unaligned; transposed; with gaps between elements; and, if 4-D,
    channels_last.
    """
    yield "contiguous", values.contiguous()
    flat = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    yield "offset", flat[1:].view(values.shape).copy_(values)
    if values.ndim >= 2:
        yield "transposed", values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if values.ndim >= 1:
        spread = torch.empty(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype, device=values.device)
        yield "strided", spread[..., ::2].copy_(values)
    if values.ndim == 4:
        yield "channels_last", values.contiguous(memory_format=torch.channels_last)


def assert_same_layout(actual: Tensor, expected: Tensor) -> None:
    """Assert equal shape, dtype, device and, where a dimension has more than one element, strides."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.device == expected.device, f"device {actual.device}, expected {expected.device}"
    if actual.numel():
        strides = [(a, e) for size, a, e in zip(actual.shape, actual.stride(), expected.stride(), strict=True) if size > 1]
        assert all(a == e for a, e in strides), f"strides {actual.stride()}, expected {expected.stride()}"
