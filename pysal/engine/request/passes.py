"""Passes of a model over rows of a request's images: their size, arithmetic and company, and what is refused on the way."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.model.model_state import parts
from pysal.engine.model.not_applicable import NotApplicable, differentiating, refuse_derivative
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.independence import (
    MANY_ROWS,
    REPEATS,
    Coupled,
    Random,
    check,
    check_chance,
    error_in_words,
    is_remembered,
    nudged,
    remember,
    roundoff_of,
    unlike,
)
from pysal.engine.request.request import Model, Request, Shared
from pysal.engine.running.chunks import (
    GENEROUS_BYTES_PER_INPUT_BYTE,
    MEMORY_SHARE,
    free_memory,
    is_out_of_memory,
    run_chunks,
)
from pysal.engine.running.precision import Arithmetic, precision_mode
from pysal.engine.running.states import leave_inference_mode, restoring, undo_later, without_hooks

# How torch.export begins to say that its program takes no such images.
GUARD = "Guard failed: "


class Passes(Request):
    """A request whose model runs: each pass over rows that stand for images of it, in the company that it asks for."""

    def run(
        self, total: int, body: Callable[[int, int], None], *, batch_size: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        """Run `body(start, stop)` over the queue of `total` model rows.

        Args:
            total: rows in the queue.
            body: see `engine.running.chunks.run_chunks`.
            batch_size: most rows per chunk where they are no model passes of common size; None = those of the request.
            ends: see `engine.running.chunks.run_chunks`.
        """
        if total >= MANY_ROWS:
            self.root._shared["many"] = True
        run_chunks(
            total,
            self._undivided(body) if self.company == "whole" and (not ends or batch_size is None) else body,
            label=self.where.removeprefix("pysal."),
            batch_size=batch_size or self.batch_size,
            device=self.device,
            row_bytes=self.row_bytes,
            ends=ends,
        )

    def expect_forwards(self, rows: int) -> None:
        """Say that so many rows are about to run without gradients, to a prepared model that may have a faster way for many."""
        if isinstance(self.model, PreparedModel) and not self.extra_inputs and self.model.takes(self.inputs):
            self.model.expect_forwards(rows)

    def _undivided(self, body: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return the body for passes that hold the whole batch, as long as it fits into memory."""

        def part(start: int, stop: int) -> None:
            if stop - start < self.images:  # the batch did not fit
                self._divide()
            body(start, stop)

        return part

    def modes(self, *, grad: bool) -> precision_mode:
        """Return the context that sets what autograd and arithmetic a model pass needs, in a `restoring` function."""
        return PassModes(
            self.precision, self.device, backward=grad, without_cudnn=grad and "without cuDNN" in self.root._shared
        )

    def differentiated(self, passes: Callable[[], Shared]) -> Shared:
        """Return `passes()`, which run forward and backward; again without cuDNN where its RNNs are in eval mode.

        cuDNN keeps what the backward pass of an RNN needs in training mode alone; torch's own kernels always do.

        Raises:
            NotApplicable: the model was made in inference mode, or is not differentiable in another way that torch refuses.
        """
        try:
            return passes()
        except RuntimeError as error:
            if "without cuDNN" in self.root._shared or "cudnn RNN backward" not in str(error):
                if "inference tensor" in str(error).lower():
                    self._check_gradients(error)
                refuse_derivative(self.where, error)
                raise
        self.root._shared["without cuDNN"] = True
        with differentiating(self.where):
            return passes()

    def _check_gradients(self, error: RuntimeError) -> None:
        """Refuse a model whose tensors autograd did not take."""
        model = self.layered_model
        if not isinstance(model, nn.Module):
            return
        held = ((prefix, kind) for prefix, module in parts(model) for kind in (module._parameters, module._buffers))
        for prefix, name, tensor in ((prefix, name, tensor) for prefix, kind in held for name, tensor in kind.items()):
            if tensor is not None and tensor.is_inference():
                raise NotApplicable(
                    f"{self.where}: model must be made outside torch.inference_mode, whose tensors have no gradients, "
                    f"got {prefix + name!r}; leave_one_out explains such a model"
                ) from error

    def forward(self, model: Model, batch: Tensor, rows: Tensor) -> Any:
        """Return what a model answers to rows of the images, with the extra inputs of each.

        Raises:
            ValueError: it fails on these rows, and works on the caller's whole batch.
        """
        shared = self.root._shared
        before = None if self.company == "given" or "draws" in shared else _random_numbers(self.device)
        try:
            output = self._forward(model, batch, rows)
        except Exception as error:  # the model's own, of any kind
            if not is_out_of_memory(error) and not isinstance(error, NotApplicable) and self._works_on_whole(model, rows):
                number = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
                self._refuse_company(f"an error for {number} ({error_in_words(error)})", error)
            if (first := _instead_of_images(self.layered_model)) is not None:
                got = f"{type(self.layered_model).__name__}, whose first is {first!r} ({error_in_words(error)})"
                requirement = "take images as its first argument (pysal.models.wrap hands them over by name)"
                raise TypeError(f"{self.where}: model must {requirement}, got {got}") from error
            if isinstance(error, AssertionError) and str(error).startswith(GUARD):  # a program of torch.export's
                asked = str(error).removeprefix(GUARD).splitlines()[0]
                advice = "; batch_size=1 where it takes one image at a time" if len(batch) > 1 else ""
                requirement = f"have the shape that the program was exported for ({asked}{advice})"
                refuse(self.where, "inputs", requirement, tuple(batch.shape))
            raise
        if before is not None:
            shared["draws"] = before != _random_numbers(self.device)
        return output

    def _forward(self, model: Model, batch: Tensor, rows: Tensor) -> Any:
        by_position, by_name = self.extra_inputs.of(self.origin_of(rows)) if len(self.extra_inputs) else ((), {})
        return model(batch, *by_position, **by_name)

    def score_of(self, output: Any, rows: Tensor, leaf: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Return the class scores (N, K), None for a callable target, and the explained score (N,); fix an open target.

        Scores of what is not there are constants; they hang on `leaf` (N, ...), so that their gradient there is 0.
        """
        table = self.score.table(output, rows)
        self.score.resolve(output, table, self.origin_of(rows))
        if self.score.look.open:
            self.score.look_at(table)
        scores = self.score(output, self.origin_of(rows))
        if leaf is not None and leaf.requires_grad and not scores.requires_grad:
            if self.score.is_of_nothing(output, self.origin_of(rows)):
                scores = scores + 0 * leaf.flatten(1).sum(1).to(scores.dtype)
        return table, scores

    def check_rows(self, rows: Tensor) -> None:
        """Refuse a model whose rows depend on each other, now that a pass of these rows (N,) has been made.

        A pass of exactly the caller's images is what the caller would have run, and is not looked into, but where it is
        known without another pass that there is something to see: random numbers were drawn, the output is square, and so
        might be transposed, or there are several such passes, between which a model might change itself.

        Raises:
            ValueError: rows depend on each other, or answers on chance.
        """
        shared = self.root._shared
        if self.company == "given" or "independent" in shared:
            return
        shared["passes"] = shared.get("passes", 0) + 1
        several = self.company == "whole" and shared["passes"] > 1
        if (shared.get("draws") or several) and "repeats itself" not in shared:
            self._check_chance()
            shared["repeats itself"] = True
        if self.company == "whole" or len(rows) == 1 == self.root.images:
            return
        if self.company == "checked" and not self.score.is_square and self._is_batch(rows):
            return
        self.check_independence(len(rows), again="many" in self.root._shared and self.device.type == "cpu")

    @restoring
    def check_independence(self, number: int = 2, *, again: bool = False) -> None:
        """Refuse a model whose rows depend on each other, by passes of two rows and of one.

        Args:
            number: of rows that the model is known to take, or 2.
            again: whether to look though the model, as it is, has been looked at before.

        Raises:
            ValueError: see `check_rows`.
        """
        root, model = self.root, self.eager_model
        if self.company == "given" or "independent" in root._shared:
            return
        remembers, circumstances = self._remembers("independent")
        if remembers and not again and is_remembered(model, circumstances):
            root._shared["independent"] = True
            return

        rows, pair = torch.tensor([0, root.images - 1], device=root.device), unlike(root.inputs)

        def ask(places: Sequence[int], share: float) -> Tensor:
            some, own = (torch.stack([one[place] for place in places]) for one in (pair, rows))  # a GPU would wait for a list
            return self._ask(nudged(some, share), own)

        try:
            check(ask, number, self._roundoff_of)
        except Random as error:
            self._refuse_chance(error)
        except Coupled as error:
            self._refuse_company(str(error), error.__cause__)
        root._shared["independent"] = True
        if remembers:
            remember(model, circumstances)

    @restoring
    def _check_chance(self) -> None:
        """Refuse a model that answers otherwise each time: by the random numbers it draws, or by what it kept of a pass."""
        root, model = self.root, self.eager_model
        remembers, circumstances = self._remembers("repeats itself")
        if remembers and is_remembered(model, circumstances):
            return
        try:
            rows = torch.arange(root.images, device=root.device)
            repeats = REPEATS if root._shared.get("draws") else 2
            check_chance(lambda: self._ask(root.inputs, rows), self._roundoff_of, repeats=repeats)
        except Random as error:
            self._refuse_chance(error)
        if remembers:
            remember(model, circumstances)

    def _remembers(self, what: str) -> tuple[bool, object]:
        """Return whether what was found out about the model holds in the next call, and in which circumstances."""
        root = self.root
        remembers = not self.extra_inputs and self.score.function is None  # which may be others then
        return remembers, (what, *root.inputs.shape[1:], root.inputs.dtype, root.device, root.precision)

    def _ask(self, batch: Tensor, rows: Tensor, model: Model | None = None) -> Tensor:
        """Return what the model, or another in its place, answers to rows of the call's own images, or of ones like them."""
        root = self.root
        with root.modes(grad=False):  # a callable target is a part of the pass
            output = root._forward(self.eager_model if model is None else model, batch.clone(), rows)
            table = root.score.table(output, rows)
            return (root.score(output, rows) if table is None else table).detach().clone()

    def _roundoff_of(self, dtype: torch.dtype) -> float:
        return roundoff_of(self.root.precision, dtype, self.device)

    def _refuse_chance(self, error: Random) -> NoReturn:
        refuse(self.where, "model", "answer the same to the same input in every call", str(error))

    def _divide(self) -> None:
        """Let passes hold a part of the batch that is too large for memory, if rows do not depend on each other."""
        try:
            self.check_independence()
        except ValueError as error:
            images = f"the {self.images} images of a model whose rows depend on each other"
            raise RuntimeError(f"{self.where}: {images} must fit into memory together") from error

    def _is_batch(self, rows: Tensor) -> bool:
        """Whether rows are the caller's images, all of them, in order. A GPU waits to say it, so of one tensor once."""
        if len(rows) != self.root.images:
            return False
        shared, origin = self.root._shared, self._origin
        asked, whole = shared.get("asked whether all images", ((), False))
        if not (len(asked) and asked[0] is rows and asked[1] is origin):
            whole = torch.equal(self.origin_of(rows), torch.arange(len(rows), device=rows.device))
            shared["asked whether all images"] = (rows, origin), whole
        return bool(whole)

    def _works_on_whole(self, model: Model, rows: Tensor) -> bool:
        root = self.root
        if self.company == "given" or self._is_batch(rows):
            return False
        if root.inputs.nbytes * GENEROUS_BYTES_PER_INPUT_BYTE > MEMORY_SHARE * free_memory(self.device):
            return False  # which was no reason to run so many at once

        # what failed once need not be the rows' doing
        return self._works(model, torch.arange(root.images, device=root.device)) and not self._works(
            model, self.origin_of(rows)
        )

    @restoring
    def _works(self, model: Model, images: Tensor) -> bool:
        """Whether a model runs on some of the caller's images (N,)."""
        without_hooks()
        try:
            with self.modes(grad=False):
                self.root._forward(model, self.root.inputs[images], images)
        except Exception:  # the model's own, of any kind
            return False
        return True

    def _refuse_company(self, got: str, cause: BaseException | None) -> NoReturn:
        requirement = "answer for each row of a pass as if it were alone"
        images = self.root.images
        if self.company == "checked":
            way_out = (
                "batch_size=1, one row in a pass" if images == 1 else f"batch_size={images}, the whole batch in every pass"
            )
            requirement += f" unless it is called with {way_out}"
        try:
            refuse(self.where, "model", requirement, got)
        except ValueError as error:
            raise error from cause


def _instead_of_images(model: object) -> str | None:
    """Return the first argument of a model that failed, where it takes images by name, as some of transformers do."""
    if not isinstance(model, nn.Module):
        return None
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return None
    return names[0] if "pixel_values" in names[1:] else None


def _random_numbers(device: torch.device) -> tuple[bytes, ...]:
    """Return where torch's generators stand from which a model on a device draws."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return tuple(state.numpy().tobytes() for state in states)


class PassModes(precision_mode):
    """What autograd and arithmetic a pass needs; see `Passes.modes`."""

    sets_grad = True

    def __init__(self, precision: Arithmetic, device: torch.device, *, backward: bool, without_cudnn: bool) -> None:
        super().__init__(precision, device, backward=backward)
        self.without_cudnn = without_cudnn

    def set(self) -> None:
        """Set it, in a `restoring` function."""
        super().set()
        leave_inference_mode()
        torch._C._set_grad_enabled(self.backward)
        if self.backward:
            # TorchScript optimises a backward pass after some runs, for good, which hides it from ReLU rules
            torch._C._set_graph_executor_optimize(False)
        if self.without_cudnn:
            undo_later(functools.partial(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled()))
            torch._C._set_cudnn_enabled(False)
