"""Which score is explained: every spelling of a target, every container of an output, every kind of score."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.request.row_score import class_scores
from pysal.engine.request.target import RowTarget, of_image
from tests.methods.calls import CALLS, VARIANTS, request, row_by_row
from tests.methods.networks import images, linear, weights

INPUTS = images(2, 3, 4, 5)
LINEAR = linear(3, 4, 5)
WEIGHTS = weights(LINEAR, INPUTS)


def margin(output: Tensor) -> Tensor:
    return output[:, 3] - output[:, 1]


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        (3, (3, 3)),
        (np.int64(3), (3, 3)),
        (torch.tensor(3), (3, 3)),
        (np.array(3), (3, 3)),
        ([3, 1], (3, 1)),
        ((3, 1), (3, 1)),
        ([np.int32(3), 1], (3, 1)),
        (range(2, 4), (2, 3)),
        ([torch.tensor(3), np.array(1)], (3, 1)),
        (np.array([3, 1], dtype=np.uint64), (3, 1)),
        (np.array([3, 1], dtype=object), (3, 1)),
        (torch.tensor([3, 1]), (3, 1)),
        (torch.tensor([3, 1], dtype=torch.uint8), (3, 1)),
        (np.array([3, 1], dtype=np.int16), (3, 1)),
    ],
    ids=repr,
)
def test_class_indices(target: Any, classes: tuple[int, int]) -> None:
    found = pysal.gradient(LINEAR, INPUTS, target)
    assert torch.equal(found, WEIGHTS[list(classes)])


def test_callable() -> None:
    torch.testing.assert_close(pysal.gradient(LINEAR, INPUTS, margin), (WEIGHTS[3] - WEIGHTS[1]).expand_as(INPUTS))
    # it is given the output as the model returned it, and the kind of score does not touch what it returns
    found = pysal.gradient(lambda x: {"a": LINEAR(x), "b": x}, INPUTS, lambda out: out["a"][:, 2], score="probability")
    assert torch.equal(found, WEIGHTS[2].expand_as(INPUTS))


def test_row_target() -> None:
    """It is told which image each row belongs to, also where chunks and noisy copies mix them."""
    several = torch.cat([INPUTS, INPUTS.flip(0), INPUTS])

    class Own(RowTarget):
        def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
            return output[torch.arange(len(rows)), rows % 4]

    for batch_size in (None, 1, 4):
        found = pysal.smooth_grad(LINEAR, several, Own(), samples=3, batch_size=batch_size)
        torch.testing.assert_close(found, WEIGHTS[[0, 1, 2, 3, 0, 1]])


def test_none_is_the_highest_class_of_each_image() -> None:
    classes = LINEAR(INPUTS).argmax(1)
    inputs = torch.stack([INPUTS[0], WEIGHTS[(int(classes[0]) + 1) % 4]])  # the second image is made to be of another class
    classes = LINEAR(inputs).argmax(1)
    assert classes[0] != classes[1]
    assert torch.equal(pysal.gradient(LINEAR, inputs), WEIGHTS[classes])


Named = collections.namedtuple("Named", ["logits", "other"])
Unnamed = collections.namedtuple("Unnamed", ["first", "second"])


@dataclasses.dataclass
class Output:
    features: Tensor
    logits: Tensor


class Own:
    """As people write them: neither a mapping nor a dataclass."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.me, self.text = logits, self, "text"


