"""Captures a model by torch.export, where torch.fx does not get through it, and reads programs that torch.export has made.

torch.export runs the model's own Python on tensors without values and writes down the operations that are called, for batches
of any length. Code that decides by sizes, dictionaries and classes, which torch.fx refuses, is no hindrance to it.
"""

import functools
import importlib
import operator
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_leaves

from pysal._interrupts import import_whole
from pysal.engine.graph.aten import normalise
from pysal.engine.graph.fold import NotTraceable, copied, detached, names_of_written
from pysal.engine.graph.graph_module import Graph, line_of, quiet
from pysal.engine.graph.programs import LayeredProgram, is_program, returned_by
from pysal.engine.model.model_state import ModelState
from pysal.engine.running.states import Hooks, restoring, undo_later

_LIBRARY = torch.library.Library("pysal_capture", "DEF")
_LIBRARY.define("returned(Tensor value, str name, int run) -> ()")
_LIBRARY.impl("returned", lambda value, name, run: None, "CompositeExplicitAutograd")
# What says, in a captured graph, that a run of a module returned a value.
_RETURNED = torch.ops.pysal_capture.returned.default
fx.node.has_side_effect(_RETURNED)
# torch.export notes for all threads what it is at, and `len` stands for another thing in modules that all threads share.
_CAPTURING = threading.RLock()


def capture(model: nn.Module, images: Tensor, *, any_number: bool = True) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """Return the graph of a copy of a model in eval mode, and what its forward pass writes, as `fold.trace` does.

    Args:
        model: the model, or what torch.export made.
        images: (N, C, H, W), at least two where any number is to be taken.
        any_number: whether the graph takes any number of images, not N alone.

    Raises:
        NotTraceable: the model cannot be captured; the message says why, to its user.
    """
    if isinstance(model, LayeredProgram):
        return graph_of_module(model.given), []
    import_whole("torch.export._trace")
    with _CAPTURING:
        return _captured(model, images, any_number)


@restoring
def _captured(model: nn.Module, images: Tensor, any_number: bool) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    with quiet():
        # programs, which hold tensors without values, are not copied: their forward passes write nothing
        snapshot = copied(model, [module for module in model.modules() if is_program(module)])
    state, hooks, runs, written = ModelState(snapshot), Hooks(), dict[str, int](), list[tuple[str, str]]()
    for name, module in snapshot.named_modules():
        if name:
            hooks.add(module, _noting(name, runs))
    shapes = ({0: Dim("images")},) if any_number else None
    globals_of_code = _globals_of(snapshot)
    undo_later(functools.partial(_forget_length, globals_of_code))
    exporter = vars(importlib.import_module("torch.export._trace"))
    undo_later(functools.partial(exporter.pop, "print", None))
    with torch.enable_grad(), quiet():
        try:
            exporter["print"] = lambda *_, **__: None  # which writes the graph so far to standard error
            for names in globals_of_code:
                names.setdefault("len", _length)
            alone = _Alone(snapshot, lambda: written.extend(names_of_written(state)))
            program = export(alone, (images,), dynamic_shapes=shapes, strict=False)
        except NotTraceable:
            raise
        except Exception as error:  # which the model's own code may raise, too
            raise NotTraceable(_reason(error)) from error
        finally:
            hooks.close()
            exporter.pop("print", None)
            _forget_length(globals_of_code)
    return graph_of(program, runs), written


def _length(value: Any) -> Any:
    """Return what `len` does, of tensors the length that torch.export keeps open, where `len` would make it a number."""
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else len(value)


