"""The command line: `pysal explain`, `pysal audit`, `pysal demo`, `pysal methods`, `pysal info`.

torch, NumPy and matplotlib are imported inside the commands only, so that `pysal --help` answers at once. Whatever goes
wrong is one sentence on stderr, with exit code 2 for a wrong call or bad input, 1 for a failure and 130 for Ctrl-C.
"""

import contextlib
import functools
import os
import platform
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pysal.methods.traits import PATHS, TRAITS

if TYPE_CHECKING:
    from pysal.audit import Job
    from pysal.models import Classifier

METHOD_NAMES = tuple(TRAITS)
# The kinds of pysal.engine.request.score, which takes seconds to import; tests/test_cli.py holds the two together.
SCORE_NAMES = ("auto", "probability", "log_probability", "logit", "raw", "softmax", "log_softmax", "sigmoid", "log_sigmoid")
# Command line option, which is the methods' own too, -> the methods that have it.
OPTION_OF = {
    "segments": ("leave_one_out",),
    "approximate": ("leave_one_out",),
    "steps": PATHS,
    "tolerance": PATHS,
    "samples": ("smooth_grad",),
    "other_activations": ("guided_backprop", "guided_grad_cam"),
}


class BadInput(click.ClickException):
    """What was asked for cannot be done."""

    exit_code = 2


class Failure(click.ClickException):
    """What was asked for went wrong on the way."""

    exit_code = 1


