"""A model is prepared once as much is asked of it as makes up for that, and not before."""

import torch
from torch import nn

import pysal
from pysal.engine.prepared.payback import WORTH_PREPARING, OnceItPays
from pysal.methods.registry import METHODS


def test_it_is_prepared_once_and_when_it_pays() -> None:
    model, made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), []

    def prepare() -> pysal.PreparedModel:
        made.append(pysal.prepare(model, torch.rand(1, 3, 8, 8), batch_size=1))
        return made[0]

    ready = OnceItPays(model, prepare)
    assert ready.for_work(WORTH_PREPARING / 2) is model
    assert ready.for_work(WORTH_PREPARING / 2 - 1) is model
    assert not made
    assert ready.for_work(1) is made[0]
    assert ready.for_work(1e6) is made[0]
    assert len(made) == 1


def test_the_work_of_methods() -> None:
    work = {name: method.gradients({}) for name, method in METHODS.items()}
    assert all(work[name] == 1 for name in ("gradient", "guided_backprop", "grad_cam", "guided_grad_cam"))
    assert METHODS["integrated_gradients"].gradients({"steps": 7}) == 7
    assert METHODS["smooth_grad"].gradients({"samples": 9}) == 9
    cells = [METHODS["leave_one_out"].gradients({"segments": pysal.Grid(rows, 5)}) for rows in (2, 4)]
    assert cells[1] == 2 * cells[0] > 0
    assert sum(work.values()) > WORTH_PREPARING > work["leave_one_out"]


def test_what_prepared_models_alone_can_do_is_worth_any_preparing() -> None:
    assert METHODS["leave_one_out"].gradients({"segments": pysal.Grid(1, 2), "approximate": 0.5}) > WORTH_PREPARING
    assert METHODS["leave_one_out"].gradients({"segments": pysal.Grid(1, 2), "approximate": None}) < WORTH_PREPARING
