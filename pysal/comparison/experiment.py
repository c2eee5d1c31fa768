"""Every method and every figure on a model's own photos, image by image, so that what was measured is kept."""

import base64
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pysal._checks import check_choice, check_count, check_seed, refuse, refuse_unknown
from pysal._folders import files_below
from pysal._library import version
from pysal.annotations import Annotations
from pysal.annotations import read as read_annotations
from pysal.comparison.found import Comparison, plain
from pysal.comparison.report import page
from pysal.comparison.statistics import agreement, estimate, recommended, tabulated
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.prepared.payback import OnceItPays
from pysal.engine.prepared.prepare import prepare
from pysal.engine.prepared.record import fingerprint
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import SCORE_KINDS, Look, Output, ScoreKind, probabilities, settled, taken_for
from pysal.engine.running.chunks import fast_rows
from pysal.explain import explain
from pysal.methods.registry import EVERY, method_names
from pysal.metrics import METRICS, grid_pointing_game
from pysal.metrics import agreement as agreement_of
from pysal.metrics.randomisation import likeness, randomised
from pysal.metrics.registry import check_options, figure_of, usual_score
from pysal.models import Classifier, load, read_image
from pysal.models.photos import suffixes_of
from pysal.viz import overlay, photo, reduce_channels

WHERE = "pysal.comparison.compare"
FORMAT = 2
# What a method is compared by unless told; the other substrates of deletion and insertion are left out.
USUAL = tuple(name for name in METRICS if name not in ("deletion_blur", "insertion_zero"))
# Measured on a few images only: each takes as long as all others together.
COSTLY = ("pic", "max_sensitivity")
# What asks how sure the model is of a class; of a number that may be negative such shares mean nothing.
OF_CONFIDENCE = ("pic", "average_drop", "increase_in_confidence")
SHOWN, THUMBNAIL, QUALITY = 3, 160, 80
GRID = 2
# What a metric asks of the model for one map, about: some tens of forward passes, in gradients.
METRIC_GRADIENTS = 10