class ModelOutput(collections.OrderedDict[str, Any]):
    """As Hugging Face's: a mapping whose entries are attributes and integer indices, too."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda scores: (scores, scores.new_zeros(1)),
    "list": lambda scores: [scores],
    "nested": lambda scores: [{"logits": scores}],
    "namedtuple": lambda scores: Unnamed(scores, 1),
    "namedtuple with logits": lambda scores: Named(scores, 1),
    "dict with logits": lambda scores: {"loss": scores.new_zeros(()), "logits": scores},
    "dict with out": lambda scores: collections.OrderedDict(out=scores, aux=-scores),
    "dict of one tensor": lambda scores: {"anything": scores, "name": "text"},
    "ModelOutput": lambda scores: ModelOutput(loss=None, logits=scores, hidden_states=(scores,)),
    "dataclass": lambda scores: Output(-scores, scores),
    "own class": lambda scores: Own(scores),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container: str) -> None:
    wrap = CONTAINERS[container]
    assert torch.equal(pysal.gradient(lambda x: wrap(LINEAR(x)), INPUTS, [0, 2]), WEIGHTS[[0, 2]])


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: (a,), lambda a: {"logits": a}])
def test_numpy_output(wrap: Callable[[Any], Any]) -> None:
    def model(x: Tensor) -> Any:
        return wrap(LINEAR(x).detach().numpy())

    expected = pysal.leave_one_out(LINEAR, INPUTS, segments=pysal.Grid(2, 2))
    assert torch.equal(pysal.leave_one_out(model, INPUTS, segments=pysal.Grid(2, 2)), expected)


@pytest.mark.parametrize("output", [None, "text", {}, [], (None,)])
def test_output_without_scores(output: Any) -> None:
    kind = type(output[0] if isinstance(output, tuple) else output).__name__
    with pytest.raises(TypeError) as error:
        class_scores(output)
    assert str(error.value) == (
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {kind}; "
        "pass a callable target that picks the score"
    )


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_an_output_of_several_tables_says_how_to_name_one(kind: Any) -> None:
    """Two heads of as many classes: neither is taken without a word."""
    other = -LINEAR(INPUTS)
    output = {"a": LINEAR(INPUTS), "b": other} if kind is dict else kind([LINEAR(INPUTS), other])
    with pytest.raises(TypeError) as error:
        class_scores(output)
    held, entry = (
        ("", "'a'), of one of 'a', 'b',") if kind is dict else (" whose entries 0, 1 have shape (2, 4)", "0), of one of them,")
    )
    assert str(error.value) == (
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {kind.__name__}{held}; "
        f"pass pysal.targets.Label(..., field={entry} or a callable target that picks the score"
    )

    def model(images: Tensor) -> Any:
        return {"a": LINEAR(images), "b": -LINEAR(images)} if kind is dict else kind([LINEAR(images), -LINEAR(images)])

    second = pysal.targets.Label([0, 2], field="b" if kind is dict else 1)
    assert torch.equal(pysal.gradient(model, INPUTS, second), -WEIGHTS[[0, 2]])


@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
def test_score_kinds_of_clean_images(score: str) -> None:
    logits = LINEAR(INPUTS).detach()
    table = {"logit": logits, "probability": logits.softmax(1), "log_probability": logits.log_softmax(1)}[score]
    scores, classes = request(LINEAR, INPUTS, [3, 0], score=score).clean_scores()
    torch.testing.assert_close(classes, table)
    torch.testing.assert_close(scores, table[[0, 1], [3, 0]])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda out: out, ValueError, "target(output) must be a tensor of shape (2,), got shape (2, 4)"),
        (lambda out: out.sum(), ValueError, "target(output) must be a tensor of shape (2,), got shape ()"),
        (lambda out: 1.0, ValueError, "target(output) must be a tensor of shape (2,), got float"),
        (lambda out: out.argmax(1), TypeError, "target(output) must be floating point, got torch.int64"),
        (lambda out: out[:, 0] > 0, TypeError, "target(output) must be floating point, got torch.bool"),
    ],
)
def test_callable_that_returns_no_scores(returned: Any, error: type[Exception], message: str) -> None:
    for method in (pysal.gradient, pysal.leave_one_out):
        with pytest.raises(error) as caught:
            method(LINEAR, INPUTS, returned)
        assert str(caught.value) == f"pysal.{method.__name__}: {message}"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: LINEAR(x)[:1], ValueError, "the model's output must have one row for each of 2 inputs, got (1, 4)"),
        (lambda x: LINEAR(x)[0], ValueError, "the model's output must have one row for each of 2 inputs, got (4, 1)"),
        (lambda x: LINEAR(x).int(), TypeError, "the model's output must be floating point, got torch.int32"),
        (
            lambda x: x,
            ValueError,
            "target must be pysal.targets.Pixel(...) or another callable output -> (N,) "
            "where the model's output is not (N, K), got an output of shape (2, 3, 4, 5)",
        ),
        (
            lambda x: x.sum(),
            ValueError,
            "target must be a callable output -> (N,) where the model's output is not (N, K), got an output of shape ()",
        ),
    ],
)
def test_outputs_that_are_no_table(model: Any, error: type[Exception], message: str) -> None:
    for method in (pysal.gradient, pysal.leave_one_out):
        with pytest.raises(error) as caught:
            method(model, INPUTS, 0)
        assert str(caught.value) == f"pysal.{method.__name__}: {message}"


class Question(nn.Module):
    """Scores an image after multiplying it by a number per image, and adds what it is told: of each pixel and as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = row_by_row()
        self.second = self.scores.second

    def forward(self, inputs: Tensor, question: Tensor, shift: Tensor | float = 0.0, flag: str = "on") -> Tensor:
        assert len(question) == len(inputs)
        assert flag == "on"
        return self.scores(inputs * question[:, None, None, None]) + shift


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("by_name", [False, True])
def test_extra_inputs_go_with_their_image(method: str, by_name: bool) -> None:
    model = Question().double().eval()
    inputs, question, shift = images(3, 3, 8, 8), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.ones(4)
    asked = pysal.PerImage(question)
    extra = {"flag": "on", "shift": shift, "question": asked} if by_name else [asked, shift, "on"]
    options = {"image_ids": torch.arange(3)} if method == "smooth_grad" else {}
    alone = []
    for image in range(3):
        if method == "smooth_grad":
            options = {"image_ids": [image]}
        own = pysal.PerImage(question[image : image + 1])
        one = {"question": own} if by_name else (own,)
        alone.append(CALLS[method](model, inputs[image : image + 1], 1, extra_inputs=one, **options))
    if method == "smooth_grad":
        options = {"image_ids": [0, 1, 2]}
    for batch_size in (None, 2, 5):
        together = CALLS[method](model, inputs, 1, extra_inputs=extra, batch_size=batch_size, **options)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-13)


