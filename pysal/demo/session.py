"""What the page asks for, without the page: photos, models, answers, and maps of which none is computed twice."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from pysal import models
from pysal._checks import refuse, refuse_unknown
from pysal.demo.turns import Turns
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.payback import OnceItPays
from pysal.engine.prepared.prepare import prepare
from pysal.engine.request.attribution import default_of
from pysal.engine.request.row_score import class_scores
from pysal.engine.request.score import Look, ScoreKind, probabilities
from pysal.engine.running.chunks import Cancelled, fast_rows, progress
from pysal.explain import explain
from pysal.explanation import Explanation, MethodResult
from pysal.methods.blur_integrated_gradients import blur_integrated_gradients
from pysal.methods.integrated_gradients import integrated_gradients
from pysal.methods.registry import EVERY
from pysal.methods.smooth_grad import smooth_grad
from pysal.segments import Grid, Slic, Window

WHERE = "pysal demo"
PHOTOS = models.example_photo().parent
COLLAGE = "collage"
# Maps kept at most: of 224 x 224 pixels and three channels, 60 MB.
REMEMBERED = 100
# Of Shapley values, interactions and RISE: 16 segments in halves are exact, and all pairs of 27.
PASSES = 400
# Methods that are made from one pass together: all that ask for gradients of the unchanged photo.
TOGETHER = ("gradient", "guided_backprop", "grad_cam", "guided_grad_cam")

Report = Callable[[str, float], None]
"""Called as report("Integrated Gradients: 24 of 50", 0.48): what is done, and what share of it."""


# Photos --------------------------------------------------------------------------------------------------------------


@cache
def photos() -> dict[str, tuple[str, Path | Image.Image]]:
    """Return the photos that come with the page: key -> (caption, what `read_image` takes)."""
    return {
        COLLAGE: ("Cat and coffee", _side_by_side(PHOTOS / "persian_cat.jpg", PHOTOS / "coffee.jpg")),
        "siamese_cat": ("Siamese cat", PHOTOS / "siamese_cat.jpg"),
        "egyptian_cat": ("Egyptian cat", PHOTOS / "egyptian_cat.jpg"),
        "tabby_cat": ("Tabby", PHOTOS / "tabby_cat.jpg"),
        "persian_cat": ("Persian cat", PHOTOS / "persian_cat.jpg"),
        "chelsea": ("Chelsea", PHOTOS / "chelsea.jpg"),
        "coffee": ("Coffee", PHOTOS / "coffee.jpg"),
        "camera": ("Camera man", PHOTOS / "camera.jpg"),
    }


def _side_by_side(left: Path, right: Path, side: int = 480) -> Image.Image:
    """Return a square of two photos: a picture with two classes that are both there to be found."""
    square = Image.new("RGB", (side, side))
    for place, path in enumerate((left, right)):
        with Image.open(path) as photo:
            half = ImageOps.fit(photo.convert("RGB"), (side // 2, side), Image.Resampling.LANCZOS)
        square.paste(half, (place * side // 2, 0))
    return square


# Options -------------------------------------------------------------------------------------------------------------

Fill = Literal["black", "white", "mean", "blur"]


@dataclass(frozen=True)
class Options:
    """What a reader can move.

    Attributes:
        cut: how a photo is cut into segments: "superpixels", "grid" or "windows", which overlap by half.
        segments: about how many.
        fill: what takes the place of a segment.
        smoothed: the method that SmoothGrad averages.
        noise: standard deviation in shares of the photo's range.
        samples: noisy copies.
        baseline: where the path of Integrated Gradients begins.
        steps: of both integrated gradients.
        sigma: where the path of Blur Integrated Gradients begins, pixels.
        layer: where Grad-CAM and Guided Grad-CAM look; "" = the last layer that fits.
        score: the number explained by all methods, as `pysal.explain` takes it; "" = each method's own.
    """

    cut: str = "superpixels"
    segments: int = 49
    fill: str = "black"
    smoothed: str = "gradient"
    noise: float = default_of(smooth_grad, "noise")
    samples: int = 20
    baseline: str = "black"
    steps: int = default_of(integrated_gradients, "steps")
    sigma: float = default_of(blur_integrated_gradients, "max_sigma")
    layer: str = ""
    score: ScoreKind | Literal[""] = ""

    def of(self, method: str, size: tuple[int, int]) -> dict[str, Any]:
        """Return the options of one method for photos of (height, width) pixels.

        Raises:
            ValueError: a way to cut that is none.
        """
        layer = {"layer": self.layer.strip()} if self.layer.strip() else {}

        def of_sets() -> dict[str, Any]:  # of segments, which must not overlap
            cut = "grid" if self.cut == "windows" else self.cut
            passes = max(PASSES, 5 * int(self.segments))  # an estimate takes four of each, and superpixels may be some more
            return {"segments": replace(self, cut=cut)._segments(size), "fill": self.fill, "passes": passes}

        own: dict[str, Callable[[], dict[str, Any]]] = {
            "grad_cam": lambda: layer,
            "guided_grad_cam": lambda: layer,
            "leave_one_out": lambda: {"segments": self._segments(size), "fill": self.fill},
            "shapley": of_sets,
            "interactions": of_sets,
            "rise": lambda: {"fill": self.fill, "samples": PASSES, "centred": True},
            "smooth_grad": lambda: {
                "base": self.smoothed,
                "method_options": self.of(self.smoothed, size),
                "noise": float(self.noise),
                "samples": int(self.samples),
            },
            "integrated_gradients": lambda: {"baseline": self.baseline, "steps": int(self.steps)},
            "blur_integrated_gradients": lambda: {"max_sigma": float(self.sigma), "steps": int(self.steps)},
            "guided_integrated_gradients": lambda: {"baseline": self.baseline, "steps": int(self.steps)},
            "xrai": lambda: {"steps": int(self.steps)},
        }
        return own[method]() if method in own else {}

    def _segments(self, size: tuple[int, int]) -> Grid | Slic | Window:
        side = max(round(int(self.segments) ** 0.5), 1)
        if self.cut == "superpixels":
            return Slic(int(self.segments))
        if self.cut == "grid":
            return Grid(side, side)
        if self.cut == "windows":
            high, wide = (max(round(2 * extent / (side + 1)), 2) for extent in size)
            return Window((high, wide), (max(high // 2, 1), max(wide // 2, 1)))
        refuse(WHERE, "segments", "be superpixels, grid or windows", repr(self.cut))


# What is asked and found ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A class, and how probable the model finds it; None where its output tells no probability."""

    index: int
    name: str
    probability: float | None


