"""EigenCAM of the peer."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class EigenCAM(BaseCAM):
    """The first principal component of the activations, whatever the target; see `BaseCAM`.

    The paper, and `pysal.grad_cam` with kind="eigen_cam", do not take the mean away first.

    Source:
        Muhammad and Yeasin 2020, arXiv:2008.00299.
    """

    kind: ClassVar[str | Kind | None] = "eigen_cam"
    smooth: ClassVar[bool | None] = True

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
