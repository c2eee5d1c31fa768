"""Backward rules of ReLU at the operator: whatever spelling, module or function a network uses.

Two mechanisms, because neither sees everything. While the forward pass runs, a `TorchFunctionMode` replaces every ReLU call by
the fused op, which keeps one bit per element; a small pass, which would be over before that mode has seen its calls, goes
without. Afterwards the autograd graph between the images and the score is walked: a ReLU
that Python never called (inside a TorchScript module, a C++ composite) is found there and gets a hook, and so are the
activations a rule does not define. What is not on the way from the images, say a text encoder, is no concern of a rule.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, Protocol, Self, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from pysal import ops
from pysal._checks import check_choice
from pysal._names import PACKAGE
from pysal.engine.model.gradient_layouts import END
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.running.states import FunctionMode, kept

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
# Autograd nodes that stand for a whole compiled graph, in whose backward no rule can take part.
_HIDDEN = {
    "CompiledFunctionBackward": "torch.compile",
    "ApplyTemplateBackward": "torch.compile",
    "torch::jit::(anonymous namespace)::DifferentiableGraphBackward": "TorchScript, which has optimised its backward pass",
}
# Homes of custom autograd functions that are no activations: the bf16 backward of `precision`, hooks of modules.
_HARMLESS = (f"{PACKAGE}.engine.running.precision", "torch.nn.modules._functions")


class RecordedPass(Protocol):
    """What the rules need to know of a pass recorded on a tape."""

    @property
    def relus(self) -> int:
        """ReLUs that follow the rule of a sweep."""

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (output, input) of every part that ran under autograd."""


_current: ContextVar["_Recorder | None"] = kept(ContextVar("pysal_relu_rules", default=None))


def current_rules() -> "ReluRules | None":
    """Return the rules of the forward pass that is being recorded, for modules that apply them themselves."""
    recorder = _current.get()
    return recorder.rules if recorder is not None and recorder.open else None


class ReluRules:
    """Runs a forward pass so that its backward pass follows a rule, which may still be changed before each backward.

    Use: `with rules.recording(): score = f(model(x))`, then `rules.finish(score, x)`, then `rules.gradients(score, ends)`.

    Args:
        where: the public name of the method, for errors.
        rule: of the first backward.
        other: what to do with activations the rule does not define.
        kinds: the rules of all backwards, where these are known.
    """

    def __init__(
        self,
        where: str,
        rule: ReluRule = "guided",
        other: OtherActivations = "error",
        kinds: Collection[ReluRule] = ("plain", "guided", "deconvnet"),
    ) -> None:
        check_choice(where, "other_activations", other, OTHER_ACTIVATIONS)
        self.kinds = set(kinds)
        self.where, self.rule, self.other = where, rule, other
        self._generalised: set[Any] = set()
        self._finished = False

    def recording(self) -> FunctionMode:
        """Return the context that replaces ReLU calls while the forward pass runs, in a `restoring` function."""
        return _Recorder(self)

    def relu(self, input: Tensor, upper: float = float("inf")) -> Tensor:
        """Return min(max(input, 0), upper), whose backward follows the rule in force when it runs."""
        result: Tensor = _Relu.apply(input, upper, self)  # type: ignore[no-untyped-call]
        return result

    def generalise(self, output: Tensor) -> Tensor:
        """Let gradients into the activation `output` pass where they and the output are positive."""
        if output.grad_fn is not None and not self._finished:
            self._generalised.add(output.grad_fn)
            closed = output.detach() <= 0
            output.register_hook(lambda grad: grad if self.rule == "plain" else grad.clamp_min(0).masked_fill(closed, 0))
        return output

    def finish(self, score: Tensor, leaf: Tensor) -> None:
        """Hook the ReLUs that the forward pass did not show, and refuse what the rule does not define.

        Only what lies between `leaf` and the score counts. Does nothing where the score does not depend on `leaf`.

        Raises:
            NotApplicable: an activation the rule does not define and no `other_activations`, no ReLU at all, or a compiled
                graph, whose activations are out of reach.
        """
        nodes = _between(score, leaf)
        for tape in [node.tape for node in nodes if isinstance(node, BackwardCFunction) and hasattr(node, "tape")]:
            nodes += _nodes_of(tape)
        self._check(nodes, 0, reaches=bool(nodes))

    def gradients(self, score: Tensor, ends: Sequence[Tensor], *, retain_graph: bool) -> Sequence[Tensor | None]:
        """Return the gradients of a score (), None where it does not depend on an end.

        What lies in a checkpoint that is not reentrant runs again on the way back, where it must keep what it kept before:
        gates in the place of activations. A mode is off while torch works on tensors, not on edges of a graph.
        """
        edges = [get_gradient_edge(end) for end in ends]
        with self.recording():
            return torch.autograd.grad(get_gradient_edge(score), edges, retain_graph=retain_graph, allow_unused=True)

    def finish_tape(self, tape: RecordedPass) -> None:
        """Do the same for a recorded pass.

        Raises:
            NotApplicable: as `finish`.
        """
        self._check(_nodes_of(tape), tape.relus, reaches=True)

    def _check(self, nodes: list[Any], met: int, *, reaches: bool) -> None:
        """Hook and count the ReLUs among autograd nodes, `met` being known of, and refuse what is not allowed.

        Nothing is refused where the score does not depend on the images, that is, does not reach them.
        """
        self._finished = True  # what a checkpoint runs again on the way back is looked at no more
        generalised, self._generalised = self._generalised, set()
        undefined: dict[str, None] = {}
        for node in nodes:
            name = node.name()
            function = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
            if name in _HIDDEN:
                raise NotApplicable(
                    f"{self.where}: model must not be compiled, for the rule cannot reach the activations inside, "
                    f"got a graph of {_HIDDEN[name]}"
                )
            if function is not None and getattr(function, "follows_relu_rules", False):
                met += node.is_relu
            elif node in generalised:
                met += 1
            elif _is_relu(node, name):
                met += 1
                self._hook(node, name)
            elif name in _UNDEFINED:
                undefined[_UNDEFINED[name]] = None
            elif name.startswith("Hardtanh"):
                undefined["Hardtanh"] = None
            elif function is not None and function.__module__ not in _HARMLESS:
                undefined[f"{function.__name__} (a custom autograd function)"] = None
        if undefined and self.other != "plain":
            names = ", ".join(sorted(undefined))
            allowed = "'plain'" if self.other == "generalised" else "'plain' or 'generalised'"
            raise NotApplicable(
                f"{self.where}: the rule is defined for ReLU only, and the network has {names}; "
                f"pass other_activations={allowed} to go on"
            )
        if reaches and met == 0 and self.other != "plain":
            raise NotApplicable(
                f"{self.where}: no ReLU was met between the score and the inputs, so the result would be the plain gradient; "
                "pass other_activations='plain' if that is what you want"
            )

    def _hook(self, node: Any, name: str) -> None:
        if name == "ReluBackward0" and self.kinds == {"guided"}:  # most of them: the gate has been applied
            node.register_hook(_positive)
            return
        incoming: list[Tensor] = []
        closed: Tensor | None = None
        if name.startswith("Clamp"):  # whose own gate is open at its bounds, too
            values, upper = node._saved_self, getattr(node, "_saved_max", None)
            closed = values <= 0 if upper is None else (values <= 0) | (values >= upper)
        node.register_prehook(lambda grads: incoming.__setitem__(slice(None), grads))

        def apply(grads: tuple[Tensor | None, ...], _: Any) -> Any:
            if self.rule == "plain" or grads[0] is None:
                return grads
            # guided: the gate has been applied, so only the sign of the gradient is left; deconvnet: the gate is ignored
            source = grads[0] if self.rule == "guided" else incoming[0]
            passed = source.clamp_min(0)
            return (passed.masked_fill(closed, 0) if closed is not None and self.rule == "guided" else passed, *grads[1:])

        node.register_hook(apply)


