"""A classifier small enough for every method to be done at once, in place of those that `load` knows, and its page."""

import signal
import sys
import time
from functools import partial

import torch
from torch import nn

from pysal import models

NAMES = ("cat", "dog", "espresso", "Siamese cat", "tripod", "<b>bold</b>", "lynx")


def classifier(activation: type[nn.Module] = nn.ReLU) -> models.Classifier:
    """Return a network of random weights for 32 x 32 pixels that has an opinion on every photo."""
    generator = torch.Generator().manual_seed(7)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        activation(),
        nn.Conv2d(8, 12, 3, padding=1),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, len(NAMES)),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3 / max(parameter[0].numel(), 1) ** 0.5)
    return models.Classifier(layers, name="small", class_names=NAMES, input_size=(32, 32)).eval()


class Pause(nn.Module):
    """Takes its time, so that a run can be stopped; what looks at values cannot be traced, so preparing keeps the pause."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if not value.isnan().all():
            time.sleep(0.4)
        return value


def slow() -> models.Classifier:
    """Return the same with a pause in every pass, and passes of few rows, between which a run can be stopped."""
    model = classifier()
    model.rows_per_pass = 4
    model.network = nn.Sequential(Pause(), model.network).eval()
    return model


def endless() -> models.Classifier:
    """Return one that takes a second for each image, and so many minutes for all methods."""
    model = slow()
    model.rows_per_pass = 1
    model.network = nn.Sequential(Pause(), Pause(), model.network).eval()
    return model


if __name__ == "__main__":
    from pysal.demo.server import serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does: uploads are removed
    known = {"small": classifier, "smooth": partial(classifier, nn.GELU), "slow": slow}
    if sys.argv[2:]:
        known = {"endless": endless}
    serve(known, port=0, host=sys.argv[1], ready=partial(print, flush=True))
