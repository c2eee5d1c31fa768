"""The layer that Grad-CAM looks at unless told: the last map of the images on the way to the score that is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from pysal._checks import refuse
from pysal._spelling import did_you_mean
from pysal.engine.layers.features import Layer
from pysal.engine.layers.lineage import Lineage, alike, tensors_in
from pysal.engine.layers.spatial import Reading, reading
from pysal.engine.layers.token_rows import TokenRows
from pysal.engine.model.not_applicable import NotApplicable, differentiating, not_differentiable
from pysal.engine.running.states import Hooks, leave_inference_mode, outside_inference, restoring

# Values whose gradients are asked for together, from the last on: mostly the first few decide.
TOGETHER = 4


@dataclass(frozen=True)
class Look:
    """A pass with gradients on one image.

    Attributes:
        image: (1, C, H, W), the leaf it began with.
        output: what the model returned.
        score: (1,), what is explained.
    """

    image: Tensor
    output: Any
    score: Tensor


@dataclass(frozen=True)
class Choice:
    """The layer that was chosen.

    Attributes:
        layer: which run of which module.
        reading: how to read the map in what it returned.
        flat: whether no change of the image changes the score, so that any layer's map is zero.
        for_all: whether another score of the same output would have led to the same layer, if it moves that score.
    """

    layer: Layer
    reading: Reading
    flat: bool = False
    for_all: bool = False


@dataclass(frozen=True)
class _Seen:
    """A value that a module returned, and that may be a map.

    Attributes:
        name: of the module.
        module: the module.
        run: counted from 0.
        edge: the value in autograd's graph, as it was before anything was written into it.
        shape: of the value.
        beside: rows of tokens as long as its third dimension is were seen before it: of attention, perhaps.
    """

    name: str
    module: nn.Module
    run: int
    edge: GradientEdge
    shape: tuple[int, ...]
    beside: bool

    @property
    def normalises(self) -> bool:
        return "norm" in type(self.module).__name__.lower() and not list(self.module.children())


def default_layer(where: str, model: object, look: Callable[[], Look]) -> Choice:
    """Return the last module that returned a map of the image on the way from it to the score.

    A map counts if it was made of the image and the score of it, if its values move the score, if it is not the model's output
    or a reshaped part of it, and if its grid is the network's own: rows of tokens are read where they come from the cells of a
    map. Of modules that return the very same tensor it is the innermost; adaptive pooling does not count.

    Where channels come last, as in transformers, only normalisations count, if one moves the score: what follows them in a
    block is a part of the sum. But a later map through which all of the score passes is better than either.

    Args:
        where: the public name of the method, for errors.
        model: whose layers are looked at.
        look: runs a pass with gradients on one image.

    Raises:
        NotApplicable: the model is no nn.Module that Python runs, or no map of it counts.
    """
    module = check_layered(where, model)
    with differentiating(where):
        return outside_inference(lambda: _chosen(where, module, *_seen(module, look)))


def check_layered(where: str, model: object) -> nn.Module:
    """Return a model that has layers to look at.

    Raises:
        NotApplicable: it is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        requirement = "be an nn.Module, whose layers can be captured"
        refuse(where, "model", requirement, type(model).__name__, NotApplicable)
    return model


def _chosen(where: str, model: nn.Module, seen: list[_Seen], runs: dict[str, int], found: Look) -> Choice:
    lineage = Lineage(found.score, found.image)
    if not lineage.complete:
        raise not_differentiable(where)
    maps = _Maps([one for one in seen if one.edge.node in lineage.nodes], lineage, found)
    last = maps.last()
    if last is None and not maps.moves_at_all():  # every map is zero: of which layer does not matter
        maps.flat = True
        last = maps.last()
    if last is None and any(maps.reading(one) for one in maps.seen):
        requirement = "no layer's map that is not the model's own output moves the score"
        raise NotApplicable(f"{where}: {requirement}; pass layer= and, where it returns tokens, tokens=")
    if last is None and any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        refuse(where, "model", "have layers that Python runs, which can be captured", "TorchScript", NotApplicable)
    if last is None and not any(True for _ in model.children()):
        requirement = (
            "have layers that are modules (torch.nn.Conv2d, not torch.nn.functional.conv2d), whose outputs can be captured"
        )
        refuse(where, "model", requirement, f"{type(model).__name__}, which has none", NotApplicable)
    if last is None:
        raise NotApplicable(f"{where}: the model has no layer with a spatial map (N, C, h, w); pass layer= and tokens=")
    for one in reversed(seen):  # a module inside the last one that returned the tensor for it
        if one.edge == last.edge and one.name.startswith(f"{last.name}."):
            last = one
    layer = Layer(last.name, last.module, last.run if runs[last.name] > 1 else None)
    how = maps.reading(last)
    assert how is not None
    return Choice(layer, how, maps.flat, isinstance(found.output, Tensor) and alike(found.output))


def needs_a_look(model: nn.Module, layer: Layer) -> bool:
    """Say whether a pass on one image must tell what a layer that was asked for returned: tokens, or what run it was."""
    return layer.run is not None or any(_works_on_tokens(module) for module in model.modules())


def _works_on_tokens(module: nn.Module) -> bool:
    maps_alone = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)
    named = "norm" in type(module).__name__.lower() and not list(module.children())
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or (
        named and not isinstance(module, maps_alone)
    )