def _positive(grads: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...] | None:
    """Return the positive part of the gradient that a ReLU passes on."""
    return None if grads[0] is None else (grads[0].clamp_min(0),)


class _Relu(torch.autograd.Function):
    follows_relu_rules = True  # each node says in `is_relu` whether it is one

    @staticmethod
    def forward(ctx: Any, input: Tensor, upper: float, rules: ReluRules) -> Tensor:
        output, gates = ops.guided_relu(input, upper=upper)
        ctx.save_for_backward(gates)
        ctx.rules, ctx.is_relu = rules, True
        ctx.set_materialize_grads(False)  # no gradient is none, not zeros: of what torch cannot differentiate
        ctx.channels_last = output.ndim == 4 and not output.is_contiguous()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return None, None, None
        (gates,) = ctx.saved_tensors
        return ops.guided_relu_backward(grads[0], gates, ctx.rules.rule, channels_last=ctx.channels_last), None, None


class _Recorder(FunctionMode):
    def __init__(self, rules: ReluRules) -> None:
        super().__init__()
        self.rules = rules

    def __enter__(self) -> Self:
        self._before = _current.get()
        _current.set(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _current.set(self._before)

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
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


def _nodes_of(tape: RecordedPass) -> list[Any]:
    return list(dict.fromkeys(node for output, input in tape.others() for node in _between(output, input)))


def _between(score: Tensor, leaf: Tensor) -> list[Any]:
    """Return every autograd node on a way from `leaf` to the score, once."""
    if score.grad_fn is None:
        return []
    start = get_gradient_edge(leaf).node
    users: dict[Any, list[Any]] = {score.grad_fn: []}
    found = [score.grad_fn]
    for node in found:  # which grows
        for parent, _ in node.next_functions:
            if parent in users:
                users[parent].append(node)
            elif parent is start or (parent is not None and type(parent) is not END):
                users[parent] = [node]
                found.append(parent)
    between = dict.fromkeys(users.get(start, ()))
    ways = list(between)
    for node in ways:  # likewise
        new = [user for user in dict.fromkeys(users[node]) if user not in between]
        between.update(dict.fromkeys(new))
        ways.extend(new)
    return ways


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
