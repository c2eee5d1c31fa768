"""What was found, in HTML: pictures whose opacity, sign and read-out the browser changes by itself (page.js, page.css).

Every picture is the dimmed photo with two layers of light on it, the map with its sign and the map's strength; page.css shows
one of them, as strongly as the reader wants. Whatever comes from outside is escaped here.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pysal import viz
from pysal.demo.session import Answer, Found, agreement
from pysal.explanation import Explanation
from pysal.explanation.text import notes
from pysal.methods.registry import METHODS

# Falls written on the picture, and in the list beside it.
WRITTEN, LISTED = 3, 8
# The two views of a map, in the order of everything that comes in pairs.
KINDS = ("signed", "unsigned")
# What the page calls what Python calls so.
ARGUMENTS = {"name_or_index": "what you typed", "source": "your file"}


def escape(text: object) -> str:
    """Return text that can stand anywhere in HTML, also in quotes."""
    return html.escape(str(text), quote=True)


# Pictures ------------------------------------------------------------------------------------------------------------


def _uri(pixels: NDArray[np.uint8], kind: str = "png") -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if kind == "jpeg":
        picture.save(buffer, "jpeg", quality=92)
    else:
        picture.save(buffer, "png", compress_level=3)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _bytes(values: NDArray[np.float64] | viz.Array) -> NDArray[np.uint8]:
    return cast(NDArray[np.uint8], np.rint(np.asarray(values).clip(0.0, 1.0) * 255).astype(np.uint8))


def _numbers(values: NDArray[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def picture_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI."""
    return _uri(np.asarray(picture), "jpeg")


def photo_uri(image: Tensor) -> str:
    """Return a photo (C, H, W) as a data URI."""
    return _uri(_bytes(viz.photo(image)), "jpeg")


def backdrop_uri(image: Tensor) -> str:
    """Return the dimmed photo that lies under a map as a data URI."""
    return _uri(_bytes(viz.backdrop(image)), "jpeg")


@dataclass(frozen=True, eq=False)
class Views:
    """A map in its two views.

    Attributes:
        signed: (H, W) with a direction: the channels' sum.
        unsigned: (H, W), 0 or more: the strength, whatever the direction.
        own: "signed" or "unsigned", what the method's own picture is.
        units: what a value of the signed and of the unsigned view means.
    """

    signed: Tensor
    unsigned: Tensor
    own: str
    units: tuple[str, str]

    @classmethod
    def of(cls, panel: viz.Panel) -> Views:
        """Return the views of a method's map."""
        channels = panel.map.shape[0]
        signed = viz.reduce_channels(panel.map, "none" if channels == 1 else "sum")
        strong = viz.reduce_channels(panel.map, panel.reduction).abs()
        own = "signed" if panel.signed else "unsigned"
        return cls(signed, strong, own, (panel.unit.strip("|"), f"|{panel.unit}|" if panel.signed else panel.unit))

    def limits(self) -> tuple[float, float]:
        """Return the largest values that the colours of the signed and of the unsigned view tell apart."""
        return viz.limits(self.signed)[1], viz.limits(self.unsigned, signed=False)[1]


def _layers(views: Views, bounds: tuple[float, float], alt: str) -> str:
    """Return the two layers of light, with the values that the browser reads out."""
    parts = []
    for kind, map, bound in (("signed", views.signed, bounds[0]), ("unsigned", views.unsigned, bounds[1])):
        signed = kind == "signed"
        light = viz.layer(map, signed=signed, bounds=(-bound if signed else 0.0, bound))
        share = np.nan_to_num(map.detach().cpu().double().numpy() / (bound or 1.0)).clip(-1.0, 1.0)
        parts.append(
            f'<img class="layer {kind}" alt="{escape(alt)}" src="{_uri(_bytes(light))}" '
            f'data-values="{_numbers(np.rint(share * 127).astype(np.int8))}" data-bound="{bound:.9g}">'
        )
    return "".join(parts)


def _scale(views: Views, bounds: tuple[float, float]) -> str:
    """Return the colour bars of both views."""
    rows = []
    for kind, low, high in zip(KINDS, (-bounds[0], 0.0), bounds, strict=True):
        if high == 0:
            rows.append(f'<div class="scale {kind} empty"><span>zero everywhere</span></div>')
            continue
        middle = "<span>0</span>" if low else ""
        rows.append(
            f'<div class="scale {kind}"><div class="ramp"><i></i></div>'
            f"<span>{viz.number(low)}</span>{middle}<span>{viz.number(high)}</span></div>"
        )
    units = "".join(f'<span class="{kind}">{escape(unit)}</span>' for kind, unit in zip(KINDS, views.units, strict=True))
    return f'{"".join(rows)}<p class="unit">{units}<output></output></p>'


