"""An audit: what is asked for, planned, begun, interrupted and resumed."""

import contextlib
import dataclasses
import os
import platform
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from pysal._checks import check_count, refuse
from pysal._library import build_info
from pysal.annotations import read as read_annotations
from pysal.audit import data, engines, files, manifest
from pysal.audit.data import Labels, Unreadable, decode, read_bytes
from pysal.audit.engines import ENGINES, Shard
from pysal.audit.model import PERMISSIONS, ModelSource, architecture_sha256, function_of, is_code, weights_sha256
from pysal.audit.options import (
    WHERE,
    Maps,
    Options,
    device_of,
    metric_names,
    model_arguments,
    one_of,
    options_of_methods,
    size_of,
)
from pysal.audit.shard import Setup, Worker, in_one_order, stored_map
from pysal.audit.status import Progress, Status, reporting, status
from pysal.engine.model.class_names import names_of
from pysal.engine.model.training import check_eval
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.target import CallTarget, Margin
from pysal.engine.running.chunks import fast_rows
from pysal.engine.running.precision import Precision
from pysal.engine.running.states import restoring
from pysal.methods.registry import EVERY, method_names
from pysal.models import Classifier
from pysal.models.classifier import channels_of
from pysal.targets import parse

# Images that are read, and handed to the methods, together: more where a pass of the model holds more.
IMAGES_TOGETHER = {"cpu": 16, "cuda": 64}
# Images that a target which is no class is tried on, until it is found in one.
TRIED = 16


