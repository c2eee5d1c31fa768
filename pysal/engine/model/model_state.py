"""What decides what a model computes, as it was at one time: its modules, hooks, attributes, classes and tensors.

It is compared before every use of a prepared model. The containers themselves, `__dict__`s above all, are held beside shallow
copies, so that one comparison of two lists, which Python does in C by the identity of the values, sees whether anything is new.
Only where something is, what it is gets looked for.
"""

import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_modules
from torch.nn.parameter import is_lazy

from pysal._names import PACKAGE

# Values of each tensor that are compared; all of them would take as long as a forward pass.
SAMPLES = 64
# Objects inside objects on modules' attributes are followed so deep, and not without end: a trainer, say, may hang on a model.
DEEPEST, MOST_CONTAINERS = 4, 5_000
# Hooks that take part in a forward or a backward pass; those around state dicts do not.
HOOKS = tuple("_forward_pre_hooks _forward_hooks _backward_pre_hooks _backward_hooks".split())
_HOOK_OPTIONS = tuple(f"_forward_{name}" for name in ("hooks_with_kwargs", "hooks_always_called", "pre_hooks_with_kwargs"))
_TENSORS = ("_parameters", "_buffers")
# Keys of a module's `__dict__` that are looked at in another way, or say nothing of what it computes.
_APART = frozenset((*HOOKS, *_HOOK_OPTIONS, *_TENSORS, "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"))
_APART |= frozenset(name for name in nn.Module().__dict__ if "state_dict" in name) | {"training"}
_COMPILER = ("_compiled_call_impl", "_is_torch_compile", "_dynamo", "_torchdynamo", "torchdynamo")
_PLAIN = (int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size, range, slice)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)
# The programs of torch.export describe by the last three what they compute, and read it nowhere else.
_OPAQUE = (*_FUNCTIONS, fx.Graph, fx.Node, FakeTensor)


