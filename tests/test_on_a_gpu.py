"""Every call on a GPU: the same answer as on the CPU, and the host waits for the device no more often than it must.

Where there is no GPU one is pretended, which runs the CUDA kernels under emulation (tests/pretended.py); where there is one, it
is called as well.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import captum
from pysal import pytorch_grad_cam as cams
from pysal.engine.boxes.run import Run
from pysal.engine.prepared.gains import Gains
from pysal.engine.tape.cuda_graphs import Pool
from tests import every_call
from tests.every_call import FACES, WORK, layer
from tests.methods.calls import row_by_row
from tests.methods.networks import images
from tests.methods.test_attention_maps import transformer
from tests.pretended import GPU, Pretended, here, pretend_gpu, waits

PLACES = ["pretended", *(["cuda"] if torch.cuda.is_available() else [])]
CAMS = [name for name in cams.__all__ if name.endswith(("CAM", "Grad", "CAMPlusPlus", "ElementWise")) and name != "BaseCAM"]


def tall(batch: Tensor) -> Tensor:
    """The images as `transformer` takes them."""
    return batch.repeat(1, 1, 2, 2)[..., :12].contiguous()


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    **WORK,
    **FACES,
    "guided_integrated_gradients": lambda model, batch: pysal.guided_integrated_gradients(model, batch, 1, steps=4),
    "gradient with a graph": lambda model, batch: pysal.gradient(model, batch, 1, create_graph=True).detach(),
    "xrai": lambda model, batch: pysal.xrai(model, batch, 1, steps=2),
    "legrad": lambda model, batch: pysal.legrad(transformer().to(batch), tall(batch), 1),
    "gradient_attention": lambda model, batch: pysal.gradient_attention(transformer().to(batch), tall(batch), 1),
    **{
        f"pytorch_grad_cam {name}": lambda model, batch, name=name: getattr(cams, name)(model, [layer(model)])(
            input_tensor=batch
        )
        for name in CAMS
    },
}


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU to call, which for "pretended" is not there."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(Pool, "capture", played_again)
    with Pretended(GPU):
        yield GPU


def played_again(_pool: Pool, function: Callable[[], Any]) -> Any:
    """Stand for a graph: what replays runs the function again and writes into what it returned before."""
    found = function()

    def replay() -> None:
        for old, new in zip(tensors(found), tensors(function()), strict=True):
            old.data.copy_(new.data)  # as a graph writes: past autograd

    return found, replay


def tensors(found: Any) -> list[Tensor]:
    if hasattr(found, "_saved"):  # a tape
        return [
            one for one in torch.utils._pytree.tree_leaves((found._saved, found.output, found.values)) if torch.is_tensor(one)
        ]
    return [one for one in torch.utils._pytree.tree_leaves(found) if torch.is_tensor(one)]


def there(monkeypatch: pytest.MonkeyPatch, place: torch.device) -> tuple[nn.Module, Tensor]:
    """The network and the images of these tests, and what the calls take beside them, on a device."""
    monkeypatch.setattr(every_call, "MAPS", every_call.MAPS.to(place))
    monkeypatch.setattr(every_call, "MASK", every_call.MASK.to(place))
    monkeypatch.setitem(every_call.FIGURES["mass_in_mask"], "masks", (every_call.IMAGES.sum(1) > 1).to(place))
    return row_by_row().float().to(place), images(2, 3, 8, 8).float().to(place)


def seed() -> None:
    """For captum's noise and pytorch-grad-cam's random weights."""
    torch.manual_seed(0)
    np.random.seed(0)


@functools.cache
def expected_of(name: str) -> Any:
    seed()
    return CALLS[name](row_by_row().float(), images(2, 3, 8, 8).float())


def assert_same(found: Any, expected: Any) -> None:
    """Float32 on both sides, added in other orders."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (Tensor, np.ndarray)):
        found, expected = (torch.as_tensor(here(one)).detach().cpu().double() for one in (found, expected))
        assert float((found - expected).abs().max()) <= 1000 * torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_on_a_gpu(name: str, place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.utils._python_dispatch._disable_current_modes():
        expected = expected_of(name)
    model, batch = there(monkeypatch, place)
    seed()
    found = CALLS[name](model, batch)
    assert_same(found, expected)
    if isinstance(found, Tensor):
        assert found.device.type == "cuda"


# What may be divided into passes of so many rows, with eight rows or more for the two images.
CHUNKED: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "class_gradients": lambda model, batch, rows: pysal.class_gradients(model, batch, [0, 1, 2, 3], batch_size=rows),
    "gradient": lambda model, batch, rows: pysal.gradient(model, batch.repeat(4, 1, 1, 1), 1, batch_size=rows),
    "grad_cam": lambda model, batch, rows: pysal.grad_cam(model, batch.repeat(4, 1, 1, 1), 1, batch_size=rows),
    "guided_backprop": lambda model, batch, rows: pysal.guided_backprop(model, batch.repeat(4, 1, 1, 1), 1, batch_size=rows),
    "smooth_grad": lambda model, batch, rows: pysal.smooth_grad(model, batch, 1, samples=6, batch_size=rows),
    "smooth_grad of integrated_gradients": lambda model, batch, rows: pysal.smooth_grad(
        model, batch, 1, samples=3, base="integrated_gradients", method_options={"steps": 4}, batch_size=rows
    ),
    "integrated_gradients": lambda model, batch, rows: pysal.integrated_gradients(model, batch, 1, steps=8, batch_size=rows),
    "adaptive": lambda model, batch, rows: pysal.integrated_gradients(
        model, batch, 1, steps=12, placement="adaptive", batch_size=rows
    ),
    "tolerance": lambda model, batch, rows: pysal.integrated_gradients(
        model, batch, 1, tolerance=0.9, max_steps=33, batch_size=rows
    ),
    "blur": lambda model, batch, rows: pysal.blur_integrated_gradients(
        model, batch, 1, steps=4, max_sigma=2.0, batch_size=rows
    ),
    "guided": lambda model, batch, rows: pysal.guided_integrated_gradients(
        model, batch.repeat(2, 1, 1, 1), 1, steps=2, batch_size=rows
    ),
    "leave_one_out": lambda model, batch, rows: pysal.leave_one_out(
        model, batch, 1, segments=pysal.Grid(4, 4), batch_size=rows
    ),
    "windows": lambda model, batch, rows: pysal.leave_one_out(
        model, batch, 1, segments=pysal.Window(4, 2), fill="blur", batch_size=rows
    ),
    "superpixels": lambda model, batch, rows: pysal.leave_one_out(model, batch, 1, segments=pysal.Slic(9), batch_size=rows),
    "deletion": lambda model, batch, rows: pysal.metrics.deletion(model, batch, every_call.MAPS, 1, steps=9, batch_size=rows),
    "insertion": lambda model, batch, rows: pysal.metrics.insertion(model, batch, every_call.MAPS, 1, steps=9, batch_size=rows),
    "infidelity": lambda model, batch, rows: pysal.metrics.infidelity(
        model, batch, every_call.MAPS.expand_as(batch), 1, samples=9, batch_size=rows
    ),
    "max_sensitivity": lambda model, batch, rows: pysal.metrics.max_sensitivity(
        model, batch, 1, method="gradient", samples=9, batch_size=rows
    ),
    "captum's IntegratedGradients": lambda model, batch, rows: captum.IntegratedGradients(model).attribute(
        batch, target=1, n_steps=8, internal_batch_size=max(2, rows)
    ),
    "captum's NoiseTunnel": lambda model, batch, rows: captum.NoiseTunnel(captum.Saliency(model)).attribute(
        batch, target=1, nt_samples=8, nt_samples_batch_size=max(1, rows // 2)
    ),
    "captum's Occlusion": lambda model, batch, rows: captum.Occlusion(model).attribute(
        batch, (3, 2, 2), (3, 2, 2), target=1, perturbations_per_eval=max(1, rows // 2)
    ),
    "captum's FeatureAblation": lambda model, batch, rows: captum.FeatureAblation(model).attribute(
        batch, target=1, feature_mask=torch.arange(64, device=batch.device).reshape(1, 1, 8, 8) // 8,
        perturbations_per_eval=max(1, rows // 2),
    ),
}  # fmt: skip


# Most waits of a call of a model that is known, beside which its passes cost next to nothing: are the images finite, is the
# target a class, do these rows answer for the whole batch, what does the method return.
WAITS = {
    **dict.fromkeys(["gradient", "guided_backprop", "smooth_grad"], 2),
    **dict.fromkeys(["blur", "smooth_grad of integrated_gradients", "integrated_gradients", "guided", "max_sensitivity"], 4),
    **{"adaptive": 5, "class_gradients": 6, "tolerance": 7},
    **dict.fromkeys(["grad_cam", "windows", "insertion", "infidelity"], 8),
    **{"deletion": 9, "leave_one_out": 10, "superpixels": 12},
    **{"captum's NoiseTunnel": 0, "captum's Occlusion": 1, "captum's IntegratedGradients": 3, "captum's FeatureAblation": 5},
}
# Of a prepared model: some of its weights are looked at once a call, and pieces of images once for what boxes reach.
PREPARED = {
    **{"gradient": 3, "guided_backprop": 3, "smooth_grad": 3, "integrated_gradients": 5, "grad_cam": 9},
    **{"windows": 12, "superpixels": 16, "captum's Occlusion": 19},
}


@pytest.mark.parametrize("place", ["pretended"], indirect=True)
@pytest.mark.parametrize(("name", "prepared"), [*((name, False) for name in CHUNKED), *((name, True) for name in PREPARED)])
def test_no_wait_for_a_chunk(name: str, prepared: bool, place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = there(monkeypatch, place)
    asked = pysal.prepare(model, batch[:1], gains=Gains(2.0, 2.0), batch_size=4) if prepared else model
    counts = []
    for rows in (4, 1):
        for _ in range(4 if prepared else 2):  # until what is remembered of the model is known and what is replayed is recorded
            seed()
            with waits() as found:
                CHUNKED[name](asked, batch, rows)
        counts.append(found)
    assert not counts[1] - counts[0]  # four times as many chunks
    assert counts[0].total() <= (PREPARED if prepared else WAITS)[name]


@pytest.mark.parametrize("place", ["pretended"], indirect=True)
def test_superpixels_make_no_groups_that_do_not_pay_their_launch(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = there(monkeypatch, place)
    prepared = pysal.prepare(model, batch[:1], gains=Gains(2.0, 2.0))
    runs, whole = [], Run.output

    def noted(self: Run) -> Tensor:
        runs.append(len(self.patches))
        return whole(self)

    monkeypatch.setattr(Run, "output", noted)
    found = pysal.leave_one_out(prepared, batch, 1, segments=pysal.Slic(9))
    assert len(runs) <= 2  # two images; boxes of a few pixels are not worth another launch of every kernel
    with torch.utils._python_dispatch._disable_current_modes():
        on_cpu = images(2, 3, 8, 8).float()
        expected = pysal.leave_one_out(row_by_row().float(), on_cpu, 1, segments=pysal.Slic(9))
    assert_same(found, expected)


@pytest.mark.parametrize("place", ["pretended"], indirect=True)
def test_what_waits_is_seen(place: torch.device) -> None:
    x = torch.ones(3, device=place)
    for wait in (
        lambda: float(x[0]),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0], device=place),
        lambda: torch.ones(3).to(place),
        lambda: x[torch.tensor([0, 1])],
        lambda: torch.cuda.synchronize(),
    ):
        with waits() as found:
            wait()
        assert found.total() == 1
    with waits() as found:
        _ = x + 1, x.sum(), torch.arange(3, device=place), torch.ones(3).pin_memory().to(place, non_blocking=True), x[1:] * 2
        _ = x[torch.arange(2, device=place)], x * torch.tensor(2.0), torch.full((3,), 0.5, device=place)
    assert not found
    with pytest.raises(RuntimeError, match="at least two devices"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.where(torch.ones(3, dtype=torch.bool), x, 0.0)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
