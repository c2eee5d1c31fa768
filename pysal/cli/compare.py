"""`pysal compare`: which method to trust for a model, measured on its own photos."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pysal.cli.options import (
    METHOD_NAMES,
    MODEL_SOURCES,
    Folder,
    ModelChoice,
    device_of,
    method_options,
    methods_option,
    more_of_the_model,
    options_of_methods,
    score_option,
)
from pysal.cli.photos import find
from pysal.cli.terminal import BadInput, columns, errors_as_sentences, say


@click.command(
    short_help="Compare methods on a model's own photos: a report with a recommendation.",
    epilog=f"MODEL is efficientnet-lite0, {MODEL_SOURCES}.",
)
@click.argument("model", metavar="MODEL")
@click.argument("photos", metavar="PHOTO...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Boxes or masks of the photos: a COCO file (.json), or a folder of VOC files (.xml) or masks (.png) named as these.",
)
@methods_option
@click.option(
    "--metrics",
    "metric_list",
    default="",
    metavar="NAMES",
    help="Metrics to compare by, separated by commas. [default: all but deletion_blur and insertion_zero]",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Most photos, spread over those given. [default: all]")
@click.option(
    "--few",
    type=click.IntRange(min=0),
    default=4,
    metavar="N",
    show_default=True,
    help="Number of photos for what takes long: information curves, max-sensitivity, random weights and grids.",
)
@score_option
@click.option("--seed", type=int, default=0, metavar="N", show_default=True, help="Seed of all that is drawn.")
@click.option(
    "--out",
    type=Folder(),
    default="pysal-compare",
    metavar="DIR",
    show_default=True,
    help="Folder for the report and the numbers.",
)
@more_of_the_model
@method_options
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="Device to run on: auto, cpu, cuda or cuda:N."
)
def compare(
    model: ModelChoice,
    photos: Sequence[Path],
    annotations: Path | None,
    methods: str | Sequence[str],
    metric_list: str,
    limit: int | None,
    few: int,
    score: Any,
    seed: int,
    out: Path,
    given: dict[str, Any],
    device: str,
) -> None:
    """Compare the methods on PHOTOs by every metric, and write a report that says which to prefer, and how sure that is.

    PHOTO is a file, a folder (its photos, also in folders below) or a glob. What was measured is kept in the folder of --out:
    the same command goes on where it was stopped.
    """
    options = options_of_methods(METHOD_NAMES if methods == "all" else methods, given)
    with errors_as_sentences("pysal compare"):
        from pysal.comparison import compare as run
        from pysal.models.photos import suffixes_of
        from pysal.segments import parse

        if "segments" in given:
            for own in options.values():
                if "segments" in own:
                    own["segments"] = parse(given["segments"])
        loaded = model.load(device_of(device))
        named = find(photos, suffixes_of(loaded.channels), out, "pysal compare")
        if named.missing:
            first = min(named.missing)
            raise BadInput(f"pysal compare: PHOTO must be there, got {click.format_filename(first)} ({named.missing[first]})")
        found = run(
            loaded,
            [str(path) for path in named.paths],
            out=out,
            annotations=annotations,
            methods=methods,
            method_options=options,
            metrics=[name.strip() for name in metric_list.split(",") if name.strip()] or None,
            limit=limit,
            few=few,
            seed=seed,
            score=score,
            progress=_said if sys.stderr.isatty() else None,
        )
        shown = {
            name: one for name, one in found.estimates.items() if name in ("insertion_minus_deletion", "road", "mass_in_mask")
        }
        head = ["", *(name.replace("_", " ") for name in shown)]
        lines = [[title, *(f"{table[name].mean:.2f}" for table in shown.values())] for name, title in found.methods.items()]
        if shown:
            say(*columns([head, *lines]), "")
        say(*found.reasons, "")
        say(*(f"wrote {click.format_filename(out / name)}" for name in ("report.html", "comparison.json")))


def _said(done: int, images: int) -> None:
    say(f"{done} of {images} photos", error=True)
