"""Finds which token of a row is which cell of a map: the row's own history says so, not its length."""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pysal._library import widened
from pysal.engine.layers.lineage import Lineage, shape_of
from pysal.engine.layers.spatial import Reading, is_like

# Maps that are tried, the largest and earliest first, until one has become the row; and rows of other lengths.
TRIED = 8
# Operations within which it does. What lies further away was mixed by attention, and costs much to ask.
STEPS = 12
# How often tokens may have been added to a row or taken from it.
CHAIN = 3
# Of each cell, row by row, its token, None where it has none.
_Tokens: TypeAlias = list[int | None]
# Height and width of a map in a row, and the token of each cell, row by row.
_Cells: TypeAlias = tuple[int, int, tuple[int, ...]]
# Names of autograd's nodes, by their beginnings, that may return a row of as many tokens in another order.
MOVING = ("Flip", "Index", "Roll", "View", "UnsafeView", "Reshape", "AsStrided", "Cat", "Gather")
# How often a row may become another in which each token's place has to be asked for.
GAPS = 24
# Tokens are numbered in digits of this base, which come through half precision, too.
BASE = 16
# How far a digit may be from a whole number, and the gradients that tell it from being multiples of each other.
TOLERANCE = 0.25


@dataclass(frozen=True)
class _Grid:
    """A value with a map of the image in it.

    Attributes:
        node: which value.
        height: of the map.
        width: of the map.
        first: the dimension at which the map begins.
        dims: 2, or 1 where its cells lie in a row already.
    """

    node: Node
    height: int
    width: int
    first: int
    dims: int = 2

    @property
    def cells(self) -> int:
        return self.height * self.width

    def by_cell(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the value as (cells, the rest)."""
        ordered = gradient.movedim(tuple(range(self.first, self.first + self.dims)), tuple(range(self.dims)))
        return ordered.reshape(self.cells, -1)


class TokenRows:
    """Reads rows of tokens (1, L, K) or (L, 1, K) of one pass.

    Args:
        lineage: of the pass.
        image: (height, width) of its images.
    """

    def __init__(self, lineage: Lineage, image: tuple[int, int]) -> None:
        self._lineage, self._image = lineage, image
        self._known: dict[tuple[_Grid, Node], _Tokens | None] = {}

    def reading(self, node: Node) -> Reading | None:
        """Return how to read the map in a row of tokens, None where its tokens are no cells of the image."""
        found = self._cells(node)
        if found is None:
            return None
        height, width, order = found
        sequence_first = shape_of(node)[0] != 1
        if order == tuple(range(order[0], order[0] + len(order))):
            return Reading(height, width, order[0], sequence_first=sequence_first)
        return Reading(height, width, 0, sequence_first=sequence_first, order=order)

    def _cells(self, node: Node, chain: int = 0) -> _Cells | None:
        """Return the map in a row, whose tokens may have come from a row of another length, and that of a third."""
        length = _length(shape_of(node))
        if length is None:
            return None
        users = self._lineage.rows(node)
        grids = [grid for one in users for grid in self._grids(one, length) if _ends_there(grid, users[one])]
        grids.sort(key=lambda grid: (-grid.cells, self._lineage.position(grid.node)))
        for grid in grids[:TRIED]:
            order = _whole(self._tokens(grid, users, length, node))
            if order is not None:
                return grid.height, grid.width, order
        return self._of_another_length(node, users, length, chain) if chain < CHAIN else None

    def _of_another_length(self, end: Node, users: dict[Node, list[Node]], length: int, chain: int) -> _Cells | None:
        """Return the map in a row to which tokens were added later than to the first, or from which some were taken.

        Or whose tokens were pooled, a rectangle of cells to each.
        """
        rows = [one for one in users if _length(shape_of(one)) not in (None, length)]
        changed = [one for one in rows if any(_length(shape_of(user)) == length for user in users[one])]
        pooled = [one for one in rows if max(shape_of(one)[:2]) % length == 0]
        for some in (changed, pooled):
            for one in sorted(some, key=self._lineage.position, reverse=True)[:TRIED]:
                tokens = self._tokens(_row(one), users, length, end)
                earlier = self._cells(one, chain + 1) if tokens is not None else None
                if tokens is not None and earlier is not None:
                    height, width, places = earlier
                    found = _pooled(height, width, [tokens[place] for place in places])
                    if found is not None:
                        return found
        return None

    def _grids(self, node: Node, length: int) -> list[_Grid]:
        """Return the maps of the image in a node's value that have at most so many cells."""
        shape = shape_of(node)
        if len(shape) < 3 or shape[0] != 1:
            return []
        if len(shape) == 3:
            found = _unfolded(node)
        else:
            found = [_Grid(node, shape[1], shape[2], 1)]
            if len(shape) == 4:
                found.append(_Grid(node, shape[2], shape[3], 2))
        found = [grid for grid in found if 2 <= grid.cells <= length and is_like((grid.height, grid.width), self._image)]
        # heads, windows and tokens of attention may have a map's proportions, too
        return found if found and (len(shape) == 3 or self._lineage.is_of_maps(node)) else []

    def _tokens(self, grid: _Grid, users: dict[Node, list[Node]], length: int, end: Node) -> _Tokens | None:
        """Return the token that each cell became in a row, None where a cell has a share in several.

        The nearest row tells, and then every rearrangement of all tokens on the way to the end. What attention mixes is taken
        to stay in its place.
        """
        row = _first_row(grid.node, users, length)
        tokens = None if row is None else self._became(grid, row)
        if (
            row is not None and tokens is None and shape_of(row)[-1] == length
        ):  # as many channels, in which each cell has a share
            row = _first_row(row, users, length)
            tokens = None if row is None else self._became(grid, row)
        for _ in range(GAPS):
            if row is None or tokens is None:
                return tokens
            kept = _in_order(row, users, length)
            if end in kept:
                return tokens
            last = max(kept, key=self._lineage.position)
            row = _first_row(last, users, length, kept, 2 * STEPS)
            moved = None if row is None else _whole(self._became(_row(last), row))
            if moved is not None and len(set(moved)) == length:
                tokens = [None if token is None else moved[token] for token in tokens]
        return None

    def _became(self, grid: _Grid, row: Node) -> _Tokens | None:
        if (grid, row) not in self._known:
            self._known[grid, row] = _became(grid, row)
        return self._known[grid, row]


def _became(grid: _Grid, row: Node) -> _Tokens | None:
    """Return the token that each cell became in a row, None of a cell that became none.

    If the gradient of every token is multiplied by its number, then a cell's gradient is multiplied by the number of its token,
    but where a cell has a share in several.
    """
    shape, about = shape_of(row), row._input_metadata[0]
    length = max(shape[:2])
    generator = torch.Generator(device="cpu").manual_seed(0)
    channels = (
        torch.rand(shape[2], generator=generator, dtype=torch.float32, device="cpu").add_(0.5).to(about.device, about.dtype)
    )
    numbers = torch.arange(length, device=about.device)

    def back(factors: Tensor) -> Tensor | None:
        seed = (factors.to(about.dtype).unsqueeze(1) * channels).reshape(shape)
        end, start = GradientEdge(row, 0), GradientEdge(grid.node, 0)
        (found,) = torch.autograd.grad([end], [start], [seed], allow_unused=True, retain_graph=True)
        return None if found is None else widened(grid.by_cell(found))

    once = back(torch.ones(length, dtype=torch.float32, device=about.device))
    if once is None:
        return None
    norms = once.square().sum(1)
    token = torch.zeros(grid.cells, dtype=torch.int64, device=about.device)
    for digit in range(math.ceil(math.log(length + 1, BASE))):
        found = back(numbers // BASE**digit % BASE)
        assert found is not None
        digits = ((found * once).sum(1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)).round()
        rest = (found - digits.unsqueeze(1) * once).square().sum(1)
        if not bool((rest <= TOLERANCE**2 * norms).all()):
            return None
        token += digits.long() * BASE**digit
    became = [number if norm > 0 else None for number, norm in zip(token.tolist(), norms.tolist(), strict=True)]
    return became if all(0 <= number < length for number in became if number is not None) else None


def _whole(tokens: _Tokens | None) -> tuple[int, ...] | None:
    """Return the tokens of all cells, None where a cell has none, or one that is another's, too."""
    found = [] if tokens is None else [token for token in tokens if token is not None]
    return tuple(found) if tokens is not None and len(set(found)) == len(tokens) else None


def _pooled(height: int, width: int, tokens: _Tokens) -> _Cells | None:
    """Return the map of the tokens of a map's cells: smaller by a whole number of cells each way where tokens were pooled.

    Of cells that were pooled some may have no token: those that were the largest in no channel.
    """
    number = len({token for token in tokens if token is not None})
    for rows in range(1, height + 1):
        columns, rest = divmod(height * width, rows * max(number, 1))
        if rest or height % rows or columns < 1 or width % columns:
            continue
        size = (height // rows, width // columns)
        inside: list[set[int]] = [set() for _ in range(size[0] * size[1])]
        for place, token in enumerate(tokens):
            if token is not None:
                inside[place // width // rows * size[1] + place % width // columns].add(token)
        if all(len(one) == 1 for one in inside):
            return *size, tuple(one.pop() for one in inside)
    return None


def _row(node: Node) -> _Grid:
    """Return a row of tokens as a map of one column."""
    shape = shape_of(node)
    return _Grid(node, max(shape[:2]), 1, int(shape[0] == 1), dims=1)


def _in_order(row: Node, users: dict[Node, list[Node]], length: int) -> set[Node]:
    """Return the rows of so many tokens made of a row by what leaves each in its place."""
    found, todo = {row}, [row]
    while todo:
        for user in users[todo.pop()]:
            if user not in found and _length(shape_of(user)) == length and not user.name().startswith(MOVING):
                found.add(user)
                todo.append(user)
    return found


def _ends_there(grid: _Grid, users: list[Node]) -> bool:
    """Say whether something was made of a map that is no such map any more."""
    size = (grid.height, grid.width)
    return any(size not in set(itertools.pairwise(shape)) for shape in map(shape_of, users))


def _length(shape: tuple[int, ...]) -> int | None:
    """Return the number of tokens in a row of one image, None where a value is none."""
    if len(shape) != 3 or 1 not in shape[:2] or shape[0] == shape[1] or shape[2] < 2:
        return None
    return max(shape[:2])


def _unfolded(node: Node) -> list[_Grid]:
    """Return the map whose cells are the windows that `unfold` took."""
    if not node.name().startswith("Im2Col"):
        return []
    image = shape_of(node.next_functions[0][0]) if node.next_functions[0][0] is not None else ()
    geometry = [getattr(node, f"_saved_{name}") for name in ("kernel_size", "stride", "padding", "dilation")]
    if len(image) != 4:
        return []
    sizes = [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, padding, dilation in zip(image[2:], *geometry, strict=True)
    ]
    return [_Grid(node, sizes[0], sizes[1], 2, dims=1)]


def _first_row(
    start: Node, users: dict[Node, list[Node]], length: int, known: Collection[Node] = (), steps: int = STEPS
) -> Node | None:
    """Return the nearest value made of another that is a row of so many tokens, and not one of those that are known."""
    some, seen = [start], {start, *known}
    for _ in range(steps):
        some = [user for node in some for user in users[node] if user not in seen]
        seen.update(some)
        for node in some:
            if _length(shape_of(node)) == length:
                return node
    return None
