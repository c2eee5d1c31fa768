"""Measures what a prepared model gains over its original, and how many images per pass are fastest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysal.engine.prepared.gains import GPU_TURNS, Budget, Gains, Way, least_seconds, pays, ratio
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import CPU_ROWS, fast_rows
from pysal.engine.running.precision import precision_mode

# Images per pass that are tried out; the best is kept. More lose on a CPU, unless they are small.
CPU_CHUNKS = (1, 2, 4, 8)
GPU_CHUNKS = (8, 16, 32, 64, 128)
# Rounds in which each is tried on a CPU, as far as time allows.
TRIALS = 4


def measure_gains(prepared: PreparedModel, example: Tensor, budget: Budget) -> Gains:
    """Measure gradient and forward pass of as many images as have the bytes of a common one, and of boxes where in question."""
    rows = measured_rows(prepared, example)
    batch = example.expand(rows, -1, -1, -1).contiguous()
    arranged = batch.contiguous(memory_format=torch.channels_last if prepared.way.channels_last else torch.contiguous_format)
    ways: dict[str, Way] = {
        "model's gradient": gradient_of(prepared, prepared.original, batch),
        "gradient": gradient_of(prepared, prepared, arranged),
        "model's forward": _forward(prepared, prepared.original, batch),
        "forward": _forward(prepared, prepared, arranged),
    }
    least = least_seconds(ways, {"model's gradient": "gradient", "model's forward": "forward"}, budget)
    gradient, forward = ratio(least, "model's gradient", "gradient"), ratio(least, "model's forward", "forward")
    boxes = None if pays(forward) else _gain_of_boxes(prepared, example, budget)
    return Gains(gradient, forward, boxes, way=prepared.way.name if example.is_cuda else None)


def measured_rows(prepared: PreparedModel, example: Tensor) -> int:
    """Return how many images like an example have the bytes of a common one, or are all that a model takes."""
    return getattr(prepared.original, "rows_per_pass", None) or max(1, _fast_rows(example) // CPU_ROWS)


def _gain_of_boxes(prepared: PreparedModel, example: Tensor, budget: Budget) -> float | None:
    """Measure leave-one-out of two small boxes against two passes of the model; None where no boxes are followed."""
    engine = prepared._incremental
    if engine is None:
        return None
    height, width = example.shape[2:]
    box = np.array([[height // 2, width // 2, height // 2 + math.ceil(height / 8), width // 2 + math.ceil(width / 8)]] * 2)
    if not engine.groups.pays(box):
        return None
    geometry, kept = engine.groups.geometry(box, example.device), engine.keep(example)
    (top, left), (rows, columns) = geometry.origins[0, 0], geometry.sizes[0]
    patches = example[:, :, top : top + rows, left : left + columns].expand(2, -1, -1, -1)
    patches = patches.contiguous(memory_format=torch.channels_last)
    ways = {
        "model's boxes": _forward(prepared, prepared.original, example.expand(2, -1, -1, -1).contiguous()),
        "boxes": _forward(prepared, lambda _: engine.run(kept, patches, geometry), patches),
    }
    return ratio(least_seconds(ways, {"model's boxes": "boxes"}, budget), "model's boxes", "boxes")


def gradient_of(prepared: PreparedModel, function: Callable[[Tensor], Any], batch: Tensor) -> Way:
    """Return what makes a forward and backward pass as methods make it."""

    def way() -> None:
        with torch.enable_grad(), precision_mode(prepared.precision, batch.device, backward=True):
            leaf = batch.detach().requires_grad_()
            if function is prepared and prepared.replays is not None:
                with prepared.replays.recording(batch) as tape:
                    tape.sweep(torch.ones_like(tape.output))
                return
            output = function(leaf)
            if isinstance(output, Tensor) and output.requires_grad:
                torch.autograd.grad(output.sum(), leaf, allow_unused=True)

    return way


def _forward(prepared: PreparedModel, function: Callable[[Tensor], Any], batch: Tensor) -> Way:
    def way() -> None:
        with torch.no_grad(), precision_mode(prepared.precision, batch.device, backward=False):
            function(batch)

    return way


def _fast_rows(example: Tensor) -> int:
    return fast_rows(example.device, example.numel() * example.element_size())


def fastest_rows(prepared: PreparedModel, example: Tensor, budget: Budget) -> int | None:
    """Return the number of images per pass with the least time per image, forward and backward.

    The numbers take turns, so that whatever else the machine does meets all of them, and the least time of each counts. On a
    GPU they come one after the other, because the graphs of all would need memory at once. On a CPU those nearest to what is
    fast elsewhere come first, as many as there is time for; None where there is no time, or the model runs as it is.
    """
    limited = example.device.type == "cpu" and prepared.replays is None
    usual = _fast_rows(example)
    if limited and (not prepared.fused or budget.left < 0):
        return None
    tried: Sequence[int] = _cpu_chunks(example) if example.device.type == "cpu" else GPU_CHUNKS
    if limited:
        tried = sorted(tried, key=lambda rows: (abs(math.log(rows / usual)), rows))
    if limited and prepared.gains is not None:  # not begun where the first alone would take longer than there is time for
        image = budget.gradient / measured_rows(prepared, example) / max(prepared.gains.gradient, 1e-9)
        tried = [rows for rows in tried if rows * image <= budget.left]
        if not tried:
            return None
    order = torch.channels_last if prepared.way.channels_last else torch.contiguous_format
    batches = {rows: example.expand(rows, -1, -1, -1).contiguous(memory_format=order) for rows in tried}
    least = dict.fromkeys(batches, float("inf"))
    rounds = [tried] * TRIALS if prepared.replays is None else [[rows] * GPU_TURNS for rows in batches]
    for numbers in rounds:
        for rows in numbers:
            fastest = min(least.values(), default=float("inf"))
            if rows not in least or (limited and fastest < float("inf") and rows * fastest > budget.left):
                continue
            try:
                seconds = budget.seconds(f"{rows} rows", gradient_of(prepared, prepared, batches[rows]))
                least[rows] = min(least[rows], seconds / rows)
            except Exception:  # too little memory, or a model that takes no such batch
                least = {fewer: seconds for fewer, seconds in least.items() if fewer < rows}
        if prepared.replays is not None:
            prepared.replays.clear()
    best = min((rows for rows in least if least[rows] < float("inf")), default=1)
    for rows in sorted(least):
        if least[rows] < 0.97 * least.get(best, float("inf")):  # a smaller chunk needs less memory: a larger one is worth it
            best = rows
    return best


def most_rows(example: Tensor) -> int:
    """Return the most images per pass that are tried on a CPU."""
    return max(_cpu_chunks(example))


def _cpu_chunks(example: Tensor) -> list[int]:
    """Return the numbers of images that are tried: the usual ones and, for small images, fourfold steps beyond them."""
    most = _fast_rows(example)
    tried = list(CPU_CHUNKS)
    while 4 * tried[-1] < most:
        tried.append(4 * tried[-1])
    return [*tried, *[most] * (most > tried[-1])]
