"""RISE: the mean score of randomly masked images, each pixel's over the masks that show it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import MOST, check_count, check_flag, check_ids, check_seed, refuse
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill, resolve_fill
from pysal.engine.request.patch_tokens import DROP
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.chunks import to_device
from pysal.engine.running.precision import Precision

# Masks that one generator draws: a chunk of the queue draws the blocks that it has a part in, whatever its ends.
BLOCK = 64


def rise(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    samples: int = 4000,
    cells: int | tuple[int, int] = 7,
    shown: float = 0.5,
    fill: Fill = 0.0,
    centred: bool = False,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return, at each pixel, the mean score of randomly masked images, weighted by how much each mask shows of the pixel.

    A mask is a coarse grid of cells, each shown or not by chance, enlarged bilinearly and shifted by a part of a cell. Only
    forward passes are needed, so the model may be any callable.

    Args:
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        samples: masks of an image. The noise of the map falls with their square root.
        cells: rows and columns of the grid of a mask, or one number for both; at most the image's height and width.
        shown: probability, in (0, 1), that a cell is shown.
        fill: what a mask hides pixels with, see `leave_one_out`. "drop" is refused: a mask shows most pixels in part.
        centred: whether the mean score of all masked images is taken off each score first. The map then says by how much the
            score is higher, or lower, than that where the pixel is shown: the same but for a constant, with less noise.
        seed: whole number in [-2^63, 2^63), which picks the masks.
        image_ids: one whole number of at least 0 per image, which picks its masks; None = its row in this call.
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
        (B, 1, H, W), in units of the score: an estimate of the score that is to be expected where the pixel is shown; signed if
        `centred`. `explain` reports its standard error at each pixel, too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target.

    Source:
        Petsiuk, Das and Saenko 2018, RISE: Randomized input sampling for explanation of black-box models, arXiv:1806.07421,
        equation 6 and section 3.2.

    Deviations:
        The side of a cell is H / cells rounded up, as in the authors' code, so that shifted masks cover any image; the paper
        rounds down. `centred` is a control variate, and not in the paper.

    Example:
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> rise(brightness, torch.ones(1, 3, 8, 8), samples=100, cells=4, score="raw").shape
        torch.Size([1, 1, 8, 8])
    """
    plan = Plan("pysal.rise", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare(plan, samples=samples, cells=cells, shown=shown, fill=fill, centred=centred, seed=seed, image_ids=image_ids)
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    samples: int,
    cells: int | tuple[int, int],
    shown: float,
    fill: Fill,
    centred: bool,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
) -> Work:
    """Return the work that masks a plan's images at random.

    Details: "samples"; "standard_error" of the map's shape, where there are two samples or more; "mean_scores" (B,), float64,
    of all masked copies: where a pixel's value is larger, the score is higher with it than without; "mode", "centred" if it is.
    """
    where = plan.where
    check_count(where, "samples", samples, most=MOST)
    if check_flag(where, "centred", centred) and samples == 1:
        refuse(where, "samples", "be at least 2 with centred=True, for one mask is its own mean", samples)
    sides = _sides(plan, cells)
    if isinstance(shown, bool) or not isinstance(shown, (int, float)) or not 0 < shown < 1:
        refuse(where, "shown", "be a probability in (0, 1)", repr(shown))
    if isinstance(fill, str) and fill == DROP:
        requirement = f"be another than {DROP!r}, for a mask shows most pixels in part, and patches go as a whole"
        refuse(where, "fill", requirement, repr(fill))
    check_seed(where, seed)
    ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device).tolist()
    fills = resolve_fill(plan, "fill", fill)
    masks = Masks(tuple(plan.inputs.shape[2:]), sides, float(shown), seed)
    return Work(plan, lambda _report: _masked(plan, fills, masks, ids, samples, centred))


def _sides(plan: Plan, cells: object) -> tuple[int, int]:
    where, size = plan.where, tuple(plan.inputs.shape[2:])
    sides = cells if isinstance(cells, tuple) else (cells, cells)
    if isinstance(cells, list) or len(sides) != 2:
        refuse(where, "cells", "be one whole number or a tuple of two", repr(cells))
    for side in sides:
        check_count(where, "cells", side)
    if any(side > most for side, most in zip(sides, size, strict=True)):
        refuse(where, "cells", f"be at most the image's height and width {size}", repr(cells))
    return sides


