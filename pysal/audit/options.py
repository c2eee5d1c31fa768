"""What is asked of an audit, each value checked by itself and as JSON has it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pysal import models
from pysal._checks import check_count, refuse, refuse_unknown
from pysal.audit.data import Labels
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.score import SCORE_KINDS
from pysal.engine.running.precision import PRECISIONS, Precision
from pysal.methods.registry import EVERY
from pysal.metrics import METRICS
from pysal.segments import Grid, Slic, Window, parse

WHERE = "pysal.audit.Job"
Maps = Literal["none", "uint8", "float16"]
MAPS = ("none", "uint8", "float16")


@dataclass(frozen=True)
class Options:
    """What is asked of an audit, beside its source, folder and model; `Job` says what each value means.

    Attributes:
        methods: the options of each method, in order.
        metrics: names, each once.
        annotations: the file or folder of boxes or masks, as an absolute path.
        device: "cpu" or "cuda".

    Raises:
        TypeError, ValueError: a value is wrong; the message says which.
    """

    methods: dict[str, dict[str, Any]]
    metrics: list[str]
    annotations: str | None
    target: str | int
    score: str | None
    labels: Labels
    maps: Maps
    size: tuple[int, int] | None
    seed: int
    precision: Precision
    shard_size: int
    batch_size: int | None
    prepared: bool
    device: str

    def __post_init__(self) -> None:
        one_of("maps", self.maps, MAPS)
        one_of("labels", self.labels, ("auto", "folder", "none"))
        one_of("precision", self.precision, PRECISIONS)
        if self.score is not None:
            one_of("score", self.score, SCORE_KINDS)
        for name, value in (("shard_size", self.shard_size), ("batch_size", self.batch_size)):
            if value is not None:
                check_count(WHERE, name, value)
        target = self.target
        if not isinstance(target, (str, int)) or isinstance(target, bool) or (isinstance(target, int) and target < 0):
            refuse(WHERE, "target", "be 'predicted', 'label', a class index or a text of pysal.targets.parse", repr(target))


def device_of(device: str) -> str:
    """Return "cpu" or "cuda"; "auto" is the GPU where there is one."""
    one_of("device", device, ("auto", "cpu", "cuda"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def metric_names(metrics: Sequence[str], masks: bool) -> list[str]:
    """Return the names of metrics, each once; some need masks."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        refuse(WHERE, "metrics", "be a sequence of names", repr(metrics), TypeError)
    possible = [name for name, metric in METRICS.items() if metric.needs != "masks" or masks]
    for name in metrics:
        if name in METRICS and name not in possible:
            refuse(WHERE, "annotations", f"be given for {name} (--annotations)", "None")
        if name not in possible:
            refuse_unknown(WHERE, "metrics", f"be names out of {', '.join(possible)}", name, possible)
    return list(dict.fromkeys(metrics))


def model_arguments(given: object) -> dict[str, Any]:
    """Return further arguments of `pysal.models.load` as JSON has them."""
    if not isinstance(given, Mapping):
        refuse(WHERE, "model_options", "be a mapping of arguments of pysal.models.load", repr(given), TypeError)
    known = [name for name in inspect.signature(models.load).parameters if name not in ("source", "device")]
    for name in given:
        if name not in known:
            refuse_unknown(WHERE, "model_options", f"hold arguments out of {', '.join(known)}", name, known)
    return {name: _json(f"model_options[{name!r}]", value) for name, value in given.items()}


def options_of_methods(names: list[str], given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the options of each method as JSON has them."""
    if not isinstance(given, Mapping):
        refuse(WHERE, "method_options", "be a mapping of methods to their options", repr(given), TypeError)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in given:
        argument = f"method_options[{name!r}]"
        if name not in names:
            refuse_unknown(WHERE, "method_options", f"be for the methods asked for ({', '.join(names)})", name, names)
        options = checked_options(WHERE, argument, EVERY[name].prepare, given[name])
        for reserved in ("seed", "image_ids"):
            if reserved in options:
                refuse(WHERE, argument, "leave seed and image_ids to the job", repr(reserved))
        found[name] = {key: _plain(name, key, value) for key, value in options.items()}
    return found


def _plain(method: str, option: str, value: Any) -> Any:
    argument = f"method_options[{method!r}][{option!r}]"
    if option == "segments":
        if isinstance(value, str):
            parse(value)
            return value
        text = _segments_text(value)
        if text is None or parse(text) != value:
            refuse(WHERE, argument, "be like grid:3x3, window:16/8 or slic:100", repr(value))
        return text
    return _json(argument, value)


def _json(argument: str, value: Any) -> Any:
    """Return a value as it comes back from the manifest."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        refuse(WHERE, argument, "be a number, a text or a list of them", repr(value), TypeError)


def _segments_text(value: Any) -> str | None:
    if isinstance(value, Grid):
        return f"grid:{value.rows}x{value.cols}"
    if isinstance(value, Slic):
        return f"slic:{value.n_segments}"
    if isinstance(value, Window) and isinstance(value.size, int) and not isinstance(value.stride, tuple):
        return f"window:{value.size}" + (f"/{value.stride}" if value.stride is not None else "")
    return None


def one_of(argument: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        refuse_unknown(WHERE, argument, f"be one of {', '.join(known)}", value, known)


def size_of(size: object) -> tuple[int, int]:
    """Return (height, width), refusing what is no size."""
    whole = isinstance(size, tuple | list) and len(size) == 2
    if not whole or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 2 for side in size):  # type: ignore[attr-defined]
        refuse(WHERE, "size", "be (height, width) in pixels", repr(size))
    return int(size[0]), int(size[1])  # type: ignore[index]
