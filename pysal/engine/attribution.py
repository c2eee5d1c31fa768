"""What a method found."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
