"""What a method found."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pysal._checks import refuse


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


def check_options(where: str, argument: str, attribute: Callable[..., object], names: Iterable[object]) -> None:
    """Refuse names that are no options of a method's core.

    Raises:
        ValueError: an unknown name.
    """
    parameters = inspect.signature(attribute).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in names:
        if name not in known:
            refuse(where, argument, f"hold options out of {', '.join(known) or 'none'}", repr(name))
