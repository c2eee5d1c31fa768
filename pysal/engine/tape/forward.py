"""A program's graph for passes that nobody differentiates: blocks run at once, and nothing is kept."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pysal.engine.tape.operators import BlockOperator
from pysal.engine.tape.smooth import SmoothBlockOperator
from pysal.engine.tape.tape import Program


class AtOnce(nn.Module):
    """A block as one module of a graph."""

    def __init__(self, operator: BlockOperator | SmoothBlockOperator) -> None:
        super().__init__()
        self._operator = operator

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the value of the block's last node."""
        return self._operator.forward(*inputs)[0]


def forward_graph(graph: fx.GraphModule, program: Program) -> fx.GraphModule:
    """Return the graph of a program with its blocks as modules; all else is that of the graph, and shared with it."""
    whole = program.blocks_around(())
    blocks = {last: block for last, block in whole.items() if isinstance(block, (BlockOperator, SmoothBlockOperator))}
    if not blocks:
        return graph
    inner = {member for last, block in blocks.items() for member in block.members if member is not last}
    parts: dict[str, Any] = {}
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node in inner:
            continue
        if node in blocks:
            name = f"{node.name}_at_once"
            parts[name] = AtOnce(blocks[node])
            copies[node] = copied.call_module(name, tuple(copies[source] for source in blocks[node].inputs))
            continue
        copies[node] = copied.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = attrgetter(str(node.target))(graph)
    return fx.GraphModule(parts, copied)
