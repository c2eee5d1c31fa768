"""One call for several methods: what it shares between them, what it leaves out, what it says."""

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.methods.registry import EVERY, METHODS
from tests.methods.calls import CALLS, Watched, row_by_row
from tests.methods.networks import images

INPUTS = images(3, 3, 8, 8)
# CALLS' own options: what explain must be told to return the same maps
OPTIONS: dict[str, dict[str, Any]] = {
    name: dict(call.keywords) for name, call in CALLS.items() if isinstance(call, functools.partial)
}


def explain(model: Any, *args: Any, **options: Any) -> pysal.Explanation:
    return pysal.explain(model, INPUTS, *args, **{"method_options": OPTIONS, **options})


def test_maps_are_those_of_the_methods() -> None:
    found = explain(row_by_row())
    assert list(found.results) == list(METHODS) == list(CALLS)
    assert found.skipped == {}
    for name, call in CALLS.items():
        assert torch.equal(found.maps[name], call(row_by_row(), INPUTS)), name
        result = found[name]
        assert (result.name, result.title) == (name, METHODS[name].title)
        assert (result.reduction, result.signed) == (METHODS[name].reduction, METHODS[name].signed)
        assert result.reduction != "none" or result.map.shape[1] == 1
        assert 0 < result.seconds < found.seconds
    assert found.build["version"] == pysal.build_info()["version"]
    assert torch.equal(found.images, INPUTS)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({}, ("max_abs", False)),
        ({"base": "integrated_gradients", "method_options": {"steps": 2}}, ("sum", True)),
        ({"base": "integrated_gradients", "method_options": {"steps": 2}, "kind": "variance"}, ("max_abs", False)),
        ({"base": "leave_one_out", "method_options": {"segments": pysal.Grid(2, 2)}}, ("none", True)),
    ],
)
def test_a_mean_over_noisy_copies_is_drawn_as_the_method_it_smooths(options: dict[str, Any], drawn: tuple[str, bool]) -> None:
    found = pysal.explain(
        row_by_row(), INPUTS, 1, methods="smooth_grad", method_options={"smooth_grad": {"samples": 2, **options}}
    )
    result = found["smooth_grad"]
    assert (result.reduction, result.signed) == drawn


def test_target_and_scores() -> None:
    model = row_by_row()
    logits = model(INPUTS).detach()
    classes = logits.argmax(1)
    found = explain(model, methods=["gradient"], method_options=None)
    assert torch.equal(found.target, classes)
    assert found.target_names == [f"class {index}" for index in classes]
    assert found.score_kind == "probability"
    probabilities = logits.softmax(1)
    torch.testing.assert_close(found.scores, probabilities.amax(1))
    torch.testing.assert_close(found.probabilities, probabilities.amax(1))

    found = explain(model, [3, 0, 1], methods="gradient", score="logit", method_options={})
    assert found.target.tolist() == [3, 0, 1]
    assert found.score_kind == "logit"
    torch.testing.assert_close(found.scores, logits[[0, 1, 2], [3, 0, 1]])
    torch.testing.assert_close(found.probabilities, probabilities[[0, 1, 2], [3, 0, 1]])


def test_score_of_each_method() -> None:
    model = row_by_row()
    told = explain(
        model, 1, methods=["gradient", "leave_one_out"], score="log_probability", method_options=_only("leave_one_out")
    )
    assert torch.equal(told.maps["gradient"], pysal.gradient(model, INPUTS, 1, score="log_probability"))
    assert torch.equal(told.maps["leave_one_out"], CALLS["leave_one_out"](model, INPUTS, 1, score="log_probability"))
    own = explain(model, 1, methods=["gradient", "leave_one_out"], method_options=_only("leave_one_out"))
    assert torch.equal(own.maps["gradient"], pysal.gradient(model, INPUTS, 1, score="logit"))
    assert torch.equal(own.maps["leave_one_out"], CALLS["leave_one_out"](model, INPUTS, 1, score="probability"))


def _only(*names: str) -> dict[str, dict[str, Any]]:
    return {name: OPTIONS[name] for name in names}


def brightness(output: Tensor) -> Tensor:
    return output.mean(1)


