"""Which parts of a model in training mode matter, and which flags mean nothing."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.model.training import training_part
from tests.methods.calls import Watched
from tests.methods.networks import seeded


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


class Around(nn.Module):
    """A container that says nothing about modes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> "Around":  # says so itself, but not in a pass
        super().train(mode)
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


class Reader(Around):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.inner(images), 0.5, self.training)


def hidden_in_a_helper(module: nn.Module, scores: Tensor) -> Tensor:
    return F.dropout(scores, 0.5, module.training)


class ThroughAHelper(Around):
    def forward(self, images: Tensor) -> Tensor:
        return hidden_in_a_helper(self, self.inner(images))


class ReadsAnothers(Around):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.inner(images), 0.5, self.inner.training)


class ByName(Around):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.inner(images), 0.5, getattr(self, "training"))  # noqa: B009


def exported() -> nn.Module:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(network(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: batch},)).module()


def _set(module: nn.Module) -> nn.Module:
    outer = nn.Sequential(module)
    outer.training = False
    return outer


@pytest.mark.parametrize(
    "model",
    [
        nn.DataParallel(network()),
        nn.Sequential(nn.Identity(), network()),
        Around(network()),
        nn.Sequential(nn.Dropout(0.0), network()),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3),
        nn.LSTM(4, 4),
        nn.GRU(4, 4, num_layers=2),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(8, 2, dropout=0.0),
        nn.ModuleList([nn.Conv2d(3, 4, 3), nn.LayerNorm(3), nn.Softmax(1)]),
        exported(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_flag_that_means_nothing_is_passed_over(model: nn.Module) -> None:
    assert any(module.training for module in model.modules())
    assert training_part(model) is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(network(), nn.Dropout(0.1)), "1"),
        (nn.Sequential(network().eval(), nn.BatchNorm1d(5)), "1"),
        (nn.InstanceNorm2d(3, track_running_stats=True), ""),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.5), ""),
        (nn.MultiheadAttention(4, 2, dropout=0.1), ""),
        (nn.TransformerEncoderLayer(8, 2), "self_attn"),
        (nn.RReLU(), ""),
        (Reader(network()), ""),
        (ThroughAHelper(network()), ""),
        (ByName(network()), ""),
        (Around(Around(Reader(network()))), "inner.inner"),
        (nn.Sequential(network(), _set(nn.Dropout())), "1.0"),
    ],
)
def test_a_flag_that_counts_is_found(model: nn.Module, name: str) -> None:
    found = training_part(model)
    assert found is not None
    assert found[0] == name
    assert training_part(model.eval()) is None


def test_a_container_may_read_the_flags_of_what_it_holds() -> None:
    model = ReadsAnothers(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    model.training = False
    assert model.inner.training
    found = training_part(model)
    assert found is not None
    assert found[0] == "inner"


def test_a_flag_that_means_nothing_changes_no_map() -> None:
    model = seeded(network)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    around = Around(model)
    assert around.training
    for call in (pysal.gradient, pysal.guided_backprop, pysal.integrated_gradients):
        assert torch.equal(call(around, images, 1), call(copy.deepcopy(model), images, 1))
    with pytest.raises(ValueError, match=re.escape("got Reader in training mode: call model.eval() first")):
        pysal.gradient(Reader(model), images, 1)


class AsCudnn(nn.Module):
    """Differentiates as cuDNN's RNNs do in eval mode: not at all, while cuDNN is on."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            return images.square().mean((2, 3))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")

    def forward(self, images: Tensor) -> Tensor:
        if torch.backends.cudnn.enabled:
            found: Tensor = self.Function.apply(images)  # type: ignore[no-untyped-call]
            return found
        return images.square().mean((2, 3))


@pytest.mark.parametrize(
    "call",
    [pysal.gradient, lambda model, images, target: pysal.class_gradients(model, images, [target])[:, 0]],
    ids=["gradient", "class_gradients"],
)
def test_rnns_of_cudnn_are_differentiated_without_it(call: Callable[..., Tensor]) -> None:
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(images)
    expected[:, 1] = 2 * images[:, 1] / 16
    before = torch.backends.cudnn.enabled
    found = call(AsCudnn().eval(), images, 1)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert torch.backends.cudnn.enabled is before
    passes: list[bool] = []
    watched = Watched(AsCudnn(), lambda batch: passes.append(torch.backends.cudnn.enabled))
    pysal.integrated_gradients(watched, images, 1, steps=6, batch_size=2)
    assert passes.count(True) == 1  # it is asked once
