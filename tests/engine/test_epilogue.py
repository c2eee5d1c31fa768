"""What follows convolutions runs in one kernel on a GPU: the prepared model is the model, in fewer kernels."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.graph.fused_convolution import WAYS, Way
from pysal.engine.prepared import prepare as preparing
from pysal.engine.prepared import trial
from pysal.engine.prepared.gains import Budget, Gains
from pysal.engine.tape.cuda_graphs import Pool
from tests.pretended import GPU, Pretended, here, pretend_gpu
from tests.test_on_a_gpu import played_again

ALWAYS = Gains(2.0, 2.0)


class Residual(nn.Module):
    """Two convolutions and a shortcut around them, as in ResNet; the ReLU before it has two readers."""

    def __init__(self, channels: int, relu: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.second(self.relu(self.norm(self.first(x)))) + x)
        return result


def network(relu: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, 2, 1, bias=False),
        nn.BatchNorm2d(10),
        relu(),
        Residual(10, relu),
        nn.Conv2d(10, 6, 2),
        Residual(6, relu),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
            module.bias.data.normal_()
    return model.eval()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A GPU that is not there; what runs on it is counted."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(Pool, "capture", played_again)
    seen: Counter[str] = Counter()
    dispatch = Pretended.__torch_dispatch__

    def counted(self: Pretended, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen[func.name().split(".")[0]] += 1
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(Pretended, "__torch_dispatch__", counted)
    with Pretended(GPU):
        yield seen


def apart(found: Tensor, expected: Tensor) -> float:
    found = here(found).double()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_the_prepared_model_is_the_model(relu: type[nn.Module], gpu: Counter[str]) -> None:
    """Also under rules, and of gradients of several classes, which share the gates of an image."""
    with torch.utils._python_dispatch._disable_current_modes():
        model, images = network(relu).double(), torch.rand(2, 3, 13, 13, dtype=torch.float64)
        expected = [pysal.gradient(model, images, 1), pysal.guided_backprop(model, images, 1)]
        expected += [pysal.class_gradients(model, images, [0, 3, 1]), pysal.grad_cam(model, images, 1)]
        output = model(images).detach()
    prepared = pysal.prepare(network(relu).to(GPU), images[:1].float().to(GPU), gains=ALWAYS, batch_size=4)
    assert "in float64" in prepared.report()
    batch = images.float().to(GPU)
    found = [pysal.gradient(prepared, batch, 1), pysal.guided_backprop(prepared, batch, 1)]
    found += [pysal.class_gradients(prepared, batch, [0, 3, 1]), pysal.grad_cam(prepared, batch, 1)]
    for one, other in zip(found, expected, strict=True):
        assert apart(one, other) < 1e-5
    with torch.no_grad():
        assert apart(prepared(batch), output) < 1e-5


def test_one_kernel_a_convolution(gpu: Counter[str]) -> None:
    """Forth no kernel for bias, shortcut, clamp and gates apart, back none for sum and gates apart."""
    images = torch.rand(1, 3, 13, 13).to(GPU)
    prepared = pysal.prepare(network().to(GPU), images, gains=ALWAYS, batch_size=1)
    assert prepared.program is not None
    gpu.clear()
    tape = prepared.program.record(images)
    convolutions = 6
    assert gpu["pysal::epilogue_"] == gpu["aten::convolution"] == convolutions
    elementwise = ("aten::add", "aten::add_", "aten::clamp", "aten::clamp_", "aten::relu", "pysal::guided_relu_gates")
    assert not [name for name in elementwise if gpu[name]]
    gpu.clear()
    tape.sweep(torch.ones_like(tape.output))
    assert gpu["aten::convolution"] == convolutions
    # the last ReLU, behind which no convolution stands, has its gates apart
    assert gpu["pysal::epilogue_backward_"] == 4
    assert gpu["pysal::guided_relu_backward_"] == 1
    # the sum around the second block, which no ReLU stands before
    assert [name for name in elementwise if gpu[name]] == ["aten::add_"]
    assert gpu["aten::add_"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, gpu: Counter[str]) -> None:
    """Sums are formed in float32 and rounded once, so the prepared model is nearer to float64 than the model itself."""
    with torch.utils._python_dispatch._disable_current_modes():
        images = torch.rand(2, 3, 13, 13).to(dtype)
        exact = network().to(dtype).double()(images.double()).detach()
        own = network().to(dtype)(images).detach()
    prepared = pysal.prepare(network().to(dtype).to(GPU), images[:1].to(GPU), gains=ALWAYS, batch_size=2)
    with torch.no_grad():
        found = prepared(images.to(GPU))
    assert "runs as it is" not in prepared.report()
    assert apart(found, exact) <= 2 * apart(own, exact) + torch.finfo(dtype).eps


def casts(gpu: Counter[str]) -> int:
    return gpu["aten::_to_copy"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_bf16_converts_at_both_ends_alone(activation: type[nn.Module], gpu: Counter[str]) -> None:
    """Weights, maps and gradients are in bf16, under the caller's and the call's autocast; what comes out is float32."""
    with torch.utils._python_dispatch._disable_current_modes():
        model, images = network(activation).double(), torch.rand(2, 3, 13, 13)
        expected = pysal.gradient(model, images.double(), 1)
        own = pysal.gradient(network(activation), images, 1, precision="bf16")
    batch = images.to(GPU)
    prepared = pysal.prepare(network(activation).to(GPU), batch[:1], precision="bf16", gains=ALWAYS, batch_size=2)
    assert "none is converted between layers" in prepared.report()
    assert prepared.program is not None
    with torch.autocast("cuda", torch.bfloat16):
        gpu.clear()
        tape = prepared.program.record(batch)
        assert casts(gpu) == 2
        gpu.clear()
        gradient, _ = tape.sweep(torch.ones_like(tape.output))
        assert casts(gpu) == 2
    assert gradient is not None
    assert tape.output.dtype == gradient.dtype == torch.float32
    found = here(pysal.gradient(prepared, batch, 1))
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1.5 * (own - expected).norm() + 2**-7 * expected.norm()
    assert here(pysal.grad_cam(prepared, batch, 1)).isfinite().all()
    assert here(pysal.integrated_gradients(prepared, batch, 1, steps=3)).isfinite().all()
    assert here(pysal.leave_one_out(prepared, batch, 1, segments=pysal.Grid(2, 2))).isfinite().all()


def test_bf16_on_a_processor_that_is_faster_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is converted either, and the gradient is that of float32."""
    monkeypatch.setattr(preparing, "least_seconds", lambda *_: {"bf16": 2.0, "float32": 1.0})
    images = torch.rand(2, 3, 13, 13)
    expected = pysal.gradient(network(), images, 1)
    prepared = pysal.prepare(network(), images[:1], precision="bf16", gains=ALWAYS, batch_size=2)
    assert "runs in float32: in bf16 it would be slower on this processor" in prepared.report()
    assert (pysal.gradient(prepared, images, 1) - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        torch.testing.assert_close(prepared(images), network()(images), rtol=1e-5, atol=1e-5)


class Converting(nn.Module):
    """A model whose code wants float32."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x).mean((2, 3)).float())
        return result


def test_a_model_that_wants_float32_keeps_autocast(gpu: Counter[str]) -> None:
    torch.manual_seed(0)
    batch = torch.rand(1, 3, 9, 9).to(GPU)
    prepared = pysal.prepare(Converting().eval().to(GPU), batch, precision="bf16", gains=ALWAYS, batch_size=2)
    assert "bf16 by autocast, layer by layer: " in prepared.report()


class Clock(Budget):
    """Says of each way that it took as long as a test wants, and of all else a second, and runs it."""

    times: ClassVar[dict[str, float]] = {}

    def seconds(self, name: str, way: Callable[[], object]) -> float:
        way()
        return self.times.get(name, 1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(preparing, "Budget", Clock)
    monkeypatch.setattr(trial, "GPU_CHUNKS", (4,))
    monkeypatch.setattr(Clock, "times", {"model's gradient": 3.0, "model's forward": 3.0})
    return Clock.times


def with_relu(input: Tensor, weight: Tensor, *more: Any) -> Tensor:
    return nn.functional.conv2d(input, weight, *more).relu()


def with_shortcut(input: Tensor, weight: Tensor, shortcut: Tensor, alpha: float, *more: Any) -> Tensor:
    return (nn.functional.conv2d(input, weight, *more) + alpha * shortcut).relu()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_fastest_way_is_taken(
    way: Way, gpu: Counter[str], clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right, the report says by how much it is faster, and a copy takes it without measuring."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", with_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", with_shortcut)
    with torch.utils._python_dispatch._disable_current_modes():
        images = torch.rand(2, 3, 13, 13)
        expected = pysal.gradient(network(), images, 1)
    clock.update(dict.fromkeys((one.name for one in WAYS), 1.0) | {way.name: 0.5})
    batch = images.to(GPU)
    prepared = pysal.prepare(network().to(GPU), batch[:1], batch_size=2)
    assert prepared.way == way
    assert f"convolutions: {way.name}, which is fastest; 2.00 times the time" in prepared.report()
    assert prepared.gains is not None
    assert prepared.gains.way == way.name
    again = pysal.prepare(network().to(GPU), batch[:1], batch_size=2, gains=prepared.gains)
    assert again.way == way
    assert prepared.channels_last == way.channels_last
    for one in (prepared, again):
        assert apart(pysal.gradient(one, batch, 1), expected.double()) < 1e-5
        with torch.no_grad():
            assert here(one(batch)).shape == (2, 5)
    gpu.clear()
    assert prepared.program is not None
    order = torch.channels_last if way.channels_last else torch.contiguous_format
    tape = prepared.program.record(batch.contiguous(memory_format=order))
    tape.sweep(torch.ones_like(tape.output))
    # nothing is brought into another order but images; the gradient of the mean is given a place, phases are joined
    assert gpu["aten::clone"] <= 2 + way.phases


def test_a_way_that_is_wrong_or_does_not_run_is_not_taken(
    gpu: Counter[str], clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it is."""
    fast = WAYS[3]
    clock.update({fast.name: 0.1})

    def refuses(*_: Any) -> Tensor:
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    batch = torch.rand(1, 3, 13, 13).to(GPU)
    for wrong, said in (
        (refuses, f"{fast.name} does not run"),
        (lambda *more: 2 * with_relu(*more), f"{fast.name} would be"),
    ):
        monkeypatch.setattr(torch, "cudnn_convolution_relu", wrong)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", with_shortcut)
        prepared = pysal.prepare(network().to(GPU), batch, batch_size=2)
        assert prepared.way == WAYS[0]
        assert said in prepared.report()
        assert prepared.fused


def test_a_way_without_a_lead_is_not_taken(gpu: Counter[str], clock: dict[str, float]) -> None:
    """Nor one that has nothing to run: no phases where the first convolution has none, cuDNN's ReLU for none with a bound."""
    clock.update({WAYS[0].name: 1.0, WAYS[1].name: 0.99})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 121, 5)).eval()
    batch = torch.rand(1, 3, 13, 13).to(GPU)
    prepared = pysal.prepare(model.to(GPU), batch, batch_size=2)
    assert prepared.way == WAYS[0]
    assert "by phases" not in prepared.report()
    assert "cuDNN" not in prepared.report()
