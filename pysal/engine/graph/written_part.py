"""Turns writes into a part of a map into values of their own, so that each node of a graph gives one and changes none.

`maps[:, 0].mul_(3)` changes what later nodes read under the name of `maps`. Here one node makes the changed map of the one
before it, and whoever read the map or a view of it after the write reads that.
"""

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from pysal.engine.graph.graph_module import is_in_place
from pysal.engine.graph.shapes import SHAPE

_METHODS = ("chunk", "flatten", "movedim", "mT", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes")
_MORE = ("t", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as")
_VIEWS = {getattr(torch, name) for name in (*_METHODS, *_MORE) if hasattr(torch, name)} | {*_METHODS, *_MORE}


@dataclass(frozen=True)
class _Given:
    """Stands for an argument that is another node's value."""

    place: int


@dataclass(frozen=True)
class _Call:
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, first: Any, others: tuple[Any, ...]) -> Any:
        def fill(part: Any) -> Any:
            return fx.node.map_aggregate(part, lambda each: others[each.place] if isinstance(each, _Given) else each)

        args, kwargs = fill(self.args), fill(self.kwargs)
        if self.op == "call_method":
            return getattr(first, self.target)(*args, **kwargs)
        return self.target(first, *args, **kwargs)


class WrittenPart(nn.Module):
    """A copy of a tensor of which a part, a view of a view of it, is written.

    Args:
        steps: from the tensor to the part.
        write: what writes into the part.
    """

    def __init__(self, steps: list[_Call], write: _Call) -> None:
        super().__init__()
        self._steps, self._write = steps, write

    def forward(self, whole: Tensor, *others: Any) -> Tensor:
        """Return what the tensor is after the write; other values that the calls take follow it."""
        part = written = whole.clone(memory_format=torch.contiguous_format)  # in which maps can be looked at as rows
        for step in self._steps:
            part = step.on(part, others)
        self._write.on(part, others)
        return written


def return_what_is_written(graph: fx.GraphModule) -> None:
    """Give every write into what is read later, under another name or the same, a node that returns the result, in place.

    Layers that returned what is written are not among the graph's any more.

    A graph whose shapes were not noted, or that shares memory in ways not known here, is left to do as it does.
    """
    order: dict[fx.Node, float] = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node in [node for node in graph.graph.nodes if is_in_place(graph, node) and not _has_rules(graph, node)]:
        chain, root = list[fx.Node](), node.args[0]
        while isinstance(root, fx.Node) and _is_view(root):
            chain.insert(0, root)
            root = root.args[0]
        if not isinstance(root, fx.Node) or len(root.meta.get(SHAPE, ())) == 0:
            continue
        family, pending = [root], [root]
        while pending:
            views = [user for user in pending.pop().users if order[user] < order[node] and _is_view(user)]
            family += views
            pending += views
        later = {member: [user for user in member.users if order[user] > order[node]] for member in family}
        if any(later.values()):
            _return(graph, node, root, chain, later, order)


def _return(
    graph: fx.GraphModule,
    node: fx.Node,
    root: fx.Node,
    chain: list[fx.Node],
    later: dict[fx.Node, list[fx.Node]],
    order: dict[fx.Node, float],
) -> None:
    """Put a `WrittenPart` in the place of a write.

    Args:
        graph: the graph.
        node: what writes.
        root: the tensor of which a part is written.
        chain: the views on the way to the part.
        later: of the tensor and its views: who reads them after the write.
        order: of the nodes, of which new ones are added.
    """
    others: list[fx.Node] = []

    def place(argument: fx.Node) -> Any:
        if argument not in others:
            others.append(argument)
        return _Given(others.index(argument))

    def call(step: fx.Node) -> _Call:
        args, kwargs = fx.node.map_arg(step.args[1:], place), fx.node.map_arg(dict(step.kwargs), place)
        target = copy.deepcopy(graph.get_submodule(str(step.target))) if step.op == "call_module" else step.target
        return _Call(step.op, target, args, dict(kwargs))

    for member in later:
        member.meta.pop("layers", None)  # a module may have returned it before the write or after: only the model knows
    name = f"written_{node.name}"
    graph.add_submodule(name, WrittenPart([call(step) for step in chain], call(node)))
    with graph.graph.inserting_before(node):
        whole = graph.graph.call_module(name, (root, *others))
        whole.meta[SHAPE] = root.meta[SHAPE]
        order[whole] = order[node] + 0.5
        again = {root: whole}

        for member, readers in later.items():
            for reader in readers:
                reader.replace_input_with(member, _anew(graph, member, again, order, order[whole]))
        if node.users:
            result = _anew(graph, chain[-1] if chain else root, again, order, order[whole])
            result.meta["layers"] = [*result.meta.get("layers", ()), *node.meta.get("layers", ())]
            node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _anew(
    graph: fx.GraphModule, view: fx.Node, again: dict[fx.Node, fx.Node], order: dict[fx.Node, float], place: float
) -> fx.Node:
    """Return what shows the part of a view after a write, made where nodes are being inserted.

    Args:
        graph: the graph.
        view: a view of the tensor before the write, or the tensor.
        again: the tensor and its views before the write -> after it; what is made is added.
        order: of the nodes, of which new ones are added.
        place: of new nodes in that order.
    """
    if view not in again:
        held = view.args[0]
        assert isinstance(held, fx.Node)
        source = _anew(graph, held, again, order, place)
        again[view] = new = graph.graph.create_node(view.op, view.target, (source, *view.args[1:]), dict(view.kwargs))
        new.meta = {key: value for key, value in view.meta.items() if key == SHAPE}
        order[new] = place
    return again[view]


def _has_rules(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node may be an activation that guided rules know, which they would not find within another node."""
    target = type(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    name = str(getattr(target, "__name__", target)).lower()
    return any(word in name for word in ("elu", "hardtanh", "threshold"))


def _is_view(node: fx.Node) -> bool:
    """Say whether a node's value shares the memory of its first argument, as far as can be seen."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(each is None or each is ... or isinstance(each, (int, slice)) for each in index)
    if isinstance(node.target, OpOverload):
        schema = node.target._schema
        return not schema.is_mutable and schema.arguments[0].alias_info is not None
    return node.target in _VIEWS
