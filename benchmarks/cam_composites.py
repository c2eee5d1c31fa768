"""Whether kinds of class activation map find one photo among four: `python -m benchmarks.cam_composites`.

Four photos make a picture, each in a quarter of it. The class of one of them, which the classifier gives it alone, is
explained. A map is right where its highest pixel lies in that photo's quarter; chance is a quarter. The second number is the
share of the map's sum in there.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

import pysal
from pysal.methods.traits import CAMS

PHOTOS = Path(__file__).resolve().parents[1] / "examples/photos"
# What 1280 passes for each of the pictures take is left out.
KINDS = [kind for kind in CAMS if kind not in ("score_cam", "ablation_cam")]
LAYERS = {
    "the last, 7 x 7": None,
    "block 10, 14 x 14": "network.model._blocks.10",
    "block 4, 28 x 28": "network.model._blocks.4",
}


def composites(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, 224, 224), the class that is asked for in each, and where its photo is (B, 224, 224)."""
    photos = torch.cat([pysal.read_image(str(path), model) for path in sorted(PHOTOS.glob("*.jpg"))])
    with torch.no_grad():
        classes = model(photos).argmax(1)
    small = F.interpolate(photos, (112, 112), mode="bilinear", antialias=True)
    pictures, asked, masks = [], [], []
    for first, place in itertools.product(range(len(photos)), range(4)):
        others = [n for n in range(len(photos)) if classes[n] != classes[first]]
        chosen = [others[(first + place + step) % len(others)] for step in range(3)]
        chosen.insert(place, first)
        rows = [torch.cat([small[chosen[row]], small[chosen[row + 1]]], 2) for row in (0, 2)]
        pictures.append(torch.cat(rows, 1))
        asked.append(classes[first])
        mask = torch.zeros(224, 224, dtype=torch.bool)
        mask[112 * (place // 2) : 112 * (place // 2) + 112, 112 * (place % 2) : 112 * (place % 2) + 112] = True
        masks.append(mask)
    return torch.stack(pictures), torch.stack(asked), torch.stack(masks)


def main() -> None:
    model = pysal.models.load("efficientnet-lite0")
    pictures, asked, masks = composites(model)
    print(f"{len(pictures)} pictures of four photos")
    for title, layer in LAYERS.items():
        for kind in KINDS:
            maps = pysal.grad_cam(model, pictures, asked.tolist(), layer=layer, kind=kind)
            found = pysal.metrics.pointing_game(maps, masks, tolerance=0.0).mean()
            inside = pysal.metrics.mass_in_mask(maps, masks).nanmean()
            print(f"{title:20} {CAMS[kind]:22} {float(found):.2f} {float(inside):.2f}", flush=True)


if __name__ == "__main__":
    main()
