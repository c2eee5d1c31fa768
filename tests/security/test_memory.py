"""Memory that runs out, wherever it does, ends in the same map or in a MemoryError: in a process of limited memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = range(8, 400, 8) if os.environ.get("PYSAL_ATTACK") else (12, 40, 80, 120, 200)  # MB above what is in use

# Each limit is that of the process alone, and is taken away before the next: what fails does so in an allocator. The calls are
# made in a thread, whose stack is there from the beginning: the process's own grows, and the kernel ends it where it cannot.
SCRIPT = """
import resource, sys, threading, warnings
import torch
from torch import nn
import pysal
warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
method, prepares, limits = sys.argv[1], sys.argv[2] == "True", [int(one) for one in sys.argv[3:]]
layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
images = torch.rand(16, 3, 128, 128)
if prepares:
    model = pysal.prepare(model, images[:1], batch_size=16)
call = lambda rows: getattr(pysal, method)(model, images, 1, batch_size=rows)
expected = call(1)
for rows in (2, 4, 8, 16):  # oneDNN compiles its kernels now: where it has no memory for their code, its own calls crash
    call(rows)
def run():
    for limit in limits:
        used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (used + (limit << 20), resource.RLIM_INFINITY))
        try:
            found, outcome = call(16), "a map"
        except MemoryError:
            found, outcome = expected, "MemoryError"
        except RuntimeError as error:
            from pysal.engine.running.chunks import says_out_of_memory
            found, outcome = expected, "MemoryError" if says_out_of_memory(error) else f"FAILED {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        same = (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        print(limit, outcome if same else "FAILED another map", flush=True)
threading.stack_size(64 << 20)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
@pytest.mark.parametrize("prepares", [False, True], ids=["model", "prepared"])
@pytest.mark.parametrize("method", ["guided_grad_cam"])
def test_memory_that_runs_out_is_seen(method: str, prepares: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, method, str(prepares), *map(str, LIMITS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(LIMITS)
    assert [line for line in lines if "FAILED" in line] == []
