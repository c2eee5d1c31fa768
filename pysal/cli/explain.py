"""`pysal explain`: pictures, numbers and a table of what the methods say of photos."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from pysal.cli.terminal import BadInput, Failure, errors_as_sentences, say


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
@score_option
@method_options
@click.option("--seed", type=int, default=0, metavar="N", show_default=True, help="Seed of SmoothGrad's noise.")
@click.option(
    "--out",
    type=Folder(),
    default="pysal-out",
    metavar="DIR",
    show_default=True,
    help="Folder for the pictures (.png) and numbers (.npz).",
)
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="Device to run on: auto, cpu, cuda or cuda:N."
)
def explain(
    photos: Sequence[Path],
    methods: str | Sequence[str],
    model: ModelChoice,
    target: str | None,
    score: Any,
    given: dict[str, Any],
    seed: int,
    out: Path,
    device: str,
) -> None:
    """Explain a classifier's answer to each PHOTO: a picture, the numbers and a table.

    Without a PHOTO, one that comes with the package is explained.
    """
    options = options_of_methods(METHOD_NAMES if methods == "all" else methods, given)
    for photo in photos:
        if not os.path.lexists(photo):
            raise BadInput(f"pysal explain: PHOTO must be an image file, got {click.format_filename(photo)} (no such file)")

    written: list[Path] = []
    with errors_as_sentences("pysal explain", written), _writable(out):
        from pysal import models
        from pysal.engine.prepared.prepare import prepare
        from pysal.engine.running.chunks import fast_rows, progress
        from pysal.explain import explain as run
        from pysal.segments import parse
        from pysal.targets import parse as parse_target

        if "segments" in given:
            options["leave_one_out"]["segments"] = parse(given["segments"])
        place = device_of(device)
        classifier = model.load(place)
        explained = None if target is None else parse_target(target, classifier, where="pysal explain")
        sources = list(photos) or [models.example_photo()]
        for photo in sources:  # a photo that cannot be read is said before hours of work on the others
            image = models.read_image(photo, classifier)
        # a fixed number of rows, not the one that measures fastest now: the same command gives the same bits, unless the
        # model is about as fast as what is prepared of it, so that either may be used
        rows = fast_rows(image.device, image[0].numel() * image.element_size())
        runner = prepare(classifier, image, batch_size=rows) if place == "cpu" else classifier
        for number, (photo, stem) in enumerate(zip(sources, _stems(sources), strict=True), start=1):
            image = models.read_image(photo, classifier).to(place)
            with progress(sys.stderr.isatty()):
                found = run(
                    runner,
                    image,
                    methods=methods,
                    target=explained,
                    method_options=options,
                    seed=seed,
                    score=score,
                )
            try:
                files = found.save(out, stem)
            except OSError as error:
                raise Failure(str(error)) from error
            written.extend(files)
            counter = f"[{number}/{len(sources)}] " if len(sources) > 1 else ""
            say(f"{counter}{click.format_filename(photo)}", "", found.table(), "")
            say(*(f"wrote {click.format_filename(file)}" for file in files))
            if number < len(sources):
                say("")


def _stems(photos: Sequence[Path]) -> list[str]:
    """Return a file name for each photo's results, different from each other even where letters' case does not count."""
    stems: list[str] = []
    for photo in photos:
        stem, number = photo.stem, 1
        while stem.casefold() in {taken.casefold() for taken in stems}:
            number += 1
            stem = f"{photo.stem}-{number}"
        stems.append(stem)
    return stems


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