def compare(
    model: str | nn.Module,
    photos: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    annotations: str | Path | Annotations | None = None,
    methods: str | Sequence[str] = "all",
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    metrics: Sequence[str] | None = None,
    metric_options: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    few: int = 4,
    seed: int = 0,
    score: ScoreKind | None = None,
    model_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return which methods explain a model best on photos of its own, measured in several ways, with intervals over images.

    Each image's predicted class is explained, or the number of a model that answers with one for each image. What was measured
    of an image is written to `out` at once, so that the same call goes on where it was stopped, and is done at once where it
    was not.

    Args:
        model: what `pysal.models.load` loads, or a classifier in eval mode of it or of `pysal.models.wrap`.
        photos: a folder (with those below), or files.
        out: folder for images.jsonl, comparison.json and report.html; None = nothing is written.
        annotations: boxes or masks of the photos, for pointing game and mass in mask: see `pysal.annotations.read`.
        methods: as in `pysal.explain`.
        method_options: as in `pysal.explain`.
        metrics: names of `pysal.metrics.PER_IMAGE`; None = all but deletion_blur and insertion_zero. Those that need masks are
            measured where there are annotations.
        metric_options: name -> its own options, as in `pysal.metrics.per_image`.
        limit: most photos, spread evenly over them in the order of their names; None = all.
        few: images on which what takes long is measured: information curves, max-sensitivity, random weights, and grids.
        seed: of all that is drawn: noise, perturbations, random weights and the bootstrap.
        score: as in `pysal.explain`, for methods and metrics: "sigmoid" for logits of independent labels. None = each method's
            usual one, and "auto" for metrics. What the output is, is found out once, from all photos together.
        model_options: further arguments of `pysal.models.load`.
        progress: is called as `progress(images done, images in all)`.

    Raises:
        TypeError, ValueError: a wrong argument, no photo that can be read, or a folder that holds another comparison.
        NotApplicable: a method asked for by name cannot explain the model.
        OSError: a file cannot be written.
    """
    names = method_names(WHERE, methods)
    asked = _metric_names(metrics)
    for argument, options, among, kind in (
        ("method_options", method_options, names, "methods"),
        ("metric_options", metric_options, asked, "metrics"),
    ):
        for name in options or {}:
            if name not in among:
                refuse_unknown(WHERE, argument, f"be for the {kind} asked for ({', '.join(among)})", name, among)
    for argument, value, least in (("limit", limit, 1), ("few", few, 0)):
        if value is not None:
            check_count(WHERE, argument, value, least=least)
    check_seed(WHERE, seed)
    if score is not None:
        check_choice(WHERE, "score", score, SCORE_KINDS)
    for name in names:
        checked_options(WHERE, f"method_options[{name!r}]", EVERY[name].prepare, (method_options or {}).get(name))
    for name in asked:
        check_options(name, (metric_options or {}).get(name), WHERE, f"metric_options[{name!r}]")
    known = annotations if isinstance(annotations, Annotations) or annotations is None else read_annotations(annotations)
    classifier = load(model, **dict(model_options or {})) if isinstance(model, str) else model
    if not isinstance(classifier, Classifier):
        requirement = "be a name or a file, or know how it wants photos (pysal.models.wrap)"
        refuse(WHERE, "model", requirement, type(model).__name__, TypeError)
    files = _photos(photos, suffixes_of(classifier.channels), known, limit)
    if known is not None and not any(known.has(file) for file in files):
        refuse(WHERE, "annotations", "be of the photos, by name", f"{known.names[0]!r} ... for {files[0]} ...")

    settings: dict[str, Any] = {
        "format": FORMAT,
        "version": version(),
        "model": classifier.name,
        "weights_sha256": fingerprint(classifier),
        "photos": [str(file) for file in files],
        "photos_sha256": _contents(files),
        "annotations": None if known is None else str(known.source),
        "annotations_sha256": None if known is None else known.fingerprint,
        "methods": names,
        "method_options": {name: dict(own) for name, own in (method_options or {}).items()},
        "metrics": asked,
        "metric_options": {name: dict(own) for name, own in (metric_options or {}).items()},
        "few": few,
        "seed": seed,
        "score": score,
    }
    settings = plain(json.loads(json.dumps(settings, default=str)))
    log = None if out is None else _Log(Path(out), settings)
    bench = _Bench(classifier, names, asked, known, settings, method_options or {}, metric_options or {}, methods == "all")
    bench.output = None if log is None else log.output
    if bench.output is None:
        bench.output = bench.look(files)
        if log is not None:
            log.keep({"output": bench.output})
    rows: list[dict[str, Any]] = []
    unread: dict[str, str] = {}
    for number, file in enumerate(files):
        row = None if log is None else log.rows.get(str(file))
        if row is None:
            try:
                row = bench.measure(file, number, costly=len(rows) < few)
            except (ValueError, OSError) as error:
                if not _of_the_photo(error):
                    raise
                row = {"photo": str(file), "unread": str(error)}
            if log is not None:
                log.keep(row)
        if "unread" in row:
            unread[str(file)] = row["unread"]
        else:
            rows.append(row)
        if progress is not None:
            progress(number + 1, len(files))
    if not rows:
        refuse(WHERE, "photos", "hold at least one that can be read", next(iter(unread.values())))
    grids = {} if log is None else log.grids
    if not grids:
        grids = bench.grids(rows, few)
        if log is not None:
            log.keep({"grids": grids})
    for row in rows:
        for name, value in grids.get(row["photo"], {}).items():
            row["methods"][name]["grid_pointing_game"] = value

    compared = [name for name in names if any(name in row["methods"] for row in rows)]
    titles = {name: EVERY[name].title for name in compared}
    tables = tabulated(rows, compared)
    best, reasons, votes = recommended(tables, compared, titles)
    found = Comparison(
        settings=settings,
        methods=titles,
        skipped=next((row["skipped"] for row in rows), {}),
        rows=[{name: value for name, value in row.items() if name != "pictures"} for row in rows],
        unread=unread,
        estimates={figure: {name: estimate(one, seed) for name, one in table.items()} for figure, table in tables.items()},
        votes=votes,
        agreement=agreement(rows, compared),
        recommended=best,
        reasons=reasons,
        explained="The model's number" if bench.output == "numbers" else "Each photo's predicted class",
        pictures=[(Path(row["photo"]).name, row["pictures"]) for row in rows if row.get("pictures")][:SHOWN],
    )
    if log is not None:
        log.finish(found)
    return found


class _Bench:
    """A model, and all that is measured of it on an image."""

    def __init__(
        self,
        model: Classifier,
        methods: Sequence[str],
        metrics: Sequence[str],
        annotations: Annotations | None,
        settings: Mapping[str, Any],
        method_options: Mapping[str, Mapping[str, Any]],
        metric_options: Mapping[str, Mapping[str, Any]],
        optional: bool,
    ) -> None:
        self.model, self.methods, self.metrics, self.annotations = model, methods, metrics, annotations
        self.seed: int = settings["seed"]
        self.few: int = settings["few"]
        self.photos = len(settings["photos"])
        self.method_options, self.metric_options, self.optional = method_options, metric_options, optional
        self.skipped: dict[str, str] = {}
        self.learned = any(True for _ in model.parameters())  # else there are no weights to draw at random
        self.score: ScoreKind | None = settings["score"]
        self.output: Output | None = None
        self.shown = 0
        self._runner: Any = None
        self._random: Any = None

    def look(self, files: Sequence[Path]) -> Output:
        """Return what the model's output is, from all photos that can be read together.

        Raises:
            ValueError: it is neither a table of classes nor a number for each image.
        """
        found = Look()
        found.begin()
        for file in files:
            try:
                image = self.seen(file)
            except (ValueError, OSError) as error:
                if not _of_the_photo(error):
                    raise
                continue
            with torch.no_grad():
                table = self.model(image)
            whole = isinstance(table, Tensor) and table.ndim in (1, 2) and len(table) == len(image) and table.numel() > 0
            if not whole:
                shown = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
                refuse(WHERE, "model", "answer with a table of classes or a number for each image", f"{shown}")
            found.add(table.reshape(len(image), -1))
        return found.output or "logits"  # no photo can be read, which is said later

    def kind(self, usual: ScoreKind) -> ScoreKind:
        """Return a kind of score that means the same for every photo."""
        assert self.output is not None
        return settled(self.score or usual, self.output)

    def runner(self, image: Tensor) -> Any:
        """Return the model, prepared where that can be done and pays on a processor."""
        if self._runner is None:
            each = sum(self._gradients(name) + METRIC_GRADIENTS * len(self.metrics) for name in self.methods)
            self._runner = _ready(self.model, image, self.photos * each)
        return self._runner

    def random(self, image: Tensor) -> Any:
        """Return the model with random weights, the same for every photo and method, prepared as the model is."""
        if self._random is None:
            each = sum(self._gradients(name) for name in self.methods)
            self._random = _ready(randomised(self.model, self.seed), image, min(self.few, self.photos) * each)
        return self._random

    def _gradients(self, name: str) -> float:
        return EVERY[name].gradients(self.method_options.get(name, {}))

    def seen(self, file: str | Path) -> Tensor:
        """Return a photo as the model takes it, in the precision and on the device of its parameters."""
        image = read_image(file, self.model)
        own = next((one for one in self.model.parameters() if one.is_floating_point()), image)
        return image.to(own.device, own.dtype)

    def measure(self, file: Path, number: int, *, costly: bool) -> dict[str, Any]:
        """Return the row of a photo."""
        began = time.process_time()
        image = self.seen(file)
        runner = self.runner(image)
        # of all figures of this image, so that passes that no map changes are made once
        request = Plan(WHERE, runner, image, None, Running("logit", (), None, "float32", None), output=self.output)
        table = request.clean().table
        assert table is not None
        target = int(request.score.index[0])
        names = self.model.class_names or ()
        taken = taken_for(self.score or "auto", self.output or "logits")
        single = self.output == "numbers"
        if single and taken == "numbers":
            why = "the model answers with a number, and this asks how sure it is of a class"
            self.skipped |= {name: why for name in OF_CONFIDENCE if name in self.metrics}
        label = names[target] if target < len(names) else "output" if single else f"class {target}"
        mask = None
        if self.annotations is not None:
            mask = self.annotations.mask(file, self.model, label=label)
            mask = None if mask is None or not bool(mask.any()) else mask.to(image.device)
        row: dict[str, Any] = {"photo": str(file), "target": target, "class": label, "methods": {}}
        if taken != "numbers":
            row["probability"] = float(probabilities(table, taken)[0, target])
        maps: dict[str, Tensor] = {}
        for name in self.methods:
            if name in self.skipped:
                continue
            own = dict(self.method_options.get(name, {}))
            if EVERY[name].noisy:
                own = {"image_ids": [number], **own}
            wall, processor = time.perf_counter(), time.process_time()
            try:
                found = explain(
                    runner,
                    image,
                    target,
                    methods=[name],
                    method_options={name: own},
                    seed=self.seed,
                    score=self.kind(EVERY[name].score),
                )
            except NotApplicable as error:
                if not self.optional:
                    raise
                self.skipped[name] = str(error)
                continue
            spent = {"wall_seconds": time.perf_counter() - wall, "seconds": time.process_time() - processor}
            maps[name] = found.results[name].map
            row["methods"][name] = spent | self._figures(name, request, maps[name], mask, number, own, costly)
        row["skipped"] = dict(self.skipped)
        if len(maps) > 1:
            matrix = agreement_of(maps, absolute=True)[0].tolist()
            row["agreement"] = {a: dict(zip(maps, line, strict=True)) for a, line in zip(maps, matrix, strict=True)}
        if self.shown < SHOWN:
            self.shown += 1
            row["pictures"] = [("Photo", _picture(photo(image[0].cpu())))] + [
                (EVERY[name].title, _drawn(image[0].cpu(), map.cpu(), name)) for name, map in maps.items()
            ]
        row["seconds"] = time.process_time() - began
        result: dict[str, Any] = plain(row)
        return result

    def _figures(
        self,
        name: str,
        request: Plan,
        map: Tensor,
        mask: Tensor | None,
        number: int,
        options: Mapping[str, Any],
        costly: bool,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in self.metrics:
            if (
                metric in self.skipped
                or (metric in COSTLY and not costly)
                or (METRICS[metric].needs == "masks" and mask is None)
            ):
                continue
            value = figure_of(
                metric,
                request.renamed(f"pysal.metrics.{metric}", self.kind(usual_score(metric, name))),
                map.to(request.device),
                seed=self.seed,
                image_ids=[number],
                method=name,
                method_options=options,
                masks=mask,
                options=self.metric_options.get(metric),
            )
            found[metric] = float(value[0])
        if costly and self.learned:
            own = dict(options) | ({"seed": self.seed} if EVERY[name].noisy else {})
            random = Running(self.kind(EVERY[name].score), (), None, "float32", None)
            plan = Plan(WHERE, self.random(request.inputs), request.inputs, request.score.fixed, random, output=self.output)
            after = EVERY[name].prepare(plan, **checked_options(WHERE, name, EVERY[name].prepare, own)).run(report=False).map
            found["randomisation"] = float(likeness(name, map, after.cpu())[0])
        return found

    def grids(self, rows: Sequence[Mapping[str, Any]], few: int) -> dict[str, dict[str, Any]]:
        """Return photo -> method -> its share in a grid of images of different classes, of which the model is sure."""
        height, width = self.model.input_size
        chosen: list[Mapping[str, Any]] = []
        for row in sorted(rows, key=lambda row: -(row.get("probability") or 0.0)):
            if row["target"] not in [one["target"] for one in chosen]:
                chosen.append(row)
        together = GRID * GRID
        chosen = chosen[: min(len(chosen), max(few, together if few else 0)) // together * together]
        if not chosen or height % GRID or width % GRID:
            return {}
        images = torch.cat([self.seen(row["photo"]) for row in chosen])
        runner, classes = self.runner(images[:1]), [row["target"] for row in chosen]
        found: dict[str, dict[str, Any]] = {row["photo"]: {} for row in chosen}
        for name in self.methods:
            if not all(name in row["methods"] for row in chosen):
                continue
            options = dict(self.method_options.get(name, {}))
            if EVERY[name].noisy:
                options |= {"seed": self.seed}
            shares = grid_pointing_game(
                runner,
                images,
                classes,
                method=name,
                method_options=options,
                grid=GRID,
                cells="shrunk",
                score=self.kind(EVERY[name].score),
            )
            for row, share in zip(chosen, shares.tolist(), strict=True):
                found[row["photo"]][name] = share if math.isfinite(share) else None
        return found


def _ready(model: nn.Module, image: Tensor, gradients: float) -> Any:
    """Return a model as it is run for so many gradients: prepared where that can be done and pays on a processor."""
    if image.device.type != "cpu":
        return model
    rows = fast_rows(image.device, image[0].numel() * image.element_size())
    return OnceItPays(model, lambda: prepare(model, image, batch_size=rows)).for_work(gradients)


def _contents(files: Sequence[Path]) -> str:
    """Return the SHA-256 of what photos hold, so that one that was changed is not taken for what was measured of it."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:  # it is told why when it is read
            digest.update(b"unreadable")
    return digest.hexdigest()


def _of_the_photo(error: Exception) -> bool:
    """Return whether a photo or its mask is at fault, so that the others can be compared without it."""
    return str(error).startswith(("pysal.read_image", "pysal.annotations"))


class _Log:
    """The folder of a comparison: a line for each image that was measured, and what came out at the end."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        if not str(out):
            refuse(WHERE, "out", "name a folder", "''")
        self.out, self.lines = out, out / "images.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        self.grids: dict[str, dict[str, Any]] = {}
        self.output: Output | None = None
        out.mkdir(parents=True, exist_ok=True)
        if not self.lines.exists():
            if any(out.iterdir()):
                refuse(WHERE, "out", "be a new folder, or that of the same comparison", f"{out}, which holds other files")
            self.keep({"settings": settings})
            return
        for line in self.lines.read_text("utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while it wrote
            if "settings" in found and found["settings"] != settings:
                before = found["settings"]
                other = next(key for key in {**before, **settings} if before.get(key) != settings.get(key))
                was, now = (str(one.get(other))[:60] for one in (before, settings))
                requirement = "be a new folder, or that of the same comparison"
                refuse(WHERE, "out", requirement, f"{out}, where {other} was {was}, not {now}")
            if "output" in found:
                self.output = found["output"]
            elif "grids" in found:
                self.grids = found["grids"]
            elif "photo" in found:
                self.rows[found["photo"]] = found

    def keep(self, row: Mapping[str, Any]) -> None:
        """Add a line, on a line of its own even after a run that was killed while it wrote."""
        with self.lines.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(plain(row), allow_nan=False).encode() + b"\n")

    def finish(self, found: Comparison) -> None:
        """Write comparison.json and report.html."""
        (self.out / "comparison.json").write_text(json.dumps(found.json(), indent=1, allow_nan=False) + "\n", "utf-8")
        (self.out / "report.html").write_text(page(found), "utf-8")


def _metric_names(metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        return list(USUAL)
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        refuse(WHERE, "metrics", "be a sequence of names", repr(metrics), TypeError)
    for name in metrics:
        if name not in METRICS:
            refuse_unknown(WHERE, "metrics", f"be names out of {', '.join(METRICS)}", name, METRICS)
    return list(dict.fromkeys(metrics))


def _photos(photos: object, suffixes: frozenset[str], annotations: Annotations | None, limit: int | None) -> list[Path]:
    if isinstance(photos, str | os.PathLike):
        root = Path(photos)
        if root.is_dir():
            files = sorted(file for file in files_below(root) if file.suffix.lower() in suffixes)
        else:
            files = [root]
    elif isinstance(photos, Sequence) and all(isinstance(one, str | os.PathLike) for one in photos):
        files = [Path(one) for one in photos]
    else:
        refuse(WHERE, "photos", "be a folder or a list of files", repr(photos)[:80], TypeError)
    if annotations is not None and annotations.kind == "masks":
        files = [file for file in files if not annotations.holds(file)]
    if not files:
        refuse(WHERE, "photos", "hold at least one photo", str(photos))
    for file in files:
        if not file.exists() and not file.is_symlink():  # a link to nothing cannot be read, which is said
            refuse(WHERE, "photos", "be there", f"{file} (no such file or folder)", FileNotFoundError)
    files = list(dict.fromkeys(files))  # one that is given twice is one image
    if limit is not None and len(files) > limit:
        files = [files[int(place)] for place in np.linspace(0, len(files) - 1, limit).round()]
    return files


def _drawn(image: Tensor, map: Tensor, name: str) -> str:
    traits = EVERY[name]
    one = reduce_channels(map, "none" if map.shape[1] == 1 else traits.reduction)[0].float()
    size = tuple(max(1, side // 3) for side in one.shape)  # all that a thumbnail can show where every pixel differs
    small = interpolate(one[None, None], size, mode="area")
    smooth = interpolate(small, tuple(one.shape), mode="bilinear", align_corners=False)[0, 0]
    return _picture(overlay(image, smooth, signed=traits.signed))


def _picture(pixels: np.ndarray[Any, Any]) -> str:
    """Return colours (H, W, 3) in [0, 1] as a small JPEG in a data URI."""
    small = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
