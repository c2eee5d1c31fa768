"""What shapes the values of a graph have, noted while it runs for another reason: a pass for them alone is a pass too many."""

from typing import Any

import torch
from torch import Tensor, fx

# where the shape of a node's value is in its `meta`
SHAPE = "shape"


def note_shapes(graph: fx.GraphModule) -> fx.Interpreter:
    """Return what runs a graph and notes the shapes of its floating tensors, for `shapes_of` it or of a copy."""
    return _Noting(graph)


def shapes_of(graph: fx.GraphModule, example: Tensor) -> dict[Any, tuple[int, ...]]:
    """Return the shape of every node that gives a floating tensor, for at least two images like an example (B, C, H, W).

    What is the same for all images shows in them.
    """
    if not any(node.op == "placeholder" and SHAPE in node.meta for node in graph.graph.nodes):
        with torch.no_grad():
            note_shapes(graph).run(example.repeat(2, 1, 1, 1) if len(example) == 1 else example)
    return {node: node.meta[SHAPE] for node in graph.graph.nodes if SHAPE in node.meta}


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            n.meta[SHAPE] = tuple(result.shape)
        return result
