"""An audit: what is asked for, planned, begun, interrupted and resumed."""

import contextlib
import inspect
import json
import platform
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from pysal import models
from pysal._checks import check_count, refuse, refuse_unknown
from pysal._library import build_info
from pysal.audit import data, engines, files, manifest
from pysal.audit.data import Labels
from pysal.audit.engines import ENGINES, Shard
from pysal.audit.model import PERMISSIONS, ModelSource, architecture_sha256, function_of, is_code, weights_sha256
from pysal.audit.shard import Setup, Worker, in_one_order, stored_map
from pysal.engine.model.class_names import names_of
from pysal.engine.prepared.model import check_eval
from pysal.engine.request.attribution import check_options
from pysal.engine.request.score import SCORE_KINDS
from pysal.engine.running.chunks import fast_rows
from pysal.engine.running.precision import PRECISIONS, Precision
from pysal.engine.running.states import restoring
from pysal.methods.registry import METHODS
from pysal.metrics import METRICS
from pysal.models import Classifier
from pysal.models.classifier import channels_of
from pysal.segments import Grid, Slic, Window, parse

WHERE = "pysal.audit.Job"
MAPS = ("none", "uint8", "float16")
BATCH = {"cpu": 16, "cuda": 64}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Status:
    """How far an audit is.

    Attributes:
        out: its folder.
        images: number of images in all.
        shards: number of shards in all.
        shards_done: number of shards that are finished.
        explained: number of images in them that have rows.
        failed: number of images in them that have no rows; the reasons are in errors/.
        seconds: processor time of the finished shards, of all workers together.
        running: the job that holds the folder now, "" if there is none.
    """

    out: Path
    images: int
    shards: int
    shards_done: int
    explained: int
    failed: int
    seconds: float
    running: str

    @property
    def complete(self) -> bool:
        """Whether every shard is finished."""
        return self.shards_done == self.shards

    def __str__(self) -> str:
        lines = [f"{self.shards_done} of {self.shards} shards, {self.explained + self.failed} of {self.images} images"]
        lines.append(f"{self.explained} explained, {self.failed} could not be")
        if self.explained and self.seconds:
            lines.append(f"{self.seconds / self.explained:.3g} s of a processor per image")
        lines.append(f"running: {self.running}" if self.running else "complete" if self.complete else "not running")
        return "\n".join(lines)


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
        metrics: figures to compute for each image and method: names of `pysal.metrics.PER_IMAGE` that need no masks.
        method_options: method name -> its own options, for example `{"integrated_gradients": {"steps": 100}}`. Values must
            fit into JSON; segments may be "grid:7x7", "window:16/8", "slic:100" or the objects these stand for.
        target: "predicted", "label", a class index, or the name of a class if the model has class names.
        score: what all methods explain, one of the words of `pysal.gradient`; None = the default of each method, as in
            `pysal.explain`. What kind of numbers the model's output is, is decided once for all shards, on noise and plain
            images, and stands in the manifest. An image whose output is of another kind is recorded as a fault.
        labels: "auto" = a table's column label or a tar's .cls, "folder" = the name of each image's folder, or "none".
        maps: how maps are stored: "none", "uint8" (256 levels and a scale) or "float16".
        size: (height, width) of the images in pixels, for a model that is not a `pysal.models.Classifier`; None = the model's.
        seed: seed of SmoothGrad's noise and of metrics that draw random numbers.
        precision: arithmetic of the model passes: "float32", "tf32", "mixed" or "bf16".
        shard_size: images per shard.
        batch: images handed to the methods together; None = 16 on a CPU, 64 on a GPU.
        rows: model rows per pass; None = 4 on a CPU, 64 on a GPU.
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
        method_options: Mapping[str, Mapping[str, Any]] | None = None,
        target: str | int = "predicted",
        score: str | None = None,
        labels: Labels = "auto",
        maps: Literal["none", "uint8", "float16"] = "uint8",
        size: tuple[int, int] | None = None,
        seed: int = 0,
        precision: Precision = "float32",
        shard_size: int = 256,
        batch: int | None = None,
        rows: int | None = None,
        prepared: bool = True,
        device: str = "auto",
    ) -> None:
        names = _names(methods)
        options = _options(names, method_options or {})
        _one_of("maps", maps, MAPS)
        _one_of("labels", labels, ("auto", "folder", "none"))
        _one_of("device", device, ("auto", "cpu", "cuda"))
        _one_of("precision", precision, PRECISIONS)
        if score is not None:
            _one_of("score", score, SCORE_KINDS)
        for name, value in (("shard_size", shard_size), ("batch", batch), ("rows", rows)):
            if value is not None:
                check_count(WHERE, name, value)
        if not isinstance(target, (str, int)) or isinstance(target, bool) or (isinstance(target, int) and target < 0):
            refuse(WHERE, "target", "be 'predicted', 'label', a class index or a class name", repr(target))
        if not str(out):
            refuse(WHERE, "out", "name a folder", repr(str(out)))
        self.out = Path(out)
        metric_names = _metrics(metrics)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = ModelSource.of(WHERE, model, _model_options(model_options or {}))
        loaded = self._model.load(WHERE, device)
        check_eval(WHERE, loaded)
        classifier = loaded if isinstance(loaded, Classifier) else None
        named: int | None = None
        if isinstance(target, str) and target not in ("predicted", "label"):
            known = names_of(loaded)
            if known is None:
                refuse(
                    WHERE, "target", "be 'predicted', 'label' or a class index for a model without class names", repr(target)
                )
            named, target = len(known), known.find(WHERE, "target", target)
        if size is None and classifier is None:
            refuse(WHERE, "size", "be given for a model that is no pysal.models.Classifier", "None")
        if size is not None and classifier is not None and tuple(size) != classifier.input_size:
            refuse(WHERE, "size", f"be left out for a model that has one, {classifier.input_size}", size)
        input_size = classifier.input_size if classifier is not None else _size(size)
        self.manifest: dict[str, Any] = {
            "format": manifest.FORMAT,
            "model": {
                "spec": self._model.spec,
                "options": self._model.options,
                "name": classifier.name if classifier is not None else type(loaded).__name__,
                "architecture_sha256": architecture_sha256(loaded),
                "weights_sha256": weights_sha256(loaded),
                "input_size": list(input_size),
                "channels": classifier.channels if classifier is not None else channels_of(loaded),
                "class_names": list(classifier.class_names) if classifier is not None else None,
                "output": None,
                "crop_fraction": classifier.crop_fraction if classifier is not None else None,
                "resample": classifier.resample if classifier is not None else None,
            },
            "methods": {
                name: {
                    "title": METHODS[name].title,
                    "options": options[name],
                    "score": score or METHODS[name].score,
                    "reduction": METHODS[name].reduction,
                    "signed": METHODS[name].signed,
                    "map_shape": None,
                    "layer": None,
                }
                for name in names
            },
            "metrics": metric_names,
            "target": target,
            "maps": maps,
            "boxes": None,
            "seed": seed,
            "precision": precision,
            "batch": batch or BATCH[device],
            "rows": rows or fast_rows(torch.device(device), 3 * input_size[0] * input_size[1] * 4),
            "prepared": prepared,
            "device": device,
            "data": {},
            "versions": manifest.versions(),
            "created": {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "processor": manifest.processor(),
                "simd": build_info().get("simd", ""),
            },
        }
        self._worker = Worker(Setup(self.manifest, self._model, Path()), device, loaded)
        classes = self._try_out()
        names_known = classifier.class_index if classifier is not None else None
        found = self._with_the_vanished(data.find(WHERE, str(source), labels, shard_size, names_known, classes))
        if named is not None and named != classes:
            refuse(WHERE, "target", f"be a class index where the model names {named} classes and answers {classes}", "a name")
        if isinstance(target, int) and target >= classes:
            refuse(WHERE, "target", f"be below the model's {classes} classes", target)
        if target == "label" and found.plan["label"].null_count == len(found.plan):
            refuse(WHERE, "labels", "be known where target is 'label'", f"none of {len(found.plan)} images has one")
        self.plan = found.plan
        self.manifest["data"] = {
            "source": str(source),
            "kind": found.kind,
            "root": str(found.root),
            "labels": labels,
            "images": len(found.plan),
            "labelled": len(found.plan) - found.plan["label"].null_count,
            "shards": found.shards,
            "shard_size": shard_size,
            "sha256": found.sha256,
        }
        self._data = found
        self._setup = Setup(self.manifest, self._model, found.root)
        self._worker.setup = self._setup
        if (self.out / "manifest.json").exists():
            self._refuse_another_job()

    def _with_the_vanished(self, found: data.Data) -> data.Data:
        """Return the images that the folder's plan has, where all that are found are among them.

        Images that were taken away since, damaged ones perhaps, then have their rows among the errors, and the job goes on.
        """
        try:
            before = pq.read_table(self.out / "plan.parquet", schema=data.PLAN)
        except (OSError, pa.ArrowException):
            return found
        columns = ["path", "label", "archive", "offset", "size"]
        planned = set(zip(*(before[name].to_pylist() for name in columns), strict=True))
        there = set(zip(*(found.plan[name].to_pylist() for name in columns), strict=True))
        return data.Data(found.kind, found.root, before, data.fingerprint(before)) if there < planned else found

    @property
    def needs_code(self) -> bool:
        """Whether going on with the job runs code that makes its model, which is permitted each time."""
        return self._model.spec is not None and is_code(self._model.spec)

    @restoring
    def _try_out(self) -> int:
        """Run every method on one image: what is wrong with the options shows now, and so do the shapes of the maps."""
        worker, methods = self._worker, self.manifest["methods"]
        images = worker.example()
        with in_one_order(worker.device):
            plan = worker.request(images, None)
            item = data.Item(0, "", None, None, None, 0)
            given = {name: worker.options(name, [item]) for name in methods}
            works = {
                name: METHODS[name].prepare(plan.renamed(f"pysal.{name}", method["score"]), **given[name])
                for name, method in methods.items()
            }
            table = plan.clean().table
            assert table is not None
            plan.check_independence()  # an image's rows must not say which others were in its batch
            # of every shard the same: what a few of its images would say of the output is not asked
            output = self.manifest["model"]["output"] = worker.request(worker.probes(), 0).output
            plan.score.look.output = output
            for name, method in methods.items():
                found = works[name].run(report=True)
                method["layer"] = found.details.get("layer")
                if self.manifest["maps"] != "none" and METHODS[name].kept != "drops":
                    method["map_shape"] = list(stored_map(found, method["reduction"], name).shape[1:])
                if METHODS[name].kept == "drops" and "boxes" in found.details:
                    self.manifest["boxes"] = found.details["boxes"].tolist()
        return int(table.shape[1])

    def _refuse_another_job(self) -> None:
        before = manifest.read(WHERE, self.out)
        found = manifest.differences(before, self.manifest)
        if any(phrase.startswith("data.sha256") for phrase in found):
            found = [phrase for phrase in found if not re.match(r"data\.(sha256|images|shards|labelled) ", phrase)]
            with contextlib.suppress(OSError, pa.ArrowException):
                found.append(f"data: {data.first_difference(pq.read_table(self.out / 'plan.parquet'), self.plan)}")
        if found:
            refuse(WHERE, "out", "be a new folder or that of the same job", f"{self.out}, where {'; '.join(found)}")

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
        _one_of("engine", engine, ENGINES)
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
            images = len(self.plan)
            finished = images - sum(len(shard.items) for shard in todo)
            with _reporting(progress, images, finished) as report:
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
            self._refuse_another_job()  # which may have begun since this one was planned
            if not (self.out / "plan.parquet").exists():  # lost; the images are those of the manifest, so it is the same
                self._write_plan()
            return
        self._write_plan()
        manifest.write(self.out, self.manifest)

    def _write_plan(self) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(self.plan, sink, compression="zstd")
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
    own = all(METHODS[name].score == score for name, score in scores.items() if name in METHODS)
    return Job(
        images["source"],
        model=about["spec"] if model is None else model,
        model_options=about["options"] | ({name: True for name, given in asked.items() if given} if loaded else {}),
        methods=list(stored["methods"]),
        out=out,
        metrics=stored["metrics"],
        method_options={name: method["options"] for name, method in stored["methods"].items()},
        target=stored["target"],
        score=None if own else common.pop(),
        labels=images["labels"],
        maps=stored["maps"],
        size=None if about["class_names"] is not None else tuple(about["input_size"]),
        seed=stored["seed"],
        precision=stored["precision"],
        shard_size=images["shard_size"],
        batch=stored["batch"],
        rows=stored["rows"],
        prepared=stored["prepared"],
        device=stored["device"],
    )


