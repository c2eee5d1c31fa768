"""The grid pointing game: whether a method finds each of several images that are put together into one."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pysal._checks import check_choice, check_count, finite_rows, first_line, refuse
from pysal._library import widened
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.methods.registry import EVERY, check_method
from pysal.metrics._maps import per_pixel
from pysal.metrics.agreement import reduction_of

Cells: TypeAlias = Literal["whole", "shrunk"]


def grid_pointing_game(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    method: str = "gradient",
    method_options: Mapping[str, Any] | None = None,
    grid: int = 2,
    cells: Cells = "whole",
    score: ScoreKind | None = None,
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return what share of a method's positive attribution for an image's class lies on that image, put beside others.

    Each `grid` x `grid` images, in their order, become one: row after row, without a gap. Of it the method explains each
    image's class. Nothing but that image shows the class, so a faithful map lies there; chance is 1 / grid^2.

    Args:
        model: an nn.Module in eval mode, a prepared model, or any callable on tensors.
        inputs: (B, C, H, W), floating point, B a multiple of grid^2.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class. Of these, classes only: those of the
            images that are put together must differ.
        method: a name as `pysal.explain` takes it.
        method_options: that method's own options.
        grid: images a side, 2 or more.
        cells: "whole" = images keep their size, so that the model sees grid H x grid W pixels; "shrunk" = each is averaged down
            to 1 / grid of its sides, which `grid` must divide, for models of one size.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
            None = the method's usual one: "auto" for leave-one-out, else "logit".
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Returns:
        (B,) float64 on the inputs' device, in [0, 1]: higher is better. NaN for a map that is not finite or has
            nothing positive.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, method or option, or a class twice in one grid.
        NotApplicable: the method cannot explain this model.

    Source:
        Böhle, Fritz and Schiele 2021, arXiv:2104.00032, section 4.2; Rao, Böhle and Schiele 2022, arXiv:2205.10435 (GridPG).

    Deviations:
        Which images are put together is the caller's choice; the authors take confidently classified ones.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten()).eval()
        >>> grid_pointing_game(model, torch.rand(4, 1, 8, 8), [0, 1, 2, 3]).shape
        torch.Size([4])
    """
    where = "pysal.metrics.grid_pointing_game"
    name = check_method(where, method)
    options = checked_options(where, "method_options", EVERY[name].prepare, method_options)
    check_count(where, "grid", grid, least=2)
    check_choice(where, "cells", cells, get_args(Cells))
    kind = EVERY[name].score if score is None else score
    running = Running(kind, extra_inputs, batch_size, precision, None)
    single = Plan(where, model, inputs, target, running)
    images, _, height, width = single.inputs.shape
    together = grid * grid
    if images % together:
        refuse(where, "inputs", f"hold a multiple of {together} images for a grid of {grid} x {grid}", f"{images}")
    if cells == "shrunk" and (height % grid or width % grid):
        refuse(where, "inputs", f"have sides that {grid} divides where cells are shrunk", f"{height} x {width}")
    single.fix_target()
    if single.score.function is not None or single.score.minus is not None:
        refuse(where, "target", "be classes, one of each image", type(target).__name__, TypeError)
    classes = single.score.index
    for first in range(0, images, together):
        inside = classes[first : first + together].tolist()
        twice = next((one for one in inside if inside.count(one) > 1), None)
        if twice is not None:
            requirement = (
                f"be {together} different classes for images {first} to {first + together - 1}, which are put together"
            )
            refuse(where, "target", requirement, f"class {twice} twice")
    parts = single.inputs
    if cells == "shrunk":
        parts = interpolate(parts, (height // grid, width // grid), mode="area")
    mosaics = mosaics_of(parts, grid)
    side = parts.shape[2:]
    rows = torch.arange(images, device=single.device)
    plan = Plan(where, model, mosaics[rows // together], classes, running, output=single.output)
    if cells == "whole":
        _check_size(plan, single)
    map = widened(EVERY[name].prepare(plan, **options).run(report=True).map)
    positive = per_pixel(where, map, reduction_of(name)).clamp(min=0)
    blocks = positive.view(images, grid, side[0], grid, side[1]).sum((2, 4)).flatten(1)
    own = blocks.gather(1, (rows % together)[:, None]).squeeze(1)
    return (own / positive.flatten(1).sum(1)).masked_fill(~finite_rows(map), torch.nan)  # 0 / 0 is NaN


def _check_size(plan: Plan, single: Plan) -> None:
    """Refuse a model that answers for an image and not for several put together, in the size that they have then."""
    try:
        plan.clean()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        single.clean()  # a model that fails on any image says so itself
        height, width = plan.inputs.shape[2:]
        requirement = f"be 'shrunk' for a model that does not take the {height} x {width} pixels of images put together"
        refuse(plan.where, "cells", requirement, f"'whole' ({first_line(error)})")


def mosaics_of(images: Tensor, grid: int) -> Tensor:
    """Return images (B, C, H, W), grid^2 of them beside each other, as (B / grid^2, C, grid H, grid W)."""
    _, channels, height, width = images.shape
    rows = images.view(-1, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, channels, grid * height, grid * width).contiguous()
