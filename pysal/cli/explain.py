"""`pysal explain`: pictures, numbers and a table of what the methods say of photos."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pysal.cli.options import (
    METHOD_NAMES,
    Folder,
    ModelChoice,
    device_of,
    method_options,
    methods_option,
    model_options,
    options_of_methods,
    score_option,
)
from pysal.cli.photos import find, note, stems
from pysal.cli.terminal import BadInput, Failure, collecting_later, columns, errors_as_sentences, say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pysal.engine.prepared.model import PreparedModel
    from pysal.explanation import Explanation
    from pysal.models import Classifier


@click.command(short_help="Explain the answer to photos: pictures, numbers and a table.")
@click.argument("photos", metavar="[PHOTO]...", nargs=-1, type=click.Path(path_type=Path))
@methods_option
@model_options
@click.option(
    "--target",
    metavar="NAME|INDEX|KIND:...",
    help="What to explain: a class by name or index, or margin:A/B, contrast:CLASS, label:CLASS, output:N, "
    "pixel:ROW,COLUMN/CLASS, mask:CLASS, box:N, box:LEFT,TOP,RIGHT,BOTTOM, token:N or norm. [default: the predicted class]",
)
@click.option(
    "--top", type=click.IntRange(min=1), metavar="N", help="Explain each of the N most probable classes. [default: the first]"
)
@score_option
@method_options
@click.option(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    show_default=True,
    help="Seed of what is drawn: SmoothGrad's noise, the orders of shapley, the masks of rise.",
)
@click.option(
    "--out",
    type=Folder(),
    default="pysal-out",
    metavar="DIR",
    show_default=True,
    help="Folder for the pictures (.png) and numbers (.npz).",
)
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Boxes or masks of the photos, to say how much of each map lies on the object: see pysal compare.",
)
@click.option(
    "--prepared",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep what preparing the model finds out in FILE, and use it if it is there: later commands begin at once.",
)
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="Device to run on: auto, cpu, cuda or cuda:N."
)
def explain(
    photos: Sequence[Path],
    methods: str | Sequence[str],
    model: ModelChoice,
    target: str | None,
    top: int | None,
    score: Any,
    given: dict[str, Any],
    seed: int,
    out: Path,
    annotations: Path | None,
    prepared: Path | None,
    device: str,
) -> None:
    """Explain a classifier's answer to each PHOTO: a picture, the numbers and a table.

    PHOTO is a file, a folder (its photos, also in folders below) or a glob, as in `cats/*.jpg`. Without one, a photo that comes
    with the package is explained. One of several that cannot be read is said, the others are explained, and the exit code is 1.
    """
    options = options_of_methods(METHOD_NAMES if methods == "all" else methods, given)
    if top is not None and target is not None:
        raise click.UsageError("--top and --target exclude each other")
    if len(photos) == 1 and not os.path.lexists(photos[0]):
        find(photos, ())  # which refuses it before torch is imported, unless it is a glob

    written: list[Path] = []
    with errors_as_sentences("pysal explain", written), _writable(out):
        with collecting_later():
            from pysal import models
            from pysal.annotations import read as read_annotations
            from pysal.engine.prepared.payback import OnceItPays
            from pysal.engine.prepared.prepare import prepare
            from pysal.engine.running.chunks import fast_rows, progress
            from pysal.explain import explain as run
            from pysal.methods.registry import EVERY, method_names
            from pysal.models.photos import suffixes_of
            from pysal.segments import parse
            from pysal.targets import parse as parse_target

            importlib.import_module("pysal.viz")  # which the pictures want

        if "segments" in given:
            for own in options.values():
                if "segments" in own:
                    own["segments"] = parse(given["segments"])
        place = device_of(device)
        classifier = model.load(place)
        explained = None if target is None else parse_target(target, classifier, where="pysal explain")
        marked = None if annotations is None else read_annotations(annotations)
        named = find(photos or [models.example_photo()], suffixes_of(classifier.channels), out)
        bad: dict[Path, str] = {}
        image = None
        for photo in named.paths:  # what cannot be read is known before hours of work on the others
            try:
                seen = models.read_image(photo, classifier)
                if marked is not None:  # its mask, too, which must fit it
                    marked.mask(photo, classifier)
                image = seen
            except (ValueError, OSError) as error:
                if len(named.paths) == 1 or not str(error).startswith("pysal"):
                    raise
                bad[photo] = named.missing.get(photo, str(error))
        if image is None:
            raise BadInput(
                f"pysal explain: none of the {len(named.paths)} photos can be read; the first: {next(iter(bad.values()))}"
            )
        endings = [""] if top is None else [f"-{rank:0{len(str(top))}}" for rank in range(1, top + 1)]
        # a fixed number of rows, not the one that measures fastest now: the same command gives the same bits, unless the
        # model is about as fast as what is prepared of it, so that either may be used
        rows = fast_rows(image.device, image[0].numel() * image.element_size())
        make = functools.partial(prepare, classifier, image, batch_size=rows)
        runner: nn.Module | PreparedModel = classifier
        if prepared is not None:
            runner = _kept(prepared, classifier, make)
        elif place == "cpu":
            gradients = sum(EVERY[name].gradients(options.get(name, {})) for name in method_names("pysal explain", methods))
            work = gradients * len(endings) * (len(named.paths) - len(bad))
            runner = OnceItPays(classifier, make).for_work(work)
        names = iter(stems([photo for photo in named.paths if photo not in bad], out, endings))
        for number, photo in enumerate(named.paths, start=1):
            counter = f"[{number}/{len(named.paths)}] " if len(named.paths) > 1 else ""
            if number > 1:
                say("")
            if photo in bad:
                say(f"{counter}{click.format_filename(photo)}", "", f"not explained: {bad[photo]}")
                continue
            stem = next(names)
            if len(named.paths) > 1:  # of one, it was read to see that it can be
                image = models.read_image(photo, classifier)
            image = image.to(place)
            heading = [f"{counter}{click.format_filename(photo)}"]
            wanted = [explained] if top is None else _likeliest(classifier, image, top)
            for ending, one in zip(endings, wanted, strict=False):
                with progress(sys.stderr.isatty()):
                    found = run(
                        runner,
                        image,
                        methods=methods,
                        target=one,
                        method_options=options,
                        seed=seed,
                        score=score,
                    )
                try:
                    files = found.save(out, stem + ending)
                except OSError as error:
                    raise Failure(str(error)) from error
                written.extend(files)
                say(*heading, "", found.table(), "")
                if marked is not None:
                    mask = marked.mask(photo, classifier, label=found.target_names[0])
                    say(*(["no object is marked on it"] if mask is None else _on_the_object(found, mask)), "")
                heading = []
                say(*(f"wrote {click.format_filename(file)}" for file in files))
        if left := note(named.left_out):
            say("", left)
        if bad:
            raise Failure(f"pysal explain: {len(bad)} of {len(named.paths)} photos could not be explained")


def _on_the_object(found: Explanation, mask: Tensor) -> list[str]:
    """Return the lines that say how much of each map lies on what people have marked."""
    from pysal.metrics import mass_in_mask, pointing_game
    from pysal.metrics.agreement import reduction_of

    lines = [["", "highest point on the object", "positive part on the object"]]
    for name, result in found.results.items():
        map, reduction = result.map.cpu(), reduction_of(name)
        shares = (measure(map, mask, reduction=reduction) for measure in (pointing_game, mass_in_mask))  # type: ignore[arg-type]
        lines.append([name, *(f"{float(share):.2f}" for share in shares)])
    return columns(lines)


def _likeliest(classifier: Classifier, image: Tensor, top: int) -> list[int]:
    """Return the classes with the highest scores, the highest first."""
    import torch

    with torch.no_grad():
        scores = classifier(image)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise BadInput(f"pysal explain: --top needs a model of several classes, got an output of shape {tuple(scores.shape)}")
    return [int(index) for index in scores[0].topk(min(top, scores.shape[1])).indices]


def _kept(file: Path, model: nn.Module, prepare: Callable[[], PreparedModel]) -> PreparedModel:
    """Return what a file says of a model, or prepare the model and write that file."""
    from pysal.engine.prepared.prepare import load_prepared

    if file.exists():
        return load_prepared(file, model)
    prepared = prepare()
    prepared.save(file)
    return prepared


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Make the folder and see that a file can be made in it; if nothing is put there, take away what was made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            where = click.format_filename(folder)
            raise BadInput(f"pysal explain: --out must be a folder to write in, got {where} ({error.strerror})") from error
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: results are in it
            for path in made:
                path.rmdir()