@dataclass(frozen=True, eq=False)
class Found:
    """What is known so far.

    Attributes:
        explanation: the maps that are there, in the order of EVERY; None before the first.
        waiting: the methods still to come.
        refused: method -> the sentence that says why the model cannot be explained by it.
    """

    explanation: Explanation | None
    waiting: tuple[str, ...]
    refused: dict[str, str]


@dataclass(frozen=True, eq=False)
class Ready:
    """A classifier, and what runs in its place."""

    classifier: models.Classifier
    runner: OnceItPays[PreparedModel]


def _likely(table: Tensor) -> list[float | None]:
    """Return the probability of each class by the model's output (1, K), taken for what `explain` takes it for."""
    look = Look()
    look.add(table)
    if look.output is None or look.output == "numbers":
        return [None] * table.shape[1]
    return list(probabilities(table, look.output)[0].tolist())


class Workspace:
    """The models loaded so far and the maps found lately, for all readers of a page.

    Args:
        loaders: the models on offer, name -> what loads one; nothing else can be loaded.
        device: where they run.
        remembered: most maps kept.

    Raises:
        ValueError: no model.
    """

    def __init__(
        self, loaders: Mapping[str, Callable[[], models.Classifier]], *, device: str = "cpu", remembered: int = REMEMBERED
    ) -> None:
        if not loaders:
            refuse(WHERE, "--model", "name at least one model", "none")
        self.names = tuple(loaders)
        self.device = device
        self._loaders = dict(loaders)
        self._remembered = remembered
        self._ready: dict[str, Ready] = {}
        self._maps: OrderedDict[Any, MethodResult] = OrderedDict()
        self._heads: OrderedDict[Any, Explanation] = OrderedDict()  # explanations without maps: scores, names, photo
        self._lock = threading.Lock()  # of the three above, held for a look only
        self._loading = {name: threading.Lock() for name in self.names}
        self._turns = Turns()

    def close(self) -> None:
        """End what is being computed and what waits for it: the server is ending."""
        self._turns.close()

    def model(self, name: str) -> Ready:
        """Return a model, loaded the first time it is asked for; it is prepared once enough is asked of it.

        Raises:
            ValueError: a model that is not on offer.
            Exception: what its loader raises.
        """
        if name not in self.names:
            refuse_unknown(WHERE, "model", f"be one of {', '.join(self.names)}", name, self.names)
        with self._loading[name]:  # who wants another model does not wait for this one
            if name not in self._ready:
                classifier = self._loaders[name]()
                example = torch.full((1, classifier.channels, *classifier.input_size), 0.5, device=self.device)
                rows = fast_rows(example.device, example.numel() * example.element_size())
                make = partial(prepare, classifier, example, batch_size=rows if self.device == "cpu" else None)
                self._ready[name] = Ready(classifier, OnceItPays(classifier, make))
            return self._ready[name]

    def photo(self, model: str, source: str | Path) -> Tensor:
        """Return a photo as the model wants it, (1, C, H, W) in [0, 1].

        Args:
            model: the model's name.
            source: the key of a photo that comes with the page, or a file.

        Raises:
            ValueError, OSError: what `read_image` says, of the file's name without its folders.
        """
        wanted = self.model(model).classifier
        known = photos().get(str(source))
        try:
            return models.read_image(known[1] if known else Path(source), wanted).to(self.device)
        except (ValueError, OSError) as error:
            # the folders of an upload are the server's own and tell a reader nothing
            raise type(error)(str(error).replace(str(source), Path(source).name)) from error

    def answers(self, model: str, image: Tensor, count: int = 5, reader: Hashable = None) -> list[Answer]:
        """Return the classes that the model finds most probable, the best first."""
        classifier = self.model(model).classifier
        with self._turns.taken(reader), torch.no_grad():
            table = class_scores(classifier(image)).double().view(1, -1)
            likely = _likely(table)
            best = table[0].topk(min(count, table.shape[1])).indices.tolist()
        return [Answer(index, classifier.class_names[index], likely[index]) for index in best]

    def answer(self, model: str, image: Tensor, wanted: str | int, reader: Hashable = None) -> Answer:
        """Return one class by name or index, and its probability.

        Raises:
            ValueError: no such class, or several.
        """
        classifier = self.model(model).classifier
        index = classifier.class_index(wanted)
        with self._turns.taken(reader), torch.no_grad():
            likely = _likely(class_scores(classifier(image)).double().view(1, -1))
        return Answer(index, classifier.class_names[index], likely[index])

    def explain(
        self,
        model: str,
        image: Tensor,
        target: int,
        methods: Sequence[str],
        options: Options,
        *,
        report: Report | None = None,
        cancel: threading.Event | None = None,
        reader: Hashable = None,
    ) -> Iterator[Found]:
        """Yield what is found, again whenever a method is done: what is known at once, then the quick ones.

        Only what was not computed before, with the same options for the same class of the same photo, uses the model.

        Args:
            model: its name.
            image: (1, C, H, W), see `photo`.
            target: class index.
            methods: names out of EVERY.
            options: of all methods; each takes its own.
            report: told how far the work is.
            cancel: stops it when set.
            reader: who asks; between two passes of the model others have their turn.

        Raises:
            ValueError: an unknown method or option, no method, or what the method refuses.
            Cancelled: `cancel` was set; what was found until then is kept.
        """
        for name in methods:
            if name not in EVERY:
                refuse_unknown(WHERE, "methods", f"be out of {', '.join(EVERY)}", name, EVERY)
        if not methods:
            refuse(WHERE, "methods", "name at least one method", "none")
        ordered = [name for name in EVERY if name in methods]
        size = (image.shape[2], image.shape[3])
        chosen = {name: options.of(name, size) for name in ordered}
        score = options.score or None
        head = (model, _digest(image), target, score)
        keys = {name: (*head, name, repr(chosen[name])) for name in ordered}
        known: dict[str, MethodResult] = {}
        refused: dict[str, str] = {}
        with self._lock:
            for name in ordered:
                if keys[name] in self._maps:
                    self._maps.move_to_end(keys[name])
                    known[name] = self._maps[keys[name]]
            base = self._heads.get(head) if known else None

        def found() -> Found:
            explanation = None
            if base is not None:
                results = {name: known[name] for name in ordered if name in known}
                seconds = sum(result.seconds for result in results.values())
                explanation = replace(base, results=results, skipped=dict(refused), seconds=seconds)
            waiting = tuple(name for name in ordered if name not in known and name not in refused)
            return Found(explanation, waiting, dict(refused))

        yield found()
        while waiting := found().waiting:
            quick = [name for name in waiting if name in TOGETHER]
            group = quick or [waiting[0]]
            done = len(known) + len(refused)
            fresh, reasons = self._run(
                model, image, target, group, chosen, score, _share(report, done, len(group), len(ordered)), cancel, reader
            )
            refused |= reasons
            if fresh is not None:
                if len(fresh.results) > 1:  # one pass for all: each has its share of the time
                    share = fresh.seconds / len(fresh.results)
                    fresh = replace(fresh, results={name: replace(one, seconds=share) for name, one in fresh.results.items()})
                base = replace(fresh, results={}, skipped={})
                with self._lock:
                    self._keep(self._heads, head, base)
                    for name, result in fresh.results.items():
                        self._keep(self._maps, keys[name], result)
                known |= fresh.results
            yield found()

    def _run(
        self,
        model: str,
        image: Tensor,
        target: int,
        group: Sequence[str],
        options: dict[str, dict[str, Any]],
        score: ScoreKind | None,
        report: Report | None,
        cancel: threading.Event | None,
        reader: Hashable,
    ) -> tuple[Explanation | None, dict[str, str]]:
        """Explain by the methods of a group; return what was found, and for those that do not apply, why."""
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"{WHERE}: cancelled before {EVERY[group[0]].title}")
        ready = self.model(model)
        with self._turns.taken(reader, cancel) as pass_on:
            runner = ready.runner.for_work(sum(EVERY[name].gradients(options[name]) for name in group))

            def told(method: str, done: int, total: int) -> None:
                if report is not None:
                    title = EVERY[method].title if method in EVERY else "Model"
                    report(f"{title}: {done} of {total} model rows", done / max(total, 1))
                pass_on()

            with progress(told, cancel=cancel):
                try:
                    return explain(
                        runner,
                        image,
                        target,
                        methods=group,
                        method_options={name: options[name] for name in group},
                        score=score,
                    ), {}
                except NotApplicable as error:
                    if len(group) == 1:
                        return None, {group[0]: str(error)}
        parts = [self._run(model, image, target, [name], options, score, report, cancel, reader) for name in group]
        explanations = [part for part, _ in parts if part is not None]
        reasons = {name: why for _, refusal in parts for name, why in refusal.items()}
        if not explanations:
            return None, reasons
        results = {name: result for part in explanations for name, result in part.results.items()}
        return replace(explanations[0], results=results), reasons

    def _keep(self, store: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        store[key] = value
        store.move_to_end(key)
        while len(store) > self._remembered:
            store.popitem(last=False)


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest()


def _share(report: Report | None, done: int, group: int, total: int) -> Report | None:
    """Return a report of one group's share of the whole work."""
    if report is None:
        return None
    return lambda text, share: report(text, (done + group * share) / total)


# Two classes ---------------------------------------------------------------------------------------------------------


def agreement(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two maps (H, W), in [-1, 1]; NaN where one of them is constant.

    1 says that the method draws the same picture for both classes.
    """
    pair = torch.stack([one.detach().flatten().double(), other.detach().flatten().double()])
    centred = pair - pair.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1)
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if bool((norms > 0).all()) else float("nan")


# Work that can be watched --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """How far some work is: a line of text, and a share in [0, 1]."""

    text: str
    share: float


def watch(work: Callable[[Report], Iterator[Any]], cancel: threading.Event, pause: float = 0.15) -> Iterator[Any]:
    """Yield what `work(report)` yields from a thread of its own, and `Told` while it is busy.

    Of several reports within a pause the last one counts. Closing the iterator sets `cancel`.

    Args:
        work: called once, with a function that it tells how far it is.
        cancel: set when nobody listens any more; it is the work that has to look at it.
        pause: seconds between two looks.

    Raises:
        Exception: what `work` raises.
    """
    items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            for item in work(lambda text, share: items.put(("told", Told(text, share)))):
                items.put(("item", item))
            items.put(("end", None))
        except BaseException as error:
            items.put(("error", error))

    thread = threading.Thread(target=run, name="pysal demo", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            until = time.monotonic() + pause
            while kind == "told" and time.monotonic() < until:  # only the newest report of a pause is of interest
                try:
                    kind, value = items.get(timeout=max(until - time.monotonic(), 0))
                except queue.Empty:
                    break
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        cancel.set()
