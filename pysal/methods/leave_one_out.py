"""Leave-one-out: how much the score drops when one segment of the image is filled in, or gains when it alone is not."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pysal import ops
from pysal._checks import check_choice, refuse
from pysal.engine.boxes.groups import group_rows
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.boxes.queue import BoxQueue, Keeping
from pysal.engine.boxes.run import CleanMaps
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill, resolve_fill
from pysal.engine.request.patch_tokens import DROP, PatchTokens, patch_tokens
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.regions import boxes_of, counts_of, patches_of, regions_of
from pysal.methods.traits import MODES
from pysal.segments import Boxes, Labels, Segments, Slic

Mode: TypeAlias = Literal["out", "in", "both"]
# Segments of an image that approximate drops are compared on with exact ones: half of them those with the largest drops.
SAMPLE = 8
# How many times as many rows as of whole images are in a pass where most tokens are left out.
MOST_SHORT_ROWS = 8


def leave_one_out(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    segments: Segments = Slic(),  # noqa: B008 (immutable)
    fill: Fill = 0.0,
    mode: Mode = "out",
    approximate: float | None = None,
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return, at each pixel, the mean drop f(x) - f(x without a segment) of the segments that cover it.

    With `mode="in"` it is their gain, f(fill with that segment of x) - f(fill), with "both" the mean of drop and gain.

    Only forward passes are needed, so the model may be any callable; see `numpy_model` for those on NumPy arrays.

    Args:
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        segments: `Grid(rows, cols)`, `Window(size, stride)`, `Slic(n_segments)`, a map of labels (H, W) for all images, or one
            per image (B, H, W) or a list of them; negative labels belong to no segment.
        fill: what a segment is filled with: a number, a colour (a tuple of C numbers), "black", "white", "mean", "blur" or an
            image. "drop", for transformers with patch tokens: nothing, the tokens of its patches are left out. A segment has
            the patches of which it covers half or more; if it covers half of none, the patch that it covers most of.
        mode: "out": the drop when a segment goes and all else stays. "in": the gain when it alone stands on the fill, in place
            of all else. "both": the mean of the two; of two segments that make up the image it is their Shapley value.
        approximate: None for exact drops. A number in (0, 1]: at each layer recompute at most this fraction of the map's
            height and width. Smaller is faster and less exact, 1 is exact. Needs a prepared model, and `mode="out"`. `explain`
            reports the error as "approximation_error".
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
        (B, 1, H, W), signed, in units of the score; 0 where no segment is. `explain` gives the drop of every segment, and of
        every class, too; with other modes their gains.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target, or `approximate` for a model that runs whole images or for
            another mode than "out". `fill="drop"` for a model without patch tokens, for one whose answer depends on where
            tokens stand in their row (relative or rotary positions), and, for another mode, for one without an answer to no
            patches.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2. `approximate`: Nakandala, Kumar and Papakonstantinou 2019,
        Incremental and approximate inference for faster occlusion-based deep CNN explanations, SIGMOD, section 4.2.
        `fill="drop"`: Jain et al. 2022, Missingness bias in model debugging, arXiv:2204.08945.

    Example:
        >>> from pysal import Grid
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> drops = leave_one_out(brightness, torch.ones(1, 3, 8, 8), segments=Grid(2, 2), score="logit")
        >>> drops.shape, float(drops[0, 0, 0, 0])
        (torch.Size([1, 1, 8, 8]), 0.25)
    """
    plan = Plan("pysal.leave_one_out", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    return prepare(plan, segments=segments, fill=fill, mode=mode, approximate=approximate).run(report=False).map


def prepare(
    plan: Plan,
    *,
    segments: Segments,
    fill: Fill,
    mode: Mode,
    approximate: float | None,
) -> Work:
    """Return the work that leaves out every segment of every image of a plan, or puts it on the fill, or both.

    A prepared model whose layers are known to be local runs only what each segment reaches (engine.boxes): the boxes that
    hold the segments, grouped by size and place, `batch_size` of them at most in one pass.

    With `approximate` the boxes are limited to that share of a map's side. Of every image `SAMPLE` of the segments that this
    concerns are then left out exactly, too: those with the largest drops, and as many spread evenly over the others. They keep
    their exact drops.

    `passes` counts each scored image as one pass, even if only part was recomputed, plus one per image whose activations
    were kept. With `mode="in"` or "both" the fill itself is one more per image.

    Details: "drops", a list of B tensors (S_b,); "class_drops", for class targets, a list of (K, S_b); "boxes" (S, 4) or
    "labels" (B, H, W). With `mode="in"`, "gains" and "class_gains" in place of the drops; with `mode="both"` beside them,
    and the "means" of drops and gains. With either "mode", "title" and "fill_scores" (B,), the score of the fill alone.
    With `approximate`, "approximation_error" (B,): the largest difference between approximate and exact drops of the
    sample, as a share of the image's largest drop. It is an estimate: other segments may be further off, and other classes
    are not looked at.
    """
    check_choice(plan.where, "mode", mode, tuple(MODES))
    drops_tokens = isinstance(fill, str) and fill == DROP
    if drops_tokens and approximate is not None:
        refuse(plan.where, "approximate", f"be None with fill={DROP!r}, which paints no boxes", repr(approximate))
    _check_approximate(plan, approximate, mode)
    fills = None if drops_tokens else resolve_fill(plan, "fill", fill, also=(DROP,)).contiguous()
    tokens = patch_tokens(plan, "fill") if fills is None else None
    regions = regions_of(plan, segments)
    if fills is None:
        assert tokens is not None
        if mode != "out" and not tokens.allows_none:
            refuse(plan.where, "mode", f"be 'out' with fill={DROP!r} for a model that has no answer to no patches", repr(mode))
        patches = patches_of(tokens, plan, regions)
        return Work(plan, lambda _report: _drop(plan, tokens, patches, regions, mode))
    return Work(plan, lambda _report: _leave_out(plan, fills, regions, mode, approximate))


def _drop(plan: Plan, tokens: PatchTokens, patches: Tensor, regions: Boxes | Labels, mode: Mode) -> Attribution:
    """Leave out the patches (B, S, N) of every segment, or all others, or both in turn."""
    if plan.layered_model is plan.model:
        clean, clean_classes = plan.clean_scores_without_gradients()
    else:  # as the model's own layers tell them, which run where tokens are left out
        clean, clean_classes = plan.scores_of(plan.inputs, plan.layered_model)
    some = patches.any(2)  # a segment without patches changes nothing
    drops = gains = fill_scores = None
    if mode != "in":
        drops = _seeing(plan, tokens, ~patches, some, clean, clean_classes)
    if mode != "out":
        nothing = torch.zeros(plan.images, 1, tokens.count, dtype=torch.bool, device=plan.device)
        each = torch.ones(plan.images, 1, dtype=torch.bool, device=plan.device)
        no_classes = None if clean_classes is None else torch.zeros_like(clean_classes)
        empty = _seeing(plan, tokens, nothing, each, torch.zeros_like(clean), no_classes).negative()
        fill_scores = empty.changes[:, 0]
        fill_classes = None if empty.class_changes is None else empty.class_changes[:, :, 0]
        gains = _seeing(plan, tokens, patches, some, fill_scores, fill_classes).negative()
    return _of_mode(plan, regions, mode, drops, gains, fill_scores)


def _seeing(
    plan: Plan, tokens: PatchTokens, seen: Tensor, wanted: Tensor, before: Tensor, classes_before: Tensor | None
) -> "_Replaced":
    """Return how far the scores (B,) are above those of images of which the patches seen (B, S, N) are left, where wanted."""
    changes, class_changes = _no_changes(seen.shape[:2], before, classes_before)
    queue = wanted.nonzero()
    numbers = seen.sum(2)[tuple(queue.unbind(1))]
    order = numbers.argsort(stable=True)  # rows of as many tokens run together
    queue, numbers = queue[order], numbers[order]
    ends = (1 + numbers.diff().nonzero()[:, 0]).tolist()

    def body(start: int, stop: int) -> None:
        rows, ids = queue[start:stop].unbind(1)
        score, classes = plan.scores(plan.inputs[rows], rows, tokens.keeping(seen[rows, ids]))
        changes[rows, ids] = before[rows] - score
        if class_changes is not None and classes is not None and classes_before is not None:
            class_changes[rows, :, ids] = classes_before[rows] - classes

    rows = plan.asked_batch_size
    if rows is None and len(queue):  # rows of few tokens are smaller ones
        shorter = tokens.length / (tokens.length - tokens.count + int(numbers.max()) or 1)
        rows = int(plan.rows_at_once * min(shorter, MOST_SHORT_ROWS))
    plan.run(len(queue), body, batch_size=rows, ends=ends)
    return _Replaced(changes, class_changes, len(queue))


def _leave_out(plan: Plan, fills: Tensor, regions: Boxes | Labels, mode: Mode, approximate: float | None) -> Attribution:
    _expect_forwards(plan, regions, mode, approximate)
    keeping = _keeping(plan, regions)
    if mode != "in":
        plan.clean(model=keeping)
    clean, clean_classes = plan.clean_scores_without_gradients()
    drops = gains = fill_scores = None
    if mode != "in":
        drops = _replaced(plan, plan.inputs, fills, regions, clean, clean_classes, approximate, keeping)
    if mode != "out":
        fill_scores, fill_classes = plan.scores_of(fills, keeping)
        gains = _replaced(plan, fills, plan.inputs, regions, fill_scores, fill_classes, None, keeping).negative()
    return _of_mode(plan, regions, mode, drops, gains, fill_scores)


def _of_mode(
    plan: Plan,
    regions: Boxes | Labels,
    mode: Mode,
    drops: "_Replaced | None",
    gains: "_Replaced | None",
    fill_scores: Tensor | None,
) -> Attribution:
    """Return the map and the details of drops, of gains over the score (B,) of the fill alone, or of their means."""
    counts = counts_of(regions, plan.images)
    details: dict[str, Any] = {}
    passes = 0
    found: list[Tensor] = []  # drops, gains: (B, S) each
    if drops is not None:
        details |= drops.details(counts, "drops")
        passes += drops.passes
        found.append(drops.changes)
    if gains is not None:
        details |= gains.details(counts, "gains")
        details |= {"mode": mode, "title": MODES[mode].title, "fill_scores": fill_scores}
        passes += plan.images + gains.passes
        found.append(gains.changes)
    changes = torch.stack(found).mean(0)
    if mode == "both":
        details["means"] = [changes[image, :count] for image, count in enumerate(counts)]
    return _attribution(plan, regions, changes, details, passes)


def _attribution(plan: Plan, regions: Boxes | Labels, changes: Tensor, details: dict[str, Any], passes: int) -> Attribution:
    """Return the map of changes (B, S) of the score, after some passes more than one of each image."""
    scores = changes.to(plan.accumulator_dtype).unsqueeze(1)
    if isinstance(regions, Boxes):
        result = ops.occlusion_masks_boxes_map(scores, regions.boxes, *plan.inputs.shape[2:])
        details["boxes"] = regions.boxes
    else:
        result = ops.occlusion_masks_map(scores, regions.labels)
        details["labels"] = regions.labels
    return Attribution(result.to(plan.dtype), passes=1 + passes / plan.images, details=details)


@dataclass(frozen=True)
class _Replaced:
    """How far the scores (B, S), and those of every class (B, K, S), fall when a segment is replaced."""

    changes: Tensor
    class_changes: Tensor | None
    passes: int
    error: Tensor | None = None

    def negative(self) -> "_Replaced":
        """Return how far they rise; what is not changed has 0 and not -0."""
        return _Replaced(0 - self.changes, None if self.class_changes is None else 0 - self.class_changes, self.passes)

    def details(self, counts: tuple[int, ...], name: str) -> dict[str, Any]:
        """Return the changes of the segments that each image has, and the error where there is one."""
        found: dict[str, Any] = {name: [self.changes[image, :count] for image, count in enumerate(counts)]}
        if self.class_changes is not None:
            found[f"class_{name}"] = [self.class_changes[image, :, :count] for image, count in enumerate(counts)]
        if self.error is not None:
            found["approximation_error"] = self.error
        return found


def _no_changes(shape: torch.Size, before: Tensor, classes_before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return zeros for the changes (B, S) and, for class targets, those of every class (B, K, S)."""
    images, most = shape
    changes = before.new_zeros(images, most)
    return changes, None if classes_before is None else before.new_zeros(images, classes_before.shape[1], most)


def _replaced(
    plan: Plan,
    images: Tensor,
    others: Tensor,
    regions: Boxes | Labels,
    before: Tensor,
    classes_before: Tensor | None,
    approximate: float | None,
    keeping: Keeping | None,
) -> _Replaced:
    """Replace each segment of `images`, whose scores are `before`, by that of `others`; they may have been kept."""
    affected = _affected(images, others, regions)
    queue = affected.nonzero()  # (N, 2): image and segment; a segment that is equal in both has change 0 and needs no pass

    changes, class_changes = _no_changes(affected.shape, before, classes_before)

    kept = None if keeping is None else keeping.take()
    in_boxes = _box_queue(plan, images, others, regions, kept, required=approximate is not None)
    del kept
    if in_boxes is not None and isinstance(plan.model, PreparedModel):
        queue = in_boxes.sort(queue, plan.rows_at_once, approximate, plan.model.faster_whole)
    elif plan.company == "whole" and plan.images > 1:  # the whole batch without one segment, then without the next
        some = affected.any(0).nonzero()[:, 0]
        rows = torch.arange(plan.images, device=plan.device)
        queue = torch.stack([rows.repeat(len(some)), some.repeat_interleave(plan.images)], 1)

    def body(start: int, stop: int) -> None:
        rows, ids = queue[start:stop].unbind(1)
        if in_boxes is not None and in_boxes.follows(start):
            image, patches, run_boxes = in_boxes.patches(start, ids)
            score, classes = plan.scores(patches, torch.full_like(ids, image), run_boxes)
        elif isinstance(regions, Boxes):
            batch = ops.occlusion_masks_boxes(images, others, regions.boxes[ids], rows, channels_last=plan.channels_last)
            score, classes = plan.scores(batch, rows)
        else:
            batch = ops.occlusion_masks(images, others, regions.labels, rows, ids, channels_last=plan.channels_last)
            score, classes = plan.scores(batch, rows)
        changes[rows, ids] = before[rows] - score
        if class_changes is not None and classes is not None and classes_before is not None:
            class_changes[rows, :, ids] = classes_before[rows] - classes

    def run() -> int:
        if in_boxes is None:
            plan.run(len(queue), body)
        else:
            plan.run(len(queue), body, batch_size=in_boxes.most_rows, ends=in_boxes.ends)
        return len(queue)

    error = None
    passes = run()
    if in_boxes is not None and approximate is not None:
        queue = in_boxes.sort(_sample(changes, queue[in_boxes.approximate]), plan.rows_at_once)
        rows, ids = queue.unbind(1)
        less_exact = changes[rows, ids]
        passes += run()
        errors = changes.new_zeros(plan.images).scatter_reduce_(0, rows, (changes[rows, ids] - less_exact).abs(), "amax")
        error = torch.where(errors == 0, errors, errors / changes.abs().amax(1))
    passes += 0 if in_boxes is None else in_boxes.images_run
    return _Replaced(changes, class_changes, passes, error)


def _check_approximate(plan: Plan, approximate: object, mode: Mode) -> None:
    """Refuse what is no share, a share where no boxes are followed, and one of gains.

    Raises:
        TypeError: no number.
        ValueError: a number outside (0, 1], a model that runs whole images, or another mode than "out".
    """
    where, model = plan.where, plan.model
    if approximate is None:
        return
    if isinstance(approximate, bool) or not isinstance(approximate, (int, float)):
        refuse(where, "approximate", "be None or a number in (0, 1]", repr(approximate), TypeError)
    if not 0 < approximate <= 1:
        refuse(where, "approximate", "be None or a number in (0, 1]", repr(approximate))
    if mode != "out":
        refuse(where, "approximate", f"be None with mode={mode!r}", repr(approximate))
    if not isinstance(model, PreparedModel):
        refuse(where, "approximate", "be None for a model that pysal.prepare has not prepared", repr(approximate))
    if plan.extra_inputs:
        refuse(where, "approximate", "be None for a model with extra_inputs, which runs whole images", repr(approximate))
    if model.incremental(plan.inputs) is None:
        why = "its report() says why, or they have another shape than it was prepared for"
        refuse(where, "approximate", f"be None where the prepared model runs whole images ({why})", repr(approximate))


def _sample(drops: Tensor, queue: Tensor) -> Tensor:
    """Return (n, 2): at most `SAMPLE` segments of each image of a queue (N, 2), on which drops (B, S) are to be tested."""
    images, ids = queue.cpu().unbind(1)
    sizes = drops.abs().cpu()
    found = []
    for image in images.unique().tolist():
        own = ids[images == image].sort().values
        # by thousandths of the largest, so that rounding does not choose among equals
        levels = (sizes[image, own] / sizes[image].max().clamp_min(torch.finfo(sizes.dtype).tiny) * 1000).round()
        order = own[levels.argsort(descending=True, stable=True)]
        rest = order[SAMPLE // 2 :].sort().values
        count = min(len(rest), SAMPLE - SAMPLE // 2)
        spread = rest[(2 * torch.arange(count, device="cpu") + 1) * len(rest) // (2 * max(count, 1))]
        chosen = torch.cat([order[: SAMPLE // 2], spread])
        found.append(torch.stack([torch.full_like(chosen, image), chosen], 1))
    return torch.cat(found).to(queue.device) if found else queue


def _engine(plan: Plan) -> Incremental | None:
    """Return what runs a plan's images in boxes, None where the model runs whole images."""
    return plan.model.incremental(plan.inputs) if isinstance(plan.model, PreparedModel) and not plan.extra_inputs else None


def _keeping(plan: Plan, regions: Boxes | Labels) -> Keeping | None:
    """Return what runs the unchanged image and keeps its activations, None where there are several or boxes may not pay."""
    engine = _engine(plan)
    if engine is None or plan.images > 1 or not isinstance(plan.model, PreparedModel):
        return None
    groups = engine.groups.limited(None, plan.model.faster_whole)
    return Keeping(engine) if groups.seem_to_pay(boxes_of(regions, 0)) else None


def _box_queue(
    plan: Plan, images: Tensor, others: Tensor, regions: Boxes | Labels, kept: CleanMaps | None, *, required: bool
) -> BoxQueue | None:
    """Return the queue of a model that recomputes only what a segment reaches, None where the model runs whole images.

    Raises:
        ValueError: images depend on each other, and neither may they run as whole batches nor is None an answer.
    """
    engine = _engine(plan)
    if engine is None:
        return None
    try:
        plan.check_independence()
    except ValueError:
        if required or plan.company != "whole":
            raise
        return None

    def hidden(image: int, ids: Tensor, y: Tensor, x: Tensor) -> Tensor:
        if isinstance(regions, Boxes):
            top, left, bottom, right = regions.boxes[ids][:, :, None, None].unbind(1)
            return (top <= y) & (y < bottom) & (left <= x) & (x < right)
        return regions.labels[image][y, x] == ids[:, None, None]

    boxes = [boxes_of(regions, image) for image in range(plan.images)]
    most_rows = plan.asked_batch_size or group_rows(plan.device)
    return BoxQueue(engine, images, others, boxes, hidden, most_rows, kept)


def _expect_forwards(plan: Plan, regions: Boxes | Labels, mode: Mode, approximate: float | None) -> None:
    """Announce the passes of whole images, and those in parts that would be faster as whole images, were these faster."""
    engine = _engine(plan)
    if engine is None or (approximate is None and not engine.groups.clearly_pays(boxes_of(regions, 0))):
        plan.expect_forwards(sum(counts_of(regions, plan.images)) * (2 if mode == "both" else 1))


def _affected(images: Tensor, fills: Tensor, regions: Boxes | Labels) -> Tensor:
    """Return (B, S): whether filling segment s changes image b at all; False beyond the segments of a ragged image."""
    changed = (images != fills).any(1).long()
    if isinstance(regions, Boxes):
        sums = torch.nn.functional.pad(changed.cumsum(1).cumsum(2), (1, 0, 1, 0))
        top, left, bottom, right = regions.boxes.long().unbind(1)
        inside = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        return inside > 0
    labels = regions.labels.long().flatten(1)
    most = max(regions.counts)
    found = torch.zeros(len(images), most + 1, dtype=torch.int64, device=images.device)
    found.scatter_add_(1, torch.where(labels < 0, most, labels), changed.flatten(1))
    return found[:, :most] > 0
