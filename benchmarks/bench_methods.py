"""Each method against what people would use instead, on real networks. Run by `make bench`; `bench_gpu.py` runs it on a GPU."""

import math
import time
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
from benchmarks.common import MethodRow, alternate_methods, first_run, git, host_clock, median_and_iqr, seconds_of
from benchmarks.conftest import MethodReport
from benchmarks.networks import LAYERS, NETWORKS, ON_A_CPU, photo

OURS = "pysal"
STEPS = SAMPLES = 50
BLUR_STEPS, MAX_SIGMA = 100, 50.0
WINDOW, SEGMENTS = 16, 100
CLASSES = tuple(range(100))
NOISE = 0.15
CPU = torch.device("cpu")
# How often each setting of a peer is tried, and from what multiple of the fastest's time on it is not tried again.
TRIALS, HOPELESS = 3, 1.5
# Explaining the images of a batch one by one is given up when it would take longer than this.
PATIENCE_SECONDS = 5.0
# Agreed bounds on the relative l2 difference of two maps. Two right float32 computations differ by gates that flip where an
# activation is next to zero (docs/design.md): 2e-2 on a random ResNet-50. A wrong rule makes differences of order 1.
GATES = 5e-2
# Of the largest drop: nothing but rounding.
DROPS = 1e-3


@dataclass(frozen=True)
class Settings:
    """What is tried to find a peer's best setting, on a shorter run.

    Attributes:
        single: images per pass of who explains one image.
        steps: of a path, samples or classes, in the shorter run.
        batch: images per pass of who explains a batch.
        forward: the same without a backward pass.
        windows: size of the windows in the shorter run; smaller ones are more passes.
    """

    single: tuple[int, ...] = (1, 4, 8)
    steps: int = 8
    batch: tuple[int, ...] = (1, 4, 8)
    forward: tuple[int, ...] = (1, 4, 16)
    windows: int = 56


class TooLong(Exception):
    """A candidate was not waited for."""


