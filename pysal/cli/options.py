"""The options that several commands share, and what they mean to the functions behind them."""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pysal._spelling import close_to, did_you_mean
from pysal.cli.terminal import BadInput
from pysal.methods.traits import BY_NAME, CAMS, MODES, PATHS, TRAITS, TREES

if TYPE_CHECKING:
    from pysal.models import Classifier

# What "all" stands for; those of BY_NAME run where they are named.
METHOD_NAMES = tuple(TRAITS)
# The kinds of pysal.engine.request.score, which takes seconds to import; tests/test_cli.py holds the two together.
SCORE_NAMES = ("auto", "probability", "log_probability", "logit", "raw", "softmax", "log_softmax", "sigmoid", "log_sigmoid")
MODEL_SOURCES = "torchvision:NAME, timm:NAME, transformers:NAME, FILE.pt, .pt2, .onnx or FILE.py:FUNCTION"
# Command line option, which is the methods' own too, -> the methods that have it.
OPTION_OF = {
    "segments": ("leave_one_out", "xrai", "shapley", "interactions"),
    "fill": ("leave_one_out", "shapley", "interactions", "rise"),
    "mode": ("leave_one_out",),
    "approximate": ("leave_one_out",),
    "baseline": ("integrated_gradients", "guided_integrated_gradients", "xrai"),
    "max_sigma": ("blur_integrated_gradients",),
    "layer": ("grad_cam", "guided_grad_cam"),
    "steps": (*PATHS, "guided_integrated_gradients", "xrai"),
    "tolerance": PATHS,
    "samples": ("smooth_grad", "rise"),
    "passes": ("shapley", "interactions"),
    "tree": ("shapley",),
    "other_activations": ("guided_backprop", "guided_grad_cam"),
    "kind": ("grad_cam",),
}


class Word(click.Choice[str]):
    """One of a few words; another is refused with those that were probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            meant = did_you_mean(list(map(repr, close_to(value, self.choices))))
            self.fail(str(error.message).rstrip(".") + meant, param, ctx)


class Fill(click.ParamType):  # type: ignore[type-arg]
    """A number, or one of a few words."""

    name = "fill"

    def __init__(self, *also: str) -> None:
        self._word = Word(["black", "white", "mean", "blur", *also], case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Return the number or the word."""
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            if not 0 <= number <= 1:
                self.fail(f"a number must be in [0, 1], as the images are (255 of 8 bits is 1), got {value}", param, ctx)
            return number
        return self._word.convert(value, param, ctx)


