"""A dataset of small photos, good and bad, and what to compare of two audits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pysal.audit import Job

PHOTOS = 11


def write_photo(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((20 + seed, 24), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of eleven photos in two folders, cat/ and dog/."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(PHOTOS):
        write_photo(folder / ("cat" if n % 2 else "dog") / f"{n:02d}.png", n)
    return folder


@pytest.fixture
def job(photos, tmp_path, monkeypatch):
    """Make a job of the tiny classifier over the photos: four shards, two methods."""

    def make(source: Path = photos, out: str = "out", *, together: int = 2, **options: object) -> Job:
        monkeypatch.setattr("pysal.audit.job.images_together", lambda *_: together)
        given = {
            "model": "tests.audit.tiny:classifier",
            "methods": ["gradient", "leave_one_out"],
            "method_options": {"leave_one_out": {"segments": "grid:2x2"}},
            "shard_size": 3,
        }
        return Job(source, out=tmp_path / out, **(given | options))

    return make


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of all that must not depend on who computed it."""
    names = [out / "plan.parquet", *(out / "shards").iterdir(), *(out / "errors").iterdir()]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}
