"""The manifest of an audit: what was asked for, of which model, weights, data and versions."""

import json
import platform
import re
from collections.abc import Mapping
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
# Said of a job, not compared when it is resumed: who began it, and how long the plan's file is follows from the data.
NOT_COMPARED = ("created",)


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
    return manifest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two manifests, a phrase each: "seed was 0, is 1"."""
    found: list[str] = []
    _compare("", {key: before[key] for key in before if key not in NOT_COMPARED}, now, found)
    return found


def _compare(name: str, before: Any, now: Any, found: list[str]) -> None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before and (name or key not in NOT_COMPARED))]
        if name == "methods":
            if list(before) != list(now):
                found.append(f"methods were {', '.join(before)}, are {', '.join(now)}")
            keys = [key for key in before if key in now]
        for key in keys:
            _compare(f"{name}.{key}" if name else str(key), before.get(key), now.get(key), found)
    elif before != now:
        found.append(f"{name} was {_short(before)}, is {_short(now)}")


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
