"""What arithmetic the model runs in: float32, TF32, bf16, or a float32 forward with a bf16 backward."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from pysal._library import without_autocast
from pysal.engine.running.states import FunctionMode, Restored
from pysal.engine.running.tf32 import KEPT, allow_tf32

Precision: TypeAlias = Literal["float32", "tf32", "mixed", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Arithmetic: TypeAlias = Precision | Literal["as set"]
"""What a plan runs in: "as set" is float32 with torch's TF32 settings as the caller has them, as in the packages whose calls
`pysal.captum` and `pysal.pair` take."""


class precision_mode(Restored):
    """Run the block in the given precision, whatever autocast the caller is in; the settings are as before afterwards.

    "mixed" is the one that keeps a ReLU network's gates exact while its backward pass, which is linear once the gates are
    fixed, runs on bf16 matrix units. "bf16" also decides the gates in bf16 and moves many of them.

    On a GPU other threads' passes share the TF32 settings: those in other arithmetic take turns.
    """

    sets_grad = False  # whether a subclass sets the grad mode, too

    def __init__(self, precision: Arithmetic, device: torch.device, *, backward: bool) -> None:
        self.precision, self.device, self.backward = precision, device, backward

    def __enter__(self) -> None:
        """Note what was, and set what is asked for."""
        super().__enter__()
        self.set()

    def set(self) -> None:
        """Set what is asked for, in a `restoring` function that ends where the block would."""
        kind = self.device.type
        if kind == "cuda":
            allow_tf32(KEPT if self.precision == "as set" else self.precision in ("tf32", "mixed"))
        if self.precision == "bf16":
            torch.autocast(kind, dtype=torch.bfloat16).__enter__()
        elif torch.is_autocast_enabled(kind) if kind in ("cpu", "cuda") else True:
            without_autocast(kind).__enter__()
        if self.precision == "mixed" and self.backward:
            _Bfloat16Backward().__enter__()

    def __exit__(self, *error: object) -> None:
        """Put back what was; the grad mode stays as the block left it, where a captured layer may have begun a graph."""
        if not self.sets_grad:
            self._before.grad = torch.is_grad_enabled()
        super().__exit__(*error)


class _Bfloat16Backward(FunctionMode):
    """Replaces the input gradient of convolutions and linear layers by one computed in bf16."""

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
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
