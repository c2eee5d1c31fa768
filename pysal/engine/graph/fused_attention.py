"""Attention in one node, however a network spells it: torch's function, or products, biases, masks and softmax one by one.

csrc/cpu/simd/attention.cpp has the loops, for float32 on a CPU; elsewhere the formula runs.
"""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal import ops  # noqa: F401  loads the kernels
from pysal.engine.graph.fold import constant, module_of, replace_by_module
from pysal.engine.graph.graph_module import remove_unread

# Width of a head and number of keys that fill vectors.
_LANES = 16
_PRODUCTS = (torch.matmul, operator.matmul, "matmul", "__matmul__")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FACTORS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_EXPANSIONS = (torch.ops.aten.expand.default, "expand")
_RESHAPES = (torch.reshape, "reshape", "view")
_TRANSPOSITIONS = (torch.transpose, "transpose")
_MASKS = (torch.masked_fill, "masked_fill", "masked_fill_")
# Weights of scores that a mask puts so low are zero in float32, whatever the scores that are left.
_OUT_OF_REACH = -1e4


class FusedAttention(nn.Module):
    """softmax(scale Q K^T + bias) V.

    Args:
        scale: a number, above zero where there is no bias.
        bias: (windows, 1 or heads, queries, keys); image n has that of window n % windows. None for no bias.
    """

    bias: Tensor | None

    def __init__(self, scale: float, bias: Tensor | None) -> None:
        super().__init__()
        self.scale = scale
        # the kernels read whole vectors
        self.register_buffer("bias", None if bias is None else F.pad(bias, (0, -bias.shape[3] % _LANES), value=-math.inf))

    def fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Say whether the kernels take what attention is given."""
        numbers = (query, key, value) if self.bias is None else (query, key, value, self.bias)
        if not all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in numbers):
            return False
        return available() and fits(tuple(query.shape), tuple(key.shape), tuple(value.shape))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (N, heads, queries, width of the values); autograd follows what the kernels do not take."""
        if self.fits(query, key, value):
            query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
            result: Tensor = torch.ops.pysal_attention.attention(query, key, value, self.bias, self.scale)
            return result.transpose(1, 2)
        scores = query @ key.transpose(2, 3) * self.scale
        if self.bias is not None:
            bias = self.bias[..., : key.shape[2]].to(scores.dtype)
            scores = (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
        return torch.softmax(scores, -1) @ value


def available() -> bool:
    """Say whether the kernels are compiled."""
    return hasattr(torch.ops.pysal_attention, "attention")


def fits(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> bool:
    """Say whether the kernels take such shapes."""
    if not len(query) == len(key) == len(value) == 4:
        return False
    alike = query[:2] == key[:2] == value[:2] and query[3] == key[3] and key[2] == value[2]
    return alike and key[2] >= _LANES and not query[3] % _LANES and not value[3] % _LANES


def fuse_attention(graph: fx.GraphModule, shapes: dict[Any, tuple[int, ...]], example: Tensor) -> int:
    """Put attention of constant biases and masks into nodes of their own, in place, and return how many.

    Args:
        graph: the graph.
        shapes: of its nodes, of which new ones are added.
        example: an image; nothing is done for other devices than a CPU.
    """
    if example.device.type != "cpu" or not available():
        return 0
    count = 0
    for node in list(graph.graph.nodes):
        found = _called(graph, node, shapes) or _spelt_out(graph, node, shapes)
        if found is not None:
            inputs, scale, bias = found
            given = [shapes[each] for each in inputs]
            if fits(*given) and _is_bias_of(bias, scale, *given[:2]):
                new = replace_by_module(graph, node, FusedAttention(scale, bias), *inputs)
                shapes[new] = shapes[node]
                count += 1
    remove_unread(graph)
    return count


def _is_bias_of(bias: Tensor | None, scale: float, query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    if bias is None:
        return scale > 0
    windows, heads, *rest = bias.shape
    # a query that sees no key has weights that are no numbers, or what torch makes of them
    sees = not bias.isnan().any() and bool((bias > -math.inf).any(-1).all()) and not (bias == math.inf).any()
    return query[0] % windows == 0 and heads in (1, query[1]) and rest == [query[2], key[2]] and sees


_Found = tuple[list[fx.Node], float, Tensor | None]


def _called(graph: fx.GraphModule, node: fx.Node, shapes: dict[Any, tuple[int, ...]]) -> _Found | None:
    """Return query, key and value, scale and bias of a node that calls torch's function."""
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    inputs = [given.get(name) for name in names[:3]]
    if not all(isinstance(each, fx.Node) and len(shapes.get(each, ())) == 4 for each in inputs):
        return None
    if given["dropout_p"] != 0 or given["enable_gqa"]:
        return None
    query, key = shapes[inputs[0]], shapes[inputs[1]]
    scale, mask, bias = given["scale"], given["attn_mask"], None
    if scale is None:
        scale = 1 / math.sqrt(query[3])
    if mask is not None:
        mask = _of_all_images(graph, mask)
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device, dtype=torch.float32).masked_fill_(~mask, -math.inf)
        if mask.any():  # others hide nothing
            windows = mask.shape[0] if mask.ndim == 4 else 1
            bias = _by_window(mask[None] if windows > 1 else mask, windows, query, key)
            if bias is None:
                return None
    if given["is_causal"]:
        after = torch.ones(query[2], key[2], dtype=torch.bool, device="cpu").triu_(1)
        causal = torch.zeros(1, 1, query[2], key[2], dtype=torch.float32, device="cpu").masked_fill_(after, -math.inf)
        bias = causal if bias is None else bias + causal
    return (inputs, float(scale), bias) if isinstance(scale, (int, float)) else None  # type: ignore[return-value]


def _of_all_images(graph: fx.GraphModule, node: object) -> Tensor | None:
    """Return a mask that is the same for all images, (windows, ...) or broadcast to it; None for another.

    It may be a constant, one that is expanded to as many images as there are, or a sum of such.
    """
    value = constant(graph, node)
    if value is not None or not isinstance(node, fx.Node) or not node.args:
        return None if value is None or value.ndim > 4 else value.detach()
    first = node.args[0]
    if _is(node, _EXPANSIONS):
        value = constant(graph, first)
        return None if value is None or value.ndim > 4 or (value.ndim == 4 and len(value) != 1) else value.detach()
    if _is(node, _SUMS) and len(node.args) == 2 and not node.kwargs:
        parts = [_of_all_images(graph, each) for each in node.args]
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    if _is(node, _RESHAPES) and isinstance(first, fx.Node) and _is(first, _EXPANSIONS):  # (N, windows, ...) as (N windows, ...)
        value = constant(graph, first.args[0])
        shape: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
        if value is not None and value.ndim == 5 and len(value) == 1 and list(shape) == [-1, *value.shape[2:]]:
            return value[0].detach()
    return None


def _spelt_out(graph: fx.GraphModule, node: fx.Node, shapes: dict[Any, tuple[int, ...]]) -> _Found | None:
    """Return query, key and value, scale and bias of a node that is the last product of attention.

    The way goes back from there: softmax, sums with biases, masks and factors, the first product. Where windows have masks of
    their own, scores are (N, windows, heads, queries, keys) for as long as these are added.
    """
    if not _is(node, _PRODUCTS) or len(node.args) != 2:
        return None
    weights, value = node.args
    if not isinstance(weights, fx.Node) or not isinstance(value, fx.Node) or len(shapes.get(value, ())) != 4:
        return None
    at = _only_input(_softmax_input(graph, weights, shapes), weights) if len(weights.users) == 1 else None
    scale, bias, windows = 1.0, None, 1
    scores = shapes.get(weights, ())
    if len(scores) != 4:
        return None

    def add(more: Tensor | None) -> bool:
        nonlocal bias
        if more is not None:
            bias = more * scale if bias is None else bias + more * scale
        return more is not None

    while at is not None and shapes.get(at, ())[-2:] == scores[2:]:
        if _is(at, _PRODUCTS) and len(at.args) == 2 and shapes[at] == scores:
            query, turned = at.args
            if not isinstance(query, fx.Node) or not isinstance(turned, fx.Node) or len(shapes.get(turned, ())) != 4:
                return None
            query, factor = _scaled(query)
            if query not in shapes:
                return None
            return [query, _turned_back(graph, turned, shapes), value], scale * factor, bias
        first, second = at.args[0] if at.args else None, at.args[1] if len(at.args) > 1 else None
        if _is(at, _SUMS) and len(at.args) == 2 and not at.kwargs:
            other = constant(graph, second)
            inner = first if other is not None else second
            other = constant(graph, first) if other is None else other
            if other is None or not add(_by_window(other.detach(), windows, scores, scores[2:])):
                return None
        elif _is(at, _MASKS) and len(at.args) == 3 and not at.kwargs:
            mask, low, inner = constant(graph, second), at.args[2], first
            if (
                mask is None
                or mask.dtype != torch.bool
                or not isinstance(low, (int, float))
                or not low * scale <= _OUT_OF_REACH
            ):
                return None
            hidden = torch.zeros(mask.shape, device=mask.device, dtype=torch.float32).masked_fill_(mask, -math.inf)
            if not add(_by_window(hidden, windows, scores, scores[2:])):
                return None
        elif _is(at, (*_FACTORS, *_QUOTIENTS)):
            inner, factor = _scaled(at)
            if inner is at:
                return None
            scale *= factor
        elif _is(at, _RESHAPES):
            inner = first
            before, after = shapes.get(inner, ()), shapes[at]
            if len(before) == 5 and after == scores and before[0] * before[1] == scores[0] and before[2:] == scores[1:]:
                windows = before[1]
            elif before == scores and len(after) == 5 and after[1:] == (windows, *scores[1:]):
                windows = 1
            else:
                return None
        else:
            return None
        at = _only_input(inner, at)
    return None


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _only_input(source: object, user: fx.Node) -> fx.Node | None:
    """Return a node that nobody else reads."""
    return source if isinstance(source, fx.Node) and list(source.users) == [user] else None


def _softmax_input(graph: fx.GraphModule, node: fx.Node, shapes: dict[Any, tuple[int, ...]]) -> object:
    """Return what a node is the softmax over the last axis of."""
    module = module_of(graph, node)
    if type(module) is nn.Softmax:
        dim: Any = module.dim
    elif _is(node, (torch.softmax, F.softmax, "softmax")) and not node.kwargs.get("dtype") and len(node.args) <= 2:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    else:
        return None
    return node.args[0] if isinstance(dim, int) and dim in (-1, len(shapes.get(node, ())) - 1) and node.args else None


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """Return what a node multiplies by a number, and the number; the node itself and 1 where it does not, or others read it."""
    if len(node.users) == 1 and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        if _is(node, _FACTORS) and isinstance(first, (int, float)):
            first, second = second, first
        if isinstance(first, fx.Node) and isinstance(second, (int, float)) and not isinstance(second, bool):
            if _is(node, _FACTORS):
                return first, float(second)
            if _is(node, _QUOTIENTS) and second:
                return first, 1 / second
    return node, 1.0


def _turned_back(graph: fx.GraphModule, node: fx.Node, shapes: dict[Any, tuple[int, ...]]) -> fx.Node:
    """Return keys (N, heads, keys, width) of their transpose."""
    if _is(node, _TRANSPOSITIONS) and len(node.args) == 3:
        source, *dims = node.args
        if source in shapes and sorted(dim % 4 for dim in dims if isinstance(dim, int)) == [2, 3]:
            return source  # type: ignore[return-value]
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(torch.transpose, (node, 2, 3))
    images, heads, width, keys = shapes[node]
    shapes[new] = (images, heads, keys, width)
    return new


def _by_window(bias: Tensor, windows: int, query: tuple[int, ...], key: tuple[int, ...]) -> Tensor | None:
    """Return what is added to scores as (windows, 1 or heads, queries, keys), None where it depends on the image.

    Args:
        bias: broadcast to (N, heads, queries, keys) or, where there are several windows, (N, windows, heads, queries, keys).
        windows: how many.
        query: a shape (N, heads, queries, ...).
        key: a shape (..., keys, _), or of scores.
    """
    rank = 4 if windows == 1 else 5
    if not bias.is_floating_point() or bias.ndim > rank:
        return None
    bias = bias.reshape(*[1] * (rank - bias.ndim), *bias.shape)
    if bias.shape[0] != 1:
        return None
    bias = bias if rank == 4 else bias[0]
    if bias.shape[0] not in (1, windows) or bias.shape[1] not in (1, query[1]):
        return None
    keys = key[-1] if len(key) == 2 else key[2]
    if bias.shape[2] not in (1, query[2]) or bias.shape[3] not in (1, keys):
        return None
    return bias.expand(-1, -1, query[2], keys)
