"""Every method on a GPU against the same on the CPU in float64, and how fast an audit is; needs torch and pysal, nothing else.

python tests/on_gpu.py [--device cuda] [--results FOLDER] methods | audit
    methods: plain, and prepared in every arithmetic, three times each: as it is, recorded, replayed. A line and a row of
             methods.json each; exits 1 if a map is wrong or a call fails.
    audit:   images per second of Grad-CAM of a folder of photos, of decoding alone, and of a model that does nothing.
--device cpu tries the script itself.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pysal
from pysal import audit

Method = Callable[..., Tensor]
TARGET = [1, 2, 3]
METHODS: dict[str, Method] = {
    "gradient": lambda model, x: pysal.gradient(model, x, TARGET),
    "guided_backprop": lambda model, x: pysal.guided_backprop(model, x, TARGET),
    "grad_cam": lambda model, x: pysal.grad_cam(model, x, TARGET),
    "guided_grad_cam": lambda model, x: pysal.guided_grad_cam(model, x, TARGET),
    "integrated_gradients": lambda model, x: pysal.integrated_gradients(model, x, TARGET, steps=20),
    "integrated_gradients to a tolerance": lambda model, x: pysal.integrated_gradients(
        model, x, TARGET, tolerance=0.05, max_steps=65
    ),
    "guided_integrated_gradients": lambda model, x: pysal.guided_integrated_gradients(model, x, TARGET, steps=10),
    "blur_integrated_gradients": lambda model, x: pysal.blur_integrated_gradients(model, x, TARGET, steps=20, max_sigma=20),
    "smooth_grad": lambda model, x: pysal.smooth_grad(model, x, TARGET, samples=20),
    "leave_one_out of a grid": lambda model, x: pysal.leave_one_out(model, x, TARGET, segments=pysal.Grid(6, 6)),
    "leave_one_out both ways": lambda model, x: pysal.leave_one_out(model, x, TARGET, segments=pysal.Grid(6, 6), mode="both"),
    "shapley": lambda model, x: pysal.shapley(model, x, TARGET, segments=pysal.Grid(3, 3), passes=60),
    "interactions": lambda model, x: pysal.interactions(model, x, TARGET, segments=pysal.Grid(3, 3)).map,
    "rise": lambda model, x: pysal.rise(model, x, TARGET, samples=60),
    "leave_one_out of windows": lambda model, x: pysal.leave_one_out(model, x, TARGET, segments=pysal.Window(32, 16)),
    "leave_one_out of superpixels": lambda model, x: pysal.leave_one_out(model, x, TARGET, segments=pysal.Slic(20)),
    "class_gradients": lambda model, x: pysal.class_gradients(model, x, [1, 2, 3, 4]),
}
# How far, as a share of its norm, rounding may move a map, whose ReLUs it switches; one that has nothing to do with it is at 1.
BOUNDS = {"float32": 0.05, "tf32": 0.2, "mixed": 0.2, "bf16": 0.5}
# Guided paths choose by rank which pixels move, so one digit changes the path.
DISCONTINUOUS = {"guided_integrated_gradients"}


class Net(nn.Module):
    """Every kind of layer that prepared models have code for: folded and pooled, with a shortcut, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.pool, self.second = nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.mean, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.stem(x))))
        x = self.relu(self.second(x) + x)
        return self.head(self.mean(self.relu(self.depthwise(x))).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr, operator]
    model.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model


def check_methods(device: torch.device, results: Path | None, side: int) -> int:
    """Hold every method against itself in float64 on the CPU; return 1 if one is wrong."""
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    exact = net().double()
    expected = {name: method(exact, images.double()) for name, method in METHODS.items()}
    rows: list[dict[str, Any]] = []

    def check(name: str, model: Any, precision: str, turn: str) -> None:
        started = time.perf_counter()
        away = None
        try:
            found = METHODS[name](model, images.to(device))
            away = float((found.double().cpu() - expected[name]).norm() / expected[name].norm())
            bound = 1.0 if name in DISCONTINUOUS else BOUNDS[precision]
            verdict = "ok" if found.device.type == device.type and away <= bound else f"WRONG, at most {bound} on {device.type}"
        except Exception as error:  # the others are of use all the same
            traceback.print_exc(limit=-3)
            verdict = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        spent = time.perf_counter() - started
        rows.append({"method": name, "precision": precision, "turn": turn, "error": away, "seconds": spent, "verdict": verdict})
        print(
            f"{precision:8} {turn:9} {name:40} {away if away is None else f'{away:.1e}'} {1e3 * spent:9.1f} ms  {verdict}",
            flush=True,
        )
        save(results, "methods.json", rows)

    plain = net().to(device)
    for name in METHODS:
        check(name, plain, "float32", "plain")
    for precision in BOUNDS:
        try:
            fast = pysal.prepare(plain, images.to(device), precision=precision, batch_size=16)  # type: ignore[arg-type]
        except Exception as error:
            traceback.print_exc(limit=-3)
            rows.append({"method": "prepare", "precision": precision, "verdict": f"{type(error).__name__}: {error}"})
            save(results, "methods.json", rows)
            continue
        for name in METHODS:
            for turn in ("prepared", "recorded", "replayed"):
                check(name, fast, precision, turn)
        print(fast.report(), flush=True)
    failed = [row for row in rows if row["verdict"] != "ok"]
    print(f"{len(failed)} of {len(rows)} failed" if failed else f"all {len(rows)} are right", flush=True)
    return int(bool(failed))


class Nothing(nn.Module):
    """Scores that take no time, by which decoding and writing are seen alone."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 1, stride=56)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((2, 3))


def time_audits(device: torch.device, results: Path | None, number: int) -> int:
    """Time audits of copies of the package's photos."""
    photos = sorted((Path(pysal.__file__).parent / "data/photos").glob("*.jpg"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place in range(number):
            shutil.copy(photos[place % len(photos)], Path(folder) / f"{place:06}.jpg")
        for name, model in (("a model that does nothing", Nothing().eval()), ("a small network", net())):
            started = time.perf_counter()
            job = audit.Job(
                folder, model=model, methods="grad_cam", out=Path(folder) / f"out {name}", size=(224, 224), device=device.type
            )
            planned = time.perf_counter()
            job.run(workers=1)
            rate = number / (time.perf_counter() - planned)
            rows.append({"model": name, "images": number, "plan_seconds": planned - started, "images_per_second": rate})
            print(f"audit, Grad-CAM of {name}: {rate:.1f} images/s with one worker, {os.cpu_count()} processors", flush=True)
            save(results, "audits.json", rows)
    return 0


def save(results: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(json.dumps(rows, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["methods", "audit"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="that an audit has")
    parser.add_argument("--side", type=int, default=96, help="of the methods' images, in pixels")
    options = parser.parse_args()
    if options.what == "audit":
        return time_audits(options.device, options.results, options.images)
    return check_methods(options.device, options.results, options.side)


if __name__ == "__main__":
    sys.exit(main())
