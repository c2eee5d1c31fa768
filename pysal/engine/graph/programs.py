"""Programs of torch.export as networks with layers, which are found by the names that they had in the network."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn


def is_program(module: nn.Module) -> bool:
    """Say whether a module is, or is a part of, what torch.export made."""
    return type(module).__module__.startswith("torch.export.") or is_graph_of_program(module)


def is_graph_of_program(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Say whether a module is what `ExportedProgram.module` returned."""
    return isinstance(module, fx.GraphModule) and any(
        base.__module__ == "torch.export._unlift" for base in type(module).__mro__
    )


def returned_by(module: fx.GraphModule) -> Iterator[tuple[str, str, int, fx.Node]]:
    """Return (name of a module, its class's name, its run, the node of what it returned) as far as a program tells.

    It notes in which run of which module each operation was called. Where one value alone of those is read outside of them,
    that is what the module returned.
    """
    inside: dict[str, dict[str, set[fx.Node]]] = {}
    classes: dict[str, str] = {}
    for node in module.graph.nodes:
        for key, (path, kind) in node.meta.get("nn_module_stack", {}).items():
            name = str(path).partition("@")[0]
            if name and not key.startswith("_"):
                inside.setdefault(name, {}).setdefault(key, set()).add(node)
                classes[name] = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    for name, by_run in inside.items():
        for run, nodes in enumerate(by_run.values()):
            read = [node for node in nodes if any(user not in nodes for user in node.users)]
            if len(read) == 1:
                yield name, classes[name], run, read[0]


class LayeredProgram(nn.Module):
    """A program of torch.export as a network: layers, where `ExportedProgram.module` has weights alone.

    A layer is an empty module with the name, and the class's name, of that of the network. While there is a hook on one, the
    program is run operation by operation, and each layer is called with what it returned.

    Args:
        program: what `ExportedProgram.module` returned.

    Attributes:
        rows_per_pass: images that the program takes at a time; None = any number.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__()
        self.training = False
        self._taken = _taken(program)
        batch = self._taken[0][0] if len(self._taken) == 1 and len(self._taken[0]) == 4 else None
        self.rows_per_pass = batch if isinstance(batch, int) else None
        self.add_module("program", program)
        self._layers: list[nn.Module] = []
        self._returned: dict[fx.Node, list[nn.Module]] = {}
        made: dict[str, nn.Module] = {}
        for name, kind, _, node in sorted(returned_by(program), key=lambda found: len(found[0])):
            if name not in made and (layer := self._make(name, kind)) is not None:
                made[name] = layer
            if name in made:
                self._returned.setdefault(node, []).insert(0, made[name])  # the innermost returns first
        self._layers = list(made.values())

    def refuses(self, images: Tensor) -> str | None:
        """Return why the program does not take images like these, None where it does."""
        if len(self._taken) != 1:
            return f"it takes {len(self._taken)} tensors, not one batch of images"
        sides = self._taken[0][1:]
        pairs = zip(sides, images.shape[1:], strict=False)
        if len(self._taken[0]) != images.ndim or any(isinstance(side, int) and side != given for side, given in pairs):
            sizes = " x ".join(str(side) if isinstance(side, int) else "any" for side in sides)
            return f"it was exported for images of {sizes}, not of {' x '.join(map(str, images.shape[1:]))}"
        return None

    @property
    def given(self) -> fx.GraphModule:
        """What `ExportedProgram.module` returned."""
        program = self.get_submodule("program")
        assert isinstance(program, fx.GraphModule)
        return program

    def _make(self, name: str, kind: str) -> nn.Module | None:
        """Add a layer, and what is around it, by name; None where the program's own place has it."""
        owner: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, _layer("Module"))
            owner = getattr(owner, step)
        if hasattr(owner, last):
            return None
        layer = _layer(kind)
        owner.add_module(last, layer)
        return layer

    def forward(self, images: Tensor) -> Any:
        """Return what the program returns; of a fixed number of images, others are handed over in parts, filled up."""
        rows = self.rows_per_pass
        if rows is None or len(images) == rows:
            return self._run(images)
        found = []
        for part in images.split(rows):
            missing = rows - len(part)
            filled = part if missing == 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
            found.append(self._run(filled)[: len(part)])
        return torch.cat(found)

    def _run(self, images: Tensor) -> Any:
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers):
            return _Layers(self.given, self._returned).run(images)
        return self.given(images)


class _Layer(nn.Module):
    def forward(self, value: Any) -> Any:
        return value


def _layer(kind: str) -> nn.Module:
    """Return an empty module whose class has a name."""
    layer: nn.Module = type(kind, (_Layer,), {})()
    return layer.eval()


class _Layers(fx.Interpreter):
    def __init__(self, program: fx.GraphModule, returned: dict[fx.Node, list[nn.Module]]) -> None:
        super().__init__(program)
        self._returned = returned

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for layer in self._returned.get(n, ()):
            value = layer(value)
        return value


def _taken(program: fx.GraphModule) -> list[tuple[object, ...]]:
    """Return the shape of each tensor that a program takes, symbols where it takes any size."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") for node in placeholders]
    return [tuple(value.shape) for value in values if isinstance(value, Tensor)]
