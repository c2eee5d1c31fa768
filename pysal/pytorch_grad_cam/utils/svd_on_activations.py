"""The peer's projections, with signs that do not depend on LAPACK."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pysal.methods.cam_kinds import Kernel, kernel_projection, largest_positive, projection


def get_2d_projection(activation_batch: NDArray[Any]) -> NDArray[np.float32]:
    """Return the first principal component (B, H, W) of activations (B, K, H, W)."""
    answer: NDArray[np.float32] = projection(torch.from_numpy(activation_batch))[:, 0].float().numpy()
    return answer


def get_2d_projection_kernel(
    activation_batch: NDArray[Any], kernel: Kernel = "sigmoid", gamma: float | None = None
) -> NDArray[np.float32]:
    """Return the first kernel principal component (B, H, W) of activations (B, K, H, W)."""
    found = kernel_projection(torch.from_numpy(activation_batch), kernel=kernel, gamma=gamma)
    answer: NDArray[np.float32] = found[:, 0].float().numpy()
    return answer


def get_2d_projection_with_sign_correction(activation_batch: NDArray[Any]) -> NDArray[np.float32]:
    """Return the first principal component (B, H, W) of activations (B, K, H, W), its largest value positive."""
    answer: NDArray[np.float32] = largest_positive(torch.from_numpy(activation_batch))[:, 0].float().numpy()
    return answer
