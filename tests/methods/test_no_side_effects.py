"""Nothing a call touches is different afterwards, whatever mode it was made in and however it ended."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from tests.methods.calls import CALLS, VARIANTS, Watched, row_by_row
from tests.methods.networks import images

INPUTS = images(3, 3, 8, 8)
EXPLAIN: dict[str, Callable[..., Any]] = {
    "explain": lambda model, inputs, target=None, **options: pysal.explain(
        model,
        inputs,
        target=target,
        method_options={
            "leave_one_out": {"segments": pysal.Grid(2, 2)},
            "smooth_grad": {"samples": 3},
            "integrated_gradients": {"steps": 3},
            "blur_integrated_gradients": {"steps": 3, "max_sigma": 2.0},
        },
        **options,
    ),
}
ALL = {**VARIANTS, **EXPLAIN}


class Everything(nn.Module):
    """A network with buffers, shared and frozen parameters and hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = row_by_row()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.shared = self.net.first.weight
        self.net.second.bias.requires_grad_(False)
        self.double().eval()
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
        self.norm.register_forward_hook(lambda *_: None)
        self.net.first.register_full_backward_hook(lambda *_: None)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.drop(self.norm(inputs)))


HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def snapshot(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Everything a call could leave changed, as comparable values."""
    found: dict[str, Any] = {
        "inputs": (inputs.detach().clone(), inputs.requires_grad, inputs.stride(), inputs._version),
        "gradient": inputs.grad if inputs.is_leaf else None,
        "rng": torch.get_rng_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "torch functions": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "scripts": torch._C._get_graph_executor_optimize(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "globals": [len(getattr(torch.nn.modules.module, name)) for name in vars(torch.nn.modules.module) if "_hooks" in name],
    }
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.clone()
        found[f"parameter {name}"] = (parameter.detach().clone(), parameter.requires_grad, grad, parameter._version)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = (buffer.clone(), buffer._version)
    for name, module in model.named_modules():
        found[f"module {name}"] = (module.training, [list(getattr(module, hooks)) for hooks in HOOKS], sorted(vars(module)))
    return found


def assert_same(before: Any, after: Any, what: str = "") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), what
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), what
        for key in before:
            assert_same(before[key], after[key], key)
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_same(one, other, what)
    else:
        assert before == after, what


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ALL)
def test_everything_is_as_before(method: str, mode: str) -> None:
    model, inputs = Everything(), INPUTS.clone()
    expected = ALL[method](model, inputs.clone())
    with MODES[mode]():
        before = snapshot(model, inputs)
        found = ALL[method](model, inputs)
        assert_same(before, snapshot(model, inputs))
    if method not in EXPLAIN:
        assert torch.equal(found, expected)
        assert not found.requires_grad


@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
@pytest.mark.parametrize("ending", ["error", "cancelled", "out of memory"])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.usefixtures("independence_is_known")
def test_everything_is_as_before_a_call_that_ended_early(method: str, ending: str, mode: str) -> None:
    cancel, passes = threading.Event(), [0]
    error = {"error": ArithmeticError, "cancelled": pysal.Cancelled, "out of memory": MemoryError}[ending]

    def before_pass(batch: Tensor) -> None:
        passes[0] += 1
        if passes[0] == 2:
            if ending == "cancelled":
                cancel.set()
            else:
                raise error

    model, inputs = Watched(Everything(), before_pass), INPUTS.clone()
    with MODES[mode]():
        before = snapshot(model, inputs)
        with pysal.progress(False, cancel=cancel), pytest.raises(error):
            ALL[method](model, inputs, batch_size=1)
        assert_same(before, snapshot(model, inputs))
    # a pass in which ReLUs hide is made once more, in another way, before the queue looks at the event
    again = ending == "cancelled" and ("guided" in method or method in EXPLAIN)
    assert passes[0] in ((2, 3) if again else (2,))


@pytest.mark.parametrize("method", CALLS)
def test_errors_of_a_layer_or_a_target_leave_nothing_behind(method: str) -> None:
    model, inputs = Everything(), INPUTS.clone()
    before = snapshot(model, inputs)

    def target(output: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        CALLS[method](model, inputs, target)
    if "grad_cam" in method:
        with pytest.raises(ValueError, match="second run"):
            CALLS[method](model, inputs, layer="net.relu")
        with pytest.raises(ValueError, match="tokens"):
            CALLS[method](model, inputs, layer="net.second", tokens="vit")
    assert_same(before, snapshot(model, inputs))


def shifted(inputs: Tensor) -> Tensor:
    """The same values in a storage that holds something else before and after each row."""
    wide = torch.full((*inputs.shape[:3], inputs.shape[3] + 2), 9.0, dtype=inputs.dtype)
    wide[..., 1:-1] = inputs
    return wide[..., 1:-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda inputs: inputs.contiguous(memory_format=torch.channels_last),
    "transposed": lambda inputs: inputs.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a larger tensor": shifted,
    "expanded": lambda inputs: inputs[:1].expand(3, -1, -1, -1),
    "requires grad": lambda inputs: inputs.clone().requires_grad_(),
    "of a graph": lambda inputs: inputs.clone().requires_grad_() * 1,
    "a parameter": lambda inputs: nn.Parameter(inputs.clone()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", CALLS)
def test_layouts_and_graphs_of_the_inputs(method: str, layout: str) -> None:
    inputs = LAYOUTS[layout](INPUTS)
    expected = CALLS[method](row_by_row(), inputs.detach().clone(memory_format=torch.contiguous_format), [2, 2, 0])
    before = snapshot(row_by_row(), inputs)
    found = CALLS[method](row_by_row(), inputs, [2, 2, 0])
    assert_same(before["inputs"], snapshot(row_by_row(), inputs)["inputs"])
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # other layouts, other order of sums in float64


@pytest.mark.parametrize("method", CALLS)
def test_inputs_made_in_inference_mode(method: str) -> None:
    model = row_by_row()
    expected = CALLS[method](model, INPUTS)
    with torch.inference_mode():
        inputs = INPUTS.clone()
    assert torch.equal(CALLS[method](model, inputs), expected)
    with torch.inference_mode():
        found = CALLS[method](model, inputs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", CALLS)
def test_models_made_in_inference_mode(method: str) -> None:
    with torch.inference_mode():
        model = row_by_row()
    if method == "leave_one_out":
        assert torch.equal(CALLS[method](model, INPUTS, 1), CALLS[method](row_by_row(), INPUTS, 1))
        return
    for given in (model, pysal.prepare(model, INPUTS)):
        with pytest.raises(pysal.NotApplicable) as caught:
            CALLS[method](given, INPUTS, 1)
        assert str(caught.value) == (
            f"pysal.{method}: model must be made outside torch.inference_mode, whose tensors have no gradients, got 'weights'; "
            "leave_one_out explains such a model"
        )


def own_class(output: Tensor, rows: Tensor) -> Tensor:
    return output[torch.arange(len(rows)), rows % 4]


TARGETS: dict[str, Callable[[], Any]] = {
    "classes": lambda: torch.arange(len(INPUTS)) % 4,
    "a margin": lambda: pysal.Margin(torch.arange(len(INPUTS)) % 3, 3),
    "a row target": lambda: pysal.RowTarget(own_class),
    "callables": lambda: [lambda output, c=c: output[:, c % 4] for c in range(len(INPUTS))],
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", CALLS)
def test_targets_in_other_modes(method: str, target: str, mode: Callable[[], Any]) -> None:
    expected = CALLS[method](row_by_row(), INPUTS, TARGETS[target]())
    with mode():
        assert torch.equal(CALLS[method](row_by_row_outside(), INPUTS.clone(), TARGETS[target]()), expected)


def row_by_row_outside() -> nn.Module:
    with torch.inference_mode(False):
        return row_by_row()


def test_randomisation_in_inference_mode() -> None:
    model, options = row_by_row(), {"method": "gradient", "layers": ["second", "first"]}
    expected = pysal.metrics.parameter_randomisation(model, INPUTS, 1, **options)
    with torch.inference_mode():
        found = pysal.metrics.parameter_randomisation(model, INPUTS, 1, **options)
    assert torch.equal(found.correlation, expected.correlation)


@pytest.mark.parametrize(("shape", "word"), [((3,), pysal.PerImage), ((), pysal.Shared), ((), lambda extra: extra)])
@pytest.mark.parametrize("method", CALLS)
def test_extra_inputs_made_in_inference_mode(method: str, shape: tuple[int, ...], word: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        extra = torch.full(shape, 2.0, dtype=torch.float64)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = row_by_row()

        def forward(self, inputs: Tensor, factor: Tensor) -> Tensor:
            return self.net(inputs * (factor[:, None, None, None] if factor.ndim else factor))

    model = Scaled().eval()
    with torch.inference_mode():
        found = CALLS[method](model, INPUTS, extra_inputs=[word(extra)])
    assert torch.equal(found, CALLS[method](model, INPUTS, extra_inputs=[word(extra.clone())]))


class Overwriting(nn.Module):
    """Normalises its input in place, as a careless model does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = row_by_row()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.mul_(2.0).sub_(0.5))


