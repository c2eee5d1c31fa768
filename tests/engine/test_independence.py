"""A model whose rows depend on each other is refused, or run on whole batches as its user would run it."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal import ops
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from tests.methods.calls import Watched, row_by_row
from tests.methods.networks import images, seeded

B = 5
TARGET = torch.tensor([0, 1, 2, 0, 1])


class Coupled(nn.Module):
    """Features of each image, and what a coupling makes of a batch of them."""

    def __init__(self, coupling: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 6, 3), nn.LSTM(6, 6), nn.Linear(6, 3)
        self.register_buffer("each", torch.rand(B, 6))
        self.coupling = coupling

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.coupling(self, torch.relu(self.conv(batch)).mean((2, 3))))  # type: ignore[call-arg, arg-type]


COUPLINGS: dict[str, Callable[[Coupled, Tensor], Tensor]] = {
    "batch statistics": lambda model, x: F.batch_norm(x, None, None, training=True) if len(x) > 1 else x,
    "attention over the batch": lambda model, x: torch.softmax(x @ x.T, 1) @ x,
    "time first": lambda model, x: model.mix(x[:, None])[0][:, 0],
    "time first, backwards": lambda model, x: model.mix(x.flip(0)[:, None])[0][:, 0].flip(0),
    "softmax over the batch": lambda model, x: x * torch.softmax(x, 0),
    "divided by the largest": lambda model, x: x / x.amax(),
    "divided by the number": lambda model, x: x / len(x),
    "its place": lambda model, x: x + torch.arange(len(x), dtype=x.dtype)[:, None] / 10,
    "another order": lambda model, x: x.roll(1, 0),
    "a fixed number of rows": lambda model, x: x + model.each,
}
REFUSALS = {"checked": f"batch_size={B}, the whole batch in every pass", "one": "batch_size=1, one row in a pass"}


def coupled(kind: str) -> nn.Module:
    return seeded(lambda: Coupled(COUPLINGS[kind]))


def gradient_by_hand(model: nn.Module, batch: Tensor) -> Tensor:
    leaf = batch.detach().requires_grad_()
    return torch.autograd.grad(model(leaf).gather(1, TARGET[: len(batch), None]).sum(), leaf)[0]


def path_by_hand(model: nn.Module, batch: Tensor) -> Tensor:
    places = [(k + 0.5) / 6 for k in range(6)]
    return batch * torch.stack([gradient_by_hand(model, place * batch) for place in places]).mean(0)


def noise_by_hand(model: nn.Module, batch: Tensor) -> Tensor:
    rows = torch.arange(len(batch))
    scales = 0.15 * (batch.flatten(1).amax(1) - batch.flatten(1).amin(1))
    copies = [ops.gaussian_noise(batch, scales, 0, rows, rows, torch.full_like(rows, k)) for k in range(3)]
    return torch.stack([gradient_by_hand(model, copy) for copy in copies]).mean(0)


def drops_by_hand(model: nn.Module, batch: Tensor) -> Tensor:
    def score(images: Tensor) -> Tensor:
        found: Tensor = model(images).gather(1, TARGET[: len(images), None])[:, 0].detach()
        return found

    found = torch.zeros(len(batch), 1, *batch.shape[2:], dtype=batch.dtype)
    for row in range(2):
        for column in range(2):
            box = (slice(None), slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            without = batch.clone()
            without[box] = 0
            found[box] = (score(batch) - score(without))[:, None, None, None]
    return found


METHODS: dict[str, tuple[Callable[..., Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {
    "integrated_gradients": (
        lambda *args, **options: pysal.integrated_gradients(*args, steps=6, placement="uniform", **options),
        path_by_hand,
    ),
    "smooth_grad": (lambda *args, **options: pysal.smooth_grad(*args, samples=3, **options), noise_by_hand),
    "leave_one_out": (
        lambda *args, **options: pysal.leave_one_out(*args, score="logit", segments=pysal.Grid(2, 2), **options),
        drops_by_hand,
    ),
}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1000 * torch.finfo(expected.dtype).eps * expected.abs().max())


def refusal(where: str, way_out: str) -> str:
    sentence = f"pysal.{where}: model must answer for each row of a pass as if it were alone unless it is called with {way_out}"
    return re.escape(f"{sentence}, got ")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", COUPLINGS)
def test_a_coupled_model_is_refused_or_run_on_whole_batches(kind: str, method: str) -> None:
    (call, by_hand), model, batch = METHODS[method], coupled(kind), images(B, 3, 8, 8)
    for options in ({}, {"batch_size": 2}, {"batch_size": 3}, {"batch_size": 2 * B}):
        with pytest.raises(ValueError, match=refusal(method, REFUSALS["checked"])):
            call(model, batch, TARGET, **options)
    assert close(call(model, batch, TARGET, batch_size=B), by_hand(model, batch))
    if kind != "a fixed number of rows":
        with pytest.raises(ValueError, match=refusal(method, REFUSALS["one"])):
            call(model, batch[:1], TARGET[:1])
        assert close(call(model, batch[:1], TARGET[:1], batch_size=1), by_hand(model, batch[:1]))


@pytest.mark.parametrize("kind", COUPLINGS)
def test_a_single_pass_of_the_whole_batch_is_what_its_user_runs(kind: str) -> None:
    model, batch = coupled(kind), images(B, 3, 8, 8)
    expected = gradient_by_hand(model, batch)
    for options in ({}, {"batch_size": B}, {"batch_size": 100}):
        assert close(pysal.gradient(model, batch, TARGET, **options), expected)
        several = pysal.class_gradients(model, batch, TARGET[:, None], **options)
        assert close(several[:, 0], expected)
    for size in (1, 2, 4) if kind != "a fixed number of rows" else (2, 4):
        with pytest.raises(ValueError, match=refusal("gradient", REFUSALS["checked"])):
            pysal.gradient(model, batch, TARGET, batch_size=size)


def test_neighbours_on_a_path_are_no_company() -> None:
    """Two steps of a path are nearly the same image: each other's statistics are nearly their own."""
    model, batch = coupled("batch statistics"), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match=re.escape("as if it were alone")):
        pysal.blur_integrated_gradients(model, batch, 1, steps=200, max_sigma=0.01, batch_size=3)


