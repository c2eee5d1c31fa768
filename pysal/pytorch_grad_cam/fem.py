"""FEM of the peer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kind, fem
from pysal.pytorch_grad_cam.base_cam import BaseCAM, kind_with


class FEM(BaseCAM):
    """Channels weighted by the share of their cells that stand out by `k` standard deviations; see `BaseCAM`.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        k: how far above the mean.

    Source:
        Fuad et al. 2020, IPTA.
    """

    kind: ClassVar[str | Kind | None] = "fem"
    smooth: ClassVar[bool | None] = False

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        k: float = 2,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        self.k = k

    def _way(self) -> Kind:
        return kind_with("fem", terms=functools.partial(fem, k=self.k))
