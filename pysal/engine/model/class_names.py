"""The classes of a model by name."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from pysal._checks import refuse
from pysal._spelling import close_to, did_you_mean

# K names in order, or the name of each of 0 to K - 1, as in the `id2label` of Hugging Face's transformers.
Names: TypeAlias = Sequence[str] | Mapping[int, str] | Mapping[str, str] | np.ndarray[Any, Any]

# Classes that a refusal lists.
MOST_LISTED = 5


class ClassNames:
    """Finds the class that a name means.

    Args:
        names: K names.
        synonyms: for each class the other words it is known by; none by default.
    """

    def __init__(self, names: Sequence[str], synonyms: Sequence[Sequence[str]] | None = None) -> None:
        self.names = tuple(names)
        others = synonyms or [()] * len(self.names)
        self._known = [[first.casefold(), *map(str.casefold, rest)] for first, rest in zip(self.names, others, strict=True)]

    def __len__(self) -> int:
        """Return K."""
        return len(self.names)

    def find(self, where: str, argument: str, name: str) -> int:
        """Return the index of the class.

        A name is looked for, whatever its case, among the class names, then among their synonyms, then as a word of
        either, then as any part of either; the first of these that finds something decides. Digits that are no class name
        are an index.

        Raises:
            ValueError: an index outside [0, K), a name of no class (close names are listed) or of several (listed too).
        """
        wanted = name.strip().casefold()
        matches = [index for index, names in enumerate(self._known) if wanted and wanted == names[0]]
        if not matches and re.fullmatch(r"[+-]?\d{1,18}", wanted, re.ASCII):
            index = int(wanted)
            if not 0 <= index < len(self):
                refuse(where, argument, f"be in [0, {len(self)})", index)
            return index
        if wanted and not matches:
            word = re.compile(rf"\b{re.escape(wanted)}\b")
            tests: tuple[Callable[[list[str]], bool], ...] = (
                lambda names: wanted in names,
                lambda names: any(word.search(name) for name in names),
                lambda names: any(wanted in name for name in names),
            )
            for test in tests:
                matches = [index for index, names in enumerate(self._known) if test(names)]
                if matches:
                    break
        if len(matches) == 1:
            return matches[0]
        if matches:
            more = ", ..." if len(matches) > MOST_LISTED else ""
            listed = ", ".join(self._numbered(matches[:MOST_LISTED]))
            refuse(where, argument, "name one class", f"{name!r} ({len(matches)} classes match: {listed}{more})")
        known = {name: index for index, names in enumerate(self._known) for name in names}
        near = close_to(wanted, known, MOST_LISTED)
        if not near:  # then perhaps a word of a name
            known = {word: index for index, names in enumerate(self._known) for word in re.findall(r"\w+", " ".join(names))}
            near = close_to(wanted, known, MOST_LISTED, likeness=0.75)
        close = dict.fromkeys(known[one] for one in near)
        refuse(where, argument, f"name a class{did_you_mean(self._numbered(close))}", repr(name))

    def _numbered(self, indices: Iterable[int]) -> list[str]:
        return [f"{self.names[index]} ({index})" for index in indices]


def names_of(model: object) -> ClassNames | None:
    """Return the class names that a model carries, or a network inside it; None where it carries none.

    They are its `classes` where those are `ClassNames`, its `class_names` (K names, or a mapping of indices to names), or
    the `config.id2label` of Hugging Face's transformers.
    """
    for one in model.modules() if isinstance(model, nn.Module) else [model]:
        classes = getattr(one, "classes", None)
        if isinstance(classes, ClassNames):
            return classes if len(classes) else None
        names = listed(getattr(one, "class_names", None)) or listed(getattr(getattr(one, "config", None), "id2label", None))
        if names:
            return ClassNames(names)
    return None


def listed(names: object) -> list[str]:
    """Return K names in order; none where what was found is not `Names`."""
    if isinstance(names, Mapping):
        try:
            by_index = {int(index): name for index, name in names.items()}
        except (TypeError, ValueError):
            return []
        names = [by_index.get(index) for index in range(len(names))]
    elif isinstance(names, ValuesView):
        names = list(names)
    elif hasattr(names, "tolist"):  # of NumPy or pandas
        names = names.tolist()
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)):
        return []
    return [str(name) for name in names] if all(isinstance(name, str) for name in names) else []


def checked(where: str, names: object, *, or_else: str = "", empty: bool = False) -> tuple[str, ...]:
    """Return K names that were given as `class_names`, in order.

    Args:
        where: the public name that was called, for errors.
        names: `Names`.
        or_else: what else may be given, for errors.
        empty: whether there may be none.

    Raises:
        TypeError: no names.
        ValueError: not one.
    """
    found = listed(names)
    if not found and hasattr(names, "__len__") and not len(names) and not isinstance(names, (str, bytes)):
        return () if empty else refuse(where, "class_names", "hold at least one name", "none")
    if not found:
        requirement = f"be {or_else}a list of names, or a name for each index from 0 on ({{0: 'cat', 1: 'dog'}})"
        refuse(where, "class_names", requirement, " ".join(repr(names).split())[:80], TypeError)
    return tuple(found)