def test_the_whole_batch_refines_no_image_further_than_alone() -> None:
    model, batch = row_by_row(), images(4, 3, 8, 8)
    options = {"tolerance": 0.02, "max_steps": 129, "baseline": ["black", "mean"]}
    whole = pysal.integrated_gradients(model, batch, 1, batch_size=4, **options)
    assert close(whole, pysal.integrated_gradients(model, batch, 1, batch_size=1, **options))


@pytest.mark.parametrize("method", ["guided_grad_cam", "gradient"])
def test_an_error_that_does_not_come_again_is_said_in_its_own_words(method: str) -> None:
    """Looking for its reason must not count as a run of the layer that the failed pass captured."""
    passes: list[int] = []

    def before(batch: Tensor) -> None:
        passes.extend([1] * (len(batch) == 1 and torch.is_grad_enabled()))
        if sum(passes) == 2 and torch.is_grad_enabled():
            raise ArithmeticError("once")

    call = {"layer": "model.second"} if method == "guided_grad_cam" else {}
    with pytest.raises(ArithmeticError, match=r"^once$"):
        getattr(pysal, method)(Watched(row_by_row(), before), images(3, 3, 8, 8), 1, batch_size=1, **call)


@pytest.mark.parametrize("kind", [RuntimeError, RecursionError, ValueError, AssertionError, KeyError, StopIteration])
@pytest.mark.parametrize("method", [*METHODS, "gradient", "grad_cam", "explain"])
@pytest.mark.parametrize("count", [1, B])
def test_the_models_own_error_in_any_pass_reaches_the_caller(count: int, method: str, kind: type[Exception]) -> None:
    """Also in the passes that look whether rows depend on each other: failing once is no dependence."""
    batch, number = images(count, 3, 8, 8), 0
    passes = [0]
    call = METHODS[method][0] if method in METHODS else getattr(pysal, method)
    own = kind("once")

    def before(_batch: Tensor) -> None:
        passes[0] += 1
        if passes[0] == number:
            raise own

    for number in range(1, 6):
        passes[0] = 0
        model = Watched(row_by_row(), before)  # a new one, of which nothing is remembered
        caught: Exception | None = None
        try:
            call(model, batch, 1)
        except Exception as error:
            caught = error
        assert caught is (own if passes[0] >= number else None)


