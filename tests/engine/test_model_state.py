"""A prepared model is refused once its original has changed in any way that it would not follow."""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pysal


class Settings:
    """An object that a network asks how to go on."""

    def __init__(self) -> None:
        self.doubled = False


class Switches(nn.Module):
    """A network that reads switches of every kind."""

    doubled = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
        self.on, self.factor, self.mode, self.function = True, 1.0, "relu", F.relu
        self.factors, self.options, self.settings = [1.0, 2.0], {"shift": 0.0}, Settings()
        self.plain = torch.tensor(2.0)
        self.register_buffer("scale", torch.tensor(3.0))
        self.kernels = [torch.randn(4, 4, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x)) * self.factor * self.factors[1] + self.options["shift"]
        x = self.function(self.second(x)) if self.on and self.mode == "relu" else self.second(x)
        x = x * 2 if self.doubled or self.settings.doubled else x
        return F.conv2d(x * self.plain * self.scale, self.kernels[0]).mean((2, 3))


def switches() -> Switches:
    torch.manual_seed(0)
    return Switches().eval()


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def forget(*_: Any) -> None:
    return None


CHANGES: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "a boolean": (lambda m: setattr(m, "on", False), "attributes", "a new value of 'on'"),
    "a number": (lambda m: setattr(m, "factor", 2.0), "attributes", "a new value of 'factor'"),
    "a string": (lambda m: setattr(m, "mode", "none"), "attributes", "a new value of 'mode'"),
    "a callable": (lambda m: setattr(m, "function", torch.tanh), "attributes", "a new value of 'function'"),
    "a number in a list": (lambda m: m.factors.__setitem__(1, 3.0), "attributes", "a new value of 'factors'"),
    "a number in a dict": (lambda m: m.options.update(shift=1.0), "attributes", "a new value of 'options.shift'"),
    "a switch of an object": (
        lambda m: setattr(m.settings, "doubled", True),
        "attributes",
        "a new value of 'settings.doubled'",
    ),
    "an attribute of the class, hidden": (lambda m: setattr(m, "doubled", True), "attributes", "a new value of 'doubled'"),
    "an attribute of a layer": (lambda m: setattr(m.first, "stride", (2, 2)), "attributes", "a new value of 'first.stride'"),
    "a forward method of one module": (
        lambda m: setattr(m.act, "forward", torch.tanh),
        "attributes",
        "a new value of 'act.forward'",
    ),
    "a tensor that is no buffer": (lambda m: m.plain.mul_(2), "weights", "a new value of 'plain'"),
    "another tensor that is no buffer": (lambda m: setattr(m, "plain", torch.ones(())), "attributes", "a new value of 'plain'"),
    "a buffer": (lambda m: m.scale.mul_(2), "weights", "a new value of 'scale'"),
    "another buffer": (lambda m: setattr(m, "scale", torch.ones(())), "weights", "a new value of 'scale'"),
    "another weight": (
        lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight.detach().clone())),
        "weights",
        "a new value of 'first.weight'",
    ),
    "a tensor in a list": (lambda m: m.kernels[0].mul_(2), "weights", "a new value of 'kernels[0]'"),
    "another module": (lambda m: setattr(m, "act", nn.Tanh().eval()), "modules", "a new module 'act'"),
    "one module more": (lambda m: m.add_module("more", nn.Tanh().eval()), "modules", "a new module 'more'"),
    "another class": (lambda m: setattr(m.act, "__class__", nn.Tanh), "modules", "class Tanh in place of ReLU at 'act'"),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m.first, "weight", Halved().eval()),
        "modules",
        "a new module 'first.parametrizations'",
    ),
    "a forward hook": (lambda m: m.act.register_forward_hook(forget), "hooks", "other hooks on 'act'"),
    "a hook before the forward pass": (lambda m: m.register_forward_pre_hook(forget), "hooks", "other hooks on Switches"),
    "a backward hook": (lambda m: m.second.register_full_backward_hook(forget), "hooks", "other hooks on 'second'"),
    "a hook before the backward pass": (
        lambda m: m.second.register_full_backward_pre_hook(forget),
        "hooks",
        "other hooks on 'second'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused(name: str) -> None:
    change, kind, what = CHANGES[name]
    model, x = switches(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    assert fast.fused, fast.report()
    pysal.gradient(fast, x, 1)
    with torch.no_grad():
        change(model)
    for _ in range(2):  # nor does it become the usual state of things
        message = f"pysal.gradient: model must be prepared again after its {kind} have changed, got {what}"
        with pytest.raises(ValueError, match=re.escape(message)):
            pysal.gradient(fast, x, 1)
        with pytest.raises(ValueError, match=re.escape(message.replace("pysal.gradient", "pysal.PreparedModel"))):
            fast(x)


def test_a_new_method_of_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    with monkeypatch.context() as context:
        context.setattr(Switches, "forward", lambda self, x: self.first(x))
        message = "must be prepared again after its classes have changed, got a new value of 'Switches.forward'"
        with pytest.raises(ValueError, match=re.escape(message)):
            pysal.gradient(fast, x, 1)
    pysal.gradient(fast, x, 1)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook"])
def test_a_hook_on_all_modules_is_refused(kind: str) -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    with getattr(nn.modules.module, f"register_module_{kind}")(forget):
        with pytest.raises(ValueError, match="must be prepared again after its hooks have changed, got other hooks on 'every"):
            pysal.gradient(fast, x, 1)
        assert not pysal.prepare(model, x, batch_size=1).fused
    pysal.gradient(fast, x, 1)


def test_what_changes_nothing_is_not_refused() -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    before = pysal.gradient(fast, x, 1)
    model(torch.rand(2, 3, 20, 20))
    model.train().eval()
    model.state_dict()
    model.register_forward_hook(forget).remove()
    model.requires_grad_(False)
    pysal.grad_cam(fast, x, 1, layer="first")  # folded or not, pysal's own hooks come and go
    assert torch.equal(pysal.gradient(fast, x, 1), before)


class Remembering(nn.Module):
    """A network that writes down in its forward pass what it saw, as pyramid transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.size, self.last, self.seen = nn.Conv2d(3, 4, 3), (0, 0), None, {}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        self.size, self.last = (x.shape[2], x.shape[3]), y
        self.seen["last"] = y
        return y.mean((2, 3)) / self.size[0]


def test_what_a_forward_pass_writes_itself_is_not_refused() -> None:
    model, x = Remembering().eval(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    assert fast.fused, fast.report()
    model(torch.rand(1, 3, 20, 20))
    torch.testing.assert_close(pysal.gradient(fast, x, 1), pysal.gradient(model, x, 1))
    with torch.no_grad():
        model.layer.weight.mul_(2)
    with pytest.raises(ValueError, match=r"a new value of 'layer\.weight'"):
        pysal.gradient(fast, x, 1)


def test_a_model_that_counts_its_passes_runs_as_it_is() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.passes = nn.Conv2d(3, 4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.layer(x).mean((2, 3)) * (2 if self.passes > 9 else 1)

    report = pysal.prepare(Counting().eval(), torch.rand(1, 3, 8, 8), batch_size=1).report()
    assert report.startswith("runs as it is: its forward pass changes its own attribute 'passes'")


def test_a_model_that_runs_as_it_is_follows_every_change() -> None:
    class Branching(Switches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model, x = Branching().eval(), torch.rand(1, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    assert not fast.fused
    model.factor = 5.0
    assert torch.equal(pysal.gradient(fast, x, 1), pysal.gradient(model, x, 1))


@pytest.mark.parametrize("hooked", ["", "act", "second"])
def test_a_model_with_hooks_runs_as_it_is(hooked: str) -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    model.get_submodule(hooked).register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 2,))
    fast = pysal.prepare(model, x, batch_size=1)
    name = f"module {hooked!r}" if hooked else "it"
    assert fast.report().splitlines()[0] == f"runs as it is: {name} has hooks, which fused layers would not run"
    assert torch.equal(pysal.gradient(fast, x, 1), pysal.gradient(model, x, 1))


def test_a_module_with_a_forward_method_of_its_own_runs_as_it_is() -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    model.first.forward = functools.partial(lambda module, x: module.__class__.forward(module, x) * 2, model.first)
    fast = pysal.prepare(model, x, batch_size=1)
    expected = "runs as it is: module 'first' has a forward method of its own, in the place of that of its class"
    assert fast.report().splitlines()[0] == expected
    twice = copy.deepcopy(model)
    torch.testing.assert_close(pysal.gradient(fast, x, 1), pysal.gradient(twice, x, 1))


def test_what_hangs_on_a_model_from_afar_is_not_followed_without_end() -> None:
    model, x = switches(), torch.rand(1, 3, 8, 8)
    rest: list[Any] = []
    for _ in range(50):
        rest = [rest]
    model.rest, model.itself = rest, [model]  # type: ignore[assignment]
    fast = pysal.prepare(model, x, batch_size=1)
    assert fast.fused
    pysal.gradient(fast, x, 1)
