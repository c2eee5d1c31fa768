"""A group of images through a graph, of each map only what its boxes hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pysal import ops  # noqa: F401  defines torch.ops.pysal.box_regions
from pysal.engine.boxes.clean import Nodes
from pysal.engine.boxes.groups import Geometry
from pysal.engine.boxes.kinds import BoxOperator
from pysal.engine.boxes.reach import Integers
from pysal.engine.graph import onednn
from pysal.engine.graph.fused_convolution import FusedConvolution, convolved_by_torch
from pysal.engine.graph.inverted_residual import Block
from pysal.engine.graph.winograd import WinogradConvolution


@dataclass
class CleanMaps:
    """What one image leaves behind: the maps that boxes are put into, their means where asked for, the graph's output."""

    maps: dict[fx.Node, Any]
    means: dict[fx.Node, Tensor]
    output: Tensor


@dataclass(frozen=True)
class Tail:
    """What follows the last map of a graph, and reads one value of what is before.

    Attributes:
        start: the place of its first operator.
        source: the node whose value it reads.
        constants: nodes before it that it reads, which do not depend on the image.
        most_rows: of how many images its values are small.
    """

    start: int
    source: fx.Node
    constants: tuple[fx.Node, ...]
    most_rows: int


@dataclass(frozen=True)
class Program:
    """A graph as it runs on boxes.

    Attributes:
        nodes: calls a node by itself.
        operators: the nodes in order, and how each runs.
        boxed: the nodes that have boxes, and how they run.
        maps: height and width of each map.
        blocks: inverted residual blocks, which run at once where their maps are whole, by their first node.
        tail: what can run for several groups of images together; None where nothing can.
        packed: weights arranged for oneDNN, as they are first needed.
        winograd: the same for Winograd's algorithm.
    """

    nodes: Nodes
    operators: list[BoxOperator]
    boxed: dict[fx.Node, BoxOperator]
    maps: list[tuple[int, int]]
    blocks: dict[fx.Node, Block] = field(default_factory=dict)
    tail: Tail | None = None
    packed: dict[Any, Tensor] = field(default_factory=dict)
    winograd: dict[fx.Node, WinogradConvolution | None] = field(default_factory=dict)

    def map_of(self, node: fx.Node, value: Tensor) -> Tensor:
        """Return the value of a node that has boxes as a map."""
        operator = self.boxed[node]
        return operator.form.map_of(value, self.maps[operator.map])

    def winograd_of(self, node: fx.Node, module: FusedConvolution) -> WinogradConvolution | None:
        """Return a convolution as Winograd's algorithm runs it, None where it cannot.

        Nothing here compares values with each other but max pooling, of which no gradient is asked.
        """
        if node not in self.winograd:
            found, convolution = module.winograd, module.convolution
            if found is None and WinogradConvolution.fits(convolution):
                found = WinogradConvolution(convolution.weight, convolution.bias)
            self.winograd[node] = found
        return self.winograd[node]