def status(out: str | Path) -> Status:
    """Return how far the audit of a folder is. It may still be running.

    Raises:
        ValueError: the folder holds no audit.
    """
    out = Path(out)
    stored = manifest.read("pysal.audit.status", out)
    images, size = stored["data"]["images"], stored["data"]["shard_size"]
    done = sorted(files.finished(out))
    failed = sum(pq.read_metadata(files.shard_path(out, "errors", n)).num_rows for n in done)
    seconds = 0.0
    for n in done:
        seconds += sum(pq.read_table(files.shard_path(out, "timings", n), columns=["cpu_seconds"])["cpu_seconds"].to_pylist())
    covered = sum(min(size, images - n * size) for n in done)
    return Status(out, images, stored["data"]["shards"], len(done), covered - failed, failed, seconds, files.running(out))


@contextlib.contextmanager
def _reporting(progress: bool | Progress, images: int, finished: int) -> Iterator[Progress]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from tqdm import tqdm

        with tqdm(total=images, initial=finished, unit="image", file=sys.stderr, smoothing=0.05) as bar:
            yield lambda done, total: bar.update(done - bar.n)


def _names(methods: object) -> list[str]:
    if not isinstance(methods, (str, Sequence)):
        refuse(WHERE, "methods", "be 'all', a name or a sequence of names", repr(methods), TypeError)
    names = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(methods)
    for name in names:
        if name not in METHODS:
            refuse_unknown(WHERE, "methods", f"be 'all' or names out of {', '.join(METHODS)}", name, METHODS)
    if not names:
        refuse(WHERE, "methods", "name at least one method", "none")
    return list(dict.fromkeys(names))


