"""Class activation maps: Grad-CAM, its other kinds, and Guided Grad-CAM."""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal import ops
from pysal._checks import check_flag, refuse, refuse_unknown
from pysal._library import without_autocast
from pysal.engine.layers.default_layer import Choice, check_layered, default_layer, needs_a_look, reading_of
from pysal.engine.layers.features import Layer, find_layer
from pysal.engine.layers.spatial import Reading, reading
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.model.relu_rules import OtherActivations
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.activations import activations
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.sweeps import Sweep
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.cam_kinds import KINDS, Kind, KindName, kind_of, made, unit
from pysal.methods.cam_weights import ablated_weights, masked_weights
from pysal.methods.guided_backprop import ruled

# Images that the default layer is looked for with, until a change of one changes its score.
LOOKS = 4

# How to read what a layer returns, by layer and size of the images: a model is looked at for it once.
_READINGS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[int, ...]], Reading | None]] = weakref.WeakKeyDictionary()

Tokens: TypeAlias = Literal["vit", "swin"] | Callable[[Tensor], Tensor] | None
Layers: TypeAlias = str | nn.Module | Sequence[str | nn.Module] | None
Fuse: TypeAlias = Literal["mean", "max", "product"]
FUSIONS = ("mean", "max", "product")
# What makes a copy of images, and what takes its maps back.
Pair: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
Augment: TypeAlias = bool | Sequence[Pair]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flipped(tensor: Tensor) -> Tensor:
    return tensor.flip(3)


def _flipped_times(factor: float, images: Tensor) -> Tensor:
    return images.flip(3) * factor


FLIPPED_AND_SCALED: tuple[Pair, ...] = tuple(
    pair
    for factor in (0.9, 1.0, 1.1)
    for pair in (
        (functools.partial(torch.mul, other=factor), _same),
        (functools.partial(_flipped_times, factor), _flipped),
    )
)


