"""Pictures in HTML: the grey photo with two layers of colour on it, the map with its sign and the map's strength.

page.css shows one of the layers, as strongly as the reader wants. Whatever comes from outside is escaped here.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pysal import viz

# The two views of a map, in the order of everything that comes in pairs.
KINDS = ("signed", "unsigned")


def escape(text: object) -> str:
    """Return text that can stand anywhere in HTML, also in quotes."""
    return html.escape(str(text), quote=True)


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


def numbers(values: NDArray[np.generic]) -> str:
    """Return the bytes of an array as page.js reads them."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def picture_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI."""
    return _uri(np.asarray(picture), "jpeg")


def photo_uri(image: Tensor) -> str:
    """Return a photo (C, H, W) as a data URI."""
    return _uri(_bytes(viz.photo(image)), "jpeg")


def backdrop_uri(image: Tensor, kind: str) -> str:
    """Return the grey photo that lies under a view of a map as a data URI."""
    return _uri(_bytes(viz.backdrop(image, signed=kind == "signed")), "jpeg")


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
        signed, strong = (viz.seen(panel, viz.Style(view=view)) for view in ("signed", "magnitude"))
        if not panel.signed:
            strong = viz.seen(panel)
        return cls(signed.map, strong.map.abs(), "signed" if panel.signed else "unsigned", (signed.unit, strong.unit))

    def limits(self) -> tuple[float, float]:
        """Return the largest values that the colours of the signed and of the unsigned view tell apart."""
        return viz.limits(self.signed)[1], viz.limits(self.unsigned, signed=False)[1]


def map_layers(views: Views, bounds: tuple[float, float], alt: str) -> str:
    """Return the two layers, with the values that the browser reads out."""
    parts = []
    for kind, map, bound in (("signed", views.signed, bounds[0]), ("unsigned", views.unsigned, bounds[1])):
        signed = kind == "signed"
        light = viz.layer(map, signed=signed, bounds=(-bound if signed else 0.0, bound))
        share = np.nan_to_num(map.detach().cpu().double().numpy() / (bound or 1.0)).clip(-1.0, 1.0)
        parts.append(
            f'<img class="layer {kind}" alt="{escape(alt)}" src="{_uri(_bytes(light))}" '
            f'data-values="{numbers(np.rint(share * 127).astype(np.int8))}" data-bound="{bound:.9g}">'
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


def map_tile(
    title: str,
    small: str,
    views: Views,
    *,
    bounds: tuple[float, float] | None = None,
    over: str = "",
    below: str = "",
    data: str = "",
) -> str:
    """Return a map's picture with its title, its scale and what is said below."""
    bounds = bounds or views.limits()
    return (
        f'<figure class="tile {views.own}-own">'
        f"<figcaption><b>{escape(title)}</b><small>{escape(small)}</small></figcaption>"
        f'<button type="button" class="enlarge" aria-expanded="false" aria-label="Enlarge {escape(title)}">\u2922</button>'
        f'<div class="picture" tabindex="0" role="group" aria-label="{escape(title)}: arrow keys move the point" {data}>'
        f'{map_layers(views, bounds, title)}{over}<i class="cross"></i></div>'
        f"{_scale(views, bounds)}{below}</figure>"
    )


def waiting_tile(title: str) -> str:
    """Return the place of a map that is being computed."""
    return (
        f'<figure class="tile waiting"><figcaption><b>{escape(title)}</b><small>computing …</small></figcaption>'
        '<div class="picture"></div></figure>'
    )


def refused_tile(title: str, reason: str) -> str:
    """Return the place of a map that a method refused, with the reason."""
    return (
        f'<figure class="tile refused"><figcaption><b>{escape(title)}</b><small>does not apply</small></figcaption>'
        f'<div class="picture"><p>{escape(reason)}</p></div></figure>'
    )
