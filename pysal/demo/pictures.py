"""What was found, in HTML: pictures whose opacity, sign and read-out the browser changes by itself (page.js, page.css)."""

from __future__ import annotations

import math

from torch import Tensor

from pysal import viz
from pysal.demo.segments import falls, ranking, segment_data, segment_outlines
from pysal.demo.session import Found, agreement
from pysal.demo.tiles import KINDS, Views, backdrop_uri, escape, map_layers, map_tile, refused_tile, waiting_tile
from pysal.demo.words import completeness, cost, note, plain, two_places
from pysal.explanation import Explanation
from pysal.methods.registry import EVERY


def _container(image: Tensor, inner: str, kind: str = "tiles") -> str:
    height, width = image.shape[1:]
    photos = ";".join(f"--{kind}:url({backdrop_uri(image, kind)})" for kind in KINDS)
    style = f"{photos};--shape:{width} / {height}"
    return f'<div class="pysal {kind}" style="{style}">{inner}</div>'


def refused(image: Tensor, reasons: dict[str, str]) -> str:
    """Return why a photo (C, H, W) cannot be explained, title -> reason."""
    return _container(image, "".join(refused_tile(title, plain(why)) for title, why in reasons.items()))


def _likely(found: Explanation) -> str:
    """Return the probability of what was explained or, of a plain number, that number."""
    if found.probabilities is not None:
        return f" <em>{escape(viz.percent(float(found.probabilities[0])))}</em>"
    return f" <em>= {escape(viz.number(float(found.scores[0])))}</em>" if found.output == "numbers" else ""


def verdict(found: Explanation) -> str:
    """Return what was explained: class, probability, model."""
    return f"<h2>{escape(found.target_names[0])}{_likely(found)} <small>{escape(found.model_name)}</small></h2>"


def side_by_side(found: Found, image: Tensor, links: str = "") -> str:
    """Return all maps of one class of a photo (1, C, H, W), with what is still to come and what does not apply."""
    explanation, tiles, listed = found.explanation, {}, ""
    if explanation is not None:
        for name in explanation.results:
            panel = explanation.panel(name)
            segments = panel.drops is not None
            tiles[name] = map_tile(
                panel.title,
                cost(explanation, name),
                Views.of(panel),
                over=segment_outlines(panel) if segments else "",
                data=segment_data(panel) if segments else "",
                below=note(explanation, name),
            )
            if segments:
                listed = ranking(panel)
    for name in found.waiting:
        tiles[name] = waiting_tile(EVERY[name].title)
    for name, sentence in found.refused.items():
        tiles[name] = refused_tile(EVERY[name].title, plain(sentence))
    if listed:
        tiles["leave_one_out"] += listed
    ordered = "".join(tiles[name] for name in EVERY if name in tiles)
    head = "" if explanation is None else f'<header class="pysal verdict">{verdict(explanation)}{links}</header>'
    return head + _container(image[0], ordered)


def two_classes(one: Found, other: Found, image: Tensor) -> str:
    """Return each method's map for both classes, on one scale, and what speaks for the one rather than the other."""
    first, second = one.explanation, other.explanation
    reasons = {EVERY[name].title: why for name, why in {**one.refused, **other.refused}.items()}
    if first is None or second is None:
        waiting = [name for name in EVERY if name in (*one.waiting, *other.waiting)]
        if not waiting:
            return refused(image[0], reasons)
        return _container(image[0], "".join(waiting_tile(EVERY[name].title) for name in waiting), "tiles pairs")
    names = (first.target_names[0], second.target_names[0])
    rows = []
    for method in [name for name in EVERY if name in (*first.results, *one.waiting, *other.waiting)]:
        if method not in first.results or method not in second.results:
            rows.append(f'<section class="pair">{waiting_tile(EVERY[method].title) * 3}</section>')
            continue
        views = [Views.of(found.panel(method)) for found in (first, second)]
        bounds = (max(each.limits()[0] for each in views), max(each.limits()[1] for each in views))
        own = [view.signed if view.own == "signed" else view.unsigned for view in views]
        same = agreement(*own)
        unit = f"difference of {views[0].units[KINDS.index(views[0].own)]}"
        rather = Views(own[0] - own[1], (own[0] - own[1]).abs(), "signed", (unit, f"size of the {unit}"))
        likeness = "" if math.isnan(same) else f"correlation <em>{two_places(same)}</em>"
        tiles = [
            map_tile(name, found.panel(method).title, view, bounds=bounds)
            for name, found, view in zip(names, (first, second), views, strict=True)
        ]
        tiles.append(map_tile("Difference", f"{names[0]} \N{MINUS SIGN} {names[1]}", rather))
        title = f"<h3>{escape(EVERY[method].title)} <small>{likeness}</small></h3>"
        rows.append(f'<section class="pair">{title}{"".join(tiles)}</section>')
    if reasons:
        rows.append(
            f'<section class="pair">{"".join(refused_tile(title, plain(why)) for title, why in reasons.items())}</section>'
        )
    likely = [_likely(found) for found in (first, second)]
    head = (
        f'<header class="pysal verdict"><h2>{escape(names[0])}{likely[0]} or {escape(names[1])}{likely[1]}? '
        f"<small>{escape(first.model_name)}</small></h2></header>"
    )
    said = (
        '<p class="pysal lead">Each row has one scale for both classes. The third picture is orange where the map is larger '
        "for the first class and blue where it is larger for the second. A correlation near 1 means that the method draws the "
        "same picture for both: it shows the photo more than the answer.</p>"
    )
    return head + said + _container(image[0], "".join(rows), "tiles pairs")


def swipe_side(found: Explanation, name: str, title: str) -> tuple[str, str, viz.Panel]:
    """Return a map as `swipe` takes it, with the number that says most about it."""
    said = completeness(found, name) or cost(found, name)
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
        over = segment_outlines(panel) if panel.drops is not None else ""
        return f'<div class="side {kind} {views.own}-own">{map_layers(views, views.limits(), title)}{over}</div>'

    captions = "".join(
        f"<span><b>{escape(title)}</b><small>{escape(small)}</small></span>" for title, small, _ in (left, right)
    )
    inner = (
        f'<figure class="tile swipe"><figcaption>{captions}</figcaption>'
        f'<div class="picture">{side("left", left[2], left[0])}{side("right", right[2], right[0])}<i class="divider"></i>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{escape(left[0])} or {escape(right[0])}"></div></figure>'
    )
    return _container(image, inner, "tiles one")
