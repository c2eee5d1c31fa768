"""The one way bad input is refused: one sentence that names the argument, the requirement and the value."""

from typing import NoReturn

import torch
from torch import Tensor


def refuse(where: str, argument: str, requirement: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the sentence every refusal of this package has.

    Args:
        where: the public name that was called, `pysal.gradient` or `pysal::guided_relu`.
        argument: the argument at fault.
        requirement: what it must be, starting with a verb: "be a 4-D tensor (B, C, H, W)".
        got: the offending value, as it should be shown.
        error: TypeError for a wrong type or dtype, ValueError for a wrong shape, range or device.
    """
    raise error(f"{where}: {argument} must {requirement}, got {got}")


def check_tensor(
    where: str, argument: str, value: object, *, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Return `value` if it is a tensor of the wanted rank and one of the wanted dtypes.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions.
    """
    if not isinstance(value, Tensor):
        refuse(where, argument, "be a torch.Tensor", type(value).__name__, TypeError)
    if dtypes and value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(where, argument, f"have dtype {names}", str(value.dtype).removeprefix("torch."), TypeError)
    if ndim is not None and value.ndim != ndim:
        refuse(where, argument, f"have {ndim} dimensions", f"shape {tuple(value.shape)}")
    return value
