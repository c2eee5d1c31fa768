"""How many times as fast as the model its prepared form is, measured in turns on the example, within a budget.

What does not gain is not used, so the measurement decides what a network runs as, whatever was thought of when it was built.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

# Preparing is to take no longer than 30 gradients of the model, or this many seconds where a gradient takes next to none. What
# may be left out is left out earlier: a gradient measured in company of other work looks longer than it is.
GRADIENTS, LEAST_SECONDS = 27, 0.5
# What is not clearly faster than the model is not used: each use also compares the model with what was prepared.
WORTH = 1.05
# Rounds in which everything is measured; on a GPU the first of them record the graphs that the others replay.
TURNS, GPU_TURNS = 5, 7
# So far from 1, a ratio does not need more rounds: after the first, and after those that follow.
CLEAR_AT_ONCE, CLEAR = 1.5, 1.3

Way = Callable[[], object]


class Budget:
    """Seconds of the processor's time, or of a clock where other processors take part, since it was made.

    Attributes:
        gradient: seconds of one gradient of the model, once that was measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        parallel = device.type != "cpu" or torch.get_num_threads() > 1
        self._clock = time.perf_counter if parallel else time.process_time
        self._started = self._clock()
        self.gradient = 0.0

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds that may still be spent."""
        return max(LEAST_SECONDS, GRADIENTS * self.gradient) - self.spent

    def seconds(self, name: str, way: Way) -> float:
        """Return the seconds that a way takes; its name is for whoever puts a clock of his own here."""
        self._wait()
        started = self._clock()
        way()
        self._wait()
        return self._clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Gains:
    """The model's time divided by that of its prepared form.

    Attributes:
        gradient: forward and input gradient.
        forward: forward alone.
        boxes: leave-one-out that recomputes what boxes reach, where that was measured; else None.
        runtime: forward by ONNX Runtime, where that was measured; else None.
        way: how a GPU runs the convolutions fastest, by name; None on a CPU.
    """

    gradient: float
    forward: float
    boxes: float | None = None
    runtime: float | None = None
    way: str | None = None

    @property
    def runtime_over_own(self) -> float:
        """How many times as fast ONNX Runtime is as the forward pass without it; 0 where that was not measured."""
        own = self.forward if pays(self.forward) else 1.0
        return (self.runtime or 0.0) / own

    def with_runtime(self, times: float) -> "Gains":
        """Return these with what was measured of ONNX Runtime: how many times as fast it is as the forward pass without it."""
        own = self.forward if pays(self.forward) else 1.0
        return replace(self, runtime=times * own)

    def report(self) -> str:
        """Return what was measured in a line."""
        by_runtime = pays(self.runtime_over_own)
        forward, means = (self.runtime or 0.0, ", by ONNX Runtime") if by_runtime else (self.forward, "")
        told = [_told("gradient", self.gradient), _told("forward", forward) + means]
        if not any(pays(one) for one in (self.gradient, forward, self.boxes)):
            return f"runs as it is: prepared it would be {self.gradient:.1f} times as fast, forward {self.forward:.1f}"
        if pays(self.gradient) and pays(forward):
            told = [f"gradient {self.gradient:.1f} times as fast as the model, forward {forward:.1f}{means}"]
        if self.boxes is not None:
            told.append(_told("leave-one-out of a small box", self.boxes))
        return "; ".join(told)


# Of a model of which nothing was prepared.
AS_IT_IS = Gains(1.0, 1.0)


def pays(gain: float | None) -> bool:
    """Say whether something is worth being used; what was not measured is not."""
    return gain is not None and gain >= WORTH


def _told(what: str, gain: float) -> str:
    if pays(gain):
        return f"{what} {gain:.1f} times as fast as the model"
    return f"{what} runs as it is: prepared it would be {gain:.1f} times as fast"


def least_seconds(ways: Mapping[str, Way], pairs: Mapping[str, str], budget: Budget) -> dict[str, float]:
    """Return the least time of each way; they take turns, so that whatever else the machine does meets all of them.

    Args:
        ways: by name.
        pairs: names of ways whose ratios are asked for: once all are clear, there are no more rounds.
        budget: no more rounds than it allows, but two of them.
    """
    least = dict.fromkeys(ways, float("inf"))
    turns = TURNS if budget.device.type == "cpu" else GPU_TURNS
    for turn in range(turns):
        before = budget.spent
        for name, way in ways.items():
            least[name] = min(least[name], budget.seconds(name, way))
        if "model's gradient" in least:
            budget.gradient = least["model's gradient"]
        if budget.device.type == "cpu":
            ratios = [ratio(least, model, own) for model, own in pairs.items()]
            limit = CLEAR if turn else CLEAR_AT_ONCE
            clear = all(one >= limit or one <= 1 / limit for one in ratios)
            if clear or (turn and budget.left < budget.spent - before):
                break
    return least


def ratio(least: Mapping[str, float], model: str, own: str) -> float:
    """Return the first way's time divided by the second's, of a clock that may not see either."""
    return least[model] / max(least[own], 1e-9)
