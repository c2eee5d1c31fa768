"""The ops, one card per file: schema, fake, autograd and the documented wrapper."""

from pysal.ops.guided_relu import guided_relu, guided_relu_backward

__all__ = ["guided_relu", "guided_relu_backward"]
