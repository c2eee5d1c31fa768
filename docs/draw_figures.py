"""Draw the pictures of the method pages and print the numbers that their captions quote: `make figures`.

`python docs/draw_figures.py saturation redundancy` draws some of them. Each function is one picture, on the shipped photos and
EfficientNet-Lite0, and returns it with what it measured. Same seeds, same pictures.
"""

import contextlib
import copy
import io
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

import pysal
from pysal import viz

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/figures"
DPI = 150
JPEG: dict[str, Any] = {"quality": 85, "subsampling": 0, "optimize": True}
TILE, GAP, TITLE, NOTE, MARGIN = 1.75, 0.12, 0.27, 0.38, 0.08  # inches
CELLS = 8  # pixels: photos are 224 x 224
INK, GREY, BLUE, ORANGE, GREEN = "#1c1c1e", "#5c5f66", "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's colours

Drawn = tuple[Figure, dict[str, Any]]


@dataclass(frozen=True)
class Tile:
    """A square of a picture: an image (H, W, 3) in [0, 1] or a function that draws on its axes, a title, a note below."""

    title: str
    content: np.ndarray[Any, Any] | Callable[[Axes], None]
    note: str = ""


def page(rows: Sequence[Sequence[Tile]]) -> Figure:
    """Return the tiles in rows."""
    columns = max(len(row) for row in rows)
    notes = [NOTE if any(tile.note for tile in row) else 0.06 for row in rows]
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    height = 2 * MARGIN + sum(TITLE + TILE + note for note in notes)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = height - MARGIN
    for row, note in zip(rows, notes, strict=True):
        for column, tile in enumerate(row):
            left = MARGIN + column * (TILE + GAP)
            place = (left / width, (top - TITLE - TILE) / height, TILE / width, TILE / height)
            figure.text((left + TILE / 2) / width, (top - TITLE + 0.07) / height, tile.title, size=10, color=INK, ha="center")
            below = (top - TITLE - TILE - 0.05) / height
            figure.text(
                (left + TILE / 2) / width, below, tile.note, size=9, color=GREY, ha="center", va="top", linespacing=1.25
            )
            if callable(tile.content):
                # room for tick labels inside the tile
                inner = (place[0] + 0.2 * place[2], place[1] + 0.17 * place[3], 0.78 * place[2], 0.8 * place[3])
                tile.content(plain(figure.add_axes(inner)))
            else:
                axes = figure.add_axes(place)
                axes.set_axis_off()
                axes.imshow(tile.content, interpolation="nearest", aspect="auto")
        top -= TITLE + TILE + note
    return figure


