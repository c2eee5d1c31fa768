"""The faults of `make mutate` fit the kernels as they are, cover them, and the committed table is of these faults."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("mutate", ROOT / "tests/emu/mutate.py")
assert _spec is not None
assert _spec.loader is not None
mutate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutate)


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: f"{fault.stem}: {fault.name}")
def test_every_fault_changes_its_source(fault) -> None:
    source = (ROOT / f"csrc/cuda/{fault.stem}.cu").read_text()
    assert fault.seeded(source) != source


def test_every_kernel_file_and_every_kind_has_faults() -> None:
    assert {fault.stem for fault in mutate.FAULTS} == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {fault.kind for fault in mutate.FAULTS} == set(mutate.KINDS)
    assert len({(fault.stem, fault.name) for fault in mutate.FAULTS}) == len(mutate.FAULTS) >= 20


def test_the_committed_table_has_every_fault_and_each_was_seen() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| (.+?) \| (.*) \|$", mutate.PAGE.read_text(), re.MULTILINE)
    listed = {(stem, kind, name): set(verdicts.split(" | ")) for stem, kind, name, verdicts in rows if stem != "source"}
    assert set(listed) == {(fault.stem, fault.kind, fault.name) for fault in mutate.FAULTS}
    assert not [name for name, verdicts in listed.items() if verdicts <= {"-", mutate.NOT_TRIED}]
