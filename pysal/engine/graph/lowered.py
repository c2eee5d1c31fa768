"""Puts a folded graph's convolutions, what can be fused into them, and its linear layers into modules made for this machine."""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal._library import without_autocast
from pysal.engine.graph.fold import Convolution, constant, fold_division, module_of, replace_by_module
from pysal.engine.graph.fused_attention import fuse_attention
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import LEAST_TOKENS, FusedLinear
from pysal.engine.graph.graph_module import remove_unread
from pysal.engine.graph.shapes import shapes_of

_ADDITIONS = (operator.add, torch.add)
# In the names of what decides between values: maxima, minima and ranks, of which a rounding error may change the place.
_COMPARISONS = ("max", "min", "sort", "topk", "median", "mode", "quantile", "kthvalue", "unique")


class InDtype(nn.Module):
    """A lowered graph in its own dtype, whatever the images' is and whatever autocast is on.

    Args:
        graph: the graph.
        dtype: of its weights.
    """

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.graph, self.dtype = graph, dtype

    def forward(self, images: Tensor) -> Tensor:
        """Return what the graph does, in the images' dtype."""
        with without_autocast(images.device.type):
            result: Tensor = self.graph(images.to(self.dtype))
        return result.to(images.dtype)


def lower(graph: fx.GraphModule, example: Tensor, backward_dtype: torch.dtype = torch.float32) -> int:
    """Replace convolutions, with what can be fused into them, and linear layers of a folded graph, in place; return how many.

    Args:
        graph: a graph made by `fold`.
        example: (1, C, H, W), whose shapes the weights are arranged for.
        backward_dtype: dtype of the input gradients' convolutions.
    """
    shapes = shapes_of(graph, example)
    fold_division(graph, shapes)
    compared = _compared(graph)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    lowered = 0
    for node in list(graph.graph.nodes):
        convolution = module_of(graph, node)
        if not isinstance(convolution, Convolution) or node.args[0] not in shapes:
            continue
        last, inputs = node, [node.args[0]]
        inner = [(name, run, "convolution") for name, run in node.meta.get("layers", ())]
        addition = _only_user(last)
        if addition is not None and is_addition(addition) and addition.args[0] is not addition.args[1]:
            shortcut: Any = addition.args[1] if addition.args[0] is node else addition.args[0]
            if order[shortcut] < order[node] and shapes.get(shortcut) == shapes[node]:
                last, inputs = addition, [node.args[0], shortcut]
                inner += [(name, run, "sum") for name, run in addition.meta.get("layers", ())]
        upper = None
        activation = _only_user(last)
        if activation is not None and (upper := relu_upper(graph, activation)) is not None:
            last = activation
        fused = FusedConvolution(convolution, upper, shapes[node.args[0]][1:], backward_dtype, compared=node in compared)
        new = replace_by_module(graph, last, fused, *inputs)
        new.meta["inner_layers"] = inner
        order[new], shapes[new] = order[last], shapes[last]
        lowered += 1
    images = next(shapes[node][0] for node in graph.graph.nodes if node.op == "placeholder" and node in shapes)
    for node in list(graph.graph.nodes):
        linear = _linear(graph, node)
        if linear is None or linear[0] not in shapes:
            continue
        source, weight, bias = linear
        tokens = math.prod(shapes[source][:-1]) // images  # of an image: shapes are of several
        if tokens >= LEAST_TOKENS:
            new = replace_by_module(graph, node, FusedLinear(weight, bias, backward_dtype), source)
            shapes[new] = shapes[node]
            lowered += 1
    lowered += fuse_attention(graph, shapes, example)
    for node in graph.graph.nodes:
        if is_addition(node):
            first, second = (shapes.get(arg) for arg in node.args)
            node.meta["same_shapes"] = first is not None and first == second
    remove_unread(graph)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return lowered


def _linear(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor, Tensor | None] | None:
    """Return input, weight and bias of a node that is a linear layer with constant weights."""
    module = module_of(graph, node)
    if type(module) is nn.Linear:
        source = node.args[0] if node.args else node.kwargs["input"]
        return source, module.weight, module.bias  # type: ignore[return-value]
    if node.op == "call_function" and node.target is F.linear:
        given: dict[str, Any] = {"bias": None} | dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weight, bias = constant(graph, given["weight"]), constant(graph, given["bias"])
        if weight is not None and weight.ndim == 2 and (bias is None) == (given["bias"] is None):
            return given["input"], weight, bias
    return None


def _compared(graph: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values, or what is made of them, something compares: max pooling, sorting and their like."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        target = type(module_of(graph, node)) if node.op == "call_module" else node.target
        name = str(getattr(target, "__name__", target)).lower().replace("softmax", "")
        if any(word in name for word in _COMPARISONS) or any(user in found for user in node.users):
            found.add(node)
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def is_addition(node: fx.Node) -> bool:
    """Say whether a node adds two others, and nobody sees one of them changed by it."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    if node.target in (operator.iadd, "add_"):  # changes its first argument, which nobody else may be waiting for
        return isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1
    return (node.op == "call_function" and node.target in _ADDITIONS) or (node.op == "call_method" and node.target == "add")


def relu_upper(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """Return where a ReLU node saturates, infinity for a plain one, or None where the node is no ReLU.

    A clamp is none: at its bounds its gate is open.
    """
    module = module_of(graph, node)
    if isinstance(module, nn.ReLU6):
        return 6.0
    if isinstance(module, nn.ReLU):
        return float("inf")
    if isinstance(module, nn.Hardtanh):
        return _between(module.min_val, module.max_val)
    if isinstance(module, nn.Threshold):
        return float("inf") if module.threshold == module.value == 0 else None
    if node.op == "call_method":
        return float("inf") if node.target in ("relu", "relu_") else None
    if node.op != "call_function":
        return None
    if node.target in (F.relu, torch.relu, torch.relu_):
        return float("inf")
    if node.target is F.relu6:
        return 6.0
    if node.target in (F.hardtanh, F.hardtanh_):
        given = {"min_val": -1.0, "max_val": 1.0} | dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | node.kwargs
        return _between(given["min_val"], given["max_val"])
    if node.target in (F.threshold, torch.threshold):
        given = dict(zip(("threshold", "value"), node.args[1:], strict=False)) | node.kwargs
        return float("inf") if given["threshold"] == given["value"] == 0 else None
    return None


def _between(lower: Any, upper: Any) -> float | None:
    """Return the upper limit of a Hardtanh that is a ReLU."""
    known = isinstance(lower, (int, float)) and isinstance(upper, (int, float))
    return float(upper) if known and lower == 0 and upper > 0 else None


def is_mean_of_map(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node is the mean of each channel over the whole map."""
    module = module_of(graph, node)
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        size = node.args[1] if len(node.args) > 1 else node.kwargs["output_size"]
        return size in (1, (1, 1), [1, 1])
    if (node.op == "call_method" and node.target == "mean") or (node.op == "call_function" and node.target is torch.mean):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if len(node.args) > 3 or set(node.kwargs) - {"dim", "keepdim"} or not isinstance(dims, (tuple, list)):
            return False
        return sorted(dim % 4 for dim in dims if isinstance(dim, int)) == [2, 3] and len(dims) == 2
    return False