def _masked(plan: Plan, fills: Tensor, masks: "Masks", ids: Sequence[int], samples: int, centred: bool) -> Attribution:
    plan.expect_forwards(plan.images * samples)
    plan.fix_target()
    kind, device = plan.accumulator_dtype, plan.device
    shape = (plan.images, 1, *plan.inputs.shape[2:])
    mean, squares = (torch.zeros(shape, dtype=kind, device=device) for _ in range(2))
    counts = torch.zeros(plan.images, dtype=torch.int64, device=device)
    scores = torch.zeros(plan.images, samples, dtype=kind, device=device)
    rows, draws = plan.places(0, plan.images * samples, samples)
    images, numbers = (one.cpu().numpy() for one in (rows, draws))

    def drawn(part: slice) -> Tensor:
        return masks.at([ids[image] for image in images[part]], numbers[part], device, kind)

    def add(part: slice, mask: Tensor, score: Tensor) -> None:
        ops.path_integral_moments_(mean, squares, counts, score[:, None, None, None] * mask / masks.shown, rows[part])

    def body(start: int, stop: int) -> None:
        part = slice(start, stop)
        mask = drawn(part)
        batch = torch.lerp(fills[rows[part]], plan.inputs[rows[part]], mask.to(plan.inputs.dtype))
        score = plan.scores(plan.laid_out(batch), rows[part])[0].to(kind)
        scores[rows[part], draws[part]] = score
        if not centred:
            add(part, mask, score)

    plan.run(plan.images * samples, body)
    average = scores.mean(1, keepdim=True)
    if centred:  # by the same masks, drawn again; one of so many scores is part of the average
        apart = (scores - average) * (samples / (samples - 1))

        def again(start: int, stop: int) -> None:
            part = slice(start, stop)
            add(part, drawn(part), apart[rows[part], draws[part]])

        plan.run(plan.images * samples, again)
    details: dict[str, Any] = {"samples": samples, "mean_scores": average[:, 0].cpu().double()}
    if centred:
        details["mode"] = "centred"
    if samples > 1:
        details["standard_error"] = (squares / (samples * (samples - 1))).sqrt()
    return Attribution(mean.to(plan.dtype), samples, details)


class Masks:
    """Coarse grids of cells that are shown or not, enlarged and shifted.

    Args:
        size: height and width of the image.
        cells: rows and columns of the grid.
        shown: probability that a cell is shown.
        seed: picks them, with an image's id.
    """

    def __init__(self, size: tuple[int, ...], cells: tuple[int, int], shown: float, seed: int) -> None:
        self.size, self.cells, self.shown = size, cells, shown
        steps = tuple(math.ceil(side / count) for side, count in zip(size, cells, strict=True))
        self._steps = steps

        @functools.lru_cache(maxsize=64)
        def drawn(id: int, block: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
            generator = np.random.default_rng([seed % 2**64, id, block])
            grids = generator.random((BLOCK, *cells)) < shown
            return grids, generator.integers(0, steps, (BLOCK, 2))

        self._drawn = drawn

    def draws(self, ids: Sequence[int], numbers: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return the grids (n, rows, columns) of masks by an image's id and their number, and the shifts (n, 2) in pixels."""
        blocks, places = np.divmod(numbers, BLOCK)
        found = [self._drawn(id, block) for id, block in zip(ids, blocks.tolist(), strict=True)]
        grids = np.stack([own[place] for (own, _), place in zip(found, places, strict=True)])
        return grids, np.stack([own[place] for (_, own), place in zip(found, places, strict=True)])

    def at(self, ids: Sequence[int], numbers: NDArray[np.int64], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return masks (n, 1, H, W) in [0, 1], see `draws`."""
        drawn, shifts = self.draws(ids, numbers)
        found = to_device(drawn, device).to(dtype)
        (top, below, down), (left, right, across) = (
            [to_device(one, device) for one in self._between(axis, shifts[:, axis])] for axis in (0, 1)
        )
        one, other = (found.gather(1, rows[:, :, None].expand(-1, -1, found.shape[2])) for rows in (top, below))
        found = torch.lerp(one, other, down.to(dtype)[:, :, None])
        one, other = (found.gather(2, columns[:, None].expand(-1, found.shape[1], -1)) for columns in (left, right))
        return torch.lerp(one, other, across.to(dtype)[:, None])[:, None]

    def _between(
        self, axis: int, shifts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return, for each pixel of a row or column of shifted masks, its cell, the next one, and how near it is to that."""
        cells, step = self.cells[axis], self._steps[axis]
        pixels = np.arange(self.size[axis]) + shifts[:, None]
        place = np.clip((pixels + 0.5) * cells / ((cells + 1) * step) - 0.5, 0, cells - 1)
        low = np.floor(place).astype(np.int64)
        return low, np.minimum(low + 1, cells - 1), place - low
