"""GoogLeNet and Inception: functional ReLU, concatenated branches, auxiliary heads. All seven methods, and prepared."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import pysal
from tests.models.networks import CLASSES, drawn

NAMES = {"googlenet": 64, "inception_v3": 128}
TARGET = [1, 3]


@pytest.fixture(scope="module", params=NAMES)
def network(request) -> nn.Module:
    """In float64, as the published weights have it: it brings images in another range to its own, and has auxiliary heads."""
    make = getattr(torchvision.models, request.param)
    return drawn(lambda: make(num_classes=CLASSES, aux_logits=True, transform_input=True, init_weights=False)).double()


@pytest.fixture
def images(network) -> Tensor:
    side = NAMES[type(network).__name__.lower().replace("inception3", "inception_v3")]
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class GuidedByHand(torch.autograd.Function):
    """Springenberg 2014, section 3: a gradient passes where the ReLU was on and where it is positive."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return gradient * (value > 0) * (gradient > 0)


@pytest.fixture
def by_hand(network, images, monkeypatch) -> Iterator[Tensor]:
    """Guided backprop with the rule written into F.relu, which is the only way these networks call it."""
    calls = 0

    def relu(value: Tensor, inplace: bool = False) -> Tensor:
        nonlocal calls
        calls += 1
        return GuidedByHand.apply(value)

    with monkeypatch.context() as patched:
        patched.setattr(F, "relu", relu)
        leaf = images.clone().requires_grad_()
        score = network(leaf)[range(2), TARGET].sum()
        (gradient,) = torch.autograd.grad(score, leaf)
    convolutions = sum(isinstance(m, nn.BatchNorm2d) for n, m in network.named_modules() if not n.lower().startswith("aux"))
    assert calls == convolutions, "a ReLU after each batch norm, the auxiliary heads' apart"
    return gradient


def test_guided_backprop_is_the_rule_by_hand(network, images, by_hand) -> None:
    found = pysal.guided_backprop(network, images, TARGET)
    plain = pysal.gradient(network, images, TARGET)
    scale = float(by_hand.abs().max())
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10 * scale)
    assert float((found - plain).abs().max()) > 1e-3 * scale


def test_prepared_guided_backprop_is_the_rule_by_hand(network, images, by_hand) -> None:
    prepared = pysal.prepare(network, images, batch_size=2)
    assert prepared.fused, prepared.report()
    scale = float(by_hand.abs().max())
    torch.testing.assert_close(pysal.guided_backprop(prepared, images, TARGET), by_hand, rtol=0, atol=1e-8 * scale)


def test_all_methods_prepared_or_not(network, images) -> None:
    """A prepared model gives what the model gives; every method applies, and Grad-CAM looks at the last concatenation."""
    options = {
        "leave_one_out": {"segments": pysal.Grid(2, 2)},
        "smooth_grad": {"samples": 2},
        "integrated_gradients": {"steps": 2},
        "blur_integrated_gradients": {"steps": 2},
    }
    prepared = pysal.prepare(network, images, batch_size=2)
    found = pysal.explain(network, images, target=TARGET, method_options=options)
    fast = pysal.explain(prepared, images, target=TARGET, method_options=options)
    assert found.skipped == fast.skipped == {}
    layers = {"GoogLeNet": "inception5b", "Inception3": "Mixed_7c"}
    for name, result in found.results.items():
        assert bool(result.map.isfinite().all())
        assert float(result.map.abs().max()) > 0 or name in ("grad_cam", "guided_grad_cam")
        # a ReLU's gate near zero may fall either way with the rounding of a folded convolution, 1e-16 of values near 1
        torch.testing.assert_close(fast[name].map, result.map, rtol=0, atol=1e-8 * max(1e-3, float(result.map.abs().max())))
        if "layer" in result.details:
            assert result.details["layer"] == fast[name].details["layer"] == layers[type(network).__name__]


def test_auxiliary_heads_take_no_part(network, images) -> None:
    expected = pysal.gradient(network, images, TARGET)
    heads = [module for name, module in network.named_modules() if name.lower() in ("aux1", "aux2", "auxlogits")]
    assert heads
    kept = [parameter.detach().clone() for head in heads for parameter in head.parameters()]
    try:
        with torch.no_grad():
            for head in heads:
                for parameter in head.parameters():
                    parameter.fill_(float("nan"))
        assert torch.equal(pysal.gradient(network, images, TARGET), expected)
    finally:
        with torch.no_grad():
            for parameter, value in zip((p for head in heads for p in head.parameters()), kept, strict=True):
                parameter.copy_(value)


def test_grad_cam_of_a_branch(network, images) -> None:
    """A branch is a layer as any other: its gradient is a slice of the concatenation's."""
    block = "inception5b" if type(network).__name__ == "GoogLeNet" else "Mixed_7c"
    branch = "branch1" if block == "inception5b" else "branch1x1"
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: kept.update({name: output})

    module = network.get_submodule(block)
    with module.register_forward_hook(keep("block")), module.get_submodule(branch).register_forward_hook(keep("branch")):
        score = network(images)[range(2), TARGET].sum()
    (gradient,) = torch.autograd.grad(score, kept["block"])
    channels = kept["branch"].shape[1]
    weights = gradient[:, :channels].mean((2, 3), keepdim=True)
    expected = (weights * kept["branch"]).sum(1, keepdim=True).clamp_min(0).detach()
    options = {"grad_cam": {"layer": f"{block}.{branch}"}}
    found = pysal.explain(network, images, TARGET, methods=["grad_cam"], method_options=options)["grad_cam"]
    torch.testing.assert_close(found.details["native"], expected, rtol=1e-9, atol=1e-12)
