"""Where a model's weights are, and of which dtype: images must be there, too."""

from torch import Tensor, nn

from pysal._checks import refuse


def check_fits(where: str, model: nn.Module, argument: str, images: Tensor) -> None:
    """Refuse images that are not on the device of a model's weights or not of their dtype.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    parameter = next((one for one in model.parameters() if one.dtype.is_floating_point), None)
    if parameter is None:
        return
    if parameter.is_meta and not images.is_meta:
        refuse(where, "model", "have weights with values", "weights on the meta device")
    if parameter.device != images.device:
        refuse(where, argument, f"be on the model's device {parameter.device}", images.device)
    if parameter.dtype != images.dtype:
        names = [str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, images.dtype)]
        refuse(where, argument, f"have the model's dtype {names[0]}", names[1], TypeError)
