"""The oracle of epilogue_ against torch's own functions, forth and back, under autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from pysal.reference.epilogue import ACTIVATIONS, epilogue_, epilogue_backward_
from pysal.reference.guided_relu import guided_relu
from pysal.testing import sample

# written out: what an activation is of the sum
WRITTEN = {
    "identity": lambda s: s,
    "relu": lambda s: s.clamp(max=2.0).relu(),
    "silu": lambda s: s * torch.sigmoid(s),
    "hardswish": lambda s: s * F.relu6(s + 3) / 6,
    "gelu": lambda s: s * torch.special.ndtr(s),
    "gelu_tanh": lambda s: s * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (s + 0.044715 * s**3))) / 2,
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    "hardsigmoid": lambda s: F.relu6(s + 3) / 6,
    "leaky_relu": lambda s: torch.where(s > 0, s, 0.3 * s),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name, channels_last):
    """Also of two gradients for each image, to which others are added."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, shortcut = (sample(2, 3, 4, 5, dtype=torch.float64, seed=seed, low=-4, high=4) for seed in (0, 1))
    bias = sample(3, dtype=torch.float64, seed=2)
    sums = (x + bias.view(1, 3, 1, 1) + shortcut).requires_grad_()
    expected = WRITTEN[name](sums)
    number, parameter = ACTIVATIONS.index(name), {"relu": 2.0, "leaky_relu": 0.3}.get(name, 0.0)
    x = x.contiguous(memory_format=order)
    kept = epilogue_(x, bias, shortcut, number, parameter, True)
    torch.testing.assert_close(x, expected.detach(), rtol=1e-13, atol=1e-13)
    grad, added = (sample(4, 3, 4, 5, dtype=torch.float64, seed=seed) for seed in (3, 4))
    pulled = [torch.autograd.grad(expected, sums, part, retain_graph=True)[0] for part in (grad + added).split(2)]
    epilogue_backward_(grad, added, kept, number, parameter, 0, 2, channels_last)
    torch.testing.assert_close(grad, torch.cat(pulled), rtol=1e-13, atol=1e-13)


def test_what_is_kept():
    """The gates of the sum for ReLU; of leaky ReLU those without a bound; else the sum; nothing where nothing is asked for."""
    x = torch.tensor([[-1.0, 0.5, 9.0, -0.0]])
    assert torch.equal(epilogue_(x.clone(), None, None, 1, 6.0, True), guided_relu(x, 6.0, 0)[1])
    assert epilogue_(x.clone(), None, None, 8, 0.1, True).tolist() == [0b0110]
    assert torch.equal(epilogue_(x.clone(), torch.ones(4), x, 2, 0.0, True), 2 * x + 1)
    for number in range(len(ACTIVATIONS)):
        assert epilogue_(x.clone(), None, None, number, 1.0, number == 0).shape == (0,)
