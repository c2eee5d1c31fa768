"""`pysal audit`: a whole dataset explained, continued, checked and reported."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pysal.cli.options import (
    METHOD_NAMES,
    Folder,
    ModelChoice,
    Word,
    method_options,
    methods_option,
    model_options,
    options_of_methods,
    score_option,
)
from pysal.cli.photos import note
from pysal.cli.terminal import Commands, Failure, Interrupted, errors_as_sentences, say

if TYPE_CHECKING:
    from pysal.audit import Job


@click.group(short_help="Explain a whole dataset: a folder of Parquet files.", cls=Commands)
def audit() -> None:
    """Explain every image of a dataset, and write maps and metrics to a folder of Parquet files."""


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say who computes, which `run` and `resume` share."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=Word(["pool", "ray", "inline"]),
                default="pool",
                show_default=True,
                help="Where to compute: processes of this machine (pool), a Ray cluster, or this process (inline).",
            ),
            click.option(
                "--workers",
                type=click.IntRange(min=1),
                metavar="N",
                help="Number of workers. [default: one for each core, or for each GPU]",
            ),
            click.option("--address", metavar="ADDRESS", help="Address of the Ray cluster. [default: start one here]"),
        )
    ):
        command = option(command)
    return command


def _permissions(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that permit what the manifest of a folder asks for."""
    command = click.option("--allow-code", is_flag=True, help="Permit running code that makes the model or comes with it.")(
        command
    )
    return click.option("--download", is_flag=True, help="Download weights that are not on this machine.")(command)