def grad_cam(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    layer: Layers = None,
    tokens: Tokens = None,
    kind: KindName | Callable[[Tensor, Tensor], Tensor] = "grad_cam",
    eigen_smooth: bool = False,
    fuse: Fuse = "mean",
    augment: Augment = False,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the class activation map of a layer: relu(sum_k mean(G_k) A_k), bilinear to the image's size, or another kind.

    A is the layer's activation and G = df/dA. Nothing below the layer is kept for the backward pass.

    Args:
        model: an nn.Module in eval mode.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        layer: a module of the model or its name; "blocks[2]" and "blocks.2" are the same child, "act@3" is the fourth run of a
            module that runs several times, "act@-1" its last. None = the last that returns a map of the image on the way to the
            score, which `explain` names: one with a gradient that is not the output itself; in transformers a normalisation, or
            a later layer through which all of the score passes. Several layers, in a list, give one map: see `fuse`.
        tokens: how to read a map out of what the layer returns: "vit" (N, 1 + h w, K) with a class token first, "swin"
            (N, h, w, K), a callable to (N, K, h, w), or None = (N, K, h, w) or (N, h, w, K), as the image's proportions say, or
            rows of tokens, (N, L, K) or (L, N, K), of which those are read that were the cells of a map of the network's own.
        kind: what is made of A and G. "grad_cam": mean(G_k) A_k. "hirescam": G A. "layer_cam": relu(G) A.
            "grad_cam_elementwise": relu(G A). "grad_cam_plus_plus" and "xgrad_cam": w_k A_k with other weights. "eigen_cam": A
            along its first singular vector, whatever the score. "eigen_grad_cam", "seg_eigen_cam": the first principal
            component of G A, of |G| A. "kpca_cam": A's in a kernel's space. "fem": the share of a channel's cells that stand
            out, times A_k. "shapley_cam": Grad-CAM of G less half the curvature times A. "score_cam": w_k is a softmax of the
            scores of the image seen through each channel. "ablation_cam": w_k is the drop of the score without the channel. Or
            a function (A, G), (N, K, h, w) each, to terms of that shape, weights (N, K) or a map (N, 1, h, w).
            `docs/methods/cam_kinds.md` says which when.
        eigen_smooth: whether the first principal component of the terms is drawn, not their sum.
        fuse: what becomes of the maps of several layers, each scaled to [0, 1]: their "mean", "max" or "product".
        augment: whether six copies of each image are explained, flipped or not, times 0.9, 1 and 1.1, and their maps, each
            scaled to [0, 1], averaged; or pairs of functions (image -> image, map -> map) of batches (N, C, H, W) that make
            other copies and take their maps back.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, 1, H, W), 0 or more; in [0, 1] where maps are fused or averaged.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a model that is no nn.Module.
        ValueError: a wrong shape, value or target; no such layer, or one without a spatial map of the images.
        NotApplicable: no layer was given, and the model has none that counts.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391, equations 1 and 2; of the other kinds, see `docs/methods/cam_kinds.md`.
    """
    plan = Plan("pysal.grad_cam", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare(plan, layer=layer, tokens=tokens, kind=kind, eigen_smooth=eigen_smooth, fuse=fuse, augment=augment)
    return work.run(report=False).map


def guided_grad_cam(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    layer: str | nn.Module | None = None,
    tokens: Tokens = None,
    other_activations: OtherActivations = "error",
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return guided backprop times the upsampled Grad-CAM map, both from one forward pass.

    Args:
        model: an nn.Module in eval mode.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        layer: see `grad_cam`.
        tokens: see `grad_cam`.
        other_activations: see `guided_backprop`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, C, H, W), signed.

    Raises:
        TypeError: as `grad_cam`.
        ValueError: as `grad_cam` and `guided_backprop`.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391, section 3.2.
    """
    plan = Plan("pysal.guided_grad_cam", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare_guided(plan, layer=layer, tokens=tokens, other_activations=other_activations)
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    layer: Layers,
    tokens: Tokens,
    kind: str | Kind | Callable[[Tensor, Tensor], Tensor],
    eigen_smooth: bool,
    fuse: Fuse,
    augment: Augment,
) -> Work:
    """Return the work that finds a class activation map of every image of a plan.

    Details: "moving" (B,), where a map is zero, whether a gradient arrived; "layer";
    "native" (B, 1, h, w), of the image's size where maps are fused or averaged; of another kind than Grad-CAM
    its "cam" and "title", too.
    """
    check_flag(plan.where, "eigen_smooth", eigen_smooth)
    if fuse not in FUSIONS:
        refuse_unknown(plan.where, "fuse", f"be one of {', '.join(map(repr, FUSIONS))}", fuse, FUSIONS)
    copies = copies_of(plan.where, augment)
    several: list[str | nn.Module | None] = list(layer) if isinstance(layer, (list, tuple)) else [layer]  # type: ignore[list-item]
    if not several:
        refuse(plan.where, "layer", "name at least one layer", "none")
    drawn = _Drawn(kind_of(plan.where, kind), eigen_smooth)
    works = [_prepare(plan, one, tokens, drawn, None) for one in several]
    work = works[0] if len(works) == 1 else _fused(plan, works, fuse)
    if not copies:
        return work

    def again(copied: Plan) -> Attribution:
        inner = prepare(
            copied, layer=layer, tokens=tokens, kind=drawn.kind, eigen_smooth=eigen_smooth, fuse=fuse, augment=False
        )
        return inner.run(report=False)

    scored = drawn.kind.gradient or drawn.kind.passes != "none"
    return Work(plan, lambda _report: augmented(plan, copies, again, scored=scored))


def prepare_guided(
    plan: Plan,
    *,
    layer: str | nn.Module | None,
    tokens: Tokens,
    other_activations: OtherActivations,
) -> Work:
    """Return the work that finds Guided Grad-CAM of every image of a plan; details: "layer", "native" (B, 1, h, w)."""
    return _prepare(plan, layer, tokens, _Drawn(KINDS["grad_cam"], False), ruled(plan.where, "guided", other_activations))


@dataclass(frozen=True)
class _Drawn:
    """What is made of a layer, and whether it is smoothed."""

    kind: Kind
    smooth: bool