class Polite(Overwriting):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs * 2.0 - 0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", VARIANTS)
def test_model_that_overwrites_its_input(method: str, mode: str) -> None:
    inputs, model = INPUTS.clone(), Overwriting().eval()
    expected = VARIANTS[method](Polite().eval(), inputs)
    with MODES[mode]():
        found = VARIANTS[method](model, inputs)
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CALLS)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    model, inputs = row_by_row().to(dtype), INPUTS.to(dtype)
    found = CALLS[method](model, inputs, 1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.isfinite().all()
    assert CALLS[method](model, inputs, 1, dtype=torch.bfloat16).dtype == torch.bfloat16
    wide = CALLS[method](model, inputs, 1, dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(wide.to(found.dtype), found)


def assert_two_threads_agree(call: Callable[..., Tensor], model: nn.Module, batch: Tensor) -> None:
    """Hold that two threads that explain other images of one model find what each alone does, and leave it as it was."""
    work: list[tuple[Tensor, Any]] = [(batch, 1), (batch.flip(0), [0, 1, 2])]
    expected, failed = [call(model, inputs, target) for inputs, target in work], []
    before = snapshot(model, batch)
    start = threading.Barrier(2)

    def repeat(index: int) -> None:
        try:
            start.wait(600)
            for _ in range(3):
                assert torch.equal(call(model, *work[index]), expected[index])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert_same(before, snapshot(model, batch))


@pytest.mark.parametrize("method", VARIANTS)
def test_two_threads_explain_the_same_model(method: str) -> None:
    assert_two_threads_agree(VARIANTS[method], Everything(), INPUTS)


def test_explanation_keeps_its_own_images() -> None:
    inputs = INPUTS.clone()
    found = pysal.explain(row_by_row(), inputs, methods=["gradient"])
    inputs.zero_()
    assert torch.equal(found.images, INPUTS)