@restoring
def reading_of(where: str, model: nn.Module, layer: Layer, look: Callable[[], Look]) -> Reading | None:
    """Return how to read the tokens that a layer returned, which was asked for; None where it returned none.

    Raises:
        ValueError: that run had nothing to do with the image, or its tokens are no cells of it.
    """
    leave_inference_mode()
    seen, runs, found = _seen(model, look)
    lineage = Lineage(found.score, found.image)
    run = 0 if layer.run is None else runs.get(layer.name, 0) - 1 if layer.run == "last" else layer.run
    own = {one.run: one for one in seen if one.name == layer.name}
    if not lineage.complete or run not in own or (layer.run is None and runs[layer.name] > 1):
        return None  # which the pass that captures the layer will say
    asked = own[run]
    if not lineage.reaches(asked.edge.node):
        others = [f"{layer.name}@{one.run}" for one in own.values() if lineage.reaches(one.edge.node)]
        requirement = f"run on the images that are explained{did_you_mean(list(map(repr, others[-3:])))}"
        refuse(where, f"layer {layer.label!r}", requirement, "a run on other inputs alone")
    if len(asked.shape) != 3 or asked.edge.node not in lineage.nodes:
        return None
    size = (found.image.shape[2], found.image.shape[3])
    how = TokenRows(lineage, size).reading(asked.edge.node)
    if how is None:
        requirement = "return tokens that are cells of the image, or be read with tokens='vit' or a callable"
        refuse(where, f"layer {layer.label!r}", requirement, f"shape {asked.shape} of one image")
    return how


@restoring
def _seen(model: nn.Module, look: Callable[[], Look]) -> tuple[list[_Seen], dict[str, int], Look]:
    """Return what modules returned, in the order in which they did, how often each module ran, and the pass."""
    runs: dict[str, int] = {}
    seen: list[_Seen] = []
    rows: set[int] = set()  # lengths of rows of tokens

    def note(name: str, module: nn.Module, output: Any) -> None:
        run = runs.get(name, 0)
        runs[name] = run + 1
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(value, Tensor) or value.ndim not in (3, 4):
            return
        shape = tuple(value.shape)
        if value.ndim == 3 and shape[2] > 1:
            rows.update(shape[:2])
        if value.grad_fn is not None:
            edge = GradientEdge(value.grad_fn, value.output_nr)
            seen.append(_Seen(name, module, run, edge, shape, shape[2] in rows))

    _watch(model, note)
    return seen, runs, look()


class _Maps:
    """The maps among what was seen, looked at from the last on, as far as it takes to find one.

    Attributes:
        seen: what lies between the image and the score.
        flat: take every map for one that moves the score.
    """

    def __init__(self, seen: list[_Seen], lineage: Lineage, found: Look) -> None:
        self.seen, self.flat = seen, False
        self._lineage, self._image = lineage, found.image
        self._size = (found.image.shape[2], found.image.shape[3])
        self._ends = lineage.answers(tensors_in(found.output))
        self._rows = TokenRows(lineage, self._size)
        self._readings: dict[GradientEdge, Reading | None] = {}
        self._moving: dict[GradientEdge, bool] = {}

    def last(self) -> _Seen | None:
        """Return the last map that counts."""
        cuts = self._lineage.cuts()
        loose: _Seen | None = None  # tokens that no normalisation returned: these count where none did
        for one in reversed(self._counting()):
            how = self.reading(one)
            if how is None:
                continue
            counts = one.normalises or not how.tokens
            passes = one.edge.node in cuts and not isinstance(one.module, (nn.Linear, nn.Dropout))
            if (counts or passes or loose is None) and self._moves(one):
                if passes or (counts and (loose is None or one.normalises)):
                    return one
                if counts:
                    return one if self._normalised() else loose
                loose = loose or one
        return loose

    def _normalised(self) -> bool:
        """Say whether a normalisation of tokens moves the score."""
        norms = (one for one in self._counting() if one.normalises)
        return any((how := self.reading(one)) is not None and how.tokens and self._moves(one) for one in norms)

    def moves_at_all(self) -> bool:
        """Say whether a change of the image changes the score."""
        (gradient,) = self._lineage.gradients([GradientEdge(self._lineage.source, 0)])
        return gradient is not None and bool(gradient.any())

    def reading(self, one: _Seen) -> Reading | None:
        """Return how to read the map in what a module returned, None where there is none."""
        if one.edge not in self._readings:
            self._readings[one.edge] = self._read(one)
        return self._readings[one.edge]

    def _read(self, one: _Seen) -> Reading | None:
        if isinstance(one.module, nn.AdaptiveAvgPool2d):
            return None  # VGG's, which brings features of any size to the size of the head
        if len(one.shape) == 3:
            return self._rows.reading(one.edge.node)
        found = reading(one.shape, one.module, self._size)
        if one.shape[0] != 1 or found is None or found.height * found.width < 2:
            return None
        if one.beside and not found.tokens and self._lineage.is_attention(one.edge.node):
            return None  # (N, heads, tokens, ...)
        return found

    def _counting(self) -> list[_Seen]:
        return [one for one in self.seen if one.edge.node not in self._ends]

    def _moves(self, one: _Seen) -> bool:
        """Say whether the score has a gradient at the map."""
        if self.flat:
            return True
        if one.edge not in self._moving:
            counting = self._counting()
            place = counting.index(one)
            some = [other for other in counting[max(0, place + 1 - TOGETHER) : place + 1] if self.reading(other)]
            gradients = self._lineage.gradients([other.edge for other in some])
            for other, gradient in zip(some, gradients, strict=True):
                how = self.reading(other)
                assert how is not None
                self._moving[other.edge] = gradient is not None and bool(how(gradient).any())
        return self._moving[one.edge]


def _watch(model: nn.Module, note: Callable[[str, nn.Module, Any], None]) -> None:
    """Have `note(name, module, output)` called whenever a module of the model has run, in a `restoring` function."""

    def watch(name: str) -> Callable[..., None]:
        return lambda module, _args, output: note(name, module, output)

    hooks = Hooks()
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            hooks.add(module, watch(name))
