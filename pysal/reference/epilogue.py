"""Oracle of `pysal::epilogue_` and its backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal.reference.guided_relu import guided_relu, guided_relu_backward, is_channels_last

# Position -> name, as csrc/cuda/epilogue.h counts them.
ACTIVATIONS = ("identity", "relu", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid", "leaky_relu")
# What keeps a bit per element for its gradient; the others but identity keep what they are of.
GATED = ("relu", "leaky_relu")
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": lambda x: F.hardtanh(x + 3, 0.0, 6.0) / 6,  # torch's gradient has a sixth in float32
}
PLAIN = 0


def epilogue_(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, activation: int, parameter: float, keep: bool) -> Tensor:
    """Put activation(x + bias + shortcut) in the place of x; return what its gradient needs, or nothing."""
    name = ACTIVATIONS[activation]
    order = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    sums = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        sums = sums + bias.view(-1, *[1] * (x.ndim - 2))
    sums = sums if shortcut is None else sums + shortcut
    stored = sums.to(x.dtype).contiguous(memory_format=order)
    kept = x.new_empty(0, dtype=torch.uint8)
    if name == "relu":
        result, gates = guided_relu(stored, parameter, PLAIN)
        kept = gates if keep else kept
    elif name == "leaky_relu":
        result = torch.where(stored > 0, stored, (sums * parameter).to(x.dtype))
        kept = guided_relu(stored.nan_to_num(nan=-1.0), float("inf"), PLAIN)[1] if keep else kept
    else:
        result = stored if name == "identity" else SMOOTH[name](sums)
        kept = stored.clone(memory_format=order) if keep and name != "identity" else kept
    x.copy_(result)
    return kept


def epilogue_backward_(
    grad: Tensor,
    added: Tensor | None,
    kept: Tensor,
    activation: int,
    parameter: float,
    rule: int,
    images: int,
    channels_last: bool,
) -> None:
    """Put (grad + added) activation'(sums), of ReLU what a rule lets through, in the place of grad."""
    name = ACTIVATIONS[activation]
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    total = wide if added is None else wide + added
    for part, target in zip(total.split(max(images, 1)), grad.split(max(images, 1)), strict=True):
        if name == "identity":
            target.copy_(part)
        elif name == "relu":
            target.copy_(guided_relu_backward(part, kept, rule, channels_last))
        elif name == "leaky_relu":
            opened = guided_relu_backward(torch.ones_like(part), kept, PLAIN, channels_last) > 0
            target.copy_(torch.where(opened, part, part * parameter))
        else:
            with torch.enable_grad():
                leaf = kept.to(part.dtype).detach().requires_grad_()
                (derivative,) = torch.autograd.grad(SMOOTH[name](leaf).sum(), leaf)
            target.copy_(part * derivative)
