"""pysal::guided_relu, its gates alone and its backward, against the oracle. They select: results are equal bit by bit."""

import itertools

import numpy as np
import pytest
import torch

from pysal import ops
from pysal.reference import guided_relu as reference
from pysal.testing import DTYPES, assert_same_layout, backends, layouts, sample

# one element, one byte, a partial byte, odd sizes, and more than the 32768 elements that make a second CPU task
SHAPES = [(1,), (8,), (1, 1, 1, 1), (5, 7), (2, 3, 17, 19), (3, 11, 33, 35)]
RULES = {"plain": 0, "guided": 1, "deconvnet": 2}
UPPERS = [torch.inf, 0.5]
# ReLU6's bound; no number of any dtype; tinier than float16 has; beyond float16's largest
ODD_UPPERS = [6.0, 0.3, 1e-9, 70000.0]

on_backends = pytest.mark.parametrize("backend", backends(native_only=True) or backends(), ids=str)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@on_backends
@of_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("upper", UPPERS)
def test_matches_reference(backend, dtype, shape, upper):
    x = sample(*shape, dtype=dtype)
    output, gates = backend.op("guided_relu")(x.to(backend.device), upper, 1)
    expected, expected_gates = reference.guided_relu(x, upper, 1)
    assert torch.equal(output.cpu(), expected)
    assert torch.equal(gates.cpu(), expected_gates)


@on_backends
@of_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_backward_matches_reference(backend, dtype, shape, rule):
    g = sample(*shape, dtype=dtype, seed=1)
    _, gates = reference.guided_relu(sample(*shape, dtype=dtype), 0.5, rule)
    g, gates = g.to(backend.device), gates.to(backend.device)
    grad = backend.op("guided_relu_backward")(g, gates, rule, False)
    assert torch.equal(grad.cpu(), reference.guided_relu_backward(g.cpu(), gates.cpu(), rule, False))
    where = g.data_ptr()
    assert backend.op("guided_relu_backward_")(g, gates, rule, False) is None
    assert torch.equal(g, grad)
    assert g.data_ptr() == where


@on_backends
@of_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("upper", UPPERS)
def test_gates_match_reference(backend, dtype, shape, upper):
    """Of the input, and of what came out of it, they are the bits that guided_relu writes; the tensor is only read."""
    x = sample(*shape, dtype=dtype)
    x.flatten()[::3] = 0.0
    output, expected = reference.guided_relu(x, upper, 1)
    for values in (x, output):
        given = values.to(backend.device, copy=True)
        gates = backend.op("guided_relu_gates")(given, upper)
        assert torch.equal(gates.cpu(), expected)
        assert torch.equal(given.cpu(), values)


