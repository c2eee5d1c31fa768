"""docs/evidence.md: its tables are those of the committed numbers, and the composites know their objects exactly."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_evidence", ROOT / "docs/make_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_numbers(script: ModuleType) -> None:
    found = json.loads((ROOT / "docs/evidence.json").read_text())
    assert script.tables(found) in (ROOT / "docs/evidence.md").read_text()
    for one in found.values():
        assert all(table.keys() == one["agreement"].keys() for table in one["estimates"].values())


def test_composites_know_their_objects(script: ModuleType, tmp_path: Path) -> None:
    name = next(iter(script.STAMPS))
    (tmp_path / name).parent.mkdir(parents=True)
    stamp = np.zeros((60, 90, 4), np.uint8)
    stamp[10:50, 20:80] = (255, 0, 255, 255)  # of a colour that the noise does not have, with a border to cut away
    Image.fromarray(stamp).save(tmp_path / name)
    [(photo, label)] = script.composites(tmp_path, tmp_path / "out").items()
    assert label == script.STAMPS[name]
    pixels = np.asarray(Image.open(photo)).astype(int)
    mask = np.asarray(Image.open(tmp_path / "out/masks" / photo.name))
    assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(mask == 255, (pixels == (255, 0, 255)).all(axis=2))
    rows, columns = np.nonzero(mask)
    assert 0.5 * script.SIDE <= np.ptp(columns) + 2 <= 0.65 * script.SIDE + 2
    assert min(rows.min(), columns.min()) >= script.SIDE / 16, "what is cut away when a photo is read holds none of it"
    again = script.composites(tmp_path, tmp_path / "again")
    assert np.array_equal(np.asarray(Image.open(next(iter(again)))), pixels)
