"""The layers that the peer puts in the place of others. Here they are names alone: nothing is put in a model."""

from torch import nn


class AblationLayer(nn.Module):
    """Of channels first."""


class AblationLayerVit(AblationLayer):
    """Of tokens."""


class AblationLayerFasterRCNN(AblationLayer):
    """Of a pyramid of maps."""
