"""The gradient: closed forms on linear models, plain autograd, central differences, captum."""

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor

import pysal
from pysal.testing import assert_no_worse
from tests.methods.calls import Watched, row_by_row
from tests.methods.networks import assert_rounding, gradients, images, linear, smooth, weights

SHAPES = [(1, 3, 5, 7), (2, 1, 6, 4), (3, 4, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_a_linear_model_is_its_weights(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), linear(*shape[1:])
    for target in range(4):
        found = pysal.gradient(model, inputs, target)
        # 1 * w + 0 * the other classes' weights: no rounding at all
        assert torch.equal(found, weights(model, inputs)[target].expand(shape))


def test_of_each_image_explains_its_own_target() -> None:
    inputs, model = images(3, 3, 5, 4), linear(3, 5, 4)
    w = weights(model, inputs)
    assert torch.equal(pysal.gradient(model, inputs, [3, 0, 2]), w[[3, 0, 2]])
    assert torch.equal(pysal.gradient(model, inputs, torch.tensor([1, 1, 0])), w[[1, 1, 0]])
    highest = model(inputs).argmax(1)
    assert torch.equal(pysal.gradient(model, inputs), w[highest])


def test_of_a_margin_between_two_classes_is_the_difference_of_their_weights() -> None:
    inputs, model = images(2, 3, 5, 4), linear(3, 5, 4)
    w = weights(model, inputs)
    found = pysal.gradient(model, inputs, lambda output: output[:, 2] - output[:, 1])
    assert torch.equal(found, (w[2] - w[1]).expand_as(inputs))


@pytest.mark.parametrize("score", ["probability", "log_probability"])
def test_of_probabilities_of_a_linear_model(score: str) -> None:
    # p = softmax(z): dp_k/dx = p_k (w_k - sum_j p_j w_j), d(log p_k)/dx is the same over p_k
    inputs, model = images(2, 3, 5, 4), linear(3, 5, 4)
    w, p = weights(model, inputs), torch.softmax(model(inputs).detach(), 1)
    expected = w[1] - torch.einsum("bk,kchw->bchw", p, w)
    if score == "probability":
        expected = p[:, 1, None, None, None] * expected
    found = pysal.gradient(model, inputs, 1, score=score)
    # the logits sum 60 products; the softmax and the sum over 4 classes add about 20 roundings
    assert_rounding(found, expected, 60 + 20, scale=float(w.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_plain_autograd_of_each_image_alone(shape: tuple[int, ...]) -> None:
    inputs, model = images(*shape), smooth(shape[1])
    expected = gradients(model, inputs, 2)
    # each layer sums at most 9 * 6 products, and two layers come back, plus the tanh's derivatives
    assert_rounding(pysal.gradient(model, inputs, 2), expected, 4 * 54)
    single, small = smooth(shape[1]).float(), inputs.float()
    assert_no_worse(pysal.gradient(single, small, 2), expected, gradients(single, small, 2))


def test_is_what_central_differences_say() -> None:
    inputs, model = images(1, 3, 4, 5), smooth()
    found = pysal.gradient(model, inputs, 1)

    def slope(step: float) -> Tensor:
        moved = torch.eye(inputs.numel(), dtype=torch.float64).unflatten(1, inputs.shape[1:]) * step
        with torch.no_grad():
            return ((model(inputs + moved) - model(inputs - moved))[:, 1] / (2 * step)).view_as(inputs)

    # the error of a central difference is f''' h^2 / 6 + f''''' h^4 / 120 + ...: halving h quarters it, so the two
    # differences tell it: fine - true = (coarse - fine) / 3; a tenth of it is more than the next term
    coarse, fine = slope(2e-3), slope(1e-3)
    assert float((fine - found).abs().max()) <= 1.1 * float((coarse - fine).abs().max()) / 3


def test_equals_captum() -> None:
    inputs, model = images(2, 3, 6, 5), smooth()
    expected = Saliency(model).attribute(inputs.clone().requires_grad_(), target=2, abs=False)
    assert_rounding(pysal.gradient(model, inputs, 2), expected, 4 * 54)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("score", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_gradients_of_classes_are_those_one_by_one(prepared: bool, score: str, batch_size: int | None) -> None:
    model, inputs = row_by_row(), images(3, 3, 8, 8)
    given = pysal.prepare(model, inputs, batch_size=2) if prepared else model
    classes = torch.tensor([[0, 3, 1, 1, 2], [2, 2, 0, 1, 3], [1, 0, 3, 2, 0]])
    found = pysal.class_gradients(given, inputs, classes, score=score, batch_size=batch_size)
    assert found.shape == (3, 5, 3, 8, 8)
    for t in range(5):
        assert_rounding(found[:, t], pysal.gradient(model, inputs, classes[:, t], score=score), 1000)
    assert torch.equal(pysal.class_gradients(given, inputs, [3, 1])[1:2], pysal.class_gradients(given, inputs[1:2], [3, 1]))


def test_gradients_of_classes_take_one_forward_pass() -> None:
    rows: list[int] = []
    model = Watched(row_by_row(), lambda batch: rows.append(len(batch)))
    pysal.class_gradients(model, images(3, 3, 8, 8), [0, 1, 2, 3])
    assert rows == [3]


def test_gradients_of_classes_in_inference_mode() -> None:
    model, inputs = row_by_row(), images(2, 3, 8, 8)
    for score in ("logit", "probability"):
        expected = pysal.class_gradients(model, inputs, [0, 2], score=score)
        with torch.inference_mode():
            for classes in ([0, 2], torch.tensor([0, 2]), torch.tensor([[0, 2], [0, 2]])):
                assert torch.equal(pysal.class_gradients(model, inputs.clone(), classes, score=score), expected)
        classes = torch.tensor([0, 2])
        with torch.no_grad():
            assert torch.equal(pysal.class_gradients(model, inputs, classes, score=score), expected)


@pytest.mark.parametrize(
    ("classes", "error", "sentence"),
    [
        ([0, 4], ValueError, "classes must be below the model's 4 classes, got 4"),
        ([0, -1], ValueError, "classes must be 0 or more, got -1"),
        ([], ValueError, "classes must have shape (T,) or (2, T), T of 1 or more, got shape (0,)"),
        ([[0], [1], [2]], ValueError, "classes must have shape (T,) or (2, T), T of 1 or more, got shape (3, 1)"),
        (3, ValueError, "classes must have shape (T,) or (2, T), T of 1 or more, got shape ()"),
        ([0.5], TypeError, "classes must be whole numbers, got float32"),
        ("cat", TypeError, "classes must be class indices or names (T,) or (B, T), got 'cat'"),
        (["cat"], ValueError, "classes must be a class index for a model that carries no class names, got 'cat'"),
        ([0, 2**70], TypeError, f"classes must be class indices or names (T,) or (B, T), got [0, {2**70}]"),
        ([[0], [1, 2]], TypeError, "classes must be class indices or names (T,) or (B, T), got [[0], [1, 2]]"),
        ({1, 2}, TypeError, "classes must be class indices or names (T,) or (B, T), got {1, 2}"),
        (
            torch.ones(2, dtype=torch.long).to_sparse(),
            TypeError,
            "classes must be a dense tensor with values, got one that is of layout sparse_coo",
        ),
    ],
)
def test_bad_classes(classes: object, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        pysal.class_gradients(row_by_row(), images(2, 3, 8, 8), classes)
    assert str(caught.value) == f"pysal.class_gradients: {sentence}"
