"""What a report says of a model that runs as it is: words of its user's world, and nothing of the tracer's anywhere else."""

import copy
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.graph.fold import trace
from pysal.engine.graph.fused_attention import FusedAttention
from pysal.engine.prepared import prepare as preparing
from pysal.engine.prepared.exactness import reason_of, why_whole
from pysal.engine.prepared.gains import Gains

# Of torch.fx, torch.export, Python's interpreter and this package's own graphs.
INNER_WORDS = ("proxy", "symbolic", "traced variable", "fx", "node", "0-d", "len()", "graphmodule", "fake", "symint", "getitem")


class Net(nn.Module):
    """A convolution and a linear layer, with something between them."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.register_buffer("position", torch.randn(1, 8, 3, 3))
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 4)."""
        return self.linear(self.between(self, self.convolution(images)).mean((2, 3)))


def coupled(_: Net, maps: Tensor) -> Tensor:
    return maps * (maps.mean() * torch.tensor(2.0))


def decides(_: Net, maps: Tensor) -> Tensor:
    return maps if maps.sum() > 0 else -maps


def in_numpy(_: Net, maps: Tensor) -> Tensor:
    return maps * float(maps.detach().numpy().max())


def listed(_: Net, maps: Tensor) -> Tensor:
    return maps + torch.tensor(maps.shape[0] * [maps.flatten()[0].item()]).view(-1, 1, 1, 1)


def resized(net: Net, maps: Tensor) -> Tensor:
    return F.relu(maps + F.interpolate(net.position, size=maps.shape[2:], mode="bilinear"))


KINDS = [coupled, decides, in_numpy, listed, resized]


def net(between: Callable[[Net, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return Net(between).eval()


@pytest.mark.parametrize("between", KINDS, ids=lambda one: one.__name__)
def test_reports_are_in_the_users_words(
    between: Callable[[Net, Tensor], Tensor], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        prepared = pysal.prepare(net(between), torch.rand(2, 3, 12, 12), batch_size=2)
    report = prepared.report().lower()
    assert not [word for word in INNER_WORDS if word in report.split("(")[0]], report
    assert capfd.readouterr() == ("", "")
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_number_of_a_whole_batch() -> None:
    report = pysal.prepare(net(coupled), torch.rand(1, 3, 12, 12), batch_size=2).report()
    assert (
        report.splitlines()[0]
        == "runs as it is: it makes one number of a whole batch, by which its images depend on each other"
    )


def test_a_constant_resized_to_the_map_is_captured() -> None:
    model = net(resized)
    prepared = pysal.prepare(model, torch.rand(1, 3, 12, 12), batch_size=2)
    assert prepared.comparison is not None
    assert prepared.comparison.way == "torch.export"


@pytest.mark.parametrize("stage", ["fold_graph", "lower", "Program", "measure_gains"])
def test_whatever_stage_fails(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, stage, len)  # which takes no such arguments, and says so in its own words
    report = pysal.prepare(net(resized), torch.rand(1, 3, 12, 12), batch_size=2).report()
    assert report.splitlines()[0] == "runs as it is: a part of it cannot be prepared"


def test_errors_that_nobody_foresaw() -> None:
    assert reason_of(MemoryError()) == "there is too little memory to prepare it"
    assert reason_of(KeyError("add_3")) == "a part of it cannot be prepared"
    assert why_whole(AttributeError("'Proxy' object")) == "a layer of it cannot run on a part of an image"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_with_a_bias_of_another_dtype(dtype: torch.dtype) -> None:
    bias = torch.zeros(1, 1, 20, 20).masked_fill_(torch.ones(20, 20, dtype=torch.bool).triu_(1), -torch.inf)
    query, key, value = torch.randn(3, 2, 2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = FusedAttention(0.25, bias)(query, key, value)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=0.25)
    spelt_out = torch.softmax(query @ key.mT * 0.25 + bias.to(dtype), -1) @ value
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * float(exact.abs().max())
    assert (found.double() - exact).abs().max() <= 2 * (spelt_out.double() - exact).abs().max() + 4 * rounding


def zeroed(_: Net, maps: Tensor) -> Tensor:
    maps = F.silu(maps)
    maps[:, 0].mul_(3)
    maps[:, 1:3].zero_()
    return maps


def activated(_: Net, maps: Tensor) -> Tensor:
    maps = maps + 1
    F.silu(maps[:, :4], True)
    maps.transpose(1, 2)[:, 3:].add_(2)
    return maps


@pytest.mark.parametrize("between", [zeroed, activated], ids=lambda one: one.__name__)
def test_what_is_written_through_a_view_is_in_the_graph(between: Callable[[Net, Tensor], Tensor]) -> None:
    model, images = net(between), torch.rand(2, 3, 12, 12)
    graph, _ = trace(model)
    assert torch.equal(graph(images), model(images))


def indexed(_: Net, maps: Tensor) -> Tensor:
    maps = F.silu(maps)
    maps[:, 0] = 0.5
    maps[:, 3:5] = maps[:, 5:7] * 2
    return maps


def in_rows(_: Net, maps: Tensor) -> Tensor:
    before = maps[:, 1]
    maps.view(len(maps), -1).add_(6)
    for channel in range(4):
        maps[:, channel] += maps[:, channel + 1]
    return maps + before[:, None]


def in_chunks(_: Net, maps: Tensor) -> Tensor:
    maps = maps * 1
    maps.narrow(1, 2, 3).add_(1).mul_(2)
    return maps.sigmoid()


@pytest.mark.parametrize("between", [zeroed, activated, indexed, in_rows, in_chunks], ids=lambda one: one.__name__)
def test_what_is_written_through_a_view_is_prepared(between: Callable[[Net, Tensor], Tensor]) -> None:
    model, images = net(between), torch.rand(1, 3, 12, 12)
    prepared = pysal.prepare(model, images, batch_size=2, gains=Gains(2.0, 2.0, 2.0))
    assert prepared.program is not None, prepared.report()
    found, expected = (torch.autograd.functional.jacobian(each, images) for each in (prepared, model))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (prepared(images) - model(images)).abs().max() <= 1e-5 * model(images).abs().max()


class Written(nn.Module):
    """A layer that writes into a part of the map it returns, which is what it was given or a copy."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        maps = maps.clone() if self.copies else maps
        maps[:, :4] += maps[:, 4:]
        maps[:, 2:, ::2].mul_(-2)
        return maps


@pytest.mark.parametrize("copies", [True, False], ids=["copy", "same tensor"])
def test_a_layer_returns_its_map_as_it_is_after_the_writes(copies: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), Written(copies)]
        tail = [nn.Conv2d(8, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        model, images = nn.Sequential(*head, *tail).eval(), torch.rand(2, 3, 9, 13)
    prepared = pysal.prepare(model, images[:1], batch_size=2, gains=Gains(2.0, 2.0, 2.0))
    assert prepared.program is not None, prepared.report()
    exact = copy.deepcopy(model).double()
    activation = exact[:3](images.double()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(exact[3:](activation)[:, 1].sum(), activation)
    expected = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).relu().detach()
    assert expected.amax((1, 2, 3)).min() > 0
    found = pysal.grad_cam(prepared, images, 1, layer="2")
    assert (found - expected).norm() <= 1e-5 * expected.norm()
