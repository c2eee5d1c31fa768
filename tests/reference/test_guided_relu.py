"""The oracle of guided_relu against torch's own ReLU, NumPy's bit packing and the rules written out."""

import numpy as np
import pytest
import torch

from pysal.reference.guided_relu import guided_relu, guided_relu_backward, guided_relu_backward_, guided_relu_gates
from pysal.testing import sample

# both edges, both signs of zero, what lies next to the edges, and what is not a number
EDGES = [-1.0, -0.0, 0.0, 5e-324, 3.0, 6.0 - 2**-50, 6.0, 6.0 + 2**-50, torch.inf, -torch.inf, torch.nan]
EDGE_GATES = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(("upper", "relu"), [(torch.inf, torch.nn.functional.relu), (6.0, torch.nn.functional.relu6)])
def test_plain_rule_is_torch_relu(upper, relu):
    x = sample(3, 5, 7, dtype=torch.float64, low=-3, high=9).requires_grad_()
    g = sample(3, 5, 7, dtype=torch.float64, seed=1)
    output, gates = guided_relu(x, upper, 0)
    (expected,) = torch.autograd.grad(relu(x), x, g)
    assert torch.equal(output, relu(x))
    assert torch.equal(guided_relu_backward(g, gates, 0, False), expected)


@pytest.mark.parametrize(("upper", "relu"), [(torch.inf, torch.nn.functional.relu), (6.0, torch.nn.functional.relu6)])
def test_plain_rule_is_torch_relu_where_numbers_end(upper, relu):
    """A gradient passes at NaN, at infinity where there is no upper, and a NaN that passes stays one."""
    # torch's ReLU6 says of NaN one thing in vectors and another in what is left of them
    edges = EDGES if upper == torch.inf else EDGES[:-1]
    x = torch.tensor(edges, dtype=torch.float64).repeat(3).requires_grad_()
    g = torch.tensor([2.0, torch.nan, torch.inf], dtype=torch.float64).repeat_interleave(len(edges))
    _, gates = guided_relu(x.detach(), upper, 0)
    (expected,) = torch.autograd.grad(relu(x), x, g)
    assert torch.equal(guided_relu_backward(g, gates, 0, False).nan_to_num(7.0, 8.0), expected.nan_to_num(7.0, 8.0))


def test_gates_are_packed_from_the_lowest_bit():
    x = sample(77, dtype=torch.float64)
    _, gates = guided_relu(x, torch.inf, 1)
    assert np.array_equal(gates.numpy(), np.packbits(x.numpy() > 0, bitorder="little"))


def test_gates_alone_are_the_same_before_and_after():
    x = torch.cat([sample(77, dtype=torch.float64, low=-3, high=9), torch.tensor(EDGES, dtype=torch.float64)])
    output, gates = guided_relu(x, 6.0, 1)
    assert torch.equal(guided_relu_gates(x, 6.0), gates)
    assert torch.equal(guided_relu_gates(output, 6.0), gates)


def test_in_place_is_the_same():
    g, gates = sample(77, dtype=torch.float64), guided_relu_gates(sample(77, dtype=torch.float64, seed=1), 0.5)
    for rule in (0, 1, 2):
        in_place = g.clone()
        guided_relu_backward_(in_place, gates, rule, False)
        assert torch.equal(in_place, guided_relu_backward(g, gates, rule, False))


def test_edges():
    x = torch.tensor(EDGES, dtype=torch.float64)
    output, gates = guided_relu(x, 6.0, 1)
    assert np.unpackbits(gates.numpy(), bitorder="little", count=len(EDGES)).tolist() == EDGE_GATES
    torch.testing.assert_close(output, x.clamp(0, 6), rtol=0, atol=0, equal_nan=True)


def test_rules():
    g, gates = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([0b0011], dtype=torch.uint8)
    results = [guided_relu_backward(g, gates, rule, False).tolist() for rule in (0, 1, 2)]
    assert results == [[2.0, -2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]]


def test_a_closed_gate_selects_zero():
    g, gates = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.tensor([0], dtype=torch.uint8)
    for rule in (0, 1):
        assert guided_relu_backward(g, gates, rule, False).tolist() == [0.0, 0.0, 0.0]


def test_bits_follow_memory_order():
    x = sample(2, 3, 5, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    output, gates = guided_relu(x, torch.inf, 1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    in_memory = x.permute(0, 2, 3, 1).flatten().numpy()
    assert np.array_equal(gates.numpy(), np.packbits(in_memory > 0, bitorder="little"))
