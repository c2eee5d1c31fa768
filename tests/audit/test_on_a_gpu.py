"""An audit on a pretended GPU: the rows are those of a CPU, and images are copied there from pinned memory."""

from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from pysal.engine.tape.cuda_graphs import Pool
from tests.pretended import GPU, Elsewhere, Pretended, moved, pretend_gpu, waits
from tests.test_on_a_gpu import played_again


def to_the_gpu(to: Any) -> Any:
    """`Tensor.to`, which below every mode refuses the name of a GPU where there is none."""

    def moved_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Elsewhere) and "cuda" in str((args[:1], kwargs.get("device"))):
            return torch.ops.aten._to_copy.default(self, device=GPU, non_blocking=kwargs.get("non_blocking", False))
        return to(self, *args, **kwargs)

    return moved_to


def pinned_where_asked(empty: Any) -> Any:
    """`torch.empty`, of which pinned memory is any memory that says so."""

    def made(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        found: Tensor = empty(*size, **kwargs)
        if pin_memory:
            found.pinned = True  # type: ignore[attr-defined]
        return found

    return made


def test_rows_are_those_of_a_cpu_and_no_batch_is_waited_for(job, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"methods": ["gradient", "grad_cam"], "method_options": {}, "together": 2, "maps": "float16"}
    expected = job(out="cpu", device="cpu", **options)
    expected.run(engine="inline")
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(Pool, "capture", played_again)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: moved(self))
    monkeypatch.setattr(Tensor, "to", to_the_gpu(Tensor.to))
    monkeypatch.setattr(torch, "empty", pinned_where_asked(torch.empty))
    with Pretended(GPU):
        planned = job(out="gpu", device="cuda", **options)
        with waits() as seen:
            assert planned.run(engine="inline").complete
    copies = {place: count for place, count in seen.items() if place.startswith("copy from the host in audit")}
    assert not copies
    for name in options["methods"]:
        found, wanted = (
            pq.read_table(one.out / "shards", filters=[("method", "=", name)]).sort_by("id").to_pylist()
            for one in (planned, expected)
        )
        for row, other in zip(found, wanted, strict=True):
            assert row["predicted"] == other["predicted"]
            assert row["score"] == pytest.approx(other["score"], rel=1e-5)
            assert row["map_scale"] == pytest.approx(other["map_scale"], rel=1e-4)
