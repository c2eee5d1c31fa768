"""An interrupt, wherever it comes, leaves the process as it was: calls are interrupted in a process of its own, which tells."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pysal

ROOT = Path(__file__).parents[2]
ATTACK = bool(os.environ.get("PYSAL_ATTACK"))  # set by `make attack`: every place, not some

# how many places the quick run goes on from one interrupt to the next, each call of each kind of state in its turn
EVERY = {
    "guided_backprop": 13,
    "guided_grad_cam, prepared": 29,
    "grad_cam": 29,
    "integrated_gradients, measured": 71,
    "integrated_gradients, mixed": 71,
    "leave_one_out": 71,
    "prepare": 101,
    "in inference_mode": 29,
    "in autocast": 29,
    "captum": 71,
    "gradient": 37,
    "guided_backprop, prepared": 37,
    "guided_grad_cam": 71,
    "class_gradients": 37,
    "integrated_gradients, bf16": 101,
    "blur_integrated_gradients": 101,
    "smooth_grad": 101,
    "explain": 151,
    "captum, ablation": 41,
    "in no_grad, prepared": 71,
    "prepare in inference_mode": 211,
}


def test_an_interrupt_leaves_nothing_behind() -> None:
    """No mode on torch's stacks, no hook, mark or patch, no setting, and the same gradients afterwards."""
    calls = [f"{name}:{1 if ATTACK else every}:{1 if ATTACK else 1 + every // 2}" for name, every in EVERY.items()]
    command = [sys.executable, str(Path(__file__).with_name("interrupts.py")), *calls]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if "LEFT" in line] == []
    interrupted = dict(re.findall(r"^(.+): (\d+) interrupted$", done.stdout, re.MULTILINE))
    assert set(interrupted) == set(EVERY)
    assert min(map(int, interrupted.values())) > 2


# calls that import the most of what is imported late; the others with `make attack`
FIRST = ("gradient", "grad_cam", "leave_one_out", "ops")
SEED = os.environ.get("PYSAL_ATTACK") or "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each interrupt has a process of its own")
def test_an_interrupt_of_the_first_call_leaves_no_half_import() -> None:
    """No op registered twice, no module of sympy's or scikit-image's that is half there: the next call is right."""
    names = (*FIRST, "prepare", "explain", "metrics") if ATTACK else FIRST
    tries = 100 if ATTACK else 2
    command = [sys.executable, str(Path(__file__).with_name("first_calls.py")), str(tries), SEED, *names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) * (tries + 1)
    assert [line for line in lines if ": right " not in line] == []


class Impatient(nn.Module):
    """Is interrupted in its own pass, or in the gradients that come back through it, when it was asked `at` times."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.at, self.asked = network, 0, 0
        self.eval()

    def ask(self, *_: object) -> None:
        self.asked += 1
        if self.asked == self.at:
            raise KeyboardInterrupt

    def forward(self, images: Tensor) -> Tensor:
        self.ask()
        scores = self.network(images)
        if scores.requires_grad:
            scores.register_hook(self.ask)
        return scores


@pytest.mark.parametrize(
    "method", ["guided_backprop", "guided_grad_cam", "integrated_gradients", "smooth_grad", "leave_one_out", "explain"]
)
def test_an_interrupt_of_the_model_itself_is_passed_on(method: str) -> None:
    """Whichever pass it comes in, forward or backward, the caller gets it, and what was set is as it was."""
    from tests.security import interrupts

    model = Impatient(interrupts.model)
    options = {"segments": pysal.Grid(2, 2)} if method == "leave_one_out" else {}
    call = functools.partial(getattr(pysal, method), model, interrupts.images, 1, **options)
    call()
    passes, before, gradient = model.asked, interrupts.state(), interrupts.plain_gradient()
    assert passes >= 2
    for at in range(1, passes + 1, max(1, passes // 8)):
        model.asked, model.at = 0, at
        with pytest.raises(KeyboardInterrupt):
            call()
        assert interrupts.changed(before) == []
        assert torch.equal(interrupts.plain_gradient(), gradient)