def test_chance_is_called_by_its_name() -> None:
    model = seeded(lambda: Coupled(lambda model, x: F.dropout(x, 0.5, training=bool(len(x)))))  # type: ignore[arg-type, call-arg, misc]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="must answer the same to the same input in every call, got"):
            pysal.integrated_gradients(model, images(2, 3, 8, 8), 1, steps=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 60])
def test_rounding_is_no_coupling(dtype: torch.dtype, depth: int) -> None:
    """Also where the score is a small difference of large numbers, and where a network has an autocast of its own."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(depth)])

        def forward(self, batch: Tensor) -> Tensor:
            x = batch.flatten(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=batch.dtype == torch.float32 and depth == 60):
                for layer in self.layers:
                    x = torch.relu(layer(x)) + x
            return (1e3 * x.float() - 1e3 * x.float().flip(1)).cumsum(1)[:, -1:]

    model = seeded(Deep).to(dtype)
    found = pysal.integrated_gradients(model, images(3, 1, 8, 8).to(dtype), 0, steps=40)
    assert found.shape == (3, 1, 8, 8)


def test_what_was_found_out_is_remembered_while_the_model_stays_as_it_is() -> None:
    passes: list[int] = []
    model, batch = Watched(row_by_row(), lambda batch: passes.append(len(batch))), images(4, 3, 8, 8)
    pysal.gradient(model, batch, 1, batch_size=3)
    assert passes == [3, 2, 1, 1, 1]
    for change in (lambda: None, lambda: model.model.relu.register_buffer("new", torch.zeros(1))):
        change()
        passes.clear()
        pysal.gradient(model, batch, 1, batch_size=3)
        assert passes == ([3, 1] if not hasattr(model.model.relu, "new") else [3, 2, 1, 1, 1])
    passes.clear()
    pysal.gradient(model, images(4, 3, 8, 8)[:3], 1)  # all that there is, in one pass
    assert passes == [3]
    passes.clear()
    pysal.integrated_gradients(model, batch, 1, steps=50, batch_size=50)  # looked at again: it costs next to nothing
    assert passes == [50, 2, 1, 1, 50, 50, 50]


def test_a_model_that_becomes_coupled_is_noticed() -> None:
    model, batch = Coupled(lambda model, x: x).double().eval(), images(B, 3, 8, 8)  # type: ignore[arg-type, misc, call-arg]
    pysal.gradient(model, batch, TARGET, batch_size=2)
    model.coupling = COUPLINGS["attention over the batch"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=refusal("gradient", REFUSALS["checked"])):
        pysal.gradient(model, batch, TARGET, batch_size=2)


def test_a_whole_batch_that_does_not_fit_is_divided_only_where_rows_are_independent() -> None:
    def fail(batch: Tensor) -> None:
        if len(batch) > 3:
            raise MemoryError("too much")

    batch = images(B, 3, 8, 8)
    model = Watched(row_by_row(), fail)
    call = METHODS["integrated_gradients"][0]
    assert close(call(model, batch, 1, batch_size=B), call(row_by_row(), batch, 1))
    with pytest.raises(
        RuntimeError, match="the 5 images of a model whose rows depend on each other must fit into memory together"
    ):
        call(Watched(coupled("attention over the batch"), fail), batch, TARGET, batch_size=B)


@pytest.mark.parametrize("kind", ["batch statistics", "attention over the batch"])
def test_prepared_models(kind: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 3)
            self.norm = nn.BatchNorm2d(6, track_running_stats=False)

        def forward(self, batch: Tensor) -> Tensor:
            x = self.conv(batch)
            x = torch.relu(self.second(torch.relu(self.norm(x) if kind == "batch statistics" else x))).mean((2, 3))
            return self.head(x if kind == "batch statistics" else torch.softmax(x @ x.T, 1) @ x)

    model, batch = seeded(Network), images(B, 3, 8, 8)
    fast = pysal.prepare(model, batch[:1], batch_size=4)
    assert fast.fused
    for method, (call, by_hand) in METHODS.items():
        with pytest.raises(ValueError, match=refusal(method, REFUSALS["checked"])):
            call(fast, batch, TARGET)
        expected = by_hand(model, batch)
        assert float((call(fast, batch, TARGET, batch_size=B) - expected).abs().max() / expected.abs().max()) < 1e-9


def test_a_plan_of_images_that_must_stand_alone_takes_no_batch_for_its_own() -> None:
    model, batch = coupled("batch statistics"), images(B, 3, 8, 8)
    for size in (None, B):
        plan = Plan("pysal.audit", model, batch, 1, Running("logit", (), size, "float32", None), company="apart")
        with pytest.raises(ValueError, match=re.escape("must answer for each row of a pass as if it were alone, got ")):
            plan.clean()


@pytest.mark.parametrize("count", [1, 4, 5, 9])
@pytest.mark.parametrize("classes", [1, 4])
def test_squeezed_outputs(count: int, classes: int) -> None:
    full = row_by_row(classes=classes)

    class Squeezed(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return full(batch).squeeze()

    model, batch, target = Squeezed().eval(), images(count, 3, 8, 8), classes - 1
    for call in (pysal.gradient, METHODS["integrated_gradients"][0], METHODS["leave_one_out"][0]):
        for size in (None, 1, 4):
            assert torch.equal(call(model, batch, target, batch_size=size), call(full, batch, target, batch_size=size))
    picked = pysal.gradient(model, batch, lambda scores: scores if classes == 1 else scores[:, target], batch_size=4)
    assert torch.equal(picked, pysal.gradient(full, batch, target, batch_size=4))
    assert math.prod(pysal.class_gradients(model, batch, [0], batch_size=4).shape) == count * 192


DRAWING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: torch.dropout(x, 0.5, train=True),
    "dropout of channels": lambda x: torch.nn.functional.dropout2d(x, 0.5, training=True),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "an order": lambda x: x[..., torch.randperm(x.shape[-1])],
}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("method", ["gradient", "leave_one_out", "grad_cam", "integrated_gradients"])
@pytest.mark.parametrize("name", DRAWING)
def test_chance_is_seen_in_a_pass_of_the_whole_batch(name: str, method: str, batch_size: int | None) -> None:
    """And for one image, which is a batch: that numbers were drawn is seen without another pass."""
    conv, draw = nn.Conv2d(3, 40, 3), DRAWING[name]

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return (10 * draw(self.conv(x)).square().mean(2) * torch.arange(18.0)).mean(2)

    for batch in (images(2, 3, 6, 20).float(), images(1, 3, 6, 20).float()):
        size = None if batch_size is None else len(batch)
        with pytest.raises(ValueError, match=r"model must answer the same to the same input in every call, got answers that"):
            getattr(pysal, method)(Drawing().eval(), batch, 1, batch_size=size)


class Changing(nn.Module):
    """What it kept of its passes is a part of its answers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.kind = nn.Linear(48, 3), kind
        self.register_buffer("kept", torch.zeros(48))

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.kind == "a running mean":
            self.kept = 0.9 * self.kept + 0.1 * flat.detach().mean(0)
        elif self.kind == "in place":
            self.kept.lerp_(flat.detach()[0], 0.1)
        else:
            self.kept += 1
        return 30 * self.head(flat + self.kept / 10)