def plain(axes: Axes) -> Axes:
    """Return axes with thin lines and small type."""
    axes.tick_params(labelsize=8, colors=GREY, length=2.5, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
        spine.set_linewidth(0.6)
    return axes


def photo(image: Tensor) -> np.ndarray[Any, Any]:
    """Return image 0 of a batch as colours."""
    return viz.photo(image[0])


def overlay(
    image: Tensor, map: Tensor, *, signed: bool = False, bounds: tuple[float, float] | None = None
) -> np.ndarray[Any, Any]:
    """Return the map (H, W) of image 0 over it."""
    return viz.overlay(image[0], map, signed=signed, bounds=bounds)


def shares(image: Tensor, map: Tensor, *, bounds: tuple[float, float] | None = None) -> np.ndarray[Any, Any]:
    """Return shares of the score (H, W) of image 0, summed over cells as `Explanation.plot` sums them."""
    sums = viz.pooled(map, CELLS)
    large = sums.repeat_interleave(CELLS, 0).repeat_interleave(CELLS, 1)
    return viz.overlay(image[0], large, signed=True, bounds=bounds or viz.limits(sums))


def one(map: Tensor, reduction: str = "max_abs") -> Tensor:
    """Return one number per pixel of image 0: (H, W)."""
    return viz.reduce_channels(map[0], reduction)


def percent(value: float) -> str:
    """Return a probability in per cent."""
    return viz.percent(value)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two maps."""
    return float(spearmanr(first.flatten().numpy(), second.flatten().numpy()).statistic)


class Setting:
    """The network and the photos."""

    def __init__(self) -> None:
        self.model = pysal.models.load("efficientnet-lite0").requires_grad_(False)
        self.fast = pysal.prepare(self.model, self.photo("siamese_cat"))

    def photo(self, name: str) -> Tensor:
        """Return a photo (1, 3, 224, 224)."""
        return pysal.read_image(ROOT / f"pysal/data/photos/{name}.jpg", self.model)

    def probability(self, image: Tensor, index: int) -> float:
        """Return the probability of a class."""
        return float(self.model(image).softmax(1)[0, index])

    def logit(self, image: Tensor, index: int) -> float:
        """Return the logit of a class."""
        return float(self.model(image)[0, index])


def redundancy(setting: Setting) -> Drawn:
    """Leave-one-out: the same evidence twice."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    twice = torch.cat([image[..., 56:168]] * 2, -1)
    before = setting.probability(twice, index)
    hidden, tiles = {}, []
    for name, columns in (("left", slice(0, 112)), ("right", slice(112, 224)), ("both", slice(0, 224))):
        changed = twice.clone()
        changed[..., columns] = 0.5
        hidden[name] = setting.probability(changed, index)
        tiles.append(Tile(f"{name} hidden", photo(changed), f"{percent(before)} → {percent(hidden[name])}"))
    segments = (torch.arange(224) >= 112).int().expand(224, 224)
    map = pysal.leave_one_out(setting.model, twice, index, segments=segments, fill=0.5)
    shown = Tile(
        "leave-one-out", overlay(twice, one(map, "none"), signed=True, bounds=(-1, 1)), "neither half matters,\nit says"
    )
    return page([[Tile("two cats", photo(twice), percent(before)), *tiles, shown]]), {"before": before, **hidden}


def fills(setting: Setting) -> Drawn:
    """Leave-one-out: what a segment is filled with."""
    image = setting.photo("camera")
    index = setting.model.class_index("tripod")
    tiles, found = [Tile("photo", photo(image), f"tripod {percent(setting.probability(image, index))}")], {}
    for fill in ("black", "white", "mean", "blur"):
        options = {"leave_one_out": {"segments": pysal.Grid(7, 7), "fill": fill}}
        result = pysal.explain(setting.fast, image, index, methods=["leave_one_out"], method_options=options)["leave_one_out"]
        drops = result.details["drops"][0]
        found[fill] = [round(float(drops.max()), 3), divmod(int(drops.argmax()), 7)]
        note = f"largest drop {100 * float(drops.max()):.0f} points"
        tiles.append(Tile(f"fill: {fill}", overlay(image, one(result.map, "none"), signed=True, bounds=(-0.3, 0.3)), note))
    return page([tiles]), found


def grain(setting: Setting) -> Drawn:
    """Reading a heat map: the same two maps drawn in several ways."""
    rows, found = [], {}
    for name, method in (("egyptian_cat", "integrated_gradients"), ("persian_cat", "blur_integrated_gradients")):
        image = setting.photo(name)
        result = pysal.explain(setting.fast, image, methods=[method])
        looks: dict[str, dict[str, Any]] = {
            "every pixel": {"cells": 1},
            "sums over cells": {},
            "smooth=4": {"smooth": 4.0},
            "magnitude": {"view": "magnitude", "cells": 1, "colours": "gray", "photo": False, "percentile": 99.0},
        }
        row = [Tile(result[method].title, photo(image))]
        row += [Tile(title, result.overlay(method, **look) / 255) for title, look in looks.items()]
        rows.append(row)
        found[method] = round(float(result[method].map.sum()), 2)
    return page(rows), found


def interactions(setting: Setting) -> Drawn:
    """Interactions: the pairs of segments of a photo that do most together."""
    image = setting.photo("siamese_cat")
    options = {"interactions": {"segments": pysal.Grid(6, 6), "fill": "mean"}}
    found = pysal.explain(setting.model, image, methods="interactions", method_options=options)
    result = found["interactions"]
    largest = result.details["interactions"][0].abs().max()
    return found.plot(kind="interactions"), {"largest": round(float(largest), 3), "passes": result.passes}


def company(setting: Setting) -> Drawn:
    """Interactions: the same evidence twice, and four times."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    small = torch.nn.functional.interpolate(image, (112, 112), mode="bilinear", antialias=True)
    tiles, numbers = [], {}
    for name, many, segments in (
        ("two cats", torch.cat([image[..., 56:168]] * 2, -1), pysal.Grid(1, 2)),
        ("four cats", torch.cat([torch.cat([small] * 2, -1)] * 2, -2), pysal.Grid(2, 2)),
    ):
        found = pysal.interactions(setting.model, many, index, segments=segments, fill="mean")
        shares = pysal.shapley(setting.model, many, index, segments=segments, fill="mean", tree="flat")
        values, own = found.values[0], torch.unique(shares)
        numbers[name] = [values.tolist(), own.tolist()]
        tiles.append(Tile(name, photo(many), percent(setting.probability(many, index))))
        most = 100 * float(values.abs().max())
        note = f"{100 * float(values[0]):.0f} points" if len(values) == 1 else f"no pair above\n{most:.0f} points"
        tiles.append(Tile("interactions", overlay(many, one(found.map, "none"), signed=True, bounds=(-1, 1)), note))
    note = f"{100 * float(own.min()):.0f} to {100 * float(own.max()):.0f} points each"
    tiles.append(Tile("Shapley values", overlay(many, one(shares, "none"), signed=True, bounds=(-0.5, 0.5)), note))
    return page([tiles]), numbers


def masks(setting: Setting) -> Drawn:
    """RISE: the noise of few masks, most of which is that of the mean score."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    tiles, numbers = [Tile("photo", photo(image), percent(setting.probability(image, index)))], {}
    for samples, centred in ((200, False), (2000, False), (200, True), (2000, True)):
        options = {"rise": {"samples": samples, "centred": centred, "fill": "black"}}
        found = pysal.explain(setting.fast, image, index, methods="rise", method_options=options)["rise"]
        map, error = one(found.map, "none"), one(found.details["standard_error"], "none")
        numbers[samples, centred] = [float(map.min()), float(map.max()), float(error.mean())]
        low, high, off = (100 * value for value in numbers[samples, centred])
        note = f"{low:.1f} to {high:.1f} {'points' if centred else '%'},\nerror {off:.1f} points"
        title = f"{samples} masks{', centred' if centred else ''}"
        tiles.append(Tile(title, overlay(image, map, signed=centred), note))
    return page([tiles]), numbers


def saturation(setting: Setting) -> Drawn:
    """Gradient: where the score is flat, the gradient is small."""
    image = setting.photo("coffee")
    index = setting.model.class_index("espresso")
    alphas = np.linspace(0, 1, 41)
    scores, norms, chances = [], [], []
    for alpha in alphas:
        scaled = alpha * image
        scores.append(setting.logit(scaled, index))
        chances.append(setting.probability(scaled, index))
        norms.append(float((pysal.gradient(setting.fast, scaled, index) * image).sum()))
    share = float(np.trapezoid(norms, alphas))

    def score(axes: Axes) -> None:
        axes.plot(alphas, scores, color=BLUE, linewidth=1.4)
        axes.set_xlabel("brightness", size=8, color=GREY)

    def slope(axes: Axes) -> None:
        axes.plot(alphas, norms, color=ORANGE, linewidth=1.4)
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.set_xlabel("brightness", size=8, color=GREY)

    found = {"last slope": norms[-1], "last tenth": scores[-1] - scores[36], "whole": scores[-1] - scores[0], "integral": share}
    maps = [one(pysal.gradient(setting.fast, alpha * image, index)) for alpha in (0.3, 1.0)]
    bounds = (0.0, max(viz.limits(map, signed=False)[1] for map in maps))
    found["largest"] = [float(map.max()) for map in maps]
    tiles = [Tile("photo", photo(image), percent(chances[-1])), Tile("logit", score), Tile("its slope", slope)]
    for name, map in zip(("at 0.3", "at 1"), maps, strict=True):
        tiles.append(Tile(f"gradient {name}", overlay(image, map, bounds=bounds)))
    return page([tiles]), found


def randomised(model: torch.nn.Module, prefixes: Sequence[str], seed: int = 0) -> torch.nn.Module:
    """Return a copy whose convolutions and linear layers under these names have weights drawn anew, as large as they were."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, module in changed.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and name.startswith(tuple(prefixes)):
            weight = module.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    return changed


def randomisation(setting: Setting) -> Drawn:
    """Guided backprop: it hardly notices that the network forgets what it learned."""
    image = setting.photo("tabby_cat")
    index = setting.model.class_index("tabby")
    last = ["network.model._fc", "network.model._conv_head", *(f"network.model._blocks.{block}." for block in range(11, 16))]
    stages = {"trained": [], "classifier random": last[:1], "a third random": last, "all random": ["network"]}
    methods = {"gradient": pysal.gradient, "guided backprop": pysal.guided_backprop}
    rows, found = [], {}
    for title, method in methods.items():
        row, original = [Tile(title, photo(image))], None
        for stage, prefixes in stages.items():
            map = one(method(randomised(setting.model, prefixes) if prefixes else setting.model, image, index))
            original = map if original is None else original
            found[title, stage] = round(rank_correlation(map, original), 2)
            note = f"rank correlation {found[title, stage]:.2f}" if prefixes else ""
            row.append(Tile(stage, overlay(image, map), note))
        rows.append(row)
    return page(rows), found


def class_blindness(setting: Setting) -> Drawn:
    """Guided backprop: the same picture for every class."""
    image = setting.photo("siamese_cat")
    methods = {"gradient": pysal.gradient, "guided backprop": pysal.guided_backprop, "Grad-CAM": pysal.grad_cam}
    rows, found = [], {}
    for name in ("Siamese cat", "espresso"):
        row = [Tile(f"for “{name}”", photo(image), percent(setting.probability(image, setting.model.class_index(name))))]
        for title, method in methods.items():
            map = one(method(setting.model, image, setting.model.class_index(name)))
            found.setdefault(title, map)
            note = ""
            if name == "espresso":
                note = f"rank correlation {rank_correlation(map, found[title]):.2f}"
            row.append(Tile(title, overlay(image, map), note))
        rows.append(row)
    return page(rows), {row.title: row.note for row in rows[1]}


def cam_depth(setting: Setting) -> Drawn:
    """Grad-CAM: as coarse as its layer, and meaningless far from the output."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    result = pysal.explain(setting.model, image, index, methods=["grad_cam"])["grad_cam"]
    native = result.details["native"]
    coarse = torch.nn.functional.interpolate(native, scale_factor=32)
    tiles = [
        Tile("photo", photo(image)),
        Tile(
            "what was computed", overlay(image, one(coarse, "none")), f"last layer, {native.shape[2]} x {native.shape[3]} cells"
        ),
        Tile("what is drawn", overlay(image, one(result.map, "none")), "the same, enlarged"),
    ]
    found = {}
    for block in (10, 2):
        layer = f"network.model._blocks.{block}"
        result = pysal.explain(
            setting.model, image, index, methods=["grad_cam"], method_options={"grad_cam": {"layer": layer}}
        )["grad_cam"]
        size = result.details["native"].shape[2]
        found[layer] = size
        tiles.append(Tile(f"block {block + 1} of 16", overlay(image, one(result.map, "none")), f"{size} x {size} cells"))
    return page([tiles]), found


def noise(setting: Setting) -> Drawn:
    """SmoothGrad: the noise decides what is explained."""
    image = setting.photo("egyptian_cat")
    index = setting.model.class_index("Egyptian cat")
    spread = float(image.max() - image.min())
    above, below, found = [], [], {}
    for level in (0.0, 0.05, 0.15, 0.3, 0.6):
        copies = torch.cat([pysal.ops.gaussian_noise(
            image, torch.tensor([level * spread], dtype=torch.float64), 0, torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64), torch.tensor([sample])) for sample in range(20)])  # fmt: skip
        chance = setting.model(copies).softmax(1)[:, index]
        map = one(pysal.smooth_grad(setting.fast, image, index, noise=level, samples=50 if level else 1))
        found[level] = round(float(chance.mean()), 3)
        above.append(Tile(f"noise {level:g}", viz.photo(copies[0].clamp(0, 1)), f"{percent(float(chance.mean()))} on average"))
        below.append(Tile("SmoothGrad" if level else "gradient", overlay(image, map)))
    return page([above, below]), found


