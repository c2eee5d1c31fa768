"""pysal::epilogue_ and its backward, against the oracle in float64 and plain torch in the same dtype."""

import pytest
import torch

from pysal import ops
from pysal.reference import epilogue as reference
from pysal.reference.epilogue import ACTIVATIONS, GATED, SMOOTH
from pysal.testing import DTYPES, assert_no_worse, backends, layouts, sample

# one element; a table; bytes that cross channels; channels in words of eight; and what makes a second CPU task
SHAPES = [(1, 1), (3, 5), (2, 3, 7, 9), (2, 16, 5, 3)]
MANY = (3, 11, 17, 35)
PARAMETERS = {"relu": 0.75, "leaky_relu": 0.2}

on_backends = pytest.mark.parametrize("backend", backends(native_only=True) or backends(), ids=str)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_activations = pytest.mark.parametrize("name", ACTIVATIONS)


def number_of(name):
    return ACTIVATIONS.index(name), PARAMETERS.get(name, 0.0)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def inputs(shape, dtype, channels_last=False):
    """x, bias and shortcut; x four times as wide as activations bend."""
    x, shortcut = (sample(*shape, dtype=dtype, seed=seed, low=-4.0, high=4.0) for seed in (0, 1))
    if channels_last:
        x, shortcut = (value.contiguous(memory_format=torch.channels_last) for value in (x, shortcut))
    return x, sample(shape[1], dtype=wide(dtype), seed=2), shortcut


def double(value):
    """A copy in float64, of gates a copy."""
    return value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def assert_near(kernel, truth, plain):
    """The ops' rule of tolerance; what the oracle makes in float64 is rounded in its last places, too."""
    if kernel.dtype == torch.float64:
        torch.testing.assert_close(kernel.cpu(), truth, rtol=1e-13, atol=1e-13)
    else:
        assert_no_worse(kernel, truth, plain)


def formats(shape):
    return (False, True) if len(shape) == 4 else (False,)


