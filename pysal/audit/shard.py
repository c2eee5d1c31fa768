"""One shard of an audit: from the images to the bytes of its Parquet files, a pure function of the images and the manifest."""

import contextlib
import functools
import hashlib
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal._checks import finite_rows, first_line
from pysal.annotations import read as read_annotations
from pysal.audit import table
from pysal.audit.data import Item, Unreadable, decode, read_bytes, without_addresses
from pysal.audit.model import ModelSource
from pysal.audit.reading import Reader
from pysal.engine.prepared.gains import Gains
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.prepare import prepare, prepared_again
from pysal.engine.prepared.record import Record
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import Output, ScoreKind, follows, probabilities, settled, taken_for
from pysal.engine.request.target import CallTarget, Target
from pysal.engine.request.work import announced
from pysal.engine.running.chunks import is_out_of_memory, says_out_of_memory
from pysal.engine.running.states import Restored, restoring, undo_later
from pysal.methods.registry import EVERY
from pysal.metrics import METRICS, per_image
from pysal.models import Classifier
from pysal.segments import parse
from pysal.targets import parse as parse_target

WHERE = "pysal.audit"


class Files(NamedTuple):
    """What becomes of a shard: the content of its files, and how many images are in them."""

    rows: bytes
    errors: bytes
    timings: bytes
    explained: int
    failed: int


@dataclass(frozen=True)
class Setup:
    """All that a worker needs to know; small enough to be sent to each.

    Attributes:
        manifest: the content of manifest.json.
        model: where the model comes from.
        root: what the paths of images are relative to.
        record: what was found out about the prepared model when the job was planned, None where nothing was.
    """

    manifest: dict[str, Any]
    model: ModelSource
    root: Path
    record: Record | None = None


