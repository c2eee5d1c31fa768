"""What a worker of an audit sets so that numbers are added in one order, and that it is as before afterwards."""

import pytest
import torch

from pysal.audit.shard import in_one_order
from pysal.engine.running.states import restoring


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("timing", [False, True])
def test_kernels_of_cudnn(deterministic: bool, timing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", deterministic)
    monkeypatch.setattr(cudnn, "benchmark", timing)

    @restoring
    def run(device: str) -> tuple[bool, bool]:
        with in_one_order(device):
            seen = cudnn.deterministic, cudnn.benchmark
            if device == "cuda:1":
                raise ArithmeticError(*seen)
        return seen

    assert run("cuda") == (True, False)
    assert run("cpu") == (deterministic, timing)
    with pytest.raises(ArithmeticError) as caught:
        run("cuda:1")
    assert caught.value.args == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, timing)
