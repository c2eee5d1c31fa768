"""Grad-CAM and Guided Grad-CAM."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pysal import ops
from pysal._checks import refuse
from pysal.engine.layers.default_layer import Choice, check_layered, default_layer, needs_a_look, reading_of
from pysal.engine.layers.features import Layer, find_layer
from pysal.engine.layers.spatial import Reading, reading
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.model.relu_rules import OtherActivations
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.sweeps import Sweep
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.guided_backprop import ruled

# Images that the default layer is looked for with, until a change of one changes its score.
LOOKS = 4

# How to read what a layer returns, by layer and size of the images: a model is looked at for it once.
_READINGS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[int, ...]], Reading | None]] = weakref.WeakKeyDictionary()

Tokens: TypeAlias = Literal["vit", "swin"] | Callable[[Tensor], Tensor] | None


def grad_cam(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    layer: str | nn.Module | None = None,
    tokens: Tokens = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the class activation map of a layer: relu(sum_k mean(G_k) A_k), bilinear to the image's size.

    A is the layer's activation and G = df/dA. Nothing below the layer is kept for the backward pass.

    Args:
        model: an nn.Module in eval mode.
        inputs: (B, C, H, W), floating point.
        target: see `gradient`.
        layer: a module of the model or its name, "act[3]" for the fourth run of a module that runs several times, "act[-1]"
            for its last; None = the last that returns a map of the image on the way to the score, which `explain` names: one
            with a gradient that is not the output itself; in transformers a normalisation, or a later layer through which all
            of the score passes.
        tokens: how to read a map out of what the layer returns: "vit" (N, 1 + h w, K) with a class token first, "swin"
            (N, h, w, K), a callable to (N, K, h, w), or None = (N, K, h, w) or (N, h, w, K), as the image's proportions say, or
            rows of tokens, (N, L, K) or (L, N, K), of which those are read that were the cells of a map of the network's own.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: see `gradient`.
        batch_size: see `gradient`.
        precision: see `gradient`.
        dtype: see `gradient`.

    Returns:
        (B, 1, H, W), 0 or more.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a model that is no nn.Module.
        ValueError: a wrong shape, value or target; no such layer, or one without a spatial map of the images.
        NotApplicable: no layer was given, and the model has none that counts.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391, equations 1 and 2.
    """
    plan = Plan(
        "pysal.grad_cam",
        model,
        inputs,
        target,
        score=score,
        extra_inputs=extra_inputs,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
    )
    return prepare(plan, layer=layer, tokens=tokens).run(report=False).map


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
        target: see `gradient`.
        layer: see `grad_cam`.
        tokens: see `grad_cam`.
        other_activations: see `guided_backprop`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: see `gradient`.
        batch_size: see `gradient`.
        precision: see `gradient`.
        dtype: see `gradient`.

    Returns:
        (B, C, H, W), signed.

    Raises:
        TypeError: as `grad_cam`.
        ValueError: as `grad_cam` and `guided_backprop`.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391, section 3.2.
    """
    plan = Plan(
        "pysal.guided_grad_cam",
        model,
        inputs,
        target,
        score=score,
        extra_inputs=extra_inputs,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
    )
    work = prepare_guided(plan, layer=layer, tokens=tokens, other_activations=other_activations)
    return work.run(report=False).map


def prepare(plan: Plan, *, layer: str | nn.Module | None, tokens: Tokens) -> Work:
    """Return the work that finds Grad-CAM of every image of a plan; details: "layer", "native" (B, 1, h, w)."""
    return _prepare(plan, layer, tokens, None)


def prepare_guided(
    plan: Plan,
    *,
    layer: str | nn.Module | None,
    tokens: Tokens,
    other_activations: OtherActivations,
) -> Work:
    """Return the work that finds Guided Grad-CAM of every image of a plan; details: "layer", "native" (B, 1, h, w)."""
    return _prepare(plan, layer, tokens, ruled(plan.where, "guided", other_activations))


@dataclass(frozen=True)
class _Cam:
    """Makes maps of a layer's activation and gradient, of the image's size and of the layer's, and says which scores move."""

    tokens: Tokens
    how: Reading | None
    height: int
    width: int
    where: str = field(compare=False)
    layer: Layer = field(compare=False)

    def __call__(self, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = (self.height, self.width)
        tokens = self.tokens or self.how or reading(tuple(activation.shape), self.layer.module, size)
        activation = _spatial(self.where, self.layer.label, tokens, activation)
        gradient = _spatial(self.where, self.layer.label, tokens, gradient)
        small = ops.grad_cam(activation, gradient, activation.shape[2], activation.shape[3], relu=True)
        return ops.grad_cam(activation, gradient, *size, relu=True), small, gradient.flatten(1).any(1)


def _prepare(plan: Plan, layer: str | nn.Module | None, tokens: Tokens, guided: Sweep | None) -> Work:
    if not (tokens is None or callable(tokens) or (isinstance(tokens, str) and tokens in ("vit", "swin"))):
        refuse(plan.where, "tokens", "be None, 'vit', 'swin' or a callable", repr(tokens))

    asked = None
    if layer is None:
        check_layered(plan.where, plan.layered_model)
    else:
        asked = find_layer(plan.where, plan.layered_model, layer)

    def sweeps(chosen: Layer, how: Reading | None) -> list[Sweep]:
        height, width = plan.inputs.shape[2:]
        reduce = _Cam(tokens, how, height, width, plan.where, chosen)
        return [Sweep(layer=chosen, reduce=reduce, where=plan.where), *([guided] if guided else [])]

    def wanted() -> list[Sweep]:
        if asked is not None:
            return sweeps(asked, _reading_of(plan, asked, tokens))
        choice = _default(plan)
        return sweeps(choice.layer, choice.reading)

    return Work(plan, lambda _report: _attribute(plan, asked, tokens, sweeps), wanted)


def _attribute(
    plan: Plan, asked: Layer | None, tokens: Tokens, sweeps: Callable[[Layer, Reading | None], list[Sweep]]
) -> Attribution:
    def swept(chosen: Layer, how: Reading | None) -> list[tuple[Tensor, ...]]:
        return plan.sweeps(*sweeps(chosen, how))

    if asked is not None:
        chosen = asked
        (result, native, _), *others = swept(chosen, _reading_of(plan, chosen, tokens))
    else:
        choice = _default(plan)
        (result, native, moving), *others = swept(choice.layer, choice.reading)
        if not bool(moving.all()):
            settled = _settled(plan, choice, plan.origin[~moving])
            if settled.layer != choice.layer:
                choice = settled
                (result, native, _), *others = swept(choice.layer, choice.reading)
        chosen = choice.layer
    if len(result) != plan.images:
        what, got = f"return a map for each of {plan.images} images", f"{len(result)} maps"
        # who asked for no layer made no mistake
        refuse(plan.where, f"layer {chosen.label!r}", what, got, ValueError if asked is not None else NotApplicable)
    for (gradient,) in others:
        result = gradient * result
    return Attribution(result.to(plan.dtype), passes=1, details={"layer": chosen.label, "native": native.to(plan.dtype)})


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
    choices = (_looked(plan, image) for image in range(min(plan.root.images, LOOKS)))
    return next((choice for choice in choices if not choice.flat), None) or _looked(plan, 0)


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
