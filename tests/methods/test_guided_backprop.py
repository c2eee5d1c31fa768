"""Guided backprop against a network differentiated by hand, against captum, and for every spelling of ReLU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, GuidedBackprop, GuidedGradCam
from torch import Tensor, nn

import pysal
from tests.methods.networks import assert_rounding, gradients, images, rectified, seeded

# Each number of a result sums at most 9 * 6 products in each of two convolutions
OPERATIONS = 4 * 54


class Branched(nn.Module):
    """conv - s = relu(a) + a - conv - ReLU6 - the same ReLU again - mean - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        self.head = nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        a = self.first(inputs)
        b = self.second(self.relu(a) + a)
        pooled = self.relu(self.relu6(40 * b)).mean((2, 3))
        return self.head(pooled)


def by_hand(model: Branched, inputs: Tensor, target: int, rule: str) -> Tensor:
    """The backward pass written out, with the rule's formula at each of the three ReLUs."""

    def through(gate: Tensor, grad: Tensor) -> Tensor:
        if rule == "plain":
            return torch.where(gate, grad, 0.0)
        if rule == "deconvnet":
            return torch.where(grad > 0, grad, 0.0)
        return torch.where(gate & (grad > 0), grad, 0.0)

    with torch.no_grad():
        a = F.conv2d(inputs, model.first.weight, model.first.bias, padding=1)
        b = 40 * F.conv2d(a.clamp_min(0) + a, model.second.weight, model.second.bias)
        clipped = b.clamp(0, 6)
        grad = model.head.weight[target, :, None, None].expand_as(b) / b[0, 0].numel()
        grad = through(clipped > 0, grad)  # the second use of the ReLU
        grad = through((b > 0) & (b < 6), grad)
        grad = F.conv_transpose2d(40 * grad, model.second.weight)
        grad = through(a > 0, grad) + grad  # relu(a) + a: the branch without a ReLU keeps its gradient
        return F.conv_transpose2d(grad, model.first.weight, padding=1)


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
def test_is_the_backward_pass_by_hand(rule: str) -> None:
    model, inputs = seeded(Branched), images(2, 3, 7, 9)
    hidden = 40 * model.second(F.relu(model.first(inputs)) + model.first(inputs))
    assert (hidden > 6).any(), "no value saturates"
    assert (hidden < 0).any()
    # the oracle with the plain rule is autograd: its backward pass is right
    assert_rounding(by_hand(model, inputs, 2, "plain"), gradients(model, inputs, 2), OPERATIONS)

    expected = by_hand(model, inputs, 2, rule)
    assert_rounding(pysal.guided_backprop(model, inputs, 2, rule=rule), expected, OPERATIONS)
    assert not torch.allclose(expected, by_hand(model, inputs, 2, "plain"))