class Job:
    """Attributions and figures for every image of a dataset, written to a folder.

    Making the object plans the job: it finds and sorts the images, cuts them into shards, and tries the model and the options
    on one image. `run` computes the shards that are missing, so a job that was stopped continues where it was. A folder that
    holds another job is refused, and the error says what differs.

    In a script, put `run` under `if __name__ == "__main__":`, because the workers import the script.

    Args:
        source: a folder, a glob, WebDataset tars, or a table (.csv, .tsv, .parquet) with a column path and, if there are
            labels, a column label.
        model: what `pysal.models.load` loads ("timm:NAME", "file.onnx", "file.py:function", ...), "module:function" that
            returns an nn.Module, or an nn.Module in eval mode, which the workers get by pickle.
        model_options: further arguments of `pysal.models.load`, for example `{"normalize": "imagenet", "allow_code": True}`.
        methods: names of methods, or "all".
        out: the folder to write.
        metrics: figures to compute for each image and method: names of `pysal.metrics.PER_IMAGE`.
        annotations: boxes or masks of the images, for the metrics that need them: see `pysal.annotations.read`. They must lie
            where every worker can read them.
        method_options: method name -> its own options, for example `{"integrated_gradients": {"steps": 100}}`. Values must
            fit into JSON; segments may be "grid:7x7", "window:16/8", "slic:100" or the objects these stand for.
        target: "predicted", "label", a class index, or any text that `pysal.targets.parse` knows: the name of a class if the
            model has class names, "margin:A/B", "label:NAME", "pixel:ROW,COLUMN/CLASS", "box:0" and so on. What is no class is
            tried out on the first images; one that a target cannot be found in has its row among the errors.
        score: what all methods explain, one of the words of `pysal.gradient`; None = the default of each method, as in
            `pysal.explain`. What kind of numbers the model's output is, is decided once for all shards, on noise and plain
            images, and stands in the manifest. An image whose output is of another kind is recorded as a fault.
        labels: "auto" = a table's column label or a tar's .cls, "folder" = the name of each image's folder, or "none".
        maps: how maps are stored: "none", "uint8" (256 levels and a scale) or "float16".
        size: (height, width) of the images in pixels, for a model that is not a `pysal.models.Classifier`; None = the model's.
        seed: seed of SmoothGrad's noise and of metrics that draw random numbers.
        precision: arithmetic of the model passes: "float32", "tf32", "mixed" or "bf16".
        shard_size: images per shard.
        batch_size: rows per model pass, as in `pysal.gradient`; None = 4 on a CPU, more of small images, and 64 on a GPU.
        prepared: whether the model is prepared (`pysal.prepare`) in each worker.
        device: "cpu", "cuda" or "auto".

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which.
        NotApplicable: a method cannot explain this model.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        model: str | nn.Module,
        methods: str | Sequence[str],
        out: str | Path,
        model_options: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
        annotations: str | Path | None = None,
        method_options: Mapping[str, Mapping[str, Any]] | None = None,
        target: str | int = "predicted",
        score: str | None = None,
        labels: Labels = "auto",
        maps: Maps = "uint8",
        size: tuple[int, int] | None = None,
        seed: int = 0,
        precision: Precision = "float32",
        shard_size: int = 256,
        batch_size: int | None = None,
        prepared: bool = True,
        device: str = "auto",
    ) -> None:
        names = method_names(WHERE, methods)
        options = Options(
            methods=options_of_methods(names, method_options or {}),
            metrics=metric_names(metrics, annotations is not None),
            annotations=None if annotations is None else os.path.abspath(annotations),
            target=target,
            score=score,
            labels=labels,
            maps=maps,
            size=size,
            seed=seed,
            precision=precision,
            shard_size=shard_size,
            batch_size=batch_size,
            prepared=prepared,
            device=device_of(device),
        )
        if not str(out):
            refuse(WHERE, "out", "name a folder", repr(str(out)))
        self.out = Path(out)
        self._model = ModelSource.of(WHERE, model, model_arguments(model_options or {}))
        loaded = self._model.load(WHERE, options.device)
        check_eval(WHERE, loaded)
        self._plan(str(source), options, loaded)

    def _plan(self, source: str, options: Options, loaded: nn.Module) -> None:
        """Try the model out, find the images, and write down what follows from both."""
        named, target = _class_of(options.target, loaded)
        self.manifest = _manifest(options, target, self._model, loaded)
        before = manifest.read(WHERE, self.out) if (self.out / "manifest.json").exists() else None
        if before is not None:  # what no caller says is as it was when the job began
            self.manifest |= {name: before[name] for name in ("gains", "images_together")}
        self._worker = Worker(Setup(self.manifest, self._model, Path()), options.device, loaded)
        if isinstance(self._worker.model, PreparedModel) and self._worker.model.gains is not None:
            self.manifest["gains"] = dataclasses.asdict(self._worker.model.gains)
        marked = None if options.annotations is None else read_annotations(options.annotations)
        of_classes = self._worker.picked is None
        classes = self._try_out(self._worker.example()) if of_classes else None
        names_known = loaded.class_index if isinstance(loaded, Classifier) and loaded.class_names else None
        found = data.find(WHERE, source, options.labels, options.shard_size, names_known, classes, self._worker.channels)
        found = self._with_the_vanished(found)
        if marked is not None and not any(marked.has(path) for path in found.images["path"].to_pylist()):
            requirement = "be of the images, by name"
            refuse(WHERE, "annotations", requirement, f"{marked.names[0]!r} ... for {found.images['path'][0]} ...")
        if marked is not None:
            self.manifest["annotations_sha256"] = marked.fingerprint
        if marked is not None and marked.kind == "masks":
            places = (found.root / path for path in found.images["path"].to_pylist())
            both = next((place for place in places if marked.holds(place)), None)
            if both is not None:
                refuse(WHERE, "annotations", "lie outside of data, where they are taken for photos", str(both))
        if classes is None:
            self._try_out_on_images(found, options.shard_size)
        else:
            if named is not None and named != classes:
                requirement = f"be a class index where the model names {named} classes and answers {classes}"
                refuse(WHERE, "target", requirement, "a name")
            largest = target if isinstance(target, int) else max(map(int, re.findall(r"\d+", target)), default=-1)
            if largest >= classes:
                refuse(WHERE, "target", f"be below the model's {classes} classes", largest)
        if target == "label" and found.images["label"].null_count == len(found.images):
            refuse(WHERE, "labels", "be known where target is 'label'", f"none of {len(found.images)} images has one")
        self.images = found.images
        self.manifest["data"] = {
            "source": source,
            "kind": found.kind,
            "root": str(found.root),
            "labels": options.labels,
            "images": len(found.images),
            "labelled": len(found.images) - found.images["label"].null_count,
            "shards": found.shards,
            "shard_size": options.shard_size,
            "sha256": found.sha256,
        }
        self._data = found
        prepared = self._worker.model
        if isinstance(prepared, PreparedModel):  # which has seen every method on one image
            with in_one_order(self._worker.device):
                prepared.settle(len(found.images))
            if prepared.gains is not None:
                self.manifest["gains"] = dataclasses.asdict(prepared.gains)
        record = prepared.record() if isinstance(prepared, PreparedModel) else None
        self._setup = Setup(self.manifest, self._model, found.root, record)
        self._worker.setup = self._setup
        if before is not None:
            self._refuse_another_job(before)

    def _with_the_vanished(self, found: data.Data) -> data.Data:
        """Return the images that the folder's table has, where all that are found are among them.

        Images that were taken away since, damaged ones perhaps, then have their rows among the errors, and the job goes on.
        """
        try:
            before = pq.read_table(self.out / "plan.parquet", schema=data.IMAGES)
        except (OSError, pa.ArrowException):
            return found
        columns = ["path", "label", "archive", "offset", "size"]
        planned = set(zip(*(before[name].to_pylist() for name in columns), strict=True))
        there = set(zip(*(found.images[name].to_pylist() for name in columns), strict=True))
        return data.Data(found.kind, found.root, before, data.fingerprint(before)) if there < planned else found

    @property
    def needs_code(self) -> bool:
        """Whether going on with the job runs code that makes its model, which is permitted each time."""
        return self._model.spec is not None and is_code(self._model.spec)

    def _try_out_on_images(self, found: data.Data, shard_size: int) -> None:
        """Try the methods on the first images in which the target can be found: noise has no boxes and no masks.

        Raises:
            ValueError: it is found in none of them; the first one's sentence.
        """
        first: ValueError | None = None
        for item in found.items(0, shard_size)[:TRIED]:
            try:
                image = decode(read_bytes(found.root, item), self._worker.original, self._worker.size, self._worker.channels)
            except Unreadable:
                continue
            image = image.to(self._worker.device)
            try:
                self._look_for_the_target(image)
            except ValueError as error:
                first = first or error
                continue
            self._try_out(image)
            return
        if first is not None:
            raise first
        refuse(WHERE, "data", "hold an image to try the target on among the first", f"{TRIED} that cannot be read")

    @restoring
    def _look_for_the_target(self, image: Tensor) -> None:
        with in_one_order(self._worker.device):
            self._worker.request(image, self._worker.picked).clean()

    @restoring
    def _try_out(self, images: Tensor) -> int | None:
        """Run every method on one image: what is wrong with the options shows now, and so do the shapes of the maps.

        Returns the number of classes, None where the target is none.
        """
        worker, methods = self._worker, self.manifest["methods"]
        with in_one_order(worker.device):
            plan = worker.request(images, worker.picked)
            item = data.Item(0, "", None, None, None, 0)
            given = {name: worker.options(name, [item]) for name in methods}
            works = {
                name: EVERY[name].prepare(plan.renamed(f"pysal.{name}", method["score"]), **given[name])
                for name, method in methods.items()
            }
            table = plan.clean().table
            plan.check_independence()  # an image's rows must not say which others were in its batch
            if table is not None:
                # of every shard the same: what a few of its images would say of the output is not asked
                output = self.manifest["model"]["output"] = worker.request(worker.probes(), 0).output
                plan.score.look.output = output
            for name, method in methods.items():
                found = works[name].run(report=True)
                method["layer"] = found.details.get("layer")
                if self.manifest["maps"] != "none" and EVERY[name].stored != "drops":
                    method["map_shape"] = list(stored_map(found, method["reduction"], name).shape[1:])
                if EVERY[name].stored == "drops" and "boxes" in found.details:
                    self.manifest["boxes"] = found.details["boxes"].tolist()
        return None if table is None else int(table.shape[1])

    def _refuse_another_job(self, before: dict[str, Any]) -> None:
        found = manifest.differences(before, self.manifest)
        if "data.sha256" in found:  # of which the others follow
            for name in ("sha256", "images", "shards", "labelled"):
                found.pop(f"data.{name}", None)
            with contextlib.suppress(OSError, pa.ArrowException):
                found["data"] = f"data: {data.first_difference(pq.read_table(self.out / 'plan.parquet'), self.images)}"
        if found:
            refuse(WHERE, "out", "be a new folder or that of the same job", f"{self.out}, where {'; '.join(found.values())}")

    def run(
        self,
        *,
        engine: Literal["pool", "inline", "ray"] = "pool",
        workers: int | None = None,
        address: str | None = None,
        progress: bool | Progress = False,
    ) -> Status:
        """Compute the shards that are missing, and return how far the job is.

        Args:
            engine: who computes: "pool" = processes on this machine, "ray" = a Ray cluster, "inline" = this process.
            workers: number of workers; None = one for each processor or, with GPUs, one for each GPU.
            address: address of the Ray cluster; None = start one on this machine.
            progress: True shows a tqdm bar; a function is called as `progress(images done, images in all)`.

        Raises:
            ValueError: another job runs in the folder.
            Stopped: a shard cannot be computed. Finished shards are kept, and another `run` continues with the rest.
            DiskFault: a file cannot be written, for example because the disk is full. Finished shards are kept here, too.
        """
        one_of("engine", engine, ENGINES)
        if address is not None and engine != "ray":
            refuse(WHERE, "address", "be given with engine='ray' only", repr(address))
        if workers is not None:
            check_count(WHERE, "workers", workers)
        files.make_folders(self.out)
        with files.locked(WHERE, self.out):
            files.remove_unfinished(self.out)
            self._begin()
            done = files.finished(self.out)
            size = self.manifest["data"]["shard_size"]
            todo = [Shard(n, self._data.items(n, size)) for n in range(self._data.shards) if n not in done]
            images = len(self.images)
            finished = images - sum(len(shard.items) for shard in todo)
            with reporting(progress, images, finished) as report:
                try:
                    for shard in self._computed(engine, todo, workers, address):
                        finished += shard.explained + shard.failed
                        report(finished, images)
                finally:
                    files.remove_unfinished(self.out)
        return status(self.out)

    def is_what_it_was(self, shard: int) -> bool:
        """Compute a finished shard again, and say whether its rows and errors are the same bytes as those on the disk."""
        again = self._worker.explain(shard, self._data.items(shard, self.manifest["data"]["shard_size"]))
        stored = [files.shard_path(self.out, folder, shard).read_bytes() for folder in ("shards", "errors")]
        return stored == [again.rows, again.errors]

    def _begin(self) -> None:
        if (self.out / "manifest.json").exists():
            self._refuse_another_job(manifest.read(WHERE, self.out))  # which may have begun since this one was planned
            if not (self.out / "plan.parquet").exists():  # lost; the images are those of the manifest, so it is the same
                self._write_images()
            return
        self._write_images()
        manifest.write(self.out, self.manifest)

    def _write_images(self) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(self.images, sink, compression="zstd")
        files.write(self.out / "plan.parquet", sink.getvalue().to_pybytes())

    def _computed(self, engine: str, todo: list[Shard], workers: int | None, address: str | None) -> Iterator[engines.Done]:
        if not todo:
            return
        found: Generator[engines.Done]
        if engine == "inline":
            found = engines.inline(todo, self.out, self._worker)
        elif engine == "ray":
            found = engines.on_ray(self._setup, todo, self.out, workers, address)
        else:
            found = engines.pool(self._setup, todo, self.out, engines.devices(self.manifest["device"], workers))
        with contextlib.closing(found):  # workers are sent home also where the caller stops in the middle
            yield from found


def _class_of(target: str | int, model: nn.Module) -> tuple[int | None, str | int]:
    """Return how many classes the model names, if the target is one of them by name, and the target without names."""
    if isinstance(target, int) or target in ("predicted", "label"):
        return None, target
    known = names_of(model)
    explained = parse(target, model, where=WHERE)
    if isinstance(explained, Margin):
        if not isinstance(explained.a, int) or not isinstance(explained.b, int):
            refuse(WHERE, "target", "be a margin of two class indices for a model without class names", repr(target))
        if explained.a == explained.b:
            refuse(WHERE, "target", "be a margin of two different classes", repr(target))
        return None if known is None else len(known), f"margin:{explained.a}/{explained.b}"
    if isinstance(explained, CallTarget):
        return None, target.strip()  # each worker reads it again: what it learns of an image belongs to a batch
    if isinstance(explained, int):
        return None if known is None else len(known), explained
    if known is None:
        refuse(WHERE, "target", "be 'predicted', 'label' or a class index for a model without class names", repr(target))
    return len(known), known.find(WHERE, "target", target)


def _input_size(size: tuple[int, int] | None, model: nn.Module) -> tuple[int, int]:
    """Return the size of images: the model's own, or the one given for a model that has none."""
    if not isinstance(model, Classifier):
        if size is None:
            refuse(WHERE, "size", "be given for a model that is no pysal.models.Classifier", "None")
        return size_of(size)
    if size is not None and tuple(size) != model.input_size:
        refuse(WHERE, "size", f"be left out for a model that has one, {model.input_size}", size)
    return model.input_size


