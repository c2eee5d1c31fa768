"""Attention as softmax(Q K^T / sqrt(d)) V, whatever a model calls it: its weights can be seen, and differentiated twice.

torch runs attention in one piece, out of which the weights do not come and whose derivative has none of its own. While a mode
of this module is on, the same calls run as the formula that they stand for. Models are not looked at: what counts is what they
call, `scaled_dot_product_attention`, torch's own multi-head attention, or a softmax of their own.
"""

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal.engine.running.states import FunctionMode

_FUSED = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.ops.aten.softmax.int)

# What is shown the weights of each attention, (..., N, M), as they are in the graph.
See = Callable[[Tensor], None]


class SpelledOut(FunctionMode):
    """Has attention run as its formula.

    Args:
        see: shown the weights of each attention, and the result of every softmax of three or four dimensions over the last.
    """

    def __init__(self, see: See | None = None) -> None:
        super().__init__()
        self._see = see

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the formula's result for attention that torch runs in one piece, and anything else as it is."""
        if func in _FUSED:
            return _attention(self._see, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _opened(func, self._see)(*args, **kwargs)
        result = func(*args, **kwargs)
        if self._see is not None and func in _SOFTMAX and isinstance(result, Tensor):
            _show(self._see, result, kwargs.get("dim", args[1] if len(args) > 1 else None))
        return result


def _show(see: See, weights: Tensor, dim: object) -> None:
    if weights.ndim in (3, 4) and dim in (-1, weights.ndim - 1):
        see(weights)


def _attention(
    see: See | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `torch.nn.functional.scaled_dot_product_attention` does, by the formula of its documentation."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask.to(scores.dtype)
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # may be looked at: such a row is zero, as torch has it
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    if see is not None:
        see(weights)
    return (torch.dropout(weights, dropout_p, True) if dropout_p else weights) @ value


def _opened(func: Any, see: See | None) -> Callable[..., Any]:
    """Return torch's multi-head attention with the functions of this module in the places of those that it calls.

    A mode is off while it runs what it replaces, so the calls inside would pass it by.
    """

    def softmax(input: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
        weights: Tensor = F.softmax(input, dim, *args, **kwargs)
        if see is not None:
            _show(see, weights, dim)
        return weights

    names = {
        **func.__globals__,
        "has_torch_function": lambda _tensors: False,
        "scaled_dot_product_attention": functools.partial(_attention, see),
        "softmax": softmax,
    }
    opened = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened
