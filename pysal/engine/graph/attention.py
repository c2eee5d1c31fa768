"""nn.MultiheadAttention as the linear layers and the attention that it is made of, so that each runs as fast as it can."""

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from pysal.engine.graph.shapes import SHAPE


def open_attention(graph: fx.GraphModule) -> None:
    """Put the parts of self-attention in the place of modules that do nothing else with one tensor, in place."""
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.MultiheadAttention or not _is_plain(module):
            continue
        source = _source(node)
        firsts = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        unread = [user for user in node.users if user not in firsts and not user.users]
        if source is None or len(firsts) + len(unread) < len(node.users):
            continue
        with graph.graph.inserting_before(node):
            result = _opened(graph.graph, str(node.target), module, source)
        for user in firsts:
            result.meta.setdefault("layers", []).extend(user.meta.get("layers", ()))
            user.replace_all_uses_with(result)
        for user in list(node.users):
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)


def _is_plain(module: nn.MultiheadAttention) -> bool:
    """Say whether a module attends to what it is given and nothing else, images first."""
    added = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return module.batch_first and module._qkv_same_embed_dim and not added and not module.training


def _source(node: fx.Node) -> fx.Node | None:
    """Return what a module attends to, where that is one tensor (N, tokens, C) and no mask is given."""
    given: dict[str, Any] = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    source = given.pop("query", None)
    same = given.pop("key", None) is source and given.pop("value", None) is source
    weights = given.pop("need_weights", True)
    if not isinstance(source, fx.Node) or not same or weights is not False or any(given.values()):
        return None
    return source if len(source.meta.get(SHAPE, ())) == 3 else None


def _opened(graph: fx.Graph, path: str, module: nn.MultiheadAttention, source: fx.Node) -> fx.Node:
    images, tokens, channels = source.meta[SHAPE]

    def parameter(name: str, owner: nn.Module) -> fx.Node | None:
        place = f"{path}.{name}"
        return None if getattr(owner, name.rpartition(".")[2]) is None else graph.get_attr(place)

    weight, bias = parameter("in_proj_weight", module), parameter("in_proj_bias", module)
    parts = graph.call_function(F.linear, (source, weight, bias))
    parts.meta[SHAPE] = (images, tokens, 3 * channels)
    heads = graph.call_method("unflatten", (parts, -1, (3, module.num_heads, channels // module.num_heads)))
    heads = graph.call_method("permute", (heads, 2, 0, 3, 1, 4))
    query, key, value = (graph.call_method("select", (heads, 0, index)) for index in range(3))
    for part in (query, key, value):
        part.meta[SHAPE] = (images, module.num_heads, tokens, channels // module.num_heads)
    attended = graph.call_function(F.scaled_dot_product_attention, (query, key, value))
    attended.meta[SHAPE] = query.meta[SHAPE]
    joined = graph.call_method("flatten", (graph.call_method("transpose", (attended, 1, 2)), 2))
    joined.meta[SHAPE] = (images, tokens, channels)
    weight, bias = parameter("out_proj.weight", module.out_proj), parameter("out_proj.bias", module.out_proj)
    result = graph.call_function(F.linear, (joined, weight, bias))
    result.meta[SHAPE] = (images, tokens, channels)
    return result