@pytest.mark.parametrize("kind", ["a running mean", "in place", "a count"])
def test_a_model_that_changes_between_whole_batches_is_refused(kind: str) -> None:
    batch = images(2, 3, 4, 4)
    for method in (pysal.leave_one_out, pysal.integrated_gradients, pysal.smooth_grad):
        with pytest.raises(ValueError, match="model must answer the same to the same input in every call, got answers that"):
            method(Changing(kind).double().eval(), batch, 1, batch_size=2)  # type: ignore[operator]


def test_random_numbers_that_do_not_matter() -> None:
    """Some models draw whether to skip a layer in every pass, and skip it in training alone."""
    weight, batch = torch.rand(3, 3, dtype=torch.float64), images(2, 3, 4, 4)

    def model(x: Tensor) -> Tensor:
        torch.rand(())
        return x.sum((2, 3)) @ weight

    found = pysal.gradient(model, batch, 1)
    torch.testing.assert_close(found, weight[:, 1].view(1, 3, 1, 1).expand_as(batch))


def test_a_square_output_may_be_transposed() -> None:
    """As many images as classes: that shape alone does not say which dimension is which."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    with pytest.raises(ValueError, match=r"^pysal\.gradient: model must answer for each row of a pass as if it were alone"):
        pysal.gradient(lambda x: net(x).T, images(3, 3, 4, 4), 1)
    found = pysal.gradient(net, images(3, 3, 4, 4), 1)
    assert torch.equal(found, net[1].weight.detach()[1].view(1, 3, 4, 4).expand_as(found))
