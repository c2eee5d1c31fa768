"""What a call costs beside the network's passes: small inputs, captum's classes and ours under the same program, in turns.

`python -m benchmarks.bench_calls --results FOLDER` prints a table and writes calls--<device>.json. A ratio is captum's time of
the processor divided by ours, of the least of each; every answer is held against captum's first.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from captum import attr
from torch import Tensor, nn

import pysal.captum
from benchmarks import common

# Rounds of one call: so many at least, and more while they take less than a second.
ROUNDS, MOST_ROUNDS, SECONDS = 40, 400, 1.0


@dataclass(frozen=True)
class CallRow:
    """One call of one class on one small input, as it is written to the results."""

    network: str
    call: str
    rounds: int
    captum_us: float
    pysal_us: float
    captum_over_pysal: float
    difference: float


class LastOutput(nn.Module):
    """Classifies a sequence by the last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.cells(sequences)[0][:, -1])


def table() -> tuple[nn.Module, Tensor]:
    """A network of three linear layers and 150 rows of four numbers."""
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), torch.rand(150, 4)


def sequences() -> tuple[nn.Module, Tensor]:
    """1-D convolutions and 8 signals of two channels."""
    layers = [nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4)), torch.rand(8, 2, 64)


def digits(number: int) -> tuple[nn.Module, Tensor]:
    """LeNet and some digits."""
    convolutions = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    linear = [nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, *linear), torch.rand(number, 1, 28, 28)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "three linear layers, 1 row": lambda: (table()[0], torch.rand(1, 4)),
    "three linear layers, 150 rows": table,
    "LeNet, 1 digit": lambda: digits(1),
    "LeNet, 24 digits": lambda: digits(24),
    "1-D convolutions, 8 signals": sequences,
    "LSTM, 16 sequences": lambda: (LastOutput(), torch.rand(16, 12, 8)),
}
CALLS: dict[str, Callable[[ModuleType, nn.Module, Tensor], Any]] = {
    "Saliency": lambda faces, model, inputs: faces.Saliency(model).attribute(inputs, target=1),
    "IntegratedGradients": lambda faces, model, inputs: faces.IntegratedGradients(model).attribute(inputs, target=1),
    "GuidedBackprop": lambda faces, model, inputs: faces.GuidedBackprop(model).attribute(inputs, target=1),
    "NoiseTunnel": lambda faces, model, inputs: noise_tunnel(faces, model, inputs),
    "LayerGradCam": lambda faces, model, inputs: faces.LayerGradCam(model, model[3]).attribute(inputs, target=1),  # type: ignore[index]
    "InputXGradient": lambda faces, model, inputs: faces.InputXGradient(model).attribute(inputs, target=1),
    "DeepLift": lambda faces, model, inputs: faces.DeepLift(model).attribute(inputs, target=1),
    "GradientShap": lambda faces, model, inputs: drawn(faces, "GradientShap", model, inputs, torch.zeros_like(inputs)),
    "LayerActivation": lambda faces, model, inputs: faces.LayerActivation(model, model[2]).attribute(inputs),  # type: ignore[index]
    "LayerGradientXActivation": lambda faces, model, inputs: faces.LayerGradientXActivation(
        model,
        model[2],  # type: ignore[index]
    ).attribute(inputs, target=1),
    "LayerIntegratedGradients": lambda faces, model, inputs: faces.LayerIntegratedGradients(
        model,
        model[2],  # type: ignore[index]
    ).attribute(inputs, target=1),
    "ShapleyValueSampling": lambda faces, model, inputs: drawn(faces, "ShapleyValueSampling", model, inputs),
    "KernelShap": lambda faces, model, inputs: drawn(faces, "KernelShap", model, inputs[:1]),
    "Lime": lambda faces, model, inputs: drawn(faces, "Lime", model, inputs[:1]),
    "FeaturePermutation": lambda faces, model, inputs: drawn(faces, "FeaturePermutation", model, inputs),
}