def _metrics(metrics: Sequence[str]) -> list[str]:
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        refuse(WHERE, "metrics", "be a sequence of names", repr(metrics), TypeError)
    possible = [name for name, metric in METRICS.items() if metric.needs != "masks"]
    for name in metrics:
        if name not in possible:
            refuse_unknown(WHERE, "metrics", f"be names out of {', '.join(possible)}", name, possible)
    return list(dict.fromkeys(metrics))


def _model_options(given: object) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        refuse(WHERE, "model_options", "be a mapping of arguments of pysal.models.load", repr(given), TypeError)
    known = [name for name in inspect.signature(models.load).parameters if name not in ("source", "device")]
    for name in given:
        if name not in known:
            refuse_unknown(WHERE, "model_options", f"hold arguments out of {', '.join(known)}", name, known)
    return {name: _json(f"model_options[{name!r}]", value) for name, value in given.items()}


def _options(names: list[str], given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the options of each method as JSON has them."""
    if not isinstance(given, Mapping):
        refuse(WHERE, "method_options", "be a mapping of methods to their options", repr(given), TypeError)
    for name, options in given.items():
        argument = f"method_options[{name!r}]"
        if name not in names:
            refuse_unknown(WHERE, "method_options", f"be for the methods asked for ({', '.join(names)})", name, names)
        if not isinstance(options, Mapping):
            refuse(WHERE, argument, "be a mapping of option names to values", repr(options), TypeError)
        check_options(WHERE, argument, METHODS[name].prepare, options)
        for reserved in ("seed", "image_ids"):
            if reserved in options:
                refuse(WHERE, argument, "leave seed and image_ids to the job", repr(reserved))
    return {name: {key: _plain(name, key, value) for key, value in given.get(name, {}).items()} for name in names}


def _plain(method: str, option: str, value: Any) -> Any:
    argument = f"method_options[{method!r}][{option!r}]"
    if option == "segments":
        if isinstance(value, str):
            parse(value)
            return value
        text = _segments_text(value)
        if text is None or parse(text) != value:
            refuse(WHERE, argument, "be like grid:3x3, window:16/8 or slic:100", repr(value))
        return text
    return _json(argument, value)


def _json(argument: str, value: Any) -> Any:
    """Return a value as it comes back from the manifest."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        refuse(WHERE, argument, "be a number, a text or a list of them", repr(value), TypeError)


def _segments_text(value: Any) -> str | None:
    if isinstance(value, Grid):
        return f"grid:{value.rows}x{value.cols}"
    if isinstance(value, Slic):
        return f"slic:{value.n_segments}"
    if isinstance(value, Window) and isinstance(value.size, int) and not isinstance(value.stride, tuple):
        return f"window:{value.size}" + (f"/{value.stride}" if value.stride is not None else "")
    return None


def _one_of(argument: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        refuse_unknown(WHERE, argument, f"be one of {', '.join(known)}", value, known)


def _size(size: object) -> tuple[int, int]:
    whole = isinstance(size, tuple | list) and len(size) == 2
    if not whole or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 2 for side in size):  # type: ignore[attr-defined]
        refuse(WHERE, "size", "be (height, width) in pixels", repr(size))
    return int(size[0]), int(size[1])  # type: ignore[index]
