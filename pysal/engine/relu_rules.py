"""Backward rules of ReLU at the operator: whatever spelling, module or function a network uses.

Two mechanisms, because neither sees everything. While the forward pass runs, a `TorchFunctionMode` replaces every ReLU call by
the fused op, which keeps one bit per element. Afterwards the autograd graph is walked: a ReLU Python never called (inside a
TorchScript module, a C++ composite) is found there and gets a hook, and so are the activations a rule does not define.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pysal import ops
from pysal._checks import refuse
from pysal.engine.not_applicable import NotApplicable

ReluRule: TypeAlias = Literal["plain", "guided", "deconvnet"]
OtherActivations: TypeAlias = Literal["error", "plain", "generalised"]
OTHER_ACTIVATIONS: tuple[str, ...] = get_args(OtherActivations)

# Autograd nodes of activations that pass some negative input, for which "the ReLU was on" has no meaning. Sigmoid, tanh and
# softmax are not here: in ReLU networks they are gates and attention weights, and keep their ordinary derivative.
_UNDEFINED = {
    "GeluBackward0": "GELU",
    "SiluBackward0": "SiLU",
    "LeakyReluBackward0": "LeakyReLU",
    "LeakyReluBackward1": "LeakyReLU",
    "EluBackward0": "ELU",
    "EluBackward1": "ELU",
    "CeluBackward0": "CELU",
    "MishBackward0": "Mish",
    "HardswishBackward0": "Hardswish",
    "SoftplusBackward0": "Softplus",
    "PreluKernelBackward0": "PReLU",
    "RreluWithNoiseBackward0": "RReLU",
    "LogSigmoidBackward0": "LogSigmoid",
    "HardshrinkBackward0": "Hardshrink",
    "SoftshrinkBackward0": "Softshrink",
    "GluBackward0": "GLU",
}
_GENERALISABLE = {
    F.gelu,
    F.silu,
    F.leaky_relu,
    F.elu,
    F.celu,
    F.selu,
    F.mish,
    F.hardswish,
    F.softplus,
    F.prelu,
    torch.celu,
    torch.selu,
    torch.prelu,
    torch.Tensor.prelu,
    F.hardtanh,
}


class ReluRules:
    """Runs a forward pass so that its backward pass follows a rule, which may still be changed before each backward.

    Use: `with rules.recording(): score = f(model(x))`, then `rules.finish(score)`, then differentiate.

    Args:
        where: the public name of the method, for errors.
        other: what to do with activations the rule does not define.
    """

    def __init__(self, where: str, rule: ReluRule = "guided", other: OtherActivations = "error") -> None:
        if other not in OTHER_ACTIVATIONS:
            refuse(where, "other_activations", f"be one of {', '.join(map(repr, OTHER_ACTIVATIONS))}", repr(other))
        self.where, self.rule, self.other = where, rule, other
        self.met = 0
        self._generalised: set[Any] = set()

    def recording(self) -> TorchFunctionMode:
        """Return the context that replaces ReLU calls while the forward pass runs."""
        return _Recorder(self)

    def relu(self, input: Tensor, upper: float = float("inf")) -> Tensor:
        """Return min(max(input, 0), upper), whose backward follows the rule in force when it runs."""
        self.met += 1
        result: Tensor = _Relu.apply(input, upper, self)  # type: ignore[no-untyped-call]
        return result

    def generalise(self, output: Tensor) -> Tensor:
        """Let gradients into the activation `output` pass where they and the output are positive."""
        if output.grad_fn is not None:
            self.met += 1
            self._generalised.add(output.grad_fn)
            positive = output.detach() > 0
            output.register_hook(lambda grad: grad if self.rule == "plain" else grad.clamp_min(0) * positive)
        return output

    def finish(self, score: Tensor) -> None:
        """Hook the ReLUs that the forward pass did not show, and refuse what the rule does not define.

        Raises:
            NotApplicable: an activation the rule does not define and no `other_activations`, or no ReLU at all.
        """
        undefined: dict[str, None] = {}
        for node in _graph(score.grad_fn):
            name = node.name()
            if _is_relu(node, name):
                self.met += 1
                self._hook(node)
            elif name in _UNDEFINED and node not in self._generalised:
                undefined[_UNDEFINED[name]] = None
            elif name.startswith("Hardtanh") and node not in self._generalised:
                undefined["Hardtanh"] = None
            elif hasattr(node, "_forward_cls") and node._forward_cls is not _Relu:
                undefined[f"{node._forward_cls.__name__.removesuffix('Backward')} (a custom autograd function)"] = None
        if undefined and self.other != "plain":
            names = ", ".join(sorted(undefined))
            allowed = "'plain'" if self.other == "generalised" else "'plain' or 'generalised'"
            raise NotApplicable(
                f"{self.where}: the rule is defined for ReLU only, and the network has {names}; "
                f"pass other_activations={allowed} to go on"
            )
        if self.met == 0 and self.other != "plain":
            raise NotApplicable(
                f"{self.where}: no ReLU was met between the score and the inputs, so the result would be the plain gradient; "
                "pass other_activations='plain' if that is what you want"
            )

    def _hook(self, node: Any) -> None:
        incoming: list[Tensor] = []
        node.register_prehook(lambda grads: incoming.__setitem__(slice(None), grads))

        def apply(grads: tuple[Tensor | None, ...], _: Any) -> Any:
            if self.rule == "plain" or grads[0] is None:
                return grads
            # guided: the gate has been applied, so only the sign of the gradient is left; deconvnet: the gate is ignored
            source = grads[0] if self.rule == "guided" else incoming[0]
            ruled = source.clamp_min(0)
            if self.rule == "guided" and node.name().startswith("Clamp"):  # whose own gate is open at its bounds, too
                values, upper = node._saved_self, getattr(node, "_saved_max", None)
                ruled = ruled * (values > 0) * (True if upper is None else values < upper)
            return (ruled, *grads[1:])

        node.register_hook(apply)


_RULE_NUMBERS: dict[ReluRule, int] = {"plain": 0, "guided": 1, "deconvnet": 2}


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, upper: float, rules: ReluRules) -> Tensor:
        output, gates = ops.guided_relu(input, upper=upper)
        ctx.save_for_backward(gates)
        ctx.rules = rules
        ctx.channels_last = output.ndim == 4 and not output.is_contiguous()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gates,) = ctx.saved_tensors
        return ops.guided_relu_backward(grads[0], gates, ctx.rules.rule, channels_last=ctx.channels_last), None, None


class _Recorder(TorchFunctionMode):
    def __init__(self, rules: ReluRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            replaced = handler(self.rules, *args, **kwargs)
            if replaced is not None:
                return replaced
        if self.rules.other == "generalised" and func in _GENERALISABLE and torch.is_grad_enabled():
            return self.rules.generalise(func(*args, **kwargs))
        return func(*args, **kwargs)


def _relu(rules: ReluRules, input: Tensor, inplace: bool = False) -> Tensor:
    output = rules.relu(input)
    return input.copy_(output) if inplace else output


def _relu_(rules: ReluRules, input: Tensor) -> Tensor:
    return _relu(rules, input, inplace=True)


def _relu6(rules: ReluRules, input: Tensor, inplace: bool = False) -> Tensor:
    output = rules.relu(input, 6.0)
    return input.copy_(output) if inplace else output


def _hardtanh(
    rules: ReluRules, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor | None:
    if min_val != 0 or max_val <= 0:
        return None
    output = rules.relu(input, float(max_val))
    return input.copy_(output) if inplace else output


def _hardtanh_(rules: ReluRules, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor | None:
    return _hardtanh(rules, input, min_val, max_val, inplace=True)


_HANDLERS: dict[Any, Callable[..., Tensor | None]] = {
    torch.relu: _relu,
    torch.relu_: _relu_,
    torch.Tensor.relu: _relu,
    torch.Tensor.relu_: _relu_,
    F.relu: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh_,
}


def _graph(root: Any) -> Iterator[Any]:
    """Yield every autograd node that leads to the score, once."""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def _is_relu(node: Any, name: str) -> bool:
    """Whether an autograd node is a ReLU under another name: threshold(0), hardtanh(0, m), clamp(min=0)."""
    if name == "ReluBackward0":
        return True
    if name.startswith("Threshold"):
        return bool(node._saved_threshold == 0)
    if name.startswith("Hardtanh"):
        return bool(node._saved_min_val == 0)
    if name in ("ClampBackward1", "ClampMinBackward0"):
        return bool(node._saved_min == 0)
    return False