def ramps() -> str:
    """Return the style sheet rules of the colour bars, which have the colours of the pictures."""
    rules = []
    for kind, low in (("signed", -1.0), ("unsigned", 0.0)):
        ramp = viz.layer(
            torch.linspace(low, 1.0, 256, dtype=torch.float32, device="cpu")[None],
            signed=kind == "signed",
            bounds=(low, 1.0),
        )
        rules.append(f".pysal .{kind} .ramp::before {{ background-image: url({_uri(_bytes(ramp))}); }}")
    return "\n".join(rules)


def _tile(
    title: str,
    small: str,
    views: Views,
    *,
    bounds: tuple[float, float] | None = None,
    over: str = "",
    below: str = "",
    data: str = "",
) -> str:
    bounds = bounds or views.limits()
    return (
        f'<figure class="tile {views.own}-own">'
        f"<figcaption><b>{escape(title)}</b><small>{escape(small)}</small></figcaption>"
        f'<div class="picture" {data}>{_layers(views, bounds, title)}{over}<i class="cross"></i></div>'
        f"{_scale(views, bounds)}{below}</figure>"
    )


def _waiting_tile(title: str) -> str:
    return (
        f'<figure class="tile waiting"><figcaption><b>{escape(title)}</b><small>computing …</small></figcaption>'
        '<div class="picture"></div></figure>'
    )


def _refused_tile(title: str, sentence: str) -> str:
    reason = plain(sentence)  # the title says which method
    return (
        f'<figure class="tile refused"><figcaption><b>{escape(title)}</b><small>does not apply</small></figcaption>'
        f'<div class="picture"><p>{escape(reason)}</p></div></figure>'
    )


def refused(image: Tensor, reasons: dict[str, str]) -> str:
    """Return why a photo (C, H, W) cannot be explained, title -> reason."""
    return _container(image, "".join(_refused_tile(title, why) for title, why in reasons.items()))


# Segments ------------------------------------------------------------------------------------------------------------


def label_map(panel: viz.Panel) -> NDArray[np.int64] | None:
    """Return which segment each pixel (H, W) belongs to, -1 for none; None where segments overlap."""
    if panel.labels is not None:
        return panel.labels.cpu().numpy().astype(np.int64)
    if panel.boxes is None:
        return None
    labels = np.full(tuple(panel.map.shape[-2:]), -1, np.int64)
    for segment, (top, left, bottom, right) in enumerate(panel.boxes.tolist()):
        if (labels[top:bottom, left:right] >= 0).any():
            return None
        labels[top:bottom, left:right] = segment
    return labels


def border_path(labels: NDArray[np.int64] | NDArray[np.bool_]) -> str:
    """Return an SVG path along the pixel edges between different labels, and around the picture none.

    Edges in a row are one stroke. Coordinates are pixels, (0, 0) the top left corner.
    """
    strokes = []
    for across, template in ((False, "M{start} {line}h{length}"), (True, "M{line} {start}v{length}")):
        table = labels.T if across else labels
        edges = table[1:] != table[:-1]
        padded = np.pad(edges, ((0, 0), (1, 1)))
        steps = np.diff(padded.astype(np.int8), axis=1)
        lines, starts = np.nonzero(steps == 1)
        ends = np.nonzero(steps == -1)[1]
        for line, start, end in zip(lines.tolist(), starts.tolist(), ends.tolist(), strict=True):
            strokes.append(template.format(line=line + 1, start=start, length=end - start))
    return "".join(strokes)


def falls(panel: viz.Panel, count: int) -> list[tuple[int, str, float]]:
    """Return the segments that are missed most: (segment, "95 % → 67 %", score without it), the largest fall first."""
    if panel.drops is None or panel.score is None:
        return []
    drops = panel.drops.cpu().double().numpy()
    order = np.argsort(np.where(np.isfinite(drops), -drops, np.inf), kind="stable").tolist()
    found = []
    for segment in order[:count]:
        text = viz.fall(panel.score, float(drops[segment]), panel.percent)
        if text is None:
            break
        found.append((segment, text, panel.score - float(drops[segment])))
    return found


def _mask(panel: viz.Panel, segment: int) -> NDArray[np.bool_]:
    if panel.labels is not None:
        return np.asarray(panel.labels.cpu().numpy() == segment)
    mask = np.zeros(tuple(panel.map.shape[-2:]), np.bool_)
    if panel.boxes is not None:
        top, left, bottom, right = panel.boxes[segment].tolist()
        mask[top:bottom, left:right] = True
    return mask


