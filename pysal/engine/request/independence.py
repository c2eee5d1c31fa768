"""Finds out whether a model answers for each row of a pass as if that row were alone.

A queue of images, steps, samples and segments is cut wherever memory and speed say, so a row must not depend on the others of
its pass, nor on their number. Batch norm without running statistics, attention over the batch, sequence models with time
first, graph networks and weights quantised by the range of their input break that. Two images that differ run in one pass,
and each in a pass of its own: no coupling that runs up the batch, down it or over all of it spares both. They are no rows of
the queue, whose neighbours, two steps of a path say, may be so alike that either is the other's best company.

Error model. Passes of different sizes round differently, so what a row gets alone may differ from what it gets among others by
rounding: with u the unit roundoff of the coarsest arithmetic in the pass, by up to 128 u of the answer's size in any network
whose layers do not add up their errors, and by more in deep ones, where no bound is useful. What is further away is therefore
asked a question that rounding cannot answer: the same row, at the same place of a pass of the same size, in other company.
Kernels then do the same to it, and what changes is the company's doing. Where nothing changes, only the number of rows is
left, or rounding: that is told by how much a change of the row in its last digit changes the answer.
"""

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pysal._checks import first_line
from pysal._library import widened
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.running.states import DispatchMode, is_own_hook

# What a plan's passes hold. "checked": any rows, once it is known that they do not depend on each other; a pass of exactly the
# caller's images needs no check, since it is what the caller would have run. "whole": the caller's images, all of them, in
# order. "apart": any rows, and no image may depend on which others were handed over with it. "given": whoever made the plan
# sees to it.
Company: TypeAlias = Literal["checked", "whole", "apart", "given"]

ROUNDING = 128
# How often a pass that drew random numbers is run: a choice among few may fall the same way twice.
REPEATS = 4
# Calls of at least this many rows are checked whatever is remembered of the model: four rows more are next to nothing.
MANY_ROWS = 100

_TF32_ROUNDOFF = 2.0**-11

# What most attributes of modules are: plain values, and containers without anything in them.
_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})

_remembered: "weakref.WeakKeyDictionary[Any, set[int]]" = weakref.WeakKeyDictionary()


# Runs a pass of its own that holds the two inputs at some places, 0 and 1, in order, and returns the model's answers
# (places, ...). The second argument is the share by which their values are changed, see `nudged`.
Ask: TypeAlias = Callable[[Sequence[int], float], Tensor]


class Coupled(Exception):
    """What is wrong with a model, in words."""


def unlike(images: Tensor) -> Tensor:
    """Return two images (2, ...) that differ: the first and the last or, where these are alike, one made of the first."""
    first, last = images[:1], images[-1:]
    if float((first - last).abs().mean()) > 0.05 * float((first.abs() + last.abs()).mean()):
        return torch.cat([first, last])
    other = first.flip(-1) / 2
    return torch.cat([first, torch.full_like(first, 0.5) if torch.equal(other, first) else other])


def nudged(values: Tensor, share: float) -> Tensor:
    """Return floating values, each changed in its last digit or by a share, with signs that are the same every time."""
    if not share or not values.is_floating_point():
        return values
    signs = 1 - 2 * (torch.arange(values.numel(), device=values.device) % 2).view(values.shape).to(values.dtype)
    return values * (1 + max(share, torch.finfo(values.dtype).eps) * signs)


def check(ask: Ask, number: int, roundoff_of: Callable[[torch.dtype], float]) -> None:
    """Return if two inputs that differ get the same answers in one pass as in a pass each.

    Args:
        ask: runs a pass of one or both, or of one twice.
        number: of rows in a pass that the model is known to take: 1, or 2 or more.
        roundoff_of: unit roundoff of the arithmetic that was asked for, with answers of a dtype.

    Raises:
        Coupled: they do not.
        Exception: the model's own, which did not come again.
    """
    try:
        together = ask((0, 1), 0.0)
    except Coupled:  # which whoever asks found out
        raise
    except Exception as error:  # the model's own, of any kind
        if is_out_of_memory(error):
            return  # two rows are more than fit: each is alone in any case
        _raise_if_gone(ask, (0, 1), error)
        if number == 1:
            return  # or more than it takes
        raise Coupled(f"an error for 2 rows ({error_in_words(error)})") from error
    roundoff, size = roundoff_of(together.dtype), size_of(together)
    for place in (0, 1):
        among = together[place : place + 1]
        try:
            alone = ask((place,), 0.0)
        except Coupled:
            raise
        except Exception as error:  # the model's own, of any kind
            if is_out_of_memory(error):
                raise
            _raise_if_gone(ask, (place,), error)
            raise Coupled(f"an error for a row alone ({error_in_words(error)})") from error
        if away(alone, among) > min(ROUNDING * roundoff, math.sqrt(roundoff)) * size:
            _look_closer(ask, place, alone, among, roundoff, size)


def _raise_if_gone(ask: Ask, places: Sequence[int], error: Exception) -> None:
    """Raise the model's own error if the same pass works now: the number of rows was not the reason."""
    try:
        ask(places, 0.0)
    except Exception:  # the model's own, of any kind
        return
    error.add_note("(pysal ran the same pass again, and there it did not happen)")
    raise error


