"""docs/evidence.md: its tables are those of the committed numbers, and the composites know their objects exactly."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from pysal.models.spec import imagenet_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_evidence", ROOT / "docs/make_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses ask for
    spec.loader.exec_module(module)
    return module


def test_all_that_states_a_result_is_written_from_the_numbers(script: ModuleType) -> None:
    found = json.loads((ROOT / "docs/evidence.json").read_text())
    text = (ROOT / "docs/evidence.md").read_text()
    written = text.partition("<!-- measured -->\n\n")[2].partition("\n<!-- end of what was measured -->")[0]
    assert written == script.page(found)
    for name, one in found["sets"].items():
        assert all(table.keys() == one["agreement"].keys() for table in one["estimates"].values())
        assert f"\n**{name}** ({one['images']} images): " in written
        assert len(one["published"]) == len(script.PUBLISHED)


def test_a_published_order_is_held_beside_differences_of_images(script: ModuleType) -> None:
    claim = script.Claim("Somebody, 2020", "https://example.org", "deletion", "rise", "gradient")
    random = np.random.default_rng(0)
    ahead, behind = random.normal(0.2, 0.1, 9), random.normal(0.5, 0.1, 9)
    behind[3] = np.nan
    found = script.against(claim, {"deletion": {"rise": ahead, "gradient": behind}})
    gained = np.delete(behind - ahead, 3)  # less is better
    expected = scipy.stats.ttest_1samp(gained, 0).confidence_interval(0.95)
    assert found["images"] == 8
    assert [found["ahead"], found["low"], found["high"]] == pytest.approx([gained.mean(), expected.low, expected.high])
    assert script.against(claim, {"deletion": {"rise": ahead[:4], "gradient": behind[:4]}}) is None, "of three images"
    assert script.against(claim, {"deletion": {"rise": ahead}}) is None


def test_claims_and_stamps_are_of_what_there_is(script: ModuleType) -> None:
    assert {claim.figure for claim in script.PUBLISHED} <= script.FIGURES.keys()
    assert {name for claim in script.PUBLISHED for name in (claim.ahead, claim.behind)} <= set(script.METHODS)
    assert len(set(script.STAMPS.values())) == len(script.STAMPS), "a grid holds four classes"
    assert set(script.STAMPS.values()) <= set(imagenet_names()[0])


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
