"""Traces a model and folds what is constant at inference: batch norm and zero padding into convolutions, dropout away.

The result is a `torch.fx.GraphModule` that computes the same function with fewer passes over memory; nothing of the original
model is changed. What is not recognised stays as it was traced.
"""

import contextlib
import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_leaves, tree_map

from pysal._checks import first_line
from pysal.engine.graph.aten import normalise
from pysal.engine.graph.attention import open_attention
from pysal.engine.graph.constants import fold_constants
from pysal.engine.graph.graph_module import Graph, line_of, quiet, remove_unread
from pysal.engine.graph.shapes import SHAPE
from pysal.engine.graph.written_part import return_what_is_written
from pysal.engine.model.model_state import ModelState
from pysal.engine.running.states import restoring, undo_later

_CONVOLUTIONS = (torch.conv2d, F.conv2d)
_DIVISIONS = (operator.truediv, torch.div, torch.true_divide)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_IDENTITIES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


class Convolution(nn.Module):
    """A 2-D convolution with zero padding that may differ from side to side.

    Attributes:
        weight: (K, C / groups, kh, kw).
        bias: (K,) or None.
        padding: zeros on the left, right, top and bottom.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @property
    def symmetric(self) -> tuple[int, int] | None:
        """Padding as convolutions take it, (height, width), or None where opposite sides differ."""
        left, right, top, bottom = self.padding
        return (top, left) if left == right and top == bottom else None

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W)."""
        if self.symmetric is None:
            return F.conv2d(F.pad(input, self.padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(input, self.weight, self.bias, self.stride, self.symmetric, self.dilation, self.groups)

    def scaled(self, factor: Tensor, shift: Tensor) -> "Convolution":
        """Return the convolution followed by `factor * result + shift` per channel, folded in float64."""
        weight = self.weight.double() * factor.view(-1, 1, 1, 1)
        bias = shift if self.bias is None else self.bias.double() * factor + shift
        dtype = self.weight.dtype
        return Convolution(weight.to(dtype), bias.to(dtype), self.stride, self.padding, self.dilation, self.groups)


class NotTraceable(Exception):
    """A model cannot be traced; the message says why, to its user."""


def fold(model: nn.Module) -> fx.GraphModule:
    """Return the folded graph of a model in eval mode.

    Raises:
        NotTraceable: the model cannot be traced: control flow that depends on tensors, for one.
    """
    return fold_graph(trace(model)[0])


def fold_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Fold what `trace` returned, in place, and return it."""
    return_what_is_written(graph)
    _remove_checks_of_rank(graph)
    open_attention(graph)
    _remove_identities(graph)
    fold_constants(graph)
    _reshape_for_view(graph)
    _unify_convolutions(graph)
    _fold_padding(graph)
    _unify_batch_norms(graph)
    _fold_batch_norm(graph)
    remove_unread(graph)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


@restoring
def trace(model: nn.Module) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """Return the graph of a copy of a model in eval mode, and what its forward pass writes: (module's name, attribute).

    Raises:
        NotTraceable: whatever torch.fx or the model's own code makes of a pass without values.
    """
    with _TRACING, torch.enable_grad():
        snapshot = copied(model).requires_grad_(False)
        state = ModelState(snapshot)
        tracer = _Tracer()
        undo_later(functools.partial(_unpatch, getattr(_symbolic_trace, "_is_fx_tracing_flag", False)))
        try:
            with tracer.custom_functions(), quiet():
                graph: fx.GraphModule = Graph(snapshot, tracer.trace(snapshot))
        except Exception as error:  # tracing runs the model's own code, which may fail in any way
            raise NotTraceable(_reason(error)) from error
    written = names_of_written(state)
    graph.meta["runs"] = tracer.runs
    normalise(graph)  # of a program of torch.export inside of it
    return graph, written


def copied(model: nn.Module, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy of a model, with what a pass left on it.

    Args:
        model: the model.
        shared: its modules that are a part of the copy, too.

    Raises:
        NotTraceable: it cannot be copied.
    """
    memo: dict[int, Any] = {id(module): module for module in shared}
    left = [tensor for tensor in ModelState(model).tensors.values() if tensor.grad_fn is not None]
    memo |= {id(tensor): tensor.detach().clone() for tensor in left}  # which torch does not copy
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise NotTraceable(f"it cannot be copied: {first_line(error)}") from error


def names_of_written(state: ModelState) -> list[tuple[str, str]]:
    """Return (module's name, attribute) of what a pass wrote since a state was noted.

    Raises:
        NotTraceable: numbers and words are among it, by which a later pass may decide.
    """
    written = state.written()
    for prefix, name, value in written:
        if isinstance(value, (bool, int, float, str)):
            raise NotTraceable(f"its forward pass changes its own attribute {prefix + name!r}")
    return [(prefix, name) for prefix, name, _ in written]


# torch.fx, and what is done to autograd's functions here, puts methods into classes for the time of a trace.
_TRACING = threading.Lock()


def _reason(error: Exception) -> str:
    """Return in a user's words why torch.fx gave up."""
    text = first_line(error)
    if "control flow" in text:
        return "its forward pass decides by values or sizes that it computes from the images"
    if "cannot be iterated" in text:
        return "its forward pass takes a tensor apart, as many pieces as it turns out to have"
    return f"its forward pass does more than to call torch's operations{line_of(error)}"


def detached(value: Any) -> Any:
    """Return what a pass without gradients leaves of a value: the tensors in it without their history."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def _unpatch(tracing: bool) -> None:
    """Take away what a trace that did not end puts in the place of nn.Module's own methods and of functions."""
    patcher = getattr(_symbolic_trace, "CURRENT_PATCHER", None)
    if patcher is not None and not tracing:
        for patch in reversed(patcher.patches_made):
            with contextlib.suppress(KeyError):  # of a name that is gone already
                patch.revert()
        patcher.patches_made.clear()
    if hasattr(_symbolic_trace, "_is_fx_tracing_flag"):
        _symbolic_trace._is_fx_tracing_flag = tracing


class _Tracer(fx.Tracer):
    """Sees a batch norm under another class name for what it is, and notes in `meta["layers"]` what each module returned.

    What torch.fx does not see comes into the graph, too: what runs without gradients is followed by `detached`, and a custom
    autograd function, whose backward pass may be anything, is one node.

    Attributes:
        runs: module name -> how often it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}
        self._thread = threading.get_ident()  # torch.fx changes nn.Module for all, and others may run models meanwhile

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Return what stands for a node's value."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind in ("call_function", "call_method", "call_module") and not torch.is_grad_enabled():
            return super().create_proxy("call_function", detached, (proxy,), {})
        return proxy

    @contextlib.contextmanager
    def custom_functions(self) -> Iterator[None]:
        """Make a node of every custom autograd function that is given something unknown."""
        function = torch.autograd.Function
        apply = function.__dict__["apply"]
        undo_later(functools.partial(setattr, function, "apply", apply))

        def recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
            own = apply.__get__(None, cls)
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                # torch.fx would look for torch's own method by its name
                return self.create_proxy("call_function", lambda *args, **kwargs: own(*args, **kwargs), args, kwargs)
            return own(*args, **kwargs)

        function.apply = classmethod(recorded)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            function.apply = apply  # type: ignore[method-assign]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        run = self.runs.get(name, 0)
        self.runs[name] = run + 1
        if isinstance(result, fx.Proxy):
            result.node.meta.setdefault("layers", []).append((name, run))
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a module's attribute, or what stands for it."""
        own = threading.get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return the root's forward pass with the images alone as what is not known: other arguments take their defaults."""
        return self.root.forward, [self.create_proxy("placeholder", "images", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is nn.BatchNorm2d.forward or super().is_leaf_module(m, module_qualified_name)


def module_of(graph: fx.GraphModule, node: object) -> nn.Module | None:
    """Return the module a node calls, or None where it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph.get_submodule(str(node.target))
    return None


def replace_by_module(graph: fx.GraphModule, node: fx.Node, module: nn.Module, *inputs: fx.Node) -> fx.Node:
    """Put a call of `module` in the place of a node and return the new node."""
    name = f"folded_{node.name}"
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(node):
        new = graph.graph.call_module(name, inputs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def constant(graph: fx.GraphModule, node: object) -> Tensor | None:
    """Return the parameter or buffer that a node fetches."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    return value if isinstance(value, Tensor) else None


def _remove_checks_of_rank(graph: fx.GraphModule) -> None:
    """Take away what asserts how many dimensions a value has, where that was noted: it would stand beside what is fused.

    The number is the same for all images that the graph is used for. timm's batch norms and linear layers ask so.
    """
    for node in list(graph.graph.nodes):
        shape = node.meta.get(SHAPE)
        for question in list(node.users) if shape is not None else ():
            if not _is_rank(question):
                continue
            for comparison in list(question.users):
                holds = comparison.target is operator.eq and comparison.args in ((question, len(shape)), (len(shape), question))
                for check in list(comparison.users) if holds else ():
                    if check.target is torch._assert and check.args[:1] == (comparison,):
                        graph.graph.erase_node(check)
                if not comparison.users:
                    graph.graph.erase_node(comparison)
            if not question.users:
                graph.graph.erase_node(question)


def _is_rank(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("dim", "ndimension") and len(node.args) == 1
    return node.target is getattr and node.args[1:] == ("ndim",)


def _remove_identities(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if isinstance(module_of(graph, node), _IDENTITIES) or _is_dropout_at_rest(node):
            node.args[0].meta["layers"] = [*node.args[0].meta.get("layers", ()), *node.meta.get("layers", ())]
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _is_dropout_at_rest(node: fx.Node) -> bool:
    """Say whether a node calls a dropout of torch or torchvision that is told it is not training."""
    name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _DROPOUTS:
        place = 2
    elif name == "stochastic_depth" and home.partition(".")[0] == "torchvision":
        place = 3
    else:
        return False
    training = node.args[place] if len(node.args) > place else node.kwargs.get("training", True)
    return training is False


def _reshape_for_view(graph: fx.GraphModule) -> None:
    """Let what looked at a contiguous map as a matrix take one in channels_last order, too."""
    for node in graph.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not node.kwargs:
            if len(node.args) > 2 or isinstance(node.args[1], (int, tuple, list)):  # one argument may be a dtype
                node.target = "reshape"


def pair(value: Any) -> tuple[Any, Any]:
    """Return what one number, or one or two in a sequence, say of (rows, columns)."""
    if not isinstance(value, (tuple, list)):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _unify_convolutions(graph: fx.GraphModule) -> None:
    """Turn nn.Conv2d and F.conv2d with constant weights into `Convolution`."""
    for node in list(graph.graph.nodes):
        module = module_of(graph, node)
        found: tuple[Any, ...] | None = None
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            found = (module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
            source = node.args[0] if node.args else node.kwargs["input"]
        elif node.op == "call_function" and node.target in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            given |= dict(zip(names, node.args, strict=False)) | node.kwargs
            weight, bias = constant(graph, given["weight"]), constant(graph, given["bias"])
            if weight is not None and (bias is not None or given["bias"] is None):
                found = (weight, bias, given["stride"], given["padding"], given["dilation"], given["groups"])
                source = given["input"]
        if found is None:
            continue
        weight, bias, stride, padding, dilation, groups = found
        stride, dilation = pair(stride), pair(dilation)
        sides = _sides(padding, tuple(weight.shape[2:]), stride, dilation)
        if sides is not None:
            replace_by_module(graph, node, Convolution(weight, bias, stride, sides, dilation, groups), source)


def _sides(
    padding: Any, kernel: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Return (left, right, top, bottom) zeros for a convolution's `padding` argument."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            return None
        extra = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        return extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2
    height, width = pair(padding)
    return width, width, height, height


def _zero_padding(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """Return the input and (left, right, top, bottom) of a node that pads a map with zeros."""
    module = module_of(graph, node)
    if isinstance(module, nn.ZeroPad2d):
        left, right, top, bottom = module.padding
        return node.args[0], (left, right, top, bottom)  # type: ignore[return-value]
    if node.op == "call_function" and node.target is F.pad:
        names = ("input", "pad", "mode", "value")
        given = {"mode": "constant", "value": None} | dict(zip(names, node.args, strict=False)) | node.kwargs
        pad = given["pad"]
        if given["mode"] == "constant" and not given["value"] and isinstance(pad, (tuple, list)) and len(pad) == 4:
            if all(isinstance(side, int) for side in pad):
                return given["input"], tuple(pad)  # type: ignore[return-value]
    return None


def _fold_padding(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        padding = _zero_padding(graph, node)
        users = [module_of(graph, user) for user in node.users]
        if padding is None or not users or not all(isinstance(user, Convolution) for user in users):
            continue
        source, sides = padding
        if min(sides) < 0:
            continue
        for user in users:
            assert isinstance(user, Convolution)
            left, right, top, bottom = (a + b for a, b in zip(user.padding, sides, strict=True))
            user.padding = (left, right, top, bottom)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def fold_division(graph: fx.GraphModule, shapes: Mapping[Any, tuple[int, ...]]) -> None:
    """Divide weights instead of images, where images are divided by a constant per channel before a convolution.

    The images of most models are, by their standard deviation. Zeros around them stay zeros.

    Args:
        graph: made by `fold`; changed in place.
        shapes: of what its nodes return.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _DIVISIONS or len(node.args) != 2 or node.kwargs:
            continue
        source, divisor = node.args[0], constant(graph, node.args[1])
        shape = shapes.get(node)
        if divisor is None or shape is None or len(shape) != 4 or shapes.get(source) != shape:
            continue
        if divisor.numel() not in (1, shape[1]) or divisor.expand(1, *shape[1:]).stride()[2:] != (0, 0):
            continue
        users = [user for user in node.users if user.target != "size"]
        convolutions = [module_of(graph, user) for user in users]
        if not users or not all(isinstance(each, Convolution) and each.groups == 1 for each in convolutions):
            continue
        by_channel = divisor.detach().double().expand(1, *shape[1:])[:, :, :1, :1]
        if not (by_channel.isfinite() & (by_channel != 0)).all():
            continue
        for user, each in zip(users, convolutions, strict=True):
            assert isinstance(each, Convolution)
            weight = (each.weight.double() / by_channel).to(each.weight.dtype)
            made = Convolution(weight, each.bias, each.stride, each.padding, each.dilation, each.groups)
            graph.add_submodule(str(user.target), made)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def _unify_batch_norms(graph: fx.GraphModule) -> None:
    """Turn F.batch_norm of maps with constant statistics into nn.BatchNorm2d: so timm's layers spell it."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not F.batch_norm:
            continue
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
        given |= dict(zip(names, node.args, strict=False)) | node.kwargs
        constants = [constant(graph, given[name]) for name in names[1:5]]
        known = all(value is not None or given[name] is None for value, name in zip(constants, names[1:5], strict=True))
        mean, var, weight, bias = constants
        if not known or mean is None or var is None or given["training"] is not False or not isinstance(given["eps"], float):
            continue
        if not isinstance(module_of(graph, given["input"]), Convolution) and len(given["input"].meta.get(SHAPE, ())) != 4:
            continue
        norm = nn.BatchNorm2d(len(mean), given["eps"], affine=False).eval()
        norm.running_mean, norm.running_var = mean, var
        norm.register_parameter("weight", None if weight is None else nn.Parameter(weight, requires_grad=False))
        norm.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        replace_by_module(graph, node, norm, given["input"])


def _fold_batch_norm(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        norm = module_of(graph, node)
        if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue
        source = node.args[0]
        convolution = module_of(graph, source)
        if not isinstance(convolution, Convolution) or len(source.users) != 1:
            continue
        factor = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.detach().double()
        shift = -norm.running_mean.detach().double() * factor
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        graph.add_submodule(str(source.target), convolution.scaled(factor, shift))
        source.meta["layers"] = node.meta.get("layers", [])  # the convolution's own result is gone
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
