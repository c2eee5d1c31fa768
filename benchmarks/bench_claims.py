"""Time outside the model and bytes kept, against what is said of them. Run by `make bench`."""

import gc
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysal
from benchmarks.bench_methods import MAX_SIGMA, NOISE, Subject, subject_of
from benchmarks.common import first_run, memory_now, return_free_memory, seconds_of
from benchmarks.conftest import MethodReport
from benchmarks.networks import NETWORKS, ON_A_CPU

STEPS, ROUNDS = 50, 2
HELD = 8  # images in the batch whose backward pass is waited for

PATHS: dict[str, Callable[[Subject], Tensor]] = {
    "integrated_gradients": lambda subject: pysal.integrated_gradients(
        subject.fast, subject.image, subject.target, steps=STEPS, quadrature="gauss_legendre", placement="uniform"
    ),
    "smooth_grad": lambda subject: pysal.smooth_grad(subject.fast, subject.image, subject.target, samples=STEPS, noise=NOISE),
    "blur_integrated_gradients": lambda subject: pysal.blur_integrated_gradients(
        subject.fast, subject.image, subject.target, steps=STEPS, max_sigma=MAX_SIGMA, quadrature="left", placement="uniform"
    ),
}


def bare_pass(subject: Subject) -> None:
    """Forward and input gradient of one chunk of the prepared model, and nothing else."""
    batch = subject.image.repeat(subject.fast.rows or 1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    leaf = batch.requires_grad_()
    torch.autograd.grad(subject.fast(leaf)[:, subject.target].sum(), leaf)


@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize("network", ON_A_CPU)
def test_time_outside_the_model(method: str, network: str, benchmark: Any, method_report: MethodReport) -> None:
    subject = subject_of(network)
    chunks = -(-STEPS // (subject.fast.rows or 1))
    ratios: list[float] = []

    def bare() -> None:
        for _ in range(chunks):
            bare_pass(subject)

    def both() -> None:
        model = seconds_of(bare) * STEPS / (chunks * (subject.fast.rows or 1))
        ratios.append(seconds_of(lambda: PATHS[method](subject)) / model)

    bare_pass(subject)
    benchmark.pedantic(both, rounds=ROUNDS)
    method_report.claim(f"{method}: time / ({STEPS} x bare forward and input gradient)", statistics.median(ratios), 1.05)


def held_bytes(model: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """What a process holds between the forward pass and the backward pass."""
    leaf = images.clone().requires_grad_()
    model(leaf)  # arranges its own buffers
    return_free_memory()
    before = memory_now("VmRSS")
    output = model(leaf)
    gc.collect()
    return_free_memory()
    held = memory_now("VmRSS") - before
    assert output.requires_grad
    return held


@pytest.mark.parametrize("method", ["held_for_backward"])
@pytest.mark.parametrize("network", ON_A_CPU)
def test_bytes_held_for_the_backward_pass(method: str, network: str, benchmark: Any, method_report: MethodReport) -> None:
    subject = subject_of(network)
    images = subject.image.repeat(HELD, 1, 1, 1)
    frozen = NETWORKS[network]().requires_grad_(False)
    ours = benchmark.pedantic(held_bytes, args=(subject.fast, images), rounds=1)
    method_report.claim("bytes held for the backward pass / autograd's", ours / held_bytes(subject.model, images), 0.25)
    method_report.claim(
        "bytes held for the backward pass / autograd's with frozen weights", ours / held_bytes(frozen, images), None
    )


@pytest.mark.parametrize("method", ["memory_of_steps"])
@pytest.mark.parametrize("network", ["efficientnet_lite0"])  # on the larger one it would take minutes
def test_memory_does_not_grow_with_steps(method: str, network: str, benchmark: Any, method_report: MethodReport) -> None:
    subject = subject_of(network)

    def peak(steps: int) -> int:
        return first_run(lambda: pysal.integrated_gradients(subject.fast, subject.image, subject.target, steps=steps))[2]

    peak(8)
    few = peak(50)
    many = benchmark.pedantic(peak, args=(500,), rounds=1)
    method_report.claim("peak memory of IG with 500 steps / with 50", many / few, 1.1)
