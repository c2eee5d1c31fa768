"""Each method against what people would use instead, on real networks. Run by `make bench`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from benchmarks import by_hand, peers
from benchmarks.common import MethodRow, alternate_methods, first_run, git, median_and_iqr, seconds_of
from benchmarks.conftest import MethodReport
from benchmarks.networks import LAYERS, NETWORKS, photo

OURS = "pysal"
STEPS = SAMPLES = 50
BLUR_STEPS, MAX_SIGMA = 100, 50.0
WINDOW, SEGMENTS = 16, 100
CLASSES = tuple(range(100))
NOISE = 0.15
# Batch sizes that are tried for a peer, on a shorter run; the fastest is the peer's "best".
BATCHES = (1, 4, 8)
# Agreed bounds on the relative l2 difference of two maps. Two right float32 computations differ by gates that flip where an
# activation is next to zero (docs/design.md): 2e-2 on a random ResNet-50. A wrong rule makes differences of order 1.
GATES = 5e-2
# Of the largest drop: nothing but rounding.
DROPS = 1e-3


class Subject:
    """One network and what is explained about it."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.model = NETWORKS[network]()
        self.image = photo("chelsea")
        with torch.no_grad():
            self.target = int(self.model(self.image).argmax())
        self.fast = pysal.prepare(self.model, self.image)
        self.layer_name = LAYERS[network]
        self.layer = self.model.get_submodule(self.layer_name)
        self.labels = pysal.Slic(SEGMENTS).cut(self.image).labels[0]

    @cached_property
    def double(self) -> nn.Module:
        """The model in float64."""
        return NETWORKS[self.network]().double()


@lru_cache(maxsize=1)
def subject_of(network: str) -> Subject:
    return Subject(network)


@dataclass(frozen=True)
class Candidate:
    """One way to a map.

    `every_round`: timed as often as ours even where that takes long. `difference`: measured in a way of its own.
    """

    name: str
    run: Callable[[], Tensor]
    setting: str = ""
    every_round: bool = False
    difference: Callable[[], float] | None = None


@dataclass
class Comparison:
    """All the ways to one map."""

    candidates: list[Candidate]
    reference: Callable[[], Tensor] | None = None  # None: what "by hand" gives
    bound: float = GATES
    distance: Callable[[Tensor, Tensor], float] | None = None
    missing: dict[str, str] = field(default_factory=dict)


def relative(found: Tensor, expected: Tensor) -> float:
    """l2 norm of the difference in units of the expected map's."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def of_largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest value."""
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Trials:
    """Short runs of a peer: batch size -> seconds."""

    seconds: dict[int, float]

    @property
    def best(self) -> int:
        return min(self.seconds, key=self.seconds.__getitem__)

    def why_not(self, batch: int) -> str:
        return f"{self.seconds[batch] / self.seconds[self.best]:.2f} times its best setting's time in the trial of settings"


def tried(trial: Callable[[int], object], batches: Sequence[int] = BATCHES) -> Trials:
    """Time a trial run with each batch size."""
    trial(batches[0])
    return Trials({batch: seconds_of(lambda batch=batch: trial(batch)) for batch in batches})


def captum(
    argument: str, default: int | None, best: int, run: Callable[[int | None], Tensor], every_round: str = "default, best"
) -> list[Candidate]:
    """What captum takes as it comes and at its best setting; one candidate where that is the same."""
    if default == best:
        return [Candidate("captum, default and best", partial(run, best), f"{argument}={best}", True)]
    return [
        Candidate("captum, default", partial(run, default), f"{argument}={default}", "default" in every_round),
        Candidate("captum, best", partial(run, best), f"{argument}={best}", "best" in every_round),
    ]


def ours(method: Callable[..., Tensor], subject: Subject, **options: Any) -> list[Candidate]:
    """The method on the prepared model and on the model as it is."""
    return [
        Candidate(OURS, lambda: method(subject.fast, subject.image, subject.target, **options), "prepared", True),
        Candidate(f"{OURS}, unprepared", lambda: method(subject.model, subject.image, subject.target, **options), "", True),
    ]