class Fickle(nn.Module):
    """A network whose highest class is 1 on images of mean above 0.4, elsewhere 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = row_by_row()
        self.second = self.net.second

    def forward(self, inputs: Tensor) -> Tensor:
        other = inputs.mean((1, 2, 3))[:, None] > 0.4
        return self.net(inputs) / 100 + torch.nn.functional.one_hot(other.long(), 4)[:, 0]


@pytest.mark.parametrize("method", VARIANTS)
def test_open_target_is_that_of_the_clean_image(method: str) -> None:
    model, inputs = Fickle().double().eval(), torch.cat([images(2, 3, 8, 8), images(1, 3, 8, 8) / 3])
    classes = model(inputs).argmax(1)
    assert classes.tolist() == [1, 1, 0], "the images shall have two different classes"
    assert model(inputs * 0.5).argmax(1).tolist() == [0, 0, 0], "and those of their changed versions others"
    for batch_size in (None, 1, 2):
        opened = VARIANTS[method](model, inputs, batch_size=batch_size)
        assert opened.flatten(1).any(1).all()
        assert torch.equal(opened, VARIANTS[method](model, inputs, classes, batch_size=batch_size))


MASKS = torch.zeros(4, 4, 5, dtype=torch.float64)
for number in range(4):
    MASKS[number, number] = 1 + number


def maps(inputs: Tensor) -> Tensor:
    """Scores (N, 3, H, W) that are not linear in the image."""
    return inputs.square() + inputs.flip(1)


def of_mask(number: int) -> Callable[[Tensor], Tensor]:
    return lambda output: (output[:, 1] * MASKS[number]).sum((1, 2))


PER_IMAGE = {
    "a list of callables": [of_mask(number) for number in range(4)],
    "a row target": RowTarget(lambda output, images: (output[:, 1] * MASKS[images]).sum((1, 2))),
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("target", ["a list of callables", "a row target"])
@pytest.mark.parametrize("method", sorted(set(VARIANTS) - {"leave_one_out of superpixels"}))
def test_one_callable_per_image(method: str, target: str, batch_size: int | None) -> None:
    if "cam" in method or "guided" in method or "deconv" in method:  # a network with layers and ReLUs, and one score per image
        model, functions = row_by_row().double().eval(), [lambda out, c=c: out[:, c] for c in range(4)]
        inputs = images(4, 3, 8, 8)
        several = RowTarget(lambda out, rows: out.gather(1, rows[:, None])[:, 0]) if target == "a row target" else functions
    else:
        model, functions, several = maps, [of_mask(number) for number in range(4)], PER_IMAGE[target]
        inputs = images(4, 3, 4, 5)
    options = [{"image_ids": [number]} if "smooth" in method or "rise" in method else {} for number in range(4)]
    alone = [VARIANTS[method](model, inputs[i : i + 1], functions[i], **options[i]) for i in range(4)]
    found = VARIANTS[method](model, inputs, several, batch_size=batch_size)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12)


class Labelled(nn.Module):
    def __init__(self, **names: Any) -> None:
        super().__init__()
        self.inner = LINEAR
        for name, value in names.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


@dataclasses.dataclass
class Configuration:
    id2label: Any


NAMES = ["tabby cat", "tiger cat", "tiger", "tabletop"]
NAMED: dict[str, Callable[[], Any]] = {
    "class_names": lambda: Labelled(class_names=NAMES),
    "a mapping": lambda: Labelled(class_names={3: "tabletop", 1: "tiger cat", 0: "tabby cat", 2: "tiger"}),
    "id2label": lambda: Labelled(config=Configuration({str(index): name for index, name in enumerate(NAMES)})),
    "Classifier": lambda: pysal.models.Classifier(LINEAR, name="four", class_names=NAMES, input_size=(4, 5)),
    "inside another": lambda: pysal.Normalized(Labelled(class_names=NAMES), [0.0] * 3, [1.0] * 3).double().eval(),
    "prepared": lambda: pysal.prepare(Labelled(class_names=NAMES).eval(), INPUTS),
}


@pytest.mark.filterwarnings("ignore:.*prepare")
@pytest.mark.parametrize("kind", NAMED)
def test_classes_by_name(kind: str) -> None:
    model = NAMED[kind]()
    if isinstance(model, nn.Module):
        model.eval()
    for target, expected in [
        ("Tabby", WEIGHTS[[0, 0]]),
        (["tiger", "tabletop"], WEIGHTS[[2, 3]]),
        (np.array(["tiger", "tabletop"]), WEIGHTS[[2, 3]]),
        ([1, "tiger"], WEIGHTS[[1, 2]]),
        ("3", WEIGHTS[[3, 3]]),
        (pysal.Margin("tiger", "tabby"), WEIGHTS[[2, 2]] - WEIGHTS[[0, 0]]),
        (pysal.Margin(["tiger", 1], torch.tensor([1, 0])), WEIGHTS[[2, 1]] - WEIGHTS[[1, 0]]),
        ([pysal.Margin(2, 1), pysal.Margin("tiger cat", 0)], WEIGHTS[[2, 1]] - WEIGHTS[[1, 0]]),
    ]:
        torch.testing.assert_close(pysal.gradient(model, INPUTS, target), expected.expand_as(INPUTS))
    torch.testing.assert_close(pysal.class_gradients(model, INPUTS, ["tiger", 0])[:, 0], WEIGHTS[[2, 2]])
    for target, argument in (("tabbi", "target"), (pysal.Margin(1, "tabbi"), "target.b"), (["tabbi", 1], "target")):
        with pytest.raises(ValueError, match="name a class") as caught:
            pysal.gradient(model, INPUTS, target)
        assert str(caught.value) == f"pysal.gradient: {argument} must name a class (did you mean tabby cat (0)?), got 'tabbi'"


def test_names_that_are_digits() -> None:
    model = Labelled(class_names=["3", "2", "1", "0"]).eval()
    torch.testing.assert_close(pysal.gradient(model, INPUTS, "3"), WEIGHTS[[0, 0]])
    torch.testing.assert_close(pysal.gradient(model, INPUTS, 3), WEIGHTS[[3, 3]])


def test_names_of_another_head() -> None:
    model = nn.Sequential(Labelled(class_names=NAMES), nn.Linear(4, 9).double()).eval()
    with pytest.raises(ValueError, match="class index where the model names 4 classes and answers 9, got a name"):
        pysal.gradient(model, INPUTS, "tiger")


@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
def test_margin_of_each_kind_of_score(score: str) -> None:
    logits = LINEAR(INPUTS).detach()
    table = {"logit": logits, "probability": logits.softmax(1), "log_probability": logits.log_softmax(1)}[score]
    plan = request(LINEAR, INPUTS, pysal.Margin([3, 0], 1), score=score)
    torch.testing.assert_close(plan.clean_scores()[0], table[[0, 1], [3, 0]] - table[:, 1])
    found = pysal.explain(LINEAR, INPUTS, pysal.Margin([3, 0], 1), methods=["gradient"], score=score)
    torch.testing.assert_close(found.scores, plan.clean_scores()[0])
    assert found.target.tolist() == [-1, -1]
    assert found.probabilities is None
    assert found.target_names == ["class 3 minus class 1", "class 0 minus class 1"]


def test_a_margin_stays_one_in_a_randomised_network() -> None:
    model, inputs = row_by_row().eval(), images(2, 3, 8, 8)
    options = {"method": "gradient", "layers": ["second"]}
    found = pysal.metrics.parameter_randomisation(model, inputs, pysal.Margin([1, 2], 0), **options)
    expected = pysal.metrics.parameter_randomisation(
        model, inputs, RowTarget(lambda out, rows: out.gather(1, rows[:, None] + 1)[:, 0] - out[:, 0]), **options
    )
    torch.testing.assert_close(found.correlation, expected.correlation)


PREDICTED = torch.tensor([3, 1, 0, 2])
ADVICE = "what differs from image to image needs one target per image or a pysal.RowTarget, which is told the image of each row"
FOUR = torch.cat([INPUTS, INPUTS.flip(1)])
COUPLED: dict[str, Callable[[Any], Any]] = {
    "one class per image": lambda out: out[torch.arange(len(out)), PREDICTED[: len(out)]] - out[..., 1],
    "one class per image, of a certain number": lambda out: out[torch.arange(len(out)), PREDICTED] - out[..., 1],
    "a weight by place": lambda out: out[:, 1] * torch.arange(1, len(out) + 1),
    "centred": lambda out: out[:, 1] - out[:, 1].mean(),
    "softmax over images": lambda out: out.softmax(0)[:, 1],
    "the largest": lambda out: out[:, 1] / out[:, 1].abs().max(),
    "running sum": lambda out: out[:, 1].cumsum(0),
    "rank": lambda out: out[:, 1] * out[:, 1].argsort(),
    "written in place": lambda out: out.mul_(torch.arange(1, len(out) + 1)[:, None])[:, 1],
}


@pytest.mark.parametrize("container", ["tensor", *CONTAINERS])
@pytest.mark.parametrize("target", COUPLED)
def test_a_callable_whose_scores_do_not_follow_their_rows_is_refused(target: str, container: str) -> None:
    wrap = CONTAINERS.get(container, lambda scores: scores)

    def model(x: Tensor) -> Any:
        return wrap(LINEAR(x))

    for method, options in (
        (pysal.leave_one_out, {"segments": pysal.Grid(2, 2)}),
        (pysal.gradient, {}),
        (pysal.integrated_gradients, {"steps": 4, "batch_size": 4}),
        (pysal.integrated_gradients, {"steps": 4}),
    ):
        with pytest.raises(ValueError, match=r"any number of rows|by that row alone") as caught:
            method(model, FOUR, lambda out: COUPLED[target](class_scores(out)), **options)
        assert str(caught.value).startswith(f"pysal.{method.__name__}: target must score ")
        assert f"({ADVICE}), got " in str(caught.value)
        assert "\n" not in str(caught.value)


FOLLOWING: dict[str, Callable[[Any], Any]] = {
    "margin to the best other": lambda out: out[:, 1] - out[:, [0, 2, 3]].amax(1),
    "entropy": lambda out: -(out.softmax(1) * out.log_softmax(1)).sum(1),
    "a ratio with infinities": lambda out: out[:, 1] / (out[:, 0] * 0),
    "not a number": lambda out: (out[:, 1] - 1e9).sqrt(),
    "always zero": lambda out: out[:, 1] * 0,
    "products with a bank": lambda out: (out @ torch.ones(4, 300, dtype=out.dtype)).logsumexp(1),
    "written in place": lambda out: out.mul_(2)[:, 1],
    "by rank": lambda out: out.sort(1).values[:, 0] - out.argsort(1)[:, 1] * out[:, 2],
    "module": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("target", FOLLOWING)
def test_a_callable_that_follows_its_rows_is_taken(target: str, count: int) -> None:
    found = pysal.leave_one_out(LINEAR, FOUR[:count], FOLLOWING[target], segments=pysal.Grid(1, 2))
    expected = torch.cat(
        [
            FOLLOWING[target](LINEAR(x[None]).detach())
            - FOLLOWING[target](LINEAR(x[None] * torch.tensor([1.0, 1, 0, 0, 0])).detach())
            for x in FOUR[:count]
        ]
    )
    torch.testing.assert_close(found[:, 0, 0, 4], expected.detach(), equal_nan=True)


def test_a_callable_of_chance_or_state_is_refused() -> None:
    calls: list[int] = []

    def counting(out: Tensor) -> Tensor:
        calls.append(1)
        return out[:, 1] * len(calls)

    torch.manual_seed(0)
    for target in (counting, lambda out: out[:, 1] + torch.rand(len(out))):
        with pytest.raises(
            ValueError, match=r"target must score the same output the same each time it is called, got .* for one row"
        ):
            pysal.gradient(LINEAR, INPUTS, target)


def test_looking_at_a_callable_takes_no_pass_of_the_model() -> None:
    passes: list[int] = []

    def model(x: Tensor) -> Tensor:
        passes.append(len(x))
        return LINEAR(x)

    pysal.gradient(model, FOUR, margin)
    assert passes == [4]
    calls: list[int] = []

    def counted(out: Tensor) -> Tensor:
        calls.append(len(out))
        return margin(out)

    pysal.integrated_gradients(model, FOUR, counted, steps=32, batch_size=4)
    # looked at in the first pass alone; of whole batches one is run twice, for whether the model repeats itself
    assert calls == [4, 4, 4, 2, 2] + [4] * (31 + 2)


def test_a_row_target_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="by that row alone"):
        pysal.gradient(LINEAR, FOUR, RowTarget(lambda out, images: out[torch.arange(len(out)), PREDICTED[: len(out)]]))
    with pytest.raises(ValueError, match="by that row alone"):  # each callable is given a row of its image alone at first
        pysal.gradient(LINEAR, FOUR, [lambda out: out[:, 1] - out[:, 1].mean()] * 4)


def test_detections_are_rows_of_a_list() -> None:
    def model(x: Tensor) -> Any:
        return [{"scores": scores.repeat(2), "boxes": scores[:2]} for scores in LINEAR(x)]

    def best(out: Any) -> Tensor:
        return torch.stack([one["scores"][1] for one in out])

    torch.testing.assert_close(pysal.gradient(model, INPUTS, best), WEIGHTS[[1, 1]])
    with pytest.raises(ValueError, match="by that row alone"):
        pysal.gradient(model, INPUTS, lambda out: torch.stack([one["scores"][i] for i, one in enumerate(out)]))


OF_ALL: dict[str, Any] = {
    "a class": 1,
    "classes": [3, 1, 0, 2],
    "a tensor": torch.tensor([3, 1, 0, 2]),
    "a margin": pysal.Margin([3, 1, 0, 2], [0, 2, 1, 3]),
    "a margin to one class": pysal.Margin(torch.tensor([3, 1, 1, 2]), 0),
    "margins": [pysal.Margin(3, 0), pysal.Margin(1, 2), pysal.Margin(0, 1), pysal.Margin(2, 3)],
    "a callable": margin,
    "callables": [lambda out, c=c: out[:, c] for c in range(4)],
    "a row target": RowTarget(lambda out, rows: out.gather(1, rows[:, None])[:, 0]),
    "row targets": [RowTarget(lambda out, rows: out.gather(1, rows[:, None])[:, 0])] * 4,
}


@pytest.mark.parametrize("target", OF_ALL)
def test_the_target_of_one_image_alone(target: str) -> None:
    together = pysal.gradient(LINEAR, FOUR, OF_ALL[target])
    for image in range(4):
        alone = pysal.gradient(LINEAR, FOUR[image : image + 1], of_image(OF_ALL[target], image, 4))
        torch.testing.assert_close(alone, together[image : image + 1])