def images_together(device: str, batch_size: int, shard_size: int) -> int:
    """Return how many images are handed to the methods together, so that methods of one pass for each fill theirs."""
    return min(max(IMAGES_TOGETHER[device], batch_size), max(IMAGES_TOGETHER[device], shard_size))


def _manifest(options: Options, target: str | int, source: ModelSource, model: nn.Module) -> dict[str, Any]:
    """Return what is known of an audit before the model has run and the images are found."""
    input_size = _input_size(options.size, model)
    classifier = model if isinstance(model, Classifier) else None
    row_bytes = 3 * input_size[0] * input_size[1] * 4
    batch_size = options.batch_size or fast_rows(torch.device(options.device), row_bytes)
    return {
        "format": manifest.FORMAT,
        "model": {
            "spec": source.spec,
            "options": source.options,
            "name": classifier.name if classifier is not None else type(model).__name__,
            "architecture_sha256": architecture_sha256(model),
            "weights_sha256": weights_sha256(model),
            "input_size": list(input_size),
            "channels": classifier.channels if classifier is not None else channels_of(model),
            "class_names": list(classifier.class_names) if classifier is not None else None,
            "output": None,
            "crop_fraction": classifier.crop_fraction if classifier is not None else None,
            "resample": classifier.resample if classifier is not None else None,
        },
        "methods": {
            name: {
                "title": EVERY[name].title,
                "options": own,
                "score": options.score or EVERY[name].score,
                "reduction": EVERY[name].reduction,
                "signed": EVERY[name].signed or own.get("centred") is True,
                "map_shape": None,
                "layer": None,
            }
            for name, own in options.methods.items()
        },
        "metrics": options.metrics,
        "annotations": options.annotations,
        "annotations_sha256": None,
        "target": target,
        "maps": options.maps,
        "boxes": None,
        "seed": options.seed,
        "precision": options.precision,
        "images_together": images_together(options.device, batch_size, options.shard_size),
        "batch_size": batch_size,
        "prepared": options.prepared,
        "gains": None,
        "device": options.device,
        "data": {},
        "versions": manifest.versions(),
        "created": {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "processor": manifest.processor(),
            "simd": build_info().get("simd", ""),
        },
    }


