"""Grad-CAM's map from a layer's activations and their gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal import _checks
from pysal._library import define, define_derivative
from pysal.reference import grad_cam as reference

SCHEMA = "(Tensor activations, Tensor gradients, SymInt height, SymInt width, bool relu) -> Tensor"

define("grad_cam", SCHEMA, reference.grad_cam)


def _fake(activations: Tensor, gradients: Tensor, height: int, width: int, relu: bool) -> Tensor:
    return activations.new_empty(activations.shape[0], 1, height, width)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.height, ctx.width, ctx.relu = inputs[2:]


# With w_k = mean G_k and s = sum_k w_k A_k: dA_k = w_k ds, dG_k = (sum over space of A_k ds) / (h w), where ds is the
# resize's transpose, gated by 1[s > 0] after a ReLU.
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    activations, gradients = ctx.saved_tensors
    compute = torch.promote_types(activations.dtype, torch.float32)
    a, g = activations.to(compute), gradients.to(compute)
    weights = g.mean(dim=(2, 3), keepdim=True)
    rows, columns = (_resize_matrix(a, size, to) for size, to in ((a.shape[2], ctx.height), (a.shape[3], ctx.width)))
    ds = rows @ grad.to(compute) @ columns.mT
    if ctx.relu:
        ds = ds * ((weights * a).sum(dim=1, keepdim=True) > 0)
    grad_gradients = (a * ds).mean(dim=(2, 3), keepdim=True).expand_as(g)
    return (weights * ds).to(activations.dtype), grad_gradients.to(gradients.dtype), None, None, None


def _resize_matrix(like: Tensor, size: int, to: int) -> Tensor:
    """Return the (size, to) matrix whose row i is sample i's share in each of `to` samples."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=to, mode="linear", align_corners=False)[0]


torch.library.register_fake("pysal::grad_cam", _fake)
define_derivative("grad_cam", _differentiate, _setup)


def grad_cam(activations: Tensor, gradients: Tensor, height: int, width: int, relu: bool) -> Tensor:
    """Return sum_k w_k A_k with w_k the mean over space of G_k, rectified if asked and resized to (height, width).

    Args:
        activations: A, (B, K, h, w), floating, h and w >= 1: a layer's output.
        gradients: G, (B, K, h, w), activations' dtype and device: the gradient of the score explained by A.
        height: of the result, >= 1; h and w give the map of the layer itself.
        width: of the result, >= 1.
        relu: whether negative values of the layer's map become 0, before it is resized.

    Returns:
        (B, 1, height, width) in activations' dtype and device, resized bilinearly as F.interpolate does with
        align_corners=False; differentiable in both tensors.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, or an empty map or result.

    Source:
        Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2.

    Deviations:
        None.

    Example:
        >>> activations = torch.tensor([[[[1.0, -2.0]], [[3.0, 1.0]]]])
        >>> gradients = torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]])
        >>> grad_cam(activations, gradients, 1, 2, relu=True).tolist()
        [[[[4.0, 0.0]]]]
    """
    where = "pysal::grad_cam"
    _checks.check_tensor(where, "activations", activations, ndim=4, dtypes=_checks.FLOATING)
    _checks.check_tensor(where, "gradients", gradients, dtypes=(activations.dtype,))
    _checks.check_same_shape(where, "gradients", gradients, "activations", activations.shape)
    _checks.check_same_device(where, "gradients", gradients, "activations", activations.device)
    if activations.shape[2] == 0 or activations.shape[3] == 0:
        shape = tuple(activations.shape)
        _checks.refuse(where, "activations", "have at least one pixel", f"shape {shape}")
    for argument, size in (("height", height), ("width", width)):
        if size < 1:
            _checks.refuse(where, argument, "be at least 1", size)
    out: Tensor = torch.ops.pysal.grad_cam(activations, gradients, height, width, relu)
    return out
