"""Interrupts calls of pysal at the places where Python takes note of one, and says what was left behind. To be run as a script.

An interrupt is noticed where a function begins and where one written in C has returned. A profiler is told of both, and what it
raises goes the same way: so every place has a number, and each can be tried. Usage: interrupts.py CALL:EVERY:FIRST ...
"""

import contextlib
import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import pysal
import pysal.captum
from pysal.engine.model import relu_rules
from pysal.engine.running import chunks
from pysal.segments import Grid

# whose functions change the state of a thread, or are between those that do
FILES = ("pysal/", "contextlib.py", "torch/overrides", "torch/autograd/grad_mode", "amp/autocast_mode", "_python_dispatch")
FILES += ("fx/_symbolic_trace", "torch/utils/_contextlib", "torch/utils/hooks", "torch/random")


class Interrupter:
    """Counts the places as they are passed, and interrupts at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.passed, self._at = 0, at

    def __enter__(self) -> "Interrupter":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "c_return") or not any(name in frame.f_code.co_filename for name in FILES):
            return
        self.passed += 1
        if self.passed == self._at:
            raise KeyboardInterrupt


class Net(nn.Module):
    """Convolutions, a batch norm and ReLUs, small enough for thousands of calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.second, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.relu(self.norm(self.first(images))))).mean((2, 3)))


images, model = torch.rand(2, 3, 8, 8), Net()
halves = torch.arange(2).repeat_interleave(4).expand(1, 3, 8, 8)
prepared = pysal.prepare(model, images)


def full_memory(*_: object) -> int:
    return 1 << 20


def measured() -> object:
    """Return a map whose rows are measured before they run together, as where memory is short."""
    before, chunks.free_memory = chunks.free_memory, full_memory
    try:
        return pysal.integrated_gradients(model, images, 1, steps=4)
    finally:
        chunks.free_memory = before


CALLS: dict[str, Callable[[], object]] = {
    "gradient": lambda: pysal.gradient(model, images, 1),
    "guided_backprop": lambda: pysal.guided_backprop(model, images, 1),
    "guided_backprop, prepared": lambda: pysal.guided_backprop(prepared, images, 1),
    "guided_grad_cam": lambda: pysal.guided_grad_cam(model, images, 1),
    "guided_grad_cam, prepared": lambda: pysal.guided_grad_cam(prepared, images, 1),
    "grad_cam": lambda: pysal.grad_cam(model, images),
    "class_gradients": lambda: pysal.class_gradients(prepared, images, [0, 2]),
    "integrated_gradients, measured": measured,
    "integrated_gradients, bf16": lambda: pysal.integrated_gradients(model, images, 1, steps=3, precision="bf16"),
    "integrated_gradients, mixed": lambda: pysal.integrated_gradients(model, images, 1, steps=3, precision="mixed"),
    "blur_integrated_gradients": lambda: pysal.blur_integrated_gradients(model, images, 1, steps=3),
    "smooth_grad": lambda: pysal.smooth_grad(model, images, 1, samples=3, seed=0),
    "leave_one_out": lambda: pysal.leave_one_out(prepared, images, 1, segments=Grid(2, 2)),
    "explain": lambda: pysal.explain(model, images, 1, methods=["guided_backprop", "grad_cam"]),
    "prepare": lambda: pysal.prepare(model, images, batch_size=1),
    "captum": lambda: pysal.captum.GuidedGradCam(model, model.second).attribute(images, 1),
    "captum, ablation": lambda: pysal.captum.FeatureAblation(model).attribute(images, target=1, feature_mask=halves),
}
# calls that are made where the user has set something
WITHIN: dict[str, tuple[Callable[[], Any], str]] = {
    "in inference_mode": (torch.inference_mode, "guided_grad_cam"),
    "in no_grad, prepared": (torch.no_grad, "guided_backprop, prepared"),
    "in autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "guided_backprop"),
    "prepare in inference_mode": (torch.inference_mode, "prepare"),
}


def state() -> dict[str, Any]:
    """Return all that a call might leave changed."""
    torch.autocast_increment_nesting()
    return {
        "nesting of autocast": torch.autocast_decrement_nesting(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "TorchScript's optimiser": torch._C._get_graph_executor_optimize(),
        "threads": torch.get_num_threads(),
        "random numbers": torch.get_rng_state().tolist(),
        "rules in force": relu_rules.current_rules(),
        "progress": chunks._reporting.get(),
        "nn.Module": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__),
        "functions": (torch.relu, torch.nn.functional.relu, torch.fx._symbolic_trace._is_fx_tracing_flag),
        "hooks": sum(
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "requires_grad": [(one.requires_grad, one.grad is None) for one in [*model.parameters(), *model.buffers(), images]],
        "training": [module.training for module in model.modules()],
        "warnings": len(warnings.filters),
    }


def changed(before: dict[str, Any]) -> list[str]:
    """Return the names of what is not as it was."""
    now = state()
    return [name for name, value in before.items() if now[name] != value]


def plain_gradient() -> Tensor:
    """Return the gradient as torch has it, of which pysal is to know nothing."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaf = images.clone().requires_grad_()
        model(leaf)[:, 1].sum().backward()
        model.zero_grad()
    assert leaf.grad is not None
    return leaf.grad


def attack(call: Callable[[], object], every: int, first: int) -> Counter[str]:
    """Interrupt a call at every so many places, and count what came of it."""
    before, expected = state(), plain_gradient()
    call()
    before["warnings"] = len(warnings.filters)  # libraries that the first call imports add filters of their own
    with Interrupter() as counter:
        call()
    found: Counter[str] = Counter()
    for at in range(first, counter.passed + 1, every):
        try:
            with Interrupter(at):
                call()
            found["finished"] += 1
        except KeyboardInterrupt:  # whose traceback holds all frames of the call, as an interactive session would
            found["interrupted"] += 1
            found.update(f"LEFT: {one}, at {at}" for one in changed(before))
        gc.collect(0)
        found.update(f"LEFT: {one}, later, at {at}" for one in changed(before))
        if not torch.equal(plain_gradient(), expected):
            found[f"LEFT: another gradient, at {at}"] += 1
        if any(one.startswith("LEFT") for one in found):
            break
    return found


def main(*arguments: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for argument in arguments:
        name, every, first = argument.split(":")
        context, call = WITHIN.get(name, (contextlib.nullcontext, name))
        with context():
            found = attack(CALLS[call], int(every), int(first))
        for one, times in found.items():
            print(f"{name}: {times} {one}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
