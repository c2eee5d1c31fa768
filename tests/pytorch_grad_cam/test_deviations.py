"""Where grad-cam 1.5.7 and the face differ, each held against a formula written out. A row of docs/migrating.md for each."""

from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
import torch.nn.functional as F
from pytorch_grad_cam.metrics.perturbation_confidence import RemoveMostRelevantFirst as TheirRemoval
from pytorch_grad_cam.metrics.road import NoisyLinearImputer as TheirImputer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget as TheirTarget
from torch import Tensor, nn

import pysal.pytorch_grad_cam as ours
from pysal.pytorch_grad_cam.metrics.perturbation_confidence import RemoveMostRelevantFirst
from pysal.pytorch_grad_cam.metrics.road import NoisyLinearImputer
from pysal.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tests.pytorch_grad_cam.networks import ResNet, pictures, seeded


def scaled(maps: Tensor, size: int = 32) -> np.ndarray:
    """Maps (B, h, w), without what is negative, of the image's size and in [0, 1]."""
    large = F.interpolate(maps.clamp_min(0)[:, None], (size, size), mode="bilinear")[:, 0]
    least, most = large.amin((1, 2), True), large.amax((1, 2), True)
    return ((large - least) / (most - least)).detach().numpy()


def run(
    library: Any, name: str, net: nn.Module, layer: nn.Module, images: Tensor, target: Any = 1, **options: Any
) -> np.ndarray:
    words = TheirTarget if library is peer else ClassifierOutputTarget
    return getattr(library, name)(net, [layer], **options)(images, [words(target)] * len(images))


