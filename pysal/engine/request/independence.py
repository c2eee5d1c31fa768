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
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pysal._checks import first_line
from pysal._library import widened
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.running.states import DispatchMode

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

_remembered: "weakref.WeakKeyDictionary[Any, set[int]]" = weakref.WeakKeyDictionary()


Ask: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Coupled(Exception):
    """What is wrong with a model, in words."""


def unlike(images: Tensor) -> Tensor:
    """Return two images (2, C, H, W) that differ: the first and the last or, where these are alike, one made of the first."""
    first, last = images[:1], images[-1:]
    if float((first - last).abs().mean()) > 0.05 * float((first.abs() + last.abs()).mean()):
        return torch.cat([first, last])
    other = first.flip(3) / 2
    return torch.cat([first, torch.full_like(first, 0.5) if torch.equal(other, first) else other])


def check(ask: Ask, pair: Tensor, rows: Tensor, number: int, roundoff_of: Callable[[torch.dtype], float]) -> None:
    """Return if two images get the same answers in one pass as in a pass each.

    Args:
        ask: images (N, C, H, W) and their rows (N,) -> the model's answers (N, ...), from a pass of their own.
        pair: (2, C, H, W).
        rows: (2,).
        number: of rows in a pass that the model is known to take: 1, or 2 or more.
        roundoff_of: unit roundoff of the arithmetic that was asked for, with answers of a dtype.

    Raises:
        Coupled: they do not.
        Exception: the model's own, which did not come again.
    """
    try:
        together = ask(pair, rows)
    except Exception as error:  # the model's own, of any kind
        if is_out_of_memory(error):
            return  # two rows are more than fit: each is alone in any case
        _raise_if_gone(ask, pair, rows, error)
        if number == 1:
            return  # or more than it takes
        raise Coupled(f"an error for 2 rows ({error_in_words(error)})") from error
    roundoff, size = roundoff_of(together.dtype), size_of(together)
    for place in (0, 1):
        one, row, among = pair[place : place + 1], rows[place : place + 1], together[place : place + 1]
        try:
            alone = ask(one, row)
        except Exception as error:  # the model's own, of any kind
            if is_out_of_memory(error):
                raise
            _raise_if_gone(ask, one, row, error)
            raise Coupled(f"an error for a row alone ({error_in_words(error)})") from error
        if away(alone, among) > min(ROUNDING * roundoff, math.sqrt(roundoff)) * size:
            _look_closer(ask, one, row, place, alone, among, roundoff, size)


def _raise_if_gone(ask: Ask, images: Tensor, rows: Tensor, error: Exception) -> None:
    """Raise the model's own error if the same pass works now: the number of rows was not the reason."""
    try:
        ask(images, rows)
    except Exception:  # the model's own, of any kind
        return
    error.add_note("(pysal ran the same pass again, and there it did not happen)")
    raise error


def check_chance(ask: Ask, images: Tensor, rows: Tensor, roundoff_of: Callable[[torch.dtype], float], *, repeats: int) -> None:
    """Return if images get the same answers each of some times.

    Raises:
        Random: they do not.
    """
    with _Arithmetic() as arithmetic:
        first = ask(images, rows)
    size, roundoff = size_of(first), max(roundoff_of(first.dtype), arithmetic.roundoff)
    for _ in range(1, repeats):
        again = ask(images, rows)
        if away(first, again) > min(ROUNDING * roundoff, math.sqrt(roundoff)) * size:
            raise Random(f"answers that differ by {_share(first, again, size)} of their size")


def _look_closer(
    ask: Ask, one: Tensor, row: Tensor, place: int, alone: Tensor, among: Tensor, roundoff: float, size: float
) -> None:
    """Tell rounding from what it is not."""
    with _Arithmetic() as arithmetic:
        again = ask(one, row)
    roundoff = max(roundoff, arithmetic.roundoff)
    allowed = min(ROUNDING * roundoff, math.sqrt(roundoff)) * size
    if alone.shape != among.shape:
        raise Coupled(f"{_shape(among)} numbers for one of two rows and {_shape(alone)} for the same row alone")
    if away(again, alone) > allowed:
        raise Random(f"answers that differ by {_share(again, alone, size)} of their size")
    # a signed last digit, the same in every run
    signs = 1 - 2 * (torch.arange(one.numel(), device=one.device) % 2).view_as(one).to(one.dtype)
    step = max(roundoff, torch.finfo(one.dtype).eps)
    last_digit = away(ask(one * (1 + step * signs), row), again)
    unit = max(roundoff * size, last_digit)
    repeated = ask(torch.cat([one, one]), torch.cat([row, row]))[place : place + 1]
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
    state = _state(model, circumstances)
    if state is not None:
        _remembered.setdefault(model, set()).add(state)


def is_remembered(model: object, circumstances: object) -> bool:
    """Whether the rows of this model, as it is now, were found independent in these circumstances."""
    known = _remembered.get(model) if isinstance(model, (nn.Module, PreparedModel)) else None
    return known is not None and _state(model, circumstances) in known


def _state(model: object, circumstances: object) -> int | None:
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
            if isinstance(value, (bool, int, float, str, type(None))):
                marks.append((name, value))
            elif isinstance(value, Tensor) or name in ("_parameters", "_buffers"):
                tensors = [value] if isinstance(value, Tensor) else [one for one in value.values() if one is not None]
                marks.extend((id(one), 0 if one.is_inference() else one._version) for one in tensors)
            elif isinstance(value, (dict, list, set)):
                marks.append((name, len(value), *(map(id, value.values() if isinstance(value, dict) else value))))
            else:
                marks.append((name, id(value)))
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)
    return hash(tuple(marks))
