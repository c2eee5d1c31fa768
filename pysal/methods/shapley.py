"""Shapley and Owen values: what each segment adds to the score, in the mean over the company that it may come into."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_choice, check_count, check_ids, check_seed, refuse
from pysal.engine.ablation import owen
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.fills import Fill
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.methods.coalitions import Coalitions
from pysal.methods.traits import TREES
from pysal.segments import Segments, Slic

TreeKind: TypeAlias = Literal["halves", "merged", "flat"] | Sequence[Any]
# How many pairs of orders an estimate needs for a standard error.
LEAST_PAIRS = 2
# Most levels of a tree that is given: its functions call themselves once or twice for each, and Python allows about 1,000.
DEEPEST = 200


def shapley(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    segments: Segments = Slic(),  # noqa: B008 (immutable)
    fill: Fill = 0.0,
    tree: TreeKind = "halves",
    passes: int = 1000,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    score: ScoreKind = "auto",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return, at each pixel, the Owen value of its segment: its share of f(x) - f(x with every segment filled).

    The values of an image add up to that change. They are exact where `passes` allow it, else the mean over random orders in
    which segments are put back one after the other. Only forward passes are needed.

    Args:
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        segments: see `leave_one_out`; they must not overlap. Pixels of no segment always stay.
        fill: see `leave_one_out`. "drop" leaves out the patches of all absent segments together; the model must have an answer
            to none at all, or pixels of no segment.
        tree: which segments come and go together. "halves": those of one side of a cut through the middle, and so on; "merged":
            those of like colour and place; "flat": none, which is the Shapley value; or nested sequences of the segments'
            numbers, each once, at most 200 deep: `[[0, 1], [2, [3, 4]]]`. Numbers count the labels of an image from the
            lowest, or boxes by rows.
        passes: most model passes for an image.
        seed: whole number in [-2^63, 2^63), which picks the orders.
        image_ids: one whole number of at least 0 per image, which picks its orders; None = its row in this call.
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
        (B, 1, H, W), signed, in units of the score; 0 where no segment is. `explain(methods="shapley")` gives the value of each
        segment with its standard error and half of its 95 % interval, too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target, segments that overlap, or too few passes for an estimate with its error.

    Source:
        Shapley 1953; Owen 1977; nested: Winter 1989. Orders with their reverses: Mitchell et al. 2022, arXiv:2104.12199.

    Example:
        >>> from pysal import Grid
        >>> either = lambda x: x.amax((1, 2, 3))
        >>> shapley(either, torch.ones(1, 3, 2, 2), segments=Grid(2, 2), score="raw")[0, 0]
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    plan = Plan("pysal.shapley", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    work = prepare(plan, segments=segments, fill=fill, tree=tree, passes=passes, seed=seed, image_ids=image_ids)
    return work.run(report=False).map


def prepare(
    plan: Plan,
    *,
    segments: Segments,
    fill: Fill,
    tree: TreeKind,
    passes: int,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
) -> Work:
    """Return the work that shares the change of the score out over the segments of a plan's images.

    Details: "values", "standard_errors" and "half_widths" (of 95 % intervals), lists of B tensors (S_b,), float64; errors and
    widths are 0 where values are exact, widths infinite with less than four pairs of orders; "standard_error" of the map's
    shape; "exact" (B,); "order_pairs" (B,), of how many pairs of orders values are the mean, 0 where they are exact;
    "fill_scores" (B,), the score with every segment filled; "labels" (B, H, W).
    """
    where = plan.where
    check_count(where, "passes", passes)
    check_seed(where, seed)
    ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device).tolist()
    coalitions = Coalitions(plan, segments, fill)
    coalitions.check([[0]] * plan.images)
    gains = []
    for image, count in enumerate(coalitions.counts):
        nested = _tree(plan, tree, coalitions.labels[image], count, image)
        exact, estimated = owen.sets_needed(nested), 2 + 2 * LEAST_PAIRS * (count - 1)
        if exact <= passes:
            gains.append(owen.exact_gains(nested))
            continue
        if passes < estimated:
            requirement = f"be at least {estimated} for an estimate with its error of {count} segments"
            if exact <= estimated:
                requirement = f"be at least {exact} for the exact values of {count} segment{'s' if count > 1 else ''}"
            refuse(where, "passes", requirement, passes)
        pairs = (passes - 2) // (2 * (count - 1))
        generator = np.random.default_rng([seed % 2**64, ids[image]])
        gains.append(owen.sampled_gains(nested, pairs, generator))
    return Work(plan, lambda _report: _share(plan, coalitions, gains))


def _share(plan: Plan, coalitions: Coalitions, gains: Sequence[owen.Gains]) -> Attribution:
    worth = coalitions.scores([one.sets for one in gains])
    values, errors = zip(*(one.values(own) for one, own in zip(gains, worth, strict=True)), strict=True)
    details: dict[str, Any] = {
        "values": [torch.from_numpy(one) for one in values],
        "standard_errors": [torch.from_numpy(one) for one in errors],
        "half_widths": [torch.from_numpy(owen.half_widths(own, one.samples)) for one, own in zip(gains, errors, strict=True)],
        "standard_error": coalitions.on_pixels(errors),
        "exact": torch.tensor([one.samples == 0 for one in gains], dtype=torch.bool, device="cpu"),
        "order_pairs": torch.tensor([one.samples for one in gains], dtype=torch.int64, device="cpu"),
        "fill_scores": torch.from_numpy(np.array([own[one.sets.index(0)] for one, own in zip(gains, worth, strict=True)])),
        "labels": coalitions.labels,
    }
    return Attribution(coalitions.on_pixels(values), passes=1 + coalitions.passes, details=details)


def _tree(plan: Plan, tree: object, labels: Tensor, count: int, image: int) -> owen.Tree:
    """Return the tree of an image's segments.

    Raises:
        TypeError: neither a name nor nested sequences of whole numbers.
        ValueError: no such name, or not each segment once.
    """
    if not isinstance(tree, str):
        return _nested(plan.where, tree, count)
    check_choice(plan.where, "tree", tree, TREES)
    if tree == "flat":
        return tuple(range(count))
    found = labels.cpu().numpy()
    y, x = np.nonzero(found >= 0)
    own = found[y, x]
    columns = [y.astype(np.float64), x.astype(np.float64)]
    if tree == "merged":
        pixels = plan.inputs[image].detach().double().cpu().numpy()
        spread = pixels.std() or 1.0
        columns = [column / max(found.shape) for column in columns] + [channel[y, x] / spread for channel in pixels]
    sizes = np.bincount(own, minlength=count)
    means = np.stack([np.bincount(own, column, minlength=count) / sizes for column in columns], 1)
    return owen.halves(means) if tree == "halves" else owen.merged(means)


def _nested(where: str, tree: object, count: int) -> owen.Tree:
    requirement = f"be one of 'halves', 'merged', 'flat' or nested sequences of the numbers 0 to {count - 1}, each once"
    found = _read(where, tree, requirement)
    if sorted(owen.leaves(found)) != list(range(count)):
        refuse(where, "tree", requirement, repr(tree))
    return found


def _read(where: str, node: object, requirement: str, depth: int = 0) -> owen.Tree:
    """Return a node of nested sequences; one of a single child is that child."""
    if isinstance(node, (int, np.integer)) and not isinstance(node, bool):
        return int(node)
    if not isinstance(node, Sequence) or isinstance(node, (str, bytes)) or not len(node):
        refuse(where, "tree", requirement, repr(node), TypeError)
    if depth == DEEPEST:  # a list that holds itself, for one
        refuse(where, "tree", f"be nested at most {DEEPEST} deep", "a sequence that goes deeper")
    nodes = tuple(_read(where, child, requirement, depth + 1) for child in node)
    return nodes if len(nodes) > 1 else nodes[0]
