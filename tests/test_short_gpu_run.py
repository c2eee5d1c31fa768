"""The eight minutes on a GPU, tried on the CPU: the script's stages, and what they run, with small images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import on_gpu

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*stages: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # no worker of ours
    settings = inherited | {"OUT": str(out), "DEVICE": "cpu", "PYTHON": sys.executable} | environment
    command = ["bash", str(ROOT / "tests/short_gpu_run.sh"), *stages]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


def test_stages_leave_their_results_at_once(tmp_path: Path) -> None:
    done = run("load", "device", "resnet50-1", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of time: python -m benchmarks --device cuda --network resnet50 --images 1" in done.stdout
    summary = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [(line[0], line[-1]) for line in summary] == [("load", "ok"), ("device", "ok"), ("resnet50-1", "ok")]
    heads = re.findall(r"^===== ([\w-]+),", (tmp_path / "log.txt").read_text(), flags=re.MULTILINE)
    assert heads == ["load", "device", "resnet50-1", "summary"]


def test_a_stage_that_fails_or_has_no_time_left_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = run("load", "device", out=tmp_path, BUDGET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "summary.txt").read_text() == "load: no time left\ndevice: no time left\n"
    done = run("load", out=tmp_path, PYTHONHOME="/nowhere")
    assert done.returncode == 1
    assert "FAILED (1)" in (tmp_path / "summary.txt").read_text()


def test_every_method_in_every_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.check_methods(CPU, tmp_path, 24) == 0
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert len(rows) == len(on_gpu.METHODS) * (1 + 3 * len(on_gpu.BOUNDS))
    assert "are right" in capsys.readouterr().out


def test_a_wrong_map_and_an_error_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(model: object, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return x
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(on_gpu, "METHODS", {"wrong": lambda model, x: x if x.dtype == torch.float64 else -x, "breaks": breaks})
    monkeypatch.setattr(on_gpu, "BOUNDS", {"float32": 0.05})
    assert on_gpu.check_methods(CPU, tmp_path, 24) == 1
    verdicts = {row["method"]: row["verdict"] for row in json.loads((tmp_path / "methods.json").read_text())}
    assert verdicts == {
        "wrong": "WRONG, at most 0.05 on cpu",
        "breaks": "RuntimeError: no kernel image is available",
    }