def test_callable_target() -> None:
    found = explain(row_by_row(), brightness, methods=["gradient", "leave_one_out"], method_options=_only("leave_one_out"))
    assert found.target.tolist() == [-1, -1, -1]
    assert found.target_names == ["brightness"] * 3
    assert found.score_kind == "callable"
    assert found.probabilities is None
    torch.testing.assert_close(found.scores, row_by_row()(INPUTS).mean(1).detach())
    assert torch.equal(found.maps["gradient"], pysal.gradient(row_by_row(), INPUTS, brightness))


def test_class_names_and_model_name() -> None:
    model = row_by_row()
    model.class_names = ["tench", "goldfish", "shark"]  # type: ignore[assignment]
    model.name = "small net"  # type: ignore[assignment]
    found = explain(model, [0, 2, 3], methods="gradient", method_options={})
    assert found.target_names == ["tench", "shark", "class 3"]
    assert found.model_name == "small net"
    assert explain(row_by_row(), methods="gradient", method_options={}).model_name == "RowByRow"
    assert explain(brightness_model, methods="gradient", method_options={}).model_name == "brightness_model"
    for same in (pysal.prepare(model, INPUTS, batch_size=3), torch.compile(model, backend="eager")):
        found = explain(same, [0, 2, 3], methods="leave_one_out", method_options=_only("leave_one_out"))
        assert found.model_name == "small net"
        assert found.target_names == ["tench", "shark", "class 3"]


def brightness_model(batch: Tensor) -> Tensor:
    return batch.mean((1, 2, 3))


def test_one_number_per_image_is_explained_as_it_is_and_is_no_probability() -> None:
    found = explain(brightness_model, methods="gradient", method_options={})
    torch.testing.assert_close(found.scores, INPUTS.mean((1, 2, 3)))
    assert found.probabilities is None


def test_probabilities_of_a_model_that_returns_them_are_as_returned() -> None:
    model = nn.Sequential(row_by_row(), nn.Softmax(1)).eval()
    found = explain(model, 1, methods="gradient", method_options={})
    torch.testing.assert_close(found.probabilities, model(INPUTS)[:, 1].detach())


@pytest.mark.usefixtures("independence_is_known")
def test_methods_share_the_clean_pass() -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    explain(
        model,
        methods=["gradient", "leave_one_out", "integrated_gradients"],
        method_options=_only("leave_one_out", "integrated_gradients"),
    )
    # the clean images, their gradient with them; 4 segments; 5 steps and the baselines' scores: of 3 images each; and one
    # image without gradients, for whether that changes what the model says
    assert sum(rows) == 3 * (1 + 4 + 5 + 1) + 1
    apart: list[int] = []
    model = Watched(row_by_row(), lambda batch: apart.append(len(batch)))
    for name in ("gradient", "leave_one_out", "integrated_gradients"):
        CALLS[name](model, INPUTS)
    # each of the others has its own clean pass; only explain asks for the baselines' scores, for the residual
    assert sum(apart) == sum(rows) - 1 + 3 * 2 - 3


def test_default_layer_is_looked_for_once() -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    found = explain(model, methods=["grad_cam", "guided_grad_cam"], method_options={})
    assert sum(rows) == 3 + 1  # one pass for both and for the scores
    assert found["grad_cam"].details["layer"] == found["guided_grad_cam"].details["layer"] == "model.relu@1"


@pytest.mark.usefixtures("independence_is_known")
def test_passes_are_those_that_were_made() -> None:
    for name in CALLS:
        rows: list[int] = []
        model = Watched(row_by_row(), lambda batch, rows=rows: rows.append(len(batch)))
        found = explain(model, methods=[name], method_options=_only(name) if name in OPTIONS else {})
        # the clean pass and, of a path, that of its other end; the clean pass of leave-one-out is its own, and the sweeps of
        # those that look at the clean images alone are made with it; Grad-CAM looks for its layer
        extra = {"integrated_gradients": 6, "blur_integrated_gradients": 6, "smooth_grad": 3}.get(name, 0)
        extra += "grad_cam" in name
        assert sum(rows) == 3 * found[name].passes + extra, name


class Unrectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()

    def forward(self, batch: Tensor) -> Tensor:
        return torch.tanh(self.body(batch))


def test_all_leaves_out_what_does_not_apply_and_says_why() -> None:
    found = explain(Unrectified().eval())
    assert list(found.skipped) == ["guided_backprop", "grad_cam", "guided_grad_cam"]
    assert list(found.results) == [name for name in METHODS if name not in found.skipped]
    assert "no ReLU was met" in found.skipped["guided_backprop"]
    for name in ("grad_cam", "guided_grad_cam"):
        assert found.skipped[name] == (
            f"pysal.{name}: the model has no layer with a spatial map (N, C, h, w); pass layer= and tokens="
        )
    for name in found.skipped:  # asked for by name, it is an error
        with pytest.raises(pysal.NotApplicable) as error:
            explain(Unrectified().eval(), methods=["gradient", name], method_options={})
        assert str(error.value) == found.skipped[name]


def test_all_of_a_black_box_is_leave_one_out() -> None:
    net = row_by_row()
    model = pysal.numpy_model(lambda batch: net(torch.from_numpy(batch)).detach().numpy())
    found = explain(model)
    assert list(found.results) == ["leave_one_out"]
    assert torch.equal(found.maps["leave_one_out"], CALLS["leave_one_out"](net, INPUTS))
    assert set(found.skipped) == set(METHODS) - {"leave_one_out"}
    assert all(sentence.startswith(f"pysal.{name}: ") for name, sentence in found.skipped.items())


def test_errors_that_are_not_about_the_model_are_not_skipped() -> None:
    def breaks(batch: Tensor) -> None:
        if torch.is_grad_enabled():
            raise ValueError("from the model")

    with pytest.raises(ValueError, match=r"^from the model$"):
        explain(Watched(row_by_row(), breaks))


def test_seed_is_smooth_grads() -> None:
    def of(**options: Any) -> Tensor:
        return pysal.explain(row_by_row(), INPUTS, 1, methods="smooth_grad", **options).maps["smooth_grad"]

    first, second = (pysal.smooth_grad(row_by_row(), INPUTS, 1, samples=3, seed=seed) for seed in (0, 7))
    assert not torch.equal(first, second)
    three = {"smooth_grad": {"samples": 3}}
    assert torch.equal(of(method_options=three), first)
    assert torch.equal(of(method_options=three, seed=7), second)
    assert torch.equal(of(method_options={"smooth_grad": {"samples": 3, "seed": 7}}, seed=1), second)
    assert torch.equal(of(method_options={"smooth_grad": {"samples": 3, "image_ids": [0, 1, 2]}}), first)


def test_methods_as_text_sequence_and_with_repeats() -> None:
    model = row_by_row()
    assert list(explain(model, methods="gradient", method_options={}).results) == ["gradient"]
    found = explain(model, methods=("guided_backprop", "gradient", "guided_backprop"), method_options={})
    assert list(found.results) == ["guided_backprop", "gradient"]