def _globals_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of the code of a model's own classes, in which a name of Python's can stand for another thing."""
    functions = (
        function
        for kind in {type(module) for module in model.modules()}
        for base in kind.__mro__
        if base.__module__.partition(".")[0] not in ("torch", "builtins")
        for function in vars(base).values()
        if isinstance(function, types.FunctionType)
    )
    return list({id(function.__globals__): function.__globals__ for function in functions}.values())


def _forget_length(globals_of_code: list[dict[str, Any]]) -> None:
    for names in globals_of_code:
        if names.get("len") is _length:
            del names["len"]


class _Alone(nn.Module):
    """A model that is called with images alone, whatever else it could be called with, and looked at after it.

    torch.export puts back afterwards what a forward pass has written.
    """

    def __init__(self, model: nn.Module, look: Callable[[], None]) -> None:
        super().__init__()
        self.model, self._look = model, look

    def forward(self, images: Tensor) -> Any:
        """Return what the model returns."""
        found = self.model(images)
        self._look()
        return found


def graph_of(program: ExportedProgram, runs: Mapping[str, int] | None = None) -> fx.GraphModule:
    """Return the graph of a program that takes one batch of images and returns one tensor; see `capture`.

    Args:
        program: the program.
        runs: of its modules, where it says itself what they returned; None = see `returned_by`.

    Raises:
        NotTraceable: it takes or returns something else, or writes what it holds.
    """
    written = list(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise NotTraceable(f"its forward pass writes its own tensor {written[0]!r} each time")
    with quiet():
        return graph_of_module(program.module(), runs)


def graph_of_module(module: fx.GraphModule, runs: Mapping[str, int] | None = None) -> fx.GraphModule:
    """Return the graph of what `ExportedProgram.module` returned; see `graph_of`."""
    copy = _Copy(runs)
    outputs = tree_leaves(copy.of(module))
    inputs = [node for node in copy.graph.nodes if node.op == "placeholder"]
    read = [node for node in inputs if node.users]
    if len(read) > 1 or not inputs:
        raise NotTraceable(f"it takes {len(read)} tensors, not one batch of images")
    for node in inputs:
        if node is not (read or inputs)[0]:
            copy.graph.erase_node(node)
    if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
        raise NotTraceable(f"it returns {len(outputs)} values, not one tensor")
    copy.graph.output(outputs[0])
    graph = Graph(copy.root, copy.graph)
    graph.meta["runs"] = copy.runs
    normalise(graph)
    return graph


class _Copy:
    """A graph that is copied from those of a program, with what runs without gradients as a part of it.

    Args:
        runs: see `graph_of`.

    Attributes:
        graph: the copy.
        root: its weights.
        runs: module name -> how often it ran.
    """

    def __init__(self, runs: Mapping[str, int] | None) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.noted, self.runs = runs is not None, dict(runs or {})
        self._held: dict[int, str] = {}

    def of(self, module: fx.GraphModule, inputs: Sequence[Any] | None = None) -> Any:
        """Copy the nodes of a module and return what stands for its output.

        Args:
            module: the module.
            inputs: what stands for its placeholders; None = they are copied.
        """
        made: dict[fx.Node, Any] = {}
        given = None if inputs is None else iter(inputs)

        def of(value: Any) -> Any:
            return fx.node.map_arg(value, made.__getitem__)

        for node in module.graph.nodes:
            if node.op == "output":
                found = of(node.args[0])
            elif node.op == "placeholder" and given is not None:
                made[node] = next(given)
            elif node.op == "get_attr":
                made[node] = self._attribute(module, str(node.target))
            elif node.target is _RETURNED:
                value, name, run = of(node.args)
                if isinstance(value, fx.Node):
                    value.meta.setdefault("layers", []).append((name, run))
            elif node.op == "call_module":
                if node.users:
                    raise NotTraceable(f"it calls its module {str(node.target)!r} in a way of its own")
            elif isinstance(node.target, HigherOrderOperator):
                made[node] = self._part(node.target.__name__, of(node.args))
            elif node.target is operator.getitem and isinstance(made.get(node.args[0]), (tuple, list)):
                made[node] = made[node.args[0]][node.args[1]]
            else:
                made[node] = self.graph.node_copy(node, made.__getitem__)
                made[node].meta = {}
        for name, _, run, node in () if self.noted else returned_by(module):
            self.runs[name] = max(self.runs.get(name, 0), run + 1)
            if isinstance(made.get(node), fx.Node):
                made[node].meta.setdefault("layers", []).append((name, run))
        return found

    def _part(self, kind: str, args: tuple[Any, ...]) -> Any:
        """Copy what runs in a mode of its own, and return what stands for its output."""
        if kind == "wrap_with_set_grad_enabled":
            enabled, part, *rest = args
            inside = self.of(part, rest)
            return inside if enabled else self._without_gradients(inside)
        if kind == "wrap_with_autocast":
            _device, _dtype, enabled, _cache, part, *rest = args
            if not enabled:
                return self.of(part, rest)
            raise NotTraceable("a part of it runs under autocast")
        raise NotTraceable("a part of it is a branch, a loop or another construct that torch keeps as it is")

    def _attribute(self, module: nn.Module, name: str) -> Any:
        """Return what stands for an attribute: a node with a tensor of the copy's own, or a part of the program itself."""
        value: Any = module
        for step in name.split("."):
            value = getattr(value, step)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._held:
            self._held[id(value)] = own = f"tensor_{len(self._held)}"
            self.root.register_buffer(own, value.detach().clone())
        return self.graph.get_attr(self._held[id(value)])

    def _without_gradients(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: self.graph.call_function(detached, (node,)))


def _noting(name: str, runs: dict[str, int]) -> Callable[..., None]:
    """Return a hook that notes in the graph that a run of a module returned a value."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        run = runs.get(name, 0)
        runs[name] = run + 1
        if isinstance(output, Tensor):
            _RETURNED(output, name, run)

    return hook


def _reason(error: Exception) -> str:
    """Return in a user's words why torch.export gave up."""
    kind, text = type(error).__name__, str(error)
    at = line_of(error)
    if "DataDependent" in kind or "data-dependent" in text or "Unbacked" in text:
        return f"its forward pass decides by values that it computes from the images{at}"
    if "onstraint" in text and "images" in text:
        return "it takes a fixed number of images, not batches of any number"
    if "attribute" in text and ("assign" in text or "mutat" in text):
        return "its forward pass changes its own attributes"
    return f"its forward pass does more than to call torch's operations{at}"