class Subject:
    """One network and what is explained about it: one class, for every image."""

    settings = Settings()
    now: Callable[[], float] = staticmethod(host_clock)

    def __init__(self, network: str, device: torch.device = CPU) -> None:
        self.network, self.device = network, device
        self.model = NETWORKS[network]().to(device)
        self.image = photo("chelsea").to(device)
        with torch.no_grad():
            self.target = int(self.model(self.image).argmax())
        self.fast = pysal.prepare(self.model, self.image)
        self.layer_name = LAYERS[network]
        self.layer = self.model.get_submodule(self.layer_name)
        self.labels = pysal.Slic(SEGMENTS).cut(self.image).labels[0]

    @cached_property
    def double(self) -> nn.Module:
        """The model in float64."""
        return NETWORKS[self.network]().double().to(self.device)

    @property
    def images(self) -> int:
        """How many are explained together."""
        return len(self.image)

    def each(self, explain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the maps of someone who explains one image at a time, and takes no batch.

        Raises:
            TooLong: the second image says that all of them would take too long.
        """
        maps: list[Tensor] = []
        for one in self.image.split(1):
            started = time.perf_counter()
            maps.append(explain(one))
            seconds = time.perf_counter() - started
            if len(maps) == 2 and seconds * self.images > PATIENCE_SECONDS:
                raise TooLong(f"explains one image at a time, {seconds:.2g} s each")
        return torch.cat(maps)

    def tried(self, trial: Callable[[int], object], settings: Sequence[int]) -> "Trials":
        """Time a shorter run with each setting."""
        return tried(trial, settings, self.now)


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
    """All the ways to one map.

    Attributes:
        candidates: ours first.
        method: (model, images) -> ours; None where one image on the CPU is all that is measured.
        reference: the map that all are held against; None = what "by hand" gives.
        bound: on the distance from it.
        distance: of two maps; None = `relative`.
        missing: who has no such map -> why.
    """

    candidates: list[Candidate]
    method: Callable[[Any, Tensor], Tensor] | None = None
    reference: Callable[[], Tensor] | None = None
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


def ends(batch: Tensor) -> Tensor:
    """Return the first and the last of a batch, which of one is that one."""
    return batch if len(batch) < 3 else batch[[0, -1]]


@dataclass(frozen=True)
class Trials:
    """Short runs of a peer: batch size -> seconds."""

    seconds: dict[int, float]

    @property
    def best(self) -> int:
        return min(self.seconds, key=self.seconds.__getitem__)

    def why_not(self, batch: int) -> str:
        return f"{self.seconds[batch] / self.seconds[self.best]:.2f} times its best setting's time in the trial of settings"


def tried(trial: Callable[[int], object], batches: Sequence[int], now: Callable[[], float] = host_clock) -> Trials:
    """Time a trial run with each batch size, in turn, and keep the least time of each: what else runs only adds to it.

    A batch size that fails takes for ever; where all do, the first is the best, and the full run will say why.
    """
    least = dict.fromkeys(batches, math.inf)
    trying = [batches[0], *batches]  # the first run of all makes what later runs find
    for number in range(TRIALS):
        for batch in trying:
            try:
                seconds = seconds_of(partial(trial, batch), now)
            except Exception:  # a peer may fail in any way
                least[batch] = math.inf
                trying = [one for one in trying if one != batch]
                continue
            least[batch] = min(least[batch], seconds)
        best = min(least.values())
        # what a first run makes for later ones is no reason to give up on a setting
        trying = [batch for batch in dict.fromkeys(trying) if number == 0 or least[batch] <= HOPELESS * best]
    return Trials(least)


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


def ours(method: Callable[[Any, Tensor], Tensor], subject: Subject, *, every_round: bool = True) -> list[Candidate]:
    """The method on the prepared model and on the model as it is."""
    return [
        Candidate(OURS, lambda: method(subject.fast, subject.image), "prepared", True),
        Candidate(f"{OURS}, unprepared", lambda: method(subject.model, subject.image), "", every_round),
    ]


def windows(subject: Subject) -> Comparison:
    model, image, target, settings = subject.model, subject.image, subject.target, subject.settings

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.leave_one_out(model, image, target, segments=pysal.Window(WINDOW), score="logit")

    def occlusion(size: int, at_once: int | None) -> Tensor:
        return peers.captum_occlusion(model, image, target, size, at_once or 1)

    best = subject.tried(lambda batch: occlusion(settings.windows, batch), settings.forward).best
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(lambda one: by_hand.occlusion(model, one, target, WINDOW))),
            *captum("perturbations_per_eval", 1, best, partial(occlusion, WINDOW), "best"),
        ],
        method,
        bound=DROPS,
        distance=of_largest,
        missing={"PAIR": "its window moves by one pixel only: 43,682 forward passes"},
    )


def segments(subject: Subject) -> Comparison:
    model, image, target, labels = subject.model, subject.image, subject.target, subject.labels
    places = [torch.arange(size, device=subject.device) * 4 // size for size in image.shape[2:]]
    quarters = (places[0][:, None] * 4 + places[1]).int()

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.leave_one_out(model, image, target, segments=labels, score="logit")

    def ablation(mask: Tensor, at_once: int | None) -> Tensor:
        return peers.captum_ablation(model, image, target, mask, at_once or 1)

    best = subject.tried(lambda batch: ablation(quarters, batch), subject.settings.forward).best
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(lambda one: by_hand.ablation(model, one, target, labels))),
            *captum("perturbations_per_eval", 1, best, partial(ablation, labels), "best"),
        ],
        method,
        bound=DROPS,
        distance=of_largest,
        missing={"PAIR": "it has no superpixels here (XRAI ranks regions by IG, another method)"},
    )


def integrated_gradients(subject: Subject) -> Comparison:
    model, image, target, settings = subject.model, subject.image, subject.target, subject.settings

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.integrated_gradients(model, image, target, steps=STEPS, quadrature="gauss_legendre", placement="uniform")

    def of_captum(steps: int, batch: int | None) -> Tensor:
        return peers.captum_integrated_gradients(model, image, target, steps, batch)

    def pair(image: Tensor, steps: int, batch: int | None) -> Tensor:
        return peers.pair_integrated_gradients(model, image, target, steps, batch or 1)

    def same_rule() -> float:
        """PAIR averages points that include both ends, another quadrature: a few steps of that by hand."""
        return relative(pair(image[:1], 6, 3), by_hand.integrated_gradients(model, image[:1], target, 6, ends=True))

    best = subject.tried(lambda batch: of_captum(settings.steps, batch), settings.batch).best
    trials = subject.tried(lambda batch: pair(image[:1], settings.steps, batch), settings.single)
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(lambda one: by_hand.integrated_gradients(model, one, target, STEPS))),
            *captum("internal_batch_size", None, best, partial(of_captum, STEPS)),
            Candidate(
                "PAIR, best",
                lambda: subject.each(lambda one: pair(one, STEPS, trials.best)),
                f"batch_size={trials.best}",
                difference=same_rule,
            ),
        ],
        method,
        missing={} if trials.best == 1 else {"PAIR, default": trials.why_not(1)},
    )


def smooth_grad(subject: Subject) -> Comparison:
    model, image, target, settings = subject.model, subject.image, subject.target, subject.settings
    # the same noise for every image, so that a map does not depend on who else is in the batch
    options: dict[str, Any] = {"samples": SAMPLES, "noise": NOISE, "image_ids": [0] * len(image)}
    found = pysal.explain(subject.fast, image, target, methods=["smooth_grad"], method_options={"smooth_grad": options})
    result = found.results["smooth_grad"]
    spread = 2**0.5 * result.details["standard_error"].double()

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.smooth_grad(model, image, target, **options | {"image_ids": [0] * len(image)})

    def errors(one: Tensor, other: Tensor) -> float:
        """How far apart two means of independent samples are, in standard errors; 0 for the same noise."""
        own = spread if len(one) == len(spread) else ends(spread)
        return float(((one.double() - other.double()) / own.clamp_min(1e-30)).square().mean().sqrt())

    def tunnel(samples: int, batch: int | None) -> Tensor:
        return peers.captum_smooth_grad(model, image, target, samples, NOISE, batch)

    best = subject.tried(
        lambda batch: tunnel(settings.steps, batch), [max(1, rows // subject.images) for rows in settings.batch]
    ).best
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(lambda one: by_hand.smooth_grad(model, one, target, SAMPLES, NOISE))),
            *captum("nt_samples_batch_size", None, best, partial(tunnel, SAMPLES)),
            Candidate("PAIR", lambda: subject.each(lambda one: peers.pair_smooth_grad(model, one, target, SAMPLES, NOISE))),
        ],
        method,
        reference=lambda: result.map,
        distance=errors,
        bound=1.5,
    )


def blur_integrated_gradients(subject: Subject) -> Comparison:
    model, image, target, settings = subject.model, subject.image, subject.target, subject.settings

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.blur_integrated_gradients(
            model, image, target, steps=BLUR_STEPS, max_sigma=MAX_SIGMA, quadrature="left", placement="uniform"
        )

    def hand(image: Tensor) -> Tensor:
        return by_hand.blur_integrated_gradients(model, image, target, BLUR_STEPS, MAX_SIGMA)

    def pair(image: Tensor, steps: int, batch: int | None) -> Tensor:
        return peers.pair_blur_integrated_gradients(model, image, target, steps, MAX_SIGMA, batch or 1)

    trials = subject.tried(lambda batch: pair(image[:1], settings.steps, batch), settings.single)
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(hand)),
            Candidate(
                "PAIR, best",
                lambda: subject.each(lambda one: pair(one, BLUR_STEPS, trials.best)),
                f"batch_size={trials.best}",
                True,
            ),
        ],
        method,
        missing={"captum": "it has no Blur IG"} | ({} if trials.best == 1 else {"PAIR, default": trials.why_not(1)}),
    )


def gradient(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.gradient(model, image, target)

    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: by_hand.gradient(model, image, target)),
            Candidate("captum", lambda: peers.captum_gradient(model, image, target)),
            Candidate("PAIR", lambda: subject.each(lambda one: peers.pair_gradient(model, one, target))),
        ],
        method,
        reference=lambda: by_hand.gradient(subject.double, image.double(), target),
    )


def guided_backprop(subject: Subject) -> Comparison:
    model, image, target = subject.model, subject.image, subject.target

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.guided_backprop(model, image, target)

    return with_pytorch_grad_cam(
        Comparison(
            [
                *ours(method, subject),
                Candidate("by hand", lambda: by_hand.guided_backprop(model, image, target)),
                Candidate("captum", lambda: peers.captum_guided_backprop(model, image, target)),
            ],
            method,
            reference=lambda: by_hand.guided_backprop(subject.double, image.double(), target),
            missing={"PAIR": "it has no guided backprop for torch"},
        )
    )


def grad_cam(subject: Subject) -> Comparison:
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.grad_cam(model, image, target, layer=subject.layer_name)

    return with_pytorch_grad_cam(
        Comparison(
            [
                *ours(method, subject),
                Candidate("by hand", lambda: by_hand.grad_cam(model, image, target, layer)),
                Candidate("captum", lambda: peers.captum_grad_cam(model, image, target, layer)),
                Candidate("PAIR", lambda: subject.each(lambda one: peers.pair_grad_cam(model, one, target, layer))),
            ],
            method,
            reference=lambda: by_hand.grad_cam(
                subject.double, image.double(), target, subject.double.get_submodule(subject.layer_name)
            ),
        )
    )


def guided_grad_cam(subject: Subject) -> Comparison:
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.guided_grad_cam(model, image, target, layer=subject.layer_name)

    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: by_hand.guided_grad_cam(model, image, target, layer)),
            Candidate("captum", lambda: peers.captum_guided_grad_cam(model, image, target, layer)),
        ],
        method,
        reference=lambda: by_hand.guided_grad_cam(
            subject.double, image.double(), target, subject.double.get_submodule(subject.layer_name)
        ),
    )


FOUR = ["gradient", "guided_backprop", "grad_cam", "guided_grad_cam"]


def four_methods(subject: Subject) -> Comparison:
    """Four maps, one above the other; those of captum from four calls."""
    model, image, target, layer = subject.model, subject.image, subject.target, subject.layer

    def method(model: Any, image: Tensor) -> Tensor:
        options = {name: {"layer": subject.layer_name} for name in FOUR if "cam" in name}
        return stacked(list(pysal.explain(model, image, target, methods=FOUR, method_options=options).maps.values()))

    def each(module: Any, prefix: str, model: nn.Module, image: Tensor, layer: nn.Module) -> Tensor:
        more: Mapping[str, tuple[Any, ...]] = {"grad_cam": (layer,), "guided_grad_cam": (layer,)}
        return stacked([getattr(module, prefix + name)(model, image, target, *more.get(name, ())) for name in FOUR])

    return Comparison(
        [
            *ours(method, subject, every_round=False),
            Candidate("by hand", lambda: each(by_hand, "", model, image, layer)),
            Candidate("captum", lambda: each(peers, "captum_", model, image, layer)),
        ],
        method,
        reference=lambda: each(by_hand, "", subject.double, image.double(), subject.double.get_submodule(subject.layer_name)),
    )


def stacked(maps: list[Tensor]) -> Tensor:
    """Maps of any number of channels side by side, (B, values), each of unit norm: a wrong one is seen beside a large one."""
    return torch.cat([torch.nn.functional.normalize(one.flatten(1), dim=1, eps=0) for one in maps], 1)


def gradients_of_100_classes(subject: Subject) -> Comparison:
    model, image, single = subject.model, subject.image, subject.settings.single

    def method(model: Any, image: Tensor) -> Tensor:
        return pysal.class_gradients(model, image, CLASSES)

    def hand(image: Tensor) -> Tensor:
        return by_hand.gradients_of_classes(model, image, CLASSES)[None]

    def saliency(image: Tensor, classes: Sequence[int], batch: int | None) -> Tensor:
        return peers.captum_gradients_of_classes(model, image, classes, batch or 1)[None]

    best = subject.tried(lambda batch: saliency(image[:1], CLASSES[: max(single)], batch), single).best
    return Comparison(
        [
            *ours(method, subject),
            Candidate("by hand", lambda: subject.each(hand)),
            *captum(
                "images per call",
                1,
                best,
                lambda batch: subject.each(lambda one: saliency(one, CLASSES, batch)),
                "default",
            ),
        ],
        method,
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
@pytest.mark.parametrize("network", ON_A_CPU)
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
