"""Runs a prepared graph on many images that differ from one image only inside boxes, and recomputes only what the boxes reach.

After Nakandala, Kumar and Papakonstantinou 2019 (Incremental and approximate inference for faster occlusion-based deep CNN
explanations). The activations of the unchanged image are kept. What an occlusion changes of a map lies in a box, which grows
with every convolution and pooling; of each map only that box is computed, for many images at once, its surroundings taken from
the kept activations. Global pooling takes differences of sums. Where boxes have grown to most of a map, and from the first op
on that is not known to be local, whole maps are computed, so that an unknown op costs time and is never wrong.

`Incremental.limited` is the paper's approximation (section 4.2, projective field thresholding): boxes grow up to a share of
each map's side, and what lies beyond keeps the activations of the unchanged image.
"""

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pysal import ops  # noqa: F401  defines torch.ops.pysal.box_regions
from pysal.engine.graph.fold import module_of, pair
from pysal.engine.graph.lowered import FusedConvolution
from pysal.engine.running.chunks import to_device
from pysal.engine.running.states import leave_inference_mode, restoring

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Truths = NDArray[np.bool_]

# A box that covers this share of a map is not worth cutting out: the whole map is computed.
WHOLE_SHARE = 0.85
# What moving one number through memory costs, in multiplications: with it the sizes of groups are chosen.
COST_OF_MOVING = 12
# Images in one group, and the least share of its cost that a split has to save, because it makes smaller batches.
CPU_ROWS = 32
GPU_ROWS = 256
WORTH_A_SPLIT = 0.05
# A group that costs more than this share of whole images runs as whole images.
PAYING_SHARE = 0.9
# Boxes on maps of at most this side are not limited: few pixels are saved, and much of what an occlusion changes is lost.
SMALL_SIDE = 8
# Tolerance in pixels when fractional lengths are rounded: 0.29 x 100 is 29.
ROUNDING = 1e-9

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


def group_rows(device: torch.device) -> int:
    """Return how many images at most are run together."""
    return CPU_ROWS if device.type == "cpu" else GPU_ROWS


class NotIncremental(Exception):
    """The graph cannot be run incrementally; the message says why."""