@dataclass(frozen=True)
class _Cam:
    """Makes maps of a layer's activation and gradient, of the image's size and of the layer's, and says which scores move."""

    tokens: Tokens
    how: Reading | None
    height: int
    width: int
    drawn: _Drawn
    where: str = field(compare=False)
    layer: Layer = field(compare=False)

    def __call__(self, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        activation, gradient = self.spatial(activation), self.spatial(gradient)
        moving = gradient.flatten(1).any(1)
        if self.drawn == _Drawn(KINDS["grad_cam"], False):
            small = ops.grad_cam(activation, gradient, activation.shape[2], activation.shape[3], relu=True)
            return ops.grad_cam(activation, gradient, self.height, self.width, relu=True), small, moving
        return *self.map(activation, gradient, None), moving

    def spatial(self, value: Tensor) -> Tensor:
        """Return what the layer returns, or its gradient, as (N, K, h, w)."""
        tokens = self.tokens or self.how or reading(tuple(value.shape), self.layer.module, (self.height, self.width))
        return _spatial(self.where, self.layer.label, tokens, value)

    def map(self, activation: Tensor, gradient: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map of the image's size, and of the layer's, of what `spatial` returned."""
        with without_autocast(activation.device.type):
            a, g = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (activation, gradient))
            small = made(self.drawn.kind, self.where, a, g, smooth=self.drawn.smooth, weights=weights).clamp_min(0)
            return resized(small, (self.height, self.width)), small


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (N, 1, h, w) of another size, bilinearly, corners not aligned."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False).contiguous()


def _prepare(plan: Plan, layer: str | nn.Module | None, tokens: Tokens, drawn: _Drawn, guided: Sweep | None) -> Work:
    if not (tokens is None or callable(tokens) or (isinstance(tokens, str) and tokens in ("vit", "swin"))):
        refuse(plan.where, "tokens", "be None, 'vit', 'swin' or a callable", repr(tokens))

    asked = None
    if layer is None:
        check_layered(plan.where, plan.layered_model)
    else:
        asked = find_layer(plan.where, plan.layered_model, layer)

    def cam(chosen: Layer, how: Reading | None) -> _Cam:
        height, width = plan.inputs.shape[2:]
        return _Cam(tokens, how, height, width, drawn, plan.where, chosen)

    if not drawn.kind.gradient:
        return Work(plan, lambda _report: _without_gradient(plan, asked, tokens, cam))

    def sweeps(chosen: Layer, how: Reading | None) -> list[Sweep]:
        curvature = drawn.kind.curvature
        at_layer = Sweep(layer=chosen, reduce=cam(chosen, how), curvature=curvature, where=plan.where)
        return [at_layer, *([guided] if guided else [])]

    def wanted() -> list[Sweep]:
        if asked is not None:
            return sweeps(asked, _reading_of(plan, asked, tokens))
        choice = _default(plan)
        return sweeps(choice.layer, choice.reading)

    return Work(plan, lambda report: _attribute(plan, asked, tokens, drawn.kind, sweeps, report), wanted)


def _attribute(
    plan: Plan,
    asked: Layer | None,
    tokens: Tokens,
    kind: Kind,
    sweeps: Callable[[Layer, Reading | None], list[Sweep]],
    report: bool,
) -> Attribution:
    def swept(chosen: Layer, how: Reading | None) -> list[tuple[Tensor, ...]]:
        return plan.sweeps(*sweeps(chosen, how))

    if asked is not None:
        chosen = asked
        (result, native, moving), *others = swept(chosen, _reading_of(plan, chosen, tokens))
    else:
        choice = _default(plan)
        (result, native, moving), *others = swept(choice.layer, choice.reading)
        if not bool(moving.all()):
            settled = _settled(plan, choice, plan.origin[~moving])
            if settled.layer != choice.layer:
                choice = settled
                (result, native, moving), *others = swept(choice.layer, choice.reading)
        chosen = choice.layer
    _check_number(plan, chosen, len(result), was_asked=asked is not None)
    for (gradient,) in others:
        result = gradient * result
    found = _found(plan, result, native, chosen.label, kind, 1)
    if report and not bool(native.flatten(1).any(1).all()):
        found.details["moving"] = moving  # tells a map that is cut off at zero from one that no gradient made
    return found


def _found(plan: Plan, result: Tensor, native: Tensor, label: str, kind: Kind, passes: float) -> Attribution:
    details = {"layer": label, "native": native.to(plan.dtype)}
    if kind != KINDS["grad_cam"]:
        details |= {"cam": kind.name, "title": kind.title}
    return Attribution(result.to(plan.dtype), passes, details)


def _check_number(plan: Plan, layer: Layer, number: int, *, was_asked: bool) -> None:
    if number != plan.images:
        what, got = f"return a map for each of {plan.images} images", f"{number} maps"
        # who asked for no layer made no mistake
        refuse(plan.where, f"layer {layer.label!r}", what, got, ValueError if was_asked else NotApplicable)


def _without_gradient(
    plan: Plan, asked: Layer | None, tokens: Tokens, cam_of: Callable[[Layer, Reading | None], _Cam]
) -> Attribution:
    """Find the map of a kind that needs no gradient, but forward passes alone."""
    if asked is None:
        choice = _default(plan)
        layer, cam = choice.layer, cam_of(choice.layer, choice.reading)
    else:
        layer, cam = asked, cam_of(asked, _reading_of(plan, asked, tokens))
    kind, parts, returned = cam.drawn.kind, list[Tensor](), list[Tensor]()
    run = [layer]

    def body(start: int, stop: int) -> None:
        rows = torch.arange(start, stop, device=plan.device)
        found, run[0] = activations(plan, plan.inputs[start:stop], rows, layer)
        parts.append(cam.spatial(found))
        if kind.passes == "ablated":
            returned.append(found)

    plan.run(plan.images, body)
    activation = torch.cat(parts)
    _check_number(plan, layer, len(activation), was_asked=asked is not None)
    weights, passes = None, 1
    if kind.passes != "none":
        plan.fix_target()
        passes += activation.shape[1]
        if kind.passes == "masked":
            weights = masked_weights(plan, activation, align_corners=kind.align_corners)
        else:
            weights = ablated_weights(plan, torch.cat(returned), activation.shape[1], run[0], cam.spatial)
    # a chunk at a time: what is made of the activations is larger than they are
    pieces: list[tuple[Tensor, Tensor]] = []

    def draw(start: int, stop: int) -> None:
        some = activation[start:stop]
        pieces.append(cam.map(some, some, None if weights is None else weights[start:stop]))

    plan.run(plan.images, draw)
    result, native = (torch.cat(some) for some in zip(*pieces, strict=True))
    return _found(plan, result, native, layer.label, kind, passes)


def _fused(plan: Plan, works: Sequence[Work], fuse: Fuse) -> Work:
    """Return the work that makes one map of those of several layers."""
    size = (plan.inputs.shape[2], plan.inputs.shape[3])

    def make(_report: bool) -> Attribution:
        plan.sweeps(*wanted())  # all in one pass
        found = [work.run(report=False) for work in works]
        with without_autocast(plan.device.type):
            maps = torch.stack([resized(unit(one.details["native"]), size) for one in found])
            result = {"mean": lambda: maps.mean(0), "max": lambda: maps.amax(0), "product": lambda: maps.prod(0)}[fuse]()
        label = ", ".join(one.details["layer"] for one in found)
        passes = 1 + sum(one.passes - 1 for one in found)
        return Attribution(result, passes, {**found[0].details, "layer": label, "native": result})

    def wanted() -> list[Sweep]:
        return [sweep for work in works for sweep in work.wanted()]

    return Work(plan, make, wanted)


def augmented(plan: Plan, copies: Sequence[Pair], explain: Callable[[Plan], Attribution], *, scored: bool) -> Attribution:
    """Return the mean of the maps of an image's copies, each scaled to [0, 1] and taken back; `scored`: of a score."""
    if scored:
        plan.fix_target()
    number, kept = len(copies), list[Attribution]()
    size = (plan.images, 1, *plan.inputs.shape[2:])
    mean = torch.zeros(size, dtype=plan.accumulator_dtype, device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, which = plan.places(start, stop, number)
        images = plan.inputs[rows]
        for copy in which.unique().tolist():
            images[which == copy] = _applied(plan.where, copies[copy][0], images[which == copy])
        copied = plan.derive(images, rows)
        found = explain(copied)
        kept[:] = [found]
        maps = unit(found.map.to(mean.dtype))
        for copy in which.unique().tolist():
            maps[which == copy] = _applied(plan.where, copies[copy][1], maps[which == copy])
        mean.index_add_(0, rows, maps / number)

    plan.run(plan.images * number, body)
    result = mean.to(plan.dtype)
    return Attribution(result, kept[0].passes * number, {**kept[0].details, "native": result})


def _applied(where: str, function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    found: object = function(tensor)
    if not isinstance(found, Tensor) or found.shape != tensor.shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        refuse(where, "augment", f"keep the shape {tuple(tensor.shape)}", got)
    return found


def copies_of(where: str, augment: object) -> Sequence[Pair]:
    """Return how copies are made of images, none where there is only the image itself."""
    if isinstance(augment, bool):
        return FLIPPED_AND_SCALED if augment else ()
    pairs = list(augment) if isinstance(augment, Sequence) and not isinstance(augment, str) else []
    if not pairs or not all(isinstance(one, Sequence) and len(one) == 2 and all(map(callable, one)) for one in pairs):
        requirement = "be True, False or a list of pairs of functions (image -> image, map -> map)"
        refuse(where, "augment", requirement, repr(augment), TypeError)
    return [(one[0], one[1]) for one in pairs]


def _reading_of(plan: Plan, layer: Layer, tokens: Tokens) -> Reading | None:
    """Return how to read the tokens of a layer that was asked for; None = its shape says it."""
    model = plan.layered_model
    assert isinstance(model, nn.Module)
    if not (plan.extra_inputs or needs_a_look(model, layer)) or (tokens is not None and layer.run is None):
        return None
    known, size = _READINGS.setdefault(model, {}), tuple(plan.inputs.shape[2:])
    if (layer.label, size) not in known or plan.extra_inputs:
        known[layer.label, size] = plan.shared(
            ("reading", layer.label), lambda root: reading_of(plan.where, model, layer, lambda: root.look(0))
        )
    return known[layer.label, size]


def _default(plan: Plan) -> Choice:
    """Return the layer for the first image that has one."""
    prepared = plan.model if isinstance(plan.model, PreparedModel) and not plan.extra_inputs else None
    if prepared is None:
        return _first(plan)
    classes = plan.score.classes_of_first_image()
    choice = prepared.default_layer_for(plan.inputs, classes)
    if choice is None:
        choice = _first(plan)
        if classes is not None and not choice.flat:
            prepared.remember_default_layer(plan.inputs, classes, choice)
    return choice


def _first(plan: Plan) -> Choice:
    """Look for the layer with the first image that changes its score."""
    for image in range(min(plan.root.images, LOOKS)):
        choice = _looked(plan, image)
        if not choice.flat:
            return choice
    return _looked(plan, 0)


def _looked(plan: Plan, image: int) -> Choice:
    return plan.shared(
        ("default_layer", plan.score.kind, image),
        lambda root: default_layer(plan.where, root.layered_model, lambda: root.look(image)),
    )


def _settled(plan: Plan, choice: Choice, images: Tensor) -> Choice:
    """Return the layer after a closer look, because that which was chosen does not move the scores of some images.

    Raises:
        NotApplicable: of one of these another layer does.
    """
    first = _first(plan)
    for image in images.unique().tolist():
        own = _looked(plan, image)
        if not own.flat and own.layer != first.layer:
            raise NotApplicable(
                f"{plan.where}: the last layer that moves the score must be the same for all images, "
                f"got {own.layer.label!r} of image {image} beside {first.layer.label!r}; explain them apart, or pass layer="
            )
    return first


def _spatial(where: str, layer: str, tokens: Tokens, value: Tensor) -> Tensor:
    """Return a layer's activation, or its gradient, as (N, K, h, w)."""
    shape = tuple(value.shape)
    if tokens == "vit" and value.ndim == 3 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1 > 0:
        side = math.isqrt(shape[1] - 1)
        grid: Tensor = value[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        return grid.contiguous()
    if tokens == "swin" and value.ndim == 4:
        return value.permute(0, 3, 1, 2).contiguous()
    if callable(tokens):
        read: object = tokens(value)
        if isinstance(read, Tensor) and read.ndim == 4:
            return read
        got = f"shape {tuple(read.shape)}" if isinstance(read, Tensor) else type(read).__name__
        refuse(where, "tokens", "return a tensor (N, K, h, w)", got)
    if tokens is None:
        requirement = "return a map (N, K, h, w), or be read with tokens='vit', 'swin' or a callable"
        refuse(where, f"layer {layer!r}", requirement, f"shape {shape}")
    if tokens == "vit":
        refuse(where, f"layer {layer!r}", "return tokens (N, 1 + h * h, K) for tokens='vit'", f"shape {shape}")
    refuse(where, f"layer {layer!r}", "return tokens (N, h, w, K) for tokens='swin'", f"shape {shape}")