# Calls of a network's second layer, and those whose passes grow with the numbers of a row.
OF_A_LAYER = ("LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients")
OF_FEW = ("ShapleyValueSampling", "KernelShap", "Lime", "FeaturePermutation")


def fits(call: str, network: str) -> bool:
    """Whether a call is made of a network: of its layers, the rule of its ReLUs, or of few numbers."""
    if call in OF_FEW:  # one row alone has nothing to be exchanged with
        return "linear" in network and not (call == "FeaturePermutation" and network.endswith(" 1 row"))
    if call == "LayerGradCam":
        return network.startswith("LeNet")
    if call == "DeepLift" and network.startswith("LeNet"):  # whose pools captum has another rule for
        return False
    return "LSTM" not in network or call not in ("GuidedBackprop", "DeepLift", *OF_A_LAYER)


def drawn(faces: ModuleType, name: str, model: nn.Module, inputs: Tensor, *given: Any, **options: Any) -> Tensor:
    """A class that draws random numbers, with captum's."""
    torch.manual_seed(0)
    np.random.seed(0)
    more = {} if faces is attr or name != "GradientShap" else {"rng": "captum"}
    result: Tensor = getattr(faces, name)(model, **more).attribute(inputs, *given, target=1, **options)
    return result


def noise_tunnel(faces: ModuleType, model: nn.Module, inputs: Tensor) -> Tensor:
    """SmoothGrad of 10 samples, with captum's noise."""
    torch.manual_seed(0)
    more = {} if faces is attr else {"rng": "captum"}
    tunnel = faces.NoiseTunnel(faces.Saliency(model), **more)
    result: Tensor = tunnel.attribute(inputs, target=1, nt_samples=10)
    return result


def measured(network: str, call: str, most: float = SECONDS) -> CallRow:
    """Check one call against captum's, then time both in turns."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[network]()
    model.eval()
    run = CALLS[call]
    theirs, ours = (run(faces, model, inputs).detach() for faces in (attr, pysal.captum))
    difference = float((theirs - ours).abs().max() / theirs.abs().max())
    seconds: dict[str, list[float]] = {"captum": [], "pysal": []}
    rounds, spent = 0, 0.0
    while rounds < ROUNDS or (rounds < MOST_ROUNDS and spent < most):
        rounds += 1
        for name, faces in (("captum", attr), ("pysal", pysal.captum)):
            began = time.process_time()  # which what else runs on the machine does not change
            run(faces, model, inputs)
            seconds[name].append(time.process_time() - began)
            spent += seconds[name][-1]
    captum, own = (min(some) for some in seconds.values())
    return CallRow(network, call, rounds, round(1e6 * captum, 1), round(1e6 * own, 1), round(captum / own, 3), difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder for the results")
    parser.add_argument("--calls", nargs="+", help="these only; the rows of the others stay")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'network':30} {'call':20} {'captum us':>10} {'pysal us':>10} {'ratio':>6} {'differs':>8}")
    for network in NETWORKS:
        for call in CALLS:
            if fits(call, network) and (options.calls is None or call in options.calls):
                rows.append(measured(network, call, options.seconds))
                one = rows[-1]
                numbers = f"{one.captum_us:10.0f} {one.pysal_us:10.0f} {one.captum_over_pysal:6.2f} {one.difference:8.1e}"
                print(f"{one.network:30} {one.call:20} {numbers}", flush=True)
    if options.results is not None:
        cpu = torch.device("cpu")
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"calls--{common.device_name(cpu)}.json"
        found = [asdict(row) for row in rows]
        kept = json.loads(path.read_text())["rows"] if options.calls is not None and path.exists() else []
        kept = [row for row in kept if row["call"] not in options.calls]
        path.write_text(json.dumps({"metadata": common.metadata(cpu, 0.0), "rows": kept + found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
