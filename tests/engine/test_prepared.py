"""A prepared model computes the same function and gradient as the model it was made from, with less."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal.captum import NoiseTunnel, Saliency
from pysal.engine.graph.fold import Convolution, fold
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.prepared import prepare as preparation
from pysal.engine.prepared import trial
from pysal.engine.prepared.gains import Budget
from pysal.testing import assert_no_worse


class Norm(nn.BatchNorm2d):
    """A batch norm with statistics and weights that are not those of a new one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        nn.init.uniform_(self.weight, 0.5, 1.5)
        nn.init.normal_(self.bias)
        nn.init.normal_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2.0)


class Functional(nn.Module):
    """Runs a function around modules, so that every spelling of a graph can be written down."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleList(modules), function
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x, *self.parts).mean((2, 3)))


def conv(*args: object, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]


def inplace_addition(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    y = first(x)
    y += second(x)
    return F.relu(y)


def shortcut_seen_later(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    kept = first(x)
    kept += second(x)
    return kept * first(x)


def same_padding_by_hand(x: Tensor, first: nn.Module, norm: nn.Module) -> Tensor:
    return F.relu6(norm(F.conv2d(F.pad(x, (0, 1, 0, 1)), first.weight, first.bias, 2)))


def squeeze_and_excite(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    y = F.silu(first(x), inplace=True)
    return y * torch.sigmoid(second(y.mean((2, 3), keepdim=True)))


def split_and_shuffled(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    left, right = first(x).chunk(2, dim=1)
    both = torch.stack([left, F.relu(second(right))], 2)
    return both.flatten(1, 2)


def arithmetic_in_place(x: Tensor, first: nn.Module) -> Tensor:
    y = first(x)
    y *= 2.0
    return y.sub_(x.mean((1, 2, 3), keepdim=True)).clamp_(min=0.1)


def pooled(x: Tensor, first: nn.Module, largest: nn.Module, mean: nn.Module, second: nn.Module) -> Tensor:
    y = F.avg_pool2d(F.max_pool2d(F.relu(first(x)), 2, 1), (2, 1))
    return second(torch.cat([largest(y), mean(y).expand(-1, -1, 4, 5)], 1))


def dense_block(x: Tensor, first: nn.Module, norm: nn.Module, second: nn.Module, relu: nn.Module) -> Tensor:
    y = first(x)
    return relu(norm(torch.cat([y, second(relu(y))], 1)))


GRAPHS = {
    "squeeze and excite": lambda: Functional(squeeze_and_excite, conv(3, 6, 3), conv(6, 6, 1)),
    "split and shuffled": lambda: Functional(split_and_shuffled, conv(3, 6, 3), conv(3, 3, 1)),
    "arithmetic in place": lambda: Functional(arithmetic_in_place, conv(3, 6, 3)),
    "pooled in every way": lambda: Functional(
        pooled, conv(3, 6, 3), nn.MaxPool2d((3, 4), stride=(1, 2), padding=1), nn.AdaptiveAvgPool2d(1), conv(12, 5, 1)
    ),
    "dense block": lambda: Functional(dense_block, conv(3, 6, 3), Norm(12), conv(6, 6, 3, padding=1), nn.ReLU()),
    "dense block changed in place": lambda: Functional(
        dense_block, conv(3, 6, 3), Norm(12), conv(6, 6, 3, padding=1), nn.ReLU(inplace=True)
    ),
    "conv-norm-relu": lambda: Functional(lambda x, c, n: F.relu(n(c(x))), conv(3, 8, 3, padding=1, bias=False), Norm(8)),
    "strided": lambda: Functional(lambda x, c, n: torch.relu(n(c(x))), conv(3, 8, 3, stride=2, padding=1), Norm(8)),
    "strides that leave pixels over": lambda: Functional(lambda x, c: c(x).relu(), conv(3, 8, 2, stride=3)),
    "dilated": lambda: Functional(lambda x, c: c(x).relu(), conv(3, 8, 3, dilation=2, padding=(1, 3))),
    "padding beyond the kernel": lambda: Functional(lambda x, c: c(x).relu(), conv(3, 8, 3, padding=4)),
    "grouped": lambda: Functional(lambda x, a, c: c(a(x)).relu(), conv(3, 8, 1), conv(8, 12, 3, groups=4, padding=1)),
    "depthwise": lambda: Functional(
        lambda x, a, c: F.relu6(c(F.relu6(a(x)))), conv(3, 8, 1), conv(8, 8, 5, groups=8, stride=2)
    ),
    "same": lambda: Functional(lambda x, c: c(x).relu(), conv(3, 8, (2, 4), padding="same")),
    "same padding by hand": lambda: Functional(same_padding_by_hand, conv(3, 8, 3), Norm(8)),
    "zero pad": lambda: Functional(lambda x, p, c: c(p(x)), nn.ZeroPad2d((1, 2, 0, 3)), conv(3, 8, 3, padding=1)),
    "reflect padding": lambda: Functional(lambda x, c: c(x).relu(), conv(3, 8, 3, padding=1, padding_mode="reflect")),
    "residual": lambda: Functional(
        lambda x, a, b, n: F.relu(n(b(F.relu(a(x)))) + x), conv(3, 8, 3, padding=1), conv(8, 3, 3, padding=1), Norm(3)
    ),
    "residual, shortcut first": lambda: Functional(lambda x, a: (x + a(x)).relu(), conv(3, 3, 3, padding=1)),
    "residual without ReLU": lambda: Functional(lambda x, a, b: b(a(x) + x), conv(3, 3, 1), conv(3, 5, 3)),
    "two convolutions added": lambda: Functional(lambda x, a, b: F.relu6(a(x) + b(x)), conv(3, 5, 3), conv(3, 5, 3)),
    "broadcast addition": lambda: Functional(
        lambda x, a, b: (a(x) + b(x)).relu(), conv(3, 5, 3, padding=1), conv(3, 5, (12, 14))
    ),
    "in-place addition": lambda: Functional(inplace_addition, conv(3, 5, 3), conv(3, 5, 3)),
    "shortcut changed in place": lambda: Functional(shortcut_seen_later, conv(3, 5, 3), conv(3, 5, 3)),
    "doubled": lambda: Functional(lambda x, a: (lambda y: (y + y).relu())(a(x)), conv(3, 5, 3)),
    "used twice": lambda: Functional(lambda x, a: F.relu(a(F.relu(a(x)))), conv(3, 3, 3, padding=1)),
    "seen before and after ReLU": lambda: Functional(lambda x, a: (lambda y: y * F.relu(y))(a(x)), conv(3, 5, 3)),
    "in-place ReLU": lambda: Functional(lambda x, a, r: r(a(x)), conv(3, 5, 3), nn.ReLU(inplace=True)),
    "norm after a shared convolution": lambda: Functional(lambda x, a, n: (lambda y: y + n(y))(a(x)), conv(3, 5, 3), Norm(5)),
    "norm first": lambda: Functional(lambda x, n, a: a(n(x)).relu(), Norm(3), conv(3, 5, 3, padding=1)),
    "concatenation and pooling": lambda: Functional(
        lambda x, a, b: F.max_pool2d(torch.cat([a(x).relu(), b(x).relu()], 1), 3, 2, 1), conv(3, 5, 3), conv(3, 4, 3)
    ),
    "a map concatenated with itself": lambda: Functional(
        lambda x, a, b: torch.concat([(y := a(x)), b(y).relu(), y], axis=-3).relu(), conv(3, 5, 3), conv(5, 4, 1)
    ),
    "maps one below the other": lambda: Functional(
        lambda x, a, b: torch.cat((a(x), b(x)), dim=2), conv(3, 5, 3), conv(3, 5, (3, 3), padding=(2, 0))
    ),
    "functional norm first": lambda: Functional(
        lambda x, a, n, b: b(
            F.relu(F.batch_norm(a(x).tanh(), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps))
        ),
        conv(3, 6, 3),
        Norm(6),
        conv(6, 5, 3),
    ),
    "other activations": lambda: Functional(lambda x, a, b: F.gelu(b(F.silu(a(x)))), conv(3, 5, 3), conv(5, 4, 3)),
    "dropout": lambda: Functional(lambda x, a, d: d(a(x)).relu(), conv(3, 5, 3), nn.Dropout(0.5)),
    "saturating Hardtanh": lambda: Functional(lambda x, a, h: h(a(x)), conv(3, 5, 3), nn.Hardtanh(0.0, 0.3)),
    "functional Hardtanh": lambda: Functional(
        lambda x, a, b: F.hardtanh(b(F.hardtanh(a(x), max_val=0.4, min_val=0)), 0.0, 1.0), conv(3, 5, 3), conv(5, 4, 3)
    ),
    "thresholds": lambda: Functional(
        lambda x, a, t, b: F.threshold(b(F.threshold(t(a(x)), 0.1, 0.2)), 0, value=0.0),
        conv(3, 5, 3),
        nn.Threshold(0.0, 0.0),
        conv(5, 4, 3),
    ),
    "symmetric Hardtanh": lambda: Functional(lambda x, a, h: h(a(x)), conv(3, 5, 3), nn.Hardtanh(-0.3, 0.3)),
}
UNFUSED = {"reflect padding", "dense block changed in place"}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of the original


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        x = torch.rand(2, 3, 12, 14, dtype=torch.float64) * 2 - 1
        with torch.no_grad():
            model.eval()(x.float())
        return model.to(dtype), x.to(dtype)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]


@pytest.mark.parametrize("name", GRAPHS)
def test_same_function_and_gradient_in_float64(name: str) -> None:
    model, x = build(GRAPHS[name])
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused == (name not in UNFUSED), prepared.report()
    exact = model(x)
    # a few hundred roundings in each of at most four layers
    rounding = 1e3 * torch.finfo(torch.float64).eps
    assert (prepared(x) - exact).abs().max() <= rounding * exact.abs().max()
    expected = gradient(model, x)
    assert (gradient(prepared, x) - expected).abs().max() <= rounding * expected.abs().max()


@pytest.mark.parametrize("name", GRAPHS)
def test_float32_is_no_worse_than_torch(name: str) -> None:
    exact_model, x = build(GRAPHS[name])
    exact, exact_gradient = exact_model(x), gradient(exact_model, x)
    model, x = build(GRAPHS[name], torch.float32)
    prepared = pysal.prepare(model, x, batch_size=2)
    with torch.no_grad():
        assert_no_worse(prepared(x), exact, model(x))
    assert_no_worse(prepared(x), exact, model(x))
    assert_no_worse(gradient(prepared, x), exact_gradient, gradient(model, x))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 1, 2, 4]),
    size=st.tuples(st.integers(8, 13), st.integers(8, 13)),
    upper=st.sampled_from([None, float("inf"), 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    upper: float | None,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64)

    def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
        y = F.conv2d(F.pad(x.to(dtype), padding), weight.to(dtype), None, stride, 0, dilation, groups)
        return y if upper is None else y.clamp(0, upper)

    def cotangent(like: Tensor) -> Tensor:
        # away from the kinks a gate is the same in every precision
        gates = plain(x, torch.float64)
        safe = (gates.abs() > 1e-4) & ((gates - (upper or 0)).abs() > 1e-4)
        normal = torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (normal * safe).to(like.dtype)

    def pulled_back(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = plain(leaf, dtype)
        return y.detach(), torch.autograd.grad(y, leaf, cotangent(y))[0]

    exact, exact_gradient = pulled_back(torch.float64)
    base, base_gradient = pulled_back(dtype)
    module = FusedConvolution(Convolution(weight.to(dtype), None, stride, padding, dilation, groups), upper, (4, *size), dtype)
    got = module.run(x.to(dtype), None)
    assert_no_worse(got, exact, base)
    grad = cotangent(got) * (True if upper is None else (got > 0) & (got < upper))
    assert_no_worse(module.input_gradient(grad, x.shape), exact_gradient, base_gradient)
    for order in (torch.contiguous_format, torch.channels_last):
        onto = torch.ones(x.shape, dtype=dtype).contiguous(memory_format=order)
        added = module.input_gradient(grad, x.shape, onto)
        assert added.data_ptr() == onto.data_ptr()
        assert_no_worse(added, exact_gradient + 1, base_gradient + 1)


def network() -> nn.Module:
    return Functional(
        lambda x, a, n, b, c: F.relu(c(F.relu(n(a(x)))) + b(x)),
        conv(3, 8, 3, stride=2, padding=1),
        Norm(8),
        conv(3, 8, 1, stride=2),
        conv(8, 8, 3, padding=1),
    )


METHODS = {
    "gradient": {},
    "guided_backprop": {},
    "grad_cam": {"layer": "parts.3"},
    "guided_grad_cam": {"layer": "parts.3"},
    "integrated_gradients": {"steps": 9},
    "leave_one_out": {"segments": pysal.Grid(3, 3)},
    "blur_integrated_gradients": {"steps": 5, "max_sigma": 3.0},
    "smooth_grad": {"samples": 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_it(name: str) -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=3)
    method = getattr(pysal, name)
    expected, got = method(model, x, **METHODS[name]), method(prepared, x, **METHODS[name])
    assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_rules_of_a_fused_relu() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    for rule in ("guided", "deconvnet"):
        expected = pysal.guided_backprop(model, x, rule=rule)
        assert (pysal.guided_backprop(prepared, x, rule=rule) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (pysal.guided_backprop(prepared, x) - pysal.gradient(prepared, x)).abs().max() > 0


def test_without_relu_the_rule_is_refused() -> None:
    model, x = build(lambda: Functional(lambda x, a: a(x), conv(3, 5, 3)))
    prepared = pysal.prepare(model, x, batch_size=1)
    assert prepared.fused
    with pytest.raises(pysal.NotApplicable, match="no ReLU was met"):
        pysal.guided_backprop(prepared, x)


def saved_by_autograd(run: Callable[[Tensor], object], x: Tensor, model: nn.Module) -> int:
    """Bytes that autograd keeps in a forward pass, the model's own tensors apart."""
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run(x)
    del kept
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["conv-norm-relu", "residual", "norm first", "grouped", "concatenation and pooling"])
def test_keeps_a_quarter_of_what_autograd_keeps(name: str) -> None:
    model, x = build(GRAPHS[name], torch.float32)
    prepared = pysal.prepare(model, x, batch_size=2)
    program = prepared.program
    assert program is not None
    tape = program.record(x)
    others = saved_by_autograd(program.record, x, prepared._graph)
    assert tape.bytes > 0
    assert tape.bytes + others <= saved_by_autograd(model, x.clone().requires_grad_(), model) / 4


