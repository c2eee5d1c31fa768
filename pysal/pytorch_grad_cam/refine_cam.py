"""RefineCAM of the peer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.pytorch_grad_cam._request import Targets
from pysal.pytorch_grad_cam.base_cam import BaseCAM, Maps
from pysal.pytorch_grad_cam.grad_cam_plusplus import GradCAMPlusPlus
from pysal.pytorch_grad_cam.utils.image import scale_cam_image


class RefineCAM:
    """The product of the maps of several layers.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: the class that draws each map.
        **kwargs: what it is made with, too.

    Source:
        arXiv:2605.14641, as the peer cites it.
    """

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        base_method: type[BaseCAM] = GradCAMPlusPlus,
        **kwargs: Any,
    ) -> None:
        self.base_cam_per_layer = [base_method(model, [one], reshape_transform, **kwargs) for one in target_layers]

    def __call__(self, *args: Any, **kwargs: Any) -> Maps:
        """Return what `forward` does."""
        return self.forward(*args, **kwargs)

    def forward(self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False) -> Maps:
        """Return the maps (B, H, W), each scaled to [0, 1]; see `BaseCAM`."""
        maps = [cam(input_tensor, targets, False, eigen_smooth) for cam in self.base_cam_per_layer]
        return scale_cam_image(np.prod(maps, axis=0))
