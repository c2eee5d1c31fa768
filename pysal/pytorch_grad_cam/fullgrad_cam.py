"""FullGrad of the peer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.plan import Plan
from pysal.methods import full_grad
from pysal.pytorch_grad_cam._request import PartOfHooks, Targets
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class FullGrad(BaseCAM):
    """The gradients of the image and of all biases of convolutions and batch norms, times these; see `BaseCAM`.

    Args:
        model: see `BaseCAM`.
        target_layers: not used: all layers with a bias are.
        reshape_transform: not used.

    Source:
        Srinivas and Fleuret 2019, arXiv:1905.00780.
    """

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module] = (),
        reshape_transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, compute_input_gradient=True)

    bias_data = PartOfHooks()
    get_bias_data = PartOfHooks()

    def _attribution(self, plan: Plan, targets: Targets, *, augment: Any, eigen_smooth: bool) -> Attribution:
        return full_grad.prepare(plan, eigen_smooth=eigen_smooth, augment=augment).run(report=False)
