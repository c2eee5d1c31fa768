"""What a prepared model is measured to be faster at is what it is used for, and the report says what was measured."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.prepared.gains import GRADIENTS, LEAST_SECONDS, TURNS, WORTH, Budget, Gains, least_seconds
from pysal.engine.prepared.model import PreparedModel


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def prepared_by(monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, **seconds: float) -> PreparedModel:
    """Prepare under a clock that has the model take a second for everything, and the prepared one what is said."""
    took = {"boxes": 1.0} | seconds
    monkeypatch.setattr(Budget, "seconds", lambda self, name, way: took.get(name, 1.0))
    return pysal.prepare(network() if model is None else model, torch.rand(1, 3, 16, 16), batch_size=2)


@pytest.mark.parametrize("gradient", [0.5, 2.0])
@pytest.mark.parametrize("forward", [0.5, 2.0])
def test_only_what_gains_is_used(monkeypatch: pytest.MonkeyPatch, gradient: float, forward: float) -> None:
    model = network()
    fast = prepared_by(monkeypatch, model, gradient=gradient, forward=forward)
    called: list[bool] = []
    model.forward, plain = lambda x: called.append(torch.is_grad_enabled()) or plain(x), model.forward  # type: ignore[method-assign,assignment,func-returns-value]
    monkeypatch.setattr(PreparedModel, "_check", lambda self, where, values: None)  # of the method that was just exchanged
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        fast(x)
    fast(x.clone().requires_grad_())
    assert called == [grad for grad, seconds in ((False, forward), (True, gradient)) if seconds > 1]
    assert fast.fused == (min(gradient, forward) < 1)
    assert fast.channels_last == (max(gradient, forward) < 1)
    called.clear()
    pysal.gradient(fast, x, 1)
    assert called == ([True] if gradient > 1 else [])
    called.clear()
    pysal.leave_one_out(fast, x[:1], 1, segments=pysal.Grid(2, 2), fill="black")
    assert bool(called) == (forward > 1)


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ({"gradient": 0.5, "forward": 0.8}, "gradient 2.0 times as fast as the model, forward 1.2"),
        ({"gradient": 1.25, "forward": 2.0}, "runs as it is: prepared it would be 0.8 times as fast, forward 0.5"),
        (
            {"gradient": 0.5, "forward": 2.0, "boxes": 2.0},
            "gradient 2.0 times as fast as the model; forward runs as it is: prepared it would be 0.5 times as fast",
        ),
        (
            {"gradient": 2.0, "forward": 0.5},
            "gradient runs as it is: prepared it would be 0.5 times as fast; forward 2.0 times as fast as the model",
        ),
    ],
)
def test_the_report_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], line: str) -> None:
    fast = prepared_by(monkeypatch, **seconds)
    assert any(one.startswith(line) for one in fast.report().splitlines()), fast.report()
    if line.startswith("runs"):
        assert fast.report().splitlines() == [line, "2 images per pass"]


def test_what_gains_nothing_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.rand(1, 3, 16, 16)
    fast = prepared_by(monkeypatch, model, gradient=2.0, forward=2.0)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(fast(x), model(x))
    assert torch.equal(pysal.gradient(fast, x, 1), pysal.gradient(model, x, 1))


@pytest.mark.parametrize("boxes", [0.5, 2.0])
def test_boxes_are_followed_where_they_gain_though_whole_passes_do_not(monkeypatch: pytest.MonkeyPatch, boxes: float) -> None:
    model, x = network(), torch.rand(1, 3, 16, 16)
    fast = prepared_by(monkeypatch, model, gradient=2.0, forward=2.0, boxes=boxes)
    assert (fast.incremental(x) is not None) == (boxes < 1)
    found = pysal.leave_one_out(fast, x, 1, segments=pysal.Grid(4, 4), fill="black")
    expected = pysal.leave_one_out(model.double(), x.double(), 1, segments=pysal.Grid(4, 4), fill="black")
    # of two scores of about 1, each of which a few dozen roundings went into
    assert (found - expected).abs().max() <= 2 * 50 * torch.finfo(torch.float32).eps * (1 + model(x.double()).abs().max())


@pytest.mark.parametrize("gain", [WORTH - 0.01, WORTH])
def test_a_gain_has_to_be_clear(gain: float) -> None:
    assert Gains(gain, gain).report().startswith("runs as it is") == (gain < WORTH)


class Clock:
    """A budget on which each way takes what it is said to, and time passes only there."""

    def __init__(self, **seconds: float) -> None:
        self.took, self.turns = {name.replace("_", "'s "): [one] for name, one in seconds.items()}, 0
        self.gradient, self.spent, self.device = 0.0, 0.0, torch.device("cpu")

    @property
    def left(self) -> float:
        return max(LEAST_SECONDS, GRADIENTS * self.gradient) - self.spent

    def seconds(self, name: str, way: Callable[[], Any]) -> float:
        (took,) = self.took[name]
        self.spent, self.turns = self.spent + took, self.turns + (name == "gradient")
        return took


PAIRS = {"model's gradient": "gradient"}


def turns(**seconds: float) -> int:
    clock = Clock(**seconds)
    least = least_seconds({name: lambda: None for name in clock.took}, PAIRS, clock)  # type: ignore[arg-type]
    assert least == {name: one for name, (one,) in clock.took.items()}
    return clock.turns


def test_rounds_end_where_the_answer_is_clear_or_the_budget_is_spent() -> None:
    assert turns(model_gradient=0.01, gradient=0.005) == 1
    assert turns(model_gradient=0.01, gradient=0.05) == 1
    assert turns(model_gradient=0.014, gradient=0.01) == 2
    assert turns(model_gradient=0.01, gradient=0.0099) == TURNS
    assert turns(model_gradient=10.0, gradient=9.9) == TURNS  # 27 gradients are 270 seconds
    assert turns(model_gradient=10.0, gradient=9.9, model_forward=80.0, forward=80.0) == 2


def test_another_dtype_or_shape_runs_the_model_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    fast = prepared_by(monkeypatch, model, gradient=0.5, forward=0.5)
    for x in (torch.rand(1, 3, 20, 20), torch.rand(0, 3, 16, 16)):
        assert torch.equal(fast(x), model(x))
    with pytest.raises(RuntimeError):
        fast(torch.rand(1, 3, 16, 16).double())


def test_a_failure_while_measuring_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(budget: Budget, name: str, way: Callable[[], Any]) -> float:
        raise RuntimeError("no batch of so many")

    monkeypatch.setattr(Budget, "seconds", seconds)
    model, x = network(), torch.rand(1, 3, 16, 16)
    fast = pysal.prepare(model, x, batch_size=2)
    reason = "runs as it is: its own code does not run as a part of what is prepared (test_gains.py, line "
    assert fast.report().splitlines()[0].startswith(reason)
    assert not fast.fused
    assert torch.equal(fast(x), model(x))


def test_the_clock_of_one_thread_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ran: list[Tensor] = []
    took = Budget(torch.device("cpu")).seconds("gradient", lambda: ran.append(torch.ones(3).sum()))
    assert ran == [torch.tensor(3.0)]
    assert took >= 0


@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_of_a_compiled_model_the_original_is_prepared(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    model, x = network(), torch.rand(2, 3, 16, 16)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    fast = prepared_by(monkeypatch, compiled, gradient=1 / gain, forward=1 / gain)
    assert not graphs  # nothing waits for a compiler
    assert fast.fused == (gain > 1)
    assert fast.original is (model if gain > 1 else compiled)  # what gains nothing runs as it was given
    with torch.no_grad():
        difference = (fast(x) - model(x)).abs().max()
    assert difference <= 50 * torch.finfo(torch.float32).eps * (1 + model(x).abs().max())
    assert bool(graphs) == (gain < 1)
    found, expected = pysal.grad_cam(fast, x, 1, layer="3"), pysal.grad_cam(model, x, 1, layer="3")
    assert (found - expected).abs().max() <= 500 * torch.finfo(torch.float32).eps * expected.abs().max()
    found, expected = pysal.guided_backprop(fast, x, 1), pysal.guided_backprop(model, x, 1)
    assert (found - expected).abs().max() <= 500 * torch.finfo(torch.float32).eps * expected.abs().max()
    torch.compiler.reset()


def test_gains_that_are_given_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = prepared_by(monkeypatch, gradient=0.5, forward=2.0), torch.rand(2, 3, 16, 16)
    assert fast.gains == Gains(2.0, 0.5, 1.0)

    def no_clock(self: Budget, name: str, way: Any) -> float:
        raise AssertionError(name)

    monkeypatch.setattr(Budget, "seconds", no_clock)
    again = pysal.prepare(fast.original, x, batch_size=2, gains=fast.gains)
    for twin in (again, copy.deepcopy(fast)):
        assert twin.gains == fast.gains
        assert (twin.program is None, twin._graph is None) == (fast.program is None, fast._graph is None) == (False, True)
        assert torch.equal(pysal.gradient(twin, x, 1), pysal.gradient(fast, x, 1))
    with pytest.raises(TypeError, match=r"pysal\.prepare: gains must be the `gains` of a prepared model or None, got 2\.0"):
        pysal.prepare(fast.original, x, gains=2.0)  # type: ignore[arg-type]
