"""What arithmetic a model runs in, and that nothing of it stays switched on."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.running.precision import PRECISIONS
from tests.methods.calls import CALLS, Watched
from tests.methods.networks import images, seeded


class Convolutional(nn.Module):
    """Six ReLU layers with strides, groups, dilation, string padding and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3, padding="same", bias=False),
            nn.ReLU(),
            nn.Conv2d(24, 24, (3, 1), padding=(1, 0), padding_mode="reflect"),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(24 * 16, 32),
            nn.ReLU(),
            nn.Linear(32, 10, bias=False),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


MODEL = seeded(Convolutional).float()
INPUTS = images(3, 3, 32, 32, dtype=torch.float32)


def state() -> dict[str, Any]:
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "scripts": torch._C._get_graph_executor_optimize(),
        "functions": torch._C._len_torch_function_stack(),
    }


OUTER: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", CALLS)
def test_a_model_of_any_dtype_inside_the_caller_s_autocast(method: str, dtype: torch.dtype) -> None:
    model, inputs = copy.deepcopy(MODEL).to(dtype), INPUTS.to(dtype)
    expected = CALLS[method](model, inputs)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(CALLS[method](model, inputs), expected)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["gradient", "guided_grad_cam", "leave_one_out", "integrated_gradients"])
def test_settings_are_given_back(method: str, precision: str, outer: str) -> None:
    inside: list[dict[str, Any]] = []

    def before(batch: Tensor) -> None:
        inside.append(state())
        if len(inside) >= 2:  # and whenever it is asked again why
            raise ArithmeticError("in mid-run")

    with OUTER[outer]():
        expected = state()
        CALLS[method](MODEL, INPUTS, precision=precision)
        assert state() == expected
        with pytest.raises(ArithmeticError):
            CALLS[method](Watched(MODEL, before), INPUTS, precision=precision, batch_size=1)
        assert state() == expected
    for seen in inside:  # what the caller has switched on is not what was asked for
        assert seen["autocast"] == (precision == "bf16")
        assert precision != "bf16" or seen["autocast dtype"] == torch.bfloat16


@pytest.mark.parametrize("method", CALLS)
def test_float32_and_tf32_are_plain_float32_on_a_cpu(method: str) -> None:
    expected = CALLS[method](MODEL, INPUTS, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[method](MODEL, INPUTS, 1), expected)
    assert torch.equal(CALLS[method](MODEL, INPUTS, 1, precision="tf32"), expected)


def relu_inputs(precision: str, method: str) -> list[Tensor]:
    """What the ReLUs were given in every pass of a method, in its precision."""
    seen: list[Tensor] = []
    # copies: one of them works in place
    handles = [
        layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
        for layer in MODEL.modules()
        if isinstance(layer, nn.ReLU)
    ]
    try:
        CALLS[method](MODEL, INPUTS, 1, precision=precision)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_mixed_keeps_the_gates_and_bf16_moves_them() -> None:
    exact, mixed, low = (relu_inputs(precision, "gradient") for precision in ("float32", "mixed", "bf16"))
    assert len(exact) == len(mixed) == len(low) == 5
    assert all(torch.equal(one, other) for one, other in zip(exact, mixed, strict=True))
    assert {values.dtype for values in low} == {torch.bfloat16}
    assert any(((one > 0) != (other > 0)).any() for one, other in zip(exact, low, strict=True))


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


@pytest.mark.parametrize("method", [name for name in CALLS if name != "leave_one_out"])
def test_mixed_is_close_to_float32(method: str) -> None:
    exact = CALLS[method](MODEL, INPUTS, 0)
    mixed = CALLS[method](MODEL, INPUTS, 0, precision="mixed")
    assert mixed.dtype == torch.float32
    assert correlation(mixed, exact) > 0.999
    # METHODS: each of six layers rounds its gradient and weights to 8 bits, 2^-9 relative each, errors of random sign
    assert float((mixed - exact).norm() / exact.norm()) < 6 * 2 * 2**-8


def test_mixed_rounds_what_flows_back_and_nothing_else() -> None:
    weight = torch.tensor([[1.0, 1 + 2**-12]])  # the second is 1 in bf16

    def model(batch: Tensor) -> Tensor:
        return F.linear(batch.flatten(1), weight)

    inputs = torch.tensor([1.0, 1.0]).reshape(1, 1, 1, 2)
    assert pysal.gradient(model, inputs, 0, precision="mixed").flatten().tolist() == [1.0, 1.0]
    assert pysal.gradient(model, inputs, 0).flatten().tolist() == [1.0, 1 + 2**-12]
    seen: list[float] = []
    pysal.gradient(model, inputs, lambda out: (seen.extend(out.detach().flatten().tolist()), out[:, 0])[1], precision="mixed")
    assert 2 + 2**-12 in seen


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((4, 6, 3), {"stride": 2, "padding": 1}),
        ((4, 6, (3, 2)), {"stride": (1, 2), "padding": (0, 1), "bias": False}),
        ((4, 8, 3), {"groups": 4, "dilation": 2}),
        ((4, 6, 3), {"padding": "same"}),
        ((4, 6, 1), {"padding": "valid"}),
    ],
)  # fmt: skip
def test_mixed_backward_of_a_convolution(arguments: Any, options: dict[str, Any]) -> None:
    # weights and gradients that bf16 holds exactly: then both backward passes are sums of the same exact products
    layer = seeded(lambda: nn.Conv2d(*arguments, **options)).float()
    with torch.no_grad():
        layer.weight.copy_((4 * layer.weight).round() / 4)
    inputs = images(2, 4, 9, 8, dtype=torch.float32)

    def target(output: Tensor) -> Tensor:
        return output.sum((1, 2, 3))

    exact = pysal.gradient(layer, inputs, target)
    assert torch.equal(pysal.gradient(layer, inputs, target, precision="mixed"), exact)
    assert exact.any()


def test_functional_spellings_of_a_convolution() -> None:
    weight, bias = images(4, 3, 3, 3, dtype=torch.float32), images(1, 1, 1, 4, dtype=torch.float32).flatten()
    spellings: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.conv2d(x, weight, bias),
        lambda x: F.conv2d(x, weight, bias=bias, stride=1),
        lambda x: F.conv2d(input=x, weight=weight, bias=bias, padding=0),
    ]
    found = [pysal.gradient(lambda x, f=f: f(x).relu().sum((2, 3)), INPUTS, 1, precision="mixed") for f in spellings]
    exact = pysal.gradient(lambda x: F.conv2d(x, weight, bias).relu().sum((2, 3)), INPUTS, 1)
    for one in found:
        assert torch.equal(one, found[0])
        assert not torch.equal(one, exact)
        assert correlation(one, exact) > 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_of_other_dtypes(dtype: torch.dtype, precision: str) -> None:
    found = pysal.gradient(seeded(Convolutional).to(dtype), INPUTS.to(dtype), 1, precision=precision)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.isfinite().all()
    if dtype == torch.float64:
        assert correlation(found, pysal.gradient(MODEL, INPUTS, 1)) > 0.999
