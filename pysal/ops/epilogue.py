"""What follows a convolution, in one pass over its result: bias, shortcut, activation and what the gradient needs of it."""

import torch
from torch import Tensor

from pysal._checks import FLOATING, check_tensor, refuse, refuse_unknown
from pysal._library import define
from pysal.ops.guided_relu import RULES
from pysal.reference import epilogue as reference
from pysal.reference.epilogue import ACTIVATIONS, GATED
from pysal.reference.guided_relu import is_channels_last

SCHEMA = "(Tensor(a!) x, Tensor? bias, Tensor? shortcut, int activation, float parameter, bool keep) -> Tensor"
SCHEMA_BACKWARD_ = (
    "(Tensor(a!) grad, Tensor? added, Tensor kept, int activation, float parameter, int rule, int images, bool channels_last)"
    " -> ()"
)

define("epilogue_", SCHEMA, reference.epilogue_)
define("epilogue_backward_", SCHEMA_BACKWARD_, reference.epilogue_backward_)


def _fake(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, activation: int, parameter: float, keep: bool) -> Tensor:
    if not keep or activation == 0:
        return x.new_empty(0, dtype=torch.uint8)
    if ACTIVATIONS[activation] in GATED:
        return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _fake_backward_(
    grad: Tensor,
    added: Tensor | None,
    kept: Tensor,
    activation: int,
    parameter: float,
    rule: int,
    images: int,
    channels_last: bool,
) -> None:
    return None


torch.library.register_fake("pysal::epilogue_", _fake)
torch.library.register_fake("pysal::epilogue_backward_", _fake_backward_)


def epilogue_(
    x: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    activation: str = "identity",
    parameter: float | None = None,
    keep: bool = False,
) -> Tensor:
    """Turn x into activation(x + bias + shortcut), where it lies, and return what the gradient needs.

    The sum is formed in float32, or float64 for float64, and rounded to the dtype once.

    Args:
        x: (N, C, ...), changed in place; float32, float64, float16 or bfloat16. Unless it is contiguous or channels_last, a
            copy is worked on and written back.
        bias: (C,), float32, or float64 where `x` is.
        shortcut: of the shape and dtype of `x`.
        activation: "identity", "relu", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid" or "leaky_relu".
        parameter: where "relu" saturates, infinity by default; the slope of "leaky_relu" below zero, 0.01 by default.
        keep: whether what the gradient needs is returned; else, and for "identity", nothing is.

    Returns:
        For "relu" and "leaky_relu" (ceil(numel / 8),) uint8, gates as `guided_relu` has them: of "relu" 0 < sum < parameter, of
        "leaky_relu" 0 < sum. For the smooth activations the sum, like `x`. Nothing is (0,) uint8.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, an unknown activation, a parameter where there is none to give, or `x` requires
            grad while gradients are being recorded.

    Source:
        Hendrycks and Gimpel 2016, arXiv:1606.08415 (gelu, silu); Howard et al. 2019, arXiv:1905.02244 (hardswish).

    Deviations:
        None.

    Example:
        >>> x = torch.tensor([[-1.0, 2.0]])
        >>> epilogue_(x, bias=torch.tensor([3.0, -4.0]), activation="relu", keep=True)
        tensor([1], dtype=torch.uint8)
        >>> x
        tensor([[2., 0.]])
    """
    where = "pysal::epilogue_"
    check_tensor(where, "x", x, dtypes=FLOATING)
    if x.ndim < 2:
        refuse(where, "x", "have at least 2 dimensions", f"shape {tuple(x.shape)}")
    if bias is not None:
        check_tensor(where, "bias", bias, dtypes=(torch.float64 if x.dtype == torch.float64 else torch.float32,))
        if bias.shape != (x.shape[1],):
            refuse(where, "bias", f"have shape ({x.shape[1]},)", f"shape {tuple(bias.shape)}")
        _check_device(where, "bias", bias, x)
    if shortcut is not None:
        check_tensor(where, "shortcut", shortcut, dtypes=(x.dtype,))
        if shortcut.shape != x.shape:
            refuse(where, "shortcut", f"have shape {tuple(x.shape)}", f"shape {tuple(shortcut.shape)}")
        _check_device(where, "shortcut", shortcut, x)
    number, parameter = _activation(where, activation, parameter)
    if x.requires_grad and torch.is_grad_enabled():
        refuse(where, "x", "not require grad outside torch.no_grad()", "requires_grad=True")
    kept: Tensor = torch.ops.pysal.epilogue_(x, bias, shortcut, number, parameter, keep)
    return kept