class ModelState:
    """The state of a model.

    Args:
        model: the model.
        written: (module's name, attribute) of what its forward pass writes itself, and nobody needs to know.
    """

    def __init__(self, model: nn.Module, written: Iterable[tuple[str, str]] = ()) -> None:
        self._model, self._written = model, frozenset(written)
        self._live: list[Any] = []
        self._then: list[Any] = []
        self._names: list[tuple[str, str]] = []  # kind of the container, and its name
        self.tensors: dict[str, Tensor] = {}
        self._met: set[int] = set()
        self.modules = parts(model)
        self._walk()
        self._modules = [module for _, module in self.modules]
        self._classes = [type(module) for module in self._modules]
        for name, hooks in global_hooks().items():
            self._hold("hooks", name, hooks)
        for cls in dict.fromkeys(base for each in self._classes for base in each.__mro__):
            if cls not in (nn.Module, object):  # torch.fx puts its own methods into nn.Module while it traces
                self._hold("class", cls.__name__, vars(cls))
        self._marks: list[tuple[int, int]] = []
        self._samples: list[dict[str, Tensor]] = []
        self._values: list[Tensor] = []

    def _hold(self, kind: str, name: str, container: Any) -> None:
        self._live.append(container)
        self._then.append(dict(container) if isinstance(container, Mapping) else container.copy())
        self._names.append((kind, name))

    def _walk(self) -> None:
        """Hold what every module has, and the modules that are kept in ordinary lists and objects."""
        held = {id(module) for _, module in self.modules}
        for prefix, module in self.modules:  # which grows
            self._hold("attributes", prefix, module.__dict__)
            if isinstance(module, torch.jit.ScriptModule):
                self.tensors |= {f"{prefix}{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
                continue
            self._hold("modules", prefix, module._modules)
            for name in HOOKS:
                self._hold("hooks", prefix, getattr(module, name))
            for name in _TENSORS:
                tensors = getattr(module, name)
                self._hold("weights", prefix, tensors)
                self.tensors |= {f"{prefix}{key}": tensor for key, tensor in tensors.items() if tensor is not None}
            for key, value in module.__dict__.items():
                if key not in _APART and (prefix, key) not in self._written:
                    for name, found in self._follow(f"{prefix}{key}", value):
                        if id(found) not in held:
                            held.add(id(found))
                            self.modules.append((f"{name}.", found))

    def _follow(self, name: str, value: Any) -> list[tuple[str, nn.Module]]:
        """Hold what an attribute's value contains, and return the modules in it."""
        pending, found = [(name, value, 0)], []
        while pending:
            name, value, depth = pending.pop()
            if isinstance(value, nn.Module):
                found.append((name, value))
            elif isinstance(value, _PLAIN) or isinstance(value, _OPAQUE) or id(value) in self._met:
                continue
            elif isinstance(value, Tensor):
                self.tensors[name] = value
            elif depth < DEEPEST and len(self._met) < MOST_CONTAINERS:
                self._met.add(id(value))
                depth += 1
                if isinstance(value, (tuple, frozenset)):
                    pending += [(f"{name}[{n}]", each, depth) for n, each in enumerate(value)]
                elif isinstance(value, (list, set)):
                    self._hold("attributes", f"{name}.", value)
                    pending += [(f"{name}[{n}]", each, depth) for n, each in enumerate(list(value))]
                elif isinstance(value, dict):
                    self._hold("attributes", f"{name}.", value)
                    pending += [(f"{name}[{key!r}]", each, depth) for key, each in list(value.items())]
                elif isinstance(getattr(value, "__dict__", None), dict):
                    self._hold("attributes", f"{name}.", value.__dict__)
                    pending += [(f"{name}.{key}", each, depth) for key, each in list(value.__dict__.items())]
        return found

    def remember_values(self) -> None:
        """Note where tensors are, how often they were written, and some of their values: ordinary ones, see `unusual`."""
        self._marks = self._mark()
        samples = {name: _sample(tensor) for name, tensor in self.tensors.items()}
        kinds = dict.fromkeys((sample.device, sample.dtype) for sample in samples.values())
        self._samples = [{name: one for name, one in samples.items() if (one.device, one.dtype) == kind} for kind in kinds]
        self._values = self._read()

    def _mark(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self.tensors.values()]

    def _read(self) -> list[Tensor]:
        return [torch.cat(list(some.values())).nan_to_num() for some in self._samples]

    def changed(self, *, values: bool = True) -> tuple[str, str] | None:
        """Return what has changed, ("weights", "a new value of '0.bias'"), None for nothing.

        Args:
            values: also whether tensors were written past autograd, through `.data`, as far as some of their values tell.
        """
        try:
            same = self._live == self._then
        except Exception:  # of a value that cannot be compared, a tensor above all: it is another one
            same = False
        if not same:
            found = self._difference()
            if found is not None:
                return found
        if list(map(type, self._modules)) != self._classes:
            for (name, module), cls in zip(self.modules, self._classes, strict=True):
                if type(module) is not cls:
                    return "modules", f"class {type(module).__name__} in place of {cls.__name__} at {name[:-1]!r}"
        marks = self._mark()
        if marks != self._marks:
            name = next(name for name, now, then in zip(self.tensors, marks, self._marks, strict=True) if now != then)
            return "weights", f"a new value of {name!r}"
        if not values:
            return None
        for some, now, before in zip(self._samples, self._read(), self._values, strict=True):
            if not torch.equal(now, before):
                sizes = [len(one) for one in some.values()]
                pairs = zip(some, now.split(sizes), before.split(sizes), strict=True)
                name = next(name for name, new, old in pairs if not torch.equal(new, old))
                return "weights", f"a new value of {name!r}"
        return None

    def _difference(self) -> tuple[str, str] | None:
        """Return what differs between containers and their copies, but for what does not matter, which is taken over."""
        for place, (live, then, (kind, name)) in enumerate(zip(self._live, self._then, self._names, strict=True)):
            now = dict(live) if isinstance(live, Mapping) else live.copy()
            if kind == "hooks":
                if own_hooks_apart(now) != own_hooks_apart(then):
                    return "hooks", f"other hooks on {repr(name[:-1]) if name else type(self._model).__name__}"
                continue  # pysal's own are taken away again
            if not isinstance(now, dict):
                if not _equal(now, then) and (name, "") not in self._written:
                    return kind, f"a new value of {name[:-1]!r}"
                continue
            for key in dict.fromkeys((*then, *now)):
                if _equal(now.get(key, _MISSING), then.get(key, _MISSING)) or self._harmless(kind, name, key):
                    continue
                if kind == "class":
                    return "classes", f"a new value of '{name}.{key}'"
                return kind, f"a new {'module' if kind == 'modules' else 'value of'} {f'{name}{key}'!r}"
            self._then[place] = now
        return None

    def written(self) -> list[tuple[str, str, Any]]:
        """Return the attributes that are not as they were: where they are, their name, and what they are now."""
        found = []
        for live, then, (kind, name) in zip(self._live, self._then, self._names, strict=True):
            if kind != "attributes":
                continue
            if not isinstance(live, Mapping):
                found += [] if _equal(live, then) else [(name, "", live)]
                continue
            for key in dict.fromkeys((*then, *live)):
                if key not in _APART and not _equal(live.get(key, _MISSING), then.get(key, _MISSING)):
                    found.append((name, key, live.get(key)))
        return found

    def _harmless(self, kind: str, name: str, key: Any) -> bool:
        if kind == "class":
            return str(key).startswith("__") and key != "__call__"
        if kind != "attributes":
            return False
        return key in _APART or (name, key) in self._written or str(key).startswith(_COMPILER)


_MISSING = object()


def parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with the beginning of their tensors' names; `named_modules` takes a millisecond of every call."""
    found, seen = [("", model)], {model}
    for prefix, module in found:
        for name, child in module._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                found.append((f"{prefix}{name}.", child))
    return found


def own_hooks_apart(hooks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return hooks without those that pysal puts on for the length of a pass, perhaps in another thread.

    Those by which a program of torch.export checks what it is given are not counted either.
    """
    apart = (f"{PACKAGE}.", "torch.export.", "torch._export.")
    return {key: hook for key, hook in hooks.items() if not (getattr(hook, "__module__", "") or "").startswith(apart)}


def global_hooks() -> dict[str, dict[int, Any]]:
    """Return torch's hooks on all modules, by kind."""
    return {f"every module{kind}.": getattr(torch_modules, f"_global{kind}") for kind in HOOKS}


def unusual(tensor: Tensor) -> str | None:
    """Return what keeps a tensor of a model from being watched and copied as ordinary ones are, None for nothing."""
    if is_lazy(tensor):
        return "not initialised yet: run the model once"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.layout != torch.strided:
        return f"of layout {str(tensor.layout).removeprefix('torch._').removeprefix('torch.')}"
    if tensor.is_inference():
        return "made in inference mode"
    if tensor.is_quantized:
        return "quantized"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"of class {type(tensor).__name__}"
    return None


def _equal(now: Any, then: Any) -> bool:
    """Compare as Python does inside containers: by identity first."""
    try:
        return now is then or (type(now) is type(then) and bool(now == then))
    except Exception:  # of several values that cannot be compared at once
        return False


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of some of a tensor's values, evenly spread over its memory."""
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=tensor.dtype, device=tensor.device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    step = max(1, span // SAMPLES)
    return tensor.detach().as_strided((math.ceil(span / step),), (step,), tensor.storage_offset())