def check_chance(ask: Callable[[], Tensor], roundoff_of: Callable[[torch.dtype], float], *, repeats: int) -> None:
    """Return if the same pass gives the same answers each of some times.

    Raises:
        Random: they do not.
    """
    with _Arithmetic() as arithmetic:
        first = ask()
    size, roundoff = size_of(first), max(roundoff_of(first.dtype), arithmetic.roundoff)
    for _ in range(1, repeats):
        again = ask()
        if away(first, again) > min(ROUNDING * roundoff, math.sqrt(roundoff)) * size:
            raise Random(f"answers that differ by {_share(first, again, size)} of their size")


def _look_closer(ask: Ask, place: int, alone: Tensor, among: Tensor, roundoff: float, size: float) -> None:
    """Tell rounding from what it is not."""
    with _Arithmetic() as arithmetic:
        again = ask((place,), 0.0)
    roundoff = max(roundoff, arithmetic.roundoff)
    allowed = min(ROUNDING * roundoff, math.sqrt(roundoff)) * size
    if alone.shape != among.shape:
        raise Coupled(f"{_shape(among)} numbers for one of two rows and {_shape(alone)} for the same row alone")
    if away(again, alone) > allowed:
        raise Random(f"answers that differ by {_share(again, alone, size)} of their size")
    last_digit = away(ask((place,), roundoff), again)
    unit = max(roundoff * size, last_digit)
    repeated = ask((place, place), 0.0)[place : place + 1]
    if away(repeated, among) > max(allowed, ROUNDING * last_digit):
        raise Coupled(f"an answer that other rows change by {_share(repeated, among, size)} of its size")
    if away(alone, among) > max(allowed, unit / math.sqrt(roundoff)):
        raise Coupled(f"an answer that the number of rows changes by {_share(alone, among, size)} of its size")


class Random(Coupled):
    """The model's answers differ from call to call."""


def error_in_words(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def size_of(answers: Tensor) -> float:
    """Return the largest magnitude of answers that is finite, 0 where there are none."""
    finite = answers.detach().abs().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.max()) if finite.numel() else 0.0


def away(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinity for another shape, or where one of the two is NaN or infinite."""
    if one.shape != other.shape:
        return math.inf
    difference = (widened(one) - widened(other)).abs()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = difference.masked_fill(same, 0.0).nan_to_num(math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def _share(one: Tensor, other: Tensor, size: float) -> str:
    distance = away(one, other)
    return f"{distance / size:.1e}" if size and math.isfinite(distance) else "more than all"


def _shape(answers: Tensor) -> int:
    return answers[0].numel() if len(answers) else 0


class _Arithmetic(DispatchMode):
    """Notes the coarsest floating-point numbers that a pass makes: a model may have an autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.roundoff = 0.0

    def see(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.roundoff = max(self.roundoff, torch.finfo(leaf.dtype).eps / 2)


def roundoff_of(precision: str, dtype: torch.dtype, device: torch.device) -> float:
    """Return the unit roundoff of the arithmetic that a plan asks for, with answers of this dtype."""
    found = torch.finfo(dtype).eps / 2
    if precision == "bf16":
        return max(found, torch.finfo(torch.bfloat16).eps / 2)
    if precision in ("tf32", "mixed", "as set") and device.type == "cuda":
        return max(found, _TF32_ROUNDOFF)
    return found


def remember(model: object, circumstances: object) -> None:
    """Keep in mind, as long as the model lives and stays as it is, that its rows were found independent."""
    state = state_of(model, circumstances)
    if state is not None:
        _remembered.setdefault(model, set()).add(state)


def is_remembered(model: object, circumstances: object) -> bool:
    """Whether the rows of this model, as it is now, were found independent in these circumstances."""
    known = _remembered.get(model) if isinstance(model, (nn.Module, PreparedModel)) else None
    return known is not None and state_of(model, circumstances) in known


def state_of(model: object, circumstances: object) -> int | None:
    """Return what a model looks like: its parts, their attributes, how often its tensors were written. None: nobody can say."""
    outside = model.original if isinstance(model, PreparedModel) else model
    if not isinstance(outside, nn.Module):
        return None
    marks: list[object] = [circumstances]
    pending, seen = [outside], {outside}
    for module in pending:
        if isinstance(module, torch.jit.ScriptModule):
            return None
        marks.append(type(module))
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in _PLAIN or (kind in _CONTAINERS and not value):
                marks += (name, value or kind)
            elif isinstance(value, (bool, int, float, str, type(None))):
                marks.append((name, value))
            elif isinstance(value, Tensor) or name in ("_parameters", "_buffers"):
                tensors = [value] if isinstance(value, Tensor) else [one for one in value.values() if one is not None]
                marks.extend((id(one), 0 if one.is_inference() else one._version) for one in tensors)
            elif isinstance(value, (dict, list, set)):
                held = [one for one in (value.values() if isinstance(value, dict) else value) if not is_own_hook(one)]
                marks += (name, (len(held), *map(id, held)) if held else kind)
            else:
                marks.append((name, id(value)))
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)
    return hash(tuple(marks))
