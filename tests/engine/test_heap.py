"""A prepared model's passes do not wait for the system to hand out again the memory that they have just given back."""

import gc
import os
import subprocess
import sys
from copy import copy as copy_of

import pytest
import torch

import pysal
from pysal.engine.prepared.gains import Gains
from pysal.engine.running import heap

GAINS = Gains(2.0, 2.0)

SCRIPT = """
import resource, torch
{told}
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        maps = [torch.zeros(megabytes * 250_000).add_(1) for megabytes in (20, 8, 24, 4, 28, 12, 16, 2) * 2]
        while maps:
            maps.pop()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count
rounds(2)
print(rounds(3))
"""


@pytest.fixture
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*heap._VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap, "_glibc", heap._glibc.__wrapped__)
    monkeypatch.setattr(heap, "_needed", {})


def faults(told: str) -> float:
    script = SCRIPT.format(told=told)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.usefixtures("without_settings")
def test_memory_that_was_freed_is_there_in_the_next_pass() -> None:
    if heap._glibc() is None:
        pytest.skip("no glibc")
    told = "from pysal.engine.running.heap import FreedMemory; kept = FreedMemory(); assert kept.is_kept"
    # the pages of one of sixteen maps: fewer mean that the maps themselves were there
    assert faults(told) < 20_000_000 / os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
@pytest.mark.usefixtures("without_settings")
def test_what_the_user_has_chosen_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not heap.FreedMemory().is_kept


@pytest.mark.usefixtures("without_settings")
def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.FreedMemory().is_kept


class Library:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.trim, self.trimmed = 0, 0

    def mallopt(self, option: int, value: int) -> int:
        if option == heap._TRIM_THRESHOLD:
            self.trim = value
        return 1

    def malloc_trim(self, left: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def library(without_settings: None, monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    return library


def test_no_more_is_kept_than_is_needed(library: Library) -> None:
    small = heap.FreedMemory(2**27)
    assert small.is_kept
    assert library.trim == 2**27
    large = heap.FreedMemory(2**40)
    assert library.trim == heap.MOST_FREE
    del large
    assert (library.trim, library.trimmed) == (2**27, 0)
    del small
    assert (library.trim, library.trimmed) == (heap._USUAL, 1)


def test_a_prepared_model_keeps_what_its_passes_need_while_it_lives(library: Library) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3)).eval()
    prepared = pysal.prepare(model, torch.rand(1, 3, 64, 64), gains=GAINS)
    values = 3 * 64 * 64 + 64 * 64 * 64 + 64 * 62 * 62
    least = 2 * 4 * values * 4 * 3 * 224 * 224 // (3 * 64 * 64)
    assert least <= library.trim < 4 * least
    copy = copy_of(prepared)
    del prepared
    gc.collect()
    assert library.trim >= least
    del copy
    gc.collect()
    assert (library.trim, library.trimmed) == (heap._USUAL, 1)


def test_what_runs_as_it_is_keeps_nothing(library: Library) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    prepared = pysal.prepare(model, torch.rand(1, 3, 16, 16), gains=Gains(0.5, 0.5, 0.5))
    assert not prepared.fused
    gc.collect()
    assert library.trim == heap._USUAL