def baselines(setting: Setting) -> Drawn:
    """Integrated Gradients: it cannot see what looks like its baseline."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    dark = (image[0] < 0.2).all(0)
    tiles, found = [Tile("photo", photo(image), f"{100 * float(dark.float().mean()):.0f} % of it is dark")], {}
    for baseline in ("black", "white", "mean", "blur"):
        map = one(pysal.integrated_gradients(setting.fast, image, index, baseline=baseline, steps=200), "sum")
        share = float(map[dark].abs().sum() / map.abs().sum())
        found[baseline] = round(share, 3)
        tiles.append(Tile(f"baseline {baseline}", shares(image, map), f"{100 * share:.0f} % of |map|\nis on the dark pixels"))
    return page([tiles]), found


def few_steps(setting: Setting, method: str, counts: Sequence[int], reference: int, ways: dict[str, dict[str, str]]) -> Drawn:
    """Draw a path method's maps at several numbers of steps, and how error and residual fall."""
    image = setting.photo("egyptian_cat")
    index = setting.model.class_index("Egyptian cat")

    def run(steps: int, how: dict[str, str]) -> tuple[Tensor, float]:
        options = {method: {"steps": steps, **how}}
        result = pysal.explain(setting.fast, image, index, methods=[method], method_options=options)[method]
        return one(result.map, "sum"), float(result.details["residual"][0])

    exact, _ = run(reference, {})
    bounds = viz.limits(viz.pooled(exact, CELLS))  # one scale for all, so that what is wrong can be seen
    tiles, found, curves = [], {}, {}
    for name, how in ways.items():
        errors, residuals = [], []
        for count in counts:
            map, residual = run(count, how)
            errors.append(float((map - exact).norm() / exact.norm()))
            residuals.append(abs(residual))
            found[name, count] = (round(errors[-1], 3), round(residual, 3))
            if not how and count in (counts[0], counts[2], counts[-1]):
                tiles.append(
                    Tile(
                        f"{count} steps",
                        shares(image, map, bounds=bounds),
                        f"map error {100 * errors[-1]:.0f} %\nresidual {residual:.2g}",
                    )
                )
        curves[name] = (errors, residuals)

    def draw(which: int) -> Callable[[Axes], None]:
        def on(axes: Axes) -> None:
            for colour, values in zip((BLUE, ORANGE), curves.values(), strict=True):
                axes.loglog(counts, values[which], color=colour, linewidth=1.3, marker="o", markersize=2.5)
            axes.minorticks_off()
            axes.set_xticks(counts[::2], [str(count) for count in counts[::2]])
            axes.set_xlabel("steps", size=8, color=GREY)
            if which == 0:
                shares = [share for share in (0.01, 0.03, 0.1, 0.3, 1.0) if share < 1.1 * max(curves["the paper's sum"][0])]
                axes.set_yticks(shares, [f"{100 * share:.0f} %" for share in shares])

        return on

    tiles += [Tile("error of the map", draw(0), "blue: default\norange: the paper's sum"), Tile("|residual|", draw(1))]
    return page([tiles]), found