def _segments(panel: viz.Panel) -> str:
    """Return the segments drawn over the picture, the largest falls written on it as the article does."""
    height, width = panel.map.shape[-2:]
    labels = label_map(panel)
    drawn = "" if labels is None else f'<path class="borders" d="{border_path(labels)}"/>'
    written: list[str] = []
    taken: list[tuple[float, float]] = []
    for segment, text, _ in falls(panel, WRITTEN):
        mask = _mask(panel, segment)
        drawn += f'<path class="missed" d="{border_path(np.pad(mask, 1))}" transform="translate(-1 -1)"/>'
        y, x = (float(place.mean()) for place in np.nonzero(mask))
        left, top = x / width, min(max(y / height, 0.06), 0.94)
        while any(abs(left - other[0]) < 0.5 and abs(top - other[1]) < 0.1 for other in taken) and top > 0.1:
            top -= 0.02  # labels must not lie on each other
        taken.append((left, top))
        style = f"--left:{100 * left:.1f}%;top:{100 * top:.1f}%"
        written.append(f'<span class="fall" style="{style}">{escape(text)}</span>')
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
        f'{"".join(written)}<canvas width="{width}" height="{height}"></canvas><span class="told" hidden></span>'
    )


def _segment_data(panel: viz.Panel) -> str:
    """Return what the browser needs to say what a segment under the pointer is worth."""
    labels = label_map(panel)
    if labels is None or panel.drops is None or panel.score is None:
        return ""
    says = []
    for drop in panel.drops.cpu().double().tolist():
        text = viz.fall(panel.score, drop, panel.percent)
        if text is None and drop < 0:  # the model is surer without it: the same words the other way round
            text = viz.fall(panel.score - drop, -drop, panel.percent)
            text = None if text is None else " → ".join(reversed(text.split(" → ")))
        says.append(text or "no change")
    return f'data-labels="{_numbers(labels.astype(np.int16))}" data-falls="{escape("|".join(says))}"'


def _ranking(panel: viz.Panel) -> str:
    """Return the list of the largest falls, each with a bar from the score after to the score before."""
    listed = falls(panel, LISTED)
    if not listed:
        return (
            '<p class="note">No single segment makes a difference that these numbers show: '
            "what the others show is enough, or none of them matters.</p>"
        )
    assert panel.score is not None
    full = 1.0 if panel.percent else max(panel.score, *(after for *_, after in listed), 1e-30)
    rows = []
    for segment, text, after in listed:
        before_share, after_share = (100 * min(max(value / full, 0.0), 1.0) for value in (panel.score, after))
        rows.append(
            f'<li data-segment="{segment}"><span class="bar"><i style="width:{before_share:.1f}%"></i>'
            f'<b style="width:{after_share:.1f}%"></b></span><span>{escape(text)}</span></li>'
        )
    word = "probability" if panel.percent else "score"
    return (
        f'<div class="ranking"><h4>Without this segment</h4><p>The {word} before and after hiding one segment. '
        f"Point at a line to see where it lies.</p><ol>{''.join(rows)}</ol></div>"
    )


# Words ---------------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """Return a time for people: "41 ms", "1.4 s"."""
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def _two_places(value: float) -> str:
    """Return a correlation: all of a column have as many digits, and what is nearly 1 does not look like a whole number."""
    return f"{value:z.2f}".replace("-", "\N{MINUS SIGN}")


def completeness(found: Explanation, name: str) -> str:
    """Return what a path method's map adds up to and by how much it misses, "" for others."""
    residual = found[name].details.get("residual")
    if not isinstance(residual, Tensor):
        return ""
    total, missed = float(found[name].map[0].double().sum()), float(residual[0])
    change = total - missed
    share = f" ({100 * abs(missed / change):.2g} %)" if change else ""
    return f"Adds up to {viz.number(total)} of {viz.number(change)}: residual {viz.number(missed)}{share}."


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _cost(found: Explanation, name: str) -> str:
    result = found[name]
    passes = "" if result.passes is None else f" · {result.passes} pass{'' if result.passes == 1 else 'es'}"
    return f"{seconds(result.seconds)}{passes}"