class Run:
    """One pass of a group of images through the graph."""

    def __init__(self, program: Program, clean: CleanMaps, patches: Tensor, geometry: Geometry) -> None:
        self.program, self.geometry, self.patches = program, geometry, patches
        self.clean, self.means = clean.maps, clean.means
        self.boxes: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}

    def output(self) -> Tensor:
        """Run every operator."""
        return self._output_of(self.program.operators)

    def before(self, tail: Tail) -> Tensor:
        """Return the value that a tail reads, of the images of this group."""
        self._run(self.program.operators[: tail.start])
        value: Tensor = self._whole(tail.source)
        return value

    def after(self, tail: Tail, value: Tensor) -> Tensor:
        """Return the output from the value that a tail reads, of any images."""
        self.values = {node: self.clean.get(node) for node in tail.constants} | {tail.source: value}
        return self._output_of(self.program.operators[tail.start :])

    def _output_of(self, operators: Sequence[BoxOperator]) -> Tensor:
        """Run operators to the graph's end."""
        *before, last = operators
        self._run(before)
        result: Tensor = self._whole(last.node.args[0])
        return result

    def _run(self, operators: Sequence[BoxOperator]) -> None:
        """Run operators in order."""
        inside: set[fx.Node] = set()  # of blocks that have run
        for operator in operators:
            block = self.program.blocks.get(operator.node)
            if block is not None and self._is_whole(block):
                self.boxes[block.members[-1]] = self._block(block)
                inside.update(block.members)
            if operator.node in inside:
                pass
            elif operator.kind == "constant":
                self.values[operator.node] = self.clean.get(operator.node)
            elif operator.skipped:
                pass  # by who reads it
            elif operator.map >= 0:
                self.boxes[operator.node] = self._box(operator)
            elif operator.kind == "mean":
                self.values[operator.node] = self._mean(operator)
            elif operator.kind == "sizes":
                self.values[operator.node] = self._size(operator.node)
            elif operator.kind == "part":
                pass  # who reads it has it made of the boxes that it needs
            else:
                args, kwargs = fx.node.map_arg((operator.node.args, operator.node.kwargs), self._whole)
                self.values[operator.node] = self.program.nodes.call(operator.node, args, kwargs, owned=operator.owns)
            for node in operator.release:
                self.boxes.pop(node, None)
                self.values.pop(node, None)

    def _is_whole(self, block: Block) -> bool:
        """Say whether all maps of a block are computed whole."""
        maps = [self.program.boxed[node].map for node in (block.inputs[0], *block.members)]
        sizes = self.geometry.sizes
        return all((sizes[map] == self.program.maps[map]).all() and map not in self.geometry.unchanged for map in maps)

    def _block(self, block: Block) -> Tensor:
        """Return what an inverted residual block makes of whole maps."""
        map = self.program.boxed[block.members[-1]].map
        corners, on_device = self.geometry.origins[map], self.geometry.on_device[0, map]
        input, *shortcuts = block.inputs
        added = self._region(shortcuts[0], corners, self.program.maps[map], on_device) if shortcuts else None
        return block.kernel.run(self.boxes[input], added)[0]

    def _size(self, node: fx.Node) -> Any:
        clean = self.clean[node.args[0]]  # type: ignore[index]
        if node.target is getattr and node.args[1] == "device":
            return clean.device
        source = self.program.boxed[node.args[0]]  # type: ignore[index]
        like = torch.empty((len(self.patches), *clean.shape[1:]), dtype=clean.dtype, device="meta")
        meta = source.form.of(like.contiguous(memory_format=torch.channels_last), source.channels)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda each: meta if each is node.args[0] else self._whole(each)
        )
        return self.program.nodes.call(node, args, kwargs)

    def _whole(self, node: Any) -> Any:
        """Return a node's value for every image, whole maps where it has boxes."""
        if node not in self.boxes:
            return self.values[node]
        operator = self.program.boxed[node]
        map = operator.map
        zero = np.zeros_like(self.geometry.origins[map])
        whole = self._region(node, zero, self.program.maps[map], torch.zeros_like(self.geometry.on_device[0, map]))
        return operator.form.of(whole, operator.channels)

    def _region(
        self,
        node: fx.Node,
        corners: Integers,
        size: Sequence[int],
        corners_on_device: Tensor,
        stride: tuple[int, int] = (1, 1),
        outside: float = 0.0,
    ) -> Tensor:
        """Return the pixels of a node's maps in the regions of a size at `corners`."""
        map, boxes = self.program.boxed[node].map, self.boxes[node]
        if tuple(boxes.shape[2:]) == tuple(size) and stride == (1, 1) and np.array_equal(corners, self.geometry.origins[map]):
            return boxes
        height, width = size
        regions: Tensor = torch.ops.pysal.box_regions(
            self.clean[node],
            boxes,
            self.geometry.on_device[0, map],
            corners_on_device,
            int(height),
            int(width),
            *stride,
            outside,
        )
        return regions

    def _box(self, operator: BoxOperator) -> Tensor:
        box, unchanged = self._computed(operator), self.geometry.unchanged.get(operator.map)
        if unchanged is None:
            return box
        nothing, origins = box.new_empty(*box.shape[:2], 0, 0), self.geometry.on_device[0, operator.map]
        clean = torch.ops.pysal.box_regions(self.clean[operator.node], nothing, origins, origins, *box.shape[2:], 1, 1, 0.0)
        return torch.where(unchanged, clean, box).contiguous(memory_format=torch.channels_last)

    def _computed(self, operator: BoxOperator) -> Tensor:
        if operator.kind == "input":
            return self.patches
        geometry, node = self.geometry, operator.node
        size = (int(geometry.sizes[operator.map, 0]), int(geometry.sizes[operator.map, 1]))

        def placed(source: fx.Node) -> Tensor:
            return self._region(source, geometry.origins[operator.map], size, geometry.on_device[0, operator.map])

        if operator.kind == "window":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if isinstance(operator.module, FusedConvolution):
                shortcut = None
                if len(node.args) > 1:
                    other = node.args[1]
                    assert isinstance(other, fx.Node)
                    shortcut = placed(other)
                    if shortcut is self.boxes[other] and not (operator.overwrites and other in operator.release):
                        shortcut = shortcut.clone(memory_format=torch.channels_last)
                return self._convolution(operator, operator.module, source, shortcut, size)
            inputs = (operator.reach[0].inputs(size[0]), operator.reach[1].inputs(size[1]))
            corners = geometry.corners[operator.map]
            regions = self._region(source, corners, inputs, geometry.on_device[1, operator.map], outside=operator.outside)
            result: Tensor = operator.module(regions, corners, size)
            return result
        if operator.kind == "sample":
            source, corners = operator.inputs[0], geometry.corners[operator.map]
            strides = (operator.reach[0].stride, operator.reach[1].stride)
            return self._region(source, corners, size, geometry.on_device[1, operator.map], strides, operator.outside)
        if operator.kind == "reshape":
            return placed(operator.inputs[0])  # its channels, in the same order, have other axes now

        def given(each: fx.Node) -> Any:
            if each in self.boxes:
                source = self.program.boxed[each]
                box = placed(each)
                if operator.copies and each is node.args[0]:
                    box = box.clone(memory_format=torch.channels_last)
                return source.form.of(box, source.channels)
            if each in operator.surfaces:
                surface, form, channels = operator.surfaces[each]
                origins = geometry.on_device[0, operator.map]
                nothing = surface.new_empty(len(origins), surface.shape[1], 0, 0)
                return form.of(torch.ops.pysal.box_regions(surface, nothing, origins, origins, *size, 1, 1, 0.0), channels)
            return self._whole(each)

        if operator.gelu is not None:
            linear, kind = operator.gelu
            called = linear.gelu(given(operator.inputs[0]), kind)
        elif operator.parts is not None:
            parts = operator.parts
            args, kwargs = fx.node.map_arg((parts.args, parts.kwargs), given)
            called = self.program.nodes.call(parts, args, kwargs)[node.args[1]]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            called = self.program.nodes.call(node, args, kwargs, owned=operator.owns)
        return operator.form.map_of(called, size)

    def _convolution(
        self, operator: BoxOperator, module: FusedConvolution, source: fx.Node, shortcut: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        geometry, convolution = self.geometry, module.convolution
        maps = self.program.maps
        if operator.depthwise is not None and shortcut is None:
            return self._depthwise(operator, module, source, size)
        corners, on_device = geometry.corners[operator.map], geometry.on_device[1, operator.map]
        if operator.reach[0].taps == operator.reach[1].taps == 1:
            region = self._region(source, corners, size, on_device, stride=convolution.stride)
            return self._convolve(operator, module, region, shortcut, (1, 1), (0, 0))
        whole = size == maps[operator.map] and tuple(self.boxes[source].shape[2:]) == maps[operator.sources[0]]
        if whole and convolution.symmetric is not None:
            return self._convolve(operator, module, self.boxes[source], shortcut, convolution.stride, convolution.symmetric)
        inputs = (operator.reach[0].inputs(size[0]), operator.reach[1].inputs(size[1]))
        region = self._region(source, corners, inputs, on_device)
        return self._convolve(operator, module, region, shortcut, convolution.stride, (0, 0))

    def _depthwise(self, operator: BoxOperator, module: FusedConvolution, source: fx.Node, size: tuple[int, int]) -> Tensor:
        """Return a depthwise convolution, which reads the clean map and the boxes where they lie."""
        geometry, convolution = self.geometry, module.convolution
        assert operator.depthwise is not None
        upper = math.inf if module.upper is None else module.upper
        result: Tensor = torch.ops.pysal.box_regions_depthwise(
            self.clean[source],
            self.boxes[source],
            geometry.on_device[0, operator.sources[0]],
            geometry.on_device[1, operator.map],
            *size,
            *operator.depthwise,
            *convolution.stride,
            *convolution.dilation,
            -math.inf if module.upper is None else 0.0,
            upper,
        )
        return result

    def _convolve(
        self,
        operator: BoxOperator,
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
        unit = self.program.winograd_of(operator.node, module)
        if unit is not None and unit.gains(region, padding):
            sides = (padding[1], padding[1], padding[0], padding[0])
            between = (-math.inf, math.inf) if module.upper is None else (0.0, module.upper)
            return unit.run(region, stride, sides, shortcut=shortcut, over=True, limits=between)
        geometry = (padding, stride, convolution.dilation, convolution.groups)
        key = (operator.map, stride, padding)
        if key not in self.program.packed:
            weight = convolution.weight.contiguous(memory_format=torch.channels_last)
            # arranged for one shape, as fast for others; oneDNN is wrong there for one channel and outputs one pixel wide
            if module.onednn and region.shape[1] > 1:
                weight = onednn.packed(convolution, weight, padding, stride, list(region.shape))
            self.program.packed[key] = weight
        weight = self.program.packed[key]
        if not module.onednn:
            return convolved_by_torch(region, weight, convolution.bias, geometry, module.upper, shortcut)
        if shortcut is None:
            return onednn.convolved(region, weight, convolution.bias, geometry, module.upper)
        return onednn.convolved_onto(shortcut, region, weight, convolution.bias, geometry, module.upper)

    def _mean(self, operator: BoxOperator) -> Tensor:
        """Return the mean of a map over all pixels, from the clean one and the difference of the sums."""
        node, program = operator.node, self.program
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own, boxes = program.boxed[source], self.boxes[source]
        map = own.map
        if tuple(boxes.shape[2:]) == program.maps[map]:
            args = (own.form.of(boxes, own.channels), *node.args[1:])
            return self.program.nodes.call(node, args, node.kwargs)  # type: ignore[no-any-return]
        mean = self.means.get(source)
        if mean is None:
            mean = self.means[source] = self.clean[source].double().mean((2, 3))
        sums = torch.ops.pysal.box_regions_sums(self.clean[source], boxes, self.geometry.on_device[0, map])
        result: Tensor = (mean + sums / math.prod(program.maps[map])).to(boxes.dtype).unflatten(1, own.channels or (1,))
        keep = node.op == "call_module" or node.target is F.adaptive_avg_pool2d
        keep = keep or (node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))  # type: ignore[assignment]
        if not own.channels:
            result = result[:, 0]
        return result[(slice(None),) * own.form.first + (None,) * own.form.spatial] if keep else result
