"""Attention on the tape: it keeps query, key and value, and computes the weights anew on the way back.

What the kernels do not take runs under autograd.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.graph.fused_attention import FusedAttention
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.tape.gradients import Gradients
from pysal.engine.tape.operators import AutogradOperator


@dataclass(frozen=True)
class _Attended:
    """What attention keeps: (N, heads, tokens, width) each."""

    query: Tensor
    key: Tensor
    value: Tensor


class AttentionOperator(AutogradOperator):
    """Attention without a mask, or with one that is the same for all images."""

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, module: FusedAttention) -> None:
        super().__init__(interpreter, node)
        self.module = module

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        given = [values[source] for source in self.node.args]  # type: ignore[index]
        if not self.module.fits(*given):
            return super().run(values, needed)
        query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in given)
        return self.module(query, key, value), _Attended(query, key, value)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Attended):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        grad = grad.float()
        # a row of an expanded gradient, as of a mean, lies nowhere
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        given = (saved.query, saved.key, saved.value)
        parts = torch.ops.pysal_attention.attention_backward(grad, *given, self.module.bias, self.module.scale)
        for source, part in zip(self.node.args, parts, strict=True):
            gradients.add(source, part.transpose(1, 2).to(gradients.dtype), owned=True)  # type: ignore[arg-type]

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        return (saved.query, saved.key, saved.value) if isinstance(saved, _Attended) else super().parts(saved)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(()) if isinstance(saved, _Attended) else super().graphs(saved)
