"""Gradients meet torch's batch norm in an order of memory that its backward pass reads right.

`F.instance_norm` runs batch norm on a view of its input. For one image that view has the image's own shape, so a gradient whose
channels come last arrives at batch norm as it is, beside an input whose channels come first, and torch 2.13 mixes the two up:
the result is another gradient altogether. Channels come last wherever weights do, in prepared models, say. Several images are
not concerned, for their gradients are copied on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MIXED_UP = "NativeBatchNormBackward0"
# A tensor that requires its gradient: the end of a way back.
END: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def lay_out(score: Tensor, rows: int) -> None:
    """Have gradients of a score, of a pass of so many rows, made contiguous ahead of batch norm."""
    if rows <= 1:
        lay_out_at(nodes_behind(score))


def lay_out_at(nodes: Sequence[Any]) -> None:
    """Do so for the autograd nodes of a pass of one row."""
    for node in nodes:
        if type(node).__name__ == _MIXED_UP:
            node.register_prehook(_contiguous)


def nodes_behind(score: Tensor) -> list[Any]:
    """Return the autograd nodes of all operations that led to a score."""
    found: list[Any] = [] if score.grad_fn is None else [score.grad_fn]
    seen: set[Any] = {None, *found}
    for node in found:  # which grows
        for before, _ in node.next_functions:
            if before not in seen:
                seen.add(before)
                if type(before) is not END:
                    found.append(before)
    return found


def _contiguous(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(one if one is None else one.contiguous() for one in gradients)
