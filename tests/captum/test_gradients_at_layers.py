"""The gradient methods that captum has beside the most used ones: the same calls of both, float64 agreement to 1e-9."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
import pysal.captum
from tests.captum.networks import NETWORKS
from tests.captum.peer import IGNORED, agree, both, difference, peers
from tests.captum.test_against_captum import ALL, EXACT, ROWS, Combinations, asked

pytestmark = [
    *(pytest.mark.filterwarnings(one) for one in IGNORED),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
]

# captum's layers that are followed by a ReLU in place cannot be integrated to, and its pools not be told apart from others
CALM = [name for name in ALL if name not in ("conv", "in_place", "functional", "shared")]


@pytest.mark.parametrize("name", ALL)
def test_input_x_gradient(name: str, combinations: Combinations) -> None:
    for rows, number in combinations(ROWS, range(len(asked(name, 1)))):
        model, inputs, options = asked(name, rows)[number]
        both("InputXGradient", peers("InputXGradient", model), EXACT, inputs, **options)


@pytest.mark.parametrize("name", ALL)
def test_layer_activation(name: str) -> None:
    model, inputs, options = asked(name, 3)[0]
    options.pop("target")
    layers = [model.get_submodule(one) for one in NETWORKS[name].layers]
    for layer in [*layers, layers]:
        for at_input in (False, True):
            pair = peers("LayerActivation", model, layer)
            found = [one.attribute(inputs, attribute_to_layer_input=at_input, **options) for one in pair]
            assert isinstance(found[1], list) == isinstance(layer, list)
            agree("LayerActivation", *(tuple(one) if isinstance(one, list) else one for one in found), 0.0)


@pytest.mark.parametrize("name", ALL)
def test_layer_gradient_x_activation(name: str, combinations: Combinations) -> None:
    switch = (False, True)
    for (model, inputs, options), layer, at_input, multiplied in combinations(
        asked(name, 3), NETWORKS[name].layers, switch, switch
    ):
        pair = peers("LayerGradientXActivation", model, model.get_submodule(layer), None, multiplied)
        both("LayerGradientXActivation", pair, EXACT, inputs, attribute_to_layer_input=at_input, **options)


def test_several_layers_at_once() -> None:
    model, inputs, options = asked("residual", 3)[0]
    layers = [model[0], model[1], model[2].act]
    theirs, ours = (one.attribute(inputs, **options) for one in peers("LayerGradientXActivation", model, layers))
    assert isinstance(ours, list)
    agree("LayerGradientXActivation", tuple(theirs), tuple(ours), EXACT)


@pytest.mark.parametrize("name", CALM)
def test_layer_integrated_gradients(name: str, combinations: Combinations) -> None:
    methods = ["gausslegendre", "riemann_left", "riemann_trapezoid"]
    axes = (asked(name, 3), NETWORKS[name].layers, methods, ((7, None), (12, 9), (5, 3)), (False, True))
    for (model, inputs, options), layer, method, (steps, size), multiplied in combinations(*axes):
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        starts = tuple(one.flip(0) for one in several)
        pair = peers("LayerIntegratedGradients", model, model.get_submodule(layer), None, multiplied, exact_captum=True)
        both(
            "LayerIntegratedGradients",
            pair,
            EXACT,
            inputs,
            starts if isinstance(inputs, tuple) else starts[0],
            n_steps=steps,
            method=method,
            internal_batch_size=size,
            return_convergence_delta=True,
            **options,
        )


class Text(nn.Module):
    """Tokens and their places through embeddings and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.mix = nn.Embedding(20, 6), nn.Embedding(9, 6), nn.Linear(6, 6)
        self.memory, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens: Tensor, places: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        value = torch.tanh(self.mix(self.words(tokens) + self.places(places)))
        if mask is not None:
            value = value * mask[..., None]
        return self.head(self.memory(value)[0].mean(1)) * scale


