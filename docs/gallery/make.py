"""Makes the pictures of docs/gallery.md from the photos in examples/photos: `make gallery`.

    python docs/gallery/make.py [--only NAME] [--out FOLDER]

One function makes one picture, and its name is the file's. Maps come from the public methods on a prepared EfficientNet-Lite0;
`pysal.viz` and `pysal.plots` draw them as they draw everything.
"""

import dataclasses
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

import pysal
from pysal import ops, viz
from pysal.plots import LOOKS

ROOT = Path(__file__).resolve().parents[2]
DPI = 140
PATHS = ("integrated_gradients", "blur_integrated_gradients")


@dataclass(frozen=True)
class Effort:
    """How much work the pictures are worth: those of the page, or enough to see that all of them can be made."""

    segments: int = 50
    samples: int = 20
    steps: int = 20  # of each noisy copy: their mean evens out what each leaves
    long: int = 200  # steps of the paths that are shown
    frames: int = 40
    ladder: tuple[int, ...] = (8, 16, 32, 64, 256)
    levels: int = 28  # of deletion and insertion


LITTLE = Effort(segments=6, samples=2, steps=2, long=4, frames=2, ladder=(1, 2, 3), levels=2)


class Studio:
    """The model, the photos and the effort."""

    def __init__(self, effort: Effort = Effort()) -> None:
        self.effort = effort

    @cached_property
    def classifier(self) -> pysal.models.Classifier:
        """The network as it was loaded; its class names, and the size of its photos."""
        return pysal.models.load("efficientnet-lite0")

    @cached_property
    def model(self) -> pysal.PreparedModel:
        """The network, prepared."""
        return pysal.prepare(self.classifier, self.photo("siamese_cat"), batch_size=8)

    def photo(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return a photo (1, 3, H, W), by default as the network wants it."""
        path = ROOT / f"pysal/data/photos/{name}.jpg"
        return pysal.read_image(path, size=size) if size else pysal.read_image(path, self.classifier)

    @cached_property
    def smooth_ig(self) -> viz.Panel:
        """Smoothed Integrated Gradients of the Siamese cat, which two pictures show."""
        return self.smooth(self.photo("siamese_cat"), "integrated_gradients", "Smoothed IG", steps=self.effort.steps)

    @cached_property
    def everything(self) -> pysal.Explanation:
        """All methods on the Siamese cat, which two plots compare."""
        options: dict[str, dict[str, Any]] = {
            "leave_one_out": {"segments": pysal.Slic(self.effort.segments)},
            "smooth_grad": {"samples": self.effort.samples},
            "integrated_gradients": {"steps": self.effort.long // 4},
            "blur_integrated_gradients": {"steps": self.effort.long // 2},
        }
        return pysal.explain(self.model, self.photo("siamese_cat"), method_options=options)

    def smooth(self, image: Tensor, base: str, title: str, **options: Any) -> viz.Panel:
        """Return the panel of a method's mean over noisy copies."""
        samples = self.effort.samples
        panel = self.panel(image, "smooth_grad", title=title, base=base, method_options=options, samples=samples)
        return dataclasses.replace(panel, small_print=f"mean over {samples} noisy copies")

    def panel(self, image: Tensor, method: str, target: int | None = None, *, title: str = "", **options: Any) -> viz.Panel:
        """Explain an image by one method; return how its map is drawn."""
        found = pysal.explain(self.model, image, target, methods=[method], method_options={method: options})
        panel = found.panel(method)
        return dataclasses.replace(panel, title=title) if title else panel

    def picture(self, image: Tensor, panels: list[viz.Panel], target: int | None = None) -> Figure:
        """Draw the photo and the maps under the name and the probability of what is explained."""
        with torch.no_grad():
            probabilities = torch.softmax(self.classifier(image), 1)[0]
        index = int(probabilities.argmax()) if target is None else target
        name = self.classifier.class_names[index]
        return viz.draw(image[0], panels, title=name, subtitle="EfficientNet-Lite0", probability=float(probabilities[index]))


# Two methods side by side ------------------------------------------------------------------------------------------------


def grid_and_superpixels(studio: Studio) -> Figure:
    """Leave-one-out, by a grid and by superpixels."""
    image = studio.photo("tabby_cat")
    grid = studio.panel(image, "leave_one_out", title="Leave-one-out, grid", segments=pysal.Grid(7, 7))
    slic = studio.panel(image, "leave_one_out", title="Leave-one-out, superpixels", segments=pysal.Slic(studio.effort.segments))
    return studio.picture(image, [grid, slic])


def leave_one_out_and_gradient(studio: Studio) -> Figure:
    """Leave-one-out and the gradient."""
    image = studio.photo("tabby_cat")
    slic = studio.panel(image, "leave_one_out", segments=pysal.Slic(studio.effort.segments))
    return studio.picture(image, [slic, studio.panel(image, "gradient")])


def gradient_and_guided(studio: Studio) -> Figure:
    """The gradient and guided backprop."""
    image = studio.photo("siamese_cat")
    return studio.picture(image, [studio.panel(image, "gradient"), studio.panel(image, "guided_backprop")])


def guided_and_smooth_guided(studio: Studio) -> Figure:
    """Guided backprop, and its mean over noisy copies."""
    image = studio.photo("siamese_cat")
    smooth = studio.smooth(image, "guided_backprop", "Smoothed guided backprop")
    return studio.picture(image, [studio.panel(image, "guided_backprop"), smooth])


def guided_and_smooth_ig(studio: Studio) -> Figure:
    """Guided backprop and smoothed Integrated Gradients."""
    image = studio.photo("siamese_cat")
    return studio.picture(image, [studio.panel(image, "guided_backprop"), studio.smooth_ig])


def smooth_ig_and_smooth_blur_ig(studio: Studio) -> Figure:
    """Smoothed Integrated Gradients and smoothed Blur Integrated Gradients, with both boundaries."""
    image = studio.photo("siamese_cat")
    blurs = [
        studio.smooth(
            image,
            "blur_integrated_gradients",
            f"Smoothed Blur IG, {words}",
            steps=studio.effort.steps,
            max_sigma=20.0,
            boundary=boundary,
        )
        for boundary, words in (("constant", "black rim"), ("reflect", "mirrored"))
    ]
    return studio.picture(image, [studio.smooth_ig, *blurs])


def two_classes(studio: Studio) -> Image.Image:
    """Guided backprop, Grad-CAM and Guided Grad-CAM of two classes on one picture, made of two photos."""
    image = torch.cat([studio.photo(name, (256, 192)) for name in ("persian_cat", "coffee")], 3)
    rows = []
    for target in (studio.classifier.class_index("Persian cat"), studio.classifier.class_index("espresso")):
        found = pysal.explain(studio.model, image, target, methods=["guided_backprop", "grad_cam", "guided_grad_cam"])
        rows.append(_rendered(studio.picture(image, [found.panel(name) for name in found.results], target)))
    stacked = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    stacked.paste(rows[0], (0, 0))
    stacked.paste(rows[1], (0, rows[0].height))
    return stacked


# Numbers along an axis ---------------------------------------------------------------------------------------------------


def drops(studio: Studio) -> Figure:
    """The drop of each superpixel."""
    options = {"leave_one_out": {"segments": pysal.Slic(studio.effort.segments)}}
    found = pysal.explain(studio.model, studio.photo("tabby_cat"), methods=["leave_one_out"], method_options=options)
    return found.plot(kind="drops")


def agreement(studio: Studio) -> Figure:
    """How alike the methods rank the pixels."""
    return studio.everything.plot(kind="agreement", options={"absolute": True})


def deletion_insertion(studio: Studio) -> Figure:
    """The probability while important pixels are replaced, or shown."""
    return studio.everything.plot(kind="deletion_insertion", model=studio.model, options={"steps": studio.effort.levels})


def convergence(studio: Studio) -> Figure:
    """The error of path methods over the number of steps."""
    *steps, reference = studio.effort.ladder
    few = {"steps": steps[0]}
    found = pysal.explain(studio.model, studio.photo("siamese_cat"), methods=PATHS, method_options=dict.fromkeys(PATHS, few))
    return found.plot(kind="convergence", model=studio.model, options={"steps": steps, "reference": reference})


# Paths ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """A path integral, stretch by stretch.

    Attributes:
        method: whose path it is.
        title: what the animation shows.
        axis: what `places` are.
        places: (T + 1,) the ends of the stretches on the path.
        images: (T + 1, 3, H, W) the image there.
        scores: (T + 1,) the score there.
        sums: (T + 1, 3, H, W) the integral up to there; the first is 0, the last the method's map.
    """

    method: str
    title: str
    axis: str
    places: list[float]
    images: Tensor
    scores: Tensor
    sums: Tensor


Points = Callable[[Tensor], tuple[Tensor, Tensor]]


def walk(
    model: Any, points: Points, target: int, stretches: int, steps: int, *, backwards: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up gradients along a path by the midpoint rule in t, where the place on the path is t^2, as the methods do.

    Args:
        model: images -> (B, K) scores.
        points: places (N,) on the path, in [0, 1] -> images there, and what each gradient is multiplied by.
        target: class index.
        stretches: T.
        steps: gradients in all.
        backwards: from place 1 to place 0, the integral being that from 1 to 0.

    Returns:
        The images (T + 1, C, H, W) and scores (T + 1,) at the ends of the stretches, and the sums (T + 1, C, H, W) up to there.
    """
    each = steps // stretches
    order = list(range(stretches))[:: -1 if backwards else 1]
    ends = torch.linspace(0, 1, stretches + 1, dtype=torch.float64).square()
    images, _ = points(ends.flip(0) if backwards else ends)
    with torch.no_grad():
        scores = torch.cat([model(image[None])[:, target] for image in images])
    sums = [torch.zeros_like(images[0])]
    for stretch in order:
        t = (torch.arange(stretch * each, (stretch + 1) * each, dtype=torch.float64) + 0.5) / (stretches * each)
        batch, factors = points(t.square())
        slopes = pysal.gradient(model, batch, [target] * each)
        weights = (2 * t / (stretches * each)).to(slopes.dtype).view(-1, 1, 1, 1)
        sums.append(sums[-1] + (weights * slopes * factors).sum(0))
    return images, scores, torch.stack(sums)


def straight(image: Tensor, baseline: Tensor) -> Points:
    """Return the path of Integrated Gradients from a baseline to an image, both (1, C, H, W)."""

    def points(places: Tensor) -> tuple[Tensor, Tensor]:
        shares = places.to(image.dtype).view(-1, 1, 1, 1)
        return baseline + shares * (image - baseline), (image - baseline).expand(len(places), -1, -1, -1)

    return points


def blurring(image: Tensor, most: float) -> Points:
    """Return the path of Blur IG from an image (1, C, H, W), place 0, to its blur of width `most`, place 1."""

    def points(places: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = (most * places).tolist()
        images = image.expand(len(sigmas), -1, -1, -1)
        levels, slopes = ops.gaussian_scale_space_derivative(images, sigmas, step=0.01, boundary="reflect")
        return levels, -most * slopes

    return points


def integrated_gradients_path(studio: Studio) -> list[Image.Image]:
    """The path of Integrated Gradients with the running sum."""
    image, effort = studio.photo("siamese_cat"), studio.effort
    target = studio.classifier.class_index("Siamese cat")
    found = walk(studio.model, straight(image, torch.zeros_like(image)), target, effort.frames, effort.long)
    places = torch.linspace(0, 1, effort.frames + 1).square().tolist()
    title = "Integrated Gradients: from black to the photo"
    return animated(Walk("integrated_gradients", title, "brightness", places, *found))


def blur_integrated_gradients_path(studio: Studio) -> list[Image.Image]:
    """The path of Blur Integrated Gradients with the running sum."""
    image, effort, most = studio.photo("siamese_cat"), studio.effort, 50.0
    target = studio.classifier.class_index("Siamese cat")
    found = walk(studio.model, blurring(image, most), target, effort.frames, effort.long, backwards=True)
    places = (most * torch.linspace(1, 0, effort.frames + 1).square()).tolist()
    title = "Blur Integrated Gradients: from blurred to sharp"
    return animated(Walk("blur_integrated_gradients", title, "blur, pixels", places, *found))


BLOCK = 4  # pixels: single ones would be too fine for a moving picture; the sum of a block still counts in full
TILE, LEFT, APART, TOP = 1.6, 0.2, 0.16, 0.78  # inches


def animated(path: Walk) -> list[Image.Image]:
    """Return a frame for each end of a stretch."""
    sums = path.sums.sum(1)
    sums = avg_pool2d(sums[:, None], BLOCK, divisor_override=1)[:, 0]
    pieces = torch.diff(sums, dim=0, prepend=sums[:1])
    totals = path.sums.sum((1, 2, 3))
    bounds = viz.limits(pieces), viz.limits(sums[-1])
    return [_rendered(_frame(path, place, (pieces[place], sums[place]), bounds, totals)) for place in range(len(sums))]


def _frame(
    path: Walk, place: int, maps: tuple[Tensor, Tensor], bounds: tuple[tuple[float, float], ...], totals: Tensor
) -> Figure:
    page = viz.Page((2 * LEFT + 3 * TILE + 2 * APART, TOP + TILE + 2.0))
    page.text(path.title, LEFT, 0.3, 11, weight="bold")
    photo = path.images[-1]
    tiles: list[tuple[str, viz.Array, tuple[float, float] | None]]
    tiles = [("The image on the way", viz.photo(path.images[place]), None)]
    for heading, map, limits in zip(("What this stretch adds", "Sum so far: the map"), maps, bounds, strict=True):
        large = map.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tiles.append((heading, viz.overlay(photo, large, signed=True, bounds=limits), limits))
    for column, (heading, picture, reach) in enumerate(tiles):
        left = LEFT + column * (TILE + APART)
        page.text(heading, left, TOP - 0.12, 8, weight="bold")
        page.axes(left, TOP, TILE, TILE).imshow(picture, interpolation="antialiased")
        under = TOP + TILE + 0.16
        if reach is None:
            page.text(f"{path.axis} {viz.number(path.places[place])}", left, under, 7, viz.GREY)
        else:
            page.text(f"colours: ±{viz.number(reach[1])} logit", left, under, 7, viz.GREY)
    _curve(page, path, place, totals)
    return page.figure


def _curve(page: viz.Page, path: Walk, place: int, totals: Tensor) -> None:
    """Draw the score on the way, and the running sum that should follow it."""
    change = (path.scores - path.scores[0]).double()
    both = torch.cat([change, totals.double()])
    air = 0.08 * float(both.max() - both.min())
    low, high = float(both.min()) - air, float(both.max()) + air
    left, top, wide, tall = LEFT + 0.45, TOP + TILE + 0.55, 3 * TILE + 2 * APART - 0.55, 1.1
    axes = page.axes(left, top, wide, tall)
    axes.set(xlim=(path.places[0], path.places[-1]), ylim=(low, high))
    step = 10 if high - low > 25 else 5 if high - low > 10 else 2
    for tick in range(step * int(np.ceil(low / step)), int(high) + 1, step):
        axes.axhline(tick, color="#e3e5e9", linewidth=0.7, zorder=0)
        page.text(viz.number(tick), left - 0.06, top + tall * (high - tick) / (high - low) + 0.035, 6.5, align="right")
    colour = LOOKS[path.method][0]
    axes.plot(path.places, change, color="#9a9da5", linewidth=2.4)
    axes.plot(path.places[: place + 1], totals[: place + 1], color=colour, linewidth=1.3)
    axes.plot([path.places[place]], [float(totals[place])], color=colour, marker="o", markersize=4, clip_on=False)
    base = top + tall + 0.16
    page.text(viz.number(path.places[0]), left, base, 6.5)
    page.text(viz.number(path.places[-1]), left + wide, base, 6.5, align="right")
    page.text(path.axis, left + wide / 2, base, 7, viz.GREY, align="center")
    page.text("logit gained on the way", left, top - 0.08, 7, "#6c6f77", weight="bold")
    words = f"sum of the map {viz.number(float(totals[place]))}, off by {viz.number(float(totals[place] - change[place]))}"
    page.text(words, left + wide, top - 0.08, 7, colour, weight="bold", align="right")


# Files -------------------------------------------------------------------------------------------------------------------


def _rendered(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Image.open(buffer).convert("RGB")


PICTURES: dict[str, Callable[[Studio], Figure | Image.Image | list[Image.Image]]] = {
    picture.__name__: picture
    for picture in (
        grid_and_superpixels,
        leave_one_out_and_gradient,
        gradient_and_guided,
        guided_and_smooth_guided,
        guided_and_smooth_ig,
        smooth_ig_and_smooth_blur_ig,
        two_classes,
        integrated_gradients_path,
        blur_integrated_gradients_path,
        drops,
        agreement,
        deletion_insertion,
        convergence,
    )
}


def make(name: str, studio: Studio, folder: Path) -> Path:
    """Make one picture and write it: a PNG, or an animated WebP that holds its last frame."""
    made = PICTURES[name](studio)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(made, list):
        path = folder / f"{name}.webp"
        durations = [120] * (len(made) - 1) + [3000]
        made[0].save(
            path, save_all=True, append_images=made[1:], duration=durations, loop=0, quality=85, allow_mixed=True, method=4
        )
        return path
    path = folder / f"{name}.png"
    (made if isinstance(made, Image.Image) else _rendered(made)).save(path, optimize=True)
    return path


@click.command()
@click.option("--only", type=click.Choice(list(PICTURES)), multiple=True, help="Make these alone.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, help="Folder to write into.")
def main(only: tuple[str, ...], out: Path) -> None:
    """Make the pictures of docs/gallery.md."""
    studio = Studio()
    for name in only or PICTURES:
        began = time.process_time()
        path = make(name, studio, out)
        click.echo(f"{path}: {path.stat().st_size // 1000} kB, {time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
