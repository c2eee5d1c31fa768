"""Gradients of scores, without what `torch.autograd.grad` costs beside the pass.

That looks through its arguments, in which there may be a mistake: for a small network it takes as long as a layer.
"""

from typing import Any

import torch
from torch import Tensor

_engine: Any = torch.autograd.Variable._execution_engine


def gradients(
    scores: Tensor, sources: tuple[Tensor, ...], seeds: Tensor | None = None, *, keep_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradient of the sum of scores at each of some tensors, None where they do not depend on it.

    Args:
        scores: of any shape, which require their gradient.
        sources: tensors of their graph.
        seeds: what each score counts, of their shape; None = 1.
        keep_graph: whether the graph is needed again.
    """
    seeds = torch.ones_like(scores) if seeds is None else seeds
    if type(scores) is Tensor and all(type(one) is Tensor for one in sources):
        found: tuple[Tensor | None, ...] = _engine.run_backward(
            (scores,), (seeds,), keep_graph, False, sources, True, accumulate_grad=False
        )
        return found
    return torch.autograd.grad(scores, sources, seeds, retain_graph=keep_graph, allow_unused=True)
