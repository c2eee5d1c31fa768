"""Models that run in a way of their own: they are explained right, or one sentence says why not."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysal
from pysal.methods.registry import METHODS
from tests.methods.calls import CALLS
from tests.methods.networks import images, seeded

INPUTS = images(2, 3, 8, 8).float()
GRADIENTLESS = {"leave_one_out": {"segments": pysal.Grid(2, 2)}}


class Net(nn.Module):
    """A network whose middle can be run under a checkpoint or in inference."""

    def __init__(self, around: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.relu, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Linear(8, 5)
        self.around = around

    def middle(self, inputs: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(inputs))))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.middle(inputs) if self.around is None else self.around(self.middle, inputs)
        return self.last(hidden.mean((2, 3)))


def net(around: Callable[..., Any] | None = None) -> Net:
    return seeded(lambda: Net(around)).float()  # type: ignore[return-value]


ANSWERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "deconvnet": lambda model: pysal.guided_backprop(model, INPUTS, 1, rule="deconvnet"),
    "generalised": lambda model: pysal.guided_backprop(model, INPUTS, 1, other_activations="generalised"),
    "a layer inside": lambda model: pysal.grad_cam(model, INPUTS, 1, layer="second"),
    "a layer inside, and the rule": lambda model: pysal.guided_grad_cam(model, INPUTS, 1, layer="second"),
    "a run inside, and the rule": lambda model: pysal.guided_grad_cam(model, INPUTS, 1, layer="relu@1"),
}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Threshold(0, 0), nn.Hardtanh(0, 1)])
@pytest.mark.parametrize("name", [*CALLS, *ANSWERS])
def test_checkpointed_models(name: str, activation: nn.Module) -> None:
    """What runs again on the way back keeps what it kept before, under the rule and with the layers that are captured."""
    saving, plain = net(lambda run, x: checkpoint(run, x, use_reentrant=False)), net()
    saving.relu = plain.relu = activation
    call = ANSWERS.get(name) or (lambda model: CALLS[name](model, INPUTS, 1))
    expected = call(plain)
    assert torch.equal(call(saving), expected)
    assert float(expected.abs().max()) > 0


def test_several_methods_of_a_checkpointed_model() -> None:
    saving, plain = net(lambda run, x: checkpoint(run, x, use_reentrant=False)), net()
    one, other = (pysal.explain(model, INPUTS, target=1, method_options=GRADIENTLESS) for model in (saving, plain))
    assert list(one.results) == list(other.results) == list(METHODS)
    assert all(torch.equal(one[name].map, other[name].map) for name in METHODS)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_have_no_gradient_of_an_input() -> None:
    saving, plain = net(lambda run, x: checkpoint(run, x, use_reentrant=True)), net()
    with pytest.raises(pysal.NotApplicable) as error:
        pysal.gradient(saving, INPUTS, 1)
    assert str(error.value) == (
        "pysal.gradient: model must be differentiable, got torch.utils.checkpoint with use_reentrant=True, which has no "
        "gradient of an input: pass use_reentrant=False"
    )
    with pytest.raises(pysal.NotApplicable):
        pysal.guided_backprop(saving, INPUTS, 1)
    assert torch.equal(CALLS["leave_one_out"](saving, INPUTS, 1), CALLS["leave_one_out"](plain, INPUTS, 1))
    assert "leave_one_out" in pysal.explain(saving, INPUTS, target=1, method_options=GRADIENTLESS).results


def test_a_tolerance_that_is_not_reached_is_said() -> None:
    with pytest.warns(UserWarning, match=r"tolerance of 1e-09 is not reached in 40 steps, the estimated .*raise"):
        pysal.integrated_gradients(net(), INPUTS, 1, tolerance=1e-9, max_steps=40)


def test_guided_rules_inside_torch_func() -> None:
    weights = {name: torch.stack([one, 2 * one]) for name, one in net().named_parameters()}

    def ensemble(inputs: Tensor) -> Tensor:
        member = net()
        outputs = torch.func.vmap(lambda own: torch.func.functional_call(member, own, (inputs,)))(weights)
        return outputs.mean(0)

    members = [copy.deepcopy(net()) for _ in range(2)]
    members[1].load_state_dict({name: 2 * one for name, one in members[1].state_dict().items()})
    expected = sum(pysal.guided_backprop(member, INPUTS, 1) for member in members) / 2  # what follows them is linear
    torch.testing.assert_close(pysal.guided_backprop(ensemble, INPUTS, 1), expected)

    inner = net()

    def slope(inputs: Tensor) -> Tensor:
        return torch.func.grad(lambda images: inner(images).sum())(inputs).mean((2, 3))

    with pytest.raises(pysal.NotApplicable) as error:
        pysal.guided_backprop(slope, INPUTS, 1)
    assert str(error.value) == (
        "pysal.guided_backprop: the model's activations must run where the rule of ReLUs reaches them, got some inside "
        "torch.func: run the members one by one"
    )
    assert pysal.gradient(ensemble, INPUTS, 1).shape == INPUTS.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "ship",
    [torch.jit.freeze, lambda script: torch.jit.optimize_for_inference(script)],
    ids=["frozen", "optimised for inference"],
)
def test_scripts_that_have_no_training_flag_left(ship: Callable[..., Any]) -> None:
    model = net()
    with torch.no_grad():
        shipped = ship(torch.jit.script(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())).float()))
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())).float()
    found = pysal.leave_one_out(shipped, INPUTS, 1, segments=pysal.Grid(2, 2))
    assert torch.allclose(found, pysal.leave_one_out(plain, INPUTS, 1, segments=pysal.Grid(2, 2)), atol=1e-6)
    assert not model.training


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_models_without_gradients_keep_leave_one_out(around: Callable[[], Any]) -> None:
    def run(middle: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with around():
            return middle(inputs)

    class Inside(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            with around():
                return super().forward(inputs)

    for model in (net(run), seeded(Inside).float()):
        found = pysal.explain(model, INPUTS, target=1, method_options=GRADIENTLESS)
        assert "leave_one_out" in found.results
        assert {"gradient", "integrated_gradients"} <= set(found.skipped)


def test_an_int8_layer_at_the_end_keeps_leave_one_out() -> None:
    class Rounded(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).mul(127).to(torch.int8).float()

    found = pysal.explain(seeded(Rounded).float(), INPUTS, target=1, method_options=GRADIENTLESS)
    assert list(found.results) == ["leave_one_out"]


class Named(Mapping[Any, Any]):
    """Results as OpenVINO returns them: by objects that know their names."""

    class Port:
        any_name = "logits"

    def __init__(self, value: Any) -> None:
        self.value = {self.Port(): value}

    def __getitem__(self, key: Any) -> Any:
        return self.value[key]

    def __iter__(self) -> Any:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)


def scores(batch: Any) -> Any:
    return np.stack([batch.mean((1, 2, 3)), batch.max((1, 2, 3)), batch.min((1, 2, 3))], 1)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: {"scores": scores(x)},
        lambda x: {"logits": scores(x), "features": x},
        lambda x: [scores(x)],
        lambda x: (scores(x), x),
        lambda x: list(scores(x)),
        lambda x: scores(x).tolist(),
        lambda x: Named(scores(x)),
        lambda x: torch.from_numpy(scores(x)),
    ],
    ids="mapping,logits of several,list of one,tuple of several,rows,numbers,named ports,tensor".split(","),
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_answers_of_numpy_models(answer: Callable[[Any], Any], number: int) -> None:
    batch = images(number, 3, 8, 8)
    found, expected = (
        pysal.leave_one_out(pysal.numpy_model(function), batch, 1, segments=pysal.Grid(2, 2), score="logit")
        for function in (answer, scores)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "answer", [["cat", "dog"], None, [[1.0], [1.0, 2.0]], object()], ids=["words", "nothing", "ragged", "an object"]
)
def test_answers_that_are_no_numbers(answer: object) -> None:
    with pytest.raises(TypeError, match=r"numpy_model: function must return arrays of numbers, alone, in a list or by name"):
        pysal.leave_one_out(pysal.numpy_model(lambda _: answer), INPUTS, 1, segments=pysal.Grid(2, 2))
