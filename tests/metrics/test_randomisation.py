"""Parameter randomisation: which layers are random when, and the three likenesses, against SciPy and scikit-image."""

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import Tensor, nn

import pysal
from pysal import metrics
from pysal.metrics.randomisation import _randomised
from tests.methods.networks import images, linear, rectified, seeded


def maps_of(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    return pysal.gradient(model, inputs, target).abs().amax(1)


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    """The modules that own a parameter or buffer that differs."""
    mine, theirs = dict(model.state_dict()), dict(other.state_dict())
    return {name.rpartition(".")[0] for name, value in mine.items() if not torch.equal(value, theirs[name])}


def test_which_layers_are_random() -> None:
    model = rectified()
    layers = ["7", "2", "0"]
    cascade = [changed(model, other) for other in _randomised(model, layers, "cascading", 0)]
    assert cascade == [{"7"}, {"7", "2"}, {"7", "2", "0"}]
    independent = [changed(model, other) for other in _randomised(model, layers, "independent", 0)]
    assert independent == [{"7"}, {"2"}, {"0"}]


def test_a_layer_gets_the_same_numbers_in_either_order() -> None:
    model = rectified()
    first = [dict(m.get_submodule("2").named_parameters()) for m in _randomised(model, ["7", "2"], "cascading", 5)][1]
    alone = next(dict(m.get_submodule("2").named_parameters()) for m in _randomised(model, ["2"], "independent", 5))
    assert all(torch.equal(first[name], alone[name]) for name in first)
    other = next(dict(m.get_submodule("2").named_parameters()) for m in _randomised(model, ["2"], "independent", 6))
    assert not any(torch.equal(first[name], other[name]) for name in first)


class Scaled(nn.Module):
    """A layer of nobody's library: no reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.arange(48.0).view(3, 4, 4))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factors


def test_batch_norm_forgets_what_it_counted_and_unknown_layers_are_shuffled() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(3), Scaled(), nn.Flatten(), nn.Linear(48, 2)))
    with torch.no_grad():
        model[0].running_mean.add_(3)
    third = list(_randomised(model, ["3", "1", "0"], "cascading", 0))[-1]
    assert third[0].running_mean.tolist() == [0, 0, 0]
    factors = third[1].factors.detach().flatten()
    assert factors.sort().values.tolist() == list(range(48))
    assert factors.tolist() != list(range(48))


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_likenesses_are_scipys_and_scikit_images(order: Any) -> None:
    model, inputs = rectified(), images(2, 3, 12, 11)
    target = model(inputs).argmax(1)
    found = metrics.parameter_randomisation(model, inputs, order=order, seed=3)
    assert found.layers == ("7", "2", "0")
    assert found.correlation.shape == found.correlation_of_sizes.shape == found.similarity.shape == (3, 2)
    before = maps_of(model, inputs, target)
    layers = list(found.layers)
    for step in range(3):
        random = list(_randomised(model, layers[: step + 1] if order == "cascading" else layers[step : step + 1], order, 3))[-1]
        after = maps_of(random, inputs, target)
        for image in range(2):
            one, other = before[image].numpy(), after[image].numpy()
            # a correlation of 132 ranks, and means over windows of 49: at most a few hundred roundings
            rank = float(spearmanr(one.ravel(), other.ravel()).statistic)
            assert float(found.correlation[step, image]) == pytest.approx(rank, abs=500 * 2.3e-16)
            assert float(found.correlation_of_sizes[step, image]) == pytest.approx(rank, abs=500 * 2.3e-16)  # no sign here
            alike = structural_similarity(one / one.max(), other / other.max(), data_range=1.0)
            assert float(found.similarity[step, image]) == pytest.approx(alike, abs=5000 * 2.3e-16)
    assert (found.correlation < 0.99).all()


def test_signs_count_for_signed_methods() -> None:
    # f = <w, x>: the last layer's gradient is its weights, so a model whose weights change sign has the opposite map
    model, inputs = linear(1, 9, 8), images(1, 1, 9, 8)
    found = metrics.parameter_randomisation(
        model, inputs, 1, method="integrated_gradients", method_options={"steps": 2}, layers=["1"]
    )
    random = next(iter(_randomised(model, ["1"], "cascading", 0)))
    maps = [(m[1].weight.detach()[1] * inputs.flatten()).view(9, 8).numpy() for m in (model, random)]
    expected = float(spearmanr(maps[0].ravel(), maps[1].ravel()).statistic)
    sizes = float(spearmanr(abs(maps[0]).ravel(), abs(maps[1]).ravel()).statistic)
    assert float(found.correlation[0, 0]) == pytest.approx(expected, abs=500 * 2.3e-16)
    assert float(found.correlation_of_sizes[0, 0]) == pytest.approx(sizes, abs=500 * 2.3e-16)
    scaled = [map / abs(map).max() for map in maps]
    alike = structural_similarity(*scaled, data_range=2.0)
    assert float(found.similarity[0, 0]) == pytest.approx(alike, abs=5000 * 2.3e-16)


def test_nothing_is_left_behind() -> None:
    model, inputs = rectified(), images(2, 3, 9, 8)
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    metrics.parameter_randomisation(model, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training


def test_prepared_models_and_layers_by_name() -> None:
    model, inputs = rectified().float(), images(2, 3, 12, 10, dtype=torch.float32)
    expected = metrics.parameter_randomisation(model, inputs, layers=["2", "7"])
    found = metrics.parameter_randomisation(pysal.prepare(model, inputs[:1]), inputs, layers=["2", "7"])
    assert found.layers == ("2", "7")
    assert torch.equal(found.correlation, expected.correlation)  # the prepared model's original is what is copied


def test_errors() -> None:
    model, inputs = rectified(), images(2, 3, 9, 8)

    def refused(error: type[Exception] = ValueError, network: Any = model, **options: Any) -> str:
        with pytest.raises(error) as caught:
            metrics.parameter_randomisation(network, inputs, 0, **options)
        return str(caught.value).removeprefix("pysal.metrics.parameter_randomisation: ")

    assert refused(TypeError, network=lambda x: x) == "model must be an nn.Module, got function"
    assert refused(network=nn.Flatten().eval()) == "model must have parameters, got Flatten"
    assert refused(method="lime").startswith("method must be one of leave_one_out, ")
    assert refused(order="upward") == "order must be 'cascading' or 'independent' or 'at_once', got 'upward'"
    assert refused(layers=["1"]) == "layers must name modules that own parameters, got '1'"
    assert refused(TypeError, layers="2") == "layers must be a sequence of names, or None, got '2'"
    assert refused(seed=0.5) == "seed must be a whole number in [-2^63, 2^63), got 0.5"
    assert refused(method_options={"steps": 3}) == "method_options must hold options out of none, got 'steps'"
    said = "method_options must be a mapping of option names to values, got ['steps']"
    assert refused(TypeError, method_options=["steps"]) == said