def steps(setting: Setting) -> Drawn:
    """Integrated Gradients: too few steps."""
    ways = {"pysal's default": {}, "the paper's sum": {"quadrature": "right", "placement": "uniform"}}
    return few_steps(setting, "integrated_gradients", (10, 20, 50, 100, 200), 800, ways)


def blur_steps(setting: Setting) -> Drawn:
    """Blur Integrated Gradients: too few steps."""
    ways = {"pysal's default": {}, "the paper's sum": {"quadrature": "left", "placement": "uniform"}}
    return few_steps(setting, "blur_integrated_gradients", (10, 25, 50, 100, 200), 800, ways)


def blur_end(setting: Setting) -> Drawn:
    """Blur Integrated Gradients: where its path ends."""
    image = setting.photo("coffee")
    index = setting.model.class_index("espresso")
    tiles, found = [Tile("photo", photo(image), f"logit {setting.logit(image, index):.2f}")], {}
    for boundary in ("constant", "reflect"):
        blurred = pysal.ops.gaussian_scale_space(image, [50.0], boundary=boundary)
        found[boundary] = [round(setting.logit(blurred, index), 2), setting.probability(blurred, index)]
        tiles.append(Tile(f"sigma 50, {boundary}", photo(blurred), f"logit {found[boundary][0]:.2f}"))
        map = one(pysal.blur_integrated_gradients(setting.fast, image, index, boundary=boundary), "sum")
        tiles.append(Tile("Blur IG", shares(image, map), f"boundary {boundary}"))
    return page([tiles]), found


