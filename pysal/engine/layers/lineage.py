"""What a score was made of, read from autograd's graph: which values lie between the images and it, and what became of rows."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# what torch imports, and sympy with it, for the first gradients that begin with given ones
SEEDS = "torch.fx.experimental.symbolic_shapes"

# Names of autograd's nodes, by their beginnings. These move values and change none.
_MOVES = (
    "Alias AsStrided Cat Chunk Clone Contiguous ConstantPadNd CopyBackwards Expand Flip Index Narrow Permute PixelShuffle "
    "PixelUnshuffle Repeat Reshape Roll Select Slice Split Squeeze Stack Swapaxes TBackward ToCopy Transpose Unbind Unflatten "
    "UnsafeSplit UnsafeView Unsqueeze Upsample View Where"
).split()
# These act on each value alone, or on the classes of one place.
_POINTWISE = (
    "Abs Clamp Exp Hardsigmoid Hardtanh LeakyRelu Log1P LogBackward LogSigmoid LogSoftmax Neg Relu Sigmoid Softmax Softplus "
    "Sqrt Tanh"
).split()
_OF_TWO = ("AddBackward", "SubBackward", "RsubBackward", "MulBackward", "DivBackward")
# These change values and leave a map a map, and these make maps of maps.
_KEEPING = (
    *_MOVES,
    *_POINTWISE,
    *_OF_TWO,
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "NativeGroupNorm",
    "NativeLayerNorm",
    "Gelu",
    "Silu",
)
_OF_MAPS = ("Convolution", "Upsample", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
# Every value of what these return depends on all of their inputs, or could.
_MIXING = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Mv", "Softmax", "LogSoftmax", "NativeLayerNorm")
_JOINING = ("Cat", "Stack", "CopySlices", "IndexPut", "SliceScatter", "SelectScatter", "MaskedScatter")
# Rows of these are picked by their values: which is which is not known any more.
_PICKING = ("Gather", "IndexSelect", "Scatter", "Sort", "Topk", "MaskedSelect")


class Lineage:
    """The part of autograd's graph that lies between the images and a score.

    Args:
        score: (N,), the result of a pass with gradients.
        images: the leaf that the pass began with.
    """

    def __init__(self, score: Tensor, images: Tensor) -> None:
        self._score = score
        self.source = get_gradient_edge(images).node
        self._start = score.grad_fn
        self._order = list(_inputs_first(self._start))
        self._positions = {node: position for position, node in enumerate(self._order)}
        self.nodes = {self.source} if self.source in self._positions else set()
        for node in self._order:
            if any(before in self.nodes for before, _ in node.next_functions):
                self.nodes.add(node)

    @property
    def complete(self) -> bool:
        """Whether the score depends on the images at all."""
        return self.source in self.nodes

    def reaches(self, node: Node) -> bool:
        """Say whether a value was made of the images, on the way to the score or not."""
        return node in self.nodes or self.source in _walk(
            [node], lambda one: (before for before, _ in one.next_functions if before)
        )

    def cuts(self) -> set[Node]:
        """Return the nodes through which every path from the images to the score leads."""
        found, open_ends = set(), set()
        for node in reversed(self._order):
            if node in self.nodes:
                open_ends.discard(node)
                if not open_ends:
                    found.add(node)
                open_ends.update(before for before, _ in node.next_functions if before in self.nodes)
        return found

    def gradients(self, edges: list[GradientEdge]) -> list[Tensor | None]:
        """Return the score's gradient at each value, None where it does not depend on it."""
        with torch.enable_grad():  # a sum needs no seed, for which torch imports SymPy: a third of a second in a short call
            total = self._score.sum()
        return list(torch.autograd.grad([total], edges, allow_unused=True, retain_graph=True))

    def answers(self, outputs: Iterable[Tensor]) -> set[Node]:
        """Return the nodes of a model's outputs, as far as the score reads them, and of what these are up to form.

        A tensor is an output up to form if only its values' places, or each value by itself, change on the way to the output:
        by reshaping, joining, enlarging, a sigmoid, a softmax over classes, a sum with something that was made beside it.
        """
        ends = {edge for edge in map(_edge, outputs) if edge is not None}
        read: list[Node] = []
        todo, seen = [(self._start, self._score.output_nr)], set()
        while todo:
            edge = todo.pop()
            node = edge[0]
            if edge in seen or node not in self.nodes:
                continue
            seen.add(edge)
            if edge in ends:
                read.append(node)
            else:
                todo += node.next_functions
        return _walk(read, self._of_the_same_form)

    def _of_the_same_form(self, node: Node) -> Iterator[Node]:
        name = node.name()
        inputs = list(dict.fromkeys(before for before, _ in node.next_functions if before in self.nodes))
        if name.startswith((*_MOVES, *_POINTWISE)) or (name.startswith(_OF_TWO) and len(inputs) == 1):
            yield from inputs
        elif name.startswith(("AddBackward", "SubBackward")):  # of predictions made beside one another; not a residual's
            image = [one for one in inputs if self._is_image(one)]
            others = [one for one in inputs if one not in image]
            if len(others) < 2 or not any(self._above(one, other) for one in others for other in others if one is not other):
                yield from others

    def _is_image(self, node: Node) -> bool:
        return self.source in _walk([node], lambda one: self._before(one) if one.name().startswith(tuple(_MOVES)) else ())

    def _above(self, node: Node, other: Node) -> bool:
        """Say whether `node` was made of `other`."""
        return other in _walk([node], self._before)

    def _before(self, node: Node) -> Iterator[Node]:
        return (before for before, _ in node.next_functions if before in self.nodes)

    def rows(self, node: Node) -> dict[Node, list[Node]]:
        """Return the nodes of whose rows a node's value has made its own, and for each those that were made of it directly.

        What attention reads beside its queries is none of them.
        """
        users: dict[Node, list[Node]] = {node: []}
        todo = [node]
        while todo:
            user = todo.pop()
            for before in self._of_the_same_rows(user):
                if before not in users:
                    users[before] = []
                    todo.append(before)
                users[before].append(user)
        return users

    def is_attention(self, node: Node) -> bool:
        """Say whether a value (1, a, b, c) was made by products of matrices, not by a convolution or by pooling a map."""
        made = _walk([node], lambda one: self._before(one) if one.name().startswith(_KEEPING) else ())
        return not any(one.name().startswith(_OF_MAPS) for one in made)

    def is_of_maps(self, node: Node) -> bool:
        """Say whether a value is a map, or the image itself, but for what keeps a map's places or moves them."""
        return self._is_image(node) or not self.is_attention(node)

    def position(self, node: Node) -> int:
        """Return a number that is larger than that of all nodes it was made of."""
        return self._positions[node]

    def _of_the_same_rows(self, node: Node) -> Iterator[Node]:
        name, inputs = node.name(), node.next_functions
        if name.startswith(_PICKING):
            return
        if name.startswith(("BmmBackward", "MmBackward")) or "DotProduct" in name:
            inputs = inputs[:1]
        elif name.startswith(("Baddbmm", "Addmm")):
            inputs = inputs[:2]
        yield from (before for before, _ in inputs if before in self.nodes)


