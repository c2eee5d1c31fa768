"""The gallery: its paths are the methods', its pictures can be made, and the pages show what lies in docs."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import pysal

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


gallery = load()


# The paths


@pytest.fixture
def model() -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return layers.double().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_walk_of_integrated_gradients_ends_in_its_map(model: torch.nn.Module, image: torch.Tensor) -> None:
    images, scores, sums = gallery.walk(model, gallery.straight(image, image * 0), 2, stretches=3, steps=12)
    expected = pysal.integrated_gradients(model, image, 2, steps=12)[0]
    torch.testing.assert_close(sums[-1], expected, rtol=1e-10, atol=1e-12)
    assert images.shape == sums.shape == (4, 3, 8, 8)
    assert not images[0].any()
    torch.testing.assert_close(images[1], image[0] / 9)  # a third of the way in t is a ninth of the brightness
    assert not sums[0].any()
    with torch.no_grad():
        torch.testing.assert_close(scores, torch.stack([model(each[None])[0, 2] for each in images]))


def test_the_walk_of_blur_integrated_gradients_ends_in_its_map(model: torch.nn.Module, image: torch.Tensor) -> None:
    path = gallery.blurring(image, 4.0)
    images, _, sums = gallery.walk(model, path, 2, stretches=3, steps=12, backwards=True)
    options = {"steps": 12, "max_sigma": 4.0, "boundary": "reflect"}
    expected = pysal.blur_integrated_gradients(model, image, 2, **options)[0]
    torch.testing.assert_close(sums[-1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(images[-1], image[0])
    assert images[0].std() < image.std() / 3


# The pictures


@pytest.mark.slow
def test_every_picture_can_be_made(tmp_path: Path) -> None:
    studio = gallery.Studio(gallery.LITTLE)
    for name in gallery.PICTURES:
        path = gallery.make(name, studio, tmp_path)
        with Image.open(path) as made, Image.open(DOCS / "gallery" / path.name) as kept:
            assert (made.format, made.mode) == (kept.format, kept.mode)
            assert getattr(made, "n_frames", 1) == (gallery.LITTLE.frames + 1 if path.suffix == ".webp" else 1)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in pictures("gallery")}


def pictures(folder: str) -> list[Path]:
    return [path for path in (DOCS / folder).rglob("*") if path.suffix in (".png", ".webp", ".jpg", ".gif", ".svg")]


def shown(page: Path) -> set[Path]:
    return {(page.parent / target).resolve() for target in re.findall(r"!\[[^]]+\]\(([^)\s]+)\)", page.read_text())}


def test_every_picture_of_the_docs_is_shown() -> None:
    pages = [ROOT / "README.md", *(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
    seen = set().union(*(shown(page) for page in pages))
    kept = [path for path in pictures("") if not {"_build", "_static"} & set(path.relative_to(DOCS).parts)]
    assert {path.resolve() for path in kept} - seen == set()


def test_the_page_shows_the_whole_gallery() -> None:
    names = {path.stem for path in pictures("gallery")}
    assert names == set(gallery.PICTURES)
    assert {path.stem for path in shown(DOCS / "gallery.md") if path.parent.name == "gallery"} == names


def test_the_gallery_is_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in pictures("gallery")) < 6_000_000


@pytest.mark.parametrize("name", ["integrated_gradients_path", "blur_integrated_gradients_path"])
def test_animations_repeat_and_hold_their_end(name: str) -> None:
    with Image.open(DOCS / f"gallery/{name}.webp") as movie:
        assert movie.n_frames == gallery.Effort().frames + 1
        assert movie.info["loop"] == 0
        movie.seek(movie.n_frames - 1)
        movie.load()
        assert movie.info["duration"] >= 2000
