"""What runs a prepared model's passes without gradients: itself, or ONNX Runtime once the work asked for pays back the export.

Which of the two is measured, as everything about a prepared model is. Work is announced before it begins, so that all passes of
a call are made alike.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pysal.engine.graph.same_function import batches
from pysal.engine.model.model_state import ModelState
from pysal.engine.prepared.gains import Budget, Gains, Way, least_seconds, pays, ratio
from pysal.engine.prepared.onnx_runtime import NotExported, Runtime, exported, missing
from pysal.engine.prepared.payback import pays_exporting
from pysal.engine.running.chunks import fast_rows
from pysal.engine.running.precision import precision_mode
from pysal.engine.running.states import keep_random_numbers, leave_inference_mode, restoring

# What fewer images cost is not looked at.
FEWEST = 8


class Forwards:
    """Decides for one model, and runs what ONNX Runtime is faster at.

    Args:
        model: the original.
        example: (1, C, H, W), float32 on the CPU.
        state: of the model, as it was captured.

    Attributes:
        state: the same.
        measures: whether it may still be measured; else what was measured before decides.
        asked: images that were asked for, since it was last exported.
        reason: why ONNX Runtime is not used, once that is known.
    """

    def __init__(self, model: nn.Module, example: Tensor, state: ModelState) -> None:
        state.remember_values()
        self._model, self._example, self.state, self.measures = model, example, state, True
        self.reason: str | None = None
        self._runtime: Runtime | None = None
        self.asked, self._seconds = 0, 0.0
        self._lock = threading.Lock()

    def due(self, gains: Gains) -> bool:
        """Whether it is known that ONNX Runtime is to run all passes, and the model is not exported yet."""
        return self._runtime is None and self.reason is None and pays(gains.runtime_over_own)

    @property
    def runs(self) -> bool:
        """Whether ONNX Runtime runs the passes of this thread."""
        return self._runtime is not None and self._runtime.here

    def runtime_for(self, images: Tensor, *, unchanged: bool) -> Runtime | None:
        """Return what runs images of the example's kind faster than torch, None where nothing does.

        Args:
            images: of its shape, dtype and device. Those with NaN or infinity, of which ONNX Runtime may make numbers, are
                not run by it, and none that a mode or transformation of torch wants to see.
            unchanged: whether the model is known to be as it was; else it is not run by it once it is not.
        """
        runtime = self._runtime
        if runtime is None or not runtime.here or torch.is_autocast_enabled("cpu") or _is_watched(images):
            return None
        if any(getattr(module, "training", False) for _, module in self.state.modules):
            return None
        if not unchanged:
            self.notice_changes(values=False)
            if self._runtime is None:
                return None
        return runtime if bool(images.detach().sum().isfinite()) else None

    def notice_changes(self, *, values: bool) -> None:
        """Run the model by ONNX Runtime no more once it has changed.

        Args:
            values: whether to look for what was written past autograd, too.
        """
        if self._runtime is not None and self.state.changed(values=values) is not None:
            self._runtime, self.reason = None, "it has changed since"

    def expect(self, images: int, gains: Gains, current: Callable[[Tensor], object], layout: torch.memory_format) -> Gains:
        """Take notice of work to come, and return what is known then of the model's gains.

        Args:
            images: how many are about to run without gradients.
            gains: what was measured before.
            current: runs images as they run so far.
            layout: of the images that methods hand over.
        """
        if self.reason is not None or images < 1 or (self._runtime is not None and self._runtime.here):
            return gains
        known = pays(gains.runtime_over_own)
        if not known and (gains.runtime is not None or not self.measures):
            return gains
        if not self._lock.acquire(blocking=False):  # another thread finds it out
            return gains
        try:
            self.asked += images
            if not known and self.asked < FEWEST:
                return gains
            return self._decided(gains, current, layout, known=known)
        finally:
            self._lock.release()

    @restoring
    def _decided(self, gains: Gains, current: Callable[[Tensor], object], layout: torch.memory_format, *, known: bool) -> Gains:
        leave_inference_mode()
        keep_random_numbers(self._example.device)
        torch.set_grad_enabled(False)
        precision_mode("float32", self._example.device, backward=False).set()
        budget, again = Budget(self._example.device), self._runtime is not None  # of another number of threads
        rows = fast_rows(self._example.device, self._example.nbytes)
        batch = self._example.expand(rows, -1, -1, -1).contiguous(memory_format=layout)
        ways: dict[str, Way] = {"forward": lambda: current(batch)}
        if not known or again:
            self._seconds = self._seconds or min(budget.seconds("forward", ways["forward"]) for _ in range(2)) / rows
            if not pays_exporting(self.asked, self._seconds):
                return gains
        self._runtime, self.asked = None, 0
        try:
            if (reason := missing()) is not None:
                raise NotExported(reason)
            if self.state.changed() is not None:
                raise NotExported("it has changed since it was prepared")
            runtime = exported(self._model, list(batches(self._example, None)))
        except NotExported as error:
            self.reason = str(error)
            return gains
        if not known:
            ways["ONNX Runtime"] = lambda: runtime(batch)
            runtime(batch)  # which finds room for this number of images
            budget = Budget(self._example.device)  # that of the export is no part of it
            times = ratio(least_seconds(ways, {"forward": "ONNX Runtime"}, budget), "forward", "ONNX Runtime")
            gains = gains.with_runtime(times)
            if not pays(times):
                self.reason = f"it would be {times:.1f} times as fast as without"
                return gains
        self._runtime = runtime
        return gains


def is_transformed(images: Tensor) -> bool:
    """Say whether torch differentiates forwards, maps or traces the operations on a tensor, which it must see one by one."""
    if torch._C._is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(images):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(images).tangent is not None


def _is_watched(images: Tensor) -> bool:
    """Say whether something looks at the operations on a tensor: a mode of torch, a transformation, a compiler."""
    if type(images) is not Tensor or torch.compiler.is_compiling() or is_transformed(images):
        return True
    return torch._C._len_torch_dispatch_stack() > 0
