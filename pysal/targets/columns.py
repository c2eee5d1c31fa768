"""Targets that are columns of a table: a class against its like, one label of many, a number."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from pysal._checks import check_choice, check_count, check_number, refuse
from pysal._library import widest
from pysal.engine.request.class_targets import class_indices
from pysal.engine.request.score import scaled
from pysal.engine.request.target import Call, CallTarget
from pysal.engine.running.states import outside_inference
from pysal.targets.outputs import Field, entry, table_of

# An index, a name, or one of them per image.
Which: TypeAlias = int | str | Sequence[int | str] | Tensor
# What is explained of an output; see `engine.request.score`.
Reading: TypeAlias = Literal["logit", "softmax", "log_softmax", "sigmoid", "log_sigmoid"]
READINGS = get_args(Reading)
# How many classes a class is told from, if nobody says.
OTHERS = 3


def read(table: Tensor, reading: Reading) -> Tensor:
    """Return the scores that a reading makes of outputs (N, K, ...)."""
    return table if reading == "logit" else scaled(table, reading)


def indices(call: Call, argument: str, which: object) -> Tensor:
    """Return the class of each image (B,), -1 where it is to be found."""
    found = [-1] * call.images if which is None else class_indices(call.where, argument, which, call.images, call.find)
    return outside_inference(lambda: torch.tensor(found, dtype=torch.int64, device=call.device))


def check_below(call: Call, largest: int, classes: int) -> None:
    """Refuse a class that the output does not have, and names of others than it has."""
    call.find.check(classes)
    if largest >= classes:
        refuse(call.where, "target", f"be below the model's {classes} classes", largest)


def shown(which: object) -> str:
    """Return what to call a class in a target's name."""
    return which if isinstance(which, str) else f"class {which}" if isinstance(which, int) else "class of each image"


class Label(CallTarget):
    """One label of a model that says yes or no to each of many, which do not exclude each other.

    Args:
        which: its index or name, or one of them per image.
        score: "logit" for the output as it is, "sigmoid" for the probability, "log_sigmoid" for its logarithm.
        field: the name of the output's entry, or its place in a tuple, where it has several.

    Example:
        >>> import pysal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> pysal.gradient(model, torch.rand(2, 3, 8, 8), pysal.targets.Label([3, 5], score="sigmoid")).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, which: Which, *, score: Reading = "logit", field: Field | None = None) -> None:
        check_choice("pysal.targets.Label", "score", score, ("logit", "sigmoid", "log_sigmoid"))
        self.which, self.reading, self.field = which, score, field
        self.__name__ = f"label {which}" if isinstance(which, (int, str)) else "label of each image"

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call, with the index of each image's label."""
        ready = super().of_call(call)
        ready.index = indices(call, "target", self.which)
        ready.largest = int(ready.index.max())
        return ready

    index: Tensor
    largest: int

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        table = table_of(self.call.where, output, len(rows), self.field)
        check_below(self.call, self.largest, table.shape[1])
        return read(table, self.reading).gather(1, self.index[rows][:, None]).squeeze(1)


