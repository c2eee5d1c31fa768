"""A linear layer on many tokens: weights arranged for this machine once, and the gradient of its input alone.

torch's own linear layers hand their weights to a matrix library as they lie, which arranges them anew in every pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.matrix_unit import MatrixConvolution
from pysal.engine.graph.onednn import linear, packed_linear, runs_on_onednn

# Tokens of an image from which a linear layer is worth it: with fewer, reading the weights takes the time, and two more copies
# of them would lie in memory.
LEAST_TOKENS = 8


class FusedLinear(nn.Module):
    """A linear layer with constant weights.

    Args:
        weight: (K, C).
        bias: (K,) or None.
        backward_dtype: dtype of the input gradient's multiplication.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backward_dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.backward_dtype = backward_dtype
        self._forward, self._backward = Product(weight, bias), Product(weight.t().to(backward_dtype), None)

    @property
    def multiplications(self) -> int:
        """How often it multiplies for a token."""
        return self._forward.weight.numel()

    @property
    def onednn(self) -> bool:
        """Whether it runs through oneDNN, with weights arranged for it."""
        return self._forward.packed is not None

    @property
    def on_matrix_unit(self) -> bool:
        """Whether it runs on the matrix unit."""
        return self._forward.matrix is not None

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., K) of (..., C), which autograd does not follow."""
        return self._forward(input)

    def gelu(self, input: Tensor, approximate: str) -> Tensor:
        """Return GELU of what `forward` returns, while that is in a cache where oneDNN runs it."""
        if self._forward.packed is not None and input.numel():
            return linear(input, self._forward.packed, self._forward.bias, approximate)
        return F.gelu(self._forward(input), approximate=approximate)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient (..., C) of the input, in `backward_dtype`, from that of the output, (..., K)."""
        return self._backward(grad.to(self.backward_dtype))


class Product:
    """Rows times a matrix and plus a bias, by the fastest way.

    Args:
        weight: (K, C).
        bias: (K,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        self.matrix: MatrixConvolution | None = None
        self.packed: Tensor | None = None
        pointwise = Convolution(self.weight[:, :, None, None], bias, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        if MatrixConvolution.suited(pointwise):
            self.matrix = MatrixConvolution(pointwise.weight, bias)
        elif runs_on_onednn(weight):
            self.packed = packed_linear(self.weight)

    def __call__(self, input: Tensor) -> Tensor:
        """Return (..., K) of (..., C)."""
        if self.matrix is not None and input.numel():
            # rows (..., C) are a map (1, C, rows, 1) in channels_last order
            image = self.matrix.run(input.reshape(1, -1, 1, input.shape[-1]).permute(0, 3, 1, 2))
            return image.permute(0, 2, 3, 1).reshape(*input.shape[:-1], len(self.weight))
        if self.packed is not None and input.numel():
            return linear(input, self.packed, self.bias)
        return F.linear(input, self.weight, self.bias)
