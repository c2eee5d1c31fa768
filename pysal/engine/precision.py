"""What arithmetic the model runs in: float32, TF32, bf16, or a float32 forward with a bf16 backward."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from pysal._library import without_autocast

Precision: TypeAlias = Literal["float32", "tf32", "mixed", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@contextlib.contextmanager
def precision_mode(precision: Precision, device: torch.device, *, backward: bool) -> Iterator[None]:
    """Run the block in the given precision, whatever autocast the caller is in; the settings are as before afterwards.

    "mixed" is the one that keeps a ReLU network's gates exact while its backward pass, which is linear once the gates are
    fixed, runs on bf16 matrix units. "bf16" also decides the gates in bf16 and moves many of them.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tf32(precision in ("tf32", "mixed")))
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        else:
            stack.enter_context(without_autocast(device.type))
        if precision == "mixed" and backward:
            stack.enter_context(_Bfloat16Backward())
        yield


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class _Bfloat16Backward(TorchFunctionMode):
    """Replaces the input gradient of convolutions and linear layers by one computed in bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv2d, torch.nn.functional.conv2d):
            return _conv2d(*args, **kwargs)
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    result: Tensor = _Conv2d.apply(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
    return result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = input.shape, geometry
        return torch.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        low = torch.bfloat16
        gradient = conv2d_input(ctx.shape, weight.to(low), grads[0].to(low), *ctx.geometry)
        return gradient.to(grads[0].dtype), None, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        gradient = grads[0].to(torch.bfloat16) @ weight.to(torch.bfloat16)
        return gradient.to(grads[0].dtype), None, None
