"""An explanation in pictures: the panel of a method's map, and the plots of what the maps say."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal._checks import check_path, refuse, refuse_unknown
from pysal._spelling import close_to, did_you_mean
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import checked_options, default_of
from pysal.engine.request.plan import Model
from pysal.engine.request.score import OUTPUTS, noun
from pysal.engine.request.target import Target, of_image
from pysal.explanation.file import pictures, write_all
from pysal.explanation.findings import WHERE, Findings, MethodResult, index_of
from pysal.explanation.findings import of_image as detail_of
from pysal.explanation.text import notes
from pysal.methods.traits import PATHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pysal import viz

PlotKind: TypeAlias = Literal["maps", "drops", "interactions", "agreement", "convergence", "deletion_insertion"]
# What the kinds of plots that compute something take: to run the model again, or options alone.
RUN_THE_MODEL, TAKE_OPTIONS = ("convergence", "deletion_insertion"), ("agreement", "convergence", "deletion_insertion")


def plot(
    found: Findings,
    image: int = 0,
    *,
    kind: PlotKind = "maps",
    methods: str | Sequence[str] | None = None,
    model: Model | None = None,
    target: Target = None,
    options: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    **style: Any,
) -> Figure:
    """Return a picture of one image, see `Explanation.plot`."""
    where = f"{WHERE}.plot"
    if isinstance(image, str):
        refuse(
            where,
            "image",
            f"be an index in [0, {len(found.images)}); a kind is given as kind={image!r}",
            repr(image),
            TypeError,
        )
    image = index_of(where, image, len(found.images))
    if kind not in get_args(PlotKind):
        refuse_unknown(where, "kind", f"be one of {', '.join(map(repr, get_args(PlotKind)))}", kind, get_args(PlotKind))
    names = _plotted(found, kind, methods)
    if kind in RUN_THE_MODEL and model is None:
        refuse(where, "model", f"be the model that was explained, for kind={kind!r} runs it again", "None")
    for name, value, taken in (
        ("model", model, RUN_THE_MODEL),
        ("target", target, RUN_THE_MODEL),
        ("options", options, TAKE_OPTIONS),
        ("ax", ax, ("maps",)),
        *((name, value, ("maps",)) for name, value in style.items()),
    ):
        if value is not None and kind not in taken:
            refuse(where, name, f"be left out for kind={kind!r}, which has no use for it", type(value).__name__)
    if options is not None and not isinstance(options, Mapping):
        refuse(where, "options", "be a mapping of option names to values", repr(options), TypeError)
    looks = checked_style(where, style)
    if ax is not None:
        figure = _on_axes(found, image, names, looks, ax)
    else:
        figure = _figure(found, kind, image, names, model, target, options, looks)
    if path is not None:
        file_path = Path(check_path(where, "path", path))
        kinds = pictures()
        ending = file_path.suffix[1:].lower()
        if ending not in kinds:
            endings = [f".{known}" for known in sorted(kinds)]
            meant = did_you_mean(close_to(file_path.suffix, endings))
            refuse(where, "path", f"end in one of {', '.join(endings)}{meant}", str(path))
        write_all(where, {file_path: lambda file: figure.savefig(file, format=ending)})
    return figure


def _plotted(found: Findings, kind: str, methods: str | Sequence[str] | None) -> list[str]:
    """Return the methods that a plot shows, refusing those that have nothing to show."""
    where = f"{WHERE}.plot"
    fitting = list(found.results)
    if kind == "drops":
        fitting = [name for name, result in found.results.items() if shows_drops(result)]
    elif kind == "interactions":
        fitting = [name for name, result in found.results.items() if "interactions" in result.details]
    elif kind == "convergence":
        fitting = [name for name in found.results if name in PATHS]
    if methods is None:
        if not fitting and kind != "maps":
            refuse(where, "methods", f"hold one that kind={kind!r} can show", ", ".join(found.results) or "none")
        return fitting
    names = [methods] if isinstance(methods, str) else list(methods)
    for name in names:
        if name not in fitting:
            refuse_unknown(where, "methods", f"be out of {', '.join(fitting) or 'none'}", name, fitting)
    return names


def _figure(
    found: Findings,
    kind: str,
    image: int,
    names: Sequence[str],
    model: Model | None,
    target: Target,
    options: Mapping[str, Any] | None,
    style: viz.Style,
) -> Figure:
    from pysal import viz  # matplotlib takes a third of a second to import and is needed only here

    likely = None if found.probabilities is None else float(found.probabilities[image])
    about = [found.model_name]
    if found.unit_of(found.score_kind) == "output":
        about.append(f"{noun(found.score_kind, found.output)} = {viz.number(float(found.scores[image]))}")
    elif likely is None or found.unit_of(found.score_kind) != "probability":
        about.append(f"{found.score_word(image)} {viz.number(float(found.scores[image]))}")
    if found.output not in ("", "logits"):
        about.append(f"output taken for {OUTPUTS[found.output]}")
    if len(found.images) > 1:
        about.append(f"image {image} of {len(found.images)}")
    if kind == "maps":
        return viz.draw(
            found.images[image],
            [panel(found, name, image) for name in names],
            title=found.target_names[image],
            subtitle=" · ".join(filter(None, about)),
            probability=likely,
            style=style,
        )
    from pysal import plots  # which a picture of maps does not need

    name = found.target_names[image] if likely is None else f"{found.target_names[image]} {viz.percent(likely)}"
    subtitle = " · ".join(filter(None, [name, *about]))
    if kind == "drops":
        return plots.drops(found.images[image], panel(found, names[0], image), subtitle=subtitle)
    if kind == "interactions":
        return _interactions(found, image, found.results[names[0]], subtitle)
    given = dict(options or {})
    if kind == "agreement":
        return _agreement(found, image, names, subtitle, given)
    assert model is not None  # `plot` has seen to it
    if target is None:
        target = int(found.target[image])
        if target < 0:
            refuse(f"{WHERE}.plot", "target", "be what was explained, which is not kept where it is no class", "None")
    target = of_image(target, image, len(found.images))
    photo = found.images[image : image + 1].to(_device_of(model))
    if kind == "deletion_insertion":
        return _curves(found, image, names, subtitle, model, photo, target, given)
    checked_options(f"{WHERE}.plot", "options", plots.converge, given)
    if "method" in given:
        refuse(f"{WHERE}.plot", "options", "leave the method to methods=", repr(given["method"]))
    kind = found.kind_of(found.results[names[0]])
    word = found.unit_of(given.get("score", kind))
    given.setdefault("score", found.kind_again(kind))
    converged = [plots.converge(model, photo, target, method=method, **given) for method in names]
    return plots.convergence(converged, subtitle=subtitle, unit=word)


def checked_style(where: str, given: Mapping[str, Any]) -> viz.Style:
    """Return how maps are to be drawn, `given` by the names of `viz.Style`; None = its default."""
    from pysal import viz

    return viz.Style(**{name: value for name, value in given.items() if value is not None}).checked(where)


def _on_axes(found: Findings, image: int, names: Sequence[str], style: viz.Style, ax: Axes | Sequence[Axes]) -> Figure:
    """Draw each method's map on axes of the caller's, and return the figure that they are in."""
    from matplotlib.axes import Axes

    from pysal import viz

    where = f"{WHERE}.plot"
    places = [ax] if isinstance(ax, Axes) else list(getattr(ax, "flat", ax)) if isinstance(ax, Iterable) else [ax]
    if not all(isinstance(place, Axes) for place in places):
        refuse(where, "ax", "be matplotlib axes, one for each method", type(ax).__name__, TypeError)
    if len(places) != len(names):
        refuse(where, "ax", f"be one for each method to show ({', '.join(names)}; methods= chooses)", f"{len(places)}")
    for place, name in zip(places, names, strict=True):
        shown = panel(found, name, image)
        drawn = viz.seen(shown, style)
        place.imshow(viz.painted(found.images[image], drawn, style), interpolation="antialiased")
        place.set_axis_off()
        place.set_title(viz.printable(f"{shown.title}\u2009"), parse_math=False)
    figure = places[0].get_figure(root=True)
    assert figure is not None
    return figure


def overlay(found: Findings, name: str, image: int, **style: Any) -> NDArray[np.uint8]:
    """Return a method's map over its photo as RGB, see `Explanation.overlay`."""
    from pysal import viz

    where = f"{WHERE}.overlay"
    shown = panel(found, name, image, where)
    looks = checked_style(where, style)
    picture = viz.painted(found.images[image], viz.seen(shown, looks), looks)
    return cast("NDArray[np.uint8]", np.rint(255 * picture.clip(0.0, 1.0)).astype(np.uint8))


