"""The error that says a method cannot explain this model, not that the call was wrong."""


class NotApplicable(ValueError):
    """This method does not apply to this model: no ReLU for guided backprop, no spatial layer for Grad-CAM, no gradients.

    `explain(methods="all")` leaves such a method out and says why; everything else raises it.
    """
