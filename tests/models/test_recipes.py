"""The code of docs/recipes that needs a library's model runs, with one of random weights in its place."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pysal
from tests.models.test_tasks import TOKENS, TorchvisionDetector, captioner, clip, made, segformer
from tests.models.test_wrap import vit

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
MARK = "<!-- run by tests/models/test_recipes.py -->"
BLOCK = re.compile(rf"^{MARK}\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def folder() -> dict[str, Any]:
    vit().save_pretrained("folder")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("folder")
    return {}


def processor() -> Any:
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


# What a page takes as given.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "transformers_classifier": folder,
    "caption": lambda: {"model": pysal.models.wrap(made(captioner), processor()), "tokens": TOKENS},
    "clip": lambda: {
        "clip": made(clip),
        "processor": processor(),
        "input_ids": torch.tensor([[1, 2, 3, 29], [1, 4, 5, 29], [1, 6, 7, 29]]),
    },
    "segmentation": lambda: {"segmenter": made(segformer)},
    "detection": dict,
}


def test_every_page_is_here() -> None:
    assert {page.stem for page in RECIPES.glob("*.md") if MARK in page.read_text()} == set(GIVEN)


@pytest.mark.parametrize("page", GIVEN)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(RECIPES.parents[1] / "examples")
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page]()
    if page == "detection":
        names["detector"] = TorchvisionDetector.make(monkeypatch)
    blocks = BLOCK.findall((RECIPES / f"{page}.md").read_text())
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/recipes/{page}.md, block {number}", "exec"), names)
    found = names.get("found")
    assert found is None or any(bool(one.map.any()) for one in found.results.values())
