"""ReLU whose backward follows a rule and whose gate is saved as one bit per element."""

from typing import Any

import torch
from torch import Tensor

from pysal._checks import FLOATING, check_tensor, refuse
from pysal._library import define
from pysal.reference import guided_relu as reference
from pysal.reference.guided_relu import DECONVNET, GUIDED, PLAIN, is_channels_last

RULES = {"plain": PLAIN, "guided": GUIDED, "deconvnet": DECONVNET}

SCHEMA = "(Tensor input, float upper, int rule) -> (Tensor output, Tensor gates)"
SCHEMA_BACKWARD = "(Tensor grad_output, Tensor gates, int rule, bool channels_last) -> Tensor"

define("guided_relu", SCHEMA, reference.guided_relu)
define("guided_relu_backward", SCHEMA_BACKWARD, reference.guided_relu_backward)


def _fake(input: Tensor, upper: float, rule: int) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    gates = input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)
    return torch.empty_like(input, memory_format=memory_format), gates


def _fake_backward(grad_output: Tensor, gates: Tensor, rule: int, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(grad_output, memory_format=memory_format)


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
torch.library.register_fake("pysal::guided_relu_backward", _fake_backward)
torch.library.register_autograd("pysal::guided_relu", _differentiate, setup_context=_setup)
torch.library.register_autograd("pysal::guided_relu_backward", _differentiate_backward, setup_context=_setup_backward)


def guided_relu(input: Tensor, upper: float = float("inf"), rule: str = "guided") -> tuple[Tensor, Tensor]:
    """Return min(max(input, 0), upper) and the bits that say where 0 < input < upper.

    The gradient of `output` with respect to `input` follows the rule, g being the gradient of `output`: "plain" is
    1[0 < input < upper] g, "guided" is 1[0 < input < upper] 1[g > 0] g, "deconvnet" is 1[g > 0] g. A factor of 0
    selects 0, also where g is NaN or infinite.

    Args:
        input: any shape; float32, float64, float16 or bfloat16. NaN gives NaN, with gate 0.
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
        refuse(where, "rule", f"be one of {', '.join(RULES)}", repr(rule))
    output, gates = torch.ops.pysal.guided_relu(input, upper, RULES[rule])
    return output, gates


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
    check_tensor(where, "grad_output", grad_output, dtypes=FLOATING)
    check_tensor(where, "gates", gates, dtypes=(torch.uint8,))
    if rule not in RULES:
        refuse(where, "rule", f"be one of {', '.join(RULES)}", repr(rule))
    if gates.shape != ((grad_output.numel() + 7) // 8,):
        refuse(where, "gates", f"have shape ({(grad_output.numel() + 7) // 8},)", f"shape {tuple(gates.shape)}")
    if gates.device != grad_output.device:
        refuse(where, "gates", f"be on {grad_output.device}", gates.device)
    if channels_last and grad_output.ndim != 4:
        refuse(where, "channels_last", "be False unless grad_output is 4-D", f"shape {tuple(grad_output.shape)}")
    grad: Tensor = torch.ops.pysal.guided_relu_backward(grad_output, gates, RULES[rule], channels_last)
    return grad
