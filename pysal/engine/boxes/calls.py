"""What a node does, by one name however it is spelt: as a function, a method, a module or an ATen operation."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from pysal.engine.graph.fold import detached, module_of
from pysal.engine.graph.fused_linear import FusedLinear

# Each number of the result is made of the numbers at its own place alone.
ELEMENTWISE = frozenset(
    "abs add alias arctan atan celu clamp clamp_max clamp_min clip clone contiguous cos detach div divide double elu erf exp "
    "exp2 expand_as expm1 float gelu half hardshrink hardsigmoid hardswish hardtanh leaky_relu lift_fresh log log10 log1p log2 "
    "log_sigmoid logsigmoid maximum minimum mish mul multiply neg negative pow reciprocal relu relu6 round rsqrt rsub selu "
    "sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tanh tanhshrink threshold to _to_copy "
    "true_divide truediv type_as".split()
)
# Numbers of the same pixel make up one of the result; the position of the axes that they are of.
ALONG_CHANNELS = {
    name: 1 for name in "amax amin cumprod cumsum flip glu log_softmax logsumexp mean prod softmax softmin std sum var".split()
} | {"normalize": 2, "norm": 2, "vector_norm": 2, "linalg_vector_norm": 2, "index_select": 1}
# Several tensors, of which one is taken, along the axis at that position.
IN_PARTS = {"chunk": 2, "max": 1, "min": 1, "split": 2, "split_with_sizes": 2, "tensor_split": 2, "unbind": 1}
# Whose first axis of several is the one that weights belong to.
_BY_CHANNEL = frozenset(["batch_norm", "channel_shuffle", "local_response_norm", "prelu"])
_OTHERS = frozenset(
    "cat concat concatenate flatten getitem layer_norm linear matmul movedim moveaxis narrow pad permute "
    "reshape rms_norm select squeeze stack swapaxes swapdims transpose unflatten unsqueeze view".split()
)
KNOWN = ELEMENTWISE | ALONG_CHANNELS.keys() | IN_PARTS.keys() | _BY_CHANNEL | _OTHERS
# What has the name of another; a dot is an operation's, not a function's.
_SAME = {"truediv": "div", "true_divide": "div", "divide": "div", "_unsafe_view": "view", "identity": "alias"}
# Whose result may share the memory of their first argument.
VIEWS = frozenset(
    "alias chunk contiguous detach double expand flatten float getitem half lift_fresh moveaxis movedim narrow permute reshape "
    "select split split_with_sizes squeeze swapaxes swapdims tensor_split to transpose type_as unbind unflatten unsqueeze "
    "view".split()
)


@dataclass(frozen=True)
class Call:
    """A call of an operation that is known by its name.

    Attributes:
        name: what it is.
        args: its arguments by position, of a module what the function would be given.
        kwargs: those by name.
        in_place: whether it writes into its first argument.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool = False

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)


def _functions() -> dict[Callable[..., Any], tuple[str, bool]]:
    """Return the name of each function, and whether it writes into its argument."""
    found: dict[Callable[..., Any], tuple[str, bool]] = {detached: ("detach", False)}
    for name in KNOWN:
        for home in (torch, F, torch.linalg, torch.special):
            for spelt in (name, f"{name}_"):
                if callable(function := getattr(home, spelt, None)):
                    found[function] = name, spelt.endswith("_")
        for spelt in (name, f"i{name}"):
            if callable(function := getattr(operator, spelt, None)):
                found[function] = name, spelt != name
    found[operator.truediv], found[operator.itruediv] = ("div", False), ("div", True)
    return found


_FUNCTIONS = _functions()
_MODULES: dict[type[nn.Module], tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    FusedLinear: ("linear", lambda _: ()),
    nn.BatchNorm2d: ("batch_norm", lambda module: (module.running_mean, module.running_var)),
    nn.ChannelShuffle: ("channel_shuffle", lambda module: (module.groups,)),
    nn.Flatten: ("flatten", lambda module: (module.start_dim, module.end_dim)),
    nn.GLU: ("glu", lambda module: (module.dim,)),
    nn.Identity: ("alias", lambda _: ()),
    nn.LayerNorm: ("layer_norm", lambda module: (module.normalized_shape,)),
    nn.Linear: ("linear", lambda module: (module.weight, module.bias)),
    nn.LocalResponseNorm: ("local_response_norm", lambda _: ()),
    nn.LogSoftmax: ("log_softmax", lambda module: (module.dim,)),
    nn.PReLU: ("prelu", lambda module: (module.weight,)),
    nn.RMSNorm: ("rms_norm", lambda module: (module.normalized_shape,)),
    nn.Softmax: ("softmax", lambda module: (module.dim,)),
    nn.Softmax2d: ("softmax", lambda _: (1,)),
    nn.Softmin: ("softmin", lambda module: (module.dim,)),
    nn.Unflatten: ("unflatten", lambda module: (module.dim, module.unflattened_size)),
    nn.ZeroPad2d: ("pad", lambda module: (module.padding, "constant", 0.0)),
    nn.ConstantPad2d: ("pad", lambda module: (module.padding, "constant", module.value)),
} | {
    kind: (name, lambda _: ())
    for kind, name in (
        (nn.CELU, "celu"),
        (nn.ELU, "elu"),
        (nn.GELU, "gelu"),
        (nn.Hardshrink, "hardshrink"),
        (nn.Hardsigmoid, "hardsigmoid"),
        (nn.Hardswish, "hardswish"),
        (nn.Hardtanh, "hardtanh"),
        (nn.LeakyReLU, "leaky_relu"),
        (nn.LogSigmoid, "logsigmoid"),
        (nn.Mish, "mish"),
        (nn.ReLU, "relu"),
        (nn.ReLU6, "relu6"),
        (nn.SELU, "selu"),
        (nn.SiLU, "silu"),
        (nn.Sigmoid, "sigmoid"),
        (nn.Softplus, "softplus"),
        (nn.Softshrink, "softshrink"),
        (nn.Softsign, "softsign"),
        (nn.Tanh, "tanh"),
        (nn.Tanhshrink, "tanhshrink"),
        (nn.Threshold, "threshold"),
    )
}


def call_of(graph: fx.GraphModule, node: fx.Node) -> Call | None:
    """Return what a node does, None where nothing with such a name is known."""
    if node.kwargs.get("out") is not None:
        return None
    module = module_of(graph, node)
    if module is not None:
        return _call_of_module(node, module)
    in_place = bool(node.kwargs.get("inplace", False))
    if isinstance(node.target, OpOverload):
        library, _, name = node.target._schema.name.partition("::")
        if library != "aten":
            return None
        in_place = node.target._schema.is_mutable
    elif node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_")
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        name, writes = _FUNCTIONS[node.target]
        in_place = in_place or writes
    else:
        return None
    name = name.rstrip("_") if in_place else name
    return Call(_SAME.get(name, name), node.args, dict(node.kwargs), in_place)


def _call_of_module(node: fx.Node, module: nn.Module) -> Call | None:
    kind: type[nn.Module] = type(module)
    if kind.forward is nn.BatchNorm2d.forward:  # of a class that adds nothing to it
        kind = nn.BatchNorm2d
    if kind not in _MODULES or node.kwargs or len(node.args) != 1:
        return None
    name, arguments = _MODULES[kind]
    return Call(name, (*node.args, *arguments(module)), {}, bool(getattr(module, "inplace", False)))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda each: found.append(each) if isinstance(each, Tensor) else None)
    return found