def pooled(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Nine channels, their means, five scores."""
    layers = [nn.Conv2d(3, 9, 3, 4, 1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)]
    return nn.Sequential(*layers)


def flat() -> nn.Sequential:
    """Nine channels of 8 x 8 cells, five scores of all of them."""
    return nn.Sequential(nn.Conv2d(3, 9, 3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 64, 5))


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


class Dense(nn.Module):
    """As torchvision's DenseNet: `features`, whose output a ReLU in place overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 9, 3, 2, 1), nn.BatchNorm2d(9))
        self.head = nn.Linear(9 * 64, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(F.relu(self.features(inputs), inplace=True).flatten(1))


def test_an_activation_that_is_overwritten_in_place() -> None:
    net, images = seeded(Dense), pictures(2)
    a = net.features(images).detach().requires_grad_()
    (g,) = torch.autograd.grad(net.head(a.relu().flatten(1))[:, 1].sum(), a)
    expected = scaled((g.mean((2, 3), True) * a).sum(1))
    assert off(run(ours, "GradCAM", net, net.features[-1], images), expected) < 1e-5
    assert off(run(peer, "GradCAM", net, net.features[-1], images), expected) > 0.1


def test_grad_cam_plus_plus_of_ordinary_gradients() -> None:
    # a mean over 8 x 8 cells and weights of about 0.1: gradients of about 1e-3, whose squares are the peer's 1e-6
    net, images = seeded(pooled, 1), pictures(2)
    a, v = net[:2](images).detach(), net[4].weight[1].detach() / 64
    weights = (v.clamp_min(0) / (2 + a.sum((2, 3)) * v)) * 64
    expected = scaled((weights[:, :, None, None] * a).sum(1))
    assert off(run(ours, "GradCAMPlusPlus", net, net[1], images), expected) < 1e-5
    theirs = run(peer, "GradCAMPlusPlus", net, net[1], images)
    assert off(theirs, expected) > 0.05
    assert off(run(ours, "GradCAMPlusPlus", net, net[1], images, exact_peer=True), theirs) < 1e-5


def test_grad_cam_plus_plus_of_a_score_in_other_units() -> None:
    # Its weights are those of exp(score): another unit is another score. But the peer's constant makes Grad-CAM's limit
    # unreachable: for the smallest scores alpha is 1/2 everywhere, and the map Grad-CAM's of positive gradients
    net, images = seeded(ResNet, 1e-6), pictures(2)
    a = _activation(net, images)
    (g,) = torch.autograd.grad(net.fc(a.mean((2, 3)))[:, 1].sum(), a)
    expected = scaled((g.clamp_min(0).sum((2, 3), True) * a.detach()).sum(1))
    assert off(run(ours, "GradCAMPlusPlus", net, net.layer2, images), expected) < 1e-4
    assert off(run(peer, "GradCAMPlusPlus", net, net.layer2, images), expected) > 0.02


def _activation(net: Any, images: Tensor) -> Tensor:
    return net.layer2(net.layer1(net.stem(images).relu())).detach().requires_grad_()


@pytest.mark.parametrize("name", ["EigenCAM", "EigenGradCAM"])
def test_the_sign_of_a_singular_vector(name: str) -> None:
    # the same network, its channels in another order: the picture is the same, or its negative
    net, images = seeded(flat), pictures(6)
    maps: dict[Any, list[np.ndarray]] = {peer: [], ours: []}
    for shift in range(6):
        order = (torch.arange(9) + shift) % 9
        turned = seeded(flat)
        turned[0].weight.data, turned[0].bias.data = net[0].weight.data[order], net[0].bias.data[order]
        turned[3].weight.data = net[3].weight.data.unflatten(1, (9, 64))[:, order].flatten(1)
        turned[3].bias.data = net[3].bias.data
        torch.testing.assert_close(turned(images), net(images))
        for library, found in maps.items():
            found.append(run(library, name, turned, turned[1], images))
    assert max(off(one, maps[ours][0]) for one in maps[ours]) < 1e-5
    assert max(off(one, maps[peer][0]) for one in maps[peer]) > 0.5


def test_ablation_of_a_negative_score() -> None:
    # a channel without which the score falls speaks for it, wherever the score is
    net, images = seeded(pooled), pictures(1)
    net[4].bias.data -= 10_000
    a, v = net[:2](images).detach(), net[4].weight[1].detach()
    drops = v * a.mean((2, 3))
    expected = scaled((drops[:, :, None, None] * a).sum(1))
    against = scaled((-drops[:, :, None, None] * a).sum(1))
    assert off(run(ours, "AblationCAM", net, net[1], images), expected) < 1e-5
    assert off(run(peer, "AblationCAM", net, net[1], images), against) < 1e-3


def test_ablation_of_a_layer_without_a_relu() -> None:
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, 4, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5))
    )
    images = pictures(1)
    net[4].bias.data += 10_000
    a, v = net[:2](images).detach(), net[4].weight[1].detach()
    expected = scaled(((v * a.mean((2, 3)))[:, :, None, None] * a).sum(1))
    assert off(run(ours, "AblationCAM", net, net[1], images), expected) < 1e-5
    assert off(run(peer, "AblationCAM", net, net[1], images), expected) > 0.1


def test_a_module_that_runs_twice() -> None:
    # what it is asked for is the block's output: its last run
    net, images = seeded(ResNet), pictures(2)
    expected = run(ours, "GradCAM", net, net.layer2, images)
    assert off(run(ours, "GradCAM", net, net.layer2.relu, images), expected) == 0
    assert off(run(peer, "GradCAM", net, net.layer2.relu, images), expected) > 0.1


def test_maps_of_small_numbers() -> None:
    images = pictures(2)
    small, large = seeded(ResNet, 1e-13), seeded(ResNet, 1)
    expected = run(ours, "HiResCAM", large, large.layer2, images)
    assert off(run(ours, "HiResCAM", small, small.layer2, images), expected) < 1e-5
    assert float(run(peer, "HiResCAM", small, small.layer2, images).max()) < 0.5


def test_fewer_targets_than_images() -> None:
    net, images = seeded(ResNet), pictures(3)
    silent = peer.GradCAM(net, [net.layer2])(images, [TheirTarget(1)])
    assert float(silent[1:].max()) == 0
    with pytest.raises(ValueError, match=r"GradCAM: targets must be one for each of 3 images, got 1$"):
        ours.GradCAM(net, [net.layer2])(images, [ClassifierOutputTarget(1)])