class Activated(nn.Module):
    """conv - activation - conv - activation - mean - linear."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)
        self.activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.second(self.activation(self.first(inputs))))
        return self.head(hidden.mean((2, 3)))


def activated(activation: Callable[[Tensor], Tensor]) -> Activated:
    return seeded(lambda: Activated(activation))  # type: ignore[return-value]


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda values: F.relu(values, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda values: values.relu(),
    "Tensor.relu_": lambda values: values.relu_(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "clamp": lambda values: values.clamp(min=0),
    "clamp_min": lambda values: torch.clamp_min(values, 0),
    "threshold": lambda values: F.threshold(values, 0, 0),
    "hardtanh above all values": lambda values: F.hardtanh(values, 0, 1e3),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_the_same_however_the_relu_is_spelled(spelling: str) -> None:
    inputs = images(2, 3, 6, 7)
    expected = pysal.guided_backprop(activated(nn.ReLU()), inputs, 1)
    model = activated(SPELLINGS[spelling])
    assert_rounding(pysal.guided_backprop(model, inputs, 1), expected, OPERATIONS)
    assert_rounding(pysal.gradient(model, inputs, 1), gradients(model, inputs, 1), OPERATIONS)  # nothing was left behind


def test_where_a_value_is_exactly_zero_nothing_passes() -> None:
    # relu'(0) is 0 by the rule's strict inequality, also for spellings whose own derivative there is 1
    inputs = torch.tensor([[[[0.0, 1.0, -1.0]]]], dtype=torch.float64)
    for name, activation in SPELLINGS.items():
        found = pysal.guided_backprop(lambda x, f=activation: f(1.0 * x).sum((2, 3)), inputs, 0)
        assert found.flatten().tolist() == [0.0, 1.0, 0.0], name
    for activation in (F.relu6, lambda values: values.clamp(0, 6), lambda values: F.hardtanh(values, 0, 6)):
        found = pysal.guided_backprop(lambda x, f=activation: f(6.0 * x).sum((2, 3)), inputs, 0)
        assert found.flatten().tolist() == [0.0, 0.0, 0.0]


# activation, and its derivative written out
OTHERS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "LeakyReLU": (nn.LeakyReLU(0.1), lambda v: torch.where(v > 0, 1.0, 0.1 * torch.ones_like(v))),
    "SiLU": (nn.SiLU(), lambda v: torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v)))),
    "GELU": (
        nn.GELU(),
        lambda v: 0.5 * (1 + torch.erf(v / 2**0.5)) + v * torch.exp(-v * v / 2) / (2 * torch.pi) ** 0.5,
    ),
    "ELU": (nn.ELU(), lambda v: torch.where(v > 0, 1.0, torch.exp(v))),
    "Softplus": (nn.Softplus(), torch.sigmoid),
}


@pytest.mark.parametrize("other", ["plain", "generalised"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_follow_what_was_asked_for(name: str, other: str) -> None:
    activation, derivative = OTHERS[name]
    model, inputs = activated(activation), images(2, 3, 6, 7)

    def through(values: Tensor, grad: Tensor) -> Tensor:
        if other == "generalised":
            grad = grad.clamp_min(0) * (activation(values) > 0)
        return derivative(values) * grad

    with torch.no_grad():
        a = model.first(inputs)
        b = model.second(activation(a))
        grad = model.head.weight[3, :, None, None].expand_as(b) / b[0, 0].numel()
        grad = F.conv_transpose2d(through(b, grad), model.second.weight)
        expected = F.conv_transpose2d(through(a, grad), model.first.weight, padding=1)
    found = pysal.guided_backprop(model, inputs, 3, other_activations=other)
    assert_rounding(found, expected, OPERATIONS)


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_equals_captum_on_relu_modules(rule: str) -> None:
    peer = GuidedBackprop if rule == "guided" else Deconvolution
    inputs, model = images(3, 3, 6, 7), rectified()
    expected = peer(model).attribute(inputs.clone().requires_grad_(), target=1)
    assert_rounding(pysal.guided_backprop(model, inputs, 1, rule=rule), expected, OPERATIONS)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_captum_gives_the_plain_gradient_where_relu_is_a_function_and_this_does_not() -> None:
    inputs, model = images(2, 3, 6, 7), activated(F.relu)
    theirs = GuidedBackprop(model).attribute(inputs.clone().requires_grad_(), target=1)
    assert_rounding(theirs, gradients(model, inputs, 1), OPERATIONS)
    ours = pysal.guided_backprop(model, inputs, 1)
    assert_rounding(ours, pysal.guided_backprop(activated(nn.ReLU()), inputs, 1), OPERATIONS)
    assert float((ours - theirs).norm() / ours.norm()) > 0.1


@pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks")
def test_guided_grad_cam_is_the_product_and_equals_captum() -> None:
    inputs, model = images(2, 3, 9, 8), rectified()
    found = pysal.guided_grad_cam(model, inputs, 1, layer="2")
    product = pysal.guided_backprop(model, inputs, 1) * pysal.grad_cam(model, inputs, 1, layer="2")
    assert_rounding(found, product, OPERATIONS)
    assert float(found.abs().max()) > 0
    expected = GuidedGradCam(model, model[2]).attribute(inputs.clone().requires_grad_(), target=1, interpolate_mode="bilinear")
    assert_rounding(found, expected, OPERATIONS)
