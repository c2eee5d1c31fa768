"""KPCA_CAM of the peer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from pysal._checks import check_choice
from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kernel, Kind, kernel_projection
from pysal.pytorch_grad_cam._request import where
from pysal.pytorch_grad_cam.base_cam import BaseCAM, kind_with


class KPCA_CAM(BaseCAM):
    """The first kernel principal component of the activations, whatever the target; see `BaseCAM`.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        kernel: "linear", "cosine", "sigmoid", "rbf" or "poly".
        gamma: the kernel's factor; None = 1 / K.

    Source:
        Karmani et al. 2024, arXiv:2410.00267.
    """

    kind: ClassVar[str | Kind | None] = "kpca_cam"

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        kernel: Kernel = "sigmoid",
        gamma: float | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, uses_gradients=False)
        check_choice(where(self), "kernel", kernel, get_args(Kernel))
        self.kernel, self.gamma = kernel, gamma

    def _way(self) -> Kind:
        collapse = functools.partial(kernel_projection, kernel=self.kernel, gamma=self.gamma)
        return kind_with("kpca_cam", collapse=collapse)
