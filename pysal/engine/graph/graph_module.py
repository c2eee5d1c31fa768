"""Graphs as they are kept here: modules that say nothing of their own, and what is done to any of them."""

import contextlib
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

_LOGGERS = (  # a logger's switch is not that of those below it
    "torch.export",
    "torch.export._trace",
    "torch.export.dynamic_shapes",
    "torch._export.non_strict_utils",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.recording",
)
# Code of these is not the model's own.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
_IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
)


class Graph(fx.GraphModule):
    """A graph whose errors are raised, and not also written to standard error, as those of torch.fx's own class are."""

    def recompile(self) -> Any:
        """Make the forward pass of what the graph is now."""
        code = super().recompile()
        type.__setattr__(type(self), "__call__", nn.Module.__call__)  # of a class that is this instance's alone
        return code


def writes(node: fx.Node) -> bool:
    """Say whether a node may write into its first argument."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def is_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node may write into its first argument, modules and functions of torch with `inplace` among them."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    functional = getattr(node.target, "__module__", "") == F.__name__  # whose last argument may be `inplace`
    return writes(node) or (functional and any(argument is True for argument in node.args[1:]))


def remove_unread(graph: fx.GraphModule) -> None:
    """Take away nodes whose values nobody reads, in place, but for those that write, into a view of what others read."""

    def stays(node: fx.Node) -> bool:
        return is_in_place(graph, node) or isinstance(node.kwargs.get("out"), fx.Node) or node.is_impure()

    graph.graph.eliminate_dead_code(stays)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from writing what becomes a sentence of the report."""
    loggers = {logger: logger.disabled for logger in map(logging.getLogger, _LOGGERS)}
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in loggers.items():
            logger.disabled = before


def line_of(error: BaseException) -> str:
    """Return where in the model's own code an error came up, for the end of a sentence."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_MODEL, "<")):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
