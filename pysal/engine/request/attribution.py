"""What a method found."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from pysal._checks import refuse, refuse_unknown

Found = TypeVar("Found")


@dataclass(frozen=True)
class Attribution:
    """A method's map and what else it found on the way.

    Attributes:
        map: (B, C, H, W) or (B, 1, H, W), in the score's own units.
        passes: model passes per image, forward or forward and backward.
        details: what the method's page in docs lists: "drops", "residual", "standard_error", "layer", ...
    """

    map: Tensor
    passes: float
    details: dict[str, Any] = field(default_factory=dict)


def with_defaults(core: Callable[..., Found], public: Callable[..., object]) -> Callable[..., Found]:
    """Return a core to which options that are not given come from the signature of its public function.

    A core has no defaults: so there is one place for each, and a public function that forgets to hand an option over fails.
    """
    return functools.partial(core, **{name: default_of(public, name) for name in _options_of(core)})


def default_of(public: Callable[..., object], name: str) -> Any:
    """Return the default of an argument of a public function."""
    return inspect.signature(public).parameters[name].default


def checked_options(where: str, argument: str, core: Callable[..., object], given: object) -> dict[str, Any]:
    """Return the options that were given for a core, or for a function, by name; None = none.

    Raises:
        TypeError: no mapping.
        ValueError: an option that it does not have.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        refuse(where, argument, "be a mapping of option names to values", repr(given), TypeError)
    known = _options_of(core)
    for name in given:
        if name not in known:
            refuse_unknown(where, argument, f"hold options out of {', '.join(known) or 'none'}", name, known)
    return dict(given)


def _options_of(core: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(core).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
