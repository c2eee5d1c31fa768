"""Grad-CAM's map from a layer's activations and their gradients: the formula."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(activations: Tensor, gradients: Tensor, height: int, width: int, relu: bool) -> Tensor:
    """Return sum_k w_k A_k, w_k = mean over space of G_k, rectified if asked and resized: (B, 1, height, width)."""
    compute = torch.promote_types(activations.dtype, torch.float32)
    weights = gradients.to(compute).mean(dim=(2, 3), keepdim=True)
    cam = (weights * activations.to(compute)).sum(dim=1, keepdim=True)
    if relu:
        cam = cam.relu()
    resized = F.interpolate(cam, size=(height, width), mode="bilinear", align_corners=False)
    return resized.to(activations.dtype).contiguous()