class Output(CallTarget):
    """A number that the model answers with as it is: of a regression, of keypoints, of a map.

    Args:
        at: which: the column of an output (N, K), or the place, one index per dimension, of an output (N, ...); numbers below 0
            count from the end.
        field: the name of the output's entry, or its place in a tuple, where it has several.

    Example:
        >>> import pysal
        >>> ages = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1)).eval()
        >>> pysal.gradient(ages, torch.rand(2, 3, 8, 8), pysal.targets.Output()).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, at: int | Sequence[int] = 0, *, field: Field | None = None) -> None:
        try:
            given: list[Any] = list(at) if isinstance(at, (tuple, list)) else [at]
            if not given or any(isinstance(one, bool) for one in given):
                raise TypeError
            places: tuple[Any, ...] = tuple(operator.index(one) for one in given)
        except TypeError:
            refuse("pysal.targets.Output", "at", "be whole numbers, one per dimension of a row", repr(at), TypeError)
        self.at, self.field = places, field
        self.__name__ = f"output {', '.join(map(str, places))}"

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        where = self.call.where
        found = entry(where, output, ("logits", "out", "predicted_depth"), "numbers (N, ...)", self.field)
        if found.ndim == 1 and len(found) == len(rows):
            found = found[:, None]
        if not found.ndim or len(found) != len(rows):
            refuse(where, "the model's output", f"have one row for each of {len(rows)} inputs", tuple(found.shape))
        sizes = tuple(found.shape[1:])
        if len(sizes) != len(self.at) or any(not -size <= one < size for one, size in zip(self.at, sizes, strict=True)):
            refuse(where, "target", f"be a place in an output of shape (N, {', '.join(map(str, sizes))})", self.__name__)
        return found[(slice(None), *self.at)]


class Contrast(CallTarget):
    """A class less those that are most like it: what tells it from them.

    The score is the sum over the others k of w_k (z_c - alpha z_k), where the weights are the softmax of the others' outputs on
    the unchanged image and sum to 1.

    Args:
        which: the class, by index or name, or one per image; None = each image's highest.
        others: the classes it is told from, by index or name; None = the `number` whose outputs are nearest to its own on the
            unchanged image.
        number: how many others; None = 3, or as many as there are.
        alpha: how much they count.
        field: the name of the output's entry, or its place in a tuple, where it has several.

    Source:
        Zhang et al. 2025, arXiv:2501.11309.

    Deviations:
        The weights are those of the unchanged image and have no gradient of their own.

    Example:
        >>> import pysal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> pysal.gradient(model, torch.rand(2, 3, 8, 8), pysal.targets.Contrast(3)).shape
        torch.Size([2, 3, 8, 8])
    """

    learns = True

    def __init__(
        self,
        which: Which | None = None,
        *,
        others: Sequence[int | str] | None = None,
        number: int | None = None,
        alpha: float = 1.0,
        field: Field | None = None,
    ) -> None:
        where = "pysal.targets.Contrast"
        if number is not None:
            check_count(where, "number", number)
        if others is not None and (isinstance(others, str) or not isinstance(others, Sequence) or not others):
            refuse(where, "others", "be a list of classes", repr(others), TypeError)
        alpha = check_number(where, "alpha", alpha)
        self.which, self.others, self.number, self.alpha, self.field = which, others, number, alpha, field
        self.__name__ = "highest class against its like" if which is None else f"{shown(which)} against its like"

    index: Tensor
    told_from: Tensor
    weights: Tensor

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        ready.index = indices(call, "target", self.which)
        others = self.others
        number = (self.number or OTHERS) if others is None else len(others)
        if others is None:
            ready.told_from = outside_inference(lambda: torch.zeros(call.images, number, dtype=torch.int64, device=call.device))
        else:
            found = [class_indices(call.where, "target.others", [one], 1, call.find)[0] for one in others]
            if len(set(found)) < len(found) or set(found) & set(ready.index.tolist()):
                refuse(call.where, "target.others", "be classes that differ from each other and from the explained one", found)
            ready.told_from = outside_inference(
                lambda: torch.tensor(found, dtype=torch.int64, device=call.device).repeat(call.images, 1)
            )
        dtype = widest(call.device)
        ready.weights = outside_inference(lambda: torch.zeros(call.images, number, dtype=dtype, device=call.device))
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        """Find each image's class, the classes like it and their weights."""
        table = table_of(self.call.where, output, len(rows), self.field).detach()
        classes = table.shape[1]
        if self.others is None and self.number is None and 1 < classes <= self.told_from.shape[1]:
            self.told_from, self.weights = self.told_from[:, : classes - 1], self.weights[:, : classes - 1]
        number = self.told_from.shape[1]
        check_below(self.call, int(self.index[rows].max()), classes)
        if self.others is not None:
            check_below(self.call, int(self.told_from.max()), classes)
        if number >= classes:
            refuse(self.call.where, "target", f"contrast a class with at most {classes - 1} others", number)
        own = torch.where(self.index[rows] < 0, table.argmax(1), self.index[rows])
        if self.others is not None and bool((self.told_from[rows] == own[:, None]).any()):
            refuse(self.call.where, "target.others", "be other classes than the explained one", int(own[0]))
        self.index[rows] = own
        if self.others is None:
            apart = (table - table.gather(1, own[:, None])).abs().scatter(1, own[:, None], -1.0)
            self.told_from[rows] = apart.argsort(dim=1, stable=True)[:, 1 : number + 1]
        self.weights[rows] = table.gather(1, self.told_from[rows]).softmax(1).to(self.weights.dtype)

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        table = table_of(self.call.where, output, len(rows), self.field)
        own = table.gather(1, self.index[rows].clamp_min(0)[:, None]).squeeze(1)
        others = table.gather(1, self.told_from[rows])
        return own - self.alpha * (self.weights[rows].to(table.dtype) * others).sum(1)