NAMES = ", ".join(EVERY)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"methods": "lime"}, ValueError, f"methods must be 'all' or names out of {NAMES}, got 'lime'"),
    ({"methods": ["gradient", "lime"]}, ValueError, f"methods must be 'all' or names out of {NAMES}, got 'lime'"),
    ({"methods": ["all"]}, ValueError, f"methods must be 'all' or names out of {NAMES}, got 'all'"),
    ({"methods": [None]}, ValueError, f"methods must be 'all' or names out of {NAMES}, got None"),
    ({"methods": []}, ValueError, "methods must name at least one method, got none"),
    ({"methods": None}, TypeError, "methods must be 'all', a name or a sequence of names, got None"),
    ({"methods": 3}, TypeError, "methods must be 'all', a name or a sequence of names, got 3"),
    ({"method_options": {"lime": {}}}, ValueError, f"method_options must be for methods out of {NAMES}, got 'lime'"),
    ({"method_options": ["lime"]}, TypeError, "method_options must be a mapping of methods to their options, got ['lime']"),
    (
        {"methods": ["gradient"], "method_options": {"grad_cam": {}}},
        ValueError,
        "method_options must be for the methods asked for (gradient), got 'grad_cam'",
    ),
    (
        {"method_options": {"gradient": {"steps": 3}}},
        ValueError,
        "method_options['gradient'] must hold options out of none, got 'steps'",
    ),
    (
        {"method_options": {"gradient": {"rules": None}}},
        ValueError,
        "method_options['gradient'] must hold options out of none, got 'rules'",
    ),
    (
        {"method_options": {"grad_cam": {"target": 3}}},
        ValueError,
        "method_options['grad_cam'] must hold options out of layer, tokens, kind, eigen_smooth, fuse, augment "
        "(did you mean 'augment'?), got 'target'",
    ),
    (
        {"method_options": {"grad_cam": "layer"}},
        TypeError,
        "method_options['grad_cam'] must be a mapping of option names to values, got 'layer'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "sentence"), BAD, ids=[sentence[:60] for _, _, sentence in BAD])
def test_refusals(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    passes: list[int] = []
    with pytest.raises(error) as caught:
        pysal.explain(Watched(row_by_row(), lambda batch: passes.append(1)), INPUTS, **options)
    assert str(caught.value) == f"pysal.explain: {sentence}"
    assert passes == []


@pytest.mark.parametrize("given", ["gradient", "all", "grad-cam", ["gradient", "grad_cam"], ("Gradient",)])
def test_methods_in_the_place_of_the_target_are_told_where_they_belong(given: Any) -> None:
    passes: list[int] = []
    model = Watched(row_by_row(), lambda batch: passes.append(1))
    sentence = f"pysal.explain: target must be a class; names of methods are given as methods={given!r}, got {given!r}"
    for named in (None, ["cat", "dog", "toad", "tennis ball"]):  # "all" is a part of the last
        model.class_names = named
        with pytest.raises(ValueError) as caught:
            pysal.explain(model, INPUTS, given)
        assert str(caught.value) == sentence
    assert passes == []


def test_a_class_may_be_called_as_a_method_is() -> None:
    model = row_by_row()
    model.class_names = ["cat", "Gradient", "toad", "frog"]  # type: ignore[assignment]
    found = pysal.explain(model, INPUTS, "gradient", methods="gradient")
    assert found.target.tolist() == [1, 1, 1]


def test_the_third_argument_is_the_target_as_in_every_method() -> None:
    found = pysal.explain(row_by_row(), INPUTS, 3, methods="gradient")
    assert torch.equal(found.maps["gradient"], pysal.gradient(row_by_row(), INPUTS, 3))


def test_bad_seed_is_refused_before_any_work() -> None:
    passes: list[int] = []
    model = Watched(row_by_row(), lambda batch: passes.append(1))
    with pytest.raises(ValueError, match=r"^pysal.smooth_grad: seed must be a whole number in"):
        pysal.explain(model, INPUTS, seed=2**64)
    assert passes == []


def test_shared_options_reach_every_method() -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    explain(model, batch_size=2)
    assert max(rows) == 2
    inputs = INPUTS.float()
    low = pysal.explain(row_by_row().float(), inputs, 1, methods=["gradient"], precision="mixed").maps["gradient"]
    assert torch.equal(low, pysal.gradient(row_by_row().float(), inputs, 1, precision="mixed"))
    assert not torch.equal(low, pysal.gradient(row_by_row().float(), inputs, 1))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = row_by_row()

        def forward(self, batch: Tensor, shift: Tensor) -> Tensor:
            return self.net(batch + shift[:, None, None, None])

    shift, model = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64), Shifted().eval()
    found = explain(model, extra_inputs={"shift": pysal.PerImage(shift)})
    assert found.skipped == {}
    for name, call in CALLS.items():
        assert torch.equal(found.maps[name], call(model, INPUTS, extra_inputs={"shift": pysal.PerImage(shift)})), name


NAMES = "'imagenet', a list of names, or a name for each index from 0 on ({0: 'cat', 1: 'dog'})"


@pytest.mark.parametrize(
    "given",
    [
        {2: "toad", 0: "cat", 3: "frog", 1: "dog"},
        {str(index): name for index, name in enumerate(("cat", "dog", "toad", "frog"))},
        np.array(["cat", "dog", "toad", "frog"]),
        np.array(["cat", "dog", "toad", "frog"], dtype=object),
        dict(enumerate(("cat", "dog", "toad", "frog"))).values(),
    ],
    ids=["by index", "by index in words", "array", "array of objects", "values"],
)
def test_class_names_of_every_kind(given: Any) -> None:
    """As transformers and NumPy hold them, wherever names of classes are taken."""
    found = explain(row_by_row(), "toad", class_names=given, methods="gradient", method_options={})
    assert found.target_names == ["toad"] * 3
    own = pysal.models.Classifier(row_by_row(), name="four", class_names=given, input_size=(8, 8))
    assert own.class_names == ("cat", "dog", "toad", "frog")
    wrapped = pysal.models.wrap(row_by_row(), size=8, normalize="none", class_names=given)
    assert wrapped.class_names == own.class_names
    carrying = row_by_row()
    carrying.class_names = given
    assert torch.equal(pysal.gradient(carrying, INPUTS, "toad"), found.maps["gradient"])


def test_class_names_for_a_model_that_has_none() -> None:
    """They are shown, found by the target's name, and told from names that the model has itself."""
    model, names = row_by_row(), ["cat", "dog", "toad", "frog"]
    options: dict[str, Any] = {"methods": "gradient", "method_options": {}}
    found = explain(model, "frog", class_names=names, **options)
    assert found.target_names == ["frog"] * 3
    assert torch.equal(found.maps["gradient"], pysal.gradient(model, INPUTS, 3))
    assert explain(model, pysal.Margin("dog", "cat"), class_names=names, **options).target_names == ["dog minus cat"] * 3
    label = explain(model, pysal.targets.Label("toad"), class_names=tuple(names), **options)
    assert torch.equal(label.maps["gradient"], pysal.gradient(model, INPUTS, 2))
    model.class_names = ["a", "b", "c", "d"]  # type: ignore[assignment]
    assert explain(model, "frog", class_names=names, **options).target_names == ["frog"] * 3
    assert explain(model, "d", **options).target_names == ["d"] * 3
    for wrong, error, sentence in (
        (names[:3], ValueError, "have one name for each of the model's 4 classes, got 3 names"),
        *((given, TypeError, f"be {NAMES}, got {given!r}") for given in ("cats", [0, 1, 2, 3], {"cat": 0}, {1: "cat"}, 4)),
        ({}, ValueError, "hold at least one name, got none"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'pysal.explain: class_names must {sentence}')}$"):
            explain(model, class_names=wrong, **options)
    own = pysal.models.Classifier(row_by_row(), name="four", class_names=names[:3], input_size=(8, 8)).eval()
    with pytest.raises(ValueError, match=r"class_names must have one name for each of the model's 4 classes, got 3 names$"):
        explain(own, **options)


def test_progress_names_each_method() -> None:
    seen: list[str] = []
    with pysal.progress(lambda label, done, total: seen.append(label)):
        explain(row_by_row())
    with_the_clean_pass = ("gradient", "guided_backprop", "grad_cam", "guided_grad_cam")
    assert list(dict.fromkeys(seen)) == ["explain", *(name for name in METHODS if name not in with_the_clean_pass)]


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_drops_are_those_of_passes_of_one_kind() -> None:
    """torch's transformer layers make padded tokens zero where no gradients are kept, and gradient methods keep them."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.patches, self.encoder, self.head = nn.Conv2d(3, 8, 2, 2), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
            padding[:, -6:] = True
            return self.head(self.encoder(tokens, src_key_padding_mask=padding).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Padded().eval()
        images = torch.rand(2, 3, 8, 8)
    segments = pysal.Grid(2, 2)
    for size in (None, 1, 2):
        alone = pysal.leave_one_out(model, images, 1, segments=segments, score="raw", batch_size=size)
        options = {"leave_one_out": {"segments": segments}}
        methods = ["gradient", "leave_one_out"]
        among = pysal.explain(model, images, 1, methods=methods, score="raw", batch_size=size, method_options=options)
        torch.testing.assert_close(among.maps["leave_one_out"], alone, rtol=0, atol=1e-5)
