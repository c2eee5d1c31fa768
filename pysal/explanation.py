"""What `explain` found: maps and numbers, their picture and table, written to files and read back."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal._checks import check_tensor, refuse
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import check_options, default_of
from pysal.engine.request.plan import Model
from pysal.engine.request.score import OUTPUTS, Output, ScoreKind, noun, saturation, settled, unit
from pysal.engine.request.target import Target, of_image
from pysal.methods.traits import PATHS, TRAITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pysal import viz

WHERE = "pysal.Explanation"
PlotKind: TypeAlias = Literal["maps", "drops", "agreement", "convergence", "deletion_insertion"]
# What the kinds of plots that compute something take: to run the model again, or options alone.
RUN_THE_MODEL, TAKE_OPTIONS = ("convergence", "deletion_insertion"), ("agreement", "convergence", "deletion_insertion")
Detail = Tensor | list[Tensor] | str | float | int

# Panels of this many images are put into a notebook; a larger batch is looked at with `plot`.
NOTEBOOK_IMAGES = 4


@dataclass(frozen=True, eq=False, repr=False)
class MethodResult:
    """What one method found, for the whole batch.

    Attributes:
        name: the public function, "integrated_gradients".
        title: what a reader calls it, "Integrated Gradients".
        map: (B, C, H, W) or (B, 1, H, W), floating point, CPU, unnormalised.
        reduction: how the channels become one picture: "max_abs", "sum" or "none" (the map has one channel).
        signed: whether the picture has two directions (for and against the target) or one.
        seconds: wall time of the method on the whole batch.
        passes: model passes per image, None where nobody counted.
        details: what else the method found. Known names: "residual", "error", "approximation_error" and "steps" (B,),
            "standard_error" of the map's shape, "drops" (B, S) or one (S_b,) tensor per image, "labels" (B, H, W) or
            "boxes" (S, 4) that say where the drops are, "layer", "base", "kind", "samples". Others are kept and written.
        score_kind: which score the method explained, see `Explanation.score_kind`; "" = that of the explanation.
    """

    name: str
    title: str
    map: Tensor
    reduction: str
    signed: bool
    seconds: float
    passes: int | None = None
    details: dict[str, Detail] = field(default_factory=dict)
    score_kind: str = ""

    def __repr__(self) -> str:
        return f"MethodResult({self.name!r}, map {tuple(self.map.shape)}, {self.seconds:.3g} s)"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Why a model answered as it did, by several methods, for a batch of images.

    In a notebook it shows itself; elsewhere `plot` draws one image, `table` (and `print`) lists the numbers, `save` writes
    both and `load` reads the numbers back.

    Attributes:
        images: (B, C, H, W) as the model was given them; [0, 1] is shown as it is, other ranges rescaled for drawing.
        target: (B,) int64 class index, -1 where the target is a callable.
        target_names: B names, "Egyptian cat".
        scores: (B,) the score explained.
        score_kind: which score that is: "probability", "log_probability", "logit", "raw", "softmax", "log_softmax", "sigmoid"
            or "log_sigmoid", as `pysal.gradient` takes them, or "callable".
        probabilities: (B,) probability of the target, None where the target is a callable or the output tells none.
        results: method name -> MethodResult, in the order they are shown.
        skipped: method name -> why it does not apply to the model, for those that "all" left out.
        model_name: what the model is called in pictures and tables.
        seconds: wall time of the whole call.
        build: `pysal.build_info()` at the time of the call.
        output: what the model's output was taken for: "logits" or "log_probabilities" of classes, "probabilities" of classes,
            "labels" (probabilities of independent labels), "label_logits", "numbers"; "" where the target is a callable.

    Raises:
        TypeError: `images`, `target`, `scores`, `probabilities` or a map is no tensor.
        ValueError: shapes that do not fit `images`, an unknown reduction, or a name that cannot be a key of the file.
    """

    images: Tensor
    target: Tensor
    target_names: list[str]
    scores: Tensor
    score_kind: str
    probabilities: Tensor | None
    results: dict[str, MethodResult]
    skipped: dict[str, str] = field(default_factory=dict)
    model_name: str = ""
    seconds: float = 0.0
    build: dict[str, object] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        count, _, height, width = check_tensor(WHERE, "images", self.images, ndim=4).shape
        for name, per_image in self._per_image().items():
            if check_tensor(WHERE, name, per_image).shape != (count,):
                refuse(WHERE, name, f"have shape ({count},), one per image", f"shape {tuple(per_image.shape)}")
        if len(self.target_names) != count:
            refuse(WHERE, "target_names", f"have {count} names, one per image", f"{len(self.target_names)}")
        for name, result in self.results.items():
            where = f"results[{name!r}]"
            if not KEY.fullmatch(name) or name in RESERVED or name != result.name:
                refuse(WHERE, where, "be filed under its name, a word that is no other key of the file", repr(result.name))
            map = check_tensor(WHERE, f"{where}.map", result.map, ndim=4)
            if map.shape[0] != count or map.shape[2:] != (height, width):
                fits = f"have shape ({count}, C, {height}, {width})"
                refuse(WHERE, f"{where}.map", fits, f"shape {tuple(map.shape)}")
            if result.reduction not in ("max_abs", "sum", "none") or (result.reduction == "none" and map.shape[1] != 1):
                fits = "be 'max_abs' or 'sum', or 'none' for a map of one channel"
                refuse(WHERE, f"{where}.reduction", fits, repr(result.reduction))
            for key in result.details:
                if not KEY.fullmatch(key):
                    refuse(WHERE, f"{where}.details", "have words as keys", repr(key))

    def _per_image(self) -> dict[str, Tensor]:
        found = {"target": self.target, "scores": self.scores}
        return found if self.probabilities is None else {**found, "probabilities": self.probabilities}

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps by method name, in the order of `results`."""
        return {name: result.map for name, result in self.results.items()}

    def __getitem__(self, name: str) -> MethodResult:
        """Return the result of method `name`."""
        return self.results[name]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        return f"Explanation({self.model_name!r}, {_count(len(self), 'image')}: {', '.join(self.results)})"

    # Pictures ---------------------------------------------------------------------------------------------------------

    def plot(
        self,
        image: int = 0,
        *,
        kind: PlotKind = "maps",
        methods: str | Sequence[str] | None = None,
        model: Model | None = None,
        target: Target = None,
        options: Mapping[str, Any] | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Return a picture of one image: its maps, or a plot of what they say.

        Args:
            image: index in the batch.
            kind: "maps", the photo and each method's map with its colour bar; "drops", a bar for each segment of
                leave-one-out; "agreement", the rank correlation of each two maps; "convergence", the error of path methods
                over the number of steps; "deletion_insertion", the score while important pixels are replaced, or shown.
            methods: names out of `results`, in the order to show them; None = all that the kind is about.
            model: what was explained; "convergence" and "deletion_insertion" run it again.
            target: what was explained, where it was no class; the same two ask for it. That of all images or of each.
            options: those of `pysal.metrics.agreement`, of `pysal.plots.converge` or of `pysal.metrics.deletion` and
                `insertion`: {"absolute": True}, {"steps": (10, 20, 50), "reference": 200}, {"substrate": "blur"}.
            path: also write the figure there; the ending says how (.png, .pdf, .svg ...).

        Returns:
            A matplotlib figure that pyplot does not know of; `figure.savefig` and, in a notebook, `display` work.

        Raises:
            TypeError: `options` is no mapping, or holds a value of the wrong type.
            ValueError: `image`, a method, the kind or an option is not there, a model is missing or not needed, or matplotlib
                does not know the ending.
            OSError: the file cannot be written; nothing of it is left then.
        """
        where = f"{WHERE}.plot"
        if not 0 <= image < len(self):
            refuse(where, "image", f"be an index in [0, {len(self)})", image)
        if kind not in get_args(PlotKind):
            refuse(where, "kind", f"be one of {', '.join(map(repr, get_args(PlotKind)))}", repr(kind))
        names = self._plotted(kind, methods)
        if kind in RUN_THE_MODEL and model is None:
            refuse(where, "model", f"be the model that was explained, for kind={kind!r} runs it again", "None")
        for name, value, taken in (
            ("model", model, RUN_THE_MODEL),
            ("target", target, RUN_THE_MODEL),
            ("options", options, TAKE_OPTIONS),
        ):
            if value is not None and kind not in taken:
                refuse(where, name, f"be left out for kind={kind!r}, which has no use for it", type(value).__name__)
        if options is not None and not isinstance(options, Mapping):
            refuse(where, "options", "be a mapping of option names to values", repr(options), TypeError)
        figure = self._figure(kind, image, names, model, target, options)
        if path is not None:
            file_path = Path(path)
            kinds = figure.canvas.get_supported_filetypes()
            ending = file_path.suffix[1:].lower()
            if ending not in kinds:
                refuse(where, "path", f"end in one of {', '.join(f'.{known}' for known in sorted(kinds))}", str(path))
            _write_all(where, {file_path: lambda file: figure.savefig(file, format=ending)})
        return figure

    def _plotted(self, kind: str, methods: str | Sequence[str] | None) -> list[str]:
        """Return the methods that a plot shows, refusing those that have nothing to show."""
        where = f"{WHERE}.plot"
        fitting = list(self.results)
        if kind == "drops":
            fitting = [name for name, result in self.results.items() if "drops" in result.details]
        elif kind == "convergence":
            fitting = [name for name in self.results if name in PATHS]
        if methods is None:
            if not fitting and kind != "maps":
                refuse(where, "methods", f"hold one that kind={kind!r} can show", ", ".join(self.results) or "none")
            return fitting
        names = [methods] if isinstance(methods, str) else list(methods)
        for name in names:
            if name not in fitting:
                refuse(where, "methods", f"be out of {', '.join(fitting) or 'none'}", repr(name))
        return names

    def _figure(
        self,
        kind: str,
        image: int,
        names: Sequence[str],
        model: Model | None,
        target: Target,
        options: Mapping[str, Any] | None,
    ) -> Figure:
        from pysal import plots, viz  # matplotlib takes a third of a second to import and is needed only here

        likely = None if self.probabilities is None else float(self.probabilities[image])
        about = [self.model_name]
        if self._unit_of(self.score_kind) == "output":
            about.append(f"{noun(self.score_kind, self.output)} = {viz.number(float(self.scores[image]))}")
        elif likely is None or self._unit_of(self.score_kind) != "probability":
            about.append(f"{self._word(image)} {viz.number(float(self.scores[image]))}")
        if self.output not in ("", "logits"):
            about.append(f"output taken for {OUTPUTS[self.output]}")
        if len(self) > 1:
            about.append(f"image {image} of {len(self)}")
        if kind == "maps":
            return viz.draw(
                self.images[image],
                [self.panel(name, image) for name in names],
                title=self.target_names[image],
                subtitle=" · ".join(filter(None, about)),
                probability=likely,
            )
        name = self.target_names[image] if likely is None else f"{self.target_names[image]} {viz.percent(likely)}"
        subtitle = " · ".join(filter(None, [name, *about]))
        if kind == "drops":
            return plots.drops(self.images[image], self.panel(names[0], image), subtitle=subtitle)
        given = dict(options or {})
        if kind == "agreement":
            return self._agreement(image, names, subtitle, given)
        assert model is not None  # `plot` has seen to it
        if target is None:
            target = int(self.target[image])
            if target < 0:
                refuse(f"{WHERE}.plot", "target", "be what was explained, which is not kept where it is no class", "None")
        target = of_image(target, image, len(self))
        photo = self.images[image : image + 1].to(_device_of(model))
        if kind == "deletion_insertion":
            return self._curves(image, names, subtitle, model, photo, target, given)
        check_options(f"{WHERE}.plot", "options", plots.converge, given)
        kind = self._kind(self.results[names[0]])
        word = self._unit_of(given.get("score", kind))
        given.setdefault("score", self._again(kind))
        found = [plots.converge(model, photo, method, target, **given) for method in names]
        return plots.convergence(found, subtitle=subtitle, unit=word)

    def _agreement(self, image: int, names: Sequence[str], subtitle: str, options: dict[str, Any]) -> Figure:
        from pysal import metrics, plots

        check_options(f"{WHERE}.plot", "options", metrics.agreement, options)
        found = metrics.agreement({name: self.results[name].map[image : image + 1] for name in names}, **options)
        unit = f"Spearman's rank correlation of the pixels{', by magnitude' if options.get('absolute') else ''}"
        return plots.agreement(found[0], [self.results[name].title for name in names], subtitle=subtitle, unit=unit)

    def _curves(
        self,
        image: int,
        names: Sequence[str],
        subtitle: str,
        model: Model,
        photo: Tensor,
        target: Target,
        options: dict[str, Any],
    ) -> Figure:
        from pysal import metrics, plots

        check_options(f"{WHERE}.plot", "options", metrics.deletion, options)
        # what tells methods apart best: the probability of the target, where there is one
        kind = "sigmoid" if self.output == "label_logits" else "auto"
        percent = not callable(target) and self._unit_of(options.get("score", kind)) == "probability"
        options = {"score": self._again(kind), **options}
        maps = {name: self.results[name].map[image : image + 1].to(photo.device) for name in names}
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.rand(1, 1, *photo.shape[2:], generator=generator, dtype=torch.float32, device="cpu")
        maps[plots.RANDOM] = noise.to(photo.device)
        found: dict[str, dict[str, metrics.Curve]] = {"deletion": {}, "insertion": {}}
        for name, map in maps.items():
            channels = "max_abs" if name in names and self.results[name].reduction == "max_abs" else "sum"
            request = {"reduction": channels, **options}
            found["deletion"][name] = metrics.deletion(model, photo, map, target, **request)
            found["insertion"][name] = metrics.insertion(model, photo, map, target, **request)
        usual = {"zero": "zero", "blur": "the blurred image"}
        behind, under = (
            usual.get(str(each), f"{each}" if isinstance(each, (int, float)) else "the substrate")
            for each in (
                options.get("substrate", default_of(curve, "substrate")) for curve in (metrics.deletion, metrics.insertion)
            )
        )
        prints = (
            f"most important first replaced by {behind}: lower is better",
            f"most important first shown on {under}: higher is better",
        )
        sides = [
            plots.Side(
                kind.capitalize(),
                small_print,
                next(iter(curves.values())).shares,
                {name: curve.scores[0] for name, curve in curves.items()},
                {name: float(curve.auc[0]) for name, curve in curves.items()},
                kind == "deletion",
            )
            for (kind, curves), small_print in zip(found.items(), prints, strict=True)
        ]
        return plots.curves(sides, subtitle=subtitle, percent=percent)

    def panel(self, name: str, image: int = 0) -> viz.Panel:
        """Return what is drawn of a method's map of one image, and said about it.

        With it, `viz.draw` shows maps of several explanations in one picture.

        Raises:
            ValueError: no such method or image.
        """
        from pysal import viz

        if name not in self.results:
            refuse(f"{WHERE}.panel", "name", f"be out of {', '.join(self.results)}", repr(name))
        if not 0 <= image < len(self):
            refuse(f"{WHERE}.panel", "image", f"be an index in [0, {len(self)})", image)
        result = self.results[name]
        details = result.details
        labels, boxes = details.get("labels"), details.get("boxes")
        return viz.Panel(
            title=result.title,
            map=result.map[image],
            reduction=result.reduction,
            signed=result.signed,
            small_print=" · ".join(self._notes(result, image, viz.number)),
            unit=self._unit(result),
            labels=labels[image] if isinstance(labels, Tensor) else None,
            boxes=boxes if isinstance(boxes, Tensor) else None,
            drops=_of_image(details.get("drops"), image),
            score=self._before(result, image),
            percent=self._unit_of(self._kind(result)) == "probability",
        )

    def _kind(self, result: MethodResult) -> str:
        return result.score_kind or self.score_kind

    def _unit(self, result: MethodResult) -> str:
        traits = TRAITS.get(result.name)
        if traits is not None and traits.noisy:
            if result.details.get("kind", "mean") != "mean":
                return ""
            traits = TRAITS.get(str(result.details.get("base", "gradient")))
        return "" if traits is None else traits.unit.format(score=self._unit_of(self._kind(result)))

    def _unit_of(self, kind: str) -> str:
        """Return the unit of a kind of score in a word; explanations that do not say what the output is were of logits."""
        return unit(kind, self.output or "logits")

    def _word(self, image: int) -> str:
        """Return what the score is called; a margin of two columns is a difference of theirs."""
        margin = self.output and int(self.target[image]) < 0
        return f"difference of {self._unit_of(self.score_kind)}" if margin else self._unit_of(self.score_kind)

    def _again(self, kind: str) -> ScoreKind:
        """Return the kind of score that says the same of one image, whose output alone could be taken for something else."""
        if kind == "callable" or not self.output:
            return "auto" if kind == "auto" else "logit"
        return settled(cast(ScoreKind, kind), cast(Output, self.output))

    def _before(self, result: MethodResult, image: int) -> float | None:
        """Return the clean score that the drops are falls from, None where it is not known."""
        if self._kind(result) == self.score_kind:
            return float(self.scores[image])
        if self._unit_of(self._kind(result)) == "probability" and self.probabilities is not None:
            return float(self.probabilities[image])
        return None

    def _notes(self, result: MethodResult, image: int, number: Callable[[float], str]) -> list[str]:
        """Return what a method has to say about one image, the important first."""
        details = result.details
        notes = []
        if (residual := _value(details.get("residual"), image)) is not None:
            notes.append(f"residual {number(residual)}")
        if (error := _value(details.get("error"), image)) is not None:
            notes.append(f"map error {number(error)}")
        if (error := _value(details.get("approximation_error"), image)) is not None:
            notes.append(f"approximation error {number(error)}")
        if "layer" in details:
            notes.append(f"layer {details['layer']}")
        if details.get("base", "gradient") != "gradient" or details.get("kind", "mean") != "mean":
            notes.append(f"{details.get('kind', 'mean')} of {_words(str(details.get('base', 'gradient')))}")
        if (samples := _value(details.get("samples"), image)) is not None:
            notes.append(_count(round(samples), "sample"))
        if (drops := _of_image(details.get("drops"), image)) is not None:
            notes.append(_count(len(drops), "segment"))
        if (steps := _value(details.get("steps"), image)) is not None:
            notes.append(_count(round(steps), "step"))
        before = None if self.probabilities is None else self._before(result, image)
        if before is not None and (saturated := saturation(self._kind(result), self.output, before)):
            notes.append(saturated)
        return notes

    def _largest_drop(self, result: MethodResult, image: int) -> str:
        from pysal import viz

        drops, before = _of_image(result.details.get("drops"), image), self._before(result, image)
        if drops is None or before is None:
            return ""
        finite = drops[torch.isfinite(drops)]
        if not len(finite):
            return ""
        return viz.fall(before, float(finite.max()), self._unit_of(self._kind(result)) == "probability") or "none"

    # Tables -----------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """Return the numbers as plain text: for each image its class and score, and a line per method.

        Seconds are of the whole batch, model passes of one image. The residual is by how much the map misses the change of
        the score that it should add up to, in the score's own unit. The largest drop is what hiding the most important
        segment does to the score.
        """
        lines = [self._headline()]
        for image in range(len(self)):
            rows = [COLUMNS, *self._rows(image)]
            widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
            lines += ["", f"image {image}: {self._verdict(image)}"]
            for row in rows:
                cells = [
                    cell.rjust(width) if title in RIGHT else cell.ljust(width)
                    for cell, width, title in zip(row, widths, COLUMNS, strict=True)
                ]
                lines.append("  " + "  ".join(cells).rstrip())
        lines += [
            f"{'' if index else chr(10)}left out: {name}: {why}" for index, (name, why) in enumerate(self.skipped.items())
        ]
        return "\n".join(lines)

    __str__ = table

    def _headline(self) -> str:
        counts = f"{_count(len(self), 'image')}, {_count(len(self.results), 'method')}, {self.seconds:.3g} s"
        if self.output:
            counts += f", output taken for {OUTPUTS[self.output]}"
        return f"{_line(self.model_name)}: {counts}" if self.model_name else counts

    def _verdict(self, image: int) -> str:
        from pysal import viz

        index = int(self.target[image])
        name = _line(self.target_names[image])
        column = f"{noun(self.score_kind, self.output)} {index}"
        verdict = name if index < 0 or name == column else f"{name} ({column})"
        word = self._unit_of(self.score_kind)
        if word == "output":
            return f"{verdict} = {float(self.scores[image]):.4g}"
        if self.probabilities is not None:
            verdict += f", {viz.percent(float(self.probabilities[image]))}"
        if self.probabilities is None or word != "probability":
            verdict += f", {self._word(image)} {float(self.scores[image]):.4g}"
        return verdict

    def _rows(self, image: int) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for result in self.results.values():
            residual = _value(result.details.get("residual"), image)
            notes = [note for note in self._notes(result, image, lambda x: f"{x:.3g}") if not note.startswith("residual")]
            spread = result.details.get("standard_error")
            if isinstance(spread, Tensor):
                notes.append(f"mean standard error {float(spread[image].cpu().double().mean()):.3g}")
            if broken := int((~torch.isfinite(result.map[image])).sum()):
                notes.append(f"{_count(broken, 'value')} not finite")
            rows.append(
                (
                    _line(result.title),
                    f"{result.seconds:.2f}",
                    "" if result.passes is None else str(result.passes),
                    "" if residual is None else f"{residual:.3g}",
                    self._largest_drop(result, image).replace("→", "->").replace("\N{MINUS SIGN}", "-"),
                    _line("; ".join(notes)),
                )
            )
        return rows

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self._headline())}</p>"]
        for image in range(len(self)):
            verdict = f"image {image}: {self._verdict(image)}"
            parts.append(f"<h4>{html.escape(verdict)}</h4>")
            if image < NOTEBOOK_IMAGES:
                alt = html.escape(f"Maps of {verdict}, by {', '.join(result.title for result in self.results.values())}")
                parts.append(f'<img style="max-width: 100%" alt="{alt}" src="data:image/png;base64,{self._png(image)}"/>')
            head = "".join(f"<th>{title}</th>" for title in COLUMNS)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows(image)
            )
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        parts += [f"<p>left out: {html.escape(f'{name}: {why}')}</p>" for name, why in self.skipped.items()]
        return "<div>" + "".join(parts) + "</div>"

    def _png(self, image: int) -> str:
        buffer = io.BytesIO()
        self._write_png(image, buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str], stem: str = "explanation", *, pictures: bool = True) -> tuple[Path, ...]:
        """Write `<stem>.npz` and a picture of each image: `<stem>.png`, or `<stem>-0.png` ... for several.

        All files are written under temporary names first and renamed when all are whole, so that a full disk leaves what
        was there before.

        The npz opens with `numpy.load(path, allow_pickle=False)`. Its keys: `images`, `target`, `scores`, `probabilities`
        (where the target is a class), `<method>` (the map, B x C x H x W), `<method>.<detail>` ("grad_cam.native",
        "leave_one_out.labels"), `<method>.<detail>.<image>` where each image has its own length ("leave_one_out.drops.0"),
        and `metadata`, a JSON string with everything else. bfloat16 is stored as float32.

        Args:
            directory: made if it is not there.
            stem: of the file names.
            pictures: whether to draw.

        Returns:
            The files written, the npz first.

        Raises:
            ValueError: `stem` is no plain file name.
            OSError: a file cannot be written; the sentence names it.
        """
        where = f"{WHERE}.save"
        if not stem or stem in (".", "..") or "/" in stem or os.sep in stem or "\0" in stem:
            refuse(where, "stem", "be a file name without directories", repr(stem))
        folder = Path(directory)
        writers: dict[Path, Callable[[BinaryIO], Any]] = {folder / f"{stem}.npz": self._write_npz}
        for image in range(len(self) if pictures else 0):
            name = f"{stem}.png" if len(self) == 1 else f"{stem}-{image}.png"
            writers[folder / name] = partial(self._write_png, image)
        _write_all(where, writers)
        return tuple(writers)

    def _write_png(self, image: int, file: BinaryIO) -> None:
        self.plot(image).savefig(file, format="png")

    def _write_npz(self, file: BinaryIO) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        dtypes: dict[str, str] = {}

        def put(key: str, tensor: Tensor) -> None:
            tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
            if tensor.dtype == torch.bfloat16:
                dtypes[key] = "bfloat16"
                tensor = tensor.float()
            arrays[key] = tensor.numpy()

        put("images", self.images)
        for key, tensor in self._per_image().items():
            put(key, tensor)
        results = []
        for name, result in self.results.items():
            put(name, result.map)
            lists, plain = {}, {}
            for key, detail in result.details.items():
                if isinstance(detail, Tensor):
                    put(f"{name}.{key}", detail)
                elif isinstance(detail, list):
                    lists[key] = len(detail)
                    for index, tensor in enumerate(detail):
                        put(f"{name}.{key}.{index}", tensor)
                else:
                    plain[key] = detail
            fields = ("name", "title", "reduction", "signed", "seconds", "passes", "score_kind")
            about = {key: getattr(result, key) for key in fields}
            results.append({**about, "order": list(result.details), "lists": lists, "details": plain})
        names = ("target_names", "score_kind", "skipped", "model_name", "seconds", "build", "output")
        metadata = {"format": FORMAT, **{key: getattr(self, key) for key in names}, "results": results}
        metadata |= {"keys": list(arrays), "dtypes": dtypes}
        arrays["metadata"] = np.array(json.dumps(_plain(metadata), ensure_ascii=False, allow_nan=False))
        np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Return the explanation that `save` wrote to an npz file.

        Args:
            path: the npz file. Nothing in it is ever executed.

        Raises:
            OSError: the file cannot be opened; FileNotFoundError where there is none.
            ValueError: it is no such file, or it is damaged.
        """
        where = f"{WHERE}.load"
        try:
            file = open(path, "rb")
        except OSError as error:
            refuse(where, "path", "be a file that can be read", f"{path} ({error.strerror or error})", type(error))
        with file:
            try:
                return cls._read(file)
            except Exception as error:  # numpy, zipfile, tokenize and json raise a dozen types on damaged files
                refuse(where, "path", "be an npz file written by Explanation.save, whole", f"{path} ({_line(str(error))})")

    @classmethod
    def _read(cls, file: BinaryIO) -> Explanation:
        with zipfile.ZipFile(file) as archive:
            if spoilt := archive.testzip():
                raise ValueError(f"{spoilt} is damaged")
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        metadata = json.loads(str(arrays["metadata"][()]), object_hook=_restored)
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        if missing := sorted(set(metadata["keys"]) - set(arrays)):
            raise ValueError(f"without {', '.join(missing)}")

        def get(key: str) -> Tensor:
            tensor = torch.from_numpy(arrays[key])
            return tensor.to(getattr(torch, metadata["dtypes"].get(key, ""), tensor.dtype))

        results = {}
        for about in metadata["results"]:
            name, lists, plain = about["name"], about.pop("lists"), about.pop("details")
            details: dict[str, Detail] = {}
            for key in about.pop("order"):
                if key in lists:
                    details[key] = [get(f"{name}.{key}.{index}") for index in range(lists[key])]
                else:
                    details[key] = plain[key] if key in plain else get(f"{name}.{key}")
            results[name] = MethodResult(map=get(name), details=details, **about)
        names = ("target_names", "score_kind", "skipped", "model_name", "seconds", "build")
        return cls(
            images=get("images"),
            target=get("target"),
            scores=get("scores"),
            probabilities=get("probabilities") if "probabilities" in arrays else None,
            results=results,
            output=metadata.get("output", ""),
            **{key: metadata[key] for key in names},
        )


