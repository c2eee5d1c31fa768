"""Attributions that carry autograd's graph: their derivatives are those of a hand-written loop, and of differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysal
from pysal.engine.model.attention import SpelledOut
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.paths.quadrature import rule
from pysal.engine.running.states import restoring
from tests.methods.networks import assert_rounding, images, linear, rectified, seeded, smooth

# Of a gradient of a small network, in one chain.
ROUNDINGS = 1000


def loss(map: Tensor) -> Tensor:
    """A loss in which every number of a map counts, and that is not linear in it."""
    return (map + map.square()).sum()


def derivatives(map: Tensor, inputs: Tensor, model: nn.Module, *also: Tensor) -> list[Tensor]:
    """The loss's derivatives by the images and by the weights, those that it does not depend on as zeros."""
    return list(torch.autograd.grad(loss(map), (inputs, *also, *model.parameters()), materialize_grads=True))


def by_hand(model: Callable[[Tensor], Tensor], inputs: Tensor, target: int) -> Tensor:
    return torch.autograd.grad(model(inputs)[:, target].sum(), inputs, create_graph=True)[0]


def assert_same(found: Tensor, expected: Tensor, inputs: Tensor, model: nn.Module, *also: Tensor) -> None:
    assert_rounding(found, expected, ROUNDINGS)
    both = (derivatives(map, inputs, model, *also) for map in (found, expected))
    for ours, theirs in zip(*both, strict=True):
        assert_rounding(ours, theirs, ROUNDINGS)


