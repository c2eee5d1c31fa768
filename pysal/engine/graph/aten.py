"""Brings a graph of ATen operations, as torch.export makes them, to the words that folding and lowering know.

torch.export writes down what torch's own functions call: `aten.relu_.default` for `F.relu(x, inplace=True)`. Here each is put
back into the function of `torch` or `torch.nn.functional` that a traced graph would have, once for all that reads graphs. An
operation that is not in the table stays, and runs as it is.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload

from pysal.engine.graph.graph_module import remove_unread

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
_aten = torch.ops.aten

# Whose arguments are those of the function, in its order, as far as they are given; other defaults are those of the function.
_SAME: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "_adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "cat": torch.cat,
    "concat": torch.cat,
    "concatenate": torch.cat,
    "celu": F.celu,
    "flatten": torch.flatten,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": F.linear,
    "matmul": torch.matmul,
    "bmm": torch.bmm,
    "mish": F.mish,
    "mul": operator.mul,
    "multiply": operator.mul,
    "permute": torch.permute,
    "prelu": F.prelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "reshape": torch.reshape,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "transpose": torch.transpose,
    "unsqueeze": torch.unsqueeze,
    "view": torch.reshape,
    "_unsafe_view": torch.reshape,
}
# What says something of a pass and computes nothing.
_ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def normalise(graph: fx.GraphModule) -> None:
    """Put functions of torch in the place of ATen operations, in place.

    What writes into its argument becomes what returns a new tensor, unless a view shares the argument's memory and is read
    later: then the graph is left to do as it does, and whoever compares it with the model will see.

    Args:
        graph: whose placeholders, but for the first, are gone.
    """
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        name = node.target._schema.name
        library, _, name = name.partition("::")
        if library != "aten":
            continue
        if name in _ASSERTIONS and not node.users:
            graph.graph.erase_node(node)
            continue
        given = _given(node)
        if given is None:
            continue
        if node.target._schema.is_mutable:
            if not name.endswith("_") or _seen_by_others(node, order):
                continue
            name = name[:-1]
        if name in _DROPOUTS:
            if not given.get("train"):
                _replace_by_value(graph, node, node.args[0])
            continue
        if name in _FIRST_OF_SEVERAL:
            call = _FIRST_OF_SEVERAL[name](given)
            if call is not None and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
                for user in list(node.users):
                    _replace_by_call(graph, user, call, like=node)
                if not node.users:
                    graph.graph.erase_node(node)
            continue
        call = _call(name, node, given)
        if call is not None:
            _replace_by_call(graph, node, call, like=node)
    remove_unread(graph)
    graph.recompile()


def _given(node: fx.Node) -> dict[str, Any] | None:
    """Return every argument of an operation by its name, defaults too; None where one cannot be named."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema
    given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if len(node.args) > len(positional):
        return None
    return given | dict(zip(positional, node.args, strict=False)) | dict(node.kwargs)


def _call(name: str, node: fx.Node, given: Mapping[str, Any]) -> Call | None:
    """Return the function, its arguments and its keywords that stand for an operation, None for none."""
    if name in _MADE:
        return _MADE[name](given)
    function = _SAME.get(name)
    if function is None or node.kwargs or str(node.target).endswith(".dtype"):
        return None
    return function, tuple(node.args), dict(node.kwargs)


def _conv2d(given: Mapping[str, Any]) -> Call | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return F.conv2d, tuple(given[name] for name in names), {}


def _convolution(given: Mapping[str, Any]) -> Call | None:
    if given["transposed"] or len(given["stride"]) != 2:
        return None
    return _conv2d(given)


def _batch_norm(given: Mapping[str, Any]) -> Call | None:
    if given.get("training") or given.get("train"):
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias")
    return F.batch_norm, (*(given[name] for name in names), False, given["momentum"], given["eps"]), {}


def _layer_norm(given: Mapping[str, Any]) -> Call | None:
    return F.layer_norm, (given["input"], tuple(given["normalized_shape"]), given["weight"], given["bias"], given["eps"]), {}


def _group_norm(given: Mapping[str, Any]) -> Call | None:
    return F.group_norm, (given["input"], given["num_groups"], given["weight"], given["bias"], given["eps"]), {}


def _native_group_norm(given: Mapping[str, Any]) -> Call | None:
    return F.group_norm, (given["input"], given["group"], given["weight"], given["bias"], given["eps"]), {}


def _hardtanh(given: Mapping[str, Any]) -> Call | None:
    if given["min_val"] == 0 and given["max_val"] == 6:
        return F.relu6, (given["self"],), {}
    return F.hardtanh, (given["self"], given["min_val"], given["max_val"]), {}


def _threshold(given: Mapping[str, Any]) -> Call | None:
    if given["threshold"] == 0 and given["value"] == 0:
        return F.relu, (given["self"],), {}
    return F.threshold, (given["self"], given["threshold"], given["value"]), {}


def _gelu(given: Mapping[str, Any]) -> Call | None:
    return F.gelu, (given["self"],), {"approximate": given["approximate"]}


def _elu(given: Mapping[str, Any]) -> Call | None:
    return (F.elu, (given["self"], given["alpha"]), {}) if given["scale"] == given["input_scale"] == 1 else None