def windows(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target

    def occlusion(size: int, at_once: int | None) -> Tensor:
        return peers.captum_occlusion(model, image, target, size, at_once or 1)

    best = tried(lambda batch: occlusion(56, batch), (1, 4, 16)).best
    return Comparison(
        [
            *ours(pysal.leave_one_out, subject, segments=pysal.Window(WINDOW), score="logit"),
            Candidate("by hand", lambda: by_hand.occlusion(model, image, target, WINDOW)),
            *captum("perturbations_per_eval", 1, best, partial(occlusion, WINDOW), "best"),
        ],
        bound=DROPS,
        distance=of_largest,
        missing={"PAIR": "its window moves by one pixel only: 43,682 forward passes"},
    )


def segments(subject: Subject) -> Comparison:
    model, image, target, labels = subject.model, subject.image, subject.target, subject.labels
    quarters = (torch.arange(224)[:, None] // 56 * 4 + torch.arange(224) // 56).int()

    def ablation(mask: Tensor, at_once: int | None) -> Tensor:
        return peers.captum_ablation(model, image, target, mask, at_once or 1)

    best = tried(lambda batch: ablation(quarters, batch), (1, 4, 16)).best
    return Comparison(
        [
            *ours(pysal.leave_one_out, subject, segments=labels, score="logit"),
            Candidate("by hand", lambda: by_hand.ablation(model, image, target, labels)),
            *captum("perturbations_per_eval", 1, best, partial(ablation, labels), "best"),
        ],
        bound=DROPS,
        distance=of_largest,
        missing={"PAIR": "it has no superpixels here (XRAI ranks regions by IG, another method)"},
    )


def integrated_gradients(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target

    def of_captum(steps: int, batch: int | None) -> Tensor:
        return peers.captum_integrated_gradients(model, image, target, steps, batch)

    def pair(steps: int, batch: int | None) -> Tensor:
        return peers.pair_integrated_gradients(model, image, target, steps, batch or 1)

    def same_rule() -> float:
        """PAIR averages points that include both ends, another quadrature: a few steps of that by hand."""
        return relative(pair(6, 3), by_hand.integrated_gradients(model, image, target, 6, ends=True))

    best = tried(lambda batch: of_captum(8, batch)).best
    trials = tried(lambda batch: pair(8, batch))
    return Comparison(
        [
            *ours(pysal.integrated_gradients, subject, steps=STEPS, quadrature="gauss_legendre", placement="uniform"),
            Candidate("by hand", lambda: by_hand.integrated_gradients(model, image, target, STEPS)),
            *captum("internal_batch_size", None, best, partial(of_captum, STEPS)),
            Candidate("PAIR, best", lambda: pair(STEPS, trials.best), f"batch_size={trials.best}", difference=same_rule),
        ],
        missing={} if trials.best == 1 else {"PAIR, default": trials.why_not(1)},
    )


def smooth_grad(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target
    options = {"samples": SAMPLES, "noise": NOISE}
    found = pysal.explain(subject.fast, image, ["smooth_grad"], target, method_options={"smooth_grad": options})
    result = found.results["smooth_grad"]
    spread = 2**0.5 * result.details["standard_error"].double()

    def errors(one: Tensor, other: Tensor) -> float:
        """How far apart two means of independent samples are, in standard errors; 0 for the same noise."""
        return float(((one.double() - other.double()) / spread.clamp_min(1e-30)).square().mean().sqrt())

    def tunnel(samples: int, batch: int | None) -> Tensor:
        return peers.captum_smooth_grad(model, image, target, samples, NOISE, batch)

    best = tried(lambda batch: tunnel(8, batch)).best
    return Comparison(
        [
            *ours(pysal.smooth_grad, subject, **options),
            Candidate("by hand", lambda: by_hand.smooth_grad(model, image, target, SAMPLES, NOISE)),
            *captum("nt_samples_batch_size", None, best, partial(tunnel, SAMPLES)),
            Candidate("PAIR", lambda: peers.pair_smooth_grad(model, image, target, SAMPLES, NOISE)),
        ],
        reference=lambda: result.map,
        distance=errors,
        bound=1.5,
    )


def blur_integrated_gradients(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target

    def pair(steps: int, batch: int | None) -> Tensor:
        return peers.pair_blur_integrated_gradients(model, image, target, steps, MAX_SIGMA, batch or 1)

    trials = tried(lambda batch: pair(8, batch))
    return Comparison(
        [
            *ours(
                pysal.blur_integrated_gradients,
                subject,
                steps=BLUR_STEPS,
                max_sigma=MAX_SIGMA,
                quadrature="left",
                placement="uniform",
            ),
            Candidate("by hand", lambda: by_hand.blur_integrated_gradients(model, image, target, BLUR_STEPS, MAX_SIGMA)),
            Candidate("PAIR, best", lambda: pair(BLUR_STEPS, trials.best), f"batch_size={trials.best}", True),
        ],
        missing={"captum": "it has no Blur IG"} | ({} if trials.best == 1 else {"PAIR, default": trials.why_not(1)}),
    )


def gradient(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target
    return Comparison(
        [
            *ours(pysal.gradient, subject),
            Candidate("by hand", lambda: by_hand.gradient(model, image, target)),
            Candidate("captum", lambda: peers.captum_gradient(model, image, target)),
            Candidate("PAIR", lambda: peers.pair_gradient(model, image, target)),
        ],
        reference=lambda: by_hand.gradient(subject.double, image.double(), target),
    )


def guided_backprop(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target
    return with_pytorch_grad_cam(
        Comparison(
            [
                *ours(pysal.guided_backprop, subject),
                Candidate("by hand", lambda: by_hand.guided_backprop(model, image, target)),
                Candidate("captum", lambda: peers.captum_guided_backprop(model, image, target)),
            ],
            reference=lambda: by_hand.guided_backprop(subject.double, image.double(), target),
            missing={"PAIR": "it has no guided backprop for torch"},
        )
    )


def grad_cam(subject: Subject) -> Comparison:
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer
    double = subject.double.get_submodule(subject.layer_name)
    return with_pytorch_grad_cam(
        Comparison(
            [
                *ours(pysal.grad_cam, subject, layer=subject.layer_name),
                Candidate("by hand", lambda: by_hand.grad_cam(model, image, target, layer)),
                Candidate("captum", lambda: peers.captum_grad_cam(model, image, target, layer)),
                Candidate("PAIR", lambda: peers.pair_grad_cam(model, image, target, layer)),
            ],
            reference=lambda: by_hand.grad_cam(subject.double, image.double(), target, double),
        )
    )


def guided_grad_cam(subject: Subject) -> Comparison:
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer
    double = subject.double.get_submodule(subject.layer_name)
    return Comparison(
        [
            *ours(pysal.guided_grad_cam, subject, layer=subject.layer_name),
            Candidate("by hand", lambda: by_hand.guided_grad_cam(model, image, target, layer)),
            Candidate("captum", lambda: peers.captum_guided_grad_cam(model, image, target, layer)),
        ],
        reference=lambda: by_hand.guided_grad_cam(subject.double, image.double(), target, double),
    )


FOUR = ["gradient", "guided_backprop", "grad_cam", "guided_grad_cam"]


def four_methods(subject: Subject) -> Comparison:
    """Four maps, one above the other; those of captum from four calls."""
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer

    def explained(model: Any) -> Tensor:
        options = {name: {"layer": subject.layer_name} for name in FOUR if "cam" in name}
        return stacked(list(pysal.explain(model, image, FOUR, target, method_options=options).maps.values()))

    def each(module: Any, prefix: str, model: nn.Module, image: Tensor, layer: nn.Module) -> Tensor:
        more: Mapping[str, tuple[Any, ...]] = {"grad_cam": (layer,), "guided_grad_cam": (layer,)}
        return stacked([getattr(module, prefix + name)(model, image, target, *more.get(name, ())) for name in FOUR])

    double = subject.double.get_submodule(subject.layer_name)
    return Comparison(
        [
            Candidate(OURS, lambda: explained(subject.fast), "prepared", True),
            Candidate(f"{OURS}, unprepared", lambda: explained(model)),
            Candidate("by hand", lambda: each(by_hand, "", model, image, layer)),
            Candidate("captum", lambda: each(peers, "captum_", model, image, layer)),
        ],
        reference=lambda: each(by_hand, "", subject.double, image.double(), double),
    )


def stacked(maps: list[Tensor]) -> Tensor:
    """Maps of any number of channels in one tensor, each of unit norm, so that a wrong one is seen beside a large one."""
    return torch.cat([(one / one.norm()).flatten() for one in maps])


def gradients_of_100_classes(subject: Subject) -> Comparison:
    model, image = subject.model, subject.image

    def all_classes(model: Any) -> Tensor:
        return pysal.class_gradients(model, image, CLASSES)[0]

    def saliency(classes: Sequence[int], batch: int | None) -> Tensor:
        return peers.captum_gradients_of_classes(model, image, classes, batch or 1)

    best = tried(lambda batch: saliency(CLASSES[:8], batch)).best
    return Comparison(
        [
            Candidate(OURS, lambda: all_classes(subject.fast), "prepared", True),
            Candidate(f"{OURS}, unprepared", lambda: all_classes(model), "", True),
            Candidate("by hand", lambda: by_hand.gradients_of_classes(model, image, CLASSES)),
            *captum("images per call", 1, best, partial(saliency, CLASSES), "default"),
        ]
    )


def with_pytorch_grad_cam(comparison: Comparison) -> Comparison:
    """Note that pytorch-grad-cam is missing; it is no requirement of this repository."""
    comparison.missing["pytorch-grad-cam"] = peers.why_no_pytorch_grad_cam()
    return comparison


METHODS: dict[str, Callable[[Subject], Comparison]] = {
    "leave_one_out_windows": windows,
    "leave_one_out_segments": segments,
    "integrated_gradients": integrated_gradients,
    "smooth_grad": smooth_grad,
    "blur_integrated_gradients": blur_integrated_gradients,
    "gradient": gradient,
    "guided_backprop": guided_backprop,
    "grad_cam": grad_cam,
    "guided_grad_cam": guided_grad_cam,
    "four_methods": four_methods,
    "gradients_of_100_classes": gradients_of_100_classes,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore")  # the peers'
def test_method(method: str, network: str, benchmark: Any, method_report: MethodReport, request: pytest.FixtureRequest) -> None:
    comparison = METHODS[method](subject_of(network))
    measure(method, network, comparison, benchmark, method_report, request.config.getoption("--rounds"))


def measure(
    method: str, network: str, comparison: Comparison, benchmark: Any, method_report: MethodReport, rounds: int | None
) -> None:
    """Hold every candidate's map against the reference, time the candidates in turn, and report both."""
    candidates = {candidate.name: candidate for candidate in comparison.candidates}
    distance = comparison.distance or relative
    maps, firsts, peaks, failed = {}, {}, {}, dict(comparison.missing)
    for name, candidate in candidates.items():
        try:
            maps[name], firsts[name], peaks[name] = first_run(candidate.run)
        except Exception as error:  # a peer may fail in any way, and its row says so
            if name.startswith(OURS):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    expected = maps["by hand"] if comparison.reference is None else comparison.reference()
    bound, differences = comparison.bound, {}
    for name, found in maps.items():
        of_its_own = candidates[name].difference
        differences[name] = distance(found, expected) if of_its_own is None else of_its_own()
        if name.startswith(OURS):
            assert differences[name] <= bound, f"{name} is {differences[name]:.1e} away"
    always = [name for name, candidate in candidates.items() if candidate.every_round]
    runs = {name: candidates[name].run for name in maps}
    measured = {"commit": git("rev-parse", "HEAD"), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    samples = alternate_methods(benchmark, runs, firsts, always, rounds)
    for name, seconds in samples.items():
        median, iqr = median_and_iqr(seconds)
        ratio, ratio_iqr = median_and_iqr([one / our for one, our in zip(seconds, samples[OURS], strict=False)])
        method_report.rows.append(
            MethodRow(
                method=method,
                network=network,
                candidate=name,
                setting=candidates[name].setting,
                samples=len(seconds),
                median_s=round(median, 5),
                iqr_s=round(iqr, 5),
                times_as_long_as_ours=round(ratio, 3),
                times_as_long_as_ours_iqr=round(ratio_iqr, 3),
                peak_mem_bytes=peaks[name],
                difference=float(f"{differences[name]:.3g}"),
                bound=bound,
                agrees=differences[name] <= bound,
                **measured,
            )
        )
    for name, reason in failed.items():
        method_report.rows.append(MethodRow(method, network, name, "", 0, *[None] * 8, **measured, failed=reason))