def _note(found: Explanation, name: str) -> str:
    method = METHODS[name]
    lines = [_sentence(method.page or method.summary)]
    if method.stored == "drops":
        apart = label_map(found.panel(name)) is not None
        lines.append("Point at a segment to hide it." if apart else "Windows overlap; a pixel has their mean.")
    if said := completeness(found, name):
        lines.append(f'</span><span class="residual">{escape(said)}')
    elif method.noisy:
        lines.append(escape(_sentence(", ".join(notes(found, found[name], 0, viz.number).values()))))
    elif "layer" in found[name].details:
        lines.append(f"Layer <code>{escape(found[name].details['layer'])}</code>.")
    elif method.hint:
        lines.append(method.hint)
    return f'<p class="note"><span>{" ".join(lines)}</span></p>'


def answers(found: Sequence[Answer], chosen: int) -> str:
    """Return the classes on offer as buttons with a bar each."""
    rows = []
    for answer in found:
        checked = str(answer.index == chosen).lower()
        rows.append(
            f'<button type="button" role="radio" aria-checked="{checked}" data-pick="{answer.index}">'
            f'<i style="width:{100 * (answer.probability or 0.0):.1f}%"></i><span>{escape(answer.name)}</span>'
            f"<em>{'' if answer.probability is None else escape(viz.percent(answer.probability))}</em></button>"
        )
    return f'<div class="pysal answers" role="radiogroup" aria-label="Class to explain">{"".join(rows)}</div>'


def thumbnails(shown: dict[str, tuple[str, str]], chosen: str) -> str:
    """Return the photos on offer, key -> (caption, data URI), as buttons."""
    rows = [
        f'<button type="button" role="radio" aria-checked="{str(key == chosen).lower()}" data-pick="{escape(key)}" '
        f'title="{escape(caption)}"><img alt="{escape(caption)}" src="{uri}"></button>'
        for key, (caption, uri) in shown.items()
    ]
    return f'<div class="pysal thumbnails" role="radiogroup" aria-label="Photos">{"".join(rows)}</div>'


def preview(image: Tensor, caption: str) -> str:
    """Return the photo (C, H, W) as the model sees it."""
    height, width = image.shape[1:]
    said = f"What the model sees: {width} \N{MULTIPLICATION SIGN} {height} pixels"
    return (
        f'<figure class="pysal preview"><img alt="{escape(caption)}" src="{photo_uri(image)}">'
        f"<figcaption><b>{escape(caption)}</b><small>{said}</small></figcaption></figure>"
    )


def plain(error: str) -> str:
    """Return a refusal of pysal's as a sentence of the page, which has no Python arguments to name and none to pass."""
    text = re.sub(r"^pysal[\w. ]*: ", "", error).partition("; pass ")[0].removesuffix(".")
    name, _, rest = text.partition(" ")
    return _sentence(f"{ARGUMENTS.get(name, name)} {rest}".strip())


def status(text: str, share: float | None = None, kind: str = "", run: int = 0) -> str:
    """Return the line that says what is going on in a reader's run; `kind` is "", "busy", "stopped" or "wrong".

    Two runs that end with the same words are told apart by the number of their question, so that a screen reader says both.
    """
    bar = "" if share is None else f'<div class="progress"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>'
    return (
        f'<div class="pysal status {kind}" role="status" aria-live="polite" data-run="{run}"><p>{escape(text)}</p>{bar}</div>'
    )


# Pages ---------------------------------------------------------------------------------------------------------------


def _container(image: Tensor, inner: str, kind: str = "tiles") -> str:
    height, width = image.shape[1:]
    style = f"--backdrop:url({backdrop_uri(image)});--shape:{width} / {height}"
    return f'<div class="pysal {kind}" style="{style}">{inner}</div>'


def _likely(found: Explanation) -> str:
    """Return the probability of what was explained or, of a plain number, that number."""
    if found.probabilities is not None:
        return f" <em>{escape(viz.percent(float(found.probabilities[0])))}</em>"
    return f" <em>= {escape(viz.number(float(found.scores[0])))}</em>" if found.output == "numbers" else ""


def verdict(found: Explanation) -> str:
    """Return what was explained: class, probability, model."""
    return f"<h3>{escape(found.target_names[0])}{_likely(found)} <small>{escape(found.model_name)}</small></h3>"


def side_by_side(found: Found, image: Tensor, links: str = "") -> str:
    """Return all maps of one class of a photo (1, C, H, W), with what is still to come and what does not apply."""
    explanation, tiles, ranking = found.explanation, {}, ""
    if explanation is not None:
        for name in explanation.results:
            panel = explanation.panel(name)
            segments = panel.drops is not None
            tiles[name] = _tile(
                panel.title,
                _cost(explanation, name),
                Views.of(panel),
                over=_segments(panel) if segments else "",
                data=_segment_data(panel) if segments else "",
                below=_note(explanation, name),
            )
            if segments:
                ranking = _ranking(panel)
    for name in found.waiting:
        tiles[name] = _waiting_tile(METHODS[name].title)
    for name, sentence in found.refused.items():
        tiles[name] = _refused_tile(METHODS[name].title, sentence)
    if ranking:
        tiles["leave_one_out"] += ranking
    ordered = "".join(tiles[name] for name in METHODS if name in tiles)
    head = "" if explanation is None else f'<header class="pysal verdict">{verdict(explanation)}{links}</header>'
    return head + _container(image[0], ordered)


