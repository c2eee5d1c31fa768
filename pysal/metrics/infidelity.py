"""Infidelity: how far a map is from predicting what perturbations of the image do to the score."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import MOST, check_choice, check_count, check_ids, check_number, check_seed, finite_rows, refuse
from pysal._library import widened, widest
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill, resolve_fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.metrics._maps import check_maps, uniform

Perturbation: TypeAlias = Literal["squares", "noise"]
Meaning: TypeAlias = Literal["shares", "slopes"]

# Sides of the squares in shares of the image's shorter side: 28 to 112 pixels at 224.
SMALLEST, LARGEST = 1 / 8, 1 / 2


def infidelity(
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    perturbation: Perturbation = "squares",
    meaning: Meaning = "shares",
    fill: Fill = 0.0,
    noise: float = 0.1,
    samples: int = 50,
    scaled: bool = True,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return the mean squared error of what each map predicts that perturbations do: E[(I . map - (f(x) - f(x - I)))^2].

    A perturbation depends only on the seed, the image's id and its own number, not on the batch size, the device or the other
    images.

    Args:
        model: see `deletion`.
        inputs: (B, C, H, W), floating point.
        maps: (B, 1 or C, H, W), floating point; one channel stands for each of the C.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        perturbation: "squares" fill in one square, its side uniform from 1/8 to 1/2 of the image's shorter side, its place
            uniform inside the image; "noise" subtracts Gaussian noise.
        meaning: what a map's numbers are. "shares" of the score (Integrated Gradients, leave-one-out): a square takes the
            sum of the map inside it. "slopes" of the score (gradients): they are multiplied by the change of each pixel.
        fill: what squares are filled with; see `pysal.leave_one_out`.
        noise: standard deviation of "noise" in multiples of each image's range max - min, above 0.
        samples: perturbations per image.
        scaled: whether to multiply each map first by the number that suits it best, so that methods with different units can
            be compared. False takes the map as it is, which is the paper's equation.
        seed: whole number in [-2^63, 2^63).
        image_ids: one whole number of at least 0 per image, which picks its perturbations; None = its row in this call.
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

    Returns:
        (B,) float64 on the inputs' device, at least 0, in squared units of the score; lower is better. With `scaled`, at most
        the mean squared change of the score. NaN for an image whose map is not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target, or "noise" for a map of "shares".

    Source:
        Yeh, Hsieh, Suggala, Inouye and Ravikumar 2019, arXiv:1901.09392, definition 2.1; the scale is captum
        0.9.0's (`normalize=True`).

    Example:
        >>> brightness = lambda x: x.sum((1, 2, 3))
        >>> image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
        >>> float(infidelity(brightness, image, 2 * image, lambda output: output)) < 1e-20
        True
    """
    where = "pysal.metrics.infidelity"
    plan = Plan(where, model, inputs, target, Running(score, extra_inputs, batch_size, precision, None))
    return infidelity_of(
        plan,
        maps,
        perturbation=perturbation,
        meaning=meaning,
        fill=fill,
        noise=noise,
        samples=samples,
        scaled=scaled,
        seed=seed,
        image_ids=image_ids,
    )