@dataclass
class _Timing:
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Clock:
    """Adds up the time of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, _Timing] = {}

    @contextlib.contextmanager
    def stage(self, name: str, images: int) -> Iterator[None]:
        """Count what happens inside to a stage."""
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            timing = self.stages.setdefault(name, _Timing())
            timing.images += images
            timing.seconds += time.perf_counter() - wall
            timing.cpu_seconds += time.thread_time() - processor


class Worker:
    """A loaded and prepared model that explains shards, one thread, any number of them.

    What it returns for a shard depends on the manifest, the images and the kind of processor alone: not on what it did before.
    """

    @restoring
    def __init__(self, setup: Setup, device: str, model: nn.Module | None = None) -> None:
        self.setup, self.device = setup, device
        manifest = setup.manifest
        self.size: tuple[int, int] = tuple(manifest["model"]["input_size"])
        self.original = setup.model.load(WHERE, device) if model is None else model
        self.channels: int = manifest["model"]["channels"]
        # what is explained of every image where it is neither a class nor a margin
        self.picked: CallTarget | None = None
        if isinstance(manifest["target"], str) and manifest["target"] not in ("predicted", "label"):
            explained = parse_target(manifest["target"], self.original, where=WHERE)
            self.picked = explained if isinstance(explained, CallTarget) else None
        marked = manifest.get("annotations")
        self.annotations = None if marked is None else read_annotations(marked)
        self.threads = 0  # that read images beside the model
        self._reader: Reader | None = None
        self.model: nn.Module | PreparedModel = self.original
        if manifest["prepared"]:
            with in_one_order(device):
                # what was measured when the job was planned decides for all workers, which else could differ in their bits
                self.model = self._again() or self._prepared()

    def _again(self) -> PreparedModel | None:
        """Return the model as it was prepared when the job was planned; None on a machine of another kind."""
        if self.setup.record is None:
            return None
        try:
            return prepared_again(WHERE, self.original, self.setup.record, "the job's record")
        except ValueError:
            return None

    def _prepared(self) -> PreparedModel:
        manifest = self.setup.manifest
        gains = None if manifest["gains"] is None else Gains(**manifest["gains"])
        return prepare(
            self.original, self.example(), precision=manifest["precision"], batch_size=manifest["batch_size"], gains=gains
        )

    def example(self) -> Tensor:
        """Return an image (1, C, H, W) that is the same for every worker."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        return torch.rand(1, self.channels, *self.size, generator=generator, dtype=torch.float32, device="cpu").to(self.device)

    def probes(self) -> Tensor:
        """Return images (8, C, H, W), the same for every worker, on which it is found out what the model's output is."""
        generator = torch.Generator(device="cpu").manual_seed(1)
        noise = torch.rand(5, self.channels, *self.size, generator=generator, dtype=torch.float32, device="cpu")
        plain = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32, device="cpu")[:, None, None, None]
        plain = plain.expand(3, *noise.shape[1:])
        return torch.cat([noise, plain]).to(self.device)

    @restoring
    def explain(self, shard: int, items: Sequence[Item], following: Sequence[Item] = ()) -> Files:
        """Return the files of a shard.

        Args:
            shard: its number.
            items: its images.
            following: images of the shard that will probably come next, which are read ahead where there are threads for it.

        Raises:
            MemoryError: one image alone does not fit.
        """
        with in_one_order(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when the job began
            return self._explain(shard, items, following)

    @contextlib.contextmanager
    def reading_ahead(self, threads: int) -> Iterator[None]:
        """Have `explain` read images in threads beside the model, inside the block."""
        before, self.threads = self.threads, threads
        try:
            yield
        finally:
            self.threads = before
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def _reader_of(self, together: int) -> Reader:
        if self._reader is None or self._reader.together != together:
            shape = (self.channels, *self.size)
            pinned = self.device.startswith("cuda")
            self._reader = Reader(self._read, shape, together, threads=self.threads, pinned=pinned)
        return self._reader

    def _read(self, item: Item) -> tuple[Tensor, str]:
        """Return an image (1, C, H, W) and the hash of its file; called in several threads at once.

        Raises:
            Unreadable: there is none.
        """
        if self.setup.manifest["target"] == "label" and item.label is None:
            raise Unreadable("the image has no label, which is the target")
        content = read_bytes(self.setup.root, item)
        return decode(content, self.original, self.size, self.channels), hashlib.sha256(content).hexdigest()

    def _explain(self, shard: int, items: Sequence[Item], following: Sequence[Item]) -> Files:
        manifest, started, clock = self.setup.manifest, datetime.now(UTC), Clock()
        columns: dict[str, dict[str, list[Any]]] = {name: {} for name in manifest["methods"]}
        names = table.schema(manifest).names
        errors: list[dict[str, Any]] = []
        least = manifest["images_together"]
        batches = self._reader_of(least).batches(items, following)
        for start in range(0, len(items), manifest["images_together"]):
            with clock.stage("read", min(manifest["images_together"], len(items) - start)):
                batch = next(batches)
            clock.stages["read"].cpu_seconds += batch.cpu_seconds
            errors += [_error(item, reason) for item, reason in batch.unreadable]
            readable, hashes = batch.items, batch.hashes
            if not readable:
                continue
            found, smallest = self._rows(batch.images.to(self.device, non_blocking=True), readable, clock)
            least = min(least, smallest)
            for n, (item, digest) in enumerate(zip(readable, hashes, strict=True)):
                if isinstance(found[n], Unreadable):
                    errors.append(_error(item, found[n]))
                    continue
                for method, values in found[n].items():
                    row = {"id": item.id, "path": item.path, "label": item.label, "sha256": digest, "method": method, **values}
                    for name in names:
                        columns[method].setdefault(name, []).append(row.get(name))
        explained = len(next(iter(columns.values())).get("id", ()))
        with clock.stage("encode", explained):
            rows = table.encode(table.schema(manifest), [group for group in columns.values() if group])
        errors.sort(key=lambda error: error["id"])
        about = {
            "shard": shard,
            "images_together": least,
            "started": started,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        timings = [{**about, "stage": name, **vars(timing)} for name, timing in clock.stages.items()]
        return Files(
            rows,
            table.encode_records(table.ERRORS, errors),
            table.encode_records(table.TIMINGS, timings),
            explained,
            len(errors),
        )

    def _rows(self, images: Tensor, items: Sequence[Item], clock: Clock) -> tuple[list[Any], int]:
        """Return, for each image, its rows {method: {column: value}} or why there are none; and how many fit together."""
        fits: int = self.setup.manifest["images_together"]
        try:
            return self.batch(images, items, clock), fits
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            if len(items) == 1:
                if says_out_of_memory(error):
                    raise MemoryError(
                        f"{WHERE}: {items[0].path} alone does not fit into the memory of {self.device}"
                    ) from error
                detail = without_addresses(first_line(error))
                if self.picked is not None and detail.startswith(f"{WHERE}: target must "):
                    return [Unreadable("the target is not found in it", detail.removeprefix(f"{WHERE}: "))], fits
                return [Unreadable(f"explaining it failed with {type(error).__name__}", detail)], fits
        # outside the except block, where the traceback still holds the tensors of the batch
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        step = 1
        if out_of_memory:
            fits = step = (len(items) + 1) // 2
        rows: list[Any] = []
        for start in range(0, len(items), step):
            part, fitted = self._rows(images[start : start + step], items[start : start + step], clock)
            rows += part
            fits = min(fits, fitted)
        return rows, fits

    def batch(self, images: Tensor, items: Sequence[Item], clock: Clock) -> list[dict[str, dict[str, Any]]]:
        """Return, for each image of a batch (B, 3, H, W), its rows {method: {column: value}}."""
        manifest = self.setup.manifest
        plan = self._plan(images, items)
        options = {name: self.options(name, items) for name in manifest["methods"]}
        with clock.stage("model", len(items)):
            works = {
                name: EVERY[name].prepare(plan.renamed(f"pysal.{name}", method["score"]), **options[name])
                for name, method in manifest["methods"].items()
            }
            clean = plan.clean(announced(works, plan))
            table = clean.table
            if table is None:
                assert clean.scores is not None
                sound = clean.scores.isfinite().tolist()
            else:
                output: Output = manifest["model"]["output"]
                sound = (finite_rows(table) & follows(table, output)).tolist()
        if not all(sound):
            return self._without_the_unsound(images, items, sound, clock)
        figures: list[dict[str, Any]] = [{} for _ in items]
        if table is not None:
            figures = _model_figures(table, probabilities(table, self._taken_for()), plan.score.index)
        masks = self._masks(items, None if plan.score.function is not None else plan.score.index.tolist())
        found: list[dict[str, dict[str, Any]]] = [{} for _ in items]
        for name in manifest["methods"]:
            work = works.pop(name)
            with clock.stage(name, len(items)):
                attribution = work.run(report=True)
                explained = work.plan.clean_scores()[0].double().cpu().numpy()
                details = _details(attribution)
                map = attribution.map
                whole = finite_rows(map).tolist()
                stored = self._stored(name, attribution)
            rows = [{**figures[n], **details[n], **stored[n], "score": float(explained[n])} for n in range(len(items))]
            for metric in manifest["metrics"]:
                with clock.stage(f"metric:{metric}", len(items)):
                    values = self._metric(metric, name, images, attribution, plan, items, masks)
                    for row, value in zip(rows, values, strict=True):
                        row[metric] = value
            for n, row in enumerate(rows):
                found[n][name] = _finite(row, whole[n])
        return found

    def _without_the_unsound(
        self, images: Tensor, items: Sequence[Item], sound: list[bool], clock: Clock
    ) -> list[dict[str, dict[str, Any]]]:
        """Explain the images of which the model says what it says of any; record of the others that it does not."""
        kept = [n for n, good in enumerate(sound) if good]
        rows = iter(self.batch(images[kept], [items[n] for n in kept], clock) if kept else [])
        fault = {name: {"fault": "the model's output"} for name in self.setup.manifest["methods"]}
        return [next(rows) if good else dict(fault) for good in sound]

    def _plan(self, images: Tensor, items: Sequence[Item]) -> Plan:
        manifest = self.setup.manifest
        target = manifest["target"]
        if target == "label":
            target = [item.label for item in items]
        elif target == "predicted":
            target = None
        elif self.picked is not None:
            target = self.picked
        elif isinstance(target, str):  # a margin; the job looked names up
            target = parse_target(target, where=WHERE)
        return self.request(images, target)

    def request(self, images: Tensor, target: Target) -> Plan:
        """Return the plan of images of which the methods' plans are made, each with its own score."""
        manifest = self.setup.manifest
        batch_size = None if isinstance(self.model, PreparedModel) else manifest["batch_size"]
        running = Running("logit", extra_inputs=(), batch_size=batch_size, precision=manifest["precision"], dtype=None)
        return Plan(WHERE, self.model, images, target, running, company="apart", output=manifest["model"]["output"])

    def _taken_for(self) -> Output:
        """Return what the output is taken for in all shards, which a word of the user's for the score may say."""
        found: Output = self.setup.manifest["model"]["output"]
        kinds: list[ScoreKind] = [method["score"] for method in self.setup.manifest["methods"].values()]
        said = taken_for(kinds[0], found) if len(set(kinds)) == 1 else found
        return found if said == "numbers" else said

    def options(self, name: str, items: Sequence[Item]) -> dict[str, Any]:
        """Return a method's options for a batch, as its core takes them."""
        options = dict(self.setup.manifest["methods"][name]["options"])
        if isinstance(options.get("segments"), str):
            options["segments"] = parse(options["segments"])
        if isinstance(options.get("fill"), list):
            options["fill"] = tuple(options["fill"])
        if EVERY[name].noisy:
            options |= {"seed": self.setup.manifest["seed"], "image_ids": [item.id for item in items]}
        return options

    def _stored(self, name: str, attribution: Attribution) -> list[dict[str, Any]]:
        """Return the columns of each image that hold its map."""
        manifest, details = self.setup.manifest, attribution.details
        maps, method = manifest["maps"], manifest["methods"][name]
        if EVERY[name].stored == "drops":
            shown = next(details[key] for key in ("means", "gains", "drops") if key in details)
            columns: list[dict[str, Any]] = [{"drops": drops.float().cpu().numpy()} for drops in shown]
            if maps != "none" and "labels" in details:
                for row, labels in zip(columns, details["labels"].cpu().numpy(), strict=True):
                    row["segments"] = labels.astype(np.uint16)
            return columns
        if maps == "none":
            return [{} for _ in attribution.map]
        columns = []
        for map in stored_map(attribution, method["reduction"], name):
            if np.isfinite(map).all():
                kept, scale = table.quantised(map, maps, method["signed"])
                columns.append({f"map_{name}": kept, "map_scale": scale})
            else:
                columns.append({})
        return columns

    def _masks(self, items: Sequence[Item], classes: Sequence[int] | None) -> Tensor | None:
        """Return masks (B, H, W) of the objects that people marked, without a pixel where there are none; None without any."""
        if self.annotations is None:
            return None
        names = self.setup.manifest["model"]["class_names"]
        model, found = (self.original if isinstance(self.original, Classifier) else None), []
        for item, index in zip(items, classes or [-1] * len(items), strict=True):
            mask = self.annotations.mask(
                item.path,
                model,
                label=names[index] if names and 0 <= index < len(names) else None,
                size=None if model is not None else self.size,
                content=read_bytes(self.setup.root, item) if self.annotations.has(item.path) else None,
            )
            found.append(torch.zeros(1, *self.size, dtype=torch.bool, device="cpu") if mask is None else mask)
        return torch.cat(found).to(self.device)

    def _metric(
        self,
        metric: str,
        name: str,
        images: Tensor,
        attribution: Attribution,
        plan: Plan,
        items: Sequence[Item],
        masks: Tensor | None,
    ) -> list[float | None]:
        """Return a figure of a method's map, for each image; None where it needs a mask and there is none."""
        manifest = self.setup.manifest
        # kinds that say the same of every batch, whatever its images' outputs look like
        kind: ScoreKind = "raw"  # of a target that is no class, whose score is as it is
        if self.picked is None:
            kind = "sigmoid" if self._taken_for() == "label_logits" else settled("auto", self._taken_for())
            if METRICS[metric].needs == "method":
                kind = settled(manifest["methods"][name]["score"], manifest["model"]["output"])
        found = per_image(
            metric,
            self.model,
            images,
            attribution.map,
            plan.score.fixed,
            seed=manifest["seed"],
            image_ids=[item.id for item in items],
            method=name,
            method_options=self.options(name, items),
            masks=masks,
            score=kind,
            batch_size=None if isinstance(self.model, PreparedModel) else manifest["batch_size"],
            precision=manifest["precision"],
        )
        if METRICS[metric].needs != "masks" or masks is None:
            return [float(value) for value in found]
        marked = masks.flatten(1).any(1).tolist()
        return [float(value) if there else None for value, there in zip(found, marked, strict=True)]


def _error(item: Item, why: Unreadable) -> dict[str, Any]:
    """Return an image's row in errors/."""
    return {"id": item.id, "path": item.path, "label": item.label, "reason": why.reason, "detail": why.detail}


def stored_map(attribution: Attribution, reduction: str, name: str) -> NDArray[np.floating[Any]]:
    """Return the maps (B, h, w) of one channel that are stored: Grad-CAM's at its layer's size."""
    map = attribution.details["native"] if EVERY[name].stored == "native" else attribution.map
    if reduction == "sum":
        map = map.sum(1)
    elif reduction == "max_abs":
        map = map.abs().amax(1)
    else:
        map = map[:, 0]
    return map.float().cpu().numpy()


def _model_figures(scores: Tensor, likely: Tensor, target: Tensor) -> list[dict[str, Any]]:
    """Return what the model says of each image: class, target and their probabilities, by those of all classes (B, K).

    Of one column, a number with a unit of its own, there is no class to predict and no probability.
    """
    if scores.shape[1] == 1:
        unknown = dict.fromkeys(("predicted", "predicted_probability", "probability"))
        return [{**unknown, "target": one} for one in target.tolist()]
    predicted = scores.argmax(1)
    columns = {
        "predicted": predicted.tolist(),
        "predicted_probability": likely.gather(1, predicted[:, None]).squeeze(1).double().tolist(),
        "target": target.tolist(),
        "probability": likely.gather(1, target[:, None]).squeeze(1).double().tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _details(attribution: Attribution) -> list[dict[str, Any]]:
    """Return the numbers that a method found of each image beside its map."""
    details = attribution.details
    rows: list[dict[str, Any]] = [{} for _ in attribution.map]
    for name, detail, kind in (
        ("residual", "residual", float),
        ("error", "error", float),
        ("error", "approximation_error", float),
        ("steps", "steps", int),
    ):
        for row, value in zip(rows, details.get(detail, ()), strict=False):
            row[name] = kind(value)
    if "standard_error" in details:
        for row, error in zip(rows, details["standard_error"].double(), strict=True):
            row["standard_error"] = float(error.square().mean().sqrt())
    return rows


def _finite(row: Mapping[str, Any], map_is_finite: bool) -> dict[str, Any]:
    """Return a row without the numbers that are not finite, and what was not."""
    kept = {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in row.items()}
    faults = [name for name in row if kept[name] is None and row[name] is not None]
    drops = row.get("drops")
    if not map_is_finite or (drops is not None and not np.isfinite(drops).all()):
        kept.pop("drops", None)
        kept.pop("segments", None)
        faults = ["the map"]
    if faults:
        kept["fault"] = faults[0]
    return kept


class in_one_order(Restored):
    """Add numbers in one order, or results would differ from run to run.

    On a CPU the number of threads decides on the order. On a GPU cuDNN has kernels that add as their threads come, and others
    that it chooses by timing them.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        """Note what is set."""
        super().__enter__()
        if self.device != "cpu":
            cudnn = torch.backends.cudnn
            undo_later(functools.partial(setattr, cudnn, "deterministic", cudnn.deterministic))
            undo_later(functools.partial(setattr, cudnn, "benchmark", cudnn.benchmark))
            cudnn.deterministic, cudnn.benchmark = True, False
        if self.device == "cpu" and torch.get_num_threads() != 1:
            torch.set_num_threads(1)