def _sum(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Call | None]:
    def call(given: Mapping[str, Any]) -> Call | None:
        return (function, (given["self"], given["other"]), {}) if given.get("alpha", 1) == 1 else None

    return call


def _division(given: Mapping[str, Any]) -> Call | None:
    return (operator.truediv, (given["self"], given["other"]), {}) if given.get("rounding_mode") is None else None


def _mean(given: Mapping[str, Any]) -> Call | None:
    if given.get("dim") is None or given.get("dtype") is not None:
        return None
    return torch.mean, (given["self"], list(given["dim"]), given["keepdim"]), {}


def _max_pool(given: Mapping[str, Any]) -> Call | None:
    rest = tuple(given[name] for name in ("padding", "dilation", "ceil_mode"))
    return F.max_pool2d, (given["self"], given["kernel_size"], given["stride"] or None, *rest), {}


def _pad(given: Mapping[str, Any]) -> Call | None:
    return F.pad, (given["self"], list(given["pad"]), given.get("mode", "constant"), given["value"]), {}


def _linear(given: Mapping[str, Any]) -> Call | None:
    """Return the linear layer that a product with a transposed matrix is."""
    first, second = (given["mat1"], given["mat2"]) if "mat1" in given else (given["self"], given["mat2"])
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or not isinstance(second, fx.Node):
        return None
    bias = given["self"] if "mat1" in given else None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    turned = second.target in (torch.permute, torch.transpose, _aten.t.default) and second.args[1:] in _TRANSPOSITIONS
    weight = second.args[0] if turned else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return F.linear, (first, weight, bias), {}


def _softmax(given: Mapping[str, Any]) -> Call | None:
    if given.get("dtype") is not None or given.get("half_to_float"):
        return None
    return torch.softmax, (given["self"], given["dim"]), {}


def _size(given: Mapping[str, Any]) -> Call | None:
    return "size", (given["self"], given["dim"]), {}


def _attention(given: Mapping[str, Any]) -> Call | None:
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    kwargs = {name: given[name] for name in names if name in given}
    return F.scaled_dot_product_attention, (given["query"], given["key"], given["value"]), kwargs


_TRANSPOSITIONS = ((), ([1, 0],), (0, 1), (1, 0))
_MADE: dict[str, Callable[[Mapping[str, Any]], Call | None]] = {
    "add": _sum(operator.add),
    "addmm": _linear,
    "batch_norm": _batch_norm,
    "constant_pad_nd": _pad,
    "conv2d": _conv2d,
    "convolution": _convolution,
    "div": _division,
    "elu": _elu,
    "gelu": _gelu,
    "group_norm": _group_norm,
    "hardtanh": _hardtanh,
    "layer_norm": _layer_norm,
    "max_pool2d": _max_pool,
    "mean": _mean,
    "mm": _linear,
    "pad": _pad,
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax,
    "_softmax": _softmax,
    "sub": _sum(operator.sub),
    "sym_size": _size,
    "threshold": _threshold,
}
# Which return several tensors, of which usual networks read the first.
_FIRST_OF_SEVERAL: dict[str, Callable[[Mapping[str, Any]], Call | None]] = {
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "native_batch_norm": _batch_norm,
    "max_pool2d_with_indices": _max_pool,
    "native_group_norm": _native_group_norm,
    "native_layer_norm": _layer_norm,
}


def _seen_by_others(node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Say whether what a node writes into its first argument is read through another name after it."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node):
        return True
    family, pending = {written}, [written]
    while pending:
        member = pending.pop()
        relatives = [user for user in member.users if user is not node and _views(user) is member]
        if (base := _views(member)) is not None:
            relatives.append(base)
        for relative in relatives:
            if relative not in family:
                family.add(relative)
                pending.append(relative)
    family.discard(written)
    return any(order.get(user, len(order)) > order[node] for member in family for user in member.users if user is not node)


def _views(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory another may share, None where it has memory of its own."""
    if not isinstance(node.target, OpOverload):
        return _first(node) if node.target in _SHARING else None
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        alias = argument.alias_info
        if alias is not None and isinstance(value, fx.Node):
            return value
    return _first(node) if node.target._schema.name in _MAY_SHARE else None


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


_SHARING = {torch.flatten, torch.permute, torch.reshape, torch.transpose, torch.unsqueeze, operator.getitem}
# Whose result may be a view of their argument, though their schema does not say so.
_MAY_SHARE = {f"aten::{name}" for name in ("reshape", "flatten", "contiguous", "to", "dropout", "expand_as", "unflatten")}


def _replace_by_value(graph: fx.GraphModule, node: fx.Node, value: Any) -> None:
    if isinstance(value, fx.Node):
        value.meta["layers"] = [*value.meta.get("layers", ()), *node.meta.get("layers", ())]
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _replace_by_call(graph: fx.GraphModule, node: fx.Node, call: Call, *, like: fx.Node) -> None:
    target, args, kwargs = call
    with graph.graph.inserting_before(node):
        make = graph.graph.call_method if isinstance(target, str) else graph.graph.call_function
        new = make(target, args, kwargs)
    new.meta = {key: value for key, value in node.meta.items() if key == "layers"}
    if like is not node and like.meta.get("layers"):
        new.meta["layers"] = [*like.meta["layers"], *new.meta.get("layers", ())]
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
