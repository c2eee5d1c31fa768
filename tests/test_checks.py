"""Unknown names: what was probably meant is said, by one function, wherever a name is given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import metrics
from pysal._checks import refuse_unknown
from pysal._spelling import close_to, did_you_mean
from pysal.engine.layers.features import find_layer
from pysal.methods.registry import METHODS

IMAGES = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()


MAPS = torch.ones(1, 1, 8, 8)
MISSPELT: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "method": (lambda model: pysal.explain(model, IMAGES, methods="gradientt"), "'gradient'"),
    "method of options": (lambda model: pysal.explain(model, IMAGES, method_options={"gradcam": {}}), "'grad_cam'"),
    "option": (
        lambda model: pysal.explain(model, IMAGES, methods="smooth_grad", method_options={"smooth_grad": {"sample": 2}}),
        "'samples'",
    ),
    "base": (lambda model: pysal.smooth_grad(model, IMAGES, base="Integrated-Gradients"), "'integrated_gradients'"),
    "score": (lambda model: pysal.gradient(model, IMAGES, score="logits"), "'logit'"),  # type: ignore[arg-type]
    "precision": (lambda model: pysal.gradient(model, IMAGES, precision="fp32"), "'tf32'"),  # type: ignore[arg-type]
    "fill": (lambda model: pysal.leave_one_out(model, IMAGES, fill="blackk"), "'black'"),
    "layer": (lambda model: pysal.grad_cam(model, IMAGES, layer="0.2.3"), "'0.2.1'"),
    "quadrature": (lambda model: pysal.integrated_gradients(model, IMAGES, quadrature="trapez"), "'trapezoid'"),  # type: ignore[arg-type]
    "metric": (lambda model: metrics.per_image("insertion_blur", model, IMAGES, MAPS), "'insertion'"),
    "option of a metric": (lambda model: metrics.per_image("deletion", model, IMAGES, MAPS, options={"step": 2}), "'steps'"),
    "format": (lambda model: pysal.explain(model, IMAGES, methods="gradient").plot(path="map.jpge"), ".jpg"),
    "plot": (lambda model: pysal.explain(model, IMAGES, methods="gradient").plot(kind="map"), "'maps'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_name_is_refused_with_what_was_meant(what: str) -> None:
    call, meant = MISSPELT[what]
    with pytest.raises(ValueError, match=r"must .* \(did you mean .*\?\), got ") as caught:
        call(network())
    assert meant in str(caught.value).partition("(did you mean ")[2].partition("?), got ")[0]


def test_a_misspelt_class_is_refused_with_what_was_meant() -> None:
    model = network()
    model.class_names = ["tabby cat", "tiger", "toad", "frog"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"target must name a class \(did you mean tiger \(1\)\?\), got 'tigre'$"):
        pysal.gradient(model, IMAGES, "tigre")


def test_names_that_hold_what_was_given_come_first_in_their_order() -> None:
    assert close_to("cam", METHODS) == ["grad_cam", "guided_grad_cam"]
    assert close_to("Guided-Backprop ", METHODS) == ["guided_backprop"]
    assert close_to("gradients", METHODS)[0] == "gradient"  # though others hold it
    assert close_to("zebra", METHODS) == []
    assert close_to("", METHODS) == []
    for odd in (None, 3, ["gradient"], b"gradient"):
        assert close_to(odd, METHODS) == []
    with pytest.raises(ValueError, match=r"^here: it must be one of 'cat' or 'cats', got 'at'$"):
        refuse_unknown("here", "it", "be one of 'cat' or 'cats'", "at", ["cat", "cats"])  # both, which it says already
    assert did_you_mean([]) == ""
    assert did_you_mean(["a", "b"]) == " (did you mean a, b?)"


class Shared(nn.Module):
    """One ReLU that runs three times, and blocks in a list and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
        self.named = nn.ModuleDict({"act": nn.ReLU()})
        self.head = nn.Linear(4, 5)

    def forward(self, batch: Tensor) -> Tensor:
        for block in self.blocks:
            batch = self.named["act"](block(batch))
        return self.head(batch.mean((2, 3)))


SAME: list[tuple[str, str, Any]] = [
    ("blocks[0]", "blocks.0", None),
    ("blocks.0", "blocks.0", None),
    ("blocks[-1]", "blocks.2", None),
    ("blocks[-3]", "blocks.0", None),
    ("blocks[1]@0", "blocks.1", 0),
    ("named['act']", "named.act", None),
    ('named["act"]@2', "named.act", 2),
    ("named.act@1", "named.act", 1),
    ("named.act@-1", "named.act", "last"),
    ("named[0]", "", None),
    ("blocks[3]", "", None),
    ("blocks[-4]", "", None),
    ("blocks[x]", "", None),
    ("named.act[1]", "", None),  # a ReLU has no children
    ("named.act@", "", None),
    ("named.act@-2", "", None),
]


@pytest.mark.parametrize(("spelled", "name", "run"), SAME, ids=[one[0] for one in SAME])
def test_brackets_are_children_and_an_at_sign_is_a_run(spelled: str, name: str, run: Any) -> None:
    model = Shared().eval()
    if not name:
        with pytest.raises(ValueError, match=r"^pysal: layer must be the name of a module of the model"):
            find_layer("pysal", model, spelled)
        return
    found = find_layer("pysal", model, spelled)
    assert (found.name, found.module, found.run) == (name, model.get_submodule(name), run)
    assert find_layer("pysal", model, found.label) == found


def test_a_module_whose_name_holds_brackets_or_an_at_sign_is_found_by_it() -> None:
    model = nn.Sequential()
    model.add_module("a[0]", nn.ReLU())
    model.add_module("b@1", nn.ReLU())
    for name in ("a[0]", "b@1"):
        assert find_layer("pysal", model, name).module is dict(model.named_modules())[name]