@on_backends
@of_dtypes
def test_gates_of_the_output_of_a_layer(backend, dtype):
    """channels_last and contiguous memory is taken as it lies, so that no copy is made."""
    activation = torch.nn.functional.relu6(sample(3, 5, 7, 9, dtype=dtype, low=-8.0, high=8.0))
    for memory_format, order in ((torch.contiguous_format, (0, 1, 2, 3)), (torch.channels_last, (0, 2, 3, 1))):
        given = activation.to(backend.device).contiguous(memory_format=memory_format)
        gates = backend.op("guided_relu_gates")(given, 6.0).cpu()
        is_open = ((activation > 0) & (activation < 6)).permute(order).flatten()
        assert is_open.any()
        assert (activation == 6).any()
        assert [bool(gates[i // 8] >> i % 8 & 1) for i in range(len(is_open))] == is_open.tolist()


@on_backends
@of_dtypes
@pytest.mark.parametrize("upper", ODD_UPPERS)
def test_upper_between_two_numbers(backend, dtype, upper):
    """What lies around upper is compared with upper itself, not with upper rounded to the dtype."""
    near = torch.tensor([upper]).to(dtype)
    up, down = torch.nextafter(near, torch.tensor(torch.inf, dtype=dtype)), torch.nextafter(near, -torch.ones_like(near))
    x = torch.cat([near, up, down, torch.tensor([torch.inf, -1.0, 0.0, 1.0], dtype=dtype)]).repeat(5)
    output, gates = backend.op("guided_relu")(x.to(backend.device), upper, 1)
    expected, expected_gates = reference.guided_relu(x, upper, 1)
    assert torch.equal(output.cpu(), expected)
    assert torch.equal(gates.cpu(), expected_gates)
    assert torch.equal(backend.op("guided_relu_gates")(x.to(backend.device), upper).cpu(), expected_gates)


def rule_by_autograd(x, g, upper, rule):
    gate, positive = (x > 0) & (x < upper), g > 0
    return torch.where({"plain": gate, "guided": gate & positive, "deconvnet": positive}[rule], g, 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("upper", UPPERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autograd_follows_the_rule(rule, upper, memory_format):
    x = sample(2, 3, 5, 7).contiguous(memory_format=memory_format).requires_grad_()
    g = sample(2, 3, 5, 7, seed=1)
    output, gates = ops.guided_relu(x, upper, rule)
    assert not gates.requires_grad
    (grad,) = torch.autograd.grad(output, x, g)
    assert torch.equal(grad, rule_by_autograd(x.detach(), g, upper, rule))
    assert_same_layout(grad, x)


def test_gradcheck():
    x = sample(2, 3, 5, dtype=torch.float64).requires_grad_()  # no element within gradcheck's step of an edge
    assert min((x - edge).abs().min() for edge in (0.0, 0.5)) > 1e-4

    def plain(x):
        return ops.guided_relu(x, 0.5, "plain")[0]

    assert torch.autograd.gradcheck(plain, (x,))
    assert torch.autograd.gradgradcheck(plain, (x,))
    g = sample(2, 3, 5, dtype=torch.float64, seed=1).requires_grad_()
    gates = ops.guided_relu(x.detach(), 0.5)[1]
    for rule in RULES:  # the rules are not the derivative of the forward, but the backward has one
        assert torch.autograd.gradcheck(lambda g, rule=rule: ops.guided_relu_backward(g, gates, rule), (g,))
        assert torch.autograd.gradgradcheck(lambda g, rule=rule: ops.guided_relu_backward(g, gates, rule), (g,))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    """Each layout, each rule: a rule is a number that a kernel is told, and has no form of its own to be checked with each."""
    samples = [torch.empty(0), *(x for _, x in layouts(sample(2, 3, 4, 5)))]
    for x, rule in zip(samples, itertools.cycle(RULES.values())):
        torch.library.opcheck(torch.ops.pysal.guided_relu.default, (x.requires_grad_(requires_grad), 0.5, rule))
        torch.library.opcheck(torch.ops.pysal.guided_relu_gates.default, (x, 0.5))
    for rule, channels_last in zip(RULES.values(), itertools.cycle((False, True))):
        g = sample(2, 3, 4, 5).requires_grad_(requires_grad)
        gates = torch.arange(15, dtype=torch.uint8)
        torch.library.opcheck(torch.ops.pysal.guided_relu_backward.default, (g, gates, rule, channels_last))
        if not requires_grad:
            torch.library.opcheck(torch.ops.pysal.guided_relu_backward_.default, (g, gates, rule, channels_last))


@pytest.mark.parametrize("backend", backends(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (5, 7), (3, 1, 6, 1), (2, 3, 5, 9)], ids=str)
def test_layouts(backend, dtype, shape):
    values, g = sample(*shape, dtype=dtype), sample(*shape, dtype=dtype, seed=1)
    for name, x in layouts(values):
        channels_last = name == "channels_last" and not x.is_contiguous()
        output, gates = backend.op("guided_relu")(x.to(backend.device), 0.5, 1)
        assert torch.equal(output.cpu(), values.clamp(0, 0.5)), name
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert_same_layout(output.cpu(), values.contiguous(memory_format=memory_format))
        assert torch.equal(backend.op("guided_relu_gates")(x.to(backend.device), 0.5), gates), name
        for _, laid_out in layouts(g):
            grad = backend.op("guided_relu_backward")(laid_out.to(backend.device), gates, 1, channels_last)
            assert torch.equal(grad.cpu(), rule_by_autograd(values, g, 0.5, "guided")), name
            assert_same_layout(grad, output)
        for layout, laid_out in layouts(g.to(backend.device)):
            strides = laid_out.stride()
            backend.op("guided_relu_backward_")(laid_out, gates, 1, channels_last)
            assert torch.equal(laid_out, grad), (name, layout)
            assert laid_out.stride() == strides


@pytest.mark.parametrize("backend", backends(), ids=str)
@of_dtypes
def test_empty_and_extremes(backend, dtype):
    for shape in ((0,), (0, 3, 4, 4), (2, 0, 4)):
        x = torch.empty(shape, dtype=dtype, device=backend.device)
        output, gates = backend.op("guided_relu")(x, 6.0, 1)
        grad = backend.op("guided_relu_backward")(x, gates, 1, False)
        assert output.shape == grad.shape == shape
        assert gates.shape == backend.op("guided_relu_gates")(x, 6.0).shape == (0,)
        backend.op("guided_relu_backward_")(x, gates, 1, False)
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, largest, -largest, 6.0], dtype=dtype)
    for repeats in (1, 8):  # in a partial byte, and in whole vectors
        many = x.repeat(repeats)
        output, gates = backend.op("guided_relu")(many.to(backend.device), 6.0, 1)
        expected = torch.tensor([torch.nan, 6, 0, 0, 0, tiny, 0, 6, 0, 6], dtype=dtype).repeat(repeats)
        torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(backend.op("guided_relu_gates")(many.to(backend.device), 6.0), gates)
        open_gates = [bool(gates[i // 8] >> i % 8 & 1) for i in range(len(many))]
        assert open_gates == [value == tiny or value != value for value in many.tolist()]
        endless = backend.op("guided_relu_gates")(many.to(backend.device), torch.inf).cpu()
        assert torch.equal(endless, reference.guided_relu_gates(many, torch.inf))
        assert [bool(endless[i // 8] >> i % 8 & 1) for i in range(10)] == [1, 1, 0, 0, 0, 1, 0, 1, 0, 1]
        for rule, name in enumerate(RULES):
            grad = backend.op("guided_relu_backward")(many.to(backend.device), gates, rule, False)
            gate, positive = torch.tensor(open_gates), ~(many <= 0)  # a NaN must not become 0
            passes = {"plain": gate, "guided": gate & positive, "deconvnet": positive}[name]
            expected = torch.where(passes, many, torch.zeros_like(many))
            torch.testing.assert_close(grad.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            in_place = many.to(backend.device, copy=True)
            backend.op("guided_relu_backward_")(in_place, gates, rule, False)
            torch.testing.assert_close(in_place.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@on_backends
def test_more_elements_than_an_int32_counts(backend):
    if backend.name == "emulated":
        pytest.skip("hours in the emulation; the GPU runs it")
    # One array of 4 GB at a time: NumPy's zeros take no memory until they are written, and all but two of x never are.
    x = torch.from_numpy(np.zeros(2**31 + 9, np.float16)).to(backend.device)
    x[0], x[-1] = -1.0, 2.0
    output, gates = backend.op("guided_relu")(x, 6.0, 1)
    assert output[-1] == 2
    assert gates[-1] == 1  # element 2^31 + 8 is bit 0 of byte 2^28 + 1
    output[0], output[-1] = 1.0, -2.0
    backend.op("guided_relu_backward_")(output, gates, 2, False)
    assert output[0] == 1
    assert output[-1] == 0  # what a kernel that stops early would leave is -2
    del output
    assert torch.equal(backend.op("guided_relu_gates")(x, 6.0), gates)
    x[0], x[-1] = 1.0, -2.0
    grad = backend.op("guided_relu_backward")(x, gates, 0, False)
    assert grad[0] == 0
    assert grad[-1] == -2


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_determinism(backend):
    x, g = sample(3, 5, 61, 67).to(backend.device), sample(3, 5, 61, 67, seed=1).to(backend.device)

    def run():
        output, gates = backend.op("guided_relu")(x, 0.5, 1)
        grad = backend.op("guided_relu_backward")(g, gates, 1, False)
        in_place = g.clone()
        backend.op("guided_relu_backward_")(in_place, gates, 1, False)
        assert torch.equal(in_place, grad)
        return output, gates, backend.op("guided_relu_gates")(x, 0.5), grad

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_and_keeps_dynamic_shapes():
    def loss(x):
        output, _ = torch.ops.pysal.guided_relu(x, 6.0, 1)
        return (output * x).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 4, 5), (3, 3, 7, 5)):
        x, y = sample(*shape).requires_grad_(), sample(*shape).requires_grad_()
        loss(x).backward()
        compiled(y).backward()
        assert torch.equal(x.grad, y.grad)


def test_the_wrappers_call_their_ops():
    x, g = sample(3, 5), sample(3, 5, seed=1)
    gates = ops.guided_relu_gates(x, 0.5)
    assert torch.equal(gates, ops.guided_relu(x, 0.5)[1])
    assert torch.equal(ops.guided_relu_gates(x), reference.guided_relu_gates(x, torch.inf))
    for rule in RULES:
        in_place = g.clone()
        ops.guided_relu_backward_(in_place, gates, rule)
        assert torch.equal(in_place, ops.guided_relu_backward(g, gates, rule))


X, GATES = torch.ones(3), torch.zeros(1, dtype=torch.uint8)
BAD_CALLS = [
    (
        lambda: ops.guided_relu([1.0]),
        TypeError,
        "pysal::guided_relu: input must be a torch.Tensor, got list",
    ),
    (
        lambda: ops.guided_relu(torch.ones(3, dtype=torch.int32)),
        TypeError,
        "pysal::guided_relu: input must have dtype float32 or float64 or float16 or bfloat16, got int32",
    ),
    (
        lambda: ops.guided_relu(X, upper=0.0),
        ValueError,
        "pysal::guided_relu: upper must be positive, got 0.0",
    ),
    (
        lambda: ops.guided_relu(X, upper=float("nan")),
        ValueError,
        "pysal::guided_relu: upper must be positive, got nan",
    ),
    (
        lambda: ops.guided_relu(X, rule="smooth"),
        ValueError,
        "pysal::guided_relu: rule must be one of plain, guided, deconvnet, got 'smooth'",
    ),
    (
        lambda: ops.guided_relu_backward(X, X, "plain"),
        TypeError,
        "pysal::guided_relu_backward: gates must have dtype uint8, got float32",
    ),
    (
        lambda: ops.guided_relu_backward(torch.ones(9), GATES, "plain"),
        ValueError,
        "pysal::guided_relu_backward: gates must have shape (2,), got shape (1,)",
    ),
    (
        lambda: ops.guided_relu_backward(X, GATES.to("meta"), "plain"),
        ValueError,
        "pysal::guided_relu_backward: gates must be on cpu, got meta",
    ),
    (
        lambda: ops.guided_relu_backward(X, GATES, "none"),
        ValueError,
        "pysal::guided_relu_backward: rule must be one of plain, guided, deconvnet, got 'none'",
    ),
    (
        lambda: ops.guided_relu_backward(X, GATES, "plain", channels_last=True),
        ValueError,
        "pysal::guided_relu_backward: channels_last must be False unless grad_output is 4-D, got shape (3,)",
    ),
    (
        lambda: ops.guided_relu_gates(X, upper=-1.0),
        ValueError,
        "pysal::guided_relu_gates: upper must be positive, got -1.0",
    ),
    (
        lambda: ops.guided_relu_gates(GATES),
        TypeError,
        "pysal::guided_relu_gates: input must have dtype float32 or float64 or float16 or bfloat16, got uint8",
    ),
    (
        lambda: ops.guided_relu_backward_(X, GATES, "plain", channels_last=True),
        ValueError,
        "pysal::guided_relu_backward_: channels_last must be False unless grad is 4-D, got shape (3,)",
    ),
    (
        lambda: ops.guided_relu_backward_(torch.ones(3, requires_grad=True), GATES, "plain"),
        ValueError,
        "pysal::guided_relu_backward_: grad must not require grad outside torch.no_grad(), got requires_grad=True",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
def test_errors(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@on_backends
def test_the_kernel_itself_stays_in_bounds(backend):
    """Whoever calls the op without the wrapper gets an error, not a read past the end of gates."""
    if backend.name == "reference":
        return
    x, gates = torch.ones(9, device=backend.device), torch.zeros(2, dtype=torch.uint8, device=backend.device)
    for arguments in ((x, gates[:1], 1, False), (x, x, 1, False), (x, gates, 3, False), (x, gates, 1, True)):
        for name in ("guided_relu_backward", "guided_relu_backward_"):
            with pytest.raises(RuntimeError, match=rf"pysal::{name}: .* must be"):
                backend.op(name)(*arguments)
    with pytest.raises(RuntimeError):
        backend.op("guided_relu_gates")(gates, 6.0)
