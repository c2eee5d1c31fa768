"""AblationCAM of the peer."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam._request import PartOfHooks, where
from pysal.pytorch_grad_cam.ablation_layer import AblationLayer
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class AblationCAM(BaseCAM):
    """Ablation-CAM: channels weighted by the drop of the score without each; see `BaseCAM`.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        ablation_layer: accepted for the peer's sake: where a channel lies is told by `reshape_transform`.
        batch_size: most rows of a pass; None = as many as are fast.
        ratio_channels_to_ablate: 1, all of them.

    Raises:
        NotImplementedError: another ratio.

    Source:
        Desai and Ramaswamy 2020, WACV.
    """

    kind: ClassVar[str | Kind | None] = "ablation_cam"

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        ablation_layer: AblationLayer | None = None,
        batch_size: int | None = None,
        ratio_channels_to_ablate: float = 1.0,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        if ratio_channels_to_ablate != 1.0:
            refuse(where(self), "ratio_channels_to_ablate", "be 1.0", ratio_channels_to_ablate, NotImplementedError)
        self.batch_size, self.ablation_layer = batch_size, ablation_layer
        self.ratio_channels_to_ablate = ratio_channels_to_ablate

    save_activation = PartOfHooks()
    assemble_ablation_scores = PartOfHooks()