@dataclass(frozen=True)
class Reach:
    """How outputs along one axis depend on inputs: output i reads inputs i stride - before + [0, 1, ..., taps - 1] dilation."""

    taps: int
    stride: int
    before: int
    dilation: int

    @property
    def span(self) -> int:
        """Inputs between the first and the last that one output reads, both counted."""
        return (self.taps - 1) * self.dilation + 1

    def outputs(self, low: Integers, high: Integers, size: int) -> tuple[Integers, Integers]:
        """Return the outputs [low, high) of `size` that the inputs [low, high) can reach."""
        first = -((self.span - 1 - self.before - low) // self.stride)
        last = (high - 1 + self.before) // self.stride + 1
        first = np.minimum(np.maximum(first, 0), size)  # np.clip takes four times as long on so few numbers
        return first, np.maximum(np.minimum(last, size), first)

    def inputs(self, outputs: int) -> int:
        """Return how many inputs in a row `outputs` of them read."""
        return (outputs - 1) * self.stride + self.span

    def places(self, points: Reals) -> Reals:
        """Return where points of the inputs lie among the outputs, each of which is where its window is centred.

        Pixel i is the interval [i, i + 1].
        """
        places: Reals = (points + self.before - self.span / 2) / self.stride + 0.5
        return places


IDENTITY = (Reach(1, 1, 0, 1), Reach(1, 1, 0, 1))


@dataclass
class Step:
    """One node of the graph, and how it is run on boxes.

    Attributes:
        node: the node.
        kind: "constant": does not depend on the image; "input"; "window", "pointwise", "concatenation": a box gives a box;
            "mean": a box gives a number per channel; "sizes": a question about a shape; "whole": needs whole maps.
        map: where its box is in `Groups`, for the kinds that give one.
        sources: the maps it reads, the one that its windows slide over first.
        reach: of windows, down and across.
        cost: multiplications per pixel of its map, moving counted too.
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


@dataclass
class Geometry:
    """Where the boxes of a group of images lie in every map.

    Attributes:
        sizes: (maps, 2), height and width of the boxes of all images.
        origins: (maps, n, 2), where each box begins.
        corners: (maps, n, 2), where what windows read begins.
        on_device: origins and corners, (2, maps, n, 2) int32.
        kept: of maps where limited boxes differ in size: (n, 1, h, w), where the box of an image is that of the unchanged one.
    """

    sizes: Integers
    origins: Integers
    corners: Integers
    on_device: Tensor
    kept: dict[int, Tensor]


class Incremental:
    """Runs a graph on images that differ from one image inside boxes.

    Args:
        graph: a lowered graph; it is not changed.
        example: (1, C, H, W), an image of the shape that all will have.

    Raises:
        NotIncremental: the graph changes its activations in place where others read them, or has several inputs.
    """

    share: float | None = None  # most of a map's side that a box grows to

    def __init__(self, graph: fx.GraphModule, example: Tensor) -> None:
        if sum(node.op == "placeholder" for node in graph.graph.nodes) > 1:
            raise NotIncremental("the graph has several inputs")
        self.graph, self.shape = graph, tuple(example.shape)
        self._dtype, self._device = example.dtype, example.device
        self._packed: dict[Any, Tensor] = {}
        self._in_place: set[fx.Node] = set()  # whose first argument is copied, because it is a kept map
        self.steps: list[Step] = []
        if sum(node.op == "placeholder" for node in graph.graph.nodes) > 1:
            raise NotIncremental("the graph has several inputs")
        clean = self._run_clean(example, check=True)
        self._maps: list[tuple[int, int]] = []
        self._analyse(clean)
        self.followed = sum(step.kind in ("window", "pointwise", "concatenation", "mean") for step in self.steps)
        if not self.followed:
            raise NotIncremental("its first layer is not known to be local")

    # ---- the graph

    @restoring
    def _run_clean(self, image: Tensor, check: bool = False) -> dict[fx.Node, Any]:
        """Return the value of every node for an image; with `check`, refuse what is changed in place under a reader."""
        values: dict[fx.Node, Any] = {}
        versions: dict[fx.Node, int] = {}
        order = {node: position for position, node in enumerate(self.graph.graph.nodes)}
        leave_inference_mode()
        with torch.no_grad():
            image = image.clone(memory_format=torch.channels_last)
            for node in self.graph.graph.nodes:
                values[node] = self._value(node, values, image)
                if not check:
                    continue
                for other, version in versions.items():
                    if values[other]._version != version:
                        # earlier readers saw the value we keep; later ones would see the modified one
                        if other.op == "get_attr" or any(order[user] > order[node] for user in other.users):
                            raise NotIncremental(f"{node.name} changes in place what others read")
                        versions[other] = values[other]._version
                        self._in_place.add(node)
                if isinstance(values[node], Tensor) and not values[node].is_inference():
                    versions[node] = values[node]._version
        return values

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], image: Tensor) -> Any:
        if node.op == "placeholder":
            return image
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph)
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda each: values[each])
        return self._call(node, *fx.node.map_arg((node.args, node.kwargs), lambda each: values[each]))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node in self._in_place:
            args = (args[0].clone(), *args[1:])
        if node.op == "call_module":
            return self.graph.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _analyse(self, clean: dict[fx.Node, Any]) -> None:
        """Decide once how each node runs."""
        depends: set[fx.Node] = set()
        boxed: dict[fx.Node, int] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                depends.add(node)
                step = Step(node, "input")
            elif not any(each in depends for each in node.all_input_nodes):
                step = Step(node, "constant")
            else:
                depends.add(node)
                step = self._step(node, clean, boxed, depends)
            if step.kind in ("input", "window", "pointwise", "concatenation"):
                step.map = boxed[node] = len(self._maps)
                self._maps.append(tuple(clean[node].shape[2:]))
                if not step.cost:
                    step.cost = float(clean[node].shape[1] * COST_OF_MOVING)
            self.steps.append(step)
            for each in node.all_input_nodes:
                last[each] = node
        by_node = {step.node: step for step in self.steps}
        for node, end in last.items():
            by_node[end].release += (node,)
        self._boxed = boxed
        self._kept = {
            source
            for step in self.steps
            if step.kind in ("input", "window", "pointwise", "concatenation", "mean", "whole", "constant")
            for source in (step.node, *step.node.all_input_nodes)
            if source in boxed or by_node[source].kind == "constant"
        }

    def _step(self, node: fx.Node, clean: dict[fx.Node, Any], boxed: dict[fx.Node, int], depends: set[fx.Node]) -> Step:
        result = clean[node]
        sources = [each for each in node.all_input_nodes if each in depends]
        if self._is_size(node) and node.args[0] in boxed:
            return Step(node, "sizes")
        if node.op == "output" or not all(each in boxed for each in sources):
            return Step(node, "whole")
        maps = tuple(boxed[each] for each in sources)
        if self._is_mean(node, clean):
            return Step(node, "mean", sources=maps)
        if not isinstance(result, Tensor) or result.ndim != 4 or len(result) != 1 or not result.is_floating_point():
            return Step(node, "whole")
        module = module_of(self.graph, node)
        if isinstance(module, FusedConvolution):
            return self._convolution(node, module, clean, boxed)
        pooling = _pooling(node, module, clean)
        if pooling is not None and node.args[0] is sources[0] and len(sources) == 1:
            reach, outside = pooling.reach, pooling.outside
            return Step(node, "window", sources=maps, reach=reach, module=pooling, outside=outside)
        same = all(clean[each].shape[2:] == result.shape[2:] for each in sources)
        if same and self._is_concatenation(node, sources):
            return Step(node, "concatenation", sources=maps)
        if same and self._is_pointwise(node, module) and all(clean[each].dtype == result.dtype for each in sources):
            others = [clean[each] for each in node.all_input_nodes if each not in depends]
            if all(not isinstance(each, Tensor) or _same_everywhere(each) for each in others):
                return Step(node, "pointwise", sources=maps)
        return Step(node, "whole")

    def _convolution(
        self, node: fx.Node, module: FusedConvolution, clean: dict[fx.Node, Any], boxed: dict[fx.Node, int]
    ) -> Step:
        inputs = [each for each in node.args if isinstance(each, fx.Node)]
        if any(each not in boxed for each in inputs) or node.kwargs:
            return Step(node, "whole")
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
        step = Step(node, "window", sources=tuple(boxed[each] for each in inputs), reach=reach, cost=cost, module=module)
        # only results of convolutions: those of other modules may be views of what somebody else needs
        step.overwrites = len(inputs) > 1 and isinstance(module_of(self.graph, inputs[1]), FusedConvolution)
        if convolution.groups == channels == clean[inputs[0]].shape[1]:
            weight, bias = convolution.weight, convolution.bias
            step.depthwise = (
                weight[:, 0].permute(1, 2, 0).contiguous(),
                weight.new_zeros(channels) if bias is None else bias,
            )
        return step

    def _is_size(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _SIZES
        return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")

    def _is_mean(self, node: fx.Node, clean: dict[fx.Node, Any]) -> bool:
        """Say whether a node is the mean of each channel over the whole map."""
        module = module_of(self.graph, node)
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

    def _is_concatenation(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        if node.op != "call_function" or node.target not in _CONCATENATIONS:
            return False
        parts = node.args[0] if node.args else None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return isinstance(parts, (tuple, list)) and all(each in sources for each in parts) and dim in (1, -3)

    def _is_pointwise(self, node: fx.Node, module: nn.Module | None) -> bool:
        if module is not None:
            if isinstance(module, nn.BatchNorm2d) and (module.running_mean is None or module.running_var is None):
                return False
            return type(module) in _POINTWISE_MODULES or type(module).forward is nn.BatchNorm2d.forward
        if "out" in node.kwargs:
            return False
        if node.op == "call_function":
            return node.target in _POINTWISE_FUNCTIONS
        return node.op == "call_method" and node.target in _POINTWISE_METHODS

    def limited(self, share: float | None) -> "Incremental":
        """Return an engine whose boxes grow to a share of each map's side at most, or without bounds for None.

        The footprint of a change on a map is the interval whose points have their windows, all the way down, centred in what
        changes of the image: it shrinks with every stride and grows with no kernel. Of a map of side s > SMALL_SIDE, what the
        boxes of its sources reach is computed where that is at most max(1, floor(share s), ceil(footprint)) pixels long; else
        so many pixels of it, centred on the footprint as far as the map's edge allows. This holds for rows and columns
        separately, and for every map but the image, whose box is all that changes. Outside, activations are those of the
        unchanged image. Smaller maps are not limited. What an image's outputs are does not depend on which others it runs with.
        With share 1 they are exact.
        """
        limited = copy.copy(self)
        limited.share = share
        return limited

    def takes(self, images: Tensor) -> bool:
        """Say whether images have the shape, dtype and device of the example."""
        return tuple(images.shape[1:]) == self.shape[1:] and (images.dtype, images.device) == (self._dtype, self._device)

    # ---- one image

    def keep(self, image: Tensor) -> "Kept":
        """Return the activations of an image (1, C, H, W), on which `run` builds."""
        values = self._run_clean(image)
        maps = {
            node: values[node].contiguous(memory_format=torch.channels_last) if node in self._boxed else values[node]
            for node in self._kept
        }
        return Kept(maps, {}, values[self.steps[-1].node])

    # ---- geometry

    def extents(self, boxes: Integers) -> Integers:
        """Return what boxes (n, 4) of the image can change of every map: (maps, n, 4) top, left, bottom, right."""
        return self._follow(boxes)[0]

    def _follow(self, boxes: Integers) -> tuple[Integers, Truths]:
        """Return the extents (maps, n, 4) of boxes (n, 4), and which of them are limited (maps, n)."""
        found = np.zeros((len(self._maps), len(boxes), 4), dtype=np.int64)
        limited = np.zeros(found.shape[:2], dtype=bool)
        footprints = np.zeros(found.shape)
        for step in self.steps:
            if step.kind == "input":
                footprints[step.map] = found[step.map] = boxes
            elif step.map >= 0:
                own = found[step.map]
                source = found[step.sources[0]]
                for axis in range(2):
                    low, high = step.reach[axis].outputs(source[:, axis], source[:, axis + 2], self._maps[step.map][axis])
                    own[:, axis], own[:, axis + 2] = low, high
                for other in step.sources[1:]:
                    np.minimum(own[:, :2], found[other][:, :2], out=own[:, :2])
                    np.maximum(own[:, 2:], found[other][:, 2:], out=own[:, 2:])
                if self.share is not None:
                    for axis in range(2):
                        sides = slice(axis, None, 2)
                        footprint = step.reach[axis].places(footprints[step.sources[0]][:, sides])
                        footprints[step.map][:, sides] = footprint
                        limited[step.map] |= _limit(own[:, sides], footprint, self.share, self._maps[step.map][axis])
        return found, limited

    def _sizes(self, extents: Integers) -> Integers:
        """Return the size (maps, 2) of boxes that hold the extents (maps, n, 4) of every image."""
        maps = np.array(self._maps)
        sizes = np.maximum((extents[..., 2:] - extents[..., :2]).max(1), 1)
        whole: Truths = sizes.prod(1) >= WHOLE_SHARE * maps.prod(1)
        if self.share is not None:  # of limited maps no more is computed than the limit allows
            whole &= [all(_most(self.share, side) == side for side in map) for map in self._maps]
        return np.where(whole[:, None], maps, sizes)

    def cost(self, extents: Integers) -> float:
        """Return what running a group of images costs, in multiplications."""
        costs = np.array([step.cost for step in self.steps if step.map >= 0])
        return float((self._sizes(extents).prod(1) * costs).sum() * extents.shape[1])

    def pays(self, boxes: Integers) -> bool:
        """Say whether a group of images costs clearly less than running them whole."""
        return self.cost(self.extents(boxes)) < PAYING_SHARE * self._whole_cost() * len(boxes)

    def _whole_cost(self) -> float:
        """Return what running an image whole costs, in multiplications."""
        return sum(step.cost * math.prod(self._maps[step.map]) for step in self.steps if step.map >= 0)

    def batches(self, boxes: Integers, rows: int) -> list[tuple[Integers, bool]]:
        """Return the images to run together, at most `rows` in boxes at a time, and whether in boxes: else they run whole.

        Where boxes are limited, and whole images give something else, each image's own box decides, whatever the others'.
        """
        if self.share is None:
            return [(group, self.pays(boxes[group])) for group in self.groups(boxes, rows)]
        paying = self._pays_alone(boxes)
        inside, outside = np.flatnonzero(paying), np.flatnonzero(~paying)
        found = [(inside[group], True) for group in self.groups(boxes[inside], rows)] if len(inside) else []
        return found + ([(outside, False)] if len(outside) else [])

    def _pays_alone(self, boxes: Integers) -> Truths:
        extents, most = self.extents(boxes), PAYING_SHARE * self._whole_cost()
        return np.array([self.cost(extents[:, n : n + 1]) < most for n in range(len(boxes))])

    def approximates(self, boxes: Integers) -> Truths:
        """Say of each image whether its outputs are approximate: (n,)."""
        limited: Truths = np.any(self._follow(boxes)[1], axis=0)
        return limited & self._pays_alone(boxes) if limited.any() else limited

    def groups(self, boxes: Integers, rows: int) -> list[Integers]:
        """Return the images to run together: their indices, at most `rows` at a time.

        A set is halved by the place or the size of its boxes while that saves work, because the boxes of a group are as
        large as its largest in every map.
        """
        extents = self.extents(boxes)
        pending, found = [np.arange(len(boxes))], []
        while pending:
            group = pending.pop()
            halves, saved = self._halves(extents, group)
            if halves is not None and (len(group) > rows or saved > WORTH_A_SPLIT):
                pending += halves[::-1]
            else:
                found.append(group)
        return found

    def _halves(self, extents: Integers, group: Integers) -> tuple[list[Integers] | None, float]:
        """Return the better way to cut a group in two, and the share of its cost that this saves."""
        if len(group) < 2:
            return None, 0.0
        own = extents[:, group]
        before = self.cost(own)
        best: tuple[list[Integers] | None, float] = (None, -math.inf)
        maps = np.array(self._maps)
        for axis in range(2):
            share = (own[..., axis + 2] - own[..., axis]) / maps[:, axis, None]
            for key in (own[0, :, axis] + own[0, :, axis + 2], share.sum(0)):
                order = np.argsort(key, kind="stable")
                half = (len(group) + 1) // 2
                parts = [np.sort(order[:half]), np.sort(order[half:])]
                saved = 1 - sum(self.cost(own[:, part]) for part in parts) / before
                if saved > best[1]:
                    best = [group[part] for part in parts], saved
        return best

    def geometry(self, boxes: Integers, device: torch.device) -> Geometry:
        """Return where the boxes of a group lie in every map."""
        extents, limited = self._follow(boxes)
        sizes = self._sizes(extents)
        maps = np.array(self._maps)
        origins = np.clip(extents[..., :2], 0, (maps - sizes)[:, None])
        stride, before = np.ones((2, len(maps), 1, 2), dtype=np.int64)
        before[:] = 0
        for step in self.steps:
            if step.map >= 0:
                for axis in range(2):
                    stride[step.map, 0, axis] = step.reach[axis].stride
                    before[step.map, 0, axis] = step.reach[axis].before
        corners = origins * stride - before
        on_device = to_device(np.stack([origins, corners]).astype(np.int32), device)
        kept: dict[int, Tensor] = {}
        for map in np.flatnonzero(limited.any(1)).tolist():
            if (extents[map, :, 2:] - extents[map, :, :2] < sizes[map]).any():
                inside = [
                    (extents[map, :, axis, None] <= places) & (places < extents[map, :, axis + 2, None])
                    for axis in range(2)
                    for places in [origins[map, :, axis, None] + np.arange(sizes[map, axis])]
                ]
                kept[map] = to_device(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]), device)
        return Geometry(sizes, origins, corners, on_device, kept)

    # ---- a group of images

    def run(self, kept: "Kept", patches: Tensor, geometry: Geometry) -> Tensor:
        """Return the graph's output for images that are the kept one but for a patch each.

        Args:
            kept: what `keep` returned for that image.
            patches: (n, C, h, w), what the images hold in the boxes of the first map of `geometry`.
            geometry: where they lie.
        """
        return _Run(self, kept, patches, geometry).output()


@dataclass
class Kept:
    """What one image leaves behind: the maps that boxes are put into, their means where asked for, the graph's output."""

    maps: dict[fx.Node, Any]
    means: dict[fx.Node, Tensor]
    output: Tensor


class _Run:
    """One pass of a group of images through the graph."""

    def __init__(self, engine: Incremental, kept: Kept, patches: Tensor, geometry: Geometry) -> None:
        self.engine, self.geometry, self.patches = engine, geometry, patches
        self.clean, self.means = kept.maps, kept.means
        self.boxes: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}

    def output(self) -> Tensor:
        """Run every step."""
        for step in self.engine.steps:
            if step.kind == "constant":
                self.values[step.node] = self.clean.get(step.node)
            elif step.map >= 0:
                self.boxes[step.node] = self._box(step)
            elif step.kind == "mean":
                self.values[step.node] = self._mean(step)
            elif step.kind == "sizes":
                self.values[step.node] = self._size(step.node)
            elif step.node.op == "output":
                result: Tensor = self._whole(step.node.args[0])
                return result
            else:
                args, kwargs = fx.node.map_arg((step.node.args, step.node.kwargs), self._whole)
                self.values[step.node] = self.engine._call(step.node, args, kwargs)
            for node in step.release:
                self.boxes.pop(node, None)
                self.values.pop(node, None)
        raise AssertionError("a graph ends with its output")

    def _size(self, node: fx.Node) -> Any:
        clean = self.clean[node.args[0]]  # type: ignore[index]
        meta = torch.empty((len(self.patches), *clean.shape[1:]), dtype=clean.dtype, device="meta")
        if node.target is getattr and node.args[1] == "device":
            return clean.device
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda each: meta if each is node.args[0] else self._whole(each)
        )
        return self.engine._call(node, args, kwargs)

    def _whole(self, node: Any) -> Any:
        """Return a node's value for every image, whole maps where it has boxes."""
        if node not in self.boxes:
            return self.values[node]
        map = self.engine._boxed[node]
        zero = np.zeros_like(self.geometry.origins[map])
        return self._region(node, zero, self.engine._maps[map], torch.zeros_like(self.geometry.on_device[0, map]))

    def _region(
        self,
        node: fx.Node,
        corners: Integers,
        size: Sequence[int],
        corners_on_device: Tensor,
        steps: tuple[int, int] = (1, 1),
        outside: float = 0.0,
    ) -> Tensor:
        """Return the pixels of a node's maps in the regions of a size at `corners`."""
        map, boxes = self.engine._boxed[node], self.boxes[node]
        if tuple(boxes.shape[2:]) == tuple(size) and steps == (1, 1) and np.array_equal(corners, self.geometry.origins[map]):
            return boxes
        height, width = size
        regions: Tensor = torch.ops.pysal.box_regions(
            self.clean[node],
            boxes,
            self.geometry.on_device[0, map],
            corners_on_device,
            int(height),
            int(width),
            *steps,
            outside,
        )
        return regions

    def _box(self, step: Step) -> Tensor:
        box, kept = self._computed(step), self.geometry.kept.get(step.map)
        if kept is None:
            return box
        nothing, origins = box.new_empty(*box.shape[:2], 0, 0), self.geometry.on_device[0, step.map]
        clean = torch.ops.pysal.box_regions(self.clean[step.node], nothing, origins, origins, *box.shape[2:], 1, 1, 0.0)
        return torch.where(kept, clean, box).contiguous(memory_format=torch.channels_last)

    def _computed(self, step: Step) -> Tensor:
        if step.kind == "input":
            return self.patches
        geometry, node = self.geometry, step.node
        size = (int(geometry.sizes[step.map, 0]), int(geometry.sizes[step.map, 1]))

        def placed(source: fx.Node) -> Tensor:
            return self._region(source, geometry.origins[step.map], size, geometry.on_device[0, step.map])

        if step.kind == "window":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if isinstance(step.module, FusedConvolution):
                shortcut = None
                if len(node.args) > 1:
                    other = node.args[1]
                    assert isinstance(other, fx.Node)
                    shortcut = placed(other)
                    if shortcut is self.boxes[other] and not (step.overwrites and other in step.release):
                        shortcut = shortcut.clone(memory_format=torch.channels_last)
                return self._convolution(step, step.module, source, shortcut, size)
            inputs = (step.reach[0].inputs(size[0]), step.reach[1].inputs(size[1]))
            corners = geometry.corners[step.map]
            regions = self._region(source, corners, inputs, geometry.on_device[1, step.map], outside=step.outside)
            result: Tensor = step.module(regions, corners, size)
            return result
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda each: placed(each) if each in self.boxes else self._whole(each)
        )
        called: Tensor = self.engine._call(node, args, kwargs)
        if node.target == "contiguous":  # which may return its argument
            called = called.clone()
        return called.contiguous(memory_format=torch.channels_last)

    def _convolution(
        self, step: Step, module: FusedConvolution, source: fx.Node, shortcut: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        geometry, convolution = self.geometry, module.convolution
        maps = self.engine._maps
        if step.depthwise is not None and shortcut is None:
            return self._depthwise(step, module, source, size)
        corners, on_device = geometry.corners[step.map], geometry.on_device[1, step.map]
        if step.reach[0].taps == step.reach[1].taps == 1:
            region = self._region(source, corners, size, on_device, steps=convolution.stride)
            return self._convolve(step, module, region, shortcut, (1, 1), (0, 0))
        whole = size == maps[step.map] and tuple(self.boxes[source].shape[2:]) == maps[step.sources[0]]
        if whole and convolution.symmetric is not None:
            return self._convolve(step, module, self.boxes[source], shortcut, convolution.stride, convolution.symmetric)
        inputs = (step.reach[0].inputs(size[0]), step.reach[1].inputs(size[1]))
        region = self._region(source, corners, inputs, on_device)
        return self._convolve(step, module, region, shortcut, convolution.stride, (0, 0))

    def _depthwise(self, step: Step, module: FusedConvolution, source: fx.Node, size: tuple[int, int]) -> Tensor:
        """Return a depthwise convolution, which reads the kept map and the boxes where they lie."""
        geometry, convolution = self.geometry, module.convolution
        assert step.depthwise is not None
        upper = math.inf if module.upper is None else module.upper
        result: Tensor = torch.ops.pysal.box_regions_depthwise(
            self.clean[source],
            self.boxes[source],
            geometry.on_device[0, step.sources[0]],
            geometry.on_device[1, step.map],
            *size,
            *step.depthwise,
            *convolution.stride,
            *convolution.dilation,
            -math.inf if module.upper is None else 0.0,
            upper,
        )
        return result

    def _convolve(
        self,
        step: Step,
        module: FusedConvolution,
        region: Tensor,
        shortcut: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        """Return the fused convolution of a region; a shortcut is overwritten with it."""
        convolution = module.convolution
        if module.matrix is not None:
            sides = (padding[1], padding[1], padding[0], padding[0])
            between = (-math.inf, math.inf) if module.upper is None else (0.0, module.upper)
            return module.matrix.run(region, stride, sides, shortcut=shortcut, over=True, limits=between)
        geometry = (padding, stride, convolution.dilation, convolution.groups)
        mkldnn = torch.ops.mkldnn
        key = (step.map, stride, padding)
        if key not in self.engine._packed:
            weight = convolution.weight.contiguous(memory_format=torch.channels_last)
            # arranged for one shape, as fast for others; oneDNN is wrong there for one channel and outputs one pixel wide
            if module.onednn and region.shape[1] > 1:
                weight = mkldnn._reorder_convolution_weight(
                    weight, list(padding), list(stride), list(convolution.dilation), convolution.groups, list(region.shape)
                )
            self.engine._packed[key] = weight
        weight = self.engine._packed[key]
        if not module.onednn:
            output = F.conv2d(region, weight, convolution.bias, stride, padding, convolution.dilation, convolution.groups)
            output = output if shortcut is None else output.add_(shortcut)
            return output if module.upper is None else output.clamp_(0, module.upper)
        limited = module.upper is not None and module.upper < math.inf
        if shortcut is None:
            name = "hardtanh" if limited else "none" if module.upper is None else "relu"
            limits = [0.0, module.upper] if limited else []
            result: Tensor = mkldnn._convolution_pointwise(region, weight, convolution.bias, *geometry, name, limits, None)
            return result
        activation = None if module.upper is None else "relu"
        result = mkldnn._convolution_pointwise_.binary(
            shortcut, region, weight, convolution.bias, *geometry, "add", 1.0, activation, [], None
        )
        return result.clamp_(max=module.upper) if limited else result

    def _mean(self, step: Step) -> Tensor:
        """Return the mean of a map over all pixels, from the clean one and the difference of the sums."""
        node, engine = step.node, self.engine
        source = node.args[0]
        assert isinstance(source, fx.Node)
        map, boxes = engine._boxed[source], self.boxes[source]
        if tuple(boxes.shape[2:]) == engine._maps[map]:
            return self.engine._call(node, (boxes, *node.args[1:]), node.kwargs)  # type: ignore[no-any-return]
        mean = self.means.get(source)
        if mean is None:
            mean = self.means[source] = self.clean[source].double().mean((2, 3))
        sums = torch.ops.pysal.box_regions_sums(self.clean[source], boxes, self.geometry.on_device[0, map])
        result: Tensor = (mean + sums / math.prod(engine._maps[map])).to(boxes.dtype)
        keep = node.op == "call_module" or node.target is F.adaptive_avg_pool2d
        keep = keep or (node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))  # type: ignore[assignment]
        return result[:, :, None, None] if keep else result


def _most(share: float, side: int) -> int:
    """Return how many pixels of a map's side a box grows to."""
    if side <= SMALL_SIDE:
        return side
    return max(1, math.floor(share * side + ROUNDING))  # 0.29 of 100 pixels is 29 of them, whatever its rounding


def _limit(extents: Integers, footprints: Reals, share: float, side: int) -> Truths:
    """Limit extents (n, 2) along one axis of a map, as `Incremental.limited` says, and return of which (n,) that took away."""
    low, high = extents.T
    first, last = footprints.T
    most = np.maximum(_most(share, side), np.ceil(last - first - ROUNDING).astype(np.int64))
    longer: Truths = high - low > most
    start = np.minimum(np.maximum(np.floor((first + last - most + 1) / 2).astype(np.int64), low), high - most)
    extents[:, 0], extents[:, 1] = np.where(longer, start, low), np.where(longer, start + most, high)
    return longer


def _same_everywhere(value: Tensor) -> bool:
    """Say whether a constant acts alike on every pixel of (N, C, H, W)."""
    return value.ndim <= 4 and all(side == 1 for side in value.shape[-2:]) and (value.ndim < 4 or value.shape[0] == 1)


@dataclass(frozen=True)
class _Pooling:
    """Pools regions that hold what lies beyond the edge too."""

    reach: tuple[Reach, Reach]
    outside: float
    divisors: tuple[NDArray[np.float64], NDArray[np.float64]] | None  # of a mean: by output row and column; None = maximum

    def __call__(self, regions: Tensor, corners: Integers, size: tuple[int, int]) -> Tensor:
        """Return (N, C, *size)."""
        kernel, stride = [reach.taps for reach in self.reach], [reach.stride for reach in self.reach]
        if self.divisors is None:
            return F.max_pool2d(regions, kernel, stride, 0, [reach.dilation for reach in self.reach])
        sums = F.avg_pool2d(regions, kernel, stride, divisor_override=1)
        shares = []
        for axis, reach in enumerate(self.reach):
            first = (corners[:, axis] + reach.before) // reach.stride
            shares.append(1 / self.divisors[axis][first[:, None] + np.arange(size[axis])])
        down, across = (torch.from_numpy(share).to(sums) for share in shares)
        return sums.mul_(down[:, None, :, None]).mul_(across[:, None, None, :])


def _pooling(node: fx.Node, module: nn.Module | None, clean: dict[fx.Node, Any]) -> _Pooling | None:
    """Return how a node pools, or None where it does not or not in a known way."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not isinstance(clean[node.args[0]], Tensor):
        return None
    given: dict[str, Any]
    names: tuple[str, ...]
    if type(module) in (nn.MaxPool2d, nn.AvgPool2d):
        mean = type(module) is nn.AvgPool2d
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        names += ("count_include_pad", "divisor_override")
        given = {name: getattr(module, name) for name in names if hasattr(module, name)}
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d):
        mean = node.target is F.avg_pool2d
        names = ("input", "kernel_size", "stride", "padding")
        names += ("ceil_mode", "count_include_pad", "divisor_override") if mean else ("dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    else:
        return None
    kernel = pair(given["kernel_size"])
    stride = pair(given.get("stride") or kernel)
    padding, dilation = pair(given.get("padding", 0)), pair(given.get("dilation", 1))
    sizes = [*kernel, *stride, *padding, *dilation]
    if given.get("return_indices") or not all(isinstance(size, int) for size in sizes):
        return None
    down, across = (Reach(kernel[i], stride[i], padding[i], dilation[i]) for i in range(2))
    if not mean:
        return _Pooling((down, across), -math.inf, None)
    before, after = clean[node.args[0]].shape[2:], clean[node].shape[2:]
    divisors = []
    for i in range(2):
        start = np.arange(after[i]) * stride[i] - padding[i]
        # windows of ceil_mode that reach beyond the padding count what is inside it
        end = np.minimum(start + kernel[i], before[i] + padding[i])
        if not given.get("count_include_pad", True):
            start, end = np.maximum(start, 0), np.minimum(end, before[i])
        divisors.append((end - start).astype(np.float64))
    divisor: Any = given.get("divisor_override")
    if divisor:
        divisors = [np.full(after[0], float(divisor)), np.ones(after[1])]
    return _Pooling((down, across), 0.0, (divisors[0], divisors[1]))
