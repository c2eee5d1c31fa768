"""GradCAMPlusPlus of the peer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.methods.cam_kinds import Kind, grad_cam_plus_plus
from pysal.pytorch_grad_cam.base_cam import BaseCAM, kind_with

# What the peer adds to the denominator, which is of the size of squared gradients.
EPSILON = 1e-6


class GradCAMPlusPlus(BaseCAM):
    """Grad-CAM++; see `BaseCAM`.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        exact_peer: whether 1e-6 is added to the denominator, as the peer does, which changes the weights of channels whose
            squared gradients are not much larger.

    Source:
        Chattopadhyay et al. 2017, arXiv:1710.11063.
    """

    kind: ClassVar[str | Kind | None] = "grad_cam_plus_plus"

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        exact_peer: bool = False,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform)
        if exact_peer:
            terms = functools.partial(grad_cam_plus_plus, epsilon=EPSILON)
            self.kind = kind_with("grad_cam_plus_plus", terms=terms)  # type: ignore[misc]
