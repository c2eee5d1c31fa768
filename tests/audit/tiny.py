"""Models so small that a whole audit takes a moment; workers make them by name."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pysal.models import Classifier

CLASSES = ["cat", "dog", "tree frog"]
SIZE = (12, 10)


def network() -> nn.Sequential:
    """Return a network of two convolutions and three classes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(6, len(CLASSES)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()


def classifier() -> Classifier:
    """Return it with names of classes and a size."""
    return Classifier(network(), name="tiny", class_names=CLASSES, input_size=SIZE).eval()


class BatchMean(nn.Module):
    """Centres the scores of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.inner(images)
        return scores - scores.mean(0) / 2


def coupled() -> Classifier:
    """Return a classifier whose images depend on each other."""
    return Classifier(BatchMean(), name="coupled", class_names=CLASSES, input_size=SIZE).eval()


class NotANumber(nn.Module):
    """Says NaN of an image whose first value is above 0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        return torch.where(images[:, 0, 0, :1] > 0.9, torch.nan, self.inner(images))


def not_a_number() -> Classifier:
    """Return a classifier that says NaN of some images."""
    return Classifier(NotANumber(), name="nan", class_names=CLASSES, input_size=SIZE).eval()


class Hungry(nn.Module):
    """Has memory for two images at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise MemoryError("three images at a time")
        return self.inner(images)


class Slow(nn.Module):
    """Takes a while for each pass; cannot be traced, so that it does when it is prepared, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        if len(images):
            time.sleep(0.05)
        return self.inner(images)


def slow() -> Classifier:
    """Return a classifier that gives the same answers slowly."""
    return Classifier(Slow(), name="slow", class_names=CLASSES, input_size=SIZE).eval()


def hungry() -> Classifier:
    """Return a classifier that has memory for two images at a time."""
    return Classifier(Hungry(), name="hungry", class_names=CLASSES, input_size=SIZE).eval()


class NotAGradient(nn.Module):
    """Says something finite of every image, but its gradient is NaN where the first value is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) + 0 * images[:, 0, 0, :1].sqrt()


def not_a_gradient() -> Classifier:
    """Return a classifier whose gradient is NaN for some images."""
    return Classifier(NotAGradient(), name="nan gradient", class_names=CLASSES, input_size=SIZE).eval()


class Armed(nn.Module):
    """Does something bad while the file that ARMED names is there; cannot be traced."""

    def __init__(self, strike: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.strike = network(), strike

    def forward(self, images: Tensor) -> Tensor:
        if len(images) and os.path.exists(os.environ["ARMED"]):
            self.strike()
        return self.inner(images)


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_out_of_memory() -> None:
    raise MemoryError("none left")


class Touchy(nn.Module):
    """Does something bad when it sees a green image; cannot be traced."""

    def __init__(self, strike: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.strike = network(), strike

    def forward(self, images: Tensor) -> Tensor:
        if len(images) and bool((images.flatten(2).mean(2) == torch.tensor([0.0, 1.0, 0.0])).all(1).any()):
            self.strike()
        return self.inner(images)


def deadly() -> Classifier:
    """Return a classifier that kills its process at a green image."""
    return Classifier(Touchy(_kill_this_process), name="deadly", class_names=CLASSES, input_size=SIZE).eval()


def hanging() -> Classifier:
    """Return a classifier that never comes back from a green image."""
    return Classifier(Touchy(partial(time.sleep, 10**6)), name="hanging", class_names=CLASSES, input_size=SIZE).eval()


def starving() -> Classifier:
    """Return a classifier that runs out of memory while it is armed."""
    return Classifier(Armed(_run_out_of_memory), name="starving", class_names=CLASSES, input_size=SIZE).eval()


class Detector(nn.Module):
    """Finds the left and the right half of an image, each as surely as it is bright; nothing in a dark one."""

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        height, width = images.shape[2:]
        boxes = torch.tensor([[0.0, 0.0, width / 2, height], [width / 2, 0.0, width, height]])
        found = []
        for image in images:
            scores = torch.stack([half.mean() for half in image.tensor_split([width // 2], 2)])
            kept = scores > 0.35
            found.append({"boxes": boxes[kept], "labels": torch.tensor([1, 2])[kept], "scores": scores[kept]})
        return found


def detector() -> Detector:
    """Return a detector."""
    return Detector().eval()


class Segmenter(nn.Module):
    """Says of each pixel how red, green and blue it is."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": 2 * images}


def segmenter() -> Segmenter:
    """Return a segmenter."""
    return Segmenter().eval()
