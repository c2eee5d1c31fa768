"""Where the map is in a layer's output: known by its shape, the kind of layer, and the image's proportions."""

import pytest
import torch
from torch import nn

from pysal.engine.layers.spatial import Reading, reading

OTHER, LINEAR, NORM, CONV = nn.Identity(), nn.Linear(1, 1), nn.LayerNorm(1), nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "module", "image", "expected"),
    [
        ((2, 64, 7, 7), OTHER, (224, 224), Reading(7, 7)),
        ((2, 64, 7, 10), OTHER, (224, 320), Reading(7, 10)),
        ((2, 7, 7, 64), OTHER, (224, 224), Reading(7, 7, channels_last=True)),
        ((2, 7, 10, 64), NORM, (224, 320), Reading(7, 10, channels_last=True)),
        ((2, 7, 7, 7), LINEAR, (224, 224), Reading(7, 7, channels_last=True)),
        ((2, 7, 7, 7), OTHER, (224, 224), Reading(7, 7)),
        # a convolution is never read as channels last, however its channels fall
        ((2, 7, 7, 1), CONV, (224, 224), Reading(7, 1)),
        # a norm over three dimensions does not say which is the channel
        ((2, 7, 7, 7), nn.LayerNorm((7, 7, 7)), (224, 224), Reading(7, 7)),
        # a nearly right map is not given up for an accident of channels: 3 : 4 is the image's
        ((2, 3, 4, 5), OTHER, (6, 8), Reading(4, 5)),
        ((2, 49, 64), NORM, (224, 224), Reading(7, 7, prefix=0)),
        ((2, 197, 64), NORM, (224, 224), Reading(14, 14, prefix=1)),
        ((2, 198, 64), NORM, (224, 224), Reading(14, 14, prefix=2)),
        ((2, 201, 64), NORM, (224, 224), Reading(14, 14, prefix=5)),
        ((2, 281, 64), NORM, (224, 320), Reading(14, 20, prefix=1)),
        ((2, 281, 64), NORM, (320, 224), Reading(20, 14, prefix=1)),
        ((2, 5, 64), NORM, (224, 224), Reading(2, 2, prefix=1)),
        # pooled channels are no tokens
        ((2, 1024, 1), OTHER, (224, 224), None),
        ((2, 2, 64), NORM, (224, 224), None),
        ((2, 64), OTHER, (224, 224), None),
    ],
)
def test_reading(shape, module, image, expected) -> None:
    assert reading(shape, module, image) == expected


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_in_rows(prefix: int) -> None:
    maps = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = torch.cat([torch.full((2, prefix, 3), -1), maps.flatten(2).transpose(1, 2)], 1)
    found = reading((2, prefix + 24, 3), NORM, (64, 96))
    assert found == Reading(4, 6, prefix=prefix)
    assert torch.equal(found(tokens), maps)


def test_channels_last_become_first() -> None:
    maps = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    assert torch.equal(Reading(4, 6, channels_last=True)(maps.permute(0, 2, 3, 1)), maps)
    assert Reading(4, 6)(maps) is maps
