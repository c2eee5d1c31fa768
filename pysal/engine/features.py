"""Captures the activation of one layer, by module or by name, without keeping the graph below it."""

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.not_applicable import NotApplicable


@dataclass(frozen=True)
class Layer:
    """A module of a model, and which tensor of which of its runs in one forward pass is meant.

    Attributes:
        name: what errors call it.
        module: the module.
        run: counted from 0; None = its only one, "last" = its last one.
        at_input: its input is meant, not its output; the gradient there is that of all who use that tensor.
        index: which entry, where that is a tuple or a list.
    """

    name: str
    module: nn.Module
    run: int | Literal["last"] | None = None
    at_input: bool = False
    index: int = 0


class Features:
    """The activation of a layer in one forward pass: a tensor in the autograd graph, once the layer has run."""

    def __init__(self, where: str, layer: Layer) -> None:
        self.where, self.layer = where, layer
        self.activation: Tensor | None = None

    def captured(self) -> Tensor:
        """Return the activation.

        Raises:
            ValueError: the layer did not run.
        """
        if self.activation is None:
            raise ValueError(f"{self.where}: layer {self.layer.name!r} must run in the model's forward pass, got no run")
        return self.activation

    def used(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the score at the activation.

        Raises:
            ValueError: there is none.
        """
        if gradient is None:
            requirement = "must lead to the score, got one that the score does not depend on"
            raise ValueError(f"{self.where}: layer {self.layer.name!r} {requirement}")
        return gradient


def find_layer(where: str, model: object, layer: str | nn.Module) -> Layer:
    """Return a layer of `model` by its name or module.

    Raises:
        TypeError: the model is not an nn.Module, or `layer` neither a name nor a module.
        ValueError: there is no such layer in the model.
    """
    if not isinstance(model, nn.Module):
        refuse(where, "model", "be an nn.Module, whose layers can be captured", type(model).__name__, TypeError)
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return Layer(layer, modules[layer])
        close = [name for name in modules if layer and layer in name][-3:] or difflib.get_close_matches(layer, modules)
        hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
        refuse(where, "layer", f"be the name of a module of the model{hint}", repr(layer))
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return Layer(name, module)
        refuse(where, "layer", "belong to the model", type(layer).__name__)
    refuse(where, "layer", "be a module or its name", repr(layer), TypeError)


def default_layer(where: str, model: object, look: Callable[[], None]) -> Layer:
    """Return the last layer that returned a spatial map (N, C, h, w), h w > 1, in the forward pass that `look` runs.

    Raises:
        NotApplicable: the model is not an nn.Module, or no layer returned one.
    """
    if not isinstance(model, nn.Module):
        requirement = "be an nn.Module, whose layers can be captured"
        refuse(where, "model", requirement, type(model).__name__, NotApplicable)
    runs: dict[str, int] = {}
    last: list[Layer] = []
    thread = threading.get_ident()  # the model may run in others at the same time

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            runs[name] = runs.get(name, -1) + 1
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                last[:] = [Layer(name, module, runs[name])]

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        look()
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise NotApplicable(f"{where}: the model has no layer with a spatial map (N, C, h, w); pass layer= and tokens=")
    return last[0]


@contextlib.contextmanager
def capture(where: str, layer: Layer, *, cut: bool) -> Iterator[Features]:
    """Capture a layer's output (or input) in the forward pass that runs inside the block.

    Args:
        where: the public name of the method, for errors.
        layer: what to capture.
        cut: start the autograd graph at this layer: the pass runs without gradients up to it and with gradients after,
            so nothing below it is kept. Otherwise the activation stays part of the graph from the inputs.

    Raises:
        ValueError: the layer ran more than once where its only run was meant, or returned no tensor.
    """
    features = Features(where, layer)
    marked: list[Tensor] = []
    runs = 0
    thread = threading.get_ident()  # the model may run in others at the same time

    def hook(_module: nn.Module, args: Any, output: Any = None) -> Any:
        nonlocal runs
        if threading.get_ident() != thread:
            return None
        runs += 1
        if layer.run is None and runs > 1:
            raise ValueError(f"{where}: layer {layer.name!r} must run once in a pass, got a second run: choose another layer")
        if layer.run not in (None, "last", runs - 1):
            return None
        value = args if layer.at_input else output
        sequence = isinstance(value, (tuple, list))
        tensor = value[layer.index] if sequence and len(value) > layer.index else value
        if not isinstance(tensor, Tensor):
            verb = "be given" if layer.at_input else "return"
            raise ValueError(f"{where}: layer {layer.name!r} must {verb} a tensor, got {type(value).__name__}")
        if cut:
            torch.set_grad_enabled(True)  # undone by the no_grad block around the whole pass
            tensor = tensor.detach().requires_grad_()
        elif not tensor.requires_grad:
            tensor.requires_grad_()  # a layer that the images do not reach
            marked.append(tensor)
        features.activation = tensor
        passed = tensor.clone()  # a ReLU that works in place after the layer must not overwrite what was captured
        if not sequence:
            return passed
        rest = (*value[: layer.index], passed, *value[layer.index + 1 :])
        return type(value)(*rest) if hasattr(value, "_fields") else type(value)(rest)

    register = layer.module.register_forward_pre_hook if layer.at_input else layer.module.register_forward_hook
    handle = register(hook)
    try:
        with torch.no_grad() if cut else contextlib.nullcontext():
            yield features
    finally:
        handle.remove()
        for tensor in marked:
            tensor.requires_grad_(False)
