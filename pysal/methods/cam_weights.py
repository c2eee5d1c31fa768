"""Weights of a layer's channels that take a pass for each: Score-CAM's and Ablation-CAM's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pysal._library import without_autocast
from pysal.engine.layers.features import Layer
from pysal.engine.request.activations import scores_with
from pysal.engine.request.plan import Plan
from pysal.engine.running.chunks import fast_rows
from pysal.methods.cam_kinds import unit

# The scores (N,) of rows, (image, channel) each.
Score = Callable[[Tensor, Tensor], Tensor]
# Passes that are made in both ways, and how many roundings of the scores they may differ by.
AGREEING, ROUNDINGS = 5, 1000


def masked_weights(plan: Plan, activations: Tensor, *, align_corners: bool) -> Tensor:
    """Return the softmax over the channels of the score of each image times each of its channels, scaled to [0, 1]: (B, K).

    The score of a black image, which the paper takes away, is the same for all channels and drops out of the softmax.

    Args:
        plan: of the images.
        activations: (B, K, h, w).
        align_corners: of the channels' enlargement to the images' size.

    Source:
        Wang et al. 2019, arXiv:1910.01279, algorithm 1.
    """
    number, size = activations.shape[1], plan.inputs.shape[2:]

    def score(rows: Tensor, channels: Tensor) -> Tensor:
        with without_autocast(plan.device.type):
            chosen = activations[rows, channels][:, None]
            chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
            masks = unit(F.interpolate(chosen, size, mode="bilinear", align_corners=align_corners))
            batch = (plan.inputs[rows] * masks).to(plan.inputs.dtype)
        return plan.scores(plan.laid_out(batch), rows)[0]

    plan.expect_forwards(plan.images * number)
    return _of_each(plan, number, score, batch_size=None).softmax(1)


def ablated_weights(plan: Plan, activation: Tensor, number: int, layer: Layer, spatial: Callable[[Tensor], Tensor]) -> Tensor:
    """Return how much the score of each image drops when a channel of a layer is 0: (B, K).

    The model runs from the layer on where that gives the same scores, which some of the passes are made twice to find out.

    Args:
        plan: of the images.
        activation: what the layer returns for all images.
        number: K.
        layer: which; its run is a number, or None for its only one.
        spatial: what the layer returns -> (N, K, h, w).

    Source:
        Desai and Ramaswamy 2020, WACV, equation 2.

    Deviations:
        The paper divides by the score, a factor common to all channels that turns the map around where it is negative.
    """

    def whole(rows: Tensor, channels: Tensor) -> Tensor:
        return scores_with(plan, plan.inputs[rows], rows, layer, lambda value: without_channels(value, channels, spatial))

    def from_layer(rows: Tensor, channels: Tensor) -> Tensor:
        without = without_channels(activation[rows], channels, spatial)
        # two images, for one would be broadcast where more than the activation is handed on
        return scores_with(plan, plan.inputs[rows[:2]], rows, layer, lambda _: without)

    before, _ = plan.clean_scores_without_gradients()
    score, batch_size = whole, None
    if len(activation) == plan.images and not plan.extra_inputs and plan.company == "checked":
        if _agree(plan, number, whole, from_layer):
            row_bytes = activation[0].numel() * activation.element_size()
            score, batch_size = from_layer, plan.batch_size or fast_rows(plan.device, row_bytes)
    return before[:, None].to(plan.accumulator_dtype) - _of_each(plan, number, score, batch_size=batch_size)


def _agree(
    plan: Plan, number: int, whole: Callable[[Tensor, Tensor], Tensor], short: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    """Say whether two ways give some passes the same scores, but for rounding."""
    places = torch.linspace(0, plan.images * number - 1, AGREEING, dtype=torch.float64, device="cpu").long().to(plan.device)
    rows, channels = places // number, places % number
    try:
        one, other = (way(rows, channels).double() for way in (whole, short))
    except Exception:  # the model's own, of any kind, which the queue meets again if it is not the shortcut's
        return False
    limit = ROUNDINGS * torch.finfo(plan.inputs.dtype).eps * float(one.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= limit


def without_channels(value: Tensor, channels: Tensor, spatial: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a layer returns with 0 wherever row n's channel `channels[n]` of its map comes from."""
    with torch.enable_grad():
        leaf = value.detach().clone().requires_grad_()
        maps = spatial(leaf)
        chosen = maps[torch.arange(len(maps), device=maps.device), channels]
        (reached,) = torch.autograd.grad(chosen.sum(), leaf)
    return value.detach().masked_fill(reached != 0, 0)


def _of_each(plan: Plan, number: int, score: Callable[[Tensor, Tensor], Tensor], *, batch_size: int | None) -> Tensor:
    """Return the scores (B, K) of passes for each channel of each image: score(rows, channels) -> (N,)."""
    found = torch.zeros((plan.images, number), dtype=plan.accumulator_dtype, device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, channels = plan.places(start, stop, number)
        found[rows, channels] = score(rows, channels).to(found.dtype)

    plan.run(plan.images * number, body, batch_size=batch_size)
    return found
