"""Segments in HTML: their borders and falls on a picture, and the ranking beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pysal import viz
from pysal.demo.tiles import escape, numbers

# Falls written on the picture, and in the list beside it.
WRITTEN, LISTED = 3, 8


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
    found, texts = [], viz.falls(panel.score, drops.tolist(), panel.percent)
    for segment in order[:count]:
        text = texts[segment]
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


def segment_outlines(panel: viz.Panel) -> str:
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


def segment_data(panel: viz.Panel) -> str:
    """Return what the browser needs to say what a segment under the pointer is worth."""
    labels = label_map(panel)
    if labels is None or panel.drops is None or panel.score is None:
        return ""
    says, drops = [], panel.drops.cpu().double().tolist()
    for drop, text in zip(drops, viz.falls(panel.score, drops, panel.percent), strict=True):
        if text is None and drop < 0:  # the model is surer without it: in numbers that may need more digits than a fall
            text = viz.change(panel.score, panel.score - drop, panel.percent)
        says.append(text or "no change")
    return f'data-labels="{numbers(labels.astype(np.int16))}" data-falls="{escape("|".join(says))}"'


def ranking(panel: viz.Panel) -> str:
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
            f'<li data-segment="{segment}" tabindex="0"><span class="bar"><i style="width:{before_share:.1f}%"></i>'
            f'<b style="width:{after_share:.1f}%"></b></span><span>{escape(text)}</span></li>'
        )
    word = "probability" if panel.percent else "score"
    return (
        f'<div class="ranking"><h3>Without this segment</h3><p>The {word} before and after hiding one segment. '
        f"Point at a line, or tap it, to see where it lies.</p><ol>{''.join(rows)}</ol></div>"
    )
