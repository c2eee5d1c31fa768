"""ScoreCAM of the peer."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM, kind_with


class ScoreCAM(BaseCAM):
    """Score-CAM: channels weighted by the score of the image seen through each; see `BaseCAM`.

    The masks are enlarged with corners aligned, as in the peer. The attribute `batch_size` is the most rows of a pass; None =
    as many as are fast.

    Source:
        Wang et al. 2019, arXiv:1910.01279.
    """

    kind: ClassVar[str | Kind | None] = kind_with("score_cam", align_corners=True)

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