class MethodNames(click.ParamType):  # type: ignore[type-arg]  # which click 8.2 does not take
    """Names of methods, separated by commas, with hyphens or underscores, in any case, or "all"."""

    name = "methods"
    _word = Word([*METHOD_NAMES, *BY_NAME, "all"], case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names as Python has them."""
        names = [name.strip().replace("-", "_") for name in str(value).split(",")]
        return tuple(self._word.convert(name, param, ctx) for name in names if name)


def methods_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --methods, which may be written --method; it gets the names as `methods`, which may be "all"."""

    def joined(_context: click.Context, _option: click.Parameter, given: Sequence[tuple[str, ...]]) -> str | list[str]:
        names = [name for some in given for name in some]
        return "all" if "all" in names else list(dict.fromkeys(names))

    return click.option(
        "--method",
        "--methods",
        "methods",
        multiple=True,
        type=MethodNames(),
        default=["all"],
        callback=joined,
        metavar="NAMES|all",
        help="Methods to run, separated by commas; may be given several times. [default: all of "
        f"{', '.join(METHOD_NAMES)}; {', '.join(BY_NAME)} take long and run where they are named]",
    )(command)


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
        return mean, std

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
    return click.option(
        "--model", default="efficientnet-lite0", metavar="SOURCE", show_default=True, help=f"Model to load: {MODEL_SOURCES}."
    )(more_of_the_model(command))


def more_of_the_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say more about a model; with its name they are `model`, a `ModelChoice`."""

    @functools.wraps(command)
    def with_choice(model: str, **given: Any) -> None:
        names = ("weights", "size", "normalize", "classes", "download", "allow_code")
        command(model=ModelChoice(model, **{name: given.pop(name) for name in names}), **given)

    options = (
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
        click.option("--allow-code", is_flag=True, help="Permit running a Python file, or code inside a model file."),
    )
    for option in reversed(options):
        with_choice = option(with_choice)
    return with_choice


def score_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --score."""
    return click.option(
        "--score",
        type=Word(SCORE_NAMES),
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
            help="For leave_one_out, shapley, interactions and xrai: shape of the segments, grid:3x3, window:16/8 or slic:100. "
            "[default: slic:100; xrai has its own]",
        ),
        click.option(
            "--fill",
            type=Fill("drop"),
            metavar="WORD|NUMBER",
            help="For leave_one_out, shapley, interactions and rise: what hides a segment, black, white, mean, blur or a "
            "number; drop leaves the patches of a transformer out, which rise cannot. [default: black]",
        ),
        click.option(
            "--mode",
            type=Word(tuple(MODES)),
            help="For leave_one_out: the drop when a segment goes (out), the gain when it alone stands on the fill (in), or "
            "their mean (both). [default: out]",
        ),
        click.option(
            "--approximate",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="SHARE",
            help="For leave_one_out: at each layer recompute at most this fraction of the map's height and width. Smaller is "
            "faster and less exact; the error is reported. [default: exact]",
        ),
        click.option(
            "--baseline",
            type=Fill(),
            metavar="WORD|NUMBER",
            help="For integrated_gradients, guided_integrated_gradients and xrai: where the path begins, black, white, mean, "
            "blur or a number. [default: black; xrai takes the image's lowest and its highest value]",
        ),
        click.option(
            "--max-sigma",
            type=click.FloatRange(min=0, min_open=True),
            metavar="PIXELS",
            help="For blur_integrated_gradients: width of the blurriest image. [default: 50]",
        ),
        click.option(
            "--layer",
            metavar="NAME",
            help="For grad_cam and guided_grad_cam: layer to look at, as in layer4.2 or relu@1. [default: the last that fits]",
        ),
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of steps of integrated_gradients, blur_integrated_gradients, guided_integrated_gradients and xrai.",
        ),
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            metavar="T",
            help="For integrated_gradients and blur_integrated_gradients, instead of --steps: add steps until the estimated "
            "relative error of the map is below T.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of masks for rise (4000 unless given), and of noisy copies for smooth_grad. [default: 50]",
        ),
        click.option(
            "--passes",
            type=click.IntRange(min=1),
            metavar="N",
            help="For shapley and interactions: most model passes for an image. [default: 1000]",
        ),
        click.option(
            "--tree",
            type=Word(TREES),
            help="For shapley: which segments come and go together. [default: halves]",
        ),
        click.option(
            "--other-activations",
            type=Word(["plain", "generalised"]),
            help="For guided_backprop and guided_grad_cam: what to do at activations other than ReLU. plain keeps their "
            "gradient, generalised applies the guided rule where their output is positive. [default: refuse the model]",
        ),
        click.option(
            "--kind", type=Word(tuple(CAMS)), help="For grad_cam: the kind of class activation map. [default: grad_cam]"
        ),
    )
    for option in reversed(options):
        with_given = option(with_given)
    return with_given


def options_of_methods(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options for each method asked for; refuse one that none of them has."""
    options: dict[str, dict[str, Any]] = {}
    for option, value in given.items():
        takers = [name for name in OPTION_OF[option] if name in names]
        if not takers:
            *others, last = OPTION_OF[option]
            meant = f"{', '.join(others)} and {last}" if others else last
            raise click.UsageError(f"--{option.replace('_', '-')} is for {meant}, which --method leaves out")
        for name in takers:
            options.setdefault(name, {})[option] = value
    return options


def device_of(name: str) -> str:
    """Return the device that --device means: "auto" is the GPU where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
