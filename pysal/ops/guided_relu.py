"""ReLU whose backward follows a rule and whose gate is saved as one bit per element."""

from typing import Any

import torch
from torch import Tensor

from pysal._checks import FLOATING, check_tensor, refuse, refuse_unknown
from pysal._library import define, define_derivative
from pysal.reference import guided_relu as reference
from pysal.reference.guided_relu import DECONVNET, GUIDED, PLAIN, is_channels_last

RULES = {"plain": PLAIN, "guided": GUIDED, "deconvnet": DECONVNET}

SCHEMA = "(Tensor input, float upper, int rule) -> (Tensor output, Tensor gates)"
SCHEMA_GATES = "(Tensor input, float upper) -> Tensor"
SCHEMA_BACKWARD = "(Tensor grad_output, Tensor gates, int rule, bool channels_last) -> Tensor"
SCHEMA_BACKWARD_ = "(Tensor(a!) grad, Tensor gates, int rule, bool channels_last) -> ()"

define("guided_relu", SCHEMA, reference.guided_relu)
define("guided_relu_gates", SCHEMA_GATES, reference.guided_relu_gates)
define("guided_relu_backward", SCHEMA_BACKWARD, reference.guided_relu_backward)
define("guided_relu_backward_", SCHEMA_BACKWARD_, reference.guided_relu_backward_)


def _fake(input: Tensor, upper: float, rule: int) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty_like(input, memory_format=memory_format), _fake_gates(input, upper)


def _fake_gates(input: Tensor, upper: float) -> Tensor:
    return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)


def _fake_backward(grad_output: Tensor, gates: Tensor, rule: int, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(grad_output, memory_format=memory_format)


def _fake_backward_(grad: Tensor, gates: Tensor, rule: int, channels_last: bool) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Tensor, float, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.rule = inputs[2]
    ctx.channels_last = is_channels_last(output[0])
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, grad_output: Tensor, grad_gates: Tensor | None) -> tuple[Tensor, None, None]:
    (gates,) = ctx.saved_tensors
    grad = torch.ops.pysal.guided_relu_backward(grad_output, gates, ctx.rule, ctx.channels_last)
    return grad, None, None


def _setup_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    ctx.rule, ctx.channels_last = inputs[2:]
    ctx.save_for_backward(inputs[1] if ctx.rule == PLAIN else output)


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (saved,) = ctx.saved_tensors
    if ctx.rule == PLAIN:  # linear in grad_output, by the same gate
        return torch.ops.pysal.guided_relu_backward(grad, saved, PLAIN, ctx.channels_last), None, None, None
    return torch.where(saved > 0, grad, 0.0), None, None, None  # it passed exactly where it came out positive


torch.library.register_fake("pysal::guided_relu", _fake)
torch.library.register_fake("pysal::guided_relu_gates", _fake_gates)
torch.library.register_fake("pysal::guided_relu_backward", _fake_backward)
torch.library.register_fake("pysal::guided_relu_backward_", _fake_backward_)
define_derivative("guided_relu", _differentiate, _setup)
define_derivative("guided_relu_backward", _differentiate_backward, _setup_backward)


def guided_relu(input: Tensor, upper: float = float("inf"), rule: str = "guided") -> tuple[Tensor, Tensor]:
    """Return min(max(input, 0), upper) and the bits that say where 0 < input < upper.

    The gradient of `output` with respect to `input` follows the rule, g being the gradient of `output`: "plain" is
    1[0 < input < upper] g, "guided" is 1[0 < input < upper] 1[g > 0] g, "deconvnet" is 1[g > 0] g. A factor of 0
    selects 0, also where g is NaN or infinite. Of a NaN neither `input <= 0` nor `g <= 0` is true, so it passes: what a model
    cannot compute is to be seen in its map.

    Args:
        input: any shape; float32, float64, float16 or bfloat16. NaN gives NaN, with gate 1; infinity has gate 1 where `upper`
            is infinite, as in torch.
        upper: where the output saturates, > 0: infinity for ReLU, 6 for ReLU6.
        rule: "plain", "guided" or "deconvnet".

    Returns:
        output: like `input`; channels_last where `input` is dense in that format, else contiguous.
        gates: (ceil(numel / 8),) uint8; bit i % 8 of byte i // 8 belongs to element i in the memory order of `output`.

    Raises:
        TypeError: `input` is not a floating tensor.
        ValueError: `upper` is not positive, or `rule` is unknown.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, figure 1; Zeiler and Fergus 2013, arXiv:1311.2901 (deconvnet).

    Deviations:
        None.

    Example:
        >>> output, gates = guided_relu(torch.tensor([-1.0, 2.0, 7.0]), upper=6.0)
        >>> output, gates
        (tensor([0., 2., 6.]), tensor([2], dtype=torch.uint8))
    """
    where = "pysal::guided_relu"
    check_tensor(where, "input", input, dtypes=FLOATING)
    if not upper > 0:
        refuse(where, "upper", "be positive", upper)
    if rule not in RULES:
        refuse_unknown(where, "rule", f"be one of {', '.join(RULES)}", rule, RULES)
    output, gates = torch.ops.pysal.guided_relu(input, upper, RULES[rule])
    return output, gates


