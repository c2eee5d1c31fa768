"""The report of a comparison: one HTML file that needs no network, in light and dark, for wide and narrow screens."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files as resources

from pysal.comparison.found import Comparison
from pysal.comparison.statistics import BLIND, CONFIDENCE, FEWEST, FIGURES, Estimate, Figure, Vote
from pysal.explanation.findings import counted
from pysal.viz import number

NOTHING = "\N{EN DASH}"


def page(found: Comparison) -> str:
    """Return the report as HTML."""
    title = f"Which method explains {found.settings['model']}?"
    votes = {one.figure: one for one in found.votes}
    marked = sum(any("mass_in_mask" in own for own in row["methods"].values()) for row in found.rows)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='muted'>{len(found.methods)} methods on {counted(len(found.rows), 'photo')}"
        + (f", {marked} with boxes or masks" if marked else ", none with boxes or masks")
        + f"; pysal {escape(found.settings['version'])}. {escape(found.explained)} is explained.</p>",
        "<section class='verdict'>" + "".join(f"<p>{escape(one)}</p>" for one in found.reasons) + "</section>",
        "<h2>What was measured</h2>",
        f"<p>A mark is the mean over images, the bar its {CONFIDENCE:.0%} interval (bootstrap). In colour: the best, and those "
        "that are not clearly behind it, compared image by image. Other photos, another model or another task can give another "
        "order.</p>",
        "<div class='figures'>",
        *(
            _figure(FIGURES[name], table, found.methods, votes.get(name))
            for name, table in found.estimates.items()
            if name in FIGURES
        ),
        "</div>",
        *_agreement(found),
        *_photos(found),
        *_left_out(found),
        "<h2>How to get this again</h2>",
        f"<p>Model <code>{escape(found.settings['model'])}</code>, weights "
        f"<code>{found.settings['weights_sha256'][:16]}</code>, seed {found.settings['seed']}. <code>comparison.json</code> "
        "beside this file has every number, and all settings. Pictures show the first photos.</p>",
    ]
    style = (resources(__package__) / "report.css").read_text("utf-8")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _figure(figure: Figure, table: Mapping[str, Estimate], titles: Mapping[str, str], vote: Vote | None) -> str:
    """Return the table of a figure, the best method first."""
    known = {name: one for name, one in table.items() if one.images}
    order = sorted(known, key=lambda name: -figure.sign * known[name].mean)
    ends = [end for one in known.values() for end in (one.low, one.high, one.mean) if math.isfinite(end)]
    low, high = min(ends), max(ends)
    images = sorted({one.images for one in known.values()})
    over = counted(images[0], "image") if len(images) == 1 else f"{images[0]} to {images[-1]} images"
    note = f"{figure.better} is better" if figure.better != "neither" else ""
    if not figure.votes:
        note += f"; not counted in the recommendation: {figure.why_not}"
    elif vote is not None and not vote.decided:
        few = vote.images < FEWEST
        note += f"; decides nothing: {'fewer than ' + str(FEWEST) + ' images' if few else 'no method is clearly behind'}"
    lines = []
    for name in order:
        one = known[name]
        leads = vote is not None and vote.decided and name in vote.leaders
        interval = f"{number(one.low)} to {number(one.high)}" if math.isfinite(one.low) else "one image"
        lines.append(
            f"<tr><th scope='row'>{escape(titles[name])}</th>"
            f"<td class='n{' lead' if leads else ''}'>{escape(number(one.mean))}</td>"
            f"<td class='range' title='{escape(interval)}'>{_range(one, low, high)}</td></tr>"
        )
    return (
        f"<section><h3>{escape(figure.title)}</h3><p class='muted'>{escape(figure.summary)} ({over}; {escape(note)})</p>"
        f"<table><tbody>{''.join(lines)}</tbody></table></section>"
    )


def _range(one: Estimate, low: float, high: float) -> str:
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return 98 * (value - low) / width

    bar = ""
    if math.isfinite(one.low):
        bar = f"<b style='left:{place(one.low):.1f}%;width:{place(one.high) - place(one.low):.1f}%'></b>"
    return f"<i>{bar}<u style='left:{place(one.mean):.1f}%'></u></i>"


def _agreement(found: Comparison) -> list[str]:
    if len(found.methods) < 2 or not any(math.isfinite(one) for row in found.agreement.values() for one in row.values()):
        return []
    head = "".join(f"<th class='n'>{escape(title)}</th>" for title in found.methods.values())
    lines = [
        f"<tr><th scope='row'>{escape(found.methods[a])}</th>"
        + "".join(f"<td class='n'>{_two_digits(value)}</td>" for value in row.values())
        + "</tr>"
        for a, row in found.agreement.items()
    ]
    return [
        "<h2>Do methods agree?</h2>",
        "<p>Mean rank correlation of their maps' magnitudes. Methods that answer different questions may disagree and all be "
        "right.</p>",
        f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>",
    ]


def _two_digits(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else NOTHING


def _photos(found: Comparison) -> list[str]:
    if not found.pictures:
        return []
    parts = ["<h2>What it looks like</h2>"]
    for name, pictures in found.pictures:
        shown = "".join(
            f"<figure><img src='{source}' alt='{escape(title)}'><figcaption>{escape(name if title == 'Photo' else title)}"
            "</figcaption></figure>"
            for title, source in pictures
        )
        parts.append(f"<div class='photos'>{shown}</div>")
    return parts


def _left_out(found: Comparison) -> list[str]:
    said: Sequence[str] = [
        *(f"{name} does not apply: {why}" for name, why in found.skipped.items()),
        *(f"{name} was not read: {why}" for name, why in found.unread.items()),
    ]
    limits = (
        "A method is not recommended if its maps' rank correlation with those of random weights is above "
        f"{BLIND} with all of its interval. "
        f"Fewer than {FEWEST} images decide nothing."
    )
    listed = f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in said)}</ul>" if said else ""
    return ["<h2>Left out, and rules</h2>", f"<p>{limits}</p>{listed}"]
