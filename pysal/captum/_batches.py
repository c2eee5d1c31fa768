"""The forward function, and how many copies of the batch go to it in one pass.

captum never splits a batch, and a function may rely on that.

Graph networks, sequence models with time first, attention over a set, batch norm without running statistics and models
quantised by the range of their input let the rows of a pass act on each other. captum gives them whole batches, all steps or
samples of them in one pass unless told otherwise. So do the classes of this package, up to a size at which many passes are
as fast as one; beyond it rows or copies are kept together unless two of them, run together and each alone, say the same.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysal.engine.model.training import training_part
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.independence import Coupled, check, nudged, roundoff_of, unlike
from pysal.engine.running.chunks import fast_rows, is_out_of_memory
from pysal.engine.running.precision import precision_mode
from pysal.engine.running.states import keep_random_numbers, restoring

# Times what runs fast in one pass that is not worth cutting: finding out whether rows are independent takes a pass, too.
WORTH_CUTTING = 4

Inputs = tuple[Tensor, ...]


def call(forward: Callable[..., Any], inputs: Sequence[Tensor], further: Sequence[Any]) -> Any:
    """Return the forward function's output in the arithmetic of all methods here; a function of no arguments gets none."""
    with precision_mode("as set", inputs[0].device, backward=False):
        return forward(*inputs, *further) if takes_inputs(forward) else forward()


def takes_inputs(forward: Callable[..., Any]) -> bool:
    """Say whether a forward function has any arguments; one without is called with none."""
    models = (nn.Module, PreparedModel)
    own = isinstance(forward, models) or isinstance(getattr(forward, "__wrapped__", None), models)
    return own or bool(inspect.signature(forward).parameters)


def is_training(forward: object) -> bool:
    """Whether a forward function is a model with a part whose training mode matters: its passes may depend on all rows."""
    return isinstance(forward, nn.Module) and training_part(forward) is not None


def goes_along(value: object, examples: int) -> bool:
    """Whether a further argument of the forward function is a tensor with a row for each example."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == examples


def of_its_own(further: Sequence[object], examples: int) -> bool:
    """Whether a further argument is a tensor with other rows: several for each example, or those of a table for all."""
    return any(isinstance(one, Tensor) and one.ndim > 0 and len(one) != examples for one in further)


def of_rows(further: Sequence[Any], rows: Tensor, examples: int) -> tuple[Any, ...]:
    """Return the further arguments for copies of the examples `rows` (N,)."""
    return tuple(one[rows.to(one.device)] if goes_along(one, examples) else one for one in further)


@restoring
def independent(
    forward: Callable[..., Any],
    points: Callable[[Tensor, Tensor], Inputs],
    copies: int,
    examples: int,
    further: Sequence[Any],
    device: torch.device,
) -> bool:
    """Say whether rows of the first and of the last copy of the batch get the same outputs in one pass as in a pass each.

    One row of each, or the whole batches where a further argument is a tensor `of_its_own`. A function that fails on a pass,
    or does not give a row of its output to each of the pass's, needs its rows together; so does one in training mode, which
    is not run. Random numbers that the function draws are drawn again afterwards.

    Args:
        forward: the forward function.
        points: inputs for rows of examples (N,) of copies (N,).
        copies: how often the batch runs.
        examples: rows of the batch.
        further: further arguments for the batch.
        device: of the inputs.

    Raises:
        RuntimeError: memory ran out.
    """
    if is_training(forward):
        return False
    rows = examples if of_its_own(further, examples) else 1
    own = torch.cat([torch.arange(rows, device=device), torch.arange(examples - rows, examples, device=device)])
    keep_random_numbers(device)
    with torch.no_grad():
        try:
            ends = torch.tensor([0, copies - 1], device=device).repeat_interleave(rows)
            pair = tuple(one.detach() for one in points(own, ends))
            if len(pair) == 1 and pair[0].is_floating_point():
                pair = (unlike(pair[0].unflatten(0, (2, rows))).flatten(0, 1),)

            def ask(places: Sequence[int], share: float) -> Tensor:
                chosen = torch.cat([torch.arange(place * rows, (place + 1) * rows, device=device) for place in places])
                some = tuple(nudged(one[chosen.to(one.device)], share) for one in pair)
                table = _table(call(forward, some, of_rows(further, own[chosen], examples)), len(chosen))
                if table is None:
                    raise Coupled("no row of its output for each row of a pass")
                return table.reshape(len(places), table.numel() // len(places))

            check(ask, 2, lambda dtype: roundoff_of("as set", dtype, device))
        except Coupled:
            return False
        except Exception as error:  # the function's own, of any kind
            if is_out_of_memory(error):
                raise
            return False
    return True


def _table(output: Any, rows: int) -> Tensor | None:
    """Return a function's output as (rows, numbers), None where it is not one row for each."""
    if not isinstance(output, Tensor):
        entries = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
        output = next((one for one in entries if isinstance(one, Tensor)), None)
    if output is None:
        return None
    if rows == 1 and (not output.ndim or len(output) != 1):  # squeezed
        output = output[None]
    if not output.ndim or len(output) != rows:
        return None
    table: Tensor = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    return table.reshape(rows, -1).to(
        torch.promote_types(table.dtype, torch.float32) if not table.is_floating_point() else table.dtype
    )


def copies_per_pass(
    forward: Callable[..., Any],
    points: Callable[[Tensor, Tensor], Inputs],
    copies: int,
    inputs: Inputs,
    further: Sequence[Any],
    most: int | None,
) -> int:
    """Return how many copies of the batch, steps or noisy samples, run in one pass.

    Args:
        forward: the forward function.
        points: see `independent`.
        copies: in all.
        inputs: the batch.
        further: further arguments for the batch.
        most: copies in a pass, as asked; None = nothing was asked.
    """
    examples, device = inputs[0].shape[0], inputs[0].device
    most = copies if most is None else min(copies, most)
    asked = most < copies

    def apart() -> bool:
        return isinstance(forward, PreparedModel) or independent(forward, points, copies, examples, further, device)

    own = of_its_own(further, examples)
    if own and most > 1 and not apart():
        return 1  # each pass is the caller's own call: nobody knows how such a tensor goes with copies of the batch
    row_bytes = sum(one[:1].numel() * one.element_size() for one in inputs)
    measured = forward.rows_for(inputs[0]) if isinstance(forward, PreparedModel) else None
    fast = measured or fast_rows(device, row_bytes)
    if asked or copies * examples <= (1 if measured else WORTH_CUTTING) * fast or not (own or apart()):
        return most
    return max(1, fast // examples)
