"""What the page says: seconds, notes below a picture, the classes and photos on offer, what is going on, what went wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from pysal import viz
from pysal.demo.segments import label_map
from pysal.demo.session import Answer
from pysal.demo.tiles import escape, photo_uri
from pysal.explanation import Explanation
from pysal.explanation.text import notes
from pysal.methods.registry import EVERY

# What the page calls what Python calls so.
ARGUMENTS = {"name_or_index": "what you typed", "source": "your file"}


def seconds(value: float) -> str:
    """Return a time for people: "41 ms", "1.4 s"."""
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def two_places(value: float) -> str:
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


def cost(found: Explanation, name: str) -> str:
    """Return how long a method took, and its model passes."""
    result = found[name]
    passes = "" if result.passes is None else f" · {result.passes} pass{'' if result.passes == 1 else 'es'}"
    return f"{seconds(result.seconds)}{passes}"


def note(found: Explanation, name: str) -> str:
    """Return what stands below a method's picture."""
    method = EVERY[name]
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


def answers(found: Sequence[Answer], chosen: int, beside: int | None = None) -> str:
    """Return the classes on offer as buttons with a bar each, the chosen one and the one beside it told from the others."""
    rows = []
    for answer in found:
        checked = str(answer.index == chosen).lower()
        second = answer.index == beside != chosen
        mark = (' class="beside"', " <small>beside it</small>") if second else ("", "")
        rows.append(
            f'<button type="button" role="radio" aria-checked="{checked}" data-pick="{answer.index}"{mark[0]}>'
            f'<i style="width:{100 * (answer.probability or 0.0):.1f}%"></i><span>{escape(answer.name)}{mark[1]}</span>'
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
