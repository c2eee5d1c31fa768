"""Attributions of captum's classes with autograd's graph: beside a hand-written loop, and beside captum's where it has one."""

from typing import Any

import captum.attr as theirs
import pytest
import torch
from torch import Tensor, nn

import pysal
import pysal.captum as ours
from pysal.engine.paths.quadrature import rule
from tests.engine.test_graphs import ROUNDINGS, assert_same, by_hand, loss
from tests.methods.networks import assert_rounding, images, seeded, smooth


def test_saliency() -> None:
    model, inputs = smooth(), images(2, 3, 8, 8).requires_grad_()
    found = ours.Saliency(model).attribute(inputs, target=1, create_graph=True)
    assert_same(found, by_hand(model, inputs, 1).abs(), inputs, model)


def test_input_x_gradient_of_a_target_for_each_example() -> None:
    model, inputs = smooth(), images(2, 3, 8, 8).requires_grad_()
    found = ours.InputXGradient(model).attribute(inputs, target=[2, 0], create_graph=True)
    scores = model(inputs)
    expected = inputs * torch.autograd.grad(scores[0, 2] + scores[1, 0], inputs, create_graph=True)[0]
    assert_same(found, expected, inputs, model)


@pytest.mark.parametrize("most", [None, 1, 4])
def test_integrated_gradients_and_their_baselines(most: int | None) -> None:
    model, inputs = smooth(), images(2, 3, 8, 8).requires_grad_()
    baselines, steps = images(1, 3, 8, 8, seed=1).requires_grad_(), rule("gauss_legendre", 3)
    points = [baselines + node * (inputs - baselines) for node in steps.nodes]
    parts = [torch.autograd.grad(model(point)[:, 1].sum(), point, create_graph=True)[0] for point in points]
    mean = sum(weight * part for weight, part in zip(steps.weights, parts, strict=True))
    found = ours.IntegratedGradients(model).attribute(
        inputs, baselines, target=1, n_steps=3, internal_batch_size=most, create_graph=True
    )
    expected = (inputs - baselines) * mean
    assert_same(found, expected, inputs, model, baselines)


def test_several_inputs_of_any_rank() -> None:
    layer = seeded(lambda: nn.Linear(5, 3))

    def function(table: Tensor, cells: Tensor) -> Tensor:
        return layer(table).tanh() * cells.square().sum((1, 2))[:, None]

    inputs = images(2, 5, 1, 1)[:, :, 0, 0].requires_grad_(), images(2, 3, 2, 1, seed=1)[..., 0].requires_grad_()
    found = ours.Saliency(function).attribute(inputs, target=2, abs=False, create_graph=True)
    expected = torch.autograd.grad(function(*inputs)[:, 2].sum(), inputs, create_graph=True)
    everything = [*inputs, *layer.parameters()]
    slopes = [torch.autograd.grad(sum(map(loss, one)), everything, materialize_grads=True) for one in (found, expected)]
    for our, their in zip(*slopes, strict=True):
        assert_rounding(our, their, ROUNDINGS)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["LayerGradCam", "LayerGradientXActivation"])
def test_layers_have_captums_graph(name: str, layer: int) -> None:
    model, inputs = smooth(), images(2, 3, 8, 8).requires_grad_()
    found, expected = (
        getattr(module, name)(model, model[layer]).attribute(inputs, target=1, grad_kwargs={"create_graph": True})
        for module in (ours, theirs)
    )
    assert_same(found, expected, inputs, model)


def test_integrated_gradients_of_a_layer_lead_on_to_the_images() -> None:
    """captum's graph ends at the layer; by differences, the map depends on the images, too."""
    model, inputs = smooth(channels=1), images(1, 1, 3, 3).requires_grad_()
    bases = images(1, 1, 3, 3, seed=1)

    def find(inputs: Tensor) -> Tensor:
        found: Tensor = ours.LayerIntegratedGradients(model, model[1]).attribute(
            inputs, bases, target=1, n_steps=1, grad_kwargs={"create_graph": True}
        )
        return found.square().sum()

    assert torch.autograd.gradcheck(find, (inputs,))
    (slopes,) = torch.autograd.grad(find(inputs), model[0].weight)
    assert slopes.abs().max() > 0


@pytest.mark.parametrize(
    "options", [{"create_graph": True}, {"grad_kwargs": {"create_graph": True}}], ids=["gradient", "layer"]
)
def test_moments_of_noise_have_none(options: dict[str, Any]) -> None:
    model, inputs = smooth(), images(1, 3, 8, 8)
    method = ours.Saliency(model) if "create_graph" in options else ours.LayerGradCam(model, model[0])
    message = "pysal.captum.NoiseTunnel: create_graph must be False: moments of noisy attributions carry no graph, got True"
    with pytest.raises(NotImplementedError) as raised:
        ours.NoiseTunnel(method).attribute(inputs, target=1, **options)
    assert str(raised.value) == message


def test_a_prepared_model_has_none() -> None:
    inputs = images(1, 3, 8, 8)
    prepared = pysal.prepare(smooth(), inputs)
    with pytest.raises(ValueError, match="model must be one that autograd runs where create_graph is True"):
        ours.Saliency(prepared).attribute(inputs, target=1, create_graph=True)
