"""How the peer's users read maps out of what layers return."""

from collections.abc import Mapping

import torch
from torch import Tensor


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """Return (N, K, height, width) of a class token and patches, (N, 1 + height width, K)."""
    return tensor[:, 1:].reshape(tensor.size(0), height, width, tensor.size(2)).permute(0, 3, 1, 2)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:
    """Return (N, K, height, width) of patches (N, height width, K)."""
    return tensor.reshape(tensor.size(0), height, width, tensor.size(2)).permute(0, 3, 1, 2)


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """Return the absolute values of a pyramid's maps, all of the size of "pool", one after the other."""
    size = x["pool"].shape[-2:]
    return torch.cat([torch.nn.functional.interpolate(one.abs(), size, mode="bilinear") for one in x.values()], dim=1)