def infidelity_of(
    plan: Plan,
    maps: Tensor,
    *,
    perturbation: str,
    meaning: str,
    fill: Fill,
    noise: float,
    samples: int,
    scaled: bool,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
) -> Tensor:
    """Return the infidelity of maps of a plan's images."""
    where, images = plan.where, plan.inputs
    maps = check_maps(where, maps, images)
    for argument, value, known in (("perturbation", perturbation, Perturbation), ("meaning", meaning, Meaning)):
        check_choice(where, argument, value, get_args(known))
    if perturbation == "noise" and meaning == "shares":
        refuse(where, "meaning", "be 'slopes' where the perturbation is 'noise'", repr(meaning))
    noise = check_number(where, "noise", noise, above=True)
    check_count(where, "samples", samples, most=MOST)
    check_seed(where, seed)
    own_ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device)
    fills = resolve_fill(plan, "fill", fill).contiguous()
    if perturbation == "squares":
        boxes = _squares(uniform(seed, *_every(plan, own_ids, samples), 3), images.shape[2], images.shape[3])
        found = _changes(plan, fills, boxes, samples)
        weights = maps if meaning == "shares" else maps * widened(images - fills)
        sums = torch.nn.functional.pad(weights.sum(1).cumsum(1).cumsum(2), (1, 0, 1, 0))  # (B, H + 1, W + 1)
        rows = torch.arange(plan.images, device=plan.device).repeat_interleave(samples)
        top, left, bottom, right = boxes.unbind(1)
        inside = sums[rows, bottom, right] - sums[rows, top, right] - sums[rows, bottom, left] + sums[rows, top, left]
        predicted = inside.view(plan.images, samples).to(found.dtype)
    else:
        predicted, found = _under_noise(plan, maps, noise, seed, own_ids, samples)
    if scaled:
        squared = predicted.square().sum(1)
        scale = torch.where(squared == 0, 0.0, (predicted * found).sum(1) / squared)
        predicted = predicted * scale[:, None]
    return (predicted - found).square().mean(1).masked_fill(~finite_rows(maps), torch.nan)


def _every(plan: Plan, image_ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Return the id of the image, and the number, of every perturbation, (B * samples,) each, image after image."""
    return image_ids.repeat_interleave(samples), torch.arange(samples, device=plan.device).repeat(plan.images)


def _changes(plan: Plan, fills: Tensor, boxes: Tensor, samples: int) -> Tensor:
    """Return by how much the score falls (B, samples) with each square (B * samples, 4) filled in.

    No map has a part in it: of the maps of several methods on one request, the first alone takes passes.
    """
    known: list[tuple[str, Tensor, Tensor, Tensor]] = plan.shared("changes by squares", lambda _: [])
    for kind, filled, places, found in known:
        if kind == plan.score.kind and torch.equal(filled, fills) and torch.equal(places, boxes):
            return found
    plan.expect_forwards(plan.images * (samples + 1))
    clean = widened(plan.clean_scores()[0])
    found = torch.zeros(plan.images, samples, dtype=widest(plan.device), device=plan.device)

    def body(start: int, stop: int) -> None:
        rows, draws = plan.places(start, stop, samples)
        own = boxes[rows * samples + draws]
        batch = ops.occlusion_masks_boxes(plan.inputs, fills, own, rows, channels_last=plan.channels_last)
        found[rows, draws] = clean[rows] - widened(plan.scores(batch, rows)[0])

    plan.run(plan.images * samples, body)
    known.append((plan.score.kind, fills, boxes, found))
    return found


def _under_noise(plan: Plan, maps: Tensor, noise: float, seed: int, image_ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Return what maps predict that noise does, and what it does, (B, samples) each."""
    images = plan.inputs
    plan.expect_forwards(plan.images * (samples + 1))
    clean = widened(plan.clean_scores()[0])
    flat = widened(images.flatten(1))
    deviations = noise * (flat.amax(1) - flat.amin(1))
    predicted = torch.zeros(plan.images, samples, dtype=widest(plan.device), device=plan.device)
    found = torch.zeros_like(predicted)

    def body(start: int, stop: int) -> None:
        rows, draws = plan.places(start, stop, samples)
        batch = ops.gaussian_noise(images, deviations, seed, rows, image_ids[rows], draws, channels_last=plan.channels_last)
        predicted[rows, draws] = ((widened(images[rows]) - widened(batch)) * maps[rows]).sum((1, 2, 3))
        found[rows, draws] = clean[rows] - widened(plan.scores(batch, rows)[0])

    plan.run(plan.images * samples, body)
    return predicted, found


def _squares(numbers: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (N, 4) int64 for numbers (N, 3) in (0, 1): side, row and column."""
    shorter = min(height, width)
    smallest, largest = max(1, math.floor(SMALLEST * shorter)), max(1, math.floor(LARGEST * shorter))
    side = smallest + (numbers[:, 0] * (largest - smallest + 1)).long()
    top = (numbers[:, 1] * (height - side + 1)).long()
    left = (numbers[:, 2] * (width - side + 1)).long()
    return torch.stack([top, left, top + side, left + side], 1)
