"""Runs a prepared graph on many images that differ from one image only inside boxes, and recomputes only what the boxes reach.

After Nakandala, Kumar and Papakonstantinou 2019 (Incremental and approximate inference for faster occlusion-based deep CNN
explanations). The activations of the unchanged image are kept. What an occlusion changes of a map lies in a box, which grows
with every convolution and pooling; of each map only that box is computed, for many images at once, its surroundings taken from
its activations. Global pooling takes differences of sums. Where boxes have grown to most of a map, and from the first op
on that is not known to be local, whole maps are computed, so that an unknown op costs time and is never wrong.

`Incremental.limited` is the paper's approximation (section 4.2, projective field thresholding): boxes grow up to a share of
each map's side, and what lies beyond keeps the activations of the unchanged image.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.boxes.clean import Nodes, NotIncremental
from pysal.engine.boxes.groups import CPU_GROUP_NUMBERS, Geometry, Groups, launch_cost
from pysal.engine.boxes.kinds import MAPPED, Analysis, BoxOperator
from pysal.engine.boxes.run import CleanMaps, Program, Run, Tail
from pysal.engine.graph.inverted_residual import Block


class Incremental:
    """Runs a graph on images that differ from one image inside boxes.

    Args:
        graph: a lowered graph; it is not changed.
        example: (1, C, H, W), an image of the shape that all will have.
        keep: whether to keep its activations, too.
        blocks: inverted residual blocks of the graph.

    Attributes:
        clean: what `keep` returns for the example, where that was asked for.

    Raises:
        NotIncremental: the graph changes its activations in place where others read them, or has several inputs.
    """

    def __init__(self, graph: fx.GraphModule, example: Tensor, *, keep: bool = False, blocks: Iterable[Block] = ()) -> None:
        if sum(node.op == "placeholder" for node in graph.graph.nodes) > 1:
            raise NotIncremental("the graph has several inputs")
        self.graph, self.shape = graph, tuple(example.shape)
        self._dtype, self._device = example.dtype, example.device
        nodes = Nodes(graph)
        clean = nodes.run(example, check=True)
        self._program = _analysed(graph, nodes, clean, blocks)
        self._needed = _needed_of(self._program)
        self.followed = sum(operator.kind in (*MAPPED, "mean") and operator.kind != "input" for operator in self.operators)
        if not self.followed:
            raise NotIncremental("its first layer is not known to be local")
        self.groups = Groups(self._program.operators, self._program.maps, launch_cost(example.device))
        self.clean = (self.keep(example) if nodes.writes else self._keep(clean)) if keep else None

    @property
    def operators(self) -> list[BoxOperator]:
        """The nodes of the graph in order, and how each runs."""
        return self._program.operators

    def limited(self, share: float | None, faster_whole: float = 1.0) -> "Incremental":
        """Return an engine whose boxes grow to a share of each map's side at most, or without bounds for None.

        The footprint of a change on a map is the interval whose points have their windows, all the way down, centred in what
        changes of the image: it shrinks with every stride and grows with no kernel. Of a map of side s > SMALL_SIDE, what the
        boxes of its sources reach is computed where that is at most max(1, floor(share s), ceil(footprint)) pixels long; else
        so many pixels of it, centred on the footprint as far as the map's edge allows. This holds for rows and columns
        separately, and for every map but the image, whose box is all that changes. Outside, activations are those of the
        unchanged image. Smaller maps are not limited. What an image's outputs are does not depend on which others it runs with.
        With share 1 they are exact.

        Args:
            share: of each map's side.
            faster_whole: see `Groups.limited`.
        """
        limited = copy.copy(self)
        limited.groups = self.groups.limited(share, faster_whole)
        return limited

    def takes(self, images: Tensor) -> bool:
        """Say whether images have the shape, dtype and device of the example."""
        return tuple(images.shape[1:]) == self.shape[1:] and (images.dtype, images.device) == (self._dtype, self._device)

    def keep(self, image: Tensor) -> CleanMaps:
        """Return the activations of an image (1, C, H, W), on which `run` builds."""
        return self._keep(self._program.nodes.run(image))

    def _keep(self, values: dict[fx.Node, Any]) -> CleanMaps:
        maps = {
            node: self._program.map_of(node, values[node]) if node in self._program.boxed else values[node]
            for node in self._needed
        }
        return CleanMaps(maps, {}, values[self.operators[-1].node])

    def run(self, clean: CleanMaps, patches: Tensor, geometry: Geometry) -> Tensor:
        """Return the graph's output for images that are the clean one but for a patch each.

        Args:
            clean: what `keep` returned for that image.
            patches: (n, C, h, w), what the images hold in the boxes of the first map of `geometry`.
            geometry: where they lie.
        """
        return Run(self._program, clean, patches, geometry).output()

    @property
    def most_together(self) -> int:
        """How many images `run_groups` may take; 0 where groups have nothing to do together."""
        return self._program.tail.most_rows if self._program.tail is not None else 0

    def run_groups(self, clean: CleanMaps, groups: Iterable[tuple[Tensor, Geometry]]) -> Tensor:
        """Return the graph's output for several groups of images, what follows the last map for all of them together.

        The linear layers of AlexNet and VGG, of 60 to 120 million weights, take as long for 5 images as for 25.

        Args:
            clean: see `run`.
            groups: patches and geometry of each, see `run`.
        """
        tail = self._program.tail
        assert tail is not None
        values, last = [], None
        for patches, geometry in groups:
            last = Run(self._program, clean, patches, geometry)
            values.append(last.before(tail))
        assert last is not None
        joined = torch.cat(values)
        return Run(self._program, clean, joined, last.geometry).after(tail, joined)


def _tail_of(operators: list[BoxOperator], clean: dict[fx.Node, Any]) -> Tail | None:
    """Return what follows the last map, where it reads one value of what is before, and is small."""
    start = 1 + max(
        (place for place, operator in enumerate(operators) if operator.kind in (*MAPPED, "mean", "part")),
        default=len(operators),
    )
    tail = operators[start:]
    own = {operator.node for operator in tail}
    constants = {operator.node for operator in operators[:start] if operator.kind == "constant"}
    read = {source for operator in tail for source in operator.node.all_input_nodes if source not in own}
    sources = read - constants
    if len(sources) != 1 or any(operator.kind not in ("whole", "constant", "sizes") for operator in tail):
        return None
    (source,) = sources
    depending = (operator.node for operator in tail if operator.kind == "whole")
    values = [clean[node] for node in (source, *depending) if isinstance(clean[node], Tensor)]
    if not isinstance(clean[source], Tensor) or not all(value.ndim and len(value) == 1 for value in values):
        return None
    rows = CPU_GROUP_NUMBERS // max(value.numel() for value in values)
    return Tail(start, source, tuple(read & constants), rows) if rows > 1 else None


def _analysed(graph: fx.GraphModule, nodes: Nodes, clean: dict[fx.Node, Any], blocks: Iterable[Block]) -> Program:
    """Decide once how each node runs, from the values of one image."""
    found = Analysis(graph, nodes, clean)
    local = {
        block.members[0]: block for block in blocks if all(node in found.boxed for node in (*block.inputs, *block.members))
    }
    return Program(nodes, found.operators, found.boxed, found.maps, local, _tail_of(found.operators, clean))


def _needed_of(program: Program) -> set[fx.Node]:
    """Return the nodes whose values for the unchanged image are needed."""
    constants = {operator.node for operator in program.operators if operator.kind == "constant"}
    return {
        source
        for operator in program.operators
        if operator.kind in (*MAPPED, "mean", "whole", "constant")
        for source in (operator.node, *operator.inputs)
        if source in program.boxed or source in constants
    }
