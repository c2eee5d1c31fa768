"""ReLU rules wherever the ReLU is, against networks written with the rule in their own autograd functions."""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysal
from pysal.engine.request import sweeps
from tests.methods.networks import images, seeded

INPUTS = images(2, 3, 6, 7)
RULES = ("guided", "deconvnet")


@pytest.fixture(params=["recorded", "small"], autouse=True)
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the forward pass is watched, as passes of photos are; small ones follow the rule on the way back alone."""
    if request.param == "recorded":
        monkeypatch.setattr(sweeps, "UNRECORDED", 0)
    return bool(request.param == "recorded")


class Ruled(torch.autograd.Function):
    """min(max(x, 0), upper), whose backward is the rule's formula."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rule: str, upper: float) -> Tensor:
        ctx.save_for_backward((values > 0) & (values < upper))
        ctx.rule = rule
        return values.clamp(0, upper)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate,) = ctx.saved_tensors
        passes = {"plain": gate, "guided": gate & (grad > 0), "deconvnet": grad > 0}[ctx.rule]
        return torch.where(passes, grad, 0.0), None, None


def ruled(rule: str, upper: float = float("inf")) -> Callable[[Tensor], Tensor]:
    return lambda values: Ruled.apply(values, rule, upper)


Activation = Callable[[Tensor], Tensor]


class Network(nn.Module):
    """conv - activation - conv - activation - mean - linear; `wiring` says how the activations are put in."""

    def __init__(self, activation: Activation, wiring: str = "plain") -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.activation, self.wiring = activation, wiring

    def forward(self, inputs: Tensor) -> Tensor:
        a = self.first(inputs) * 3
        if self.wiring == "input used elsewhere":
            a = self.activation(a.clone()) + a
        elif self.wiring == "part of a tensor":
            a = torch.cat([self.activation(a[:, :2].clone()), a[:, 2:]], 1)
        elif self.wiring == "twice in a row":
            a = self.activation(self.activation(a) - 0.1)
        elif self.wiring == "checkpointed":
            a = checkpoint(lambda values: self.activation(values) * 1, a, use_reentrant=False)
        else:
            a = self.activation(a)
        b = self.activation(self.second(a) * 3)
        return self.head(b.mean((2, 3)))


def network(activation: Activation, wiring: str = "plain") -> Network:
    return seeded(lambda: Network(activation, wiring))  # type: ignore[return-value]


def by_autograd(model: Callable[[Tensor], Tensor], inputs: Tensor = INPUTS, target: int = 1) -> Tensor:
    leaf = inputs.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


def test_oracle_with_the_plain_rule_is_autograd() -> None:
    for wiring in ("plain", "input used elsewhere", "part of a tensor", "twice in a row"):
        expected = by_autograd(network(F.relu, wiring))
        torch.testing.assert_close(by_autograd(network(ruled("plain"), wiring)), expected)
        assert not torch.allclose(by_autograd(network(ruled("guided"), wiring)), expected)


