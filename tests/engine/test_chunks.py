"""The one queue: what it hands out, how it meets the end of memory, what it reports, how it is stopped."""

import errno
import itertools
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysal
from pysal.engine.running import chunks
from tests.methods.calls import VARIANTS, Watched, row_by_row
from tests.methods.networks import images

CPU = torch.device("cpu")
OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "NumPy": lambda: MemoryError("Unable to allocate 2.00 GiB for an array"),
    "CUDA, asynchronously": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuDNN": lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
    "this package": lambda: RuntimeError("pysal: out of memory: no room for a tensor of 4096 elements"),
    "the C++ library": lambda: RuntimeError("std::bad_alloc"),
    "the operating system": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
}


PHOTO_BYTES = 3 * 224 * 224 * 4


def run(total: int, body: Callable[[int, int], None], batch_size: int | None = None, row_bytes: int = PHOTO_BYTES) -> None:
    chunks.run_chunks(total, body, label="rows", batch_size=batch_size, device=CPU, row_bytes=row_bytes)


class Body:
    """Notes the slices it was given; fails where it is told to, before anything is noted."""

    def __init__(self, fails: Callable[[int, int], Exception | None] = lambda start, stop: None) -> None:
        self.fails, self.tried, self.done = fails, [], []
        self.tried: list[tuple[int, int]]
        self.done: list[int]

    def __call__(self, start: int, stop: int) -> None:
        self.tried.append((start, stop))
        if (error := self.fails(start, stop)) is not None:
            raise error
        self.done.extend(range(start, stop))


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("batch_size", [None, 1, 4, 7, 100])
def test_slices_are_consecutive_and_no_larger_than_asked_for(total: int, batch_size: int | None) -> None:
    body = Body()
    run(total, body, batch_size)
    assert body.done == list(range(total))
    size = batch_size or chunks.CPU_ROWS  # of rows as large as those of photos
    assert [stop - start for start, stop in body.tried] == [size] * (total // size) + [total % size] * (total % size > 0)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.usefixtures("independence_is_known")
def test_no_pass_of_any_method_has_more_rows_than_asked_for(method: str, batch_size: int) -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    VARIANTS[method](model, images(4, 3, 8, 8), 1, batch_size=batch_size)
    assert max(rows) == batch_size


@pytest.mark.usefixtures("independence_is_known")
def test_images_and_steps_share_the_queue() -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    pysal.integrated_gradients(model, images(3, 3, 8, 8), 1, steps=5, batch_size=4)
    assert rows == [4, 4, 4, 3]


def allocate(floats: int, live: list[Tensor]) -> None:
    live.append(torch.zeros(floats))


def test_first_row_is_measured_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 * (1000 + 3000)

    def body(start: int, stop: int) -> None:
        sizes.append(stop - start)
        live: list[Tensor] = []
        allocate(1000 * (stop - start), live)
        allocate(3000 * (stop - start), live)

    for free, expected in (
        (2 * 3 * row, [1, 3, 3, 3]),  # half of it is used: three rows
        (2 * 3 * row - 1, [1, 2, 2, 2, 2, 1]),
        (1, [1] * 10),  # never less than one row
        (10**9, [1, 4, 4, 1]),  # never more than are fast
    ):
        sizes: list[int] = []
        monkeypatch.setattr(chunks, "free_memory", lambda *_, free=free: free)
        run(10, body, row_bytes=10**6)
        assert sizes == expected, free
    monkeypatch.setattr(chunks, "free_memory", lambda *_: 10**6)
    sizes = []
    run(10, body, row_bytes=50)  # even a generous guess, 1000 times the input of all rows, fits into half of it
    assert sizes == [10]
    sizes = []
    run(11, body, row_bytes=50)
    assert sizes[0] == 1
    sizes = []
    run(10, body, batch_size=5, row_bytes=10**6)  # who says how many rows knows
    assert sizes == [5, 5]


@pytest.mark.parametrize(
    ("row", "rows"),
    [
        ((3, 224, 224), 4),
        ((3, 1000, 1000), 4),
        ((3, 112, 112), 16),
        ((3, 32, 32), 196),
        ((1, 28, 28), 768),
        ((1, 1, 10), 60211),
    ],
)
def test_a_pass_of_small_rows_has_the_bytes_of_four_photos(
    row: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "free_memory", lambda *_: 10**12)
    assert chunks.fast_rows(CPU, math.prod(row) * 4) == rows
    body = Body()
    run(2 * rows + 1, body, row_bytes=math.prod(row) * 4)
    sizes = [stop - start for start, stop in body.tried]
    measured = [1] * (rows > chunks.UNMEASURED_ROWS)  # nobody knows what so many rows need
    assert sizes[: len(measured)] == measured
    assert sizes[len(measured)] == rows


def test_many_rows_are_measured_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(start: int, stop: int) -> None:
        sizes.append(stop - start)
        allocate(1000 * (stop - start), [])

    monkeypatch.setattr(chunks, "free_memory", lambda *_: 2 * 4000 * 300)
    sizes: list[int] = []
    run(1000, body, row_bytes=1)
    assert sizes == [1, 300, 300, 300, 99]


def test_memory_used_again_counts_once_and_at_its_largest() -> None:
    with chunks._AllocationMeter() as meter:
        one = torch.zeros(1000)
        one.view(10, 100).add_(1)
    assert meter.bytes == 4000
    block = bytearray(4000)  # stands for one that an allocator gives out again
    with chunks._AllocationMeter() as meter:
        for floats in (10, 1000, 100):
            torch.frombuffer(block, dtype=torch.float32, count=floats).view(-1)
    assert meter.bytes == 4000


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_chunk_is_halved_until_it_fits(kind: str) -> None:
    body = Body(lambda start, stop: OUT_OF_MEMORY[kind]() if stop - start > 3 else None)
    run(20, body, batch_size=13)
    assert body.done == list(range(20))
    assert [stop - start for start, stop in body.tried] == [13, 6, 3, 3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("short_of_memory", [False, True])
def test_row_that_does_not_fit(kind: str, short_of_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if short_of_memory:
        monkeypatch.setattr(chunks, "free_memory", lambda *_: 1)
    body = Body(lambda start, stop: OUT_OF_MEMORY[kind]() if stop > 5 else None)
    with pytest.raises(MemoryError, match=r"^pysal: one row of rows does not fit into the memory of cpu$") as caught:
        run(20, body)
    assert body.done == list(range(5))
    assert chunks.is_out_of_memory(caught.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), KeyError("y")])
def test_other_errors_pass_through_at_once(error: Exception) -> None:
    body = Body(lambda start, stop: error if start else None)
    with pytest.raises(type(error)) as caught:
        run(20, body)
    assert caught.value is error
    assert body.tried == [(0, 4), (4, 8)]


def test_tensors_of_the_failed_chunk_are_gone_when_the_next_begins() -> None:
    class Block:
        living = 0

        def __init__(self) -> None:
            Block.living += 1

        def __del__(self) -> None:
            Block.living -= 1

    def body(start: int, stop: int) -> None:
        assert Block.living == 0
        _block = Block()
        if stop - start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run(10, body)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ctx.error


def failing(seed: int) -> tuple[Watched, list[int]]:
    """A model that runs out of memory in the first and every third or so pass of several rows, and the rows of those passes."""
    chance, failed = random.Random(seed), []

    def before(batch: Tensor) -> None:
        if len(batch) > 1 and (not failed or chance.random() < 0.35):
            failed.append(len(batch))
            raise OUT_OF_MEMORY[chance.choice(list(OUT_OF_MEMORY))]()

    return Watched(row_by_row(), before), failed


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("batch_size", [None, 5])
def test_no_method_loses_or_repeats_a_row_when_memory_runs_out(method: str, batch_size: int | None) -> None:
    inputs = images(5, 3, 8, 8)
    undisturbed = VARIANTS[method](row_by_row(), inputs, [0, 1, 2, 3, 0], batch_size=batch_size)
    failures = 0
    for seed in range(3):
        model, failed = failing(seed)
        assert torch.equal(VARIANTS[method](model, inputs, [0, 1, 2, 3, 0], batch_size=batch_size), undisturbed)
        failures += len(failed)
    assert failures >= 3, "too few failures to show anything"


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smooth_grad", "blur_integrated_gradients", "grad_cam"])
def test_memory_may_run_out_in_the_backward_pass_too(method: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.passes = row_by_row(), 0
            self.eval()

        def forward(self, batch: Tensor) -> Tensor:
            self.passes += 1
            output: Tensor = self.net(batch)
            if torch.is_grad_enabled() and len(batch) > 1 and self.passes % 3 == 1:
                output = FailsInBackward.apply(output, OUT_OF_MEMORY["CPU"]())
            return output

    inputs, model = images(5, 3, 8, 8), Model()
    options = {"layer": "net.second"} if method == "grad_cam" else {}
    undisturbed = VARIANTS[method](model.net, inputs, 1, **({"layer": "second"} if options else {}))
    assert torch.equal(VARIANTS[method](model, inputs, 1, **options), undisturbed)
    assert model.passes > 2


def test_one_row_of_a_method_that_does_not_fit() -> None:
    def before(batch: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Watched(row_by_row(), before)
    for method in ("integrated_gradients", "smooth_grad"):
        with pytest.raises(MemoryError, match=rf"^pysal: one row of {method} does not fit into the memory of cpu$"):
            VARIANTS[method](model, images(2, 3, 8, 8), 1)


Seen = list[tuple[str, int, int]]


def test_progress_counts_rows_done() -> None:
    seen: Seen = []
    with pysal.progress(lambda *report: seen.append(report)):
        run(10, Body(lambda start, stop: OUT_OF_MEMORY["CPU"]() if stop - start > 3 else None), batch_size=4)
        assert seen == [("rows", 2, 10), ("rows", 4, 10), ("rows", 6, 10), ("rows", 8, 10), ("rows", 10, 10)]
    run(10, Body())
    assert len(seen) == 5, "reports outside the block"


def test_nested_queues_report_only_the_outermost() -> None:
    seen: Seen = []
    with pysal.progress(lambda *report: seen.append(report)):
        run(4, lambda start, stop: run(100, Body()), batch_size=2)
    assert seen == [("rows", 2, 4), ("rows", 4, 4)]


@pytest.mark.parametrize("method", VARIANTS)
def test_progress_of_methods_ends_where_it_should(method: str) -> None:
    seen: Seen = []
    with pysal.progress(lambda *report: seen.append(report)):
        VARIANTS[method](row_by_row(), images(2, 3, 8, 8), 1, batch_size=3)
    name = getattr(VARIANTS[method], "func", VARIANTS[method]).__name__
    assert {label for label, _, _ in seen} == {name}
    assert seen[-1][1] == seen[-1][2]
    for (_, before, old), (_, after, total) in itertools.pairwise(seen):
        assert 0 < after <= total
        assert (before < after and old == total) or before == old, "a queue ends before the next begins"


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    bars: list[Any] = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, file=open("/dev/null", "w"))
            bars.append(self)
            self.history: list[int] = []

        def update(self, n: float | None = 1) -> bool | None:
            found = super().update(n)
            self.history.append(int(self.n))
            return found

        def close(self) -> None:
            super().close()
            if hasattr(self, "history") and not self.fp.closed:
                self.fp.close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with pysal.progress():
        pysal.integrated_gradients(row_by_row(), images(2, 3, 8, 8), steps=5, batch_size=4)
        run(3, Body(), batch_size=2)
    # clean images, steps; then the other queue: a bar each, which ends full and is closed
    assert [bar.total for bar in bars] == [2, 10, 3]
    assert [bar.history for bar in bars] == [[2], [4, 8, 10], [2, 3]]
    assert all(bar.disable or bar.fp.closed for bar in bars)
    with pysal.progress(False):
        run(3, Body())
    assert len(bars) == 3


def test_cancel_is_heard_before_the_next_chunk() -> None:
    cancel, body = threading.Event(), Body()

    def step(start: int, stop: int) -> None:
        body(start, stop)
        if stop == 4:
            cancel.set()

    with (
        pysal.progress(False, cancel=cancel),
        pytest.raises(pysal.Cancelled, match=r"^pysal: cancelled after 4 of 10 rows of rows$"),
    ):
        run(10, step, batch_size=2)
    assert body.done == [0, 1, 2, 3]
    run(10, body)  # outside the block nobody listens


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.usefixtures("independence_is_known")
def test_another_thread_cancels_a_method(method: str) -> None:
    cancel, entered = threading.Event(), threading.Event()
    passes = 0

    def before(batch: Tensor) -> None:
        nonlocal passes
        passes += 1
        entered.set()
        assert cancel.wait(600)

    def stop() -> None:
        assert entered.wait(600)
        cancel.set()

    other = threading.Thread(target=stop)
    other.start()
    try:
        with pysal.progress(False, cancel=cancel), pytest.raises(pysal.Cancelled):
            VARIANTS[method](Watched(row_by_row(), before), images(3, 3, 8, 8), batch_size=1)
    finally:
        cancel.set()
        other.join()
    assert passes == 1


@pytest.mark.parametrize(
    ("total", "most", "ends", "device", "expected"),
    [
        (50, 32, (), "cuda", [25, 25]),
        (1600, 128, (), "cuda", [124] * 12 + [112]),
        (50, 64, (), "cuda", [50]),
        (50, 32, (), "cpu", [32, 18]),
        (50, 32, (0, 40), "cuda", [32, 8, 10]),  # the groups were made for chunks of so many
    ],
)
def test_a_gpu_gets_chunks_of_one_size(total: int, most: int, ends: tuple[int, ...], device: str, expected: list[int]) -> None:
    body = Body()
    given: dict[str, Any] = {"label": "rows", "row_bytes": 1, "batch_size": most, "device": torch.device(device)}
    chunks.run_chunks(total, body, **given, ends=ends)
    assert [stop - start for start, stop in body.tried] == expected


@pytest.mark.parametrize("words", ["could not create a primitive", 'torch_call_dispatcher("aten::to", ...) API call failed'])
def test_an_error_that_may_mean_memory_halves_and_at_last_speaks_for_itself(words: str) -> None:
    fits = Body(lambda start, stop: RuntimeError(words) if stop - start > 2 else None)
    run(7, fits, 8)
    assert fits.done == list(range(7))
    with pytest.raises(RuntimeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        run(7, Body(lambda start, stop: RuntimeError(words)), 8)


def test_an_error_made_of_an_end_of_memory_is_one() -> None:
    error = RuntimeError("the model failed")
    error.__cause__ = MemoryError()
    assert chunks.is_out_of_memory(error)
    assert not chunks.is_out_of_memory(RuntimeError("the model failed"))
    assert not chunks.is_out_of_memory(ValueError("out of memory"))  # which a model says for a reason of its own