@audit.command("run", short_help="Explain every image of DATA, or continue a job that was stopped.")
@click.argument("source", metavar="DATA")
@click.option("--out", required=True, type=Folder(), metavar="DIR", help="Folder for the results.")
@methods_option
@click.option(
    "--metrics",
    "metric_list",
    default="",
    metavar="NAMES",
    help="Metrics to compute for each map, separated by commas. [default: none]",
)
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Boxes or masks for metrics that need them: a COCO file, or a folder of VOC files or masks named as the images.",
)
@click.option(
    "--target",
    default="predicted",
    metavar="WHAT",
    show_default=True,
    help="What to explain: predicted, label, one class by name or index, or what `pysal explain --target` takes.",
)
@click.option(
    "--labels",
    type=Word(["auto", "folder", "none"]),
    default="auto",
    show_default=True,
    help="Source of the true classes: the table or the tars (auto), the names of folders (folder), or none.",
)
@click.option(
    "--maps",
    type=Word(["none", "uint8", "float16"]),
    default="uint8",
    show_default=True,
    help="Number format of the stored maps; none stores no maps.",
)
@score_option
@method_options
@click.option(
    "--seed", type=int, default=0, metavar="N", show_default=True, help="Seed of SmoothGrad's noise and of random metrics."
)
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=256,
    metavar="N",
    show_default=True,
    help="Number of images per shard file.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of rows in one model pass. [default: 4 of 224x224 pixels, more of smaller images; 64 on a GPU]",
)
@click.option("--device", type=Word(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Device to run on.")
@model_options
@_engine_options
def audit_run(
    source: str,
    out: Path,
    model: ModelChoice,
    methods: str | Sequence[str],
    metric_list: str,
    target: str,
    given: dict[str, Any],
    engine: str,
    workers: int | None,
    address: str | None,
    **options: Any,
) -> None:
    """Explain every image of DATA and write what is found to a folder.

    DATA is a folder, a glob, a table (.csv, .tsv or .parquet) with the column path and maybe label, or WebDataset tars. What
    is in the folder already is kept: the same command continues where it was stopped.

    --model also takes MODULE:FUNCTION, a function of an importable module that returns an nn.Module of images in [0, 1]; it
    needs --size.
    """
    of_methods = options_of_methods(METHOD_NAMES if methods == "all" else methods, given)
    with errors_as_sentences("pysal audit run"):
        from pysal.audit import Job
        from pysal.audit.data import left_out
        from pysal.audit.model import function_of

        arguments = model.arguments()
        if function_of(model.source):  # which brings all but the size
            options["size"] = arguments.pop("size", None)
        job = Job(
            source,
            out=out,
            model=model.source,
            model_options=arguments,
            methods=methods,
            metrics=_listed(metric_list),
            method_options=of_methods,
            target=int(target) if target.isdecimal() else target,
            **options,
        )
        if left := note(left_out(source, job.manifest["model"]["channels"])):
            say(left)
        _run_audit("pysal audit run", job, engine, workers, address)


@audit.command("resume", short_help="Continue a job that was stopped.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@_permissions
@_engine_options
def audit_resume(out: Path, download: bool, allow_code: bool, engine: str, workers: int | None, address: str | None) -> None:
    """Continue the job of DIR, if model, data and versions have not changed.

    DIR may come from somebody else, so permissions given to `run` do not carry over: give --allow-code and --download again.
    """
    with errors_as_sentences("pysal audit resume"):
        from pysal.audit import resume

        job = resume(out, download=download, allow_code=allow_code)
        _run_audit("pysal audit resume", job, engine, workers, address)


@audit.command("status", short_help="Show the progress of a job.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
def audit_status(out: Path) -> None:
    """Show the progress of the job of DIR, also while it runs."""
    with errors_as_sentences("pysal audit status"):
        from pysal.audit import status

        say(*str(status(out)).splitlines())


@audit.command("verify", short_help="Read all files of a job again and check them.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--images", is_flag=True, help="Also read the images again and compare their hashes.")
@click.option(
    "--recompute",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also compute N shards again and compare their bytes.",
)
@_permissions
def audit_verify(out: Path, images: bool, recompute: int, download: bool, allow_code: bool) -> None:
    """Read all files of DIR again and check them against the plan and against each other.

    The exit code is 1 if a file is missing, damaged or contradicts another.
    """
    with errors_as_sentences("pysal audit verify"):
        from pysal.audit import status, verify

        problems = verify(out, images=images, recompute=recompute, download=download, allow_code=allow_code)
        say(*problems)
        if problems:
            raise Failure(f"pysal audit verify: {out} has {len(problems)} problem{'s' * (len(problems) > 1)}")
        found = status(out)
        say(f"{found.images} images in {found.shards} shard{'s' if found.shards != 1 else ''}: all is as it should be")


@audit.command("report", short_help="Write what was found as one HTML file.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), metavar="FILE", help="File to write. [default: DIR/report.html]")
@click.option("--images", default=6, show_default=True, metavar="N", help="Number of photos on each contact sheet, 1 to 24.")
def audit_report(out: Path, to: Path | None, images: int) -> None:
    """Write a report of the finished shards of DIR: one HTML file that needs no network."""
    with errors_as_sentences("pysal audit report"):
        from pysal.audit import report

        say(f"wrote {click.format_filename(report(out, to=to, images=images))}")


def _run_audit(command: str, job: "Job", engine: str, workers: int | None, address: str | None) -> None:
    """Run a job, and say how it ended and what to do then."""
    from pysal.audit import status

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be asked to end is to be interrupted
    try:
        try:
            found = job.run(engine=engine, workers=workers, address=address, progress=sys.stderr.isatty())  # type: ignore[arg-type]
        except KeyboardInterrupt as interrupt:
            if not (job.out / "manifest.json").exists():
                raise Interrupted(f"{command}: interrupted before the first shard was begun") from interrupt
            so_far = status(job.out)
            shards = f"{so_far.shards_done} of {so_far.shards} shards are done"
            where = click.format_filename(job.out) + (" --allow-code" if job.needs_code else "")
            raise Interrupted(
                f"{command}: interrupted, {shards}; pysal audit resume {where} goes on with the rest"
            ) from interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    say(*str(found).splitlines()[:-1], f"wrote {click.format_filename(job.out)}")


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
