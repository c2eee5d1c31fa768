"""What each node of a graph makes of boxes: the kinds of operators that are known to be local, and how they read."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal.engine.boxes.pooling import pooling_of
from pysal.engine.boxes.reach import IDENTITY, Reach
from pysal.engine.graph.fold import module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.lowered import is_mean_of_map

# What moving one number through memory costs, in multiplications: with it the sizes of groups are chosen.
COST_OF_MOVING = 12
# The kinds of operators that give a map with boxes.
MAPPED = ("input", "window", "pointwise", "concatenation")

_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d,
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LocalResponseNorm,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_POINTWISE_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.celu,
    F.elu,
    F.gelu,
    F.hardshrink,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.logsigmoid,
    F.mish,
    F.relu,
    F.relu6,
    F.selu,
    F.sigmoid,
    F.silu,
    F.softplus,
    F.softsign,
    F.tanh,
    F.threshold,
    operator.abs,
    operator.add,
    operator.iadd,
    operator.imul,
    operator.isub,
    operator.itruediv,
    operator.mul,
    operator.neg,
    operator.pow,
    operator.sub,
    operator.truediv,
    torch.abs,
    torch.add,
    torch.clamp,
    torch.div,
    torch.exp,
    torch.maximum,
    torch.minimum,
    torch.mul,
    torch.neg,
    torch.pow,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.sqrt,
    torch.square,
    torch.sub,
    torch.tanh,
)
_POINTWISE_METHODS = frozenset(
    "abs add add_ clamp clamp_ contiguous div div_ exp mul mul_ neg pow relu relu_ sigmoid sigmoid_ sqrt square sub sub_ tanh "
    "tanh_".split()
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_SIZES = ("size", "dim")


@dataclass
class BoxOperator:
    """One node of the graph, and how it is run on boxes.

    Attributes:
        node: the node.
        kind: "constant": does not depend on the image; "input"; "window", "pointwise", "concatenation": a box gives a box;
            "mean": a box gives a number per channel; "sizes": a question about a shape; "whole": needs whole maps.
        map: where its box is in `Groups`, for the kinds that give one.
        sources: the maps it reads, the one that its windows slide over first.
        reach: of windows, down and across.
        cost: multiplications per pixel of its map, moving counted too; of an operator that needs whole maps, in all.
        run: of a pooling window: (regions, corners, sizes of its input) -> result.
        outside: what lies beyond the edge of a window's input.
        depthwise: weight (kh, kw, C) and bias of a convolution of each channel by itself.
        overwrites: whether a convolution may write its result over the boxes of its shortcut, once nobody else needs them.
        release: nodes whose values are not needed after this one.
    """

    node: fx.Node
    kind: str
    map: int = -1
    sources: tuple[int, ...] = ()
    reach: tuple[Reach, Reach] = IDENTITY
    cost: float = 0.0
    module: Any = None
    depthwise: tuple[Tensor, Tensor] | None = None
    outside: float = 0.0
    overwrites: bool = False
    release: tuple[fx.Node, ...] = ()


def operator_of(
    graph: fx.GraphModule, node: fx.Node, clean: dict[fx.Node, Any], boxed: dict[fx.Node, int], depends: set[fx.Node]
) -> BoxOperator:
    """Return how a node that depends on the image runs.

    Args:
        graph: whose node it is.
        node: the node.
        clean: the value of each node for one image.
        boxed: the nodes that have boxes, and which map is theirs.
        depends: the nodes that depend on the image.
    """
    result = clean[node]
    sources = [each for each in node.all_input_nodes if each in depends]
    if _is_size(node) and node.args[0] in boxed:
        return BoxOperator(node, "sizes")
    if node.op == "output" or not all(each in boxed for each in sources):
        return BoxOperator(node, "whole")
    maps = tuple(boxed[each] for each in sources)
    if is_mean_of_map(graph, node):
        return BoxOperator(node, "mean", sources=maps)
    if not isinstance(result, Tensor) or result.ndim != 4 or len(result) != 1 or not result.is_floating_point():
        return BoxOperator(node, "whole")
    module = module_of(graph, node)
    if isinstance(module, FusedConvolution):
        return _convolution(graph, node, module, clean, boxed)
    pooling = pooling_of(node, module, clean)
    if pooling is not None and node.args[0] is sources[0] and len(sources) == 1:
        reach, outside = pooling.reach, pooling.outside
        return BoxOperator(node, "window", sources=maps, reach=reach, module=pooling, outside=outside)
    same = all(clean[each].shape[2:] == result.shape[2:] for each in sources)
    if same and _is_concatenation(node, sources):
        return BoxOperator(node, "concatenation", sources=maps)
    if same and _is_pointwise(node, module) and all(clean[each].dtype == result.dtype for each in sources):
        others = [clean[each] for each in node.all_input_nodes if each not in depends]
        if all(not isinstance(each, Tensor) or _same_everywhere(each) for each in others):
            return BoxOperator(node, "pointwise", sources=maps)
    return BoxOperator(node, "whole")


def _convolution(
    graph: fx.GraphModule, node: fx.Node, module: FusedConvolution, clean: dict[fx.Node, Any], boxed: dict[fx.Node, int]
) -> BoxOperator:
    inputs = [each for each in node.args if isinstance(each, fx.Node)]
    if any(each not in boxed for each in inputs) or node.kwargs:
        return BoxOperator(node, "whole")
    convolution = module.convolution
    left, _, top, _ = convolution.padding
    height, width = convolution.weight.shape[2:]
    reach = (
        Reach(height, convolution.stride[0], top, convolution.dilation[0]),
        Reach(width, convolution.stride[1], left, convolution.dilation[1]),
    )
    channels = convolution.weight.shape[0]
    moved = clean[inputs[0]].shape[1] * reach[0].stride * reach[1].stride + channels
    cost = float(convolution.weight.numel() + COST_OF_MOVING * moved)
    operator = BoxOperator(node, "window", sources=tuple(boxed[each] for each in inputs), reach=reach, cost=cost, module=module)
    # only results of convolutions: those of other modules may be views of what somebody else needs
    operator.overwrites = len(inputs) > 1 and isinstance(module_of(graph, inputs[1]), FusedConvolution)
    if convolution.groups == channels == clean[inputs[0]].shape[1]:
        weight, bias = convolution.weight, convolution.bias
        operator.depthwise = (
            weight[:, 0].permute(1, 2, 0).contiguous(),
            weight.new_zeros(channels) if bias is None else bias,
        )
    return operator


def cost_of_whole(graph: fx.GraphModule, node: fx.Node, clean: dict[fx.Node, Any]) -> float:
    """Return what a node that needs whole maps costs for an image, in multiplications, as far as that is known."""
    result, module = clean.get(node), module_of(graph, node)
    if not isinstance(result, Tensor):
        return 0.0
    moved = float(COST_OF_MOVING * result.numel())
    if isinstance(module, FusedConvolution):
        return moved + module.convolution.weight.numel() * result[0, 0].numel()
    if isinstance(module, FusedLinear):
        return moved + module.multiplications * result.numel() / result.shape[-1]
    return moved


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZES
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _is_concatenation(node: fx.Node, sources: list[fx.Node]) -> bool:
    if node.op != "call_function" or node.target not in _CONCATENATIONS:
        return False
    parts = node.args[0] if node.args else None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return isinstance(parts, (tuple, list)) and all(each in sources for each in parts) and dim in (1, -3)


def _is_pointwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        if isinstance(module, nn.BatchNorm2d) and (module.running_mean is None or module.running_var is None):
            return False
        return type(module) in _POINTWISE_MODULES or type(module).forward is nn.BatchNorm2d.forward
    if "out" in node.kwargs:
        return False
    if node.op == "call_function":
        return node.target in _POINTWISE_FUNCTIONS
    return node.op == "call_method" and node.target in _POINTWISE_METHODS


def _same_everywhere(value: Tensor) -> bool:
    """Say whether a constant acts alike on every pixel of (N, C, H, W)."""
    return value.ndim <= 4 and all(side == 1 for side in value.shape[-2:]) and (value.ndim < 4 or value.shape[0] == 1)