def guided_relu_gates(input: Tensor, upper: float = float("inf")) -> Tensor:
    """Return the bits that say where 0 < input < upper, as `guided_relu` does, and nothing else.

    `input` may be what a ReLU has already made of its input: its output is positive and below `upper` where its input was,
    provided that `upper` is a number of its dtype, as 6 and infinity are of every one.

    Args:
        input: any shape; float32, float64, float16 or bfloat16. NaN has gate 1, and infinity where `upper` is
            infinite.
        upper: where the output saturates, > 0: infinity for ReLU, 6 for ReLU6.

    Returns:
        (ceil(numel / 8),) uint8; bit i % 8 of byte i // 8 belongs to element i in the memory order of `input` where that is
        dense in channels_last, else in contiguous order.

    Raises:
        TypeError: `input` is not a floating tensor.
        ValueError: `upper` is not positive.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, figure 1.

    Deviations:
        None.

    Example:
        >>> guided_relu_gates(torch.tensor([-1.0, 2.0, 7.0]), upper=6.0)
        tensor([2], dtype=torch.uint8)
    """
    where = "pysal::guided_relu_gates"
    check_tensor(where, "input", input, dtypes=FLOATING)
    if not upper > 0:
        refuse(where, "upper", "be positive", upper)
    gates: Tensor = torch.ops.pysal.guided_relu_gates(input, upper)
    return gates


def guided_relu_backward(grad_output: Tensor, gates: Tensor, rule: str, channels_last: bool = False) -> Tensor:
    """Return the gradient of `guided_relu`'s input from that of its output.

    Args:
        grad_output: the gradient g of `output`, of its shape; float32, float64, float16 or bfloat16.
        gates: (ceil(numel / 8),) uint8, as `guided_relu` returned them.
        rule: "plain", "guided" or "deconvnet"; see `guided_relu`.
        channels_last: whether the bits are in channels_last order, as they are where `output` is channels_last.

    Returns:
        A tensor like `grad_output`, channels_last if asked, else contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: `rule` is unknown, `gates` has the wrong shape or device, or `channels_last` is asked of a tensor
            that is not 4-D.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, figure 1.

    Deviations:
        None.

    Example:
        >>> guided_relu_backward(torch.tensor([1.0, -1.0, 3.0]), torch.tensor([3], dtype=torch.uint8), "guided")
        tensor([1., 0., 0.])
    """
    where = "pysal::guided_relu_backward"
    number = _check_backward(where, "grad_output", grad_output, gates, rule, channels_last)
    grad: Tensor = torch.ops.pysal.guided_relu_backward(grad_output, gates, number, channels_last)
    return grad


def guided_relu_backward_(grad: Tensor, gates: Tensor, rule: str, channels_last: bool = False) -> None:
    """Turn the gradient of `guided_relu`'s output into that of its input, where it lies.

    Where the bits are in another order than the tensor, it is worked on as a copy that is written back.

    Args:
        grad: the gradient g of `output`, of its shape, changed in place; float32, float64, float16 or bfloat16.
        gates: (ceil(numel / 8),) uint8, as `guided_relu` returned them.
        rule: "plain", "guided" or "deconvnet"; see `guided_relu`.
        channels_last: whether the bits are in channels_last order, as they are where `output` is channels_last.

    Raises:
        TypeError: a wrong dtype.
        ValueError: `rule` is unknown, `gates` has the wrong shape or device, `channels_last` is asked of a tensor that is
            not 4-D, or `grad` requires grad while gradients are being recorded.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, figure 1.

    Deviations:
        None.

    Example:
        >>> grad = torch.tensor([1.0, -1.0, 3.0])
        >>> guided_relu_backward_(grad, torch.tensor([3], dtype=torch.uint8), "guided")
        >>> grad
        tensor([1., 0., 0.])
    """
    where = "pysal::guided_relu_backward_"
    number = _check_backward(where, "grad", grad, gates, rule, channels_last)
    if grad.requires_grad and torch.is_grad_enabled():
        refuse(where, "grad", "not require grad outside torch.no_grad()", "requires_grad=True")
    torch.ops.pysal.guided_relu_backward_(grad, gates, number, channels_last)


def _check_backward(where: str, argument: str, grad: Tensor, gates: Tensor, rule: str, channels_last: bool) -> int:
    """Refuse bad arguments of a backward; return the rule's number."""
    check_tensor(where, argument, grad, dtypes=FLOATING)
    check_tensor(where, "gates", gates, dtypes=(torch.uint8,))
    if rule not in RULES:
        refuse_unknown(where, "rule", f"be one of {', '.join(RULES)}", rule, RULES)
    if gates.shape != ((grad.numel() + 7) // 8,):
        refuse(where, "gates", f"have shape ({(grad.numel() + 7) // 8},)", f"shape {tuple(gates.shape)}")
    if gates.device != grad.device:
        refuse(where, "gates", f"be on {grad.device}", gates.device)
    if channels_last and grad.ndim != 4:
        refuse(where, "channels_last", f"be False unless {argument} is 4-D", f"shape {tuple(grad.shape)}")
    return RULES[rule]
