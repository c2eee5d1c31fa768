"""What each node of a graph makes of boxes: the kinds of operators that are known to be local, and how they read."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.boxes import calls
from pysal.engine.boxes.calls import Call, call_of
from pysal.engine.boxes.clean import Nodes
from pysal.engine.boxes.forms import PLAIN, Form
from pysal.engine.boxes.pooling import pooling_of
from pysal.engine.boxes.reach import IDENTITY, Reach
from pysal.engine.graph.activations import activation_of
from pysal.engine.graph.fold import module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.lowered import is_mean_of_map

# What moving one number through memory costs, in multiplications: with it the sizes of groups are chosen.
COST_OF_MOVING = 12
# The kinds of operators that give a map with boxes.
MAPPED = ("input", "window", "sample", "pointwise", "reshape")
# How many images the sizes in a graph are worked out for, to see which of them are the number of images: one prime at least.
_IMAGES = 3

_SIZES = ("size", "dim", "ndimension", "sym_size")
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}
_CONCATENATIONS = ("cat", "concat", "concatenate")
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
_SLICES = ("getitem", "slice", "narrow", "select")


@dataclass
class BoxOperator:
    """One node of the graph, and how it is run on boxes.

    Attributes:
        node: the node.
        kind: "constant": does not depend on the image; "input"; "window": its windows slide over a box; "sample": single
            pixels of a box, or what pads it; "pointwise": each pixel of the result is made of the same pixel of its sources;
            "reshape": pixels stay, channels get other axes; "mean": a box gives a number per channel; "sizes": says something
            of a shape; "part": one of several tensors is taken by who reads it; "whole": needs whole maps.
        map: where its box is in `Groups`, for the kinds that give one.
        form: which axes of its result are those of the map.
        channels: the lengths of all other axes but the first.
        inputs: the nodes whose values it reads.
        sources: the maps it reads, the one that its windows slide over first.
        reach: of windows, down and across.
        cost: multiplications per pixel of its map, moving counted too; of an operator that needs whole maps, in all.
        module: of a pooling window: (regions, corners, sizes of its input) -> result; of a convolution: it.
        outside: what lies beyond the edge of a window's input.
        depthwise: weight (kh, kw, C) and bias of a convolution of each channel by itself.
        overwrites: whether a convolution may write its result over the boxes of its shortcut, once nobody else needs them.
        copies: whether it writes into its first argument, which somebody else may see.
        owns: whether it may write into its first argument.
        shares: whether its result may share the memory of a source's boxes.
        parts: what gives the tensors that it takes one of.
        gelu: of GELU after a linear layer that nobody else reads: the layer, which has no box, and what kind of GELU it is.
        skipped: whether its box is not computed, because who reads it does both at once.
        surfaces: constants that differ from place to place, as maps (1, C, H, W), and their forms.
        release: nodes whose values are not needed after this one.
    """

    node: fx.Node
    kind: str
    map: int = -1
    form: Form = PLAIN
    channels: tuple[int, ...] = ()
    inputs: tuple[fx.Node, ...] = ()
    sources: tuple[int, ...] = ()
    reach: tuple[Reach, Reach] = IDENTITY
    cost: float = 0.0
    module: Any = None
    depthwise: tuple[Tensor, Tensor] | None = None
    outside: float = 0.0
    overwrites: bool = False
    copies: bool = False
    owns: bool = False
    shares: bool = False
    parts: fx.Node | None = None
    gelu: tuple[FusedLinear, str] | None = None
    skipped: bool = False
    surfaces: dict[fx.Node, tuple[Tensor, Form, tuple[int, ...]]] = field(default_factory=dict)
    release: tuple[fx.Node, ...] = ()


class Analysis:
    """Decides once how each node of a graph runs, from the values of one image.

    Args:
        graph: the graph.
        nodes: calls its nodes.
        clean: the value of each node for one image.

    Attributes:
        operators: the nodes in order, and how each runs.
        boxed: those that have boxes.
        maps: height and width of each map.
    """

    def __init__(self, graph: fx.GraphModule, nodes: Nodes, clean: dict[fx.Node, Any]) -> None:
        self._graph, self._nodes, self._clean = graph, nodes, clean
        self.operators: list[BoxOperator] = []
        self.boxed: dict[fx.Node, BoxOperator] = {}
        self.maps: list[tuple[int, int]] = []
        self._depends: set[fx.Node] = set()
        self._sizes: dict[fx.Node, Any] = {}  # what is said of shapes, for `_IMAGES` images
        self._parts: dict[fx.Node, tuple[fx.Node, dict[int, Form]]] = {}  # what gives several tensors: of what, and their forms
        for node in graph.graph.nodes:
            self._add(node)
        last: dict[fx.Node, BoxOperator] = {}
        for each in self.operators:
            last |= dict.fromkeys(each.inputs, each)
        for node, each in last.items():
            each.release += (node,)

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._depends.add(node)
            found = BoxOperator(node, "input", shares=True)
            found.channels = PLAIN.channels(self._clean[node].shape)
        elif not any(each in self._depends for each in node.all_input_nodes):
            found = BoxOperator(node, "constant")
        else:
            self._depends.add(node)
            found = self._operator(node)
        found.inputs = found.inputs or tuple(node.all_input_nodes)
        if found.kind in MAPPED:
            form, shape = found.form, self._clean[node].shape
            found.map, found.channels = len(self.maps), form.channels(shape)
            self.boxed[node] = found
            self.maps.append(self._size_of(node, found))
            found.cost = found.cost or float(math.prod(found.channels) * COST_OF_MOVING)
        elif found.kind == "whole":
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node) and first in self._depends and first not in self.boxed:
                found.owns = not self._may_share(first)
            found.cost = cost_of_whole(self._graph, node, self._clean)
        self.operators.append(found)

    def _size_of(self, node: fx.Node, found: BoxOperator) -> tuple[int, int]:
        """Return height and width of the map of a node."""
        if found.form.spatial == 2:
            height, width = (self._clean[node].shape[axis] for axis in found.form.places)
            return height, width
        return self.maps[found.sources[0]]  # of pixels in one axis, which nothing slides over

    def _operator(self, node: fx.Node) -> BoxOperator:
        """Return how a node that depends on the image runs."""
        whole, result = BoxOperator(node, "whole"), self._clean[node]
        sources = [each for each in node.all_input_nodes if each in self._depends]
        if self._says_sizes(node):
            return BoxOperator(node, "sizes")
        if node.op == "output":
            return whole
        call = call_of(self._graph, node)
        parts = node.args[0] if call is not None and call.name == "getitem" else None
        if isinstance(parts, fx.Node) and parts in self._parts:
            return self._part(node, parts)
        tensors = [each for each in sources if each not in self._sizes]
        if not tensors or not all(each in self.boxed for each in tensors):
            return whole
        if call is not None and call.name in calls.IN_PARTS and not isinstance(result, Tensor):
            return self._gives_parts(node, call) or whole
        if not isinstance(result, Tensor) or not result.is_floating_point() or len(result.shape) < 2 or len(result) != 1:
            return whole
        if any(self._clean[each].dtype != result.dtype for each in tensors):
            return whole
        forms = [self.boxed[each].form for each in tensors]
        if all(form == PLAIN for form in forms):
            found = self._window(node, tensors, result)
            if found is not None:
                return found
        if call is None:
            return whole
        found = self._mean(node, call, tensors) or self._local(node, call, tensors, result)
        return found or whole

    # ---- what is said of shapes

    def _says_sizes(self, node: fx.Node) -> bool:
        """Note what a node says of shapes, for `_IMAGES` images, and return whether it does."""
        source = node.args[0] if node.args else None
        if _is_size(node) and isinstance(source, fx.Node) and source in self.boxed:
            if node.target is getattr and node.args[1] == "device":
                self._sizes[node] = self._clean[source].device
                return True
            like = self._like(source)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: like if each is source else self._value(each))
            self._sizes[node] = self._nodes.call(node, args, kwargs)
            return True
        depends = [each for each in node.all_input_nodes if each in self._depends]
        if node.op != "output" and all(each in self._sizes for each in depends) and not isinstance(self._clean[node], Tensor):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            try:
                self._sizes[node] = self._nodes.call(node, args, kwargs)
            except Exception:  # of code that is for one image
                return False
        return False  # it runs as it is

    def _value(self, node: fx.Node) -> Any:
        return self._sizes.get(node, self._clean[node])

    def _like(self, node: fx.Node) -> Tensor:
        """Return a tensor without values like a node's for `_IMAGES` images."""
        value = self._clean[node]
        return torch.empty((_IMAGES, *value.shape[1:]), dtype=value.dtype, device="meta")

    def _settled(self, value: Any) -> Any:
        """Return arguments with what is said of shapes in its place, as far as it is the same for any number of images."""

        def settle(node: fx.Node) -> Any:
            known = node in self._sizes and not isinstance(self._clean[node], Tensor)
            return self._clean[node] if known and self._sizes[node] == self._clean[node] else node

        return fx.node.map_arg(value, settle)

    # ---- windows

    def _window(self, node: fx.Node, sources: list[fx.Node], result: Tensor) -> BoxOperator | None:
        module = module_of(self._graph, node)
        maps = tuple(self.boxed[each].map for each in sources)
        if isinstance(module, FusedConvolution):
            return self._convolution(node, module)
        if is_mean_of_map(self._graph, node):
            return BoxOperator(node, "mean", form=PLAIN, sources=maps)
        pooling = pooling_of(node, module, self._clean)
        if pooling is not None and node.args[0] is sources[0] and len(sources) == 1 and result.ndim == 4:
            return BoxOperator(node, "window", sources=maps, reach=pooling.reach, module=pooling, outside=pooling.outside)
        return None

    def _convolution(self, node: fx.Node, module: FusedConvolution) -> BoxOperator | None:
        inputs = [each for each in node.args if isinstance(each, fx.Node)]
        if any(each not in self.boxed for each in inputs) or node.kwargs:
            return None
        convolution = module.convolution
        left, _, top, _ = convolution.padding
        height, width = convolution.weight.shape[2:]
        reach = (
            Reach(height, convolution.stride[0], top, convolution.dilation[0]),
            Reach(width, convolution.stride[1], left, convolution.dilation[1]),
        )
        channels = convolution.weight.shape[0]
        read = self._clean[inputs[0]].shape[1]
        moved = read * reach[0].stride * reach[1].stride + channels
        cost = float(convolution.weight.numel() + COST_OF_MOVING * moved)
        maps = tuple(self.boxed[each].map for each in inputs)
        found = BoxOperator(node, "window", sources=maps, reach=reach, cost=cost, module=module)
        # only results of convolutions whose memory nobody shares
        found.overwrites = len(inputs) > 1 and isinstance(self.boxed[inputs[1]].module, FusedConvolution)
        found.overwrites = found.overwrites and not any(self._may_share(user) for user in inputs[1].users)
        if convolution.groups == channels == read:
            weight, bias = convolution.weight, convolution.bias
            found.depthwise = (
                weight[:, 0].permute(1, 2, 0).contiguous(),
                weight.new_zeros(channels) if bias is None else bias,
            )
        return found

    def _may_share(self, node: fx.Node) -> bool:
        """Say whether the value of a node may share memory with what it reads."""
        if isinstance(module_of(self._graph, node), FusedConvolution):
            return False
        call = call_of(self._graph, node)
        return call is None or call.name in calls.VIEWS or call.in_place

    # ---- means over a map

    def _mean(self, node: fx.Node, call: Call, sources: list[fx.Node]) -> BoxOperator | None:
        if call.name != "mean" or len(sources) != 1 or call.args[:1] != (sources[0],):
            return None
        source = self.boxed[sources[0]]
        dims = _dims(call.argument(1, "dim"), source.form.rank)
        if dims is None or sorted(dims) != list(source.form.places) or call.argument(3, "dtype") is not None:
            return None
        return BoxOperator(node, "mean", form=source.form, sources=(source.map,))

    # ---- what stays at its pixel

    def _local(self, node: fx.Node, call: Call, sources: list[fx.Node], result: Tensor) -> BoxOperator | None:
        call = Call(call.name, self._settled(call.args), self._settled(call.kwargs), call.in_place)
        source = self.boxed[sources[0]]
        maps = tuple(dict.fromkeys(self.boxed[each].map for each in sources))
        if call.name in _RESHAPES and len(sources) == 1 and call.args[:1] == (sources[0],):
            return self._reshape(node, source, result)
        if call.name == "pad" and len(sources) == 1:
            return self._pad(node, call, source, result)
        if call.name in _SLICES and len(sources) == 1 and (sampled := self._sampled(node, call, source)) is not None:
            return sampled
        form = self._form(call, sources, result)
        if form is None or not _fits(form, result, self.maps[source.map]):
            return None
        surfaces = {}
        if call.name in calls.ELEMENTWISE:
            constants = [each for each in node.all_input_nodes if each not in self._depends]
            for each in constants:
                value = self._clean[each]
                if isinstance(value, Tensor) and not _same_everywhere(value, form, result):
                    surface = _surface(value, form, result, self.maps[source.map])
                    if surface is None:
                        return None
                    surfaces[each] = surface
        found = BoxOperator(node, "pointwise", form=form, sources=maps, surfaces=surfaces)
        found.shares = call.name in calls.VIEWS
        found.copies = call.in_place and (source.shares or len(sources[0].users) > 1)
        found.owns = call.in_place
        module = module_of(self._graph, node)
        if isinstance(module, FusedLinear):
            found.cost = float(module.multiplications + COST_OF_MOVING * (result.numel() // math.prod(self.maps[source.map])))
        elif found.shares:
            found.cost = 1.0
        activation = None if call.in_place else activation_of(self._graph, node)
        module = module_of(self._graph, source.node)
        if activation is not None and activation.name in _GELUS and isinstance(module, FusedLinear) and module.onednn:
            if len(source.node.users) == 1 and source.form == form:
                found.gelu, source.skipped = (module, _GELUS[activation.name]), True
                found.inputs, source.inputs = source.inputs, ()
        return found

    def _form(self, call: Call, sources: list[fx.Node], result: Tensor) -> Form | None:
        """Return the form of what stays at its pixel, None where it may not."""
        form, size = self.boxed[sources[0]].form, self.maps[self.boxed[sources[0]].map]
        first = call.args[:1] == (sources[0],)
        if call.name in calls.ELEMENTWISE:
            alike = all(
                (other.form.rank, other.form.places) == (form.rank, form.places) and self.maps[other.map] == size
                for other in map(self.boxed.__getitem__, sources)
            )
            return form if alike and result.ndim == form.rank else None
        if call.name in (*_CONCATENATIONS, "stack"):
            return self._joined(call, sources)
        if len(sources) > 1 or not first:
            return None
        if call.name in calls.ALONG_CHANNELS:
            return _along_channels(call, form, result)
        if call.name in ("layer_norm", "rms_norm"):
            shape = call.argument(1, "normalized_shape")
            return form if isinstance(shape, (tuple, list)) and len(shape) <= form.after else None
        if call.name == "linear":
            return form if form.after else None
        if call.name == "matmul":
            other = call.argument(1, "other", "tensor2", "mat2")
            return form if form.after and isinstance(other, fx.Node) and self._clean[other].ndim == 2 else None
        if call.name in ("batch_norm", "prelu", "channel_shuffle", "local_response_norm"):
            return form if self._is_by_channel(call, form) else None
        if call.name in _PERMUTATIONS:
            axes = _permutation(call, form.rank)
            return None if axes is None else form.moved(axes)
        return self._sliced(call, form, self._clean[sources[0]].shape, result) if call.name in _SLICES else None

    def _is_by_channel(self, call: Call, form: Form) -> bool:
        if call.name == "batch_norm":
            if call.argument(1, "running_mean") is None or call.argument(2, "running_var") is None:
                return False
            if call.argument(5, "training") not in (None, False):
                return False
        if call.name == "prelu":
            weight = call.argument(1, "weight")
            weight = self._clean[weight] if isinstance(weight, fx.Node) else weight
            if weight.numel() == 1:
                return True
        return form.first > 1

    def _joined(self, call: Call, sources: list[fx.Node]) -> Form | None:
        """Return the form of maps one after the other along an axis of channels."""
        members = call.argument(0, "tensors")
        forms = {(self.boxed[each].form, self.maps[self.boxed[each].map]) for each in sources}
        if not isinstance(members, (tuple, list)) or not all(each in sources for each in members) or len(forms) > 1:
            return None
        ((form, _),) = forms
        stacked = call.name == "stack"
        dims = _dims(call.argument(1, "dim", "axis", default=0), form.rank + stacked)
        if dims is None:
            return None
        if not stacked:
            return form if dims[0] != 0 and dims[0] not in form.places else None
        if dims[0] == 0 or form.first < dims[0] < form.first + form.spatial:
            return None
        return Form(form.rank + 1, form.first + (dims[0] <= form.first), form.spatial)

    def _sliced(self, call: Call, form: Form, shape: Sequence[int], result: Tensor) -> Form | None:
        """Return the form of a part of the channels."""
        index = _index(call, shape)
        if index is None or index[0] != slice(None) or any(index[axis] != slice(None) for axis in form.places):
            return None
        gone = [axis for axis, each in enumerate(index) if isinstance(each, int)]
        return Form(result.ndim, form.first - sum(axis < form.first for axis in gone), form.spatial)

    def _reshape(self, node: fx.Node, source: BoxOperator, result: Tensor) -> BoxOperator | None:
        """Return how axes of channels are split or joined, or those of rows and columns joined or told apart again."""
        like = self._like(source.node)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda each: like if each is source.node else self._value(each)
        )
        try:
            after = self._nodes.call(node, args, kwargs).shape
        except Exception:  # a shape that was written down for one image alone
            return None
        form = source.form.reshaped(like.shape, after, self.maps[source.map])
        if form is None or tuple(after[1:]) != tuple(result.shape[1:]):
            return None
        return BoxOperator(node, "reshape", form=form, sources=(source.map,), cost=1.0, shares=True)

    def _sampled(self, node: fx.Node, call: Call, source: BoxOperator) -> BoxOperator | None:
        """Return how every so many-th pixel is taken, or what is left of a map whose edges are cut off."""
        index, size = _index(call, self._clean[source.node].shape), self.maps[source.map]
        if index is None or source.form.spatial != 2:
            return None
        others = [each for axis, each in enumerate(index) if axis not in source.form.places]
        pixels = [each for axis in source.form.places if isinstance(each := index[axis], slice)]
        if any(each != slice(None) for each in others) or len(pixels) < 2 or pixels == [slice(None)] * 2:
            return None
        starts = [each.indices(side) for each, side in zip(pixels, size, strict=True)]
        down, across = (Reach(1, step, -start, 1) for start, _, step in starts)
        return BoxOperator(node, "sample", form=source.form, sources=(source.map,), reach=(down, across), shares=True)

    def _pad(self, node: fx.Node, call: Call, source: BoxOperator, result: Tensor) -> BoxOperator | None:
        """Return how a map is padded with a constant, or cut where padding is below 0."""
        sides, mode = call.argument(1, "pad"), call.argument(2, "mode", default="constant")
        value = call.argument(3, "value", default=0)
        number = value is None or isinstance(value, (int, float))
        if not isinstance(sides, (tuple, list)) or not all(isinstance(each, int) for each in sides) or mode != "constant":
            return None
        form = source.form
        if not number or form.spatial != 2 or len(sides) % 2 or len(sides) // 2 > form.rank or result.ndim != form.rank:
            return None
        before = [0] * form.rank
        for pair in range(len(sides) // 2):
            axis = form.rank - 1 - pair
            before[axis] = sides[2 * pair]
            if axis not in form.places and (sides[2 * pair] or sides[2 * pair + 1]):
                return None
        down, across = (Reach(1, 1, before[axis], 1) for axis in form.places)
        outside = float(value or 0)
        return BoxOperator(node, "sample", form=form, sources=(source.map,), reach=(down, across), outside=outside, shares=True)

    # ---- one of several tensors

    def _gives_parts(self, node: fx.Node, call: Call) -> BoxOperator | None:
        source = call.args[0] if call.args else None
        if source not in self.boxed or [each for each in node.all_input_nodes if each in self.boxed] != [source]:
            return None
        form = self.boxed[source].form
        dims = _dims(self._settled(call.argument(calls.IN_PARTS[call.name], "dim", default=0)), form.rank)
        if dims is None or len(dims) != 1 or dims[0] == 0 or dims[0] in form.places:
            return None
        found: dict[int, Form] = {}
        for user in node.users:
            place = user.args[1] if user.target is operator.getitem else None
            if not isinstance(place, int):
                return None
            result = self._clean[node][place]
            if not isinstance(result, Tensor) or result.dtype != self._clean[source].dtype:
                return None
            gone = result.ndim != form.rank  # of `unbind` and of a maximum that does not keep its axis
            part = Form(result.ndim, form.first - (gone and dims[0] < form.first), form.spatial)
            if not _fits(part, result, self.maps[self.boxed[source].map]):
                return None
            found[place] = part
        self._parts[node] = source, found
        return BoxOperator(node, "part")

    def _part(self, node: fx.Node, parts: fx.Node) -> BoxOperator:
        source, forms = self._parts[parts]
        inputs = (source, *(each for each in parts.all_input_nodes if each is not source))
        place = node.args[1]
        assert isinstance(place, int)
        form, maps = forms[place], (self.boxed[source].map,)
        return BoxOperator(node, "pointwise", form=form, sources=maps, inputs=inputs, parts=parts, cost=1.0, shares=True)


def _fits(form: Form, result: Tensor, size: tuple[int, int]) -> bool:
    """Say whether a tensor has the axes of a form, with as many pixels as a map."""
    if result.ndim != form.rank or not 1 <= form.first <= form.rank - form.spatial:
        return False
    sides = tuple(result.shape[axis] for axis in form.places)
    return sides == size if form.spatial == 2 else sides == (math.prod(size),)


def _dims(value: Any, rank: int) -> list[int] | None:
    """Return axes counted from the first, None where they are not given as numbers."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if not values or not all(type(each) is int and -rank <= each < rank for each in values):
        return None
    return [each % rank for each in values]


def _along_channels(call: Call, form: Form, result: Tensor) -> Form | None:
    dims: Any = call.argument(calls.ALONG_CHANNELS[call.name], "dim", "dims", "axis")
    if call.name == "flip" and len(call.args) > 2:
        dims = list(call.args[1:])
    if dims is None:
        dims = {"glu": -1, "normalize": 1}.get(call.name)
    axes = _dims(dims, form.rank)
    if axes is None or any(axis == 0 or axis in form.places for axis in axes):
        return None
    if result.ndim == form.rank:
        return form
    return Form(result.ndim, form.first - sum(axis < form.first for axis in set(axes)), form.spatial)


def _permutation(call: Call, rank: int) -> list[int] | None:
    """Return which axis of the argument each axis of the result is."""
    given: Any = call.args[1:]
    if call.name == "permute":
        value = given[0] if len(given) == 1 else given or call.kwargs.get("dims")
        axes = _dims(value, rank)
        return axes if axes is not None and sorted(axes) == list(range(rank)) else None
    if len(given) != 2 or call.kwargs:
        return None
    one, other = _dims(given[0], rank), _dims(given[1], rank)
    if one is None or other is None or len(one) != len(other):
        return None
    if call.name in ("movedim", "moveaxis"):
        return _moved(one, other, rank)
    axes = list(range(rank))
    axes[one[0]], axes[other[0]] = axes[other[0]], axes[one[0]]
    return axes


def _moved(one: Sequence[int], other: Sequence[int], rank: int) -> list[int]:
    """Return the permutation that moves axes to others, and leaves the rest in their order."""
    rest = iter(axis for axis in range(rank) if axis not in one)
    to = dict(zip(other, one, strict=True))
    return [to[axis] if axis in to else next(rest) for axis in range(rank)]


def _index(call: Call, shape: Sequence[int]) -> list[slice | int] | None:
    """Return what is taken along each axis of a shape, None where that is not known or there are new axes."""
    rank = len(shape)
    if call.name == "getitem":
        given = call.args[1]
        given = list(given) if isinstance(given, tuple) else [given]
        if given.count(Ellipsis) > 1 or not all(each is Ellipsis or type(each) in (int, slice) for each in given):
            return None
        if Ellipsis in given:
            place = given.index(Ellipsis)
            given[place : place + 1] = [slice(None)] * (rank + 1 - len(given))
        found = given + [slice(None)] * (rank - len(given))
    else:
        dims = _dims(call.argument(1, "dim", default=0), rank)
        if dims is None or len(dims) != 1:
            return None
        start = call.argument(2, "start", "index")
        if call.name == "select":
            one: slice | int = start if type(start) is int else slice(1, 0)
        elif call.name == "narrow":
            length = call.argument(3, "length")
            one = slice(start, start + length) if type(start) is int and type(length) is int else slice(1, 0)
        else:
            one = slice(start, call.argument(3, "end"), call.argument(4, "step", default=1))
        found = [slice(None)] * rank
        found[dims[0]] = one
    if len(found) != rank:
        return None
    for axis, each in enumerate(found):
        if isinstance(each, slice):
            if not all(part is None or type(part) is int for part in (each.start, each.stop, each.step)):
                return None
            if each.indices(shape[axis]) == (0, shape[axis], 1) and (axis or each.stop is None or each.stop >= 2**62):
                found[axis] = slice(None)  # of images, all that there are
    return found


def _same_everywhere(value: Tensor, form: Form, result: Tensor) -> bool:
    """Say whether a constant acts alike on every pixel of every image."""
    missing = result.ndim - value.ndim
    return all(axis < missing or value.shape[axis - missing] == 1 for axis in (0, *form.places))


def _surface(value: Tensor, form: Form, result: Tensor, size: tuple[int, int]) -> tuple[Tensor, Form, tuple[int, ...]] | None:
    """Return a constant that differs from place to place as a map, None where it differs from image to image."""
    value = value[(None,) * (result.ndim - value.ndim)]
    if len(value) != 1 or value.dtype != result.dtype:
        return None
    shape = list(value.shape)
    for axis in form.places:
        shape[axis] = result.shape[axis]
    value = value.expand(shape)
    return form.map_of(value, size), form, form.channels(shape)


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
    """Say whether a node asks for a shape, or for what else is the same whatever the values."""
    if node.op == "call_method":
        return node.target in _SIZES
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
