"""One walk finds the files of a folder: hidden ones left out, each folder entered once."""

import os
from pathlib import Path

import pytest

from pysal import annotations
from pysal._folders import files_below
from pysal.audit import data
from pysal.cli.photos import find
from pysal.comparison import experiment


def _tree(root: Path) -> set[Path]:
    """Write files in and below a folder, hidden ones, a link to a folder elsewhere and links that lead in circles."""
    elsewhere = root / "elsewhere"
    photos = root / "photos"
    for file in (photos / "a.png", photos / "deep" / "er" / "b.PNG", photos / ".hidden.png", photos / ".cache" / "c.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    elsewhere.mkdir()
    (elsewhere / "d.png").write_bytes(b"")
    os.symlink(elsewhere, photos / "linked")
    os.symlink(elsewhere, photos / "linked-again")
    os.symlink(photos, photos / "deep" / "circle")
    return {photos / "a.png", photos / "deep" / "er" / "b.PNG", photos / "linked" / "d.png"}


def test_each_file_is_found_once_and_hidden_ones_are_not(tmp_path: Path) -> None:
    expected = _tree(tmp_path)
    found = list(files_below(tmp_path / "photos"))
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("other_path", [False, True])
def test_a_skipped_folder_is_not_entered_by_any_path(tmp_path: Path, other_path: bool) -> None:
    expected = _tree(tmp_path)
    skipped = tmp_path / "elsewhere" if other_path else tmp_path / "photos" / "linked"
    assert set(files_below(tmp_path / "photos", skipped)) == {file for file in expected if "linked" not in str(file)}


def test_a_folder_that_is_skipped_is_walked_when_it_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert list(files_below(tmp_path, tmp_path)) == [tmp_path / "a.png"]


def test_every_command_finds_the_same_photos(tmp_path: Path) -> None:
    expected = _tree(tmp_path)
    photos = tmp_path / "photos"
    assert set(find([photos], [".png"]).paths) == expected
    assert set(experiment._photos(photos, frozenset([".png"]), None, None)) == expected
    found = data._photos(photos, frozenset([".png"]))
    assert set(found) == expected
    assert annotations.files_below is files_below