def alike(output: Tensor) -> bool:
    """Say whether every value of an output was made of the same parts of the network: nothing was joined at its end."""
    names = {node.name() for node in _walk([output.grad_fn], _before_mixing)}
    return not any(name.startswith(_JOINING) for name in names)


def _before_mixing(node: Node) -> Iterator[Node]:
    if node.name().startswith(_MIXING) and getattr(node, "_saved_groups", 1) == 1:
        return
    yield from (before for before, _ in node.next_functions if before is not None)


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of the only value that a node stands for, () where it has several."""
    about = node._input_metadata if "AccumulateGrad" not in node.name() else []
    return tuple(about[0].shape) if len(about) == 1 else ()


def tensors_in(output: object) -> list[Tensor]:
    """Return the tensors in whatever container a model returned them."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo = [output]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
            todo += vars(value).values()
    return found


def _edge(tensor: Tensor) -> tuple[Node, int] | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _walk(starts: Iterable[Node | None], before: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen: set[Node] = set()
    todo = [node for node in starts if node is not None]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += before(node)
    return seen


def _inputs_first(start: Node | None) -> Iterator[Node]:
    """Yield the nodes below one, each after all it was made of."""
    seen: set[Node] = set()
    todo = [(start, False)]
    while todo:
        node, done = todo.pop()
        if node is None:
            continue
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(before, False) for before, _ in node.next_functions if before not in seen]