@on_backends
@of_dtypes
@of_activations
def test_no_worse_than_torch(backend, dtype, name):
    for shape in [*SHAPES, MANY] if name in ("relu", "gelu") else SHAPES:
        for channels_last in formats(shape):
            x, bias, shortcut = inputs(shape, dtype, channels_last)
            for given in ((None, None), (bias, None), (None, shortcut), (bias, shortcut)):
                found, plain, truth = x.to(backend.device, copy=True), x.clone(), double(x)
                more = [None if one is None else one.to(backend.device) for one in given]
                kept = backend.op("epilogue_")(found, *more, *number_of(name), True)
                expected = reference.epilogue_(plain, *given, *number_of(name), True)
                reference.epilogue_(truth, *[None if one is None else double(one) for one in given], *number_of(name), True)
                assert_near(found, truth, plain)
                assert (kept.dtype, kept.shape, kept.stride()) == (expected.dtype, expected.shape, expected.stride())
                assert found.stride() == x.stride()
                torch.testing.assert_close(kept.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
                again = x.to(backend.device, copy=True)
                assert backend.op("epilogue_")(again, *more, *number_of(name), False).numel() == 0
                assert torch.equal(again, found)


@on_backends
@of_dtypes
@of_activations
def test_backward_no_worse_than_torch(backend, dtype, name):
    """Of as many gradients as images, and of three for each, with and without another gradient added."""
    number, parameter = number_of(name)
    for shape in [*SHAPES, MANY] if name in ("relu", "gelu") else SHAPES:
        for channels_last in formats(shape):
            x, bias, shortcut = inputs(shape, dtype, channels_last)
            kept = reference.epilogue_(x, bias, shortcut, number, parameter, True)
            for times, rule in ((1, 0), (3, 0), (1, 1), (3, 2)):
                grads = [sample(times * shape[0], *shape[1:], dtype=dtype, seed=seed) for seed in (3, 4)]
                if rule and name != "relu":
                    continue
                for grad, added in ((grads[0], None), grads):
                    rest = (number, parameter, rule, shape[0], channels_last)
                    found, plain, truth = grad.to(backend.device, copy=True), grad.clone(), double(grad)
                    more = None if added is None else added.to(backend.device)
                    backend.op("epilogue_backward_")(found, more, kept.to(backend.device), *rest)
                    reference.epilogue_backward_(plain, added, kept, *rest)
                    reference.epilogue_backward_(truth, None if added is None else double(added), double(kept), *rest)
                    assert_near(found, truth, plain)


@pytest.mark.parametrize("backend", backends(), ids=str)
@of_activations
def test_layouts(backend, name):
    """Whatever x, shortcut and gradients lie like, the result is the same, and nothing around them is written."""
    number, parameter = number_of(name)
    x, bias, shortcut = inputs((2, 3, 5, 9), torch.float32)
    plain = x.clone()
    reference.epilogue_(plain, bias, shortcut, number, parameter, False)
    for layout, laid_out in layouts(x.to(backend.device)):
        if 0 in laid_out.stride():
            continue
        for _, other in layouts(shortcut.to(backend.device)):
            found = laid_out.clone(memory_format=torch.preserve_format) if layout != "offset" else laid_out
            before = found.clone()
            kept = backend.op("epilogue_")(found, bias.to(backend.device), other, number, parameter, True)
            torch.testing.assert_close(found.cpu(), plain, rtol=1e-5, atol=1e-6)
            last = reference.is_channels_last(found)
            for _, grad in layouts(sample(2, 3, 5, 9, seed=3).to(backend.device)):
                if 0 in grad.stride():
                    continue
                grad = grad.clone(memory_format=torch.preserve_format)
                expected = grad.cpu().contiguous()
                reference.epilogue_backward_(expected, None, kept.cpu(), number, parameter, 0, 2, last)
                backend.op("epilogue_backward_")(grad, None, kept, number, parameter, 0, 2, last)
                torch.testing.assert_close(grad.cpu(), expected, rtol=1e-5, atol=1e-6)
            found.copy_(before)


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
@of_dtypes
def test_extremes(backend, dtype):
    """NaN and infinities come through as through torch's own activations, alone in a byte and in whole vectors."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0, -3.0, 0.75, -50.0, 50.0], dtype=dtype)
    for repeats in (1, 8):
        many = x.repeat(repeats)[None]
        for name in ACTIVATIONS:
            found = many.to(backend.device, copy=True)
            kept = backend.op("epilogue_")(found, None, None, *number_of(name), True)
            expected = many.to(wide(dtype))
            if name == "relu":
                expected = expected.clamp(0, 0.75)
            elif name == "leaky_relu":
                expected = torch.nn.functional.leaky_relu(expected, 0.2)
            elif name in SMOOTH:
                # one by one: torch's gelu of many is NaN at infinity
                expected = torch.stack([SMOOTH[name](one) for one in expected[0]])[None]
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found.cpu(), expected.to(dtype), rtol=4 * eps, atol=eps, equal_nan=True)
            if name in GATED:
                # of NaN as torch's gradients of the two have it
                opened = {"relu": lambda v: v != v or 0 < v < 0.75, "leaky_relu": lambda v: v > 0}[name]
                assert [bool(kept[i // 8] >> i % 8 & 1) for i in range(many.numel())] == list(map(opened, many[0].tolist()))


@pytest.mark.parametrize("backend", backends(), ids=str)
@of_activations
def test_nothing(backend, name):
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0)):
        x = torch.empty(shape, device=backend.device)
        kept = backend.op("epilogue_")(x, None, None, *number_of(name), True)
        assert kept.numel() == 0
        backend.op("epilogue_backward_")(x, None, kept, *number_of(name), 0, shape[0], False)


@of_activations
def test_the_wrappers_are_the_derivative(name):
    """Of the sum, by autograd of torch's own activation in float64."""
    x, bias, shortcut = (value.double() for value in inputs((2, 3, 5, 4), torch.float64))
    leaf = (x + bias.view(-1, 1, 1) + shortcut).requires_grad_()
    parameter = PARAMETERS.get(name)
    result = {
        "identity": lambda v: v,
        "relu": lambda v: torch.nn.functional.hardtanh(v, 0.0, 0.75),
        "leaky_relu": lambda v: torch.nn.functional.leaky_relu(v, 0.2),
    }.get(name, SMOOTH.get(name))(leaf)
    g, h = sample(2, 3, 5, 4, dtype=torch.float64, seed=5), sample(2, 3, 5, 4, dtype=torch.float64, seed=6)
    (expected,) = torch.autograd.grad(result, leaf, g + h)
    kept = ops.epilogue_(x, bias, shortcut, name, parameter, keep=True)
    torch.testing.assert_close(x, result.detach(), rtol=1e-12, atol=1e-12)
    ops.epilogue_backward_(g, kept, name, parameter, added=h)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


def test_relu_is_guided_relu():
    """Result, gates and every rule are those of that op, of the sum."""
    x, bias, shortcut = inputs((2, 5, 6, 7), torch.bfloat16)
    total = (x.float() + bias.view(-1, 1, 1) + shortcut.float()).bfloat16()
    output, gates = ops.guided_relu(total, 0.3)
    kept = ops.epilogue_(x, bias, shortcut, "relu", 0.3, keep=True)
    assert torch.equal(x, output)
    assert torch.equal(kept, gates)
    for rule in ("plain", "guided", "deconvnet"):
        g = sample(2, 5, 6, 7, dtype=torch.bfloat16, seed=3)
        expected = ops.guided_relu_backward(g, gates, rule)
        ops.epilogue_backward_(g, kept, "relu", 0.3, rule=rule)
        assert torch.equal(g, expected)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_opcheck(name):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, bias, shortcut = inputs((2, 3, 4, 5), torch.float32, channels_last=True)
    arguments = (x, bias, shortcut, *number_of(name), True)
    torch.library.opcheck(torch.ops.pysal.epilogue_.default, arguments, test_utils=checks)
    kept = ops.epilogue_(x.clone(), activation=name, keep=True)
    arguments = (sample(4, 3, 4, 5), None, kept, *number_of(name), 0, 2, True)
    torch.library.opcheck(torch.ops.pysal.epilogue_backward_.default, arguments, test_utils=checks)


X, KEPT = torch.ones(1, 3), torch.zeros(1, dtype=torch.uint8)
BAD_CALLS = [
    (lambda: ops.epilogue_([1.0]), TypeError, "pysal::epilogue_: x must be a torch.Tensor, got list"),
    (lambda: ops.epilogue_(torch.ones(3)), ValueError, "pysal::epilogue_: x must have at least 2 dimensions, got shape (3,)"),
    (
        lambda: ops.epilogue_(X, torch.ones(3, dtype=torch.float16)),
        TypeError,
        "pysal::epilogue_: bias must have dtype float32, got float16",
    ),
    (lambda: ops.epilogue_(X, torch.ones(2)), ValueError, "pysal::epilogue_: bias must have shape (3,), got shape (2,)"),
    (
        lambda: ops.epilogue_(X, shortcut=torch.ones(3)),
        ValueError,
        "pysal::epilogue_: shortcut must have shape (1, 3), got shape (3,)",
    ),
    (
        lambda: ops.epilogue_(X, shortcut=X.to("meta")),
        ValueError,
        "pysal::epilogue_: shortcut must be on cpu, got meta",
    ),
    (
        lambda: ops.epilogue_(X, activation="selu"),
        ValueError,
        f"pysal::epilogue_: activation must be one of {', '.join(ACTIVATIONS)} "
        "(did you mean 'silu', 'relu', 'gelu'?), got 'selu'",
    ),
    (
        lambda: ops.epilogue_(X, activation="silu", parameter=1.0),
        ValueError,
        "pysal::epilogue_: parameter must be None for silu, got 1.0",
    ),
    (
        lambda: ops.epilogue_(X, activation="relu", parameter=0.0),
        ValueError,
        "pysal::epilogue_: parameter must be positive for relu, got 0.0",
    ),
    (
        lambda: ops.epilogue_(torch.ones(1, 3, requires_grad=True)),
        ValueError,
        "pysal::epilogue_: x must not require grad outside torch.no_grad(), got requires_grad=True",
    ),
    (
        lambda: ops.epilogue_backward_(X, KEPT, "silu"),
        TypeError,
        "pysal::epilogue_backward_: kept must have dtype float32, got uint8",
    ),
    (
        lambda: ops.epilogue_backward_(torch.ones(2, 9), KEPT, "relu", images=1),
        ValueError,
        "pysal::epilogue_backward_: kept must have shape (2,), got shape (1,)",
    ),
    (
        lambda: ops.epilogue_backward_(X, KEPT, "leaky_relu", rule="guided"),
        ValueError,
        "pysal::epilogue_backward_: rule must be plain for leaky_relu, got guided",
    ),
    (
        lambda: ops.epilogue_backward_(torch.ones(3, 1), KEPT, "relu", images=2),
        ValueError,
        "pysal::epilogue_backward_: images must divide the 3 rows of grad, got 2",
    ),
    (
        lambda: ops.epilogue_backward_(X, KEPT, "relu", channels_last=True),
        ValueError,
        "pysal::epilogue_backward_: channels_last must be False unless grad is 4-D, got shape (1, 3)",
    ),
    (
        lambda: ops.epilogue_backward_(X, KEPT, "relu", added=torch.ones(3)),
        ValueError,
        "pysal::epilogue_backward_: added must have shape (1, 3), got shape (3,)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
def test_errors(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@on_backends
def test_the_kernels_themselves_stay_in_bounds(backend):
    """Whoever calls the ops without their wrappers gets an error, not a read past an end."""
    if backend.name == "reference":
        return
    x, bias = torch.ones(2, 9, device=backend.device), torch.ones(9, device=backend.device)
    gates, sums = torch.zeros(3, dtype=torch.uint8, device=backend.device), torch.ones(2, 9, device=backend.device)
    for arguments in (
        (x[0], None, None, 0, 0.0, False),
        (x, bias[:8], None, 0, 0.0, False),
        (x, bias.double(), None, 0, 0.0, False),
        (x, None, x[:1], 0, 0.0, False),
        (x, None, x.half(), 0, 0.0, False),
        (x, None, None, 9, 0.0, False),
    ):
        with pytest.raises(RuntimeError, match=r"pysal::epilogue_: .* must"):
            backend.op("epilogue_")(*arguments)
    for arguments in (
        (x, None, gates[:2], 1, 1.0, 0, 2, False),
        (x, None, sums, 1, 1.0, 0, 2, False),
        (x, None, sums[:1], 2, 1.0, 0, 2, False),
        (x, None, gates, 2, 1.0, 0, 2, False),
        (x, x[:1], gates, 1, 1.0, 0, 2, False),
        (x, None, gates, 1, 1.0, 3, 2, False),
        (x, None, gates, 1, 1.0, 0, 0, False),
        (x, None, gates, 1, 1.0, 0, 3, False),
        (x, None, gates, 1, 1.0, 0, -1, False),
        (x, None, gates, -1, 1.0, 0, 2, False),
        (x, None, gates, 1, 1.0, 0, 2, True),
    ):
        with pytest.raises(RuntimeError, match=r"pysal::epilogue_backward_: .* must"):
            backend.op("epilogue_backward_")(*arguments)