def two_classes(one: Found, other: Found, image: Tensor) -> str:
    """Return each method's map for both classes, on one scale, and what speaks for the one rather than the other."""
    first, second = one.explanation, other.explanation
    reasons = {METHODS[name].title: why for name, why in {**one.refused, **other.refused}.items()}
    if first is None or second is None:
        waiting = [name for name in METHODS if name in (*one.waiting, *other.waiting)]
        if not waiting:
            return refused(image[0], reasons)
        return _container(image[0], "".join(_waiting_tile(METHODS[name].title) for name in waiting), "tiles pairs")
    names = (first.target_names[0], second.target_names[0])
    rows = []
    for method in [name for name in METHODS if name in (*first.results, *one.waiting, *other.waiting)]:
        if method not in first.results or method not in second.results:
            rows.append(f'<section class="pair">{_waiting_tile(METHODS[method].title) * 3}</section>')
            continue
        views = [Views.of(found.panel(method)) for found in (first, second)]
        bounds = (max(each.limits()[0] for each in views), max(each.limits()[1] for each in views))
        own = [view.signed if view.own == "signed" else view.unsigned for view in views]
        same = agreement(*own)
        unit = f"difference of {views[0].units[KINDS.index(views[0].own)]}"
        rather = Views(own[0] - own[1], (own[0] - own[1]).abs(), "signed", (unit, f"size of the {unit}"))
        likeness = "" if math.isnan(same) else f"correlation <em>{_two_places(same)}</em>"
        tiles = [
            _tile(name, found.panel(method).title, view, bounds=bounds)
            for name, found, view in zip(names, (first, second), views, strict=True)
        ]
        tiles.append(_tile("Difference", f"{names[0]} \N{MINUS SIGN} {names[1]}", rather))
        title = f"<h4>{escape(METHODS[method].title)} <small>{likeness}</small></h4>"
        rows.append(f'<section class="pair">{title}{"".join(tiles)}</section>')
    if reasons:
        rows.append(f'<section class="pair">{"".join(_refused_tile(title, why) for title, why in reasons.items())}</section>')
    likely = [_likely(found) for found in (first, second)]
    head = (
        f'<header class="pysal verdict"><h3>{escape(names[0])}{likely[0]} or {escape(names[1])}{likely[1]}? '
        f"<small>{escape(first.model_name)}</small></h3></header>"
    )
    said = (
        '<p class="pysal lead">Each row has one scale for both classes. The third picture is orange where the map is larger '
        "for the first class and blue where it is larger for the second. A correlation near 1 means that the method draws the "
        "same picture for both: it shows the photo more than the answer.</p>"
    )
    return head + said + _container(image[0], "".join(rows), "tiles pairs")


def swipe_side(found: Explanation, name: str, title: str) -> tuple[str, str, viz.Panel]:
    """Return a map as `swipe` takes it, with the number that says most about it."""
    said = completeness(found, name) or _cost(found, name)
    fallen = falls(found.panel(name), 1)
    return title, f"largest fall {fallen[0][1]}" if fallen else said, found.panel(name)


def swipe(image: Tensor, left: tuple[str, str, viz.Panel], right: tuple[str, str, viz.Panel]) -> str:
    """Return two maps of a photo (C, H, W) in one frame, with a divider to draw from side to side.

    Args:
        image: the photo.
        left: title, small print and map, see `swipe_side`.
        right: the same.
    """

    def side(kind: str, panel: viz.Panel, title: str) -> str:
        views = Views.of(panel)
        over = _segments(panel) if panel.drops is not None else ""
        return f'<div class="side {kind} {views.own}-own">{_layers(views, views.limits(), title)}{over}</div>'

    captions = "".join(
        f"<span><b>{escape(title)}</b><small>{escape(small)}</small></span>" for title, small, _ in (left, right)
    )
    inner = (
        f'<figure class="tile swipe"><figcaption>{captions}</figcaption>'
        f'<div class="picture">{side("left", left[2], left[0])}{side("right", right[2], right[0])}<i class="divider"></i>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{escape(left[0])} or {escape(right[0])}"></div></figure>'
    )
    return _container(image, inner, "tiles one")