def text() -> tuple[nn.Module, Tensor, Tensor, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, tokens = Text().double().eval(), torch.randint(0, 20, (4, 9))
    return model, tokens, torch.zeros_like(tokens), (torch.arange(9).expand(4, 9), torch.rand(4, 9, dtype=torch.float64), 2.0)


@pytest.mark.parametrize("at_input", [False, True])
def test_layers_behind_tokens(at_input: bool) -> None:
    model, tokens, absent, further = text()
    choices: dict[str, Any] = {"target": [0, 1, 2, 0], "additional_forward_args": further}
    layers = [model.mix] if at_input else [model.words, model.mix, [model.words, model.places]]
    for layer in layers:
        pair = peers("LayerIntegratedGradients", model, layer, exact_captum=True)
        found = [
            one.attribute(
                tokens, absent, n_steps=9, internal_batch_size=8, return_convergence_delta=True,
                attribute_to_layer_input=at_input, **choices,
            )
            for one in pair
        ]  # fmt: skip
        agree("LayerIntegratedGradients", *((*_flat(one), delta) for one, delta in found), EXACT)
        both_layers = peers("LayerGradientXActivation", model, layer)
        found = [one.attribute(tokens, attribute_to_layer_input=at_input, **choices) for one in both_layers]
        agree("LayerGradientXActivation", *map(_flat, found), EXACT)


def _flat(answer: Any) -> tuple[Tensor, ...]:
    return tuple(answer) if isinstance(answer, list | tuple) else (answer,)


def test_a_layer_whose_first_dimension_is_time() -> None:
    """Its steps are no rows: integrals at the layer add up to those at the inputs of each example."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.memory, self.head = nn.Linear(4, 6), nn.LSTM(6, 5), nn.Linear(5, 3)

        def forward(self, series: Tensor) -> Tensor:
            return self.head(self.memory(self.mix(series.transpose(0, 1)))[0][-1])

    torch.manual_seed(0)
    model, series = Recurrent().double().eval(), torch.randn(2, 7, 4, dtype=torch.float64)
    at_layer = pysal.captum.LayerIntegratedGradients(model, model.mix).attribute(series, target=[1, 2], n_steps=60)
    at_inputs = pysal.captum.IntegratedGradients(model).attribute(series, target=[1, 2], n_steps=60)
    assert at_layer.shape == (7, 2, 6)
    # the layer is linear and without bias the paths are the same; the bias moves nothing along the path
    assert difference(at_inputs.sum((1, 2)), at_layer.sum((0, 2))) < 1e-12
    with pytest.raises(AssertionError, match="a row for each of 2 examples"):
        pysal.captum.LayerIntegratedGradients(model, model.mix).attribute(series, target=1, return_convergence_delta=True)


def test_a_prepared_model_has_its_layers() -> None:
    model, images = NETWORKS["conv"].model(torch.float32), NETWORKS["conv"].inputs(2, torch.float32)
    prepared, layer = pysal.prepare(model, images), model[3]
    calls: list[Callable[[Any], Tensor]] = [
        lambda one: pysal.captum.LayerActivation(one, layer).attribute(images),
        lambda one: pysal.captum.LayerGradientXActivation(one, layer).attribute(images, 2),
        lambda one: pysal.captum.LayerIntegratedGradients(one, layer).attribute(images, target=2, n_steps=4),
        lambda one: pysal.captum.DeepLift(one).attribute(images, target=2),
        lambda one: pysal.captum.InputXGradient(one).attribute(images, target=2),
        lambda one: pysal.captum.GradientShap(one, seed=0).attribute(images, images * 0, target=2),
    ]
    for call in calls:
        assert difference(call(model), call(prepared)) < 1e-5
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("name", ["linear", "residual", "two_inputs", "number"])
def test_gradient_shap(name: str, multiplied: bool) -> None:
    for model, inputs, options in asked(name, 3)[-3:]:
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        table = tuple(torch.cat([one, one.flip(0) / 2]) for one in several)
        table = table if isinstance(inputs, tuple) else table[0]
        drawn: list[Any] = [table, lambda table=table: table]
        for baselines, deviation in zip(drawn, (0.0, tuple(0.1 * (i + 1) for i in range(len(several)))), strict=True):
            found = []
            for one in peers("GradientShap", model, multiplied, rng="captum"):
                torch.manual_seed(1)
                np.random.seed(1)
                found.append(one.attribute(inputs, baselines, 4, deviation, return_convergence_delta=True, **options))
            agree("GradientShap", *found, EXACT)


def test_gradient_shap_is_its_seed_and_its_expectation() -> None:
    """Of a linear function the gradient is known: the mean over draws of weight * (input - baseline)."""
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    inputs, table = torch.ones(2, 3, dtype=torch.float64), torch.tensor([[0.0, 1, 2], [2, 0, 1]], dtype=torch.float64)

    def call(**choices: Any) -> Tensor:
        return pysal.captum.GradientShap(lambda x: x @ weight, **choices).attribute(inputs, table, n_samples=400)

    assert torch.equal(call(seed=3), call(seed=3))
    assert not torch.equal(call(seed=3), call(seed=4))
    torch.manual_seed(0)
    first = call()
    torch.manual_seed(0)
    assert torch.equal(first, call())
    right = weight * (inputs - table.mean(0))
    spread = weight.abs() * (table[0] - table[1]).abs() / 2 / 400**0.5  # the standard error of a mean of 400 coin flips
    assert bool(((call(seed=0) - right).abs() <= 5 * spread).all())


def test_places_of_gradient_shap_do_not_depend_on_what_runs_together() -> None:
    """A function of each row alone, called with all copies and with few: the same draws."""
    inputs, table = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    most = []
    for limit in (None, 7):
        tunnel = pysal.captum.gradient_shap.NoiseTunnel(
            pysal.captum.gradient_shap.InputBaselineXGradient(lambda x: x.pow(3).sum(1)), seed=5
        )
        tunnel.attribution_method.places = torch.rand(3 * 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        most.append(
            tunnel.attribute(
                inputs, nt_samples=20, nt_samples_batch_size=limit, stdevs=0.2, baselines=table, draw_baseline_from_distrib=True
            )
        )
    assert difference(*most) < 1e-14


@pytest.mark.parametrize("name", ["LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients"])
def test_a_layer_is_a_module(name: str) -> None:
    with pytest.raises(TypeError, match="layer must be a module or a list of modules, got '2'"):
        getattr(pysal.captum, name)(NETWORKS["conv"].model(), "2").attribute(NETWORKS["conv"].inputs(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [(1, "be a function, got int"), (lambda shares: shares[0], "return a tuple, an attribution for each input, got Tensor")],
)
def test_shares_of_ones_own_are_a_tuple(function: Any, message: str) -> None:
    method = pysal.captum.DeepLift(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    with pytest.raises(AssertionError, match=f"custom_attribution_func must {message}"):
        method.attribute(torch.ones(2, 4), target=1, custom_attribution_func=function)


@pytest.mark.parametrize("name", ["LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients"])
def test_no_layers(name: str) -> None:
    with pytest.raises(AssertionError, match=r"layer must be a module or a list of modules, got \[\]"):
        getattr(pysal.captum, name)(NETWORKS["conv"].model(), []).attribute(NETWORKS["conv"].inputs(1))


class GivenByName(nn.Module):
    """A layer that is called with keywords alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(input=x)
        return found


@pytest.mark.parametrize("name", ["LayerActivation", "LayerIntegratedGradients", "LayerGradientXActivation", "LayerGradCam"])
def test_a_layer_that_gets_nothing_by_position(name: str) -> None:
    model = GivenByName()
    options = {} if name == "LayerActivation" else {"target": 1}
    with pytest.raises(IndexError, match="layer must be given tensors by position, got none for Linear"):
        getattr(pysal.captum, name)(model, model.layer).attribute(torch.ones(2, 4), attribute_to_layer_input=True, **options)


class TwoBranches(nn.Module):
    """Two inputs, an activation of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 3)
        self.relu, self.tanh = nn.ReLU(), nn.Tanh()

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0, rows: Tensor | None = None) -> Tensor:
        value = self.head(self.relu(self.left(left)) + self.tanh(self.right(right))) * scale
        return value if rows is None else value * rows[:, None]


def test_deep_lift_of_two_inputs() -> None:
    torch.manual_seed(0)
    model, further = TwoBranches().double(), (2.0, torch.arange(4.0, dtype=torch.float64))
    inputs = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for starts in (None, (0, torch.ones(1, 3, dtype=torch.float64))):
        pair = peers("DeepLift", model)
        both("DeepLift", pair, EXACT, inputs, starts, [0, 1, 2, 0], further, return_convergence_delta=True)
    table = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    pair = peers("DeepLiftShap", model)
    both("DeepLiftShap", pair, EXACT, inputs, table, [0, 1, 2, 0], further, return_convergence_delta=True)


@pytest.mark.parametrize("name", [name for name in CALM if not name.startswith("two")])  # captum refuses a ReLU used twice
def test_deep_lift(name: str, combinations: Combinations) -> None:
    for (model, inputs, options), multiplied, start in combinations(asked(name, 3), (False, True), ("none", "rows", "one")):
        if name in ("linear", "places") and isinstance(model, nn.Module):  # of a softmax captum's shares do not add up
            model = nn.Sequential(*list(model.children())[:-1]) if name == "linear" else model
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        starts = {"none": None, "rows": tuple(one.flip(0) for one in several), "one": tuple(one[:1] for one in several)}[start]
        starts = starts if starts is None or isinstance(inputs, tuple) else starts[0]
        pair = peers("DeepLift", model, multiplied)
        both("DeepLift", pair, EXACT, inputs, starts, return_convergence_delta=True, **options)


def test_deep_lift_of_further_kinds() -> None:
    torch.manual_seed(0)
    inputs, starts = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    for act in (nn.ELU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.ReLU(inplace=True)):
        model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 4)).double()
        both("DeepLift", peers("DeepLift", model), EXACT, inputs, starts, 2, return_convergence_delta=True)
    seen = []
    for one in peers("DeepLift", model):
        own = one.attribute(
            inputs,
            starts,
            2,
            custom_attribution_func=lambda m, x, b: tuple(p * (q - r) for p, q, r in zip(m, x, b, strict=True)),
        )
        seen.append(own)
    assert difference(*seen) < EXACT


@pytest.mark.parametrize("name", ["residual", "number"])
def test_deep_lift_shap(name: str) -> None:
    for model, inputs, options in asked(name, 3)[-3:]:
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        table = tuple(torch.cat([one, one.flip(0) / 2]) for one in several)
        table = table if isinstance(inputs, tuple) else table[0]
        pair = peers("DeepLiftShap", model)
        both("DeepLiftShap", pair, EXACT, inputs, table, return_convergence_delta=True, **options)
    with pytest.raises(AssertionError, match="more than one row"):
        pysal.captum.DeepLiftShap(model).attribute(inputs, inputs[:1], target=0)
