"""Draw the pictures of the recipes: `python docs/recipes/draw.py [common_det.onnx]`, a file of the PyPI package ddddocr."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import pysal

HERE = Path(__file__).resolve().parent
OUT = HERE / "pictures"


def save(found: pysal.Explanation, name: str) -> None:
    """Write the panel of an explanation as a photo that a page can show."""
    file = io.BytesIO()
    found.plot().savefig(file, format="png", dpi=110)
    picture = Image.open(file).convert("RGB")
    OUT.mkdir(exist_ok=True)
    picture.resize((960, round(960 * picture.height / picture.width))).save(OUT / f"{name}.jpg", quality=85, optimize=True)


def of_a_page(name: str) -> None:
    """Run a page's code and draw what it found."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (HERE / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block.replace('found.save("errors")', ""), name, "exec"), names)
    save(names["found"], name)


class Detector(nn.Module):
    """ddddocr's, of images in [0, 1]: it takes blue first, in [0, 255]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Return boxes (1, 3549, 6) of images (1, 3, 416, 416)."""
        return self.network(images.flip(1) * 255)


def detection(file: str) -> None:
    """Explain what makes a detector of characters find the first of three."""
    import onnx
    import onnx2torch

    picture = Image.new("RGB", (416, 416), (235, 235, 230))
    for text, place in (("A", (60, 70)), ("7", (250, 100)), ("K", (150, 270))):
        ImageDraw.Draw(picture).text(place, text, fill=(40, 60, 120), font=ImageFont.load_default(60))
    model = Detector(onnx2torch.convert(onnx.load(file))).eval()
    found = pysal.explain(
        model,
        pysal.read_image(np.asarray(picture)),
        pysal.targets.Box(0, layout="yolox"),
        methods=["gradient", "leave_one_out"],
        method_options={"leave_one_out": {"segments": pysal.Grid(13, 13)}},
        batch_size=1,
    )
    save(found, "detection")


if __name__ == "__main__":
    torch.manual_seed(0)
    for page in ("my_networks_errors", "http_black_box"):
        of_a_page(page)
    if sys.argv[1:]:
        detection(sys.argv[1])