def test_keeps_one_bit_per_element() -> None:
    model, x = build(GRAPHS["conv-norm-relu"], torch.float32)
    program = pysal.prepare(model, x, batch_size=2).program
    assert program is not None
    assert program.record(x).bytes == 2 * 8 * 12 * 14 / 8


class Divided(nn.Module):
    """Images divided by a constant, and a convolution."""

    def __init__(self, divisor: Tensor, convolution: nn.Module, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.register_buffer("divisor", divisor)
        self.convolution = convolution
        self.function = function or (lambda y, convolution: convolution(y).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x / self.divisor, self.convolution)


def divisor(*shape: int) -> Tensor:
    return torch.linspace(-2, 3, torch.Size(shape).numel()).view(shape)


DIVIDED = {
    "a number": (lambda: Divided(torch.tensor(0.3), conv(3, 4, 3, padding=1)), True),
    "per channel": (lambda: Divided(divisor(3, 1, 1), conv(3, 4, 3, padding=1)), True),
    "per channel, four dimensions": (lambda: Divided(divisor(1, 3, 1, 1), conv(3, 4, 3, stride=2, padding=(1, 0))), True),
    "its size is asked": (lambda: Divided(divisor(3, 1, 1), conv(3, 4, 3), lambda y, c: c(y).reshape(y.size(0), -1)), True),
    "used twice": (lambda: Divided(divisor(3, 1, 1), conv(3, 4, 3), lambda y, c: torch.cat([c(y), c(y)], 1).flatten(1)), True),
    "per row": (lambda: Divided(divisor(12, 1), conv(3, 4, 3)), False),
    "per column": (lambda: Divided(divisor(14), conv(3, 4, 3)), False),
    "groups": (lambda: Divided(divisor(3, 1, 1), conv(3, 3, 3, groups=3)), False),
    "seen by another": (
        lambda: Divided(divisor(3, 1, 1), conv(3, 4, 3), lambda y, c: torch.cat([c(y).flatten(1), y.flatten(1)], 1)),
        False,
    ),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_division_by_a_constant_is_done_to_weights(name: str) -> None:
    make, done = DIVIDED[name]
    model, x = build(make)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.program is not None, prepared.report()
    assert all("truediv" not in node.name for node in prepared.program.nodes) == done
    exact, expected = model(x), gradient(model, x)
    rounding = 1e3 * torch.finfo(torch.float64).eps
    assert (prepared(x) - exact).abs().max() <= rounding * exact.abs().max()
    assert (gradient(prepared, x) - expected).abs().max() <= rounding * expected.abs().max()


class Flattened(nn.Module):
    """A map seen as rows of a matrix, as VGG and AlexNet do it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = conv(3, 4, 3), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x).relu()
        return self.head(y.view(y.size(0), -1).view(y.dtype))


def test_a_map_may_be_viewed_as_a_matrix() -> None:
    model, x = build(Flattened, torch.float32)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused, prepared.report()
    double, _ = build(Flattened)
    assert_no_worse(prepared(x), double(x.double()), model(x))


def test_changed_weights_are_refused() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    with torch.no_grad():
        model.parts[0].bias.add_(1.0)
    message = "pysal.gradient: model must be prepared again after its weights have changed, got a new value of 'parts.0.bias'"
    with pytest.raises(ValueError, match=re.escape(message)):
        pysal.gradient(prepared, x)


def test_a_new_tensor_in_the_place_of_a_weight_is_refused() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    model.parts[0].weight.data = model.parts[0].weight.data * 2
    with pytest.raises(ValueError, match=r"a new value of 'parts\.0\.weight'"):
        pysal.gradient(prepared, x)


def test_a_weight_written_past_autograd_is_refused() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    model.parts[3].weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"a new value of 'parts\.3\.weight'"):
        pysal.gradient(prepared, x)


def test_a_weight_of_nan_has_not_changed() -> None:
    model, x = build(network)
    with torch.no_grad():
        model.parts[3].weight[0, 0, 0, 0] = torch.nan
    pysal.prepare(model, x, batch_size=2).check_unchanged("test")


def test_prepared_in_inference_mode() -> None:
    model, inputs = Functional(lambda x, a: F.relu(a(x)), nn.Conv2d(3, 4, 3)).eval(), torch.rand(2, 3, 8, 8)
    model(inputs)
    with torch.inference_mode():
        prepared = pysal.prepare(model, inputs + 0.0, batch_size=2)
    assert prepared.fused
    expected = pysal.gradient(pysal.prepare(model, inputs, batch_size=2), inputs, 1)
    assert torch.equal(pysal.gradient(prepared, inputs, 1), expected)


def test_a_model_that_counts_its_passes_runs_as_it_is() -> None:
    """A graph would count no further, and the model would be another one after each pass."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("passes", torch.zeros(()))

        passes: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.conv(x).mean((2, 3))

    model, x = build(Counting)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.report().splitlines()[0] == "runs as it is: its forward pass writes its own tensor 'passes' each time"
    assert torch.equal(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1))


def test_a_model_that_fills_a_cache_once_is_prepared() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("grid", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None:
                self.grid = torch.ones(4, dtype=x.dtype)
            return self.conv(x).mean((2, 3)) * self.grid

    model, x = build(Cached)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused, prepared.report()
    torch.testing.assert_close(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1))


def test_what_cannot_be_traced_runs_as_it_is() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return y if y.sum() > 0 else -y

    model, x = build(Branching)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert not prepared.fused
    sentence = "runs as it is: its forward pass decides by values that it computes from the images (test_prepared.py, line "
    assert prepared.report().splitlines()[0].startswith(sentence)
    assert torch.equal(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1))