COLUMNS = ("method", "seconds", "passes", "residual", "largest drop", "notes")
RIGHT = ("seconds", "passes", "residual", "largest drop")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = ("images", "target", "scores", "probabilities", "metadata", "file", "allow_pickle")
FORMAT = "pysal.explanation.1"


def _device_of(model: Model) -> torch.device:
    """Return where a model's first parameter lies; the CPU for what has none."""
    module = model.original if isinstance(model, PreparedModel) else model
    tensors = itertools.chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _line(text: str) -> str:
    return " ".join(text.split())


def _of_image(detail: Detail | None, image: int) -> Tensor | None:
    return detail[image] if isinstance(detail, (Tensor, list)) and image < len(detail) else None


def _value(detail: Detail | None, image: int) -> float | None:
    if isinstance(detail, Tensor):
        return float(detail[image] if detail.ndim else detail)
    return float(detail) if isinstance(detail, (int, float)) else None


def _plain(value: object) -> object:
    """Return what JSON can say: numbers that are not finite as {"__float__": "nan"}, unknown objects as their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _restored(mapping: dict[str, Any]) -> Any:
    return float(mapping["__float__"]) if set(mapping) == {"__float__"} else mapping


def _write_all(where: str, writers: Mapping[Path, Callable[[BinaryIO], Any]]) -> None:
    """Write all files or none: under temporary names beside their own first, renamed when all are whole."""
    written: dict[Path, Path] = {}
    path = Path()
    try:
        for path, writer in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            written[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            with open(written[path], "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for path in writers:
            os.replace(written[path], path)
    except OSError as error:
        refuse(where, str(path), "be writable", error.strerror or str(error), type(error))
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
