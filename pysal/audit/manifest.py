"""The manifest of an audit: what was asked for, of which model, weights, data and versions."""

import json
import platform
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch

from pysal._checks import refuse
from pysal._library import version
from pysal.audit import files

FORMAT = 1
PACKAGES = ("torch", "numpy", "pillow", "scikit-image", "pyarrow")
# Said of a job, not compared when it is resumed: who began it, and what was measured when it was planned.
NOT_COMPARED = ("created", "gains")

# What every manifest holds, and of which kind; nobody's file is taken at its word.
NUMBER, TEXT_OR_NONE = (int, float), (str, type(None))
KEYS: dict[str, Any] = {
    "model": {
        "spec": TEXT_OR_NONE,
        "options": Mapping,
        "name": str,
        "architecture_sha256": str,
        "weights_sha256": str,
        "input_size": list,
        "channels": int,
        "class_names": (list, type(None)),
        "crop_fraction": (*NUMBER, type(None)),
        "resample": TEXT_OR_NONE,
        "output": TEXT_OR_NONE,
    },
    "methods": Mapping,
    "metrics": list,
    "target": (str, int),
    "maps": str,
    "boxes": (list, type(None)),
    "seed": int,
    "precision": str,
    "images_together": int,
    "batch_size": int,
    "prepared": bool,
    "gains": (Mapping, type(None)),
    "device": str,
    "data": {
        "source": str,
        "kind": str,
        "root": str,
        "labels": str,
        "images": int,
        "labelled": int,
        "shards": int,
        "shard_size": int,
        "sha256": str,
    },
    "versions": Mapping,
    "created": {"time": str, "host": str, "processor": str, "simd": str},
}
GAIN_KEYS: dict[str, Any] = {
    "gradient": NUMBER,
    "forward": NUMBER,
    "boxes": (*NUMBER, type(None)),
    "runtime": (*NUMBER, type(None)),
    "way": TEXT_OR_NONE,
}
METHOD_KEYS: dict[str, Any] = {
    "title": str,
    "options": Mapping,
    "score": str,
    "reduction": str,
    "signed": bool,
    "map_shape": (list, type(None)),
    "layer": TEXT_OR_NONE,
}


def versions() -> dict[str, str]:
    """Return the versions of all that the numbers depend on."""
    return {"pysal": version(), "python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}}


def _installed(name: str) -> str:
    if name == "torch":
        return str(torch.__version__)
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def write(out: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json.

    Raises:
        files.DiskFault: it cannot be written.
    """
    files.write(out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")


def read(where: str, out: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text("utf-8"))
    except OSError:
        refuse(where, "out", "be the folder of an audit", f"{out} (no manifest.json in it)")
    except ValueError as error:
        refuse(where, "out", "have a readable manifest.json", f"{out} ({error})")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        refuse(where, "out", f"be of format {FORMAT}", f"{out} of format {found}")
    fault = _fault(manifest)
    if fault is not None:
        refuse(where, "out", "have a whole manifest.json (from a copy of the folder, or run the audit anew)", f"{out}, {fault}")
    return manifest


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest as it was read."""
    found = _mismatch(manifest, KEYS, "")
    if found is not None:
        return found
    gains = manifest["gains"]
    if gains is not None and (_mismatch(gains, GAIN_KEYS, "gains.") is not None or len(gains) > len(GAIN_KEYS)):
        return f"where 'gains' is {_short(gains)}"
    for name, method in manifest["methods"].items():
        if not isinstance(method, Mapping):
            return f"where 'methods.{name}' is {_short(method)}"
        found = _mismatch(method, METHOD_KEYS, f"methods.{name}.")
        if found is None and not _are(method["map_shape"] or (), int):
            found = f"where 'methods.{name}.map_shape' is {_short(method['map_shape'])}"
        if found is not None:
            return found
    try:
        datetime.fromisoformat(manifest["created"]["time"])
    except ValueError:
        return f"where 'created.time' is {_short(manifest['created']['time'])}"
    least = min(manifest["data"][key] for key in ("images", "shards", "shard_size"))
    for key in ("annotations", "annotations_sha256"):  # which older manifests do not have
        if not isinstance(manifest.get(key), TEXT_OR_NONE):
            return f"where '{key}' is {_short(manifest[key])}"
    sizes, metrics = manifest["model"]["input_size"], manifest["metrics"]
    if not manifest["methods"] or least < 1 or len(sizes) != 2 or not _are(sizes, int) or not _are(metrics, str):
        return "where methods, metrics, sizes or numbers of images cannot be"
    return None


def _mismatch(value: Mapping[str, Any], keys: Mapping[str, Any], place: str) -> str | None:
    """Return the first key that is missing in a mapping, or is not of its kind."""
    for key, kind in keys.items():
        if key not in value:
            return f"without '{place}{key}'"
        found, other = value[key], f"where '{place}{key}' is {_short(value[key])}"
        if isinstance(kind, Mapping):
            inner = _mismatch(found, kind, f"{place}{key}.") if isinstance(found, Mapping) else other
            if inner is not None:
                return inner
        elif not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):  # True is an int to Python
            return other
    return None


def _are(values: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two manifests, by its place in them, a phrase each: {"seed": "seed was 0, is 1"}."""
    found: dict[str, str] = {}
    _compare("", {key: before[key] for key in before if key not in NOT_COMPARED}, now, found)
    return found


def _compare(name: str, before: Any, now: Any, found: dict[str, str]) -> None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before and (name or key not in NOT_COMPARED))]
        if name == "methods":
            if list(before) != list(now):
                found["methods"] = f"methods were {', '.join(before)}, are {', '.join(now)}"
            keys = [key for key in before if key in now]
        for key in keys:
            _compare(f"{name}.{key}" if name else str(key), before.get(key), now.get(key), found)
    elif before != now:
        found[name] = f"{name} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