def _interactions(found: Findings, image: int, result: MethodResult, subtitle: str) -> Figure:
    from pysal import plots

    word = found.unit_of(found.kind_of(result))
    pairs, values, labels = (detail_of(result.details.get(key), image) for key in ("pairs", "interactions", "labels"))
    if pairs is None or values is None or labels is None:
        refuse(f"{WHERE}.plot", "methods", "hold one whose pairs of segments are kept", result.name)
    if not len(pairs):
        refuse(f"{WHERE}.plot", "image", "have two segments or more for kind='interactions'", f"image {image}, of one")
    return plots.interactions(
        found.images[image],
        pairs,
        values,
        labels,
        unit=f"interaction of {word}",
        percent=word == "probability",
        subtitle=subtitle,
    )


def _agreement(found: Findings, image: int, names: Sequence[str], subtitle: str, options: dict[str, Any]) -> Figure:
    from pysal import metrics, plots

    checked_options(f"{WHERE}.plot", "options", metrics.agreement, options)
    matrix = metrics.agreement({name: found.results[name].map[image : image + 1] for name in names}, **options)
    unit = f"Spearman's rank correlation of the pixels{', by magnitude' if options.get('absolute') else ''}"
    return plots.agreement(matrix[0], [found.results[name].title for name in names], subtitle=subtitle, unit=unit)


