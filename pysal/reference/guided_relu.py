"""Oracle of `pysal::guided_relu`, its gates alone and its backward."""

import torch
from torch import Tensor

PLAIN, GUIDED, DECONVNET = 0, 1, 2


def guided_relu(input: Tensor, upper: float, rule: int) -> tuple[Tensor, Tensor]:
    """Return min(max(input, 0), upper) and 1[0 < input < upper] packed eight to a byte, in memory order."""
    memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    return x.clamp(0.0, upper).to(input.dtype).clone(memory_format=memory_format), guided_relu_gates(input, upper)


def guided_relu_gates(input: Tensor, upper: float) -> Tensor:
    """Return 1[0 < input < upper], and 1 for NaN and for infinity below no upper, packed eight to a byte, in memory order."""
    memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    x = in_memory_order(input.to(torch.promote_types(input.dtype, torch.float32)), memory_format)
    closed = (x <= 0) | ((x >= upper) & (upper != float("inf")))
    gates = (~closed).to(torch.uint8)
    padded = torch.nn.functional.pad(gates, (0, -gates.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, device=input.device)).sum(1, dtype=torch.uint8)


def guided_relu_backward(grad_output: Tensor, gates: Tensor, rule: int, channels_last: bool) -> Tensor:
    """Return grad_output where the rule lets it pass, else 0."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    g = in_memory_order(grad_output, memory_format)
    gate = ((gates[:, None] >> torch.arange(8, device=gates.device)) & 1).flatten()[: g.numel()] == 1
    positive = ~(g <= 0)  # or NaN, which is to be seen
    passes = {PLAIN: gate, GUIDED: gate & positive, DECONVNET: positive}[rule]
    grad = torch.where(passes, g, torch.zeros_like(g))
    if not channels_last:
        return grad.reshape(grad_output.shape)
    n, c, h, w = grad_output.shape
    return grad.reshape(n, h, w, c).permute(0, 3, 1, 2)


def guided_relu_backward_(grad: Tensor, gates: Tensor, rule: int, channels_last: bool) -> None:
    """Put 0 where the rule does not let the gradient pass."""
    grad.copy_(guided_relu_backward(grad, gates, rule, channels_last))


def in_memory_order(values: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return the elements as a vector, in the order in which `memory_format` stores them."""
    return values.permute(0, 2, 3, 1).reshape(-1) if memory_format == torch.channels_last else values.reshape(-1)


def is_channels_last(values: Tensor) -> bool:
    """Return whether a tensor is dense in channels_last and not also in the contiguous order."""
    return values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()
