"""An explanation in a notebook: its pictures and its table, as HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any, BinaryIO

from pysal.explanation.findings import Findings
from pysal.explanation.text import COLUMNS, headline, rows, verdict

# Panels of this many images are put into a notebook; a larger batch is looked at with `plot`.
NOTEBOOK_IMAGES = 4


def notebook(found: Findings, draw: Callable[[int, BinaryIO], Any]) -> str:
    """Return the explanation as HTML: the pictures of its first images, which `draw` writes as PNG, and the numbers of all."""
    parts = [f"<p>{html.escape(headline(found))}</p>"]
    for image in range(len(found.images)):
        said = f"image {image}: {verdict(found, image)}"
        parts.append(f"<h4>{html.escape(said)}</h4>")
        if image < NOTEBOOK_IMAGES:
            alt = html.escape(f"Maps of {said}, by {', '.join(result.title for result in found.results.values())}")
            parts.append(f'<img style="max-width: 100%" alt="{alt}" src="data:image/png;base64,{_png(draw, image)}"/>')
        head = "".join(f"<th>{title}</th>" for title in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(found, image)
        )
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    parts += [f"<p>left out: {html.escape(f'{name}: {why}')}</p>" for name, why in found.skipped.items()]
    return "<div>" + "".join(parts) + "</div>"


def _png(draw: Callable[[int, BinaryIO], Any], image: int) -> str:
    buffer = io.BytesIO()
    draw(image, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