def resume(out: str | Path, *, model: nn.Module | None = None, download: bool = False, allow_code: bool = False) -> Job:
    """Return the job of a folder, planned again from its manifest; its `run` continues where the job stopped.

    The folder may come from somebody else. The model that its manifest names is loaded by `pysal.models.load`, and what was
    permitted when the job began must be permitted again here.

    Args:
        out: the folder.
        model: the model, if the job was given an nn.Module.
        download: permit downloading weights that are not on this machine.
        allow_code: permit running code: a Python file or function that makes the model, or code that comes with the model.

    Raises:
        PermissionError: the model is code, and `allow_code` is False.
        ValueError: the folder holds no audit; or the model, data, versions or anything else has changed. The message says
            what.
    """
    out = Path(out)
    stored = manifest.read("pysal.audit.resume", out)
    about, images = stored["model"], stored["data"]
    if about["spec"] is None and model is None:
        refuse("pysal.audit.resume", "model", "be given again for a job that was given an object", f"None for {about['name']}")
    if model is None and is_code(about["spec"]) and not allow_code:
        requirement = "be True (--allow-code) to run the code that makes the model, if you trust whoever wrote the folder"
        refuse("pysal.audit.resume", "allow_code", requirement, f"False for {about['spec']!r} in {out}", PermissionError)
    asked = dict(zip(PERMISSIONS, (download, allow_code), strict=True))
    loaded = model is None and not function_of(about["spec"])  # the other two take no options
    scores = {name: method["score"] for name, method in stored["methods"].items()}
    common = set(scores.values())
    own = all(EVERY[name].score == score for name, score in scores.items() if name in EVERY)
    return Job(
        images["source"],
        model=about["spec"] if model is None else model,
        model_options=about["options"] | ({name: True for name, given in asked.items() if given} if loaded else {}),
        methods=list(stored["methods"]),
        out=out,
        metrics=stored["metrics"],
        annotations=stored.get("annotations"),
        method_options={name: method["options"] for name, method in stored["methods"].items()},
        target=stored["target"],
        score=None if own else common.pop(),
        labels=images["labels"],
        maps=stored["maps"],
        size=None if about["class_names"] is not None else tuple(about["input_size"]),
        seed=stored["seed"],
        precision=stored["precision"],
        shard_size=images["shard_size"],
        batch_size=stored["batch_size"],
        prepared=stored["prepared"],
        device=stored["device"],
    )
