"""An explanation in a notebook: its pictures and its table, as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from typing import TYPE_CHECKING

from pysal.explanation.findings import Findings, counted
from pysal.explanation.text import COLUMNS, headline, left_out, rows, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels of this many images are put into a notebook; a larger batch is looked at with `plot`.
NOTEBOOK_IMAGES = 4
# Most characters of the tables: a notebook that holds a thousand of them is slow to open.
NOTEBOOK_TABLES = 20_000


def notebook(found: Findings, plot: Callable[[int], Figure]) -> str:
    """Return the explanation as HTML, below 300 kB: pictures of its first images, and numbers while there is room."""
    from pysal import viz

    shown = min(len(found.images), NOTEBOOK_IMAGES)
    parts, room = [f"<p>{html.escape(headline(found))}</p>"], NOTEBOOK_TABLES
    for image in range(len(found.images)):
        said = f"image {image}: {verdict(found, image)}"
        head = "".join(f"<th>{title}</th>" for title in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(found, image)
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        room -= len(table)
        if room < 0 and image >= shown:
            parts.append(f"<p>and {counted(len(found.images) - image, 'image')} more: print(found) lists them all</p>")
            break
        parts.append(f"<h4>{html.escape(said)}</h4>")
        if image < shown:
            alt = html.escape(f"Maps of {said}, by {', '.join(result.title for result in found.results.values())}")
            data = base64.b64encode(viz.compact(plot(image), viz.NOTEBOOK_BYTES // shown)).decode("ascii")
            parts.append(f'<img style="max-width: 100%" alt="{alt}" src="data:image/jpeg;base64,{data}"/>')
        parts.append(table)
    parts += [f"<p>left out: {html.escape(said)}</p>" for said in left_out(found)]
    return "<div>" + "".join(parts) + "</div>"
