"""A prepared model's passes do not wait for the system to hand out again the memory that they have just given back."""

import os
import subprocess
import sys

import pytest

from pysal.engine.running import heap

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


def faults(told: str) -> float:
    script = SCRIPT.format(told=told)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.usefixtures("without_settings")
def test_memory_that_was_freed_is_there_in_the_next_pass() -> None:
    if not heap.keep_freed_memory.__wrapped__():
        pytest.skip("no glibc")
    told = "from pysal.engine.running.heap import keep_freed_memory; assert keep_freed_memory()"
    # the pages of one of sixteen maps: fewer mean that the maps themselves were there
    assert faults(told) < 20_000_000 / os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
@pytest.mark.usefixtures("without_settings")
def test_what_the_user_has_chosen_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not heap.keep_freed_memory.__wrapped__()


@pytest.mark.usefixtures("without_settings")
def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep_freed_memory.__wrapped__()
