"""The gradient of one pass of an ordinary function of ordinary tensors needs no plan, and is what a plan finds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.captum import (
    DeepLift,
    GuidedBackprop,
    InputXGradient,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Saliency,
)
from pysal.captum._call import Call
from pysal.engine.request.plan import Plan


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(one) + self.second(other.sum(1))))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was run by a plan."""
    found: list[Any] = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda self, work: found.append(work) or run(self, work))  # type: ignore[func-returns-value]
    return found


def gradients_of(model: Any, *inputs: Tensor, target: int | None = 1) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = Saliency(model).attribute(inputs, target=target, abs=False)
    return found


@pytest.mark.parametrize("rows", [1, 5])
def test_is_what_a_plan_finds(rows: int, plans: list[Any]) -> None:
    torch.manual_seed(0)
    model, inputs = Two().eval(), (torch.rand(rows, 4), torch.rand(rows, 6, 3).transpose(1, 2).contiguous().transpose(1, 2))
    found = gradients_of(model, *inputs)
    assert not plans
    call = Call("test", model, inputs, 1, None)
    planned = call.unpack(call.run(Plan.image_gradients))
    assert plans
    leaves = [one.clone().requires_grad_() for one in inputs]
    expected = torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)
    for one, other, own, given in zip(found, planned, expected, inputs, strict=True):
        assert torch.equal(one, own)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.shape == given.shape
        assert one.is_contiguous()
        assert not one.requires_grad


def test_answers_share_no_memory() -> None:
    """Autograd hands the sum's gradient to both terms, expanded and the same tensor."""
    one, other = torch.rand(2, 3), torch.rand(2, 3)
    first, second = gradients_of(lambda x, y: (x + y).sum(1), one, other, target=None)
    first += 1
    assert second.tolist() == [[1.0] * 3] * 2
    kept = torch.ones(2, 3)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum(1)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return kept

    gradients_of(lambda x: Keeps.apply(x), one, target=None)[0].zero_()  # type: ignore[no-untyped-call]
    assert kept.sum() == 6


def test_an_input_without_a_part_has_zeros_and_nothing_of_the_callers_is_written() -> None:
    def in_place(x: Tensor, y: Tensor) -> Tensor:
        y.zero_()
        return x.mul_(2).sum(1)

    one, other = torch.ones(2, 3), torch.ones(2, 4)
    first, second = gradients_of(in_place, one, other, target=None)
    assert first.tolist() == [[2.0] * 3] * 2
    assert second.tolist() == [[0.0] * 4] * 2
    assert bool((one == 1).all())
    assert bool((other == 1).all())
    assert one.grad is None


@pytest.mark.parametrize("kind", ["reported", "integers", "batch", "graph", "double"])
def test_what_is_not_ordinary_goes_by_a_plan(kind: str, plans: list[Any]) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    model: Any = nn.Linear(4, 2).eval()
    if kind == "reported":
        seen: list[Any] = []
        with pysal.progress(lambda *about: seen.append(about)):
            Saliency(model).attribute(x, target=1)
        assert seen
    elif kind == "integers":
        with pytest.raises(RuntimeError, match="be floating point"):
            Saliency(model).attribute(x.long(), target=1)
        return
    elif kind == "batch":
        total = Saliency(lambda x: x.sum(0)).attribute(x)
        assert bool((total == 1).all())
    elif kind == "graph":
        Saliency(model).attribute(x, target=1, create_graph=True)
    else:
        Saliency(model).attribute(torch.view_as_complex(torch.rand(3, 4, 2)).real.to(torch.complex64).real, target=1)
        assert not plans
        return
    assert plans


def test_errors_are_the_plans() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="does not depend on the inputs through torch"):
        Saliency(lambda x: x.detach().sum(1)).attribute(x)
    calls = []

    def fails(x: Tensor) -> Tensor:
        calls.append(len(x))
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        Saliency(fails).attribute(x)
    assert calls == [2]


def test_the_state_is_put_back() -> None:
    x = torch.rand(2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = InputXGradient(nn.Linear(3, 2).eval()).attribute(x, target=0)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert found.dtype == torch.float32
    model = nn.Linear(3, 2).eval()
    with torch.inference_mode():
        (found,) = gradients_of(model, x.clone())
    assert torch.equal(found, model.weight[1].expand(2, 3))


class Cells(nn.Module):
    """ReLUs of three spellings, a layer that works in place behind another, and a part that is not differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        hidden = self.act(self.first(x)) * scale
        return self.head(torch.relu_(self.second(hidden)).clamp_min(0) + hidden)


CALLS: dict[str, Any] = {
    "guided": lambda model, x, **options: GuidedBackprop(model).attribute(x, **options),
    "layer": lambda model, x, **options: LayerGradientXActivation(model, model.second).attribute(x, **options),
    "layer before in-place": lambda model, x, **options: LayerGradientXActivation(model, model.act).attribute(x, **options),
    "DeepLift": lambda model, x, **options: DeepLift(model).attribute(x, **options),
}


@pytest.mark.parametrize("further", [None, torch.tensor([[2.0], [3.0], [4.0]]), torch.tensor(2.0), 3.0], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rules_and_layers_need_no_plan(name: str, further: Any, plans: list[Any]) -> None:
    torch.manual_seed(0)
    model, x = Cells().eval(), torch.randn(3, 4)
    options = {"target": 1, "additional_forward_args": further}
    found = CALLS[name](model, x, **options)
    assert not plans
    with pysal.progress(lambda *_: None):  # a call that is followed takes a plan
        planned = CALLS[name](model, x, **options)
    assert plans
    assert torch.equal(found, planned)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._backward_hooks)]


def test_what_one_pass_refuses_is_refused_as_by_a_plan() -> None:
    x = torch.rand(1, 4)
    gelu = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="the rule is defined for ReLU only, and the network has GELU"):
        GuidedBackprop(gelu).attribute(x, target=1)
    unused = Cells().eval()
    unused.spare = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="must run in the model's forward pass, got no run"):
        LayerGradientXActivation(unused, unused.spare).attribute(x, target=1)
    with pytest.raises(ValueError, match="must lead to the score, got one that the score does not depend on"):
        LayerGradCam(Ignores(), Ignores.layer).attribute(torch.rand(1, 2, 3, 3), target=0)


class Ignores(nn.Module):
    layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach().sum((2, 3)) + x.requires_grad_().sum((2, 3))


def test_a_layer_with_gradients_off_inside_the_model() -> None:
    """The model puts back what it set, and with it what the layer's hook has set: the pass is made again."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                hidden = self.stem(x)
            return self.head(hidden)

    model, x = Frozen().eval(), torch.rand(2, 4)
    found = LayerGradientXActivation(model, model.stem).attribute(x, target=1)
    torch.testing.assert_close(found, model.stem(x).detach() * model.head.weight[1].detach())


def test_noise_has_the_ops_values_whatever_runs() -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    one = NoiseTunnel(Saliency(lambda x: x.square().sum(1)), seed=3)
    whole, parts = (one.attribute(x, nt_samples=4, nt_samples_batch_size=size, abs=False) for size in (4, 1))
    rows, draws = torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2)
    noisy = pysal.ops.gaussian_noise(x[:, None, None], torch.ones(2), 3, rows, rows, draws)
    torch.testing.assert_close(whole, 2 * noisy.reshape(2, 4, 3).mean(1))
    torch.testing.assert_close(parts, whole)
