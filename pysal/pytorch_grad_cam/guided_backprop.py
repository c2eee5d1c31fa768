"""GuidedBackpropReLUModel of the peer."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.running.states import restoring
from pysal.methods import guided_backprop
from pysal.pytorch_grad_cam._elsewhere import GRAD_CAM
from pysal.pytorch_grad_cam._request import PartOfHooks, evaluating, where

__getattr__ = GRAD_CAM.falling_through(__name__)


class GuidedBackpropReLUModel:
    """Guided backprop, at every ReLU, be it a module or not.

    Args:
        model: the model, or what `pysal.prepare` made of it; it is not changed.
        device: where the model is moved to; None = it stays where it is.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806.
    """

    def __init__(self, model: nn.Module | PreparedModel, device: Any = None) -> None:
        if device is not None and isinstance(model, nn.Module):
            model = model.to(torch.device(device))
        self.model = model

    def forward(self, input_img: Tensor) -> Any:
        """Return what the model answers."""
        return self.model(input_img)

    recursive_replace_relu_with_guidedrelu = PartOfHooks()
    recursive_replace_guidedrelu_with_relu = PartOfHooks()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        model = self.model.original if isinstance(self.model, PreparedModel) else self.model
        return next((one.device for one in model.parameters()), torch.device("cpu"))

    @restoring
    def __call__(self, input_img: Tensor, target_category: int | None = None) -> NDArray[np.float32]:
        """Return the map (H, W, C) of the first image.

        Args:
            input_img: (B, C, H, W).
            target_category: the class; None = the highest.

        Raises:
            ValueError: the model has no ReLU, or activations for which the rule is not defined; a wrong shape or class.
        """
        evaluating(self.model)
        model = self.model.original if isinstance(self.model, PreparedModel) else self.model
        device = next((one.device for one in model.parameters()), input_img.device)
        target = None if target_category is None else int(target_category)
        images = input_img[:1].detach().to(device)
        plan = Plan(where(self), self.model, images, target, Running("logit", (), None, "as set", None))
        work = guided_backprop.prepare(plan, rule="guided", other_activations="error")
        answer: NDArray[np.float32] = work.run(report=False).map[0].permute(1, 2, 0).cpu().numpy()
        return answer
