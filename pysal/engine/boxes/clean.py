"""One image through a graph, node by node, with the value of every node."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.running.states import leave_inference_mode, restoring


class NotIncremental(Exception):
    """The graph cannot be run incrementally; the message says why."""


class Nodes:
    """The nodes of a graph, each to be called by itself.

    Args:
        graph: the graph; it is not changed.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._in_place: set[fx.Node] = set()  # whose first argument is copied, because it is a clean map

    @property
    def writes(self) -> bool:
        """Whether a node writes into its argument, so that the values of a checked run are not all clean."""
        return bool(self._in_place)

    @restoring
    def run(self, image: Tensor, check: bool = False) -> dict[fx.Node, Any]:
        """Return the value of every node for an image; with `check`, refuse what is changed in place under a reader."""
        values: dict[fx.Node, Any] = {}
        versions: dict[fx.Node, int] = {}
        order = {node: position for position, node in enumerate(self._graph.graph.nodes)}
        leave_inference_mode()
        with torch.no_grad():
            image = image.clone(memory_format=torch.channels_last)
            for node in self._graph.graph.nodes:
                values[node] = self._value(node, values, image)
                if not check:
                    continue
                for other, version in versions.items():
                    if values[other]._version != version:
                        # earlier readers saw the value we keep; later ones would see the modified one
                        if other.op == "get_attr" or any(order[user] > order[node] for user in other.users):
                            raise NotIncremental("one of its operations changes in place what others read")
                        versions[other] = values[other]._version
                        self._in_place.add(node)
                if isinstance(values[node], Tensor) and not values[node].is_inference():
                    versions[node] = values[node]._version
        return values

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], image: Tensor) -> Any:
        if node.op == "placeholder":
            return image
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._graph)
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda each: values[each])
        return self.call(node, *fx.node.map_arg((node.args, node.kwargs), lambda each: values[each]))

    def call(self, node: fx.Node, args: Any, kwargs: Any, *, owned: bool = False) -> Any:
        """Return what a node makes of arguments, which it does not change, but for the first where that is `owned`."""
        if node in self._in_place and not owned:
            args = (args[0].clone(), *args[1:])
        if node.op == "call_module":
            return self._graph.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