def test_the_class_of_augmented_copies() -> None:
    # red on the left speaks for class 0, green on the right for class 1, which only the image times 1.1 is taken for
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    net[0].weight.data = torch.eye(2, 3)[:, :, None, None]
    net[4].weight.data, net[4].bias.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.52, 0.0])
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0, :, :4], images[:, 1, :, 4:] = 1, 1
    assert [int(net(images * factor).argmax()) for factor in (0.9, 1.0, 1.1)] == [0, 0, 1]
    found, theirs = (library.GradCAM(net, [net[1]])(images, None, aug_smooth=True) for library in (ours, peer))
    assert off(found[:, :, :4], np.ones((1, 8, 4))) < 1e-6
    assert off(found[:, :, 4:], np.zeros((1, 8, 4))) == 0
    assert off(theirs[:, :, 4:], np.full((1, 8, 4), 1 / 3)) < 1e-6


def test_outputs_after_augmented_copies() -> None:
    net, images = seeded(ResNet), pictures(2)
    found, theirs = (library.GradCAM(net, [net.layer2]) for library in (ours, peer))
    for cam in (found, theirs):
        cam(images, None, aug_smooth=True)
    torch.testing.assert_close(found.outputs, net(images).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.outputs, net(images.flip(3) * 1.1), rtol=0, atol=1e-2)


def test_functional_relus_under_the_guided_rule() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(inputs)).mean((2, 3)))

    net, images = seeded(Functional), pictures(1)
    hidden = net.conv(images).detach().requires_grad_()
    leaf = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(net.head(hidden.mean((2, 3)))[0, 1], hidden)
    (expected,) = torch.autograd.grad(net.conv(leaf), leaf, g.clamp_min(0) * (hidden > 0))
    wanted = expected[0].permute(1, 2, 0).numpy()
    assert off(ours.GuidedBackpropReLUModel(net)(images, 1), wanted) < 1e-12 * np.abs(wanted).max() + 1e-12
    assert off(peer.GuidedBackpropReLUModel(net)(images.clone(), 1), wanted) > 0.1 * np.abs(wanted).max()


def test_otsu_removes_what_is_relevant() -> None:
    image, mask = torch.rand(1, 6, 6), torch.zeros(6, 6)
    mask[:2] = 0.9
    keep: list[Tensor] = []
    for removal in (RemoveMostRelevantFirst, TheirRemoval):
        removal("auto", lambda image, kept: keep.append(kept) or image)(image, mask)
    assert torch.equal(keep[0] != 0, mask == 0)
    assert torch.equal(keep[1] != 0, mask != 0)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_the_weights_of_neighbours_are_those_that_are_given() -> None:
    image, mask = torch.rand(1, 3, 3), torch.ones(3, 3)
    mask[1, 1] = 0
    above = [((-1, 0), 1.0)]
    assert float(NoisyLinearImputer(0, above)(image, mask)[0, 1, 1]) == pytest.approx(float(image[0, 0, 1]), abs=1e-7)
    assert float(TheirImputer(0, above)(image, mask)[0, 1, 1]) != pytest.approx(float(image[0, 0, 1]), abs=1e-3)


def test_an_index_error_is_not_swallowed() -> None:
    net = seeded(ResNet)
    with peer.GradCAM(net, [net.layer2]):
        raise IndexError("mine")
    with pytest.raises(IndexError, match="mine"), ours.GradCAM(net, [net.layer2]):
        raise IndexError("mine")


def test_a_call_after_the_with_block() -> None:
    net, images = seeded(ResNet), pictures(1)
    with ours.GradCAM(net, [net.layer2]) as cam:
        found = cam(images)
    assert off(cam(images), found) == 0
    with peer.GradCAM(net, [net.layer2]) as theirs:
        pass
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        theirs(images, None)


def state(net: nn.Module) -> Any:
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in net.modules()]
    grads = [parameter.grad is None for parameter in net.parameters()]
    return [module.training for module in net.modules()], hooks, grads, [type(module) for module in net.modules()]


