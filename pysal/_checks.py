"""The one way bad input is refused: one sentence that names the argument, the requirement and the value."""

import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pysal._spelling import close_to, did_you_mean


def refuse(where: str, argument: str, requirement: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the sentence every refusal of this package has.

    Args:
        where: the public name that was called, `pysal.gradient` or `pysal::guided_relu`.
        argument: the argument at fault.
        requirement: what it must be, starting with a verb: "be a 4-D tensor (B, C, H, W)".
        got: the offending value, as it should be shown.
        error: TypeError for a wrong type or dtype, ValueError for a wrong shape, range or device.
    """
    raise error(f"{where}: {argument} must {requirement}, got {got}")


def refuse_unknown(
    where: str, argument: str, requirement: str, name: object, known: Iterable[str], error: type[Exception] = ValueError
) -> NoReturn:
    """Refuse a name that is not known, and say which was probably meant.

    Args:
        where: the public name that was called.
        argument: the argument at fault.
        requirement: what it must be: "be one of 'black', 'white'".
        name: what was given.
        known: the names that might have been meant.
        error: ValueError, unless something else is the custom of an interface.
    """
    names = list(known)
    close = close_to(name, names)
    meant = "" if len(close) == len(names) else did_you_mean(list(map(repr, close)))  # which the requirement says already
    refuse(where, argument, requirement + meant, repr(name), error)


def check_choice(where: str, argument: str, value: object, known: Sequence[str]) -> None:
    """Refuse what is not one of a few words.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or value not in known:
        words = [*map(repr, known)]
        few = f"be {' or '.join(words)}" if len(words) == 2 else f"be one of {', '.join(words)}"
        refuse_unknown(where, argument, few, value, known)


def warn(message: str) -> None:
    """Warn whoever called the package: the line shown is the first outside it."""
    frame, level = sys._getframe(1), 2
    package = str(Path(__file__).parent) + os.sep
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_flag(where: str, argument: str, value: object) -> bool:
    """Return what is True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        refuse(where, argument, "be True or False", repr(value), TypeError)
    return value


def check_tensor(
    where: str, argument: str, value: object, *, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Return `value` if it is a tensor of the wanted rank and one of the wanted dtypes.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions.
    """
    if not isinstance(value, Tensor):
        refuse(where, argument, "be a torch.Tensor", type(value).__name__, TypeError)
    if dtypes and value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(where, argument, f"have dtype {names}", str(value.dtype).removeprefix("torch."), TypeError)
    if ndim is not None and value.ndim != ndim:
        refuse(where, argument, f"have {ndim} dimensions", f"shape {tuple(value.shape)}")
    return value


FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGER = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_indices(
    where: str, argument: str, value: object, *, ndim: int, device: torch.device, limit: int | None = None
) -> Tensor:
    """Return an integer tensor of the wanted rank as int32 on `device`.

    Values are looked at only in tensors on the CPU, where that costs no synchronisation, and not while compiling.

    Args:
        where: the public name that was called.
        argument: the argument's name.
        value: what was given.
        ndim: the wanted rank.
        device: where the op will run.
        limit: if given, every value must be in [0, limit).

    Raises:
        TypeError: not a tensor, or not of an integer dtype.
        ValueError: another rank, or a value outside [0, limit).
    """
    indices = check_tensor(where, argument, value, ndim=ndim, dtypes=INTEGER)
    if limit is not None and indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= limit:
            refuse(where, argument, f"be in [0, {limit})", low if low < 0 else high)
    return indices.to(device=device, dtype=torch.int32)


def check_dense(where: str, argument: str, value: Tensor) -> Tensor:
    """Return a tensor whose numbers lie in memory, each in its place.

    Raises:
        TypeError: a nested, sparse or quantised tensor, one of another library's layout, or one without values: on the meta
            device, or of torch's FakeTensorMode.
    """
    if value.layout is torch.strided and not (value.is_nested or value.is_quantized or value.is_meta):
        if not isinstance(value, FakeTensor):
            return value
    kinds = {"nested": value.is_nested, "quantised": value.is_quantized, "on the meta device": value.is_meta}
    kinds["of FakeTensorMode"] = isinstance(value, FakeTensor)
    layout = str(value.layout).removeprefix("torch.")
    kinds |= {f"of layout {layout}": value.layout != torch.strided}
    for kind, found in kinds.items():
        if found:
            refuse(where, argument, "be a dense tensor with values", f"one that is {kind}", TypeError)
    return value


def check_same_shape(where: str, argument: str, value: Tensor, other: str, shape: torch.Size) -> None:
    """Refuse a tensor whose shape is not that of another argument.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != shape:
        refuse(where, argument, f"have the shape of {other}, {tuple(shape)}", f"shape {tuple(value.shape)}")


def check_same_device(where: str, argument: str, value: Tensor, other: str, device: torch.device) -> None:
    """Refuse a tensor that is on another device than another argument.

    Raises:
        ValueError: the devices differ.
    """
    if value.device != device:
        refuse(where, argument, f"be on the device of {other}, {device}", value.device)


def all_finite(tensor: Tensor) -> bool:
    """Say whether every value of a tensor with values is finite."""
    # a finite sum has no other terms; another one may have overflowed
    return math.isfinite(tensor.detach().sum()) or bool(finite_rows(tensor).all())


def finite_rows(tensor: Tensor) -> Tensor:
    """Return (N,): whether every value of a row (N, ...) is finite; a row must have values."""
    # NaN and infinity show in the extremes, which are found without another tensor of this size
    inner = tuple(range(1, tensor.ndim))
    return tensor.amax(inner).isfinite() & tensor.amin(inner).isfinite()


def check_dtype(where: str, value: object, default: torch.dtype) -> torch.dtype:
    """Return the floating dtype that was asked for, or the default for None.

    Raises:
        TypeError: not a floating torch.dtype that ops can write.
    """
    if value is None:
        return default
    if not isinstance(value, torch.dtype) or value not in FLOATING:
        refuse(where, "dtype", "be float32, float64, float16 or bfloat16", value, TypeError)
    return value


# More steps or samples of one image than anybody waits for, and than arrays of them have places.
MOST = 2**31 - 1


def check_count(where: str, argument: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return a whole number of at least `least`, and at most `most` where that is given.

    Raises:
        ValueError: anything else, True and False included.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(where, argument, f"be a whole number of at least {least}", repr(value))
    if most is not None and value > most:
        refuse(where, argument, f"be at most {most}", value)
    return value


def check_number(where: str, argument: str, value: object, *, above: bool = False, unit: str = "") -> float:
    """Return a finite number of at least 0, or above 0.

    Args:
        where: the public name that was called.
        argument: the argument's name.
        value: what was given: a number of Python or NumPy.
        above: whether 0 is refused.
        unit: what the number counts, for errors: " of pixels".

    Raises:
        ValueError: anything else, True and False included.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        found = float(value)
        if 0 < found < math.inf or (found == 0 and not above):
            return found
    refuse(where, argument, f"be a finite number{unit} {'above' if above else 'of at least'} 0", repr(value))


def check_path(where: str, argument: str, value: object) -> str | os.PathLike[str]:
    """Return the name of a file or folder.

    Raises:
        TypeError: anything else: a number too, which Python's own `open` takes for a file that is open already.
    """
    if not isinstance(value, (str, os.PathLike)):
        refuse(where, argument, "be the name of a file or folder, a str or os.PathLike", type(value).__name__, TypeError)
    return value


def check_ids(where: str, argument: str, ids: object, images: int, device: torch.device) -> Tensor:
    """Return who each image is (B,) int64, which picks its draws; None = its row in this call.

    Raises:
        TypeError: not whole numbers.
        ValueError: not one for each image, or one below 0.
    """
    if ids is None:
        return torch.arange(images, device=device)
    try:
        found = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
        if found.dtype in (torch.uint16, torch.uint32, torch.uint64):
            found = torch.tensor(found.tolist(), dtype=torch.int64, device="cpu")
        found = check_dense(where, argument, found).to(device)
    except (ValueError, RuntimeError, OverflowError):
        refuse(where, argument, "be whole numbers below 2^63", " ".join(repr(ids).split()), TypeError)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        refuse(where, argument, "be whole numbers", str(found.dtype).removeprefix("torch."), TypeError)
    if tuple(found.shape) != (images,):
        refuse(where, argument, f"have one id for each of the {images} images", f"shape {tuple(found.shape)}")
    if int(found.min()) < 0:
        refuse(where, argument, "be 0 or more", int(found.min()))
    return found.long()


def check_seed(where: str, seed: object) -> int:
    """Return a seed of the counter-based draws.

    Raises:
        ValueError: no whole number of 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        refuse(where, "seed", "be a whole number in [-2^63, 2^63)", repr(seed))
    return seed


# The furthest that positions in images and maps go: in tensors of indices they are int32.
MOST_REACH = 2**31 - 1


def first_line(error: object) -> str:
    """Return what an error says, cut at the first line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_reach(where: str, sides: str, *spaced: tuple[int, int]) -> None:
    """Refuse regions that reach further than positions can say.

    Args:
        where: the function that was called.
        sides: "rows" or "columns".
        spaced: (how many, how far apart), one within the other: of lines and of a kernel's taps.

    Raises:
        ValueError: they reach 2**31 or more.
    """
    if all(type(number) is int for pair in spaced for number in pair):  # not so while torch traces a symbolic size
        if sum(max(count - 1, 0) * step for count, step in spaced) > MOST_REACH:
            shown = " and ".join(f"{count} at steps of {step}" for count, step in spaced)
            refuse(where, f"the {sides} of a region", "reach less than 2**31", shown)