# spelling: the activation, and where it saturates
SPELLINGS: dict[str, tuple[Activation, float]] = {
    "nn.ReLU": (nn.ReLU(), float("inf")),
    "nn.ReLU(inplace=True)": (nn.ReLU(inplace=True), float("inf")),
    "F.relu": (F.relu, float("inf")),
    "F.relu(inplace=True)": (lambda v: F.relu(v, inplace=True), float("inf")),
    "F.relu_": (F.relu_, float("inf")),
    "torch.relu(input=)": (lambda v: torch.relu(input=v), float("inf")),
    "torch.relu_": (torch.relu_, float("inf")),
    "Tensor.relu": (lambda v: v.relu(), float("inf")),
    "Tensor.relu_": (lambda v: v.relu_(), float("inf")),
    "aten.relu": (lambda v: torch.ops.aten.relu(v), float("inf")),
    "clamp(min=0)": (lambda v: v.clamp(min=0), float("inf")),
    "clamp_(min=0)": (lambda v: v.clamp_(min=0), float("inf")),
    "clip(0)": (lambda v: torch.clip(v, 0), float("inf")),
    "clamp_min_": (lambda v: v.clamp_min_(0.0), float("inf")),
    "nn.Threshold(0, 0)": (nn.Threshold(0, 0), float("inf")),
    "F.threshold(inplace=True)": (lambda v: F.threshold(v, 0, 0, inplace=True), float("inf")),
    "nn.ReLU6": (nn.ReLU6(), 6.0),
    "nn.ReLU6(inplace=True)": (nn.ReLU6(inplace=True), 6.0),
    "F.relu6": (F.relu6, 6.0),
    "F.relu6(inplace=True)": (lambda v: F.relu6(v, inplace=True), 6.0),
    "nn.Hardtanh(0, 1)": (nn.Hardtanh(0, 1), 1.0),
    "F.hardtanh(0, 1, inplace=True)": (lambda v: F.hardtanh(v, 0.0, 1.0, inplace=True), 1.0),
    "F.hardtanh_(min_val=0, max_val=1)": (lambda v: F.hardtanh_(v, min_val=0, max_val=1), 1.0),
    "clamp(0, 1)": (lambda v: v.clamp(0, 1), 1.0),
}


