"""Every op on CUDA as programs use it: captured in a graph and replayed on other numbers, and on two streams at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import CASES, Case, results, written
from pysal.testing import require_native, required

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and "cuda" not in required(), reason="no CUDA device: graphs and streams run on one only"
)
# the first case of each op, at the size that a model gives it
ONE_EACH = list({case.op: case for case in reversed(CASES)}.values())
of_ops = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)


def build(case: Case, seed: int) -> tuple[Any, ...]:
    """Arguments on the GPU, complete when this returns."""
    require_native(case.op, "cuda")
    torch.manual_seed(seed)
    arguments = case.build(torch.device("cuda"))
    torch.cuda.synchronize()
    return arguments


def tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    return (value for value in arguments if isinstance(value, Tensor))


@pytest.fixture(autouse=True)
def seeds_left_alone() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@of_ops
def test_capture_and_replay(case: Case) -> None:
    """A replay computes from what the arguments hold then, so nothing was read, copied or decided on the host."""
    op = getattr(torch.ops.pysal, case.op).default
    captured = tuple(value.clone() if isinstance(value, Tensor) else value for value in build(case, 0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded at their first launch, which a capture does not allow
        op(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = op(*captured)
    returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
    for seed in (1, 2):
        fresh = build(case, seed)
        expected = results(case.op, op, fresh)
        for target, source in zip(tensors(captured), tensors(fresh), strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        for actual, wanted in zip([*returned, *written(case.op, captured)], expected, strict=True):
            assert torch.equal(actual, wanted)


@of_ops
def test_two_streams_at_once(case: Case) -> None:
    """Each stream's calls wait for its own work and not for the other's; a kernel on the wrong stream reads too early."""
    op = getattr(torch.ops.pysal, case.op).default
    sets = [build(case, seed) for seed in (0, 1)]
    expected = [results(case.op, op, arguments) for arguments in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    outcomes = []
    for _ in range(4):
        for stream, arguments, wanted in zip(streams, sets, expected, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # cycles; the copies of the arguments that the op reads come after
                outcomes.append((results(case.op, op, arguments), wanted))
    torch.cuda.synchronize()
    for actual, wanted in outcomes:
        assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))
