"""Only what computes the model's function and gradient is used in its place; every other model runs as it is, and says why."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.graph.distance import distance
from pysal.engine.prepared import exactness


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -0.3 * grads[0]


class StraightThrough(torch.autograd.Function):
    """The sign, whose gradient is let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * (ctx.saved_tensors[0].abs() < 1)


apply_kept = Reversed.apply  # torch.fx cannot see what is behind it


class Net(nn.Module):
    """A convolution, a branch that `function` makes of its map, and a head of both."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.filter = nn.Parameter(torch.randn(4, 12, 7, dtype=torch.complex64))
        self.place = nn.Parameter(torch.randn(1, 4, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.head((0.1 * self.function(self, y) + y).mean((2, 3)))


def without_gradient(net: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(net.b(y))
    return gate * y


def without_gradient_in_parts(net: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = net.b(y)
        with torch.enable_grad():
            z = torch.relu(z + y)
    return z * y


def inference(net: Net, y: Tensor) -> Tensor:
    with torch.inference_mode():
        z = torch.relu(net.b(y))
    return y * z.clone()


def switched_off(net: Net, y: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = torch.relu(net.b(y) + y)
    torch.set_grad_enabled(before)
    return y * z


def part_changed_in_place(net: Net, y: Tensor) -> Tensor:
    z = net.b(y)
    z[:, 0].mul_(0.5)
    z[:, 1:3].relu_()
    return z


def scaled_without_gradient(net: Net, y: Tensor) -> Tensor:
    z = net.b(y)
    with torch.no_grad():
        z.mul_(3.0)
    return z


def image_changed(net: Net, y: Tensor) -> Tensor:
    z = net.b(y)
    z += y
    return F.relu(z, inplace=True) * y


FUNCTIONS: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    # a spectrum is complex, its filter too, and comes back
    "Fourier": (lambda net, y: torch.fft.irfft2(torch.fft.rfft2(y) * net.filter, s=(12, 12)), True),
    "Fourier, size of the spectrum": (
        lambda net, y: torch.fft.fft2(y).abs() + torch.view_as_real(torch.fft.fft2(y))[..., 1],
        True,
    ),
    "complex sums": (lambda net, y: (torch.complex(y, y * 2) + torch.complex(y * y, y)).imag * y, True),
    "detach": (lambda net, y: y * net.b(y).detach(), True),
    "no_grad": (without_gradient, True),
    "no_grad, and gradients again inside": (without_gradient_in_parts, True),
    "inference_mode": (inference, True),
    "set_grad_enabled": (switched_off, True),
    "gradient reversal": (lambda net, y: Reversed.apply(net.b(y)), True),
    "straight-through": (lambda net, y: StraightThrough.apply(net.b(y)) * y, True),
    "gradient reversal, unseen": (lambda net, y: apply_kept(net.b(y)), False),
    "straight-through by detach": (lambda net, y: y + (torch.round(y) - y).detach(), True),
    "a part changed in place": (part_changed_in_place, False),
    "changed in place without gradient": (scaled_without_gradient, False),
    "a sum in place": (image_changed, True),
    "one tensor for all images": (lambda net, y: torch.relu(net.b(y) + net.place), True),
    "a mean over the batch": (lambda net, y: net.b(y) - net.b(y).mean(0, keepdim=True), True),
    "chance": (lambda net, y: F.dropout(net.b(y), 0.5, training=True), False),
}


def exact_gradient(model: nn.Module, x: Tensor) -> Tensor:
    wide = nn.Module._apply(
        copy.deepcopy(model), lambda t: t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t
    )
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(wide(leaf.clone())[:, 1].sum(), leaf)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_models(name: str) -> None:
    function, prepared = FUNCTIONS[name]
    torch.manual_seed(0)
    model, x = Net(function).eval(), torch.rand(3, 3, 12, 12)
    fast = pysal.prepare(model, x[:1], batch_size=2)
    assert fast.fused == prepared, fast.report()
    if name == "chance":
        return
    # float32 rounds to 1e-7 in each of some ten steps; the images are not those that were compared
    expected = exact_gradient(model, x)
    if name == "a mean over the batch":  # whose images belong together
        fast.rows = 3
    assert distance(pysal.gradient(fast, x, 1), expected) <= 1e-5
    with torch.no_grad():
        assert distance(fast(x), model(x)) <= 1e-5


def test_a_graph_with_another_gradient_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(lambda net, y: net.b(y)).eval(), torch.rand(1, 3, 12, 12)

    class Wrong(exactness.Program):
        def record(self, images: Tensor, layers: Any = ()) -> Any:
            tape = super().record(images, layers)
            sweep = tape.sweep
            tape.sweep = lambda *args, **kwargs: (sweep(*args, **kwargs)[0] * 1.0001, {})  # type: ignore[method-assign]
            return tape

    monkeypatch.setattr(exactness, "Program", Wrong)
    report = pysal.prepare(model, x, batch_size=1).report()
    assert report.startswith("runs as it is: the fused graph's gradient would be 1.0e-04 away from it in float64")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_low_precision_is_prepared_and_no_worse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval().to(dtype)
    x = torch.rand(2, 3, 16, 16).to(dtype)
    fast = pysal.prepare(model, x, batch_size=2)
    assert fast.fused, fast.report()
    exact = exact_gradient(model, x)
    rounding = distance(pysal.gradient(model, x, 1), exact)
    assert distance(pysal.gradient(fast, x, 1), exact) <= 2 * rounding + 4 * torch.finfo(dtype).eps


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (
        lambda y: (y, y),
        "its output is not one tensor, but of class tuple; a module that returns its scores alone can be prepared",
    ),
    "dict": (
        lambda y: {"logits": y},
        "its output is not one tensor, but of class dict; a module that returns its scores alone can be prepared",
    ),
    "classes": (lambda y: y.argmax(1), "its output is not a tensor of floating-point numbers with a row for each image"),
    "a number": (lambda y: y.sum(), "its output is not a tensor of floating-point numbers with a row for each image"),
}


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Conv2d(3, 5, 3), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.layer(x).mean((2, 3)))


@pytest.mark.parametrize("name", OUTPUTS)
def test_other_outputs_run_as_they_are(name: str) -> None:
    answer, reason = OUTPUTS[name]
    model, x = Answering(answer).eval(), torch.rand(2, 3, 8, 8)
    fast = pysal.prepare(model, x, batch_size=1)
    assert fast.report().splitlines()[0] == f"runs as it is: {reason}"
    assert type(fast(x)) is type(model(x))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head).eval()


def sparse(model: nn.Sequential) -> nn.Sequential:
    model[5].weight = nn.Parameter(model[5].weight.detach().to_sparse(), requires_grad=False)
    return model


def made_in_inference_mode() -> nn.Sequential:
    with torch.inference_mode():
        return small()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sparse": (lambda: sparse(small()), "its tensor '5.weight' is of layout sparse_coo"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()).eval(),
        "its tensor '0.weight' is not initialised yet: run the model once",
    ),
    "inference mode": (made_in_inference_mode, "its tensor '0.weight' is made in inference mode"),
    "too large for the example": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 40)).eval(),
        "it does not run on a batch of 1 like the example (Calculated",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_model_makes_preparing_fail(name: str) -> None:
    make, reason = MODELS[name]
    model = make()
    fast = pysal.prepare(model, torch.rand(1, 3, 12, 12), batch_size=1)
    line = fast.report().splitlines()[0]
    assert line.startswith(f"runs as it is: {reason}")
    assert not fast.fused
    fast.check_unchanged("test")


def test_an_example_that_the_model_cannot_take_is_refused() -> None:
    example = torch.rand(1, 3, 12, 12)
    with pytest.raises(TypeError, match=r"^pysal\.prepare: example must have the model's dtype float64, got float32$"):
        pysal.prepare(small().double(), example)
    with pytest.raises(
        ValueError, match=r"^pysal\.prepare: model must have weights with values, got weights on the meta device$"
    ):
        pysal.prepare(small().to("meta"), example)


def test_images_unlike_the_example_run_the_original() -> None:
    model, x = small(), torch.rand(2, 3, 12, 12)
    fast = pysal.prepare(model, x, batch_size=2)
    assert fast.program_for(x) is not None
    for other in (x.double(), x[:, :, :10], x.to("meta"), x[:0], [x]):
        assert fast.program_for(other) is None  # type: ignore[arg-type]
    model.double()
    again = pysal.prepare(model, x.double(), batch_size=2)
    assert again.fused
    assert torch.equal(again(x[:, :, :10].double()), model(x[:, :, :10].double()))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
    "deepcopy of a holder": lambda fast: copy.deepcopy({"held": fast})["held"],
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_copy_is_prepared(name: str, fused: bool) -> None:
    model, x = small(), torch.rand(2, 3, 12, 12)
    if not fused:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval()
    fast = pysal.prepare(model, x, batch_size=2)
    twin = COPIES[name](fast)
    assert (twin.fused, twin.rows, twin.precision) == (fused, 2, "float32")
    expected = pysal.gradient(fast, x, 1)
    assert torch.equal(pysal.gradient(twin, x, 1), expected)
    if name != "copy":
        with torch.no_grad():
            model[-1].weight.mul_(2)
        assert torch.equal(pysal.gradient(twin, x, 1), expected)  # its weights are its own


def test_saved_by_torch(tmp_path: Any) -> None:
    fast, x = pysal.prepare(small(), torch.rand(1, 3, 12, 12), batch_size=1), torch.rand(1, 3, 12, 12)
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    assert torch.equal(loaded(x), fast(x))


def test_attributes_that_nobody_has() -> None:
    fast = pysal.prepare(small(), torch.rand(1, 3, 12, 12), batch_size=1)
    assert fast.get_submodule("0") is fast.original[0]
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fast.nothing_of_the_kind  # noqa: B018
    with pytest.raises(AttributeError, match="original"):
        object.__new__(pysal.PreparedModel).original  # noqa: B018


def test_preparing_draws_no_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pysal.prepare(Net(FUNCTIONS["chance"][0]).eval(), torch.rand(1, 3, 12, 12, generator=torch.Generator()), batch_size=1)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


class Elsewhere(nn.Module):
    """A network during whose pass another thread runs another network."""

    def __init__(self, elsewhere: Callable[[], None]) -> None:
        super().__init__()
        self.layer, self.elsewhere = nn.Conv2d(3, 4, 3), elsewhere

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=self.elsewhere)
        thread.start()
        thread.join()
        return self.layer(x).relu().mean((2, 3))


def test_other_threads_run_models_meanwhile() -> None:
    other, x = small(), torch.rand(1, 3, 12, 12)
    found: list[Tensor] = []
    fast = pysal.prepare(Elsewhere(lambda: found.append(other(x).detach())).eval(), x, batch_size=1)
    assert fast.fused, fast.report()
    assert len(found) > 3
    assert all(torch.equal(one, other(x)) for one in found)
