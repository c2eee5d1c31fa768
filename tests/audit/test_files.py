"""A file of an audit is there whole or not at all."""

import os

import pytest

from pysal.audit.files import DiskFault, write


def test_a_file_takes_the_other_s_place_once_it_is_on_the_disk(tmp_path, monkeypatch) -> None:
    path = tmp_path / "00000.parquet"
    write(path, b"old")
    seen = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(path.read_bytes())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write(path, b"new")
    assert seen == [b"old", b"new"]  # the file before it is renamed, then the folder
    assert os.listdir(tmp_path) == [path.name]


def test_what_could_not_be_written_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "00000.parquet"
    write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFault, match=r"00000.parquet cannot be written \(no space left on device\)"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
