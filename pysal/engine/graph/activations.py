"""Smooth activations in one pass over memory each way, alone or times a gate of squeeze-and-excitation; of float32 on a CPU.

They keep their input alone, which is there anyway: what else a gradient needs costs less to compute anew than to write down.
csrc/cpu/simd/activation.cpp has the loops. On other devices and in other dtypes torch's own functions run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal import ops  # noqa: F401  loads the kernels
from pysal.engine.graph.fold import module_of

# Position -> name, as csrc/cpu/simd/activation_kernels.h counts them.
KINDS = ("identity", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid", "leaky_relu")
_MODULES: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
}
_METHODS = {"sigmoid": "sigmoid", "sigmoid_": "sigmoid"}


@dataclass(frozen=True)
class Activation:
    """An activation that the kernels know.

    Attributes:
        name: of `KINDS`.
        slope: of leaky_relu, below zero.
    """

    name: str
    slope: float = 0.0

    def run(self, input: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the activation, times a gate.

        Args:
            input: of any shape; (N, C, H, W) where there is a gate, with which the result is channels_last.
            gate: (N, C).
        """
        result: Tensor = torch.ops.pysal_activations.activation(input, gate, *self.kind)
        return result

    def pull_back(self, grad: Tensor, input: Tensor, gate: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Return (grad gate + added) activation'(input), written over a gradient that lies as it has to.

        Args:
            grad: (T N, ...): row t N + n is one of image n.
            input: (N, ...); (N, C, H, W) where there is a gate or something is added.
            gate: (N, C).
            added: (T N, C).
        """
        order = torch.contiguous_format
        if input.ndim == 4 and (gate is not None or added is not None or not input.is_contiguous()):
            order = torch.channels_last
        grad, input = grad.contiguous(memory_format=order), input.contiguous(memory_format=order)
        torch.ops.pysal_activations.activation_backward_(grad, input, gate, added, *self.kind)
        return grad

    def sums(self, input: Tensor, grad: Tensor | None = None) -> Tensor:
        """Return the sum over each map of the activation (N, C), or of its product with gradients (T N, C, H, W), (T N, C)."""
        result: Tensor = torch.ops.pysal_activations.activation_sums(input, grad, *self.kind)
        return result

    @property
    def kind(self) -> tuple[int, float]:
        """Its number and its slope, as the kernels take them."""
        return KINDS.index(self.name), self.slope


def available() -> bool:
    """Say whether the kernels are compiled."""
    return hasattr(torch.ops.pysal_activations, "activation")


def runs(input: Tensor) -> bool:
    """Say whether the kernels take a tensor."""
    return input.dtype == torch.float32 and input.device.type == "cpu" and available()


def activation_of(graph: fx.GraphModule, node: fx.Node) -> Activation | None:
    """Return the activation that a node is, None where the kernels have none."""
    module = module_of(graph, node)
    if module is not None:
        if type(module) is nn.GELU:
            return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
        if type(module) is nn.LeakyReLU:
            return Activation("leaky_relu", float(module.negative_slope))
        name = _MODULES.get(type(module))
        return None if name is None else Activation(name)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_method":
        name = _METHODS.get(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
        return None if name is None else Activation(name)
    if node.op != "call_function":
        return None
    if node.target is F.gelu and len(node.args) == 1 and set(node.kwargs) <= {"approximate"}:
        return Activation("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    if node.target is F.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return Activation("leaky_relu", float(slope)) if isinstance(slope, (int, float)) else None
    name = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return Activation(name) if name is not None and set(node.kwargs) <= {"inplace"} else None