class Attending(nn.Module):
    """A transformer of one block, whose attention torch runs in one piece."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = own
        self.stem, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, activation="gelu")

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.stem(inputs).flatten(2).mT
        if self.own:
            tokens = tokens + F.scaled_dot_product_attention(tokens, 3 * tokens.flip(2), tokens)
        return self.head(self.block(tokens).mean(1))


class Formula(nn.Module):
    """The same network by formulas: softmax(Q K^T / sqrt(d)) V."""

    def __init__(self, model: Attending) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value

        model, block = self.model, self.model.block
        tokens = model.stem(inputs).flatten(2).mT
        if model.own:
            tokens = tokens + attend(tokens, 3 * tokens.flip(2), tokens)
        attention = block.self_attn
        packed = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = (one.unflatten(2, (2, -1)).transpose(1, 2) for one in packed.chunk(3, 2))
        heads = attend(query, key, value).transpose(1, 2).flatten(2)
        tokens = block.norm1(tokens + attention.out_proj(heads))
        return model.head(block.norm2(tokens + block.linear2(F.gelu(block.linear1(tokens)))).mean(1))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("build", [smooth, rectified], ids=["smooth", "rectified"])
def test_gradient_is_that_of_a_hand_written_loop(build: Callable[[], nn.Module], batch_size: int | None) -> None:
    model, inputs = build(), images(3, 3, 9, 8).requires_grad_()
    found = pysal.gradient(model, inputs, 2, create_graph=True, batch_size=batch_size)
    assert_same(found, by_hand(model, inputs, 2), inputs, model)


def test_a_penalty_trains_the_weights_without_a_graph_to_the_images() -> None:
    """Right for the right reasons: the images require nothing, the weights do."""
    model, inputs = smooth(), images(2, 3, 8, 8)
    score = "log_softmax"
    expected = torch.autograd.grad(
        torch.log_softmax(model(leaf := inputs.clone().requires_grad_()), 1)[:, 1].sum(), leaf, create_graph=True
    )[0]
    found = pysal.gradient(model, inputs, 1, score=score, create_graph=True)
    loss(found).backward()
    ours = [one.grad for one in model.parameters()]
    for our, theirs in zip(ours, torch.autograd.grad(loss(expected), model.parameters(), materialize_grads=True), strict=True):
        assert_rounding(torch.zeros_like(theirs) if our is None else our, theirs, ROUNDINGS)
    assert inputs.grad is None
    assert not inputs.requires_grad


@pytest.mark.parametrize("baseline", [0.25, "mean", "blur", ["black", "mean"]], ids=str)
@pytest.mark.parametrize("placement", ["squared", "adaptive"])
def test_integrated_gradients_are_differentiable(placement: Any, baseline: Any) -> None:
    """Twice, and also by way of baselines that are made of the images."""
    model, inputs = smooth(channels=1), images(1, 1, 3, 3).requires_grad_()

    def find(inputs: Tensor, **options: Any) -> Tensor:
        return pysal.integrated_gradients(
            model, inputs, 1, steps=8 if placement == "adaptive" else 2, baseline=baseline, placement=placement, **options
        )

    assert_rounding(find(inputs, create_graph=True), find(inputs.detach()), ROUNDINGS)
    if placement == "squared":  # adaptive: places that move with the images are constants
        assert torch.autograd.gradcheck(lambda one: find(one, create_graph=True), (inputs,))
        if baseline == 0.25:
            assert torch.autograd.gradgradcheck(lambda one: find(one, create_graph=True), (inputs,))


def test_integrated_gradients_are_those_of_a_hand_written_loop() -> None:
    model, inputs, steps = smooth(), images(2, 3, 8, 8).requires_grad_(), rule("trapezoid", 4)
    points = [(node, weight, node * inputs) for node, weight in zip(steps.nodes, steps.weights, strict=True)]
    total = sum(
        weight * torch.autograd.grad(model(point)[:, 1].sum(), point, create_graph=True)[0] for node, weight, point in points
    )
    found = pysal.integrated_gradients(
        model, inputs, 1, steps=4, quadrature="trapezoid", placement="uniform", create_graph=True
    )
    assert_same(found, inputs * total, inputs, model)


def test_a_frozen_linear_model_has_a_map_that_depends_on_the_images() -> None:
    model, inputs = linear(1, 2, 2).requires_grad_(False), images(1, 1, 2, 2).requires_grad_()
    map = pysal.integrated_gradients(model, inputs, 0, steps=2, create_graph=True)
    (found,) = torch.autograd.grad(map.sum(), inputs)
    assert_rounding(found, model[1].weight[0].reshape(1, 1, 2, 2), 20)


@pytest.mark.parametrize("own", [False, True], ids=["multi-head", "own"])
def test_attention_has_second_derivatives(own: bool) -> None:
    model = seeded(lambda: Attending(own=own))
    inputs = images(2, 3, 6, 4).requires_grad_()
    found = pysal.gradient(model, inputs, 1, create_graph=True)
    assert_same(found, by_hand(Formula(model), inputs, 1), inputs, model)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "allowed": {"attn_mask": torch.tensor([[True, False, True], [False, False, False], [True, True, True]])},
    "biased": {"attn_mask": torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64).expand(3, 3)},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_spelled_out_is_torchs(name: str) -> None:
    query, key, value = (images(2, 4, 3, 5, seed=seed).requires_grad_() for seed in range(3))
    if name == "grouped":
        key, value = key[:, :2], value[:, :2]
    seen: list[Tensor] = []

    @restoring
    def spelled_out() -> Tensor:
        with SpelledOut(seen.append):
            return F.scaled_dot_product_attention(query, key, value, **ATTENTION[name])

    found, expected = spelled_out(), F.scaled_dot_product_attention(query, key, value, **ATTENTION[name])
    assert_rounding(found, expected, 100)
    for ours, theirs in zip(*(torch.autograd.grad(loss(one), (query, value)) for one in (found, expected)), strict=True):
        assert_rounding(ours, theirs, 100)
    (weights,) = seen
    assert weights.shape == (2, 4, 3, 3)
    assert_rounding(weights @ (value if name != "grouped" else value.repeat_interleave(2, 1)), expected, 100)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_what_the_caller_records_does_not_matter(around: Callable[[], Any]) -> None:
    model, inputs = smooth(), images(1, 3, 8, 8).requires_grad_()
    with around():
        found = [
            pysal.gradient(model, inputs, 1, create_graph=True),
            pysal.integrated_gradients(model, inputs, 1, steps=2, create_graph=True),
        ]
        assert not torch.is_grad_enabled()
    for map in found:
        assert all(one.isfinite().all() for one in derivatives(map, inputs, model))


def test_images_that_lead_on_take_the_graph_with_them() -> None:
    model, given = smooth(), images(2, 3, 8, 8).requires_grad_()
    found = pysal.gradient(model, given.square(), 1, create_graph=True)
    between = given.square()
    assert_same(found, torch.autograd.grad(model(between)[:, 1].sum(), between, create_graph=True)[0], given, model)


def test_further_arguments_are_in_the_graph() -> None:
    model, inputs, factor = smooth(), images(2, 3, 8, 8), images(2, 4).requires_grad_()
    found = pysal.gradient(lambda one, by: model(one) * by, inputs, 1, create_graph=True, extra_inputs=[pysal.PerImage(factor)])
    (ours,) = torch.autograd.grad(found.sum(), factor)
    expected = torch.zeros_like(factor)
    expected[:, 1] = pysal.gradient(model, inputs, 1).flatten(1).sum(1)
    assert_rounding(ours, expected, ROUNDINGS)


def test_without_it_there_is_no_graph() -> None:
    model, inputs = smooth(), images(1, 3, 8, 8).requires_grad_()
    assert not pysal.gradient(model, inputs, 1).requires_grad
    assert not pysal.integrated_gradients(model, inputs, 1, steps=2).requires_grad


def _without_second_derivative(inputs: Tensor) -> Tensor:
    return F.multilabel_margin_loss(inputs.flatten(1), torch.ones(len(inputs), 192).long(), reduction="none")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (smooth(), {"create_graph": 1}, TypeError, "create_graph must be True or False, got 1"),
        (
            smooth(),
            {"precision": "bf16"},
            ValueError,
            "precision must be 'float32' or 'tf32' where create_graph is True, got 'bf16'",
        ),
        (
            smooth().requires_grad_(False),
            {},
            NotApplicable,
            "model must have weights, or inputs, that require gradients and change the gradient, where create_graph is True, "
            "got none",
        ),
        (
            _without_second_derivative,
            {},
            NotApplicable,
            "model must be differentiable twice where create_graph is True, got an operator of torch whose derivative has "
            "none of its own",
        ),
    ],
    ids=["flag", "precision", "frozen", "cdist"],
)
def test_refused(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        pysal.gradient(model, images(1, 3, 8, 8), 0, **{"create_graph": True} | options)
    assert str(raised.value) == f"pysal.gradient: {message}"


def test_a_prepared_model_is_refused() -> None:
    inputs = images(1, 3, 8, 8)
    prepared = pysal.prepare(smooth(), inputs)
    message = (
        "pysal.gradient: model must be one that autograd runs where create_graph is True, got a prepared one, which keeps no "
        "graph: pass the model that was prepared"
    )
    with pytest.raises(NotApplicable) as raised:
        pysal.gradient(prepared, inputs, 1, create_graph=True)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.1}, "tolerance must be None where create_graph is True, got 0.1"),
        (
            {"baseline": torch.zeros(3, 8, 8, dtype=torch.float64, requires_grad=True)},
            "baseline must not require gradients: it is a constant, got a tensor that does",
        ),
    ],
    ids=["tolerance", "baseline"],
)
def test_refused_by_integrated_gradients(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        pysal.integrated_gradients(smooth(), images(1, 3, 8, 8), 1, create_graph=True, **options)
    assert str(raised.value) == f"pysal.integrated_gradients: {message}"


def test_a_checkpoint_is_run_again_for_the_second_derivative() -> None:
    model, inputs = smooth(), images(2, 3, 8, 8).requires_grad_()
    found = pysal.gradient(lambda one: checkpoint(model, one, use_reentrant=False), inputs, 1, create_graph=True)
    assert_same(found, by_hand(model, inputs, 1), inputs, model)
