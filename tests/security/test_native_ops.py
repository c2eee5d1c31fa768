"""No argument of a native op ends the process: they are made up in a process of its own, which says what it will call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pysal import _library
from pysal.testing import Backend, backends

ROOT = Path(__file__).parents[2]
ATTACK = bool(os.environ.get("PYSAL_ATTACK"))  # set by `make attack`
NAMESPACES = {"cpu": "pysal", "emulated": "pysal_emu"}
EXAMPLES = {"pysal": 20_000 if ATTACK else 60, "pysal_emu": 2_000 if ATTACK else 20}  # of each op
SEED = int(os.environ.get("PYSAL_ATTACK") or 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
@pytest.mark.parametrize("backend", [one for one in backends(native_only=True) if one.device == "cpu"], ids=str)
def test_no_argument_ends_the_process(backend: Backend) -> None:
    namespace = NAMESPACES[backend.name]
    command = [sys.executable, str(Path(__file__).with_name("native_ops.py")), namespace, str(EXAMPLES[namespace]), str(SEED)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TORCH_SHOW_CPP_STACKTRACES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    *calls, last = done.stdout.splitlines()
    assert done.returncode == 0, f"after {len(calls)} calls, exit status {done.returncode} in {last}: {done.stderr[-500:]}"
    assert len({call.split("(")[0] for call in calls}) == len(_library.SCHEMAS)
    assert "accepted" in last
    assert "refused" in last
