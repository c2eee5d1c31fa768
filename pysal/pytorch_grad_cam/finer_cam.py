"""FinerCAM of the peer."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.row_score import class_scores
from pysal.methods.cam_targets import most_alike
from pysal.pytorch_grad_cam._request import Targets, outputs_of
from pysal.pytorch_grad_cam.base_cam import BaseCAM, Maps
from pysal.pytorch_grad_cam.grad_cam import GradCAM
from pysal.pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

DEFAULT_COMPARISON_CATEGORIES = (1, 2, 3)


class FinerCAM:
    """A class against those that score most like it.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: the class that draws the map.

    Source:
        Zhang et al. 2025, arXiv:2501.11309.
    """

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        base_method: type[BaseCAM] = GradCAM,
    ) -> None:
        self.base_cam = base_method(model, target_layers, reshape_transform)
        self.compute_input_gradient = self.base_cam.compute_input_gradient
        self.uses_gradients = self.base_cam.uses_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> Maps:
        """Return what `forward` does."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        eigen_smooth: bool = False,
        alpha: float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
    ) -> Maps:
        """Return the maps (B, H, W), each scaled to [0, 1].

        Args:
            input_tensor: (B, C, H, W).
            targets: see `BaseCAM`; given, what follows is not used.
            eigen_smooth: see `BaseCAM`.
            alpha: how much the other classes count.
            comparison_categories: which they are, by their rank among all: 1 is the one that scores most like the class.
            target_idx: the class; None = each image's highest.

        Raises:
            TypeError: see `BaseCAM`.
            ValueError: see `BaseCAM`.
        """
        if targets is None:
            scores = class_scores(outputs_of(self.base_cam.model, input_tensor.to(self.base_cam.device)))
            ranks = DEFAULT_COMPARISON_CATEGORIES if comparison_categories is None else comparison_categories
            targets = [
                FinerWeightedTarget(order[0], [order[rank] for rank in ranks if rank < len(order)], alpha)
                for order in most_alike(scores, target_idx).tolist()
            ]
        return self.base_cam(input_tensor, targets, eigen_smooth=eigen_smooth)

    def __enter__(self) -> Self:
        """Return the object."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""
