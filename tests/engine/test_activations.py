"""Smooth activations and squeeze-and-excitation of prepared models: the formulas, torch's exactness, and the rules of ReLUs."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.graph.activations import KINDS, Activation, available
from pysal.engine.layers.features import Layer
from pysal.engine.tape.smooth import ActivationOperator, SqueezeOperator
from pysal.engine.tape.tape import Program
from pysal.testing import assert_no_worse, required, sample

compiled = pytest.mark.skipif(not available() and "cpu" not in required(), reason="the CPU kernels are not compiled")
SLOPE = 0.1
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x * 1,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
}
kinds = pytest.mark.parametrize("name", KINDS)


def pulled_back(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, grad)[0]


@compiled
@kinds
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("shape", [(5,), (3, 37), (2, 5, 9, 7), (2, 5, 9, 7, "last")], ids=str)
def test_matches_torch_in_float64(name: str, scale: float, shape: tuple[int, ...]) -> None:
    last = "last" in shape
    sizes = [size for size in shape if isinstance(size, int)]
    x, grad = sample(*sizes, dtype=torch.float64, seed=1) * scale, sample(*sizes, dtype=torch.float64, seed=2)
    if last:
        x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
    x, grad = x.float().double(), grad.float().double()  # the very numbers of float32
    exact, exact_grad = pulled_back(FUNCTIONS[name], x, grad)
    base, base_grad = pulled_back(FUNCTIONS[name], x.float(), grad.float())
    activation, given, own = Activation(name, SLOPE), x.float(), grad.float()
    got = activation.run(given)
    assert got.stride() == given.stride()
    assert_no_worse(got, exact, base)
    found = activation.pull_back(own, given)
    assert found.data_ptr() == own.data_ptr()
    assert_no_worse(found, exact_grad, base_grad)
    assert torch.equal(given, x.float())


@compiled
@kinds
def test_edges(name: str) -> None:
    x = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 88.8, -88.8, 104.0, -104.0, 1e12, -1e12, 1e-30, math.inf, math.nan])
    expected, slopes = pulled_back(FUNCTIONS[name], x.double(), torch.ones_like(x).double())
    activation = Activation(name, SLOPE)
    got, found = activation.run(x), activation.pull_back(torch.ones_like(x), x)
    inner = slice(0, -2)
    torch.testing.assert_close(got[inner], expected[inner].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[inner], slopes[inner].float(), rtol=1e-6, atol=1e-6)
    assert got[-1].isnan()
    assert got[-2] == (1 if "sigmoid" in name else math.inf)


@compiled
@kinds
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (3, 16, 4, 4), (1, 33, 13, 11), (2, 1, 3, 3), (2, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("times", [1, 3])
def test_gates(name: str, shape: tuple[int, ...], times: int) -> None:
    images, channels = shape[:2]
    x, gate = sample(*shape, dtype=torch.float64, seed=1) * 3, sample(images, channels, dtype=torch.float64, seed=2)
    grad = sample(times * images, *shape[1:], dtype=torch.float64, seed=3)
    added = sample(times * images, channels, dtype=torch.float64, seed=4)
    function, activation = FUNCTIONS[name], Activation(name, SLOPE)

    def by_hand(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own, g, u, a = (each.float().to(dtype) for each in (x, gate, grad, added))
        slopes = pulled_back(function, own, torch.ones_like(own))[1].repeat(times, 1, 1, 1)
        gates = g.repeat(times, 1)[:, :, None, None]
        gradient = (u * gates + a[:, :, None, None]) * slopes
        values = function(own)
        sums = values.sum((2, 3)), (values.repeat(times, 1, 1, 1) * u).sum((2, 3))
        return values * g[:, :, None, None], gradient, *sums

    given, g, u, a = (each.float() for each in (x, gate, grad, added))
    found = (
        activation.run(given, g),
        activation.pull_back(u.clone(), given, g, a),
        activation.sums(given),
        activation.sums(given, u),
    )
    for got, exact, base in zip(found, by_hand(torch.float64), by_hand(torch.float32), strict=True):
        assert_no_worse(got, exact, base)


@compiled
def test_long_sums_round_like_short_ones() -> None:
    x = sample(1, 3, 320, 320, dtype=torch.float64, low=0.0).float()
    exact = x.double().sum((2, 3))
    assert ((Activation("identity").sums(x) - exact).abs() <= 1e-6 * exact).all()


@compiled
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda ops, x: ops.activation(x, None, 8, 0.0), "kind must be at least 0 and less than 8, got 8"),
        (lambda ops, x: ops.activation(x.double(), None, 1, 0.0), "input must be float32 on the CPU"),
        (lambda ops, x: ops.activation(x, torch.ones(2, 4), 1, 0.0), r"gate must be \(2, 3\) in float32 on the CPU"),
        (lambda ops, x: ops.activation(x[0], torch.ones(2, 3), 1, 0.0), r"input must be \(N, C, H, W\) where there is a gate"),
        (
            lambda ops, x: ops.activation_backward_(x[:, :2].contiguous(), x, None, None, 1, 0.0),
            "the input's size in dimension 1",
        ),
        (
            lambda ops, x: ops.activation_backward_(x[:1].clone(), x, None, None, 1, 0.0),
            "a multiple of the input's 2 images, got 1",
        ),
        (
            lambda ops, x: ops.activation_backward_(x[:, :, ::2], x[:, :, ::2], None, None, 1, 0.0),
            "must be dense and of one order",
        ),
        (
            lambda ops, x: ops.activation_backward_(x.clone(), x, torch.ones(2, 3), None, 1, 0.0),
            "channels_last where there is a gate",
        ),
        (lambda ops, x: ops.activation_sums(x, x[:, :, 1:], 1, 0.0), "grad must be like the input"),
    ],
)
def test_errors(call: Callable[..., object], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call(torch.ops.pysal_activations, sample(2, 3, 4, 5))


@compiled
def test_nothing_is_nothing() -> None:
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        x, gate = torch.zeros(shape), torch.zeros(shape[:2])
        activation = Activation("silu")
        assert activation.run(x, gate).shape == activation.pull_back(x.clone(), x, gate, gate).shape == x.shape
        assert torch.equal(activation.sums(x, x), torch.zeros(shape[:2]))


class Squeeze(nn.Module):
    """Squeeze-and-excitation as networks spell it."""

    def __init__(self, channels: int, spelling: str) -> None:
        super().__init__()
        self.pool, self.spelling = nn.AdaptiveAvgPool2d(1), spelling
        self.narrow, self.wide = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.inner, self.gate = (nn.ReLU(), nn.Hardsigmoid()) if spelling == "module" else (nn.SiLU(inplace=True), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True) if self.spelling == "mean" else self.pool(x)
        gate = self.wide(self.inner(self.narrow(means)))
        gate = gate.sigmoid() if self.spelling == "method" else self.gate(gate)
        return gate * x if self.spelling == "gate first" else x.mul(gate) if self.spelling == "method" else x * gate


class Network(nn.Module):
    """Convolutions with batch norms, an activation, and squeeze-and-excitation on a shortcut."""

    def __init__(self, make: Callable[[], nn.Module], spelling: str = "module", channels: int = 16) -> None:
        super().__init__()
        self.stem, self.norm, self.first = nn.Conv2d(3, channels, 3, 2), nn.BatchNorm2d(channels), make()
        self.middle = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.second, self.squeeze = make(), Squeeze(channels, spelling)
        self.last, self.head = nn.Conv2d(channels, channels, 1), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.stem(x)))
        x = x + self.last(self.squeeze(self.second(self.middle(x))))
        head: Tensor = self.head(x.mean((2, 3)))
        return head


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Hardswish": nn.Hardswish,
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "ReLU": nn.ReLU,
    "Mish": nn.Mish,
    "PReLU": nn.PReLU,
}
SPELLINGS = ("module", "mean", "method", "gate first")


def build(make: Callable[[], nn.Module], spelling: str = "module", channels: int = 16) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(make, spelling, channels)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model.eval(), sample(2, 3, 25, 22)


def program_of(model: nn.Module, x: Tensor) -> Program:
    program = pysal.prepare(model, x, batch_size=2).program
    assert program is not None
    return program


@pytest.mark.parametrize(
    ("name", "spelling"), [*((name, "module") for name in MAKERS), *(("SiLU", spelling) for spelling in SPELLINGS[1:])]
)
def test_a_prepared_network_is_no_worse_than_torch(name: str, spelling: str) -> None:
    model, x = build(MAKERS[name], spelling, channels=16 if spelling == "module" else 13)
    prepared, exact = pysal.prepare(model, x, batch_size=2), copy.deepcopy(model).double()
    assert prepared.fused, prepared.report()
    assert ("squeeze-and-excitation" in prepared.report()) == available()
    assert_no_worse(pysal.gradient(prepared, x, 1), pysal.gradient(exact, x.double(), 1), pysal.gradient(model, x, 1))
    with torch.no_grad():
        assert_no_worse(prepared(x), exact(x.double()), model(x))
    assert_no_worse(prepared(x.clone().requires_grad_()).detach(), exact(x.double()).detach(), model(x).detach())


@compiled
@pytest.mark.parametrize("name", ["SiLU", "ReLU"])
def test_a_pass_keeps_the_inputs_of_activations_alone(name: str) -> None:
    model, x = build(MAKERS[name])
    program = program_of(model, x)
    program.blocks = {last: block for last, block in program.blocks.items() if isinstance(block, SqueezeOperator)}
    (squeeze,) = program.blocks.values()
    assert isinstance(squeeze, SqueezeOperator)
    assert squeeze.activation.name == ("silu" if name == "SiLU" else "identity")
    own = [operator for operator in program.operators.values() if isinstance(operator, ActivationOperator)]
    assert len(own) == (3 if name == "SiLU" else 1)  # the gates' own is the third
    tape = program.record(x)
    map_bytes, small = 2 * 16 * 12 * 10 * 4, 1024
    gates = 0 if name == "SiLU" else 2 * map_bytes // 32  # a bit each
    assert (2 if name == "SiLU" else 1) * map_bytes + gates <= tape.bytes <= 2 * map_bytes + gates + small


@compiled
def test_gradients_of_several_classes_share_a_pass() -> None:
    model, x = build(nn.SiLU)
    prepared = pysal.prepare(model, x, batch_size=2)
    together = pysal.class_gradients(prepared, x, range(5))
    for target in range(5):
        expected = pysal.gradient(model, x, target)
        torch.testing.assert_close(together[:, target], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@compiled
def test_layers_inside_can_be_asked_for() -> None:
    model, x = build(nn.SiLU)
    program = program_of(model, x)
    single = copy.copy(program)
    single.blocks = {}
    runs = 0
    for path, module in model.named_modules():
        place = program.layer(Layer(path, module, 0))
        if place is None:
            continue
        runs += 1
        tape, other = program.record(x, [place]), single.record(x, [place])
        grad = sample(len(x), 5)
        (found, parts), (expected, others) = tape.sweep(grad, layers=[place]), other.sweep(grad, layers=[place])
        for one, two in ((tape.values[place], other.values[place]), (found, expected), (parts[place], others[place])):
            assert one is not None
            assert two is not None
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(two.abs().max()))
    assert runs >= 10


@pytest.mark.parametrize("name", ["SiLU", "ReLU", "LeakyReLU"])
@pytest.mark.parametrize("other", ["error", "plain", "generalised"])
def test_rules_are_those_of_the_model(name: str, other: str) -> None:
    model, x = build(MAKERS[name])
    prepared = pysal.prepare(model, x, batch_size=2)
    answers: list[Tensor | str] = []
    for each in (model, prepared):
        try:
            answers.append(pysal.guided_backprop(each, x, 1, other_activations=other))
        except pysal.NotApplicable as error:
            answers.append(str(error))
    if isinstance(answers[0], str):
        assert answers[0] == answers[1]
    else:
        torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-4 * float(answers[0].abs().max()))


def test_mixed_precision_keeps_the_activations_in_float32() -> None:
    model, x = build(nn.SiLU)
    prepared = pysal.prepare(model, x, batch_size=2, precision="mixed")
    expected = pysal.gradient(model, x, 1)
    assert (pysal.gradient(prepared, x, 1) - expected).norm() <= 0.05 * expected.norm()


def test_squeezed_maps_that_others_see_are_kept() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.squeeze = nn.Conv2d(3, 8, 3), Squeeze(8, "module")

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.first(x))
            return torch.cat([self.squeeze(y), y], 1).mean((2, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Seen().eval()
    x = sample(2, 3, 12, 12)
    program = program_of(model, x)
    assert program.blocks == {}
    prepared, exact = pysal.prepare(model, x, batch_size=2), copy.deepcopy(model).double()
    assert_no_worse(pysal.gradient(prepared, x, 1), pysal.gradient(exact, x.double(), 1), pysal.gradient(model, x, 1))
