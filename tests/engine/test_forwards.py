"""Passes without gradients go through ONNX Runtime where that pays and is as near, until what it knows of has changed."""

import copy
import gc
import os
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import pysal
from pysal.engine.prepared import forwards, onnx_runtime
from pysal.engine.prepared.gains import Budget, Gains
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.onnx_runtime import NotExported, Runtime, exported
from pysal.engine.prepared.payback import EXPORT_IMAGES, EXPORT_SECONDS, WORTH_EXPORTING, pays_exporting
from pysal.testing import assert_no_worse

pytest.importorskip("onnxruntime")
MANY = 10**7


class Gated(nn.Module):
    """Squeeze-and-excitation over a convolution, with a shape that its code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.gate = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.silu(self.norm(self.first(images)))
        maps = maps * self.gate(maps.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(maps.reshape(maps.shape[0], 8, -1).mean(2))


class Tokens(nn.Module):
    """Patches that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        tokens = tokens + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(nn.functional.gelu(tokens).mean(1))


def plain() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Hardswish()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def network(kind: type[nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return (plain() if kind is None else kind()).eval()


def clock(monkeypatch: pytest.MonkeyPatch, *, own: float = 0.5, runtime: float = 0.25) -> None:
    """Have the model take a second for everything, its prepared form and ONNX Runtime what is said."""
    took = {"forward": own, "gradient": 0.5, "ONNX Runtime": runtime}
    monkeypatch.setattr(Budget, "seconds", lambda self, name, way: took.get(name, 1.0))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each pass of ONNX Runtime."""
    found: list[int] = []
    call = Runtime.__call__
    monkeypatch.setattr(Runtime, "__call__", lambda self, images: found.append(len(images)) or call(self, images))  # type: ignore[func-returns-value]
    return found


def fast_network(monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, **seconds: float) -> PreparedModel:
    clock(monkeypatch, **seconds)
    return pysal.prepare(network() if model is None else model, torch.rand(1, 3, 16, 16), batch_size=3)


@pytest.mark.parametrize("kind", [None, Gated, Tokens])
def test_is_as_near_as_the_model(kind: type[nn.Module] | None) -> None:
    model, images = network(kind), torch.rand(5, 3, 16, 16)
    runtime = exported(model, [images[:1], images[:2]])
    exact = copy.deepcopy(model).double()(images.double())
    assert_no_worse(runtime(images), exact, model(images))
    assert_no_worse(runtime(images.contiguous(memory_format=torch.channels_last)[3:]), exact[3:], model(images)[3:])


def test_several_threads_export() -> None:
    images, found = torch.rand(2, 3, 16, 16), list[torch.Size]()

    def export_some() -> None:
        for _ in range(2):
            found.append(exported(network(), [images[:1], images])(images).shape)

    threads = [threading.Thread(target=export_some) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(2, 4)] * 6


def test_what_decides_by_values_is_not_exported() -> None:
    class Decides(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if len(images) == 1 else 2 * images.mean((2, 3))

    with pytest.raises(NotExported, match=r"^its output would be .* away from the model's$"):
        exported(Decides().eval(), [torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8)])


def test_an_operation_that_the_exporter_does_not_know(capfd: pytest.CaptureFixture[str]) -> None:
    """torch's exporter prints the whole graph then, and leaves its log on."""

    class Spectrum(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.fft.rfft2(images).abs().mean((2, 3))

    with pytest.raises(NotExported, match=r"^it cannot be exported \(Exporting the operator 'aten::fft_rfft2'"):
        exported(Spectrum().eval(), [torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8)])
    assert capfd.readouterr() == ("", "")
    assert not torch._C._jit_is_onnx_log_enabled()


@pytest.mark.parametrize("pools", [True, False])
def test_nan_that_maxima_would_hide(pools: bool) -> None:
    """ONNX Runtime takes the maximum of NaN for a number; what a black image divided by its norm becomes stays NaN."""

    class Divided(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            unit = images / images.flatten(1).norm(dim=1)[:, None, None, None]
            return nn.functional.max_pool2d(unit, 8).flatten(1) if pools else unit.flatten(1)

    images = [torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8)]
    if pools:
        with pytest.raises(NotExported, match=r"^it would give numbers where the model gives NaN$"):
            exported(Divided().eval(), images)
    else:
        assert exported(Divided().eval(), images)(torch.zeros(1, 3, 8, 8)).isnan().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own scripts, on the first tangent
@pytest.mark.parametrize("by_runtime", [False, True])
def test_what_torch_differentiates_itself_is_the_models(by_runtime: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tangents and transformations of torch.func pass through the original: native kernels would drop them."""
    model = network()
    fast, images, tangent = fast_network(monkeypatch, model), torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    if by_runtime:
        fast.expect_forwards(MANY)

    def dual(run: Callable[[Tensor], Tensor]) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(images, tangent))).tangent

    calls: list[Callable[[Callable[[Tensor], Tensor]], Tensor | None]] = [
        dual,
        lambda run: torch.func.jvp(run, (images,), (tangent,))[1],
        lambda run: torch.func.grad(lambda batch: run(batch).sum())(images),
        lambda run: torch.func.vmap(lambda image: run(image[None])[0])(images),
    ]
    for call in calls:
        torch.testing.assert_close(call(fast), call(model), rtol=0, atol=0)


def test_small_work_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "exported", lambda *arguments: pytest.fail("was exported"))
    fast = pysal.prepare(network(), torch.rand(1, 3, 16, 16), batch_size=3)
    pysal.leave_one_out(fast, torch.rand(1, 3, 16, 16), 1, segments=pysal.Grid(4, 4), fill="black")
    pysal.metrics.deletion(fast, torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16), 1, steps=8)
    assert "ONNX" not in fast.report()


def test_the_work_has_to_be_eight_times_the_cost() -> None:
    for seconds in (0.002, 0.1):
        least = WORTH_EXPORTING * (EXPORT_SECONDS / seconds + EXPORT_IMAGES)
        assert pays_exporting(round(1.001 * least) + 1, seconds)
        assert not pays_exporting(round(0.999 * least) - 1, seconds)


def test_work_adds_up_and_what_is_faster_is_used(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    fast = fast_network(monkeypatch)
    image, maps = torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)
    calls = {
        "leave_one_out": lambda: pysal.leave_one_out(fast, image, 1, segments=pysal.Window(12, 4), fill="black"),
        "deletion": lambda: pysal.metrics.deletion(fast, image, maps, 1, steps=8).scores,
        "infidelity": lambda: pysal.metrics.infidelity(fast, image, maps, 1, samples=8),
        "score_cam": lambda: pysal.grad_cam(fast, image, 1, layer="5", kind="score_cam"),
        "shapley": lambda: pysal.shapley(fast, image, 1, segments=pysal.Grid(2, 2), fill="black"),
    }
    before = {name: call() for name, call in calls.items()}
    assert not runs
    fast.expect_forwards(MANY)
    assert fast.report().count("gradient 2.0 times as fast as the model, forward 4.0, by ONNX Runtime") == 1
    for name, call in calls.items():
        runs.clear()
        torch.testing.assert_close(call(), before[name], rtol=1e-4, atol=1e-5)
        assert sum(runs) >= 4, name
    runs.clear()
    fast(image.clone().requires_grad_()).sum().backward()
    assert not runs


@pytest.mark.parametrize(
    ("call", "passes"),
    [
        (lambda model, x, map: pysal.rise(model, x, 1, samples=8, cells=2), 8),
        (lambda model, x, map: pysal.metrics.road(model, x, map, 1, shares=[0.3, 0.5]), 4),
        (lambda model, x, map: pysal.metrics.pic(model, x, map, 1, shares=[0.3], points=4), 3),
        (lambda model, x, map: pysal.metrics.average_drop(model, x, map, 1), 2),
        (lambda model, x, map: pysal.metrics.deletion(model, x, map, 1, steps=8), 9),
    ],
    ids=["rise", "road", "pic", "average_drop", "deletion"],
)
def test_work_is_announced(call: Callable[..., object], passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    fast = fast_network(monkeypatch)
    monkeypatch.setattr(PreparedModel, "expect_forwards", lambda self, images: told.append(images))
    call(fast, torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16))
    assert told == [passes]


def test_what_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    fast = fast_network(monkeypatch, own=0.5, runtime=0.49)
    fast.expect_forwards(MANY)
    runs.clear()
    monkeypatch.setattr(forwards, "exported", lambda *arguments: pytest.fail("was exported again"))
    fast.expect_forwards(MANY)
    with torch.no_grad():
        fast(torch.rand(2, 3, 16, 16))
    assert not runs
    assert "forward 2.0" in fast.report()
    assert "ONNX" not in fast.report()


def test_a_model_that_gains_nothing_else(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    """Its passes without gradients are by ONNX Runtime, until it is changed, which it may be."""
    model, images = network(), torch.rand(2, 3, 16, 16)
    monkeypatch.setattr(Budget, "seconds", lambda self, name, way: 0.5 if name == "ONNX Runtime" else 1.0)
    fast = pysal.prepare(model, images, batch_size=3)
    assert not fast.fused
    fast.expect_forwards(MANY)
    with torch.no_grad():
        runs.clear()
        torch.testing.assert_close(fast(images), model(images))
        assert runs == [2]
        model[-1].bias.add_(1.0)
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=0)
    assert runs == [2]


def test_weights_written_past_autograd_are_noticed_by_methods(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    """Also those of a model that runs as it is, which may change: what was exported of it has the old ones."""
    model, image = network(), torch.rand(1, 3, 16, 16)
    monkeypatch.setattr(Budget, "seconds", lambda self, name, way: 0.5 if name == "ONNX Runtime" else 1.0)
    fast = pysal.prepare(model, image, batch_size=3)
    fast.expect_forwards(MANY)
    assert not fast.fused
    model[0].weight.data.mul_(2.0)
    runs.clear()
    drops = [pysal.leave_one_out(one, image, 1, segments=pysal.Grid(2, 2), fill="black") for one in (fast, model)]
    torch.testing.assert_close(*drops, rtol=1e-4, atol=1e-5)
    assert not runs


def test_a_model_that_cannot_be_fused(monkeypatch: pytest.MonkeyPatch, runs: list[int], tmp_path: Path) -> None:
    """Its passes without gradients can be exported all the same, as long as its graph was captured."""

    class Table(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(2).softmax(2).amax(2)

    model, images = Table().eval(), torch.rand(2, 3, 16, 16)
    monkeypatch.setattr(Budget, "seconds", lambda self, name, way: 0.5 if name == "ONNX Runtime" else 1.0)
    fast = pysal.prepare(model, images, batch_size=3)
    assert fast.reason is not None
    fast.expect_forwards(MANY)
    assert {f"runs as it is: {fast.reason}", "forward 2.0 times as fast as the model, by ONNX Runtime"} <= set(
        fast.report().splitlines()
    )
    fast.save(tmp_path / "fast.json")
    for again in (fast, pysal.load_prepared(tmp_path / "fast.json", model)):
        runs.clear()
        with torch.no_grad():
            torch.testing.assert_close(again(images), model(images))
        assert sum(runs) == (2 if again is fast else 0)

    class Decides(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    fast = pysal.prepare(Decides().eval(), images, batch_size=3)
    runs.clear()
    fast.expect_forwards(MANY)
    assert not runs


def test_changed_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    fast = fast_network(monkeypatch, model)
    fast.expect_forwards(MANY)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        with pytest.raises(ValueError, match="be prepared again after its weights have changed"):
            fast(torch.rand(1, 3, 16, 16))


def test_it_steps_aside(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    fast, image = fast_network(monkeypatch), torch.rand(1, 3, 16, 16)
    fast.expect_forwards(MANY)
    runs.clear()
    with torch.no_grad():
        broken = image.clone()
        broken[0, 0, 0, 0] = torch.nan
        fast(broken)
        fast(torch.rand(1, 3, 20, 20))
        with torch.autocast("cpu", torch.bfloat16):
            fast(image)
        process = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process + 1)  # a fork
        fast(image)
        monkeypatch.undo()
    assert not runs


def test_threads_follow_torch(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    fast, image, threads = fast_network(monkeypatch), torch.rand(1, 3, 16, 16), torch.get_num_threads()
    fast.expect_forwards(MANY)
    try:
        torch.set_num_threads(threads + 1)
        runs.clear()
        with torch.no_grad():
            fast(image)
            assert not runs
            fast.expect_forwards(MANY)
            runs.clear()
            fast(image)
            assert runs == [1]
        assert fast._forwards is not None
        assert fast._forwards._runtime is not None
        assert fast._forwards._runtime._session.get_session_options().intra_op_num_threads == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"precision": "bf16"}])
def test_only_float32(monkeypatch: pytest.MonkeyPatch, runs: list[int], change: dict[str, object]) -> None:
    clock(monkeypatch)
    dtype = change.pop("dtype", torch.float32)
    fast = pysal.prepare(network().to(dtype), torch.rand(1, 3, 16, 16).to(dtype), batch_size=3, **change)  # type: ignore[call-overload,arg-type]
    fast.expect_forwards(MANY)
    assert not runs


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_network(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fast.expect_forwards(MANY)
    assert fast._forwards is not None
    assert fast._forwards.reason == "ONNX Runtime is not installed"
    with torch.no_grad():
        fast(torch.rand(1, 3, 16, 16))


def test_copies_files_and_pickles_know_it(monkeypatch: pytest.MonkeyPatch, runs: list[int], tmp_path: Path) -> None:
    model, image = network(), torch.rand(1, 3, 16, 16)
    fast = fast_network(monkeypatch, model)
    fast.expect_forwards(MANY)
    fast.save(tmp_path / "fast.json")
    with torch.no_grad():
        expected = fast(image)
        for again in (
            pysal.load_prepared(tmp_path / "fast.json", model),
            pickle.loads(pickle.dumps(fast)),
            copy.deepcopy(fast),
            copy.copy(fast),
        ):
            runs.clear()
            assert torch.equal(again(image), expected)  # from the first pass on: no process differs in its bits
            assert runs[-1] == 1
            assert "by ONNX Runtime" in again.report()


def test_processes_that_share_gains_do_not_measure(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    clock(monkeypatch)
    gains = Gains(2.0, 2.0)
    fast = pysal.prepare(network(), torch.rand(1, 3, 16, 16), batch_size=3, gains=gains)
    fast.expect_forwards(MANY)
    assert not runs
    assert fast.gains == gains


def test_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_network(monkeypatch)
    fast.expect_forwards(20)
    fast.settle(MANY)
    assert "by ONNX Runtime" in fast.report()
    other = fast_network(monkeypatch)
    other.expect_forwards(20)
    other.settle(2)
    other.expect_forwards(MANY)
    assert "by ONNX Runtime" not in other.report()


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file, no warning, no random number, no setting; and the session goes with the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fast = fast_network(monkeypatch)
    state, modes = torch.get_rng_state(), [module.training for module in fast.original.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.expect_forwards(MANY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert [module.training for module in fast.original.modules()] == modes
    assert list(tmp_path.iterdir()) == []
    assert fast._forwards is not None
    session = weakref.ref(fast._forwards._runtime)  # type: ignore[arg-type]
    fast.check_unchanged("test")
    del fast
    gc.collect()
    assert session() is None


def test_it_is_not_exported_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_network(monkeypatch)
    monkeypatch.setattr(onnx_runtime, "free_memory", lambda device, enough: 1000)
    fast.expect_forwards(MANY)
    assert fast._forwards is not None
    assert fast._forwards.reason == "there is too little memory to export it"