@pytest.mark.parametrize("wiring", ["plain", "input used elsewhere", "part of a tensor", "twice in a row"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_in_every_place(spelling: str, wiring: str) -> None:
    activation, upper = SPELLINGS[spelling]
    model = network(activation, wiring)
    for rule in RULES:
        found = pysal.guided_backprop(model, INPUTS, 1, rule=rule)
        torch.testing.assert_close(found, by_autograd(network(ruled(rule, upper), wiring)), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs = INPUTS.to(dtype).contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    model = network(nn.ReLU()).to(dtype)
    expected = by_autograd(network(ruled("guided")).to(dtype), inputs).float()
    found = pysal.guided_backprop(model, inputs, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)  # the same operations in the same order


def test_maximum_is_not_claimed() -> None:
    model = network(lambda v: torch.maximum(v, torch.zeros_like(v)))
    with pytest.raises(pysal.NotApplicable, match="no ReLU was met"):
        pysal.guided_backprop(model, INPUTS, 1)


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model).eval()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6()

    def forward(self, inputs: Tensor) -> Tensor:
        a = torch.relu(self.first(inputs) * 3)
        b = self.relu6(self.relu(self.second(a) * 9).clamp(min=0.0))
        return self.head(b.mean((2, 3)))


class ScriptedOracle(Scripted):
    rule = "guided"

    def forward(self, inputs: Tensor) -> Tensor:
        a = ruled(self.rule)(self.first(inputs) * 3)
        b = ruled(self.rule, 6.0)(ruled(self.rule)(ruled(self.rule)(self.second(a) * 9)))
        return self.head(b.mean((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_scripted_module_is_the_same_at_every_call(rule: str) -> None:
    oracle: Any = seeded(ScriptedOracle)
    oracle.rule = rule
    expected = by_autograd(oracle)
    model = scripted(seeded(Scripted))
    for _ in range(4):  # TorchScript optimises after it has seen some runs
        pysal.gradient(model, INPUTS, 1)
        pysal.integrated_gradients(model, INPUTS, steps=3)
        found = pysal.guided_backprop(model, INPUTS, 1, rule=rule)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert torch._C._get_graph_executor_optimize()


class ScriptedToHide(Scripted):
    """A class of its own: TorchScript keeps what it optimised for all modules of a class."""


def test_script_that_hides_its_backward_pass_is_refused() -> None:
    model = scripted(seeded(ScriptedToHide))
    for _ in range(3):
        by_autograd(model)
    for other in ("error", "plain"):
        with pytest.raises(pysal.NotApplicable) as error:
            pysal.guided_backprop(model, INPUTS, 1, other_activations=other)
        assert str(error.value) == (
            "pysal.guided_backprop: model must not be compiled, for the rule cannot reach the activations inside, "
            "got a graph of TorchScript, which has optimised its backward pass"
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_is_explained_as_python(backend: str) -> None:
    eager = network(F.relu)
    model = torch.compile(eager, backend=backend)
    expected = by_autograd(network(ruled("guided")))
    torch.testing.assert_close(pysal.guided_backprop(model, INPUTS, 1), expected, rtol=1e-11, atol=1e-13)
    for method in (pysal.grad_cam, pysal.guided_grad_cam):
        assert torch.equal(method(model, INPUTS, 1, layer=eager.second), method(eager, INPUTS, 1, layer="second"))
        assert torch.equal(method(model, INPUTS, 1), method(eager, INPUTS, 1))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, while it traces
def test_compiled_part_of_a_model_is_refused() -> None:
    model = nn.Sequential(torch.compile(network(F.relu), backend="aot_eager"), nn.ReLU()).eval()
    with pytest.raises(pysal.NotApplicable, match=r"got a graph of torch\.compile$"):
        pysal.guided_backprop(model, INPUTS, 1)


UNDEFINED: dict[str, Activation] = {
    "GELU": F.gelu,
    "SiLU": F.silu,
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
    "Mish": F.mish,
    "Hardswish": F.hardswish,
    "Softplus": F.softplus,
    "PReLU": nn.PReLU().double(),
    "RReLU": nn.RReLU().eval(),
    "LogSigmoid": F.logsigmoid,
    "Hardshrink": F.hardshrink,
    "Softshrink": F.softshrink,
    "Hardtanh": F.hardtanh,
    "Ruled (a custom autograd function)": ruled("plain"),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_activations_are_named(name: str) -> None:
    model = network(lambda v: UNDEFINED[name](F.relu(v)))
    for method, options in ((pysal.guided_backprop, {"rule": "deconvnet"}), (pysal.guided_grad_cam, {})):
        with pytest.raises(pysal.NotApplicable) as error:
            method(model, INPUTS, 1, **options)
        assert str(error.value) == (
            f"pysal.{method.__name__}: the rule is defined for ReLU only, and the network has {name}; "
            "pass other_activations='plain' or 'generalised' to go on"
        )
    assert pysal.guided_backprop(model, INPUTS, 1, other_activations="plain").isfinite().all()


def test_undefined_activations_are_named_together() -> None:
    model = network(lambda v: F.silu(F.relu(v)) + F.gelu(v) + F.elu(v) + F.selu(v))
    with pytest.raises(pysal.NotApplicable, match=r"the network has ELU, GELU, SiLU; pass"):
        pysal.guided_backprop(model, INPUTS, 1)
    with pytest.raises(pysal.NotApplicable, match=r"the network has Hardshrink; pass other_activations='plain' to go on$"):
        pysal.guided_backprop(network(F.hardshrink), INPUTS, 1, other_activations="generalised")


@pytest.mark.parametrize("activation", [torch.sigmoid, torch.tanh, F.hardsigmoid, lambda v: v.softmax(1)])
def test_gates_and_attention_keep_their_derivative(activation: Activation) -> None:
    def gated(relu: Activation) -> Activation:
        return lambda v: relu(v) * activation(v)

    found = pysal.guided_backprop(network(gated(F.relu)), INPUTS, 1)
    torch.testing.assert_close(found, by_autograd(network(gated(ruled("guided")))), rtol=1e-11, atol=1e-13)


def test_no_relu_at_all() -> None:
    model = network(torch.tanh)
    for other in ("error", "generalised"):
        with pytest.raises(pysal.NotApplicable) as error:
            pysal.guided_backprop(model, INPUTS, 1, other_activations=other)
        assert str(error.value) == (
            "pysal.guided_backprop: no ReLU was met between the score and the inputs, so the result would be the plain "
            "gradient; pass other_activations='plain' if that is what you want"
        )
    plain = pysal.guided_backprop(model, INPUTS, 1, other_activations="plain")
    assert torch.equal(plain, pysal.gradient(model, INPUTS, 1))


class Generalised(torch.autograd.Function):
    """The local derivative times the positive incoming gradient, where the output is positive."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(values)
        ctx.activation = activation
        return activation(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (values,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = values.clone().requires_grad_()
            output = ctx.activation(leaf * 1)
            (local,) = torch.autograd.grad(output.sum(), leaf)
        return local * grad.clamp_min(0) * (output > 0), None


@pytest.mark.parametrize("wiring", ["plain", "input used elsewhere", "twice in a row"])
@pytest.mark.parametrize(
    "activation",
    [
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.SiLU(inplace=True),
        nn.LeakyReLU(0.2),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ELU(),
        nn.SELU(),
        nn.CELU(),
        nn.Mish(),
        nn.Hardswish(),
        nn.Softplus(),
        nn.PReLU().double(),
        nn.Hardtanh(-1, 1),
    ],
    ids=str,
)
def test_generalised(activation: Activation, wiring: str) -> None:
    found = pysal.guided_backprop(network(activation, wiring), INPUTS, 1, other_activations="generalised")
    oracle = network(lambda v: Generalised.apply(v, activation), wiring)
    torch.testing.assert_close(found, by_autograd(oracle), rtol=1e-11, atol=1e-13)


class Described(nn.Module):
    """An image branch and a branch for what is asked, which has its own activations."""

    def __init__(self, image_branch: nn.Module, asked: Activation) -> None:
        super().__init__()
        self.image_branch, self.asked, self.embed = image_branch, asked, nn.Linear(5, 4)

    def forward(self, inputs: Tensor, question: Tensor) -> Tensor:
        return self.image_branch(inputs) * self.asked(self.embed(question))


def test_what_is_not_on_the_way_from_the_images_does_not_count() -> None:
    question = images(2, 1, 1, 5).flatten(1)
    asked = (pysal.PerImage(question),)
    model = seeded(lambda: Described(Network(F.relu), F.gelu))
    oracle = seeded(lambda: Described(Network(ruled("guided")), F.gelu))
    found = pysal.guided_backprop(model, INPUTS, 1, extra_inputs=asked)
    expected = by_autograd(lambda x: oracle(x, question))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    with pytest.raises(pysal.NotApplicable, match="no ReLU was met"):
        pysal.guided_backprop(seeded(lambda: Described(Network(torch.tanh), F.relu)), INPUTS, 1, extra_inputs=asked)


def test_relu_met_in_one_chunk_does_not_speak_for_the_next() -> None:
    calls = []

    def model(batch: Tensor) -> Tensor:
        calls.append(1)
        hidden = 2 * batch
        return (F.relu(hidden) if len(calls) == 1 else hidden).sum((2, 3))

    with pytest.raises(pysal.NotApplicable, match="no ReLU was met"):
        pysal.guided_backprop(model, INPUTS, 1, batch_size=1)


def test_hooks_of_others_are_no_activations() -> None:
    model = network(F.relu)
    model.first.register_full_backward_hook(lambda *_: None)
    expected = by_autograd(network(ruled("guided")))
    torch.testing.assert_close(pysal.guided_backprop(model, INPUTS, 1), expected, rtol=1e-11, atol=1e-13)


def test_mixed_precision_is_no_activation() -> None:
    model, inputs = network(F.relu).float(), INPUTS.float()
    exact = pysal.guided_backprop(model, inputs, 1)
    mixed = pysal.guided_backprop(model, inputs, 1, precision="mixed")
    assert not torch.equal(mixed, exact)
    assert float(torch.corrcoef(torch.stack([mixed.flatten(), exact.flatten()]))[0, 1]) > 0.999


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("options", [{}, {"other_activations": "generalised"}])
@pytest.mark.parametrize("activation", [F.relu, lambda v: v.clamp(0, 6), F.gelu, torch.ops.aten.relu])
def test_nothing_of_a_pass_outlives_it(activation: Activation, options: dict[str, str]) -> None:
    if activation is F.gelu and not options:
        options = {"other_activations": "plain"}
    alive: list[weakref.ref[Any]] = []
    most = 0

    def model(batch: Tensor) -> Tensor:
        class Tag(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, values: Tensor) -> Tensor:
                alive.append(weakref.ref(ctx))
                return values * 2

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * 2

        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        Tag.__module__ = "torch.nn.modules._functions"
        return activation(Tag.apply(batch)).sum((2, 3))

    gc.disable()
    try:
        pysal.guided_backprop(model, torch.cat([INPUTS, INPUTS]), 1, batch_size=1, **options)
    finally:
        gc.enable()
    assert len(alive) == 4
    assert most == 0, "the graph of a chunk lives on in the next"


def test_two_threads_do_not_share_a_rule() -> None:
    model, failed = network(nn.ReLU()), []
    expected = {rule: by_autograd(network(ruled(rule))) for rule in ("plain", *RULES)}

    def work(rule: str) -> None:
        try:
            for _ in range(10):
                if rule == "plain":
                    found = pysal.gradient(model, INPUTS, 1)
                else:
                    found = pysal.guided_backprop(model, INPUTS, 1, rule=rule)
                torch.testing.assert_close(found, expected[rule], rtol=1e-11, atol=1e-13)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rule,)) for rule in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("other", ["error", "plain"])
def test_no_gradient_is_no_map_of_zeros(other: str) -> None:
    """Weights quantised as they run have no gradient, which is not 0: with the rule, and without it."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = torch.ao.quantization.quantize_dynamic(seeded(lambda: nn.Sequential(*layers)).float(), {nn.Linear})
    with pytest.raises(pysal.NotApplicable, match=r"^pysal\.guided_backprop: model must be differentiable, got a score that"):
        pysal.guided_backprop(model, INPUTS[:1].float(), 1, other_activations=other)


class Spelt(nn.Module):
    """ReLUs in seven spellings, of inputs on both sides of every bound."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.six, self.tanh, self.threshold = nn.ReLU6(), nn.Hardtanh(0, 2), nn.Threshold(0, 0)

    def forward(self, inputs: Tensor) -> Tensor:
        a = self.first(inputs) * 9
        parts = [torch.relu(a), self.six(a), self.tanh(a), self.threshold(a), a.clamp(min=0), F.relu_(a.clone()), a.relu()]
        return self.head(torch.stack(parts).sum(0).mean((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_a_pass_that_is_not_watched_follows_the_same_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = seeded(Spelt), []
    for limit in (0, 2**40):
        monkeypatch.setattr(sweeps, "UNRECORDED", limit)
        found.append(torch.stack([pysal.guided_backprop(model, INPUTS, target, rule=rule) for target in range(4)]))
    assert found[0].abs().amax() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


class InPart(nn.Module):
    """ReLUs in place on a part of a tensor, where an autograd node hides them; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.passes = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        maps = self.first(x)
        F.relu_(maps[:, :3])
        return self.last(maps.relu().mean((2, 3)))


def test_the_way_that_shows_hidden_relus_is_found_once(recorded: bool) -> None:
    model, inputs = seeded(InPart, 3), images(6, 3, 6, 7)
    pysal.guided_backprop(model, inputs, 1, batch_size=1)
    first = model.passes
    model.passes = 0
    pysal.guided_backprop(model, images(8, 3, 6, 7), 1, batch_size=1)
    assert model.passes - first == 2, "a pass for each further image, and none to look again"
