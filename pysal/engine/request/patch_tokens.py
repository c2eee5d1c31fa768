"""Finds where a transformer has a token for each patch of the image, and runs it without some of them.

No class is known by its name. A layer holds patch tokens where each token it is given depends on the pixels of one patch alone,
or on none (class tokens, registers); two images that are mixed patch by patch, by the digits of the patch's number, show that.
From there on tokens may be left out if the rest of the network takes them for a set: the answer must not depend on their
order, so their positions are in them already, and what is left out must have no other way to the answer. Both are tried.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.request.extra_inputs import ordinary
from pysal.engine.request.independence import ROUNDING, away, size_of, state_of
from pysal.engine.running.states import Hooks, restoring

if TYPE_CHECKING:
    from pysal.engine.request.plan import Model, Plan

DROP = "drop"
# Layers looked at, in the order in which they are given their first row of tokens: the first block of any transformer is there.
CANDIDATES = 40
# After so many of them whose tokens are not each of one patch, the others are not tried.
MISSES = 6
# Mixed images in one pass: attention over many tokens takes much memory.
MIXED_ROWS = 8
# What a patch changes of its token, and of others by rounding, as shares of the largest change of any.
NOTHING = 1e-3
# A dependence on order that is smaller than this share of what half of the tokens mean is taken for rounding.
NEGLIGIBLE = 1e-4

_NOBODY = nn.Identity()
NEEDS_ALL = "layers need all tokens, each in its place, as with relative or rotary positions"


@dataclass(frozen=True)
class PatchTokens:
    """Where a model has its patch tokens.

    Attributes:
        model: whose layer it is, neither prepared nor compiled.
        layer: it is given the tokens, as its first argument.
        patch: height and width of a patch, in pixels.
        grid: patches in a column and in a row; pixels right of and below them are seen by no token.
        places: (N,), the token of each patch, in reading order.
        length: tokens in all.
        rows_first: whether the layer is given (rows, tokens, width), not (tokens, rows, width).
        allows_none: whether the model answers with numbers where all patches are left out.
    """

    model: nn.Module
    layer: nn.Module
    patch: tuple[int, int]
    grid: tuple[int, int]
    places: Tensor
    length: int
    rows_first: bool
    allows_none: bool = False

    @property
    def count(self) -> int:
        """Number of patches N."""
        return self.grid[0] * self.grid[1]

    def keeping(self, kept: Tensor) -> "Model":
        """Return the model for rows of images of which it sees the patches kept (n, N), as many in each row.

        It belongs into a `restoring` function.
        """
        tokens = kept.new_ones(len(kept), self.length)
        tokens[:, self.places] = kept
        return self.reading(tokens.nonzero()[:, 1].view(len(kept), -1))

    def reading(self, order: Tensor) -> "Model":
        """Return the model for rows of images of which it sees tokens (n, K) in this order."""

        def choose(_module: nn.Module, args: Any) -> Any:
            places, along = (order, 1) if self.rows_first else (order.t(), 0)
            return (args[0].gather(along, places[:, :, None].expand(-1, -1, args[0].shape[2])), *args[1:])

        def run(*args: Any, **kwargs: Any) -> Any:
            Hooks().add(self.layer, choose, before=True)
            return self.model(*args, **kwargs)

        return run

    def cells(self, values: Tensor) -> Tensor:
        """Return the sum (..., N) over the pixels of each patch of values (..., H, W)."""
        (height, width), (rows, columns) = self.patch, self.grid
        cut = values[..., : rows * height, : columns * width].unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
        sums: Tensor = cut.sum((-1, -3)).flatten(-2)
        return sums


def patch_tokens(plan: "Plan", argument: str) -> PatchTokens:
    """Return where the model of a plan has its patch tokens, looked for once as long as the model stays as it is.

    Args:
        plan: of the images.
        argument: which is "drop", for errors.

    Raises:
        ValueError: it has none that can be left out, or rows depend on each other.
    """
    found = plan.shared("patch tokens", _known)
    if isinstance(found, PatchTokens) and plan.inputs.shape[2:] == plan.root.inputs.shape[2:]:
        plan.check_independence()
        return found
    why = found if isinstance(found, str) else "images of one size alone are looked at"
    refuse(plan.where, argument, f"be another than {DROP!r} for a model without patch tokens to leave out", f"one where {why}")


class _Enough(Exception):
    """All layers of interest have been given their tokens."""


# What was found of a model when it was as a number says, without what would keep it alive: its tokens with the name of their
# layer, or why there are none.
_found: "weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[str, PatchTokens] | str]]" = weakref.WeakKeyDictionary()


def _known(plan: "Plan") -> PatchTokens | str:
    """Return what `_find` does, or did for a model that has not changed since."""
    model = plan.layered_model
    remembers, circumstances = plan._remembers("patch tokens")
    state = state_of(model, circumstances) if remembers and isinstance(model, nn.Module) else None
    if state is None:
        return _find(plan)
    assert isinstance(model, nn.Module)
    known = _found.get(model, {}).get(state)
    if known is None:
        found = _find(plan)
        if isinstance(found, PatchTokens):
            name = next(name for name, layer in model.named_modules() if layer is found.layer)
            known = name, dataclasses.replace(found, model=_NOBODY, layer=_NOBODY)
        else:
            known = found
        if state_of(model, circumstances) == state:  # a model that counts its passes is another each time
            _found[model] = {state: known}
    if isinstance(known, str):
        return known
    name, tokens = known
    return dataclasses.replace(tokens, model=model, layer=model.get_submodule(name))


def _find(plan: "Plan") -> PatchTokens | str:
    """Return where the patch tokens are, or why there are none."""
    model = plan.layered_model
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return "Python runs no layers that tokens could be taken from"
    if plan.inputs.dtype not in (torch.float32, torch.float64):
        return f"{str(plan.inputs.dtype).removeprefix('torch.')} rounds too coarsely to tell what depends on what"
    exact = plan.renamed(plan.where, plan.score.kind)
    exact.precision = "float32"
    one, other = _unlike(plan.inputs)
    reason, some, misses = "no layer is given a row of tokens, each of one patch", False, 0
    for layer, count in _given_tokens(exact, model, torch.stack([one, other])).items():
        geometries = _geometries(tuple(one.shape[1:]), count)
        tokens = next((here for each in geometries if (here := _one_to_one(exact, layer, *each, one, other))), None)
        if tokens is not None:
            checked = _checked(exact, tokens, one, other)
            if isinstance(checked, PatchTokens):
                return checked
            reason, some = checked if not some or reason == NEEDS_ALL else reason, True
        elif some or (misses := misses + 1) == MISSES:
            break  # tokens are mixed from here on
    return reason


def _unlike(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return two images of noise in the range of others, the same in every call."""
    low, high = (float(end) for end in images.aminmax())
    low, high = (low, high) if low < high else (low - 1, high + 1)
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.rand(2, *images.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
    one, other = (low + (high - low) * noise).to(images).unbind()
    return one, other


def _is_row_of_tokens(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point() and rows in value.shape[:2]


@restoring
def _watch(
    plan: "Plan", model: nn.Module, batch: Tensor, layers: list[nn.Module], see: Callable[[nn.Module, Any], None]
) -> None:
    """Run a model on images until `see`, which each layer calls with what it is given, has seen enough."""
    hooks, rows = Hooks(), torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    plan.modes(grad=False).set()
    for layer in layers:
        hooks.add(layer, lambda module, args: see(module, args[0] if args else None), before=True)
    try:
        plan.root._forward(model, ordinary(batch.clone()), rows)
    except _Enough:
        return


def _changes(tokens: Tensor, rows: int) -> Tensor:
    """Return (rows, L): whether a token of an image is another one than that of the first image."""
    tokens = tokens if len(tokens) == rows else tokens.transpose(0, 1)
    distances = (tokens - tokens[:1]).abs().amax(2)
    return distances > NOTHING * distances.max()


def _given_tokens(plan: "Plan", model: nn.Module, pair: Tensor) -> dict[nn.Module, int]:
    """Return the layers that run once and are given rows of tokens, and how many of these differ between two images."""
    found: dict[nn.Module, int] = {}
    again: set[nn.Module] = set()

    def see(layer: nn.Module, value: Any) -> None:
        if layer in found:
            again.add(layer)
        elif len(found) < CANDIDATES and _is_row_of_tokens(value, 2):
            found[layer] = int(_changes(value, 2)[1].sum())

    _watch(plan, model, pair, [*model.modules()], see)
    return {layer: count for layer, count in found.items() if layer not in again and count > 1}


def _geometries(size: tuple[int, ...], count: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the patches, and grids of them, that cut an image into so many: square ones first."""
    height, width = size
    for side in range(1, min(size) + 1):
        grid = height // side, width // side
        if grid[0] * grid[1] == count:
            yield (side, side), grid
    for rows in range(1, count + 1):
        columns = count // rows
        if rows * columns == count and not (height % rows or width % columns) and height // rows != width // columns:
            yield (height // rows, width // columns), (rows, columns)


def _one_to_one(
    plan: "Plan", layer: nn.Module, patch: tuple[int, int], grid: tuple[int, int], one: Tensor, other: Tensor
) -> PatchTokens | None:
    """Return the tokens of a layer if each depends on one patch, or on none, and each patch has one."""
    model, count = plan.layered_model, grid[0] * grid[1]
    assert isinstance(model, nn.Module)
    bits = max(1, math.ceil(math.log2(count)))
    numbers = torch.arange(count, device=one.device)
    digits = torch.stack([numbers >> bit & 1 for bit in range(bits)]).bool()
    spread = _spread(torch.cat([digits, ~digits]).view(2 * bits, *grid), patch)
    # in the last image only pixels change that belong to no patch
    mixed = torch.zeros(2 * bits + 1, *one.shape[1:], dtype=torch.bool, device=one.device)
    mixed[:-1, : spread.shape[1], : spread.shape[2]] = spread
    mixed[-1] = True
    mixed[-1, : spread.shape[1], : spread.shape[2]] = False
    changes: list[Tensor] = []
    layouts: set[bool] = set()
    for part in mixed.split(MIXED_ROWS - 2):
        # the unchanged image first, and last the other one, so that the largest change is in every pass
        batch = torch.cat([one[None], torch.where(part[:, None], other, one), other[None]])

        def see(_layer: nn.Module, value: Any, rows: int = len(batch)) -> None:
            if _is_row_of_tokens(value, rows):
                layouts.add(len(value) == rows)
                changes.append(_changes(value, rows)[1:-1])
            raise _Enough

        _watch(plan, model, batch, [layer], see)
    if len(layouts) != 1 or len({one.shape[1] for one in changes}) != 1 or sum(map(len, changes)) != len(mixed):
        return None
    changed = torch.cat(changes)
    ones, zeros, of_patch = changed[:bits], changed[bits:-1], changed.any(0)
    code = (ones.long() << torch.arange(bits, device=ones.device)[:, None]).sum(0)[of_patch]
    if changed[-1].any() or not (ones ^ zeros)[:, of_patch].all() or not torch.equal(code.sort().values, numbers):
        return None
    places = of_patch.nonzero()[:, 0][code.argsort()]
    return PatchTokens(model, layer, patch, grid, places, changed.shape[1], layouts.pop())


def _spread(patches: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return (n, rows of pixels, columns of pixels) of one value for each patch (n, rows, columns)."""
    return patches.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)


def _checked(plan: "Plan", tokens: PatchTokens, one: Tensor, other: Tensor) -> PatchTokens | str:
    """Return patch tokens that can be left out, or why these cannot."""
    device, count = one.device, tokens.count
    everything = torch.arange(tokens.length, device=device)
    swapped = everything.clone()
    generator = torch.Generator(device="cpu").manual_seed(1)
    swapped[tokens.places] = tokens.places[torch.randperm(count, generator=generator, device="cpu").to(device)]
    half = torch.arange(count, device=device) % 2 == 0
    gone = _spread((~half).view(1, *tokens.grid), tokens.patch)
    _, height, width = gone.shape
    elsewhere = one.clone()
    elsewhere[:, :height, :width] = torch.where(gone, other[:, :height, :width], one[:, :height, :width])
    try:
        clean = _answer(plan, tokens.model, one)
        moved = _answer(plan, tokens.reading(swapped[None]), one)
        without = _answer(plan, tokens.keeping(half[None]), one)
        unseen = _answer(plan, tokens.keeping(half[None]), elsewhere)
    except Exception:  # the model's own, of any kind, about fewer tokens
        return NEEDS_ALL
    size = max(size_of(clean), size_of(without))
    effect = away(clean, without)
    if not math.isfinite(effect):  # an answer for each token, or none
        return NEEDS_ALL
    allowed = ROUNDING * torch.finfo(clean.dtype).eps / 2 * size + NEGLIGIBLE * effect
    if not away(moved, clean) <= allowed:
        return NEEDS_ALL
    if not away(unseen, without) <= allowed:
        return "the answer depends on pixels of patches whose tokens are left out"
    try:
        none = _answer(plan, tokens.keeping(torch.zeros_like(half)[None]), one)
        allows_none = bool(none.isfinite().all())
    except Exception:  # the model's own, of any kind
        allows_none = False
    return dataclasses.replace(tokens, allows_none=allows_none)


@restoring
def _answer(plan: "Plan", model: "Model", image: Tensor) -> Tensor:
    """Return what the model, or a part of it, answers to one image."""
    return plan._ask(image[None], torch.zeros(1, dtype=torch.int64, device=image.device), model)