@pytest.mark.parametrize(
    "name", ["GradCAM", "HiResCAM", "ScoreCAM", "AblationCAM", "FullGrad", "ShapleyCAM", "EigenCAM", "RefineCAM"]
)
def test_the_model_is_given_back(name: str) -> None:
    net, images = seeded(ResNet).train(), pictures(2)
    net.layer1.eval()
    before = state(net)
    cam = getattr(ours, name)(net, [net.layer2])
    assert state(net) == before
    found = cam(images, [ClassifierOutputTarget(1)] * 2)
    assert state(net) == before
    assert not images.requires_grad
    assert off(found, getattr(ours, name)(net.eval(), [net.layer2])(images, [ClassifierOutputTarget(1)] * 2)) == 0
    theirs = seeded(ResNet).train()
    held = getattr(peer, name)(theirs, [theirs.layer2])
    held(images, [TheirTarget(1)] * 2)
    assert state(theirs) != before, "the peer's own is changed"


def test_the_model_is_given_back_after_an_error() -> None:
    net = seeded(ResNet).train()
    before = state(net)

    def fails(output: Tensor) -> Tensor:
        raise KeyError("mine")

    for name in ("GradCAM", "ScoreCAM", "AblationCAM", "FullGrad"):
        with pytest.raises(KeyError, match="mine"):
            getattr(ours, name)(net, [net.layer2])(pictures(1), [fails])
        assert state(net) == before


LAYERS = "GradCAM: target_layers must be a list of modules"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda net: ours.GradCAM(net, net.layer2),
            TypeError,
            "GradCAM: target_layers must be a list of modules, got Residual",
        ),
        (lambda net: ours.GradCAM(net, ["layer2"]), TypeError, "GradCAM: target_layers must be a list of modules, got list"),
        (lambda net: ours.GradCAM(len, []), TypeError, "GradCAM: model must be an nn.Module, got builtin_function_or_method"),
        (
            lambda net: ours.GradCAM(net, [nn.ReLU()])(pictures(1), None),
            ValueError,
            "GradCAM: layer must belong to the model, got ReLU",
        ),
        (
            lambda net: ours.GradCAM(net, [])(pictures(1), None),
            ValueError,
            "GradCAM: layer must name at least one layer, got none",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1), ClassifierOutputTarget(1)),
            TypeError,
            "GradCAM: targets must be None or a list of callables, got ClassifierOutputTarget",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1), [3]),
            TypeError,
            "GradCAM: targets must be None or a list of callables, got list",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1), [ClassifierOutputTarget(7)]),
            ValueError,
            "GradCAM: target must be below the model's 7 classes, got 7",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1), [lambda output: output]),
            ValueError,
            "GradCAM: targets must return one number for each image, got shape (7,)",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1), [lambda output: 3.0]),
            TypeError,
            "GradCAM: targets must return tensors, got float",
        ),
        (
            lambda net: ours.GradCAM(net, [net.layer2])(pictures(1)[0], None),
            ValueError,
            "GradCAM: inputs must be a batch of images (B, C, H, W), got shape (3, 32, 32)",
        ),
        (
            lambda net: ours.AblationCAM(net, [net.layer2], ratio_channels_to_ablate=0.5),
            NotImplementedError,
            "AblationCAM: ratio_channels_to_ablate must be 1.0, got 0.5",
        ),
        (
            lambda net: ours.KPCA_CAM(net, [net.layer2], kernel=""),
            ValueError,
            "KPCA_CAM: kernel must be one of 'linear', 'cosine', 'sigmoid', 'rbf', 'poly', got ''",
        ),
        (
            lambda net: ours.FullGrad(nn.Sequential(nn.Flatten(), nn.Linear(3072, 7)).double().eval())(pictures(1), None),
            ValueError,
            "FullGrad: model must have convolutions or batch norms with a bias, got none",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call(seeded(ResNet))
    assert str(raised.value) == f"pysal.pytorch_grad_cam.{message}"


def test_base_cam_draws_nothing_by_itself() -> None:
    net = seeded(ResNet)
    with pytest.raises(NotImplementedError, match="get_cam_weights must be implemented by subclass"):
        ours.BaseCAM(net, [net.layer2])(pictures(1), None)
