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
from pysal.engine.target import RowTarget, class_scores
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


@pytest.mark.parametrize("output", [None, "text", {}, [], {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, (None,)])
def test_output_without_scores(output: Any) -> None:
    kind = type(output[0] if isinstance(output, tuple) else output).__name__
    with pytest.raises(TypeError) as error:
        class_scores(output)
    assert str(error.value) == (
        f"pysal: the model's output must be a tensor or hold one as 'logits' or 'out', got {kind}; "
        "pass a callable target that picks the score"
    )


@pytest.mark.parametrize("column", [False, True], ids=["(N,)", "(N, 1)"])
@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
def test_binary_outputs(column: bool, score: str) -> None:
    def model(x: Tensor) -> Tensor:
        logit = LINEAR(x)[:, 2]
        return logit[:, None] if column else logit

    logit = model(INPUTS).reshape(-1).detach()
    slope = {
        "logit": torch.ones(2),
        "probability": logit.sigmoid() * logit.neg().sigmoid(),
        "log_probability": logit.neg().sigmoid(),
    }
    for target in (None, 0):
        found = pysal.gradient(model, INPUTS, target, score=score)
        torch.testing.assert_close(found, slope[score].double()[:, None, None, None] * WEIGHTS[2])
    with pytest.raises(ValueError, match=r"^pysal.gradient: target must be below the model's 1 classes, got 1$"):
        pysal.gradient(model, INPUTS, 1)


@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
def test_score_kinds_of_clean_images(score: str) -> None:
    logits = LINEAR(INPUTS).detach()
    table = {"logit": logits, "probability": logits.softmax(1), "log_probability": logits.log_softmax(1)}[score]
    scores, classes = request(LINEAR, INPUTS, [3, 0], score=score).clean_scores()
    torch.testing.assert_close(classes, table)
    torch.testing.assert_close(scores, table[[0, 1], [3, 0]])


def test_output_that_is_a_probability_already_is_noticed() -> None:
    message = (
        "pysal.leave_one_out: the model's output already sums to 1, and score takes its softmax again; "
        "pass score='logit' to explain the output as it is"
    )

    def model(x: Tensor) -> Tensor:
        return LINEAR(x).softmax(1)

    with pytest.warns(UserWarning, match="already sums to 1") as caught:
        pysal.leave_one_out(model, INPUTS, segments=pysal.Grid(2, 2))
    assert [str(one.message) for one in caught] == [message]
    with pytest.warns(
        UserWarning, match="already sums to 1"
    ) as caught:  # once, though the clean pass was made for another method's score
        pysal.explain(
            model, INPUTS, ["gradient", "leave_one_out"], method_options={"leave_one_out": {"segments": pysal.Grid(2, 2)}}
        )
    assert [str(one.message) for one in caught] == [message]
    pysal.leave_one_out(model, INPUTS, segments=pysal.Grid(2, 2), score="logit")


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
            "target must be a callable output -> (N,) where the model's output is not (N, K), "
            "got an output of shape (2, 3, 4, 5)",
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
    extra = {"flag": "on", "shift": shift, "question": question} if by_name else [question, shift, "on"]
    options = {"image_ids": torch.arange(3)} if method == "smooth_grad" else {}
    alone = []
    for image in range(3):
        if method == "smooth_grad":
            options = {"image_ids": [image]}
        own = question[image : image + 1]
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