def test_another_size_runs_the_original() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    larger = torch.rand(1, 3, 20, 22, dtype=torch.float64)
    assert torch.equal(prepared(larger), model(larger))


def test_the_model_is_left_alone() -> None:
    model, x = build(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model(x)
    pysal.gradient(pysal.prepare(model, x, batch_size=2), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), forward)
    assert [type(module) for module in model.modules()] == [type(module) for module in build(network)[0].modules()]


def test_mixed_precision_keeps_the_gates() -> None:
    model, x = build(network, torch.float32)
    exact = pysal.gradient(model, x)
    prepared = pysal.prepare(model, x, precision="mixed", batch_size=2)
    mixed = pysal.gradient(prepared, x)
    # bf16 keeps 8 bits: each of the three convolutions on the way adds at most about 2^-8 in l2
    assert 0 < (mixed - exact).norm() <= 3 * 2**-8 * exact.norm()


@pytest.mark.parametrize("precision", ["float32", "tf32", "mixed", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_precision(name: str, precision: str) -> None:
    model, x = build(network, torch.float32)
    exact = getattr(pysal, name)(model.double(), x.double(), 1, **METHODS[name])
    prepared = pysal.prepare(model.float(), x, precision=precision, batch_size=3)
    found = getattr(pysal, name)(prepared, x, 1, **METHODS[name])
    assert found.dtype == torch.float32
    low = {"float32": torch.float32, "tf32": torch.float32}.get(precision, torch.bfloat16)
    # at most four layers, each of which rounds a few times; bf16 scores are differences of rounded numbers, and move gates
    bound = 0.5 if precision == "bf16" else 1e3 * torch.finfo(low).eps if low == torch.float32 else 4 * 2**-8
    assert (found - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize(
    ("example", "error", "sentence"),
    [
        (torch.rand(1, 3, 9, 9, dtype=torch.float64), TypeError, "have the model's dtype float32, got float64"),
        (torch.rand(1, 3, 1, 1), ValueError, "be images of more than one pixel, got shape (1, 3, 1, 1)"),
        (torch.rand(1, 3, 9, 9, device="meta"), ValueError, "be on the model's device cpu, got meta"),
    ],
    ids=["dtype", "one pixel", "device"],
)
def test_an_example_that_the_methods_would_refuse_is_refused(example: Tensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=re.escape(f"pysal.prepare: example must {sentence}")):
        pysal.prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), example)


def test_errors() -> None:
    model, x = build(network)
    with pytest.raises(TypeError, match=re.escape("pysal.prepare: model must be an nn.Module, got function")):
        pysal.prepare(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("pysal.prepare: example must have 4 dimensions, got shape (3, 12, 14)")):
        pysal.prepare(model, x[0])
    with pytest.raises(ValueError, match="precision must be one of"):
        pysal.prepare(model, x, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("must be in eval mode, got Dropout in training mode: call model.eval()")):
        pysal.prepare(nn.Dropout(), x)
    prepared = pysal.prepare(model.eval(), x, batch_size=1)
    message = "pysal.gradient: precision must be that of the prepared model, 'float32', got 'bf16'"
    with pytest.raises(ValueError, match=re.escape(message)):
        pysal.gradient(prepared, x, precision="bf16")


def test_fold_leaves_no_batch_norm_behind_a_convolution() -> None:
    model, _ = build(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fold(model).modules())


def test_the_graph_is_compared_in_float32_and_its_passes_are_timed_in_their_own_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[tuple[str, bool]] = []
    mode = preparation.precision_mode

    def watched(precision: Any, device: torch.device, *, backward: bool) -> Any:
        entered.append((precision, backward))
        return mode(precision, device, backward=backward)

    for module in (preparation, trial):
        monkeypatch.setattr(module, "precision_mode", watched)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # TF32's like on a CPU: what the caller has on is not compared in
        fast = pysal.prepare(model, torch.rand(1, 3, 8, 8), precision="bf16")
    assert fast.fused
    assert entered[0] == ("float32", False)
    assert set(entered[1:]) == {("bf16", True)}
    (line,) = (line for line in fast.report().splitlines() if line.startswith("output within"))
    assert float(line.split()[2]) < 1e-5


class ClassToken(nn.Module):
    """A small vision transformer that reads its class token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = conv(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm1, self.mixing, self.norm2, self.head = nn.LayerNorm(8), nn.Linear(10, 10), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)
        y = y + self.mixing(self.norm1(y).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm2(y)[:, 0])


def test_a_transformer_that_reads_its_class_token_is_prepared() -> None:
    model, x = build(ClassToken)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused, prepared.report()
    expected = gradient(model, x)
    assert (gradient(prepared, x) - expected).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (pysal.grad_cam(prepared, x, 1) - pysal.grad_cam(model, x, 1)).abs().max() <= 1e-9


class Signature(nn.Module):
    """A network with arguments beside the images, which it does without."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x: Tensor, mask: Tensor | None = None, *more: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
        y = self.net(x if mask is None else x * mask) * scale
        for one in more:
            y = y + one
        return options["head"](y) if "head" in options else y


@pytest.mark.parametrize("wrapped", [False, True])
def test_arguments_beside_the_images_take_their_defaults(wrapped: bool) -> None:
    make = lambda: pysal.Normalized(Signature(), [0.5] * 3, [0.2] * 3) if wrapped else Signature()  # noqa: E731
    model, x = build(make)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused, prepared.report()
    expected = gradient(model, x)
    assert (gradient(prepared, x) - expected).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * expected.abs().max()
    mask = torch.zeros_like(x)
    assert torch.equal(prepared(x, mask), model(x, mask))


def test_small_images_are_tried_in_passes_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    passes: list[int] = []

    def seconds(_budget: Budget, name: str, way: Callable[[], None]) -> float:
        if not name.endswith(" rows"):
            return 2.0 if name.startswith("model's ") else 1.0
        tried.append(int(name.removesuffix(" rows")))
        return 1.0 + tried[-1] / 1000

    monkeypatch.setattr(Budget, "seconds", seconds)
    monkeypatch.setattr(Budget, "left", 1e9)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    fast = pysal.prepare(model, torch.rand(1, 3, 32, 32))
    assert sorted(set(tried)) == [1, 2, 4, 8, 32, 128, 196]
    assert tried[0] == 196  # what is fast without any measurement comes first, for there may be no time for more
    program = fast.program
    assert program is not None
    record = program.record

    def noting(batch: Tensor, *rest: Any) -> Any:
        passes.append(len(batch))
        return record(batch, *rest)

    monkeypatch.setattr(program, "record", noting)
    fast.rows, image = 100, torch.rand(1, 3, 32, 32)  # as if that had been fastest
    for call in (
        lambda: pysal.integrated_gradients(fast, image, 1, steps=250),
        lambda: NoiseTunnel(Saliency(fast)).attribute(image, nt_samples=250, target=1),
    ):
        passes.clear()
        call()
        assert max(passes) == 100


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=(2,), padding=[1]).relu().mean((2, 3))


def test_one_number_in_a_sequence_stands_for_rows_and_columns() -> None:
    model, x = build(OneNumber, torch.float32)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.fused, prepared.report()
    double, _ = build(OneNumber)
    assert_no_worse(prepared(x), double(x.double()), model(x))


def test_a_prepared_model_shows_its_report() -> None:
    images = torch.rand(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    fast = pysal.prepare(model, images)
    assert fast.report()
    assert repr(fast) == fast.report()
