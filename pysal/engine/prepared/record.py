"""What was found out about a model, in a file of plain numbers and words, so that it need not be found out again.

Nothing of the model is in it, and nothing in it is run. Whoever reads it captures the model anew, which is quick, and compares
fingerprints: of the weights, of the graph, and of what else the findings depend on.
"""

import dataclasses
import hashlib
import json
import math
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pysal import _library
from pysal._checks import check_path, first_line, refuse
from pysal.engine.graph.fold import module_of
from pysal.engine.graph.fused_convolution import WAYS
from pysal.engine.model.model_state import ModelState, unusual
from pysal.engine.prepared.gains import Gains

FORMAT = "pysal.prepared.1"
# A record has a few lines; what is longer is none.
MOST_BYTES = 100_000
# Constants of a graph up to so many numbers are a part of its fingerprint; the weights have one of their own.
SMALL = 4096


@dataclass(frozen=True)
class Comparison:
    """What came of holding a captured graph against its model.

    Attributes:
        way: what captured it, "torch.fx" or "torch.export".
        graph: its fingerprint.
        output: how far the fused graph's output is from the model's, relative to the largest.
        gradient: how far its gradient is, in l2.
        float64: the same in float64; None where the model has none.
        whole: why leave-one-out runs whole images; None where nothing kept it from less.
    """

    way: str
    graph: str
    output: float
    gradient: float
    float64: float | None
    whole: str | None


@dataclass(frozen=True)
class Record:
    """All that is written of a prepared model.

    Attributes:
        torch: its version.
        pysal: its version.
        processor: what computes, in words.
        precision: of the passes.
        shape: (C, H, W) of the images.
        dtype: of the images.
        weights: fingerprint of the model's tensors.
        rows: images per pass, None where that was not measured.
        rows_asked: whether they were asked for.
        reason: why the model runs as it is, None where it does not.
        gains: what was measured, None where nothing was.
        comparison: None where there was nothing to compare.
    """

    torch: str
    pysal: str
    processor: str
    precision: str
    shape: tuple[int, ...]
    dtype: str
    weights: str
    rows: int | None
    rows_asked: bool
    reason: str | None
    gains: Gains | None
    comparison: Comparison | None

    def text(self) -> str:
        """Return what `read` reads."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        content["sha256"] = _sum_of(content)
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def processor(device: torch.device) -> str:
    """Return what computes on a device, in words: other processors gain by other things, and round otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = _library.build_info()
    unit = " with a matrix unit" if info.get("matrix_unit") else ""
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {info.get('simd', 'not compiled')}{unit}"


def write(where: str, path: str | os.PathLike[str], record: Record) -> None:
    """Write a record, in the place of what is there once it is whole."""
    file = Path(check_path(where, "path", path))
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_text(record.text(), "utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        refuse(where, "path", "be a file that can be written", f"{path} ({error.strerror or error})", type(error))


def read(where: str, path: str | os.PathLike[str]) -> Record:
    """Return what `write` wrote.

    Raises:
        TypeError: `path` is no name of a file.
        OSError: it cannot be read.
        ValueError: it is no record, or a damaged one.
    """
    path = check_path(where, "path", path)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        refuse(where, "path", "be a file that can be read", f"{path} ({error.strerror or error})", type(error))
    try:
        return _record(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse(where, "path", "be a file written by PreparedModel.save, whole", f"{path} ({first_line(error)})")


def _record(content: bytes) -> Record:
    if len(content) > MOST_BYTES:
        raise ValueError("too long")
    found: Any = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("another format")
    if found.pop("sha256", None) != _sum_of(found):
        raise ValueError("its content was changed")
    del found["format"]
    if found["gains"] is not None:
        found["gains"] = Gains(**found["gains"])
        given = dataclasses.asdict(found["gains"])
        if given.pop("way") not in (None, *(way.name for way in WAYS)):
            raise ValueError("a way that is none")
        if not all(one is None or (type(one) in (int, float) and math.isfinite(one)) for one in given.values()):
            raise ValueError("gains that are no numbers")
    if found["comparison"] is not None:
        found["comparison"] = Comparison(**found["comparison"])
    found["shape"] = tuple(int(side) for side in found["shape"])
    if len(found["shape"]) != 3 or not all(0 < side < 2**24 for side in found["shape"]):
        raise ValueError("a shape of no image")
    if found["rows"] is not None and (type(found["rows"]) is not int or found["rows"] < 1):
        raise ValueError("rows that are no number")
    return Record(**found)


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a digest of every tensor of a model, by name, and of the classes of its modules."""
    state, digest = ModelState(model), hashlib.sha256()
    for prefix, module in state.modules:
        digest.update(f"{prefix} {type(module).__qualname__}\n".encode())
    for name, tensor in state.tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if unusual(tensor) is None and tensor.numel():
            _feed(digest, tensor)
    return digest.hexdigest()


def graph_fingerprint(graph: fx.GraphModule) -> str:
    """Return a digest of what a captured graph computes, weights apart."""
    digest = hashlib.sha256()
    numbers = {node: number for number, node in enumerate(graph.graph.nodes)}

    def described(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda one: f"%{numbers[one]}" if isinstance(one, fx.Node) else repr(one))

    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if module is not None:
            called = f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            called = "a value"
            value = getattr(graph.get_submodule(owner), name)
            if isinstance(value, Tensor):
                called = f"{value.dtype} {tuple(value.shape)}"
                if value.numel() <= SMALL:
                    _feed(digest, value)
        else:
            called = _name_of(node.target)
        digest.update(f"{node.op} {called} {described(node.args)} {described(node.kwargs)}\n".encode())
    return digest.hexdigest()


def _feed(digest: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    digest.update(plain.reshape(-1).view(torch.uint8).numpy())


def _name_of(target: Any) -> str:
    """Return what is called, with its code where that is not torch's own."""
    if isinstance(target, str):
        return target
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    if isinstance(target, types.FunctionType) and not name.startswith(("torch.", "pysal.")):
        name += f" {target.__code__.co_code.hex()} {target.__code__.co_consts}"
    return name