class Interrupted(click.ClickException):
    """Somebody pressed Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """A group of commands whose every error is one sentence on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code; with `standalone_mode=False`, return or raise as click does."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name or "pysal", complete_var, standalone_mode=False, **extra)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "pysal"
            _say(f"{command}: {_one_line(error.format_message()).rstrip('.')} (see {command} --help)", error=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _say(_one_line(error.format_message()), error=True)
            sys.exit(error.exit_code)
        except click.Abort:
            _say("pysal: interrupted, wrote nothing", error=True)
            sys.exit(Interrupted.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


class MethodName(click.Choice[str]):
    """A method's name, with hyphens or underscores, in any case, or "all"."""

    name = "method"

    def __init__(self) -> None:
        super().__init__([*METHOD_NAMES, "all"], case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name as Python has it."""
        return super().convert(str(value).replace("-", "_"), param, ctx)


class Folder(click.Path):
    """A folder to write; an empty name, as of a variable that is not set, is not the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the folder as a path."""
        if value == "":
            self.fail("it must name a folder, got ''", param, ctx)
        return super().convert(value, param, ctx)


@dataclass(frozen=True)
class ModelChoice:
    """What the options about a model say: the arguments of `pysal.models.load`."""

    source: str
    weights: str | None
    size: str | None
    normalize: str | None
    classes: str | None
    download: bool
    allow_code: bool

    def load(self, device: str) -> "Classifier":
        """Return the classifier.

        Raises:
            BadInput: an option that cannot be read.
            ValueError, TypeError, OSError, ImportError: see `pysal.models.load`.
        """
        from pysal import models

        return models.load(self.source, **self.arguments(), device=device)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that were given, by the names that `pysal.models.load` has for them.

        Raises:
            BadInput: an option that cannot be read.
        """
        found = {
            "weights": self.weights,
            "size": self._size(),
            "normalize": self._normalize(),
            "class_names": self._class_names(),
            "download": self.download or None,
            "allow_code": self.allow_code or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _size(self) -> tuple[int, int] | None:
        if self.size is None:
            return None
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size)
        if found is None:
            raise BadInput(f"pysal: --size must be pixels, as in 224 or 224x320 (height x width), got {self.size!r}")
        return int(found[1]), int(found[2] or found[1])

    def _normalize(self) -> Any:
        if self.normalize is None or "/" not in self.normalize:
            return self.normalize
        try:
            mean, std = ([float(number) for number in part.split(",")] for part in self.normalize.split("/"))
        except ValueError as error:
            expected = "imagenet, none or MEAN/STD, as in 0.5,0.5,0.5/0.5,0.5,0.5"
            raise BadInput(f"pysal: --normalize must be {expected}, got {self.normalize!r}") from error
        return (mean * 3 if len(mean) == 1 else mean), (std * 3 if len(std) == 1 else std)

    def _class_names(self) -> Any:
        if self.classes is None or self.classes == "imagenet":
            return self.classes
        try:
            return [line for line in Path(self.classes).read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise BadInput(f"pysal: --classes must be imagenet or a text file, got {self.classes} ({reason})") from error


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --model and the options that say more about it; it gets them as `model`, a `ModelChoice`."""

    @functools.wraps(command)
    def with_choice(model: str, **given: Any) -> None:
        names = ("weights", "size", "normalize", "classes", "download", "allow_code")
        command(model=ModelChoice(model, **{name: given.pop(name) for name in names}), **given)

    options = (
        click.option(
            "--model",
            default="efficientnet-lite0",
            metavar="SOURCE",
            show_default=True,
            help="Model to load: torchvision:NAME, timm:NAME, transformers:NAME, FILE.pt, .pt2, .onnx or FILE.py:FUNCTION.",
        ),
        click.option("--weights", metavar="FILE|random", help="Weights file, or random. [default: the published weights]"),
        click.option("--size", metavar="N|HxW", help="Input size of the model, in pixels. [default: the model's own]"),
        click.option(
            "--normalize",
            metavar="imagenet|none|MEAN/STD",
            help="Normalisation of the model's input; required for model files. [default: the model's own]",
        ),
        click.option(
            "--classes", metavar="imagenet|FILE", help="File of class names, one per line. [default: the model's own]"
        ),
        click.option("--download", is_flag=True, help="Download weights that are not on this machine."),
        click.option("--allow-code", is_flag=True, help="Permit to run a Python file, or code inside a model file."),
    )
    for option in reversed(options):
        with_choice = option(with_choice)
    return with_choice


def score_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --score."""
    return click.option(
        "--score",
        type=click.Choice(SCORE_NAMES),
        metavar="KIND",
        help=f"Number to explain: {', '.join(SCORE_NAMES)}. [default: auto for leave_one_out, logit for the other methods]",
    )(command)


def method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of single methods; it gets those that were given as `given`."""

    @functools.wraps(command)
    def with_given(**arguments: Any) -> None:
        given = {name: value for name in OPTION_OF if (value := arguments.pop(name)) is not None}
        if "steps" in given and "tolerance" in given:
            raise click.UsageError("--steps and --tolerance exclude each other")
        command(given=given, **arguments)

    options = (
        click.option(
            "--segments",
            metavar="SPEC",
            help="For leave_one_out: shape of the segments, grid:3x3, window:16/8 or slic:100. [default: slic:100]",
        ),
        click.option(
            "--approximate",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="SHARE",
            help="For leave_one_out: at each layer recompute at most this fraction of the map's height and width. Smaller is "
            "faster and less exact; the error is reported. [default: exact]",
        ),
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of steps of integrated_gradients and blur_integrated_gradients.",
        ),
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            metavar="T",
            help="Instead of --steps: add steps until the estimated relative error of the map is below T.",
        ),
        click.option(
            "--samples", type=click.IntRange(min=1), metavar="N", help="Number of noisy copies for smooth_grad. [default: 50]"
        ),
        click.option(
            "--other-activations",
            type=click.Choice(["plain", "generalised"]),
            help="For guided_backprop and guided_grad_cam: what to do at activations other than ReLU. plain keeps their "
            "gradient, generalised applies the guided rule where their output is positive. [default: refuse the model]",
        ),
    )
    for option in reversed(options):
        with_given = option(with_given)
    return with_given


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from pysal._library import version

        _say(f"pysal {version()}")
        context.exit()


@click.group(name="pysal", cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """See why an image model answered as it did, in seven ways."""
    if context.invoked_subcommand is None:
        _say(context.get_help())


@main.command(short_help="Explain the answer to photos: pictures, numbers and a table.")
@click.argument("photos", metavar="[PHOTO]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=MethodName(),
    default=["all"],
    metavar="NAME|all",
    help=f"Method to run; may be given several times. [default: all of {', '.join(METHOD_NAMES)}]",
)
@model_options
@click.option("--target", metavar="NAME|INDEX", help="Class to explain, by name or index. [default: the predicted class]")
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
    methods: Sequence[str],
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
    names = list(METHOD_NAMES) if "all" in methods else list(dict.fromkeys(methods))
    options = _method_options(names, given)
    for photo in photos:
        if not os.path.lexists(photo):
            raise BadInput(f"pysal explain: PHOTO must be an image file, got {click.format_filename(photo)} (no such file)")

    written: list[Path] = []
    with _errors_as_sentences("pysal explain", written), _writable(out):
        from pysal import models
        from pysal.engine.prepared.model import prepare
        from pysal.engine.running.chunks import fast_rows, progress
        from pysal.explain import explain as run
        from pysal.segments import parse

        if "segments" in given:
            options["leave_one_out"]["segments"] = parse(given["segments"])
        place = _device(device)
        classifier = model.load(place)
        index = None if target is None else classifier.class_index(target)
        sources = list(photos) or [models.example_photo()]
        for photo in sources:  # a photo that cannot be read is said before hours of work on the others
            image = models.read_image(photo, classifier)
        # a fixed number of rows, not the one that measures fastest now: the same command gives the same bits
        rows = fast_rows(image.device, image[0].numel() * image.element_size())
        runner = prepare(classifier, image, batch_size=rows) if place == "cpu" else classifier
        for number, (photo, stem) in enumerate(zip(sources, _stems(sources), strict=True), start=1):
            image = models.read_image(photo, classifier).to(place)
            with progress(sys.stderr.isatty()):
                found = run(
                    runner,
                    image,
                    methods="all" if "all" in methods else names,
                    target=index,
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
            _say(f"{counter}{click.format_filename(photo)}", "", found.table(), "")
            _say(*(f"wrote {click.format_filename(file)}" for file in files))
            if number < len(sources):
                _say("")


@main.command(short_help="Explain photos in a browser.")
@model_options
@click.option("--also", multiple=True, metavar="SOURCE", help="Another model to offer on the page; may be given several times.")
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    metavar="N",
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="Device to run on: auto, cpu, cuda or cuda:N."
)
def demo(model: ModelChoice, also: Sequence[str], host: str, port: int, device: str) -> None:
    """Show the methods side by side in a browser. Only this machine can open the page, unless --host lets others in.

    Needs the extra `demo`: pip install 'pysal-saliency[demo]'.
    """
    with _errors_as_sentences("pysal demo"):
        from pysal import models
        from pysal.demo.server import serve

        place = _device(device)
        others = {source: functools.partial(models.load, source, device=place) for source in also}
        loaders = {model.source: functools.partial(model.load, place), **others}

        def ready(address: str) -> None:
            _say(f"pysal demo: open {address} (Ctrl-C stops it)")

        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed however it ends
        try:
            serve(loaders, host=host, port=port, device=place, ready=ready)
        finally:
            signal.signal(signal.SIGTERM, before)


@main.command(short_help="List the methods and what they cost.")
def methods() -> None:
    """List the methods: what each map says and what it costs in model passes per image."""
    with _errors_as_sentences("pysal methods"):
        from pysal.methods.registry import METHODS

        rows = [("method", "what the map says", "model passes per image")]
        rows += [(method.name, method.summary, method.cost) for method in METHODS.values()]
        _say(*_columns(rows))


@main.command(short_help="Show versions and which native kernels run.")
def info() -> None:
    """Show versions, libraries, and for each op whether a native kernel runs."""
    with _errors_as_sentences("pysal info"):
        from pysal import ops  # noqa: F401 (registers the ops)
        from pysal._library import HERE, build_info

        build = build_info()
        kernels = build.pop("kernels")
        facts = {
            "version": build.pop("version"),
            "python": platform.python_version(),
            "system": platform.platform(),
            "folder": os.fspath(HERE),
        }
        facts |= build
        _say(*_columns((name.replace("_", " "), _readable(value)) for name, value in facts.items()), "")
        devices = list(dict.fromkeys(device for kinds in kernels.values() for device in kinds))
        table = [("op", *devices), *((name, *(kinds[device] for device in devices)) for name, kinds in kernels.items())]
        _say(*_columns(table))


@main.group(short_help="Explain a whole dataset: a folder of Parquet files.", cls=Commands)
def audit() -> None:
    """Explain every image of a dataset, and write maps and metrics to a folder of Parquet files."""


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say who computes, which `run` and `resume` share."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(["pool", "ray", "inline"]),
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
    command = click.option("--allow-code", is_flag=True, help="Permit to run the code that makes the model, or comes with it.")(
        command
    )
    return click.option("--download", is_flag=True, help="Download weights that are not on this machine.")(command)


@audit.command("run", short_help="Explain every image of DATA, or continue a job that was stopped.")
@click.argument("source", metavar="DATA")
@click.option("--out", required=True, type=Folder(), metavar="DIR", help="Folder for the results.")
@click.option(
    "--methods", "method_list", default="all", metavar="NAMES", show_default=True, help="Methods to run, separated by commas."
)
@click.option(
    "--metrics",
    "metric_list",
    default="",
    metavar="NAMES",
    help="Metrics to compute for each map, separated by commas. [default: none]",
)
@click.option(
    "--target",
    default="predicted",
    metavar="WHAT",
    show_default=True,
    help="Class to explain: predicted, label, or one class by name or index.",
)
@click.option(
    "--labels",
    type=click.Choice(["auto", "folder", "none"]),
    default="auto",
    show_default=True,
    help="Source of the true classes: the table or the tars (auto), the names of folders (folder), or none.",
)
@click.option(
    "--maps",
    type=click.Choice(["none", "uint8", "float16"]),
    default="uint8",
    show_default=True,
    help="Number format of the stored maps; none stores no maps.",
)
@score_option
@method_options
@click.option("--seed", type=int, default=0, metavar="N", show_default=True, help="Seed of the noise.")
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=256,
    metavar="N",
    show_default=True,
    help="Number of images per shard file.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), metavar="N", help="Number of images computed together. [default: 16, on a GPU 64]"
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Device to run on."
)
@model_options
@_engine_options
def audit_run(
    source: str,
    out: Path,
    model: ModelChoice,
    method_list: str,
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
    names = _listed(method_list)
    names = list(METHOD_NAMES) if "all" in names else [name.replace("-", "_") for name in names]
    for name in names:
        if name not in METHOD_NAMES:
            raise click.UsageError(f"--methods must be all or names out of {', '.join(METHOD_NAMES)}, got {name!r}")
    options_of_methods = _method_options(names, given, "--methods")
    with _errors_as_sentences("pysal audit run"):
        from pysal.audit import Job
        from pysal.audit.model import function_of

        arguments = model.arguments()
        if function_of(model.source):  # which brings all but the size
            options["size"] = arguments.pop("size", None)
        job = Job(
            source,
            out=out,
            model=model.source,
            model_options=arguments,
            methods=names,
            metrics=_listed(metric_list),
            method_options=options_of_methods,
            target=int(target) if target.isdecimal() else target,
            **options,
        )
        _run_audit("pysal audit run", job, engine, workers, address)


@audit.command("resume", short_help="Continue a job that was stopped.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@_permissions
@_engine_options
def audit_resume(out: Path, download: bool, allow_code: bool, engine: str, workers: int | None, address: str | None) -> None:
    """Continue the job of DIR, if model, data and versions have not changed.

    DIR may come from somebody else, so permissions given to `run` do not carry over: give --allow-code and --download again.
    """
    with _errors_as_sentences("pysal audit resume"):
        from pysal.audit import resume

        job = resume(out, download=download, allow_code=allow_code)
        _run_audit("pysal audit resume", job, engine, workers, address)


@audit.command("status", short_help="Show the progress of a job.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
def audit_status(out: Path) -> None:
    """Show the progress of the job of DIR, also while it runs."""
    with _errors_as_sentences("pysal audit status"):
        from pysal.audit import status

        _say(*str(status(out)).splitlines())


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
    with _errors_as_sentences("pysal audit verify"):
        from pysal.audit import status, verify

        problems = verify(out, images=images, recompute=recompute, download=download, allow_code=allow_code)
        _say(*problems)
        if problems:
            raise Failure(f"pysal audit verify: {out} has {len(problems)} problem{'s' * (len(problems) > 1)}")
        found = status(out)
        _say(f"{found.images} images in {found.shards} shard{'s' if found.shards != 1 else ''}: all is as it should be")


@audit.command("report", short_help="Write what was found as one HTML file.")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), metavar="FILE", help="File to write. [default: DIR/report.html]")
@click.option("--images", default=6, show_default=True, metavar="N", help="Number of photos on each contact sheet, 1 to 24.")
def audit_report(out: Path, to: Path | None, images: int) -> None:
    """Write a report of the finished shards of DIR: one HTML file that needs no network."""
    with _errors_as_sentences("pysal audit report"):
        from pysal.audit import report

        _say(f"wrote {click.format_filename(report(out, to=to, images=images))}")


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
    _say(*str(found).splitlines()[:-1], f"wrote {click.format_filename(job.out)}")


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _method_options(names: Sequence[str], given: Mapping[str, Any], asked: str = "--method") -> dict[str, dict[str, Any]]:
    """Return the options for each method asked for; refuse one that none of them has."""
    options: dict[str, dict[str, Any]] = {}
    for option, value in given.items():
        takers = [name for name in OPTION_OF[option] if name in names]
        if not takers:
            raise click.UsageError(
                f"--{option.replace('_', '-')} is for {' and '.join(OPTION_OF[option])}, which {asked} leaves out"
            )
        for name in takers:
            options.setdefault(name, {})[option] = value
    return options


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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


@contextlib.contextmanager
def _errors_as_sentences(command: str, written: Sequence[Path] = ()) -> Iterator[None]:
    """Raise what goes wrong as one sentence, with the exit code it deserves; show warnings as sentences, too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {_one_line(str(message))}", error=True)
            yield
    except KeyboardInterrupt as error:
        files = ", ".join(map(click.format_filename, written)) or "nothing"
        raise Interrupted(f"{command}: interrupted, wrote {files}") from error
    except click.ClickException:
        raise
    except Exception as error:
        if click.get_current_context().find_root().params["debug"] or isinstance(error, BrokenPipeError):
            raise
        sentence = _one_line(str(error))
        ours = sentence.startswith("pysal")
        if ours and isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            raise BadInput(sentence) from error
        unexpected = f"{command}: {type(error).__name__}: {sentence} (pysal --debug {command.split()[-1]} shows where)"
        raise Failure(sentence if ours else unexpected) from error


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{key} ({_readable(item)})" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(*lines: str, error: bool = False) -> None:
    """Print the lines, with escapes for what the terminal's encoding lacks."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        for line in lines:
            click.echo(line.encode(encoding, "backslashreplace").decode(encoding), err=error)
    except BrokenPipeError:
        raise  # nobody reads any more, as in `pysal methods | head -1`: click ends quietly
    except OSError as problem:
        # What is still buffered must not be tried again when Python shuts down: that would change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise Failure(f"pysal: the output cannot be written ({problem.strerror})") from problem


if __name__ == "__main__":
    main()