def segments(setting: Setting) -> Drawn:
    """XRAI: the segments decide what can be found."""
    image = setting.photo("siamese_cat")
    index = setting.model.class_index("Siamese cat")
    tiles, found = [Tile("photo", photo(image))], {}
    cuts = {"its own": None, "Grid(3, 3)": pysal.Grid(3, 3), "Slic(30)": pysal.Slic(30), "Slic(300)": pysal.Slic(300)}
    for name, cut in cuts.items():
        map = one(pysal.xrai(setting.fast, image, index, steps=10, segments=cut), "none")
        best = (map >= map.flatten().sort(descending=True).values[map.numel() // 10]).flatten()  # the tenth that ranks first
        found[name] = best
        ours, theirs = found["its own"], best
        shared = float((ours & theirs).sum() / (ours | theirs).sum())
        note = "regions of the authors" if cut is None else f"{100 * shared:.0f} % of the best tenth\nin common with its own"
        tiles.append(Tile(name, overlay(image, map, signed=True), note))
    return page([tiles]), {
        name: float((best & found["its own"]).sum() / (best | found["its own"]).sum()) for name, best in found.items()
    }


def guided_paths(setting: Setting) -> Drawn:
    """Guided Integrated Gradients: how far the path may leave the straight one decides the map."""
    image = setting.photo("egyptian_cat")
    index = setting.model.class_index("Egyptian cat")
    tiles, found, first = [Tile("photo", photo(image))], {}, None
    for distance in (0.0, 0.02, 0.2, 1.0):
        options = {"guided_integrated_gradients": {"steps": 40, "max_distance": distance}}
        result = pysal.explain(setting.fast, image, index, methods="guided_integrated_gradients", method_options=options)
        map = one(result.maps["guided_integrated_gradients"], "sum")
        first = map if first is None else first
        found[distance] = round(rank_correlation(viz.pooled(first, CELLS), viz.pooled(map, CELLS)), 2)
        note = "the straight path" if not distance else f"{found[distance]:.2f} rank correlation\nwith the straight path's"
        tiles.append(Tile(f"distance {distance:g}", shares(image, map), note))
    return page([tiles]), found


class Warm(torch.nn.Module):
    """Scores how warm the colours are, patch by patch, and a little of how bright the picture is, through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = torch.nn.AvgPool2d(16), torch.nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 1) scores."""
        colours = self.patches(images).flatten(2).mT  # (N, 196, 3)
        bright = colours.mean(2, keepdim=True)
        seen = torch.nn.functional.scaled_dot_product_attention(bright, 4 * bright, bright)
        read = self.block(torch.cat([colours, seen], 2))
        return (read[..., :1] - read[..., 2:3] + 0.05 * read[..., 3:]).mean(1)


def attention_blind(setting: Setting) -> Drawn:
    """LeGrad: what does not pass through attention does not count."""
    image = setting.photo("coffee")
    model = Warm().eval()
    warm = (model.patches(image)[:, 0] - model.patches(image)[:, 2]).flatten()
    tiles, found = [Tile("photo", photo(image), "explained:\nhow warm the colours are")], {}
    drops = pysal.leave_one_out(model, image, 0, segments=pysal.Grid(14, 14), fill="black", score="raw")
    maps = {"leave-one-out": drops, "LeGrad": pysal.legrad(model, image, 0), "gradient x attention": None}
    maps["gradient x attention"] = pysal.gradient_attention(model, image, 0)
    for name, map in maps.items():
        assert map is not None
        cells = torch.nn.functional.avg_pool2d(map, 16).flatten()
        found[name] = round(rank_correlation(cells, warm), 2)
        note = f"{found[name]:.2f} rank correlation\nwith warmth"
        tiles.append(Tile(name, overlay(image, one(map, "none"), signed=name == "leave-one-out"), note))
    return page([tiles]), found


def tutorial() -> None:
    """Run the code of docs/tutorial.md from top to bottom and keep the pictures that it leaves."""
    blocks = re.findall(r"^```(python|pycon)\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("examples").symlink_to(ROOT / "examples")
        for language, code in blocks:
            lines = [line[4:] for line in code.splitlines() if line.startswith((">>> ", "... "))]
            exec(compile("\n".join(lines) + "\n" if language == "pycon" else code, "docs/tutorial.md", "exec"), scope)
        for path in sorted(Path().glob("*.png")):
            with Image.open(path) as picture:
                small = picture.convert("RGB").resize(
                    (picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS
                )
                small.save(OUT / f"tutorial_{path.stem}.jpg", **JPEG)


def panels(setting: Setting) -> None:
    """Draw what `make explain` leaves, for README.md and docs/pictures.md."""
    for name, path, width in (("egyptian_cat", "pictures/panel.jpg", 960), ("coffee", "images/coffee.jpg", 1264)):
        with io.BytesIO() as file:
            pysal.explain(setting.model, setting.photo(name)).plot().savefig(file, format="png")
            picture = Image.open(file).convert("RGB")
        small = picture.resize((width, width * picture.height // picture.width), Image.Resampling.LANCZOS)
        small.save(ROOT / "docs" / path, **JPEG)


def strip(setting: Setting) -> None:
    """Draw what the landing page begins with: a photo and three heat maps of it, low enough to leave room for what to do."""
    image = setting.photo("egyptian_cat")
    found = pysal.explain(setting.model, image, methods=["leave_one_out", "grad_cam", "integrated_gradients"])
    tiles = [np.asarray(255 * image[0].permute(1, 2, 0), np.uint8), *(found.overlay(name) for name in found.results)]
    gap = np.full((image.shape[2], 12, 3), 255, np.uint8)
    row = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], 1)
    Image.fromarray(row).save(ROOT / "docs/pictures/strip.jpg", **JPEG)


FIGURES: dict[str, Callable[[Setting], Drawn]] = {
    "grain": grain,
    "redundancy": redundancy,
    "fills": fills,
    "interactions": interactions,
    "company": company,
    "masks": masks,
    "saturation": saturation,
    "randomisation": randomisation,
    "class_blindness": class_blindness,
    "cam_depth": cam_depth,
    "noise": noise,
    "baselines": baselines,
    "steps": steps,
    "blur_steps": blur_steps,
    "blur_end": blur_end,
    "attention_blind": attention_blind,
    "segments": segments,
    "guided_paths": guided_paths,
}


def main(names: Sequence[str]) -> None:
    """Draw the pictures of these names, all where there is none."""
    OUT.mkdir(exist_ok=True)
    if not names or "tutorial" in names:
        tutorial()
    torch.set_grad_enabled(False)  # the methods switch gradients on where they need them
    setting = Setting()
    if not names or "panels" in names:
        panels(setting)
    if not names or "strip" in names:
        strip(setting)
    for name in FIGURES if not names else [name for name in names if name in FIGURES]:
        figure, found = FIGURES[name](setting)
        figure.savefig(OUT / f"{name}.jpg", pil_kwargs=JPEG)
        print(name, found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
