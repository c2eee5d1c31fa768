"""Captures the activation of one layer, by module or by name, without keeping the graph below it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal._spelling import close_to, did_you_mean
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.running.states import Hooks


@dataclass(frozen=True)
class Layer:
    """A module of a model, and which tensor of which of its runs in one forward pass is meant.

    Attributes:
        name: of the module in its model.
        module: the module.
        run: counted from 0; None = its only one, "last" = its last one.
        at_input: its input is meant, not its output; the gradient there is that of all who use that tensor.
        index: which entry, where that is a tuple or a list.
        count: told in each run how many entries there are.
    """

    name: str
    module: nn.Module
    run: int | Literal["last"] | None = None
    at_input: bool = False
    index: int = 0
    count: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __hash__(self) -> int:
        """Return the hash of the name: layers of one name are few, and a call asks several times."""
        return hash(self.name)

    @property
    def label(self) -> str:
        """The name by which `find_layer` finds this run again: "act", or "act@3" for the fourth run of several."""
        return self.name if self.run is None else f"{self.name}@{-1 if self.run == 'last' else self.run}"


class Features:
    """The activation of a layer in one forward pass: a tensor in the autograd graph, once the layer has run."""

    def __init__(self, where: str, layer: Layer) -> None:
        self.where, self.layer = where, layer
        self.activation: Tensor | None = None
        self.over = False  # the forward pass; a checkpoint runs its part of it again on the way back
        self.hidden = False  # whether a run was inside torch.func
        self.runs = 0  # of the layer in the pass

    def captured(self) -> Tensor:
        """Return the activation, now that the forward pass is over.

        Raises:
            ValueError: the layer did not run.
            NotApplicable: it ran inside torch.func alone.
        """
        self.over = True
        if self.activation is None and self.hidden:
            raise NotApplicable(
                f"{self.where}: layer {self.layer.label!r} must run outside torch.func, got runs inside it alone"
            )
        if self.activation is None:
            raise ValueError(f"{self.where}: layer {self.layer.label!r} must run in the model's forward pass, got no run")
        return self.activation

    def used(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the score at the activation.

        Raises:
            NotApplicable: there is none.
        """
        if gradient is None:
            requirement = "must lead to the score, got one that the score does not depend on through torch"
            raise NotApplicable(f"{self.where}: layer {self.layer.label!r} {requirement}")
        return gradient


def find_layer(where: str, model: object, layer: str | nn.Module) -> Layer:
    """Return a layer of `model` by its name or module.

    "blocks.2" and "blocks[2]" are the third child of `blocks`, "blocks[-1]" is its last; "act@3" is the fourth run of `act` in
    a pass, "act@-1" its last.

    Raises:
        TypeError: the model is not an nn.Module, or `layer` neither a name nor a module.
        ValueError: there is no such layer in the model.
    """
    if not isinstance(model, nn.Module):
        refuse(where, "model", "be an nn.Module, whose layers can be captured", type(model).__name__, TypeError)
    modules = dict(model.named_modules())

    def found(name: str, run: int | Literal["last"] | None = None) -> Layer:
        if isinstance(modules[name], torch.jit.ScriptModule):
            refuse(where, "layer", "be a module that Python runs, not one of TorchScript", repr(layer))
        return Layer(name, modules[name], run)

    if isinstance(layer, str):
        if layer in modules:
            return found(layer)
        asked, at, run = layer.rpartition("@")
        if not (at and re.fullmatch(r"-1|\d{1,9}", run, re.ASCII)):
            asked, run = layer, ""
        asked = _dotted(asked, modules)
        if asked in modules:
            return found(asked, None if not run else "last" if run == "-1" else int(run))
        close = _run_in_brackets(layer, modules) or close_to(asked, reversed(modules))
        refuse(where, "layer", f"be the name of a module of the model{did_you_mean(list(map(repr, close)))}", repr(layer))
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return found(name)
        refuse(where, "layer", "belong to the model", type(layer).__name__)
    refuse(where, "layer", "be a module or its name", repr(layer), TypeError)


def _run_in_brackets(layer: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return what names a run where brackets stand behind a module without children."""
    written = re.fullmatch(r"(.+)\[(-1|\d{1,9})\]", layer, re.ASCII)
    if written is None or (name := _dotted(written[1], modules)) not in modules or any(modules[name].children()):
        return []
    return [f"{name}@{written[2]}"]


def _dotted(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a layer's name as `named_modules` has it: "blocks.2.conv" for "blocks[2].conv", or for "blocks[-1].conv"."""
    path = ""
    for step in re.split(r"\.|(?=\[)", name):
        index = re.fullmatch(r"\[(?:(-?\d{1,9})|'(.+)'|\"(.+)\")\]", step, re.ASCII)
        if index is not None:
            number = int(index[1]) if index[1] else 0
            if number < 0 and path in modules:
                number += len(modules[path]._modules)
            step = str(number) if index[1] else index[2] or index[3]
        path = f"{path}.{step}" if path else step
    return path


def capture(
    where: str, layer: Layer, hooks: Hooks, *, cut: bool, replace: Callable[[Tensor], Tensor] = torch.clone
) -> Features:
    """Return what captures a layer's output (or input) in the next forward pass.

    Args:
        where: the public name of the method, for errors.
        layer: what to capture.
        hooks: of the pass.
        cut: start the autograd graph at this layer: the pass, which begins without gradients, goes on with them from here, so
            nothing below is kept. Otherwise the activation stays part of the graph from the inputs.
        replace: what is passed on in the activation's place. A copy: a ReLU that works in place after the layer must not
            overwrite what was captured.

    Raises:
        ValueError: in the pass, where the layer ran more than once and its only run was meant, or returned no tensor.
    """
    features = Features(where, layer)

    def hook(_module: nn.Module, args: Any, output: Any = None) -> Any:
        features.runs += not features.over
        if layer.count is not None:
            entries = args if layer.at_input else output
            layer.count(len(entries) if isinstance(entries, (tuple, list)) else 1)
        if layer.run is None and features.runs > 1:
            raise ValueError(f"{where}: layer {layer.name!r} must run once in a pass, got a second run: choose another layer")
        if layer.run not in (None, "last", features.runs - 1) and not features.over:
            return None
        value = args if layer.at_input else output
        sequence = isinstance(value, (tuple, list))
        tensor = value[layer.index] if sequence and len(value) > layer.index else value
        if not isinstance(tensor, Tensor):
            verb = "be given" if layer.at_input else "return"
            raise ValueError(f"{where}: layer {layer.name!r} must {verb} a tensor, got {type(value).__name__}")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            features.hidden = True  # a gradient with respect to it is nobody's to take
            return None
        if cut:
            torch.set_grad_enabled(True)
            tensor = tensor.detach().requires_grad_()
        elif not tensor.requires_grad:
            hooks.mark(tensor)  # a layer that the images do not reach
        if not features.over:
            features.activation = tensor
        passed = replace(tensor)
        if not sequence:
            return passed
        rest = (*value[: layer.index], passed, *value[layer.index + 1 :])
        return type(value)(*rest) if hasattr(value, "_fields") else type(value)(rest)

    hooks.add(layer.module, hook, before=layer.at_input)
    return features
