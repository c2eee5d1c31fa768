"""The score of the image times its map."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysal.metrics.average_drop import drop, through_map
from pysal.pytorch_grad_cam.metrics.perturbation_confidence import PerturbationConfidenceMetric


def multiply_tensor_with_cam(input_tensor: Tensor, cam: Tensor) -> Tensor:
    """Return an image (C, H, W) times a map (H, W)."""
    return through_map(input_tensor, cam)


class CamMultImageConfidenceChange(PerturbationConfidenceMetric):
    """How much the target changes when the image is multiplied by its map."""

    def __init__(self) -> None:
        super().__init__(multiply_tensor_with_cam)


class DropInConfidence(CamMultImageConfidenceChange):
    """How much the target falls, 0 where it rises."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return (B,) float32; see `PerturbationConfidenceMetric`."""
        change = torch.from_numpy(np.asarray(super().__call__(*args, **kwargs)))
        return drop(torch.zeros_like(change), change).numpy()


class IncreaseInConfidence(CamMultImageConfidenceChange):
    """Whether the target rises: 1 or 0."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return (B,) float32; see `PerturbationConfidenceMetric`."""
        return np.float32(super().__call__(*args, **kwargs) > 0)
