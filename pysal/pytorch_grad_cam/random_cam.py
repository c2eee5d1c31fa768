"""RandomCAM of the peer."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pysal.methods.cam_kinds import Kind, total
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class RandomCAM(BaseCAM):
    """Channels weighted by numbers in [-1, 1] from NumPy's global generator; see `BaseCAM`."""

    kind: ClassVar[str | Kind | None] = "grad_cam"

    def _way(self) -> Kind:
        def weights(activations: Tensor, _gradients: Tensor) -> Tensor:
            drawn = np.random.uniform(-1, 1, size=activations.shape[:2])
            return torch.from_numpy(drawn).to(activations)

        return Kind("random", "Random CAM", weights, total)