def _curves(
    found: Findings,
    image: int,
    names: Sequence[str],
    subtitle: str,
    model: Model,
    photo: Tensor,
    target: Target,
    options: dict[str, Any],
) -> Figure:
    from pysal import metrics, plots

    checked_options(f"{WHERE}.plot", "options", metrics.deletion, options)
    # what tells methods apart best: the probability of the target, where there is one
    kind = "sigmoid" if found.output == "label_logits" else "auto"
    percent = not callable(target) and found.unit_of(options.get("score", kind)) == "probability"
    options = {"score": found.kind_again(kind), **options}
    maps = {name: found.results[name].map[image : image + 1].to(photo.device) for name in names}
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.rand(1, 1, *photo.shape[2:], generator=generator, dtype=torch.float32, device="cpu")
    maps[plots.RANDOM] = noise.to(photo.device)
    measured: dict[str, dict[str, metrics.Curve]] = {"deletion": {}, "insertion": {}}
    for name, map in maps.items():
        channels = "max_abs" if name in names and found.results[name].reduction == "max_abs" else "sum"
        request = {"reduction": channels, **options}
        measured["deletion"][name] = metrics.deletion(model, photo, map, target, **request)
        measured["insertion"][name] = metrics.insertion(model, photo, map, target, **request)
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
        for (kind, curves), small_print in zip(measured.items(), prints, strict=True)
    ]
    return plots.curves(sides, subtitle=subtitle, percent=percent)


def panel(found: Findings, name: str, image: int = 0, where: str = f"{WHERE}.panel") -> viz.Panel:
    """Return what is drawn of a method's map of one image, see `Explanation.panel`."""
    from pysal import viz

    result = found.result_of(where, name)
    image = index_of(where, image, len(found.images))
    details = result.details
    labels, boxes = details.get("labels"), details.get("boxes")
    return viz.Panel(
        title=result.title,
        map=result.map[image],
        reduction=result.reduction,
        signed=result.signed,
        small_print=" · ".join(notes(found, result, image, viz.number).values()),
        unit=found.unit_of_map(result),
        labels=labels[image] if isinstance(labels, Tensor) else None,
        boxes=boxes if isinstance(boxes, Tensor) else None,
        drops=detail_of(details.get("drops"), image) if shows_drops(result) else None,
        score=found.score_before(result, image),
        percent=found.unit_of(found.kind_of(result)) == "probability",
    )


def shows_drops(result: MethodResult) -> bool:
    """Whether a method's map is the drops of its segments, each from the clean score to that without the segment."""
    return "drops" in result.details and "gains" not in result.details


def _device_of(model: Model) -> torch.device:
    """Return where a model's first parameter lies; the CPU for what has none."""
    module = model.original if isinstance(model, PreparedModel) else model
    tensors = itertools.chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
