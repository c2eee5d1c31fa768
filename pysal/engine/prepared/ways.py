"""Which of the ways to run convolutions on a GPU is fastest there, of those that compute the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pysal.engine.graph.fused_convolution import WAYS, FusedConvolution, Way, has_epilogue
from pysal.engine.prepared.exactness import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, HALF_TOLERANCE, recorded
from pysal.engine.prepared.gains import GPU_TURNS, Budget
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.trial import gradient_of, measured_rows
from pysal.engine.running.precision import precision_mode
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.operators import FusedOperator
from pysal.engine.tape.tape import Program

# What is not this much faster than the first way is not taken for it: the clock of a GPU is not that exact.
CLEARLY = 1.02


def convolutions_of(program: Program) -> list[FusedConvolution]:
    """Return the convolutions of a program that have ways to choose from."""
    found = [one.module for one in program.operators.values() if isinstance(one, FusedOperator)]
    return [module for module in found if has_epilogue(module.convolution.weight)]


def take(prepared: PreparedModel, way: Way) -> None:
    """Run a prepared model's convolutions one way from now on."""
    assert prepared.program is not None
    for module in convolutions_of(prepared.program):
        module.arrange(way)
    prepared.way = way
    if prepared.replays is not None:  # whose graphs hold the weights as they were arranged
        prepared.replays = Replays(prepared.program)


def take_known(prepared: PreparedModel, name: str | None) -> None:
    """Take the way that was fastest before, by its name."""
    known = [way for way in WAYS if way.name == name]
    if known and prepared.program is not None and convolutions_of(prepared.program):
        take(prepared, known[0])
        prepared._notes["way"] = f"convolutions: {known[0].name}, as measured before"


def take_fastest(prepared: PreparedModel, example: Tensor, budget: Budget) -> None:
    """Time the ways that are right, take the fastest, and note by how much.

    Args:
        prepared: with its program.
        example: (1, C, H, W).
        budget: the clock.
    """
    program = prepared.program
    if program is None or not convolutions_of(program):
        return
    rows = measured_rows(prepared, example)
    seconds: dict[Way, float] = {}
    refused: list[str] = []
    ways = _that_differ(program)
    noise = torch.rand(example.shape, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    images = torch.cat([noise.to(example), example])
    if prepared.only_rows is not None or getattr(prepared.original, "rows_per_pass", None) is not None:
        images = example.expand(rows, -1, -1, -1).contiguous()
    with precision_mode(prepared.precision, example.device, backward=False):
        expected = recorded(program, images)
    limits = FORWARD_TOLERANCE.get(example.dtype, HALF_TOLERANCE), GRADIENT_TOLERANCE
    if prepared.precision != "float32":
        limits = HALF_TOLERANCE, GRADIENT_TOLERANCE
    for way in ways:
        try:
            take(prepared, way)
            with precision_mode(prepared.precision, example.device, backward=False):
                apart = recorded(program, images).apart(expected)
            if not all(one <= limit for one, limit in zip(apart, limits, strict=True)):
                refused.append(f"{way.name} would be {max(apart):.1e} away")
                continue
            order = torch.channels_last if way.channels_last else torch.contiguous_format
            batch = example.expand(rows, -1, -1, -1).contiguous(memory_format=order)
            run = gradient_of(prepared, prepared, batch)
            seconds[way] = min(budget.seconds(way.name, run) for _ in range(GPU_TURNS))
        except Exception:  # of a library that has no kernel for a layer, or too little memory
            refused.append(f"{way.name} does not run")
        finally:
            if prepared.replays is not None:
                prepared.replays.clear()
    best = min(seconds, key=lambda way: seconds[way], default=WAYS[0])
    if seconds.get(WAYS[0], float("inf")) <= CLEARLY * seconds.get(best, float("inf")):
        best = WAYS[0]
    take(prepared, best)
    others = [f"{seconds[way] / max(seconds[best], 1e-9):.2f} times the time {way.name}" for way in seconds if way is not best]
    prepared._notes["way"] = "; ".join([f"convolutions: {best.name}, which is fastest", *others, *refused])


def _that_differ(program: Program) -> Sequence[Way]:
    """Return the ways of which this program has any use."""
    modules = convolutions_of(program)
    ways = []
    for way in WAYS:
        if way.cudnn and not any(module.upper == float("inf") for module in modules):
            continue
        if way.phases and not any(module.has_phases for module in modules):
            continue
        ways.append(way)
    return ways
