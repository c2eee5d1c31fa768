"""Scaled dot product attention on the tape: it keeps query, key and value, and computes the weights anew on the way back.

csrc/cpu/simd/attention.cpp has the loops, for float32 on a CPU. What they do not take runs under autograd.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pysal import ops  # noqa: F401  loads the kernels
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.tape.gradients import Gradients
from pysal.engine.tape.operators import AutogradOperator

# Width of a head and number of keys that fill vectors.
_LANES = 16


@dataclass(frozen=True)
class _Attended:
    """What attention keeps: (N, heads, tokens, width) each, and the scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class AttentionOperator(AutogradOperator):
    """Attention without a mask."""

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        given = [values[source] for source in self.node.args[:3]]  # type: ignore[index]
        if not fits(*given):
            return super().run(values, needed)
        query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in given)
        chosen: Any = self.node.kwargs.get("scale")
        scale = 1 / math.sqrt(query.shape[3]) if chosen is None else chosen
        output = torch.ops.pysal_attention.attention(query, key, value, scale)
        return output.transpose(1, 2), _Attended(query, key, value, scale)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Attended):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        grad = grad.float()
        # a row of an expanded gradient, as of a mean, lies nowhere
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        parts = torch.ops.pysal_attention.attention_backward(grad, saved.query, saved.key, saved.value, saved.scale)
        for source, part in zip(self.node.args[:3], parts, strict=True):
            gradients.add(source, part.transpose(1, 2).to(gradients.dtype), owned=True)  # type: ignore[arg-type]

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        return (saved.query, saved.key, saved.value) if isinstance(saved, _Attended) else super().parts(saved)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(()) if isinstance(saved, _Attended) else super().graphs(saved)


def available() -> bool:
    """Say whether the kernels are compiled."""
    return hasattr(torch.ops.pysal_attention, "attention")


def fits(query: Any, key: Any, value: Any) -> bool:
    """Say whether the kernels take what attention is given."""
    if not all(isinstance(each, Tensor) and each.ndim == 4 and each.numel() for each in (query, key, value)):
        return False
    if not all(each.dtype == torch.float32 and each.device.type == "cpu" for each in (query, key, value)):
        return False
    (images, heads, _, width), keys = query.shape, key.shape[2]
    alike = tuple(key.shape) == tuple(value.shape) == (images, heads, keys, width)
    return alike and width % _LANES == 0 and keys >= _LANES and available()


def attention_operator(interpreter: fx.Interpreter, node: fx.Node) -> AttentionOperator | None:
    """Return what a node does that is attention without a mask; None for another."""
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention or len(node.args) < 3:
        return None
    names = ("attn_mask", "dropout_p", "is_causal")
    given = {"scale": None, "enable_gqa": False} | dict(zip(names, node.args[3:], strict=False)) | node.kwargs
    plain = given.get("attn_mask") is None and not given.get("is_causal") and not given["enable_gqa"]
    scale = given["scale"]
    known = given.get("dropout_p", 0) == 0 and (scale is None or (isinstance(scale, (int, float)) and scale > 0))
    nodes = all(isinstance(each, fx.Node) for each in node.args[:3])
    return AttentionOperator(interpreter, node) if plain and known and nodes and len(node.args) <= 6 else None