def epilogue_backward_(
    grad: Tensor,
    kept: Tensor,
    activation: str,
    parameter: float | None = None,
    *,
    added: Tensor | None = None,
    rule: str = "plain",
    images: int | None = None,
    channels_last: bool = False,
) -> None:
    """Turn a gradient of `epilogue_`'s result into that of its sum, where it lies: (grad + added) activation'(sum).

    Args:
        grad: (T N, ...), changed in place: row t N + n is one of image n.
        kept: what `epilogue_` returned for the N images, with `keep`.
        activation: as given to `epilogue_`.
        parameter: as given to `epilogue_`.
        added: another gradient of the result, like `grad`.
        rule: of "relu": "plain", "guided" or "deconvnet", see `guided_relu`.
        images: N; None = as many as `grad` has rows.
        channels_last: whether what was kept is in channels_last order, as it is where the result was.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, an unknown activation or rule, a rule of another activation than "relu", or
            `grad` requires grad while gradients are being recorded.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, figure 1 (rules).

    Deviations:
        None.

    Example:
        >>> grad = torch.tensor([[1.0, 1.0]])
        >>> epilogue_backward_(grad, torch.tensor([1], dtype=torch.uint8), "relu", added=torch.tensor([[2.0, 2.0]]))
        >>> grad
        tensor([[3., 0.]])
    """
    where = "pysal::epilogue_backward_"
    check_tensor(where, "grad", grad, dtypes=FLOATING)
    number, parameter = _activation(where, activation, parameter)
    if rule not in RULES:
        refuse_unknown(where, "rule", f"be one of {', '.join(RULES)}", rule, RULES)
    if rule != "plain" and activation != "relu":
        refuse(where, "rule", f"be plain for {activation}", rule)
    if channels_last and grad.ndim != 4:
        refuse(where, "channels_last", "be False unless grad is 4-D", f"shape {tuple(grad.shape)}")
    if grad.ndim == 0:
        refuse(where, "grad", "have at least 1 dimension", f"shape {tuple(grad.shape)}")
    images = len(grad) if images is None else images
    if len(grad) % images if images > 0 else len(grad):
        refuse(where, "images", f"divide the {len(grad)} rows of grad", images)
    if added is not None:
        check_tensor(where, "added", added, dtypes=(grad.dtype,))
        if added.shape != grad.shape:
            refuse(where, "added", f"have shape {tuple(grad.shape)}", f"shape {tuple(added.shape)}")
        _check_device(where, "added", added, grad)
    if activation != "identity":
        shape = (images, *grad.shape[1:])
        gated = activation in GATED
        check_tensor(where, "kept", kept, dtypes=(torch.uint8 if gated else grad.dtype,))
        expected = ((torch.Size(shape).numel() + 7) // 8,) if gated else shape
        if tuple(kept.shape) != expected:
            refuse(where, "kept", f"have shape {expected}", f"shape {tuple(kept.shape)}")
        _check_device(where, "kept", kept, grad)
    if grad.requires_grad and torch.is_grad_enabled():
        refuse(where, "grad", "not require grad outside torch.no_grad()", "requires_grad=True")
    torch.ops.pysal.epilogue_backward_(grad, added, kept, number, parameter, RULES[rule], images, channels_last)


def _check_device(where: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        refuse(where, argument, f"be on {like.device}", tensor.device)


def _activation(where: str, name: str, parameter: float | None) -> tuple[int, float]:
    """Return an activation's number and its parameter."""
    if name not in ACTIVATIONS:
        refuse_unknown(where, "activation", f"be one of {', '.join(ACTIVATIONS)}", name, ACTIVATIONS)
    if name not in GATED:
        if parameter is not None:
            refuse(where, "parameter", f"be None for {name}", parameter)
        return ACTIVATIONS.index(name), 0.0
    if parameter is None:
        parameter = float("inf") if name == "relu" else 0.01
    if name == "relu" and not parameter > 0:
        refuse(where, "parameter", "be positive for relu", parameter)
    if parameter != parameter:
        refuse(where, "parameter", "be a number", parameter)
    return ACTIVATIONS.index(name), float(parameter)
