"""Gradients on their way from the output of a graph to its input, and the gates of ReLUs that they go through."""

import torch
from torch import Tensor, fx

from pysal import ops
from pysal.engine.model.relu_rules import ReluRule


class Gates:
    """The gates of a ReLU's output, a bit each, in its memory order."""

    def __init__(self, bits: Tensor, rows: int, *, channels_last: bool) -> None:
        self.bits, self.rows, self.channels_last = bits, rows, channels_last

    @classmethod
    def of(cls, output: Tensor, bits: Tensor) -> "Gates":
        """Return the bits as the gates of an output."""
        return cls(bits, len(output), channels_last=output.ndim == 4 and not output.is_contiguous())

    def mask(self, grad: Tensor, rule: ReluRule, *, owned: bool) -> Tensor:
        """Return what the rule lets pass, in a tensor that may be overwritten."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        grad = grad.contiguous(memory_format=order) if owned else grad.clone(memory_format=order)
        for part in grad.split(self.rows) if len(grad) > self.rows else (grad,):
            ops.guided_relu_backward_(part, self.bits, rule, channels_last=self.channels_last)
        return grad


class Gradients:
    """Gradients on their way down, by node and, where a node returns several tensors, by position.

    Attributes:
        gates: of ReLUs, by the node that returns their output, where whoever makes the last part of a gradient may let the sum
            through them, and takes them away.
        dtype: of gradients of real values; those of complex values have the values' own.
    """

    def __init__(self, needed: set[fx.Node], gates: dict[fx.Node, Gates], dtype: torch.dtype) -> None:
        self._needed, self.gates, self.dtype = needed, gates, dtype
        self._held: dict[tuple[fx.Node, int], tuple[Tensor, bool]] = {}
        self._several: set[fx.Node] = set()  # with gradients at other positions than the first

    def add(self, node: fx.Node, grad: Tensor, *, owned: bool, position: int = 0) -> None:
        """Add to a node's gradient; `owned` says that nobody else needs the tensor, so that it may be overwritten."""
        if node not in self._needed:
            return
        before, before_owned = self._held.get((node, position), (None, False))
        if before is not None:
            if before_owned:
                grad = before.add_(grad)
            else:
                grad = grad.add_(before) if owned else before + grad
            owned = True
        self._held[node, position] = grad, owned
        if position:
            self._several.add(node)

    def pop(self, node: fx.Node, position: int = 0) -> tuple[Tensor | None, bool]:
        """Return a node's gradient, None where nothing depends on the node, and whether it may be overwritten."""
        return self._held.pop((node, position), (None, False))

    def pop_owned(self, node: fx.Node) -> Tensor | None:
        """Return a node's gradient so far if there is one that may be overwritten."""
        grad, owned = self._held.get((node, 0), (None, False))
        return self.pop(node)[0] if owned and grad is not None else None

    def holds(self, node: fx.Node) -> bool:
        """Say whether something was added to a node's gradient."""
        return (node, 0) in self._held

    def reached(self, node: fx.Node) -> bool:
        """Say whether something was added to the gradient of a tensor that a node returns after its first."""
        return node in self._several

    def needed(self, node: fx.Node) -> bool:
        """Say whether a node's gradient is of use."""
        return node in self._needed
