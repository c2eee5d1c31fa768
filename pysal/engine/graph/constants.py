"""Computes what a graph computes from its weights alone once: it is the same for all images.

Biases of relative positions, position embeddings that are brought to the images' size, standardised and normalised weights.
What is computed so lies among the weights then, where folding and lowering find it.
"""

from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from pysal._library import without_autocast
from pysal.engine.graph.graph_module import remove_unread, writes

# Modules that a constant may pass through; others may hold a state.
_MODULES = (nn.Linear, nn.LayerNorm, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Identity)
_RANDOM = ("rand", "dropout", "rrelu", "bernoulli", "multinomial", "poisson")
_NOT_KEPT = ("normal", "empty", "empty_like", "empty_strided", "new_empty", "set_", "setattr")
# What makes a tensor of nothing but numbers.
_MADE = tuple(f"aten::{name}" for name in ("arange", "zeros", "ones", "full", "scalar_tensor", "eye"))
_MOST_MADE = 1 << 20
# Numbers that a value may have for each that it is made of: more would rather be computed than kept.
MOST_PER_NUMBER = 64


def fold_constants(graph: fx.GraphModule) -> None:
    """Put the values of nodes that depend on weights alone in their place, in place; nothing where a node writes into one."""
    values: dict[fx.Node, Any] = {}
    written = any(map(writes, graph.graph.nodes))  # perhaps what was made for it
    interpreter = fx.Interpreter(graph)
    with torch.no_grad(), without_autocast("cpu"):
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                values[node] = interpreter.get_attr(node.target, (), {})
            elif _is_made(node) if not node.all_input_nodes else node.op in ("call_function", "call_method", "call_module"):
                if written and not node.all_input_nodes:
                    continue
                if not all(source in values for source in node.all_input_nodes):
                    if writes(node) and node.args[0] in values:
                        return
                    continue
                if not _is_pure(graph, node):
                    if writes(node):
                        return
                    continue
                try:
                    args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
                    values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
                except Exception:  # the pass itself will say it
                    continue
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" or node not in values or all(user in values for user in node.users):
            continue
        value = values[node]
        if not isinstance(value, Tensor) or value.is_sparse or not _is_worth_keeping(node, values):
            continue
        name = f"constant_{node.name}"
        graph.register_buffer(name, value.detach())
        with graph.graph.inserting_after(node):
            new = graph.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    remove_unread(graph)


def _is_worth_keeping(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Say whether a value is not much larger than what it is made of."""
    sources, pending = set[fx.Node](), [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in sources:
                sources.add(source)
                pending.append(source)
    fetched = [values[source] for source in sources if source.op == "get_attr"]
    weights = sum(value.numel() for value in fetched if isinstance(value, Tensor))
    numbers: int = values[node].untyped_storage().nbytes() // values[node].element_size()  # of what is expanded, once
    return bool(numbers <= max(MOST_PER_NUMBER * weights, 0 if fetched else _MOST_MADE))


def _is_made(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.name in _MADE


def _is_pure(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node gives the same for the same, and does nothing else."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        hooked = module._forward_hooks or module._forward_pre_hooks
        return type(module) in _MODULES and not getattr(module, "inplace", False) and not hooked
    if writes(node) or "out" in node.kwargs:
        return False
    if isinstance(node.target, OpOverload):
        return node.target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in node.target.tags
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in _NOT_KEPT or any(word in name for word in _RANDOM):
        return False
    home = getattr(node.target, "__module__", None) or ""
    known = home.partition(".")[0] in ("torch", "_operator", "operator") or isinstance(node.target, BuiltinFunctionType)
    return known or node.op == "call_method"
