"""Further arguments of a model: a map does not depend on how many images are explained with it."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.captum import IntegratedGradients
from tests.methods.calls import CALLS, row_by_row
from tests.methods.networks import images

GENERATOR = torch.Generator().manual_seed(0)
BANK = torch.randn(3, 4, dtype=torch.float64, generator=GENERATOR)
AGES = torch.tensor([[0.5], [2.0], [1.5]], dtype=torch.float64)
INPUTS = images(3, 3, 8, 8)


class Compared(nn.Module):
    """Compares what it makes of an image and its age with each vector of a bank: scores (N, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = row_by_row()
        self.second = self.net.second

    def forward(self, inputs: Tensor, age: Tensor, bank: Tensor) -> Tensor:
        assert len(age) == len(inputs), "an age of another image"
        return (self.net(inputs) * age) @ bank.T


MODEL = Compared().double().eval()


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", CALLS)
def test_a_map_does_not_depend_on_the_number_of_images(method: str, count: int, prompts: int) -> None:
    def maps(rows: list[int], batch_size: int | None = None) -> Tensor:
        extra = {"age": pysal.PerImage(AGES[rows]), "bank": pysal.Shared(BANK[:prompts])}
        options = {"image_ids": rows} if method == "smooth_grad" else {}
        return CALLS[method](MODEL, INPUTS[rows], 0, extra_inputs=extra, batch_size=batch_size, **options)

    alone = torch.cat([maps([row]) for row in range(count)])
    assert alone.any()
    for batch_size in (None, 2):
        torch.testing.assert_close(maps(list(range(count)), batch_size), alone, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", CALLS)
def test_the_same_number_without_a_word_is_refused(method: str) -> None:
    requirement = "must be pysal.PerImage(...) or pysal.Shared(...) where it is as long as there are images"
    cases: list[tuple[Any, int, str]] = [
        ([BANK], 3, "extra_inputs[0] {}, got shape (3, 4) for 3 images"),
        ([BANK.numpy()], 3, "extra_inputs[0] {}, got shape (3, 4) for 3 images"),
        ({"bank": BANK[:1]}, 1, "extra_inputs['bank'] {}, got shape (1, 4) for 1 image"),
        ([1.0, {"text": {"ids": BANK}}], 3, "extra_inputs[1]['text']['ids'] {}, got shape (3, 4) for 3 images"),
        ([[BANK[:2], BANK]], 3, "extra_inputs[0][1] {}, got shape (3, 4) for 3 images"),
        ({"captions": ["a", "b"]}, 2, "extra_inputs['captions'] {}, got 2 entries for 2 images"),
        ([(BANK[:2], BANK[:1])], 2, "extra_inputs[0] {}, got 2 entries for 2 images"),
    ]
    for extra, count, sentence in cases:
        with pytest.raises(ValueError, match="extra_inputs") as caught:
            CALLS[method](lambda *_: pytest.fail("the model is not asked"), INPUTS[:count], 0, extra_inputs=extra)
        assert str(caught.value).split(": ", 1)[1] == sentence.format(requirement)


@dataclasses.dataclass
class Text:
    ids: Tensor
    name: str = "text"


Pair = collections.namedtuple("Pair", ["ids", "flag"])
PLACES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda ids: ids, lambda found: found),
    "array": (lambda ids: ids.numpy(), torch.from_numpy),
    "mapping": (lambda ids: {"ids": ids, "flag": True, "none": None}, lambda found: found["ids"]),
    "user mapping": (lambda ids: collections.UserDict(ids=ids), lambda found: found["ids"]),
    "nested": (lambda ids: {"text": [{"ids": ids}, 0.5]}, lambda found: found["text"][0]["ids"]),
    "named tuple": (lambda ids: Pair(ids, "on"), lambda found: found.ids),
    "dataclass": (Text, lambda found: found.ids),
    "list of rows": (lambda ids: list(ids.tolist()), lambda found: torch.tensor(found, dtype=torch.float64)),
    "tuple of tensors of other lengths": (
        lambda ids: tuple(row.repeat(5) for row in ids),
        lambda found: torch.stack(list(found))[:, :1],
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_rows_are_found_in_containers(place: str) -> None:
    put, get = PLACES[place]

    def model(inputs: Tensor, extra: Any) -> Tensor:
        return inputs.sum((1, 2, 3))[:, None] * get(extra)

    given = put(AGES)
    for batch_size in (None, 2):
        found = pysal.integrated_gradients(model, INPUTS, extra_inputs=[pysal.PerImage(given)], steps=3, batch_size=batch_size)
        torch.testing.assert_close(found, INPUTS * AGES[:, :, None, None])
    assert type(given) is type(put(AGES))
    assert torch.equal(get(given), AGES), "the caller's container is as it was"


@pytest.mark.parametrize("place", ["mapping", "user mapping", "nested", "dataclass"])
def test_words_inside_containers(place: str) -> None:
    put, get = PLACES[place]

    def model(inputs: Tensor, extra: Any) -> Tensor:
        return inputs.sum((1, 2, 3))[:, None] * get(extra)

    found = pysal.gradient(model, INPUTS, 0, extra_inputs=[put(pysal.PerImage(AGES))], batch_size=2)
    torch.testing.assert_close(found, AGES[:, :, None, None].expand_as(found))
    found = pysal.gradient(model, INPUTS, 0, extra_inputs=[put(pysal.Shared(AGES[:1]))], batch_size=2)
    torch.testing.assert_close(found, AGES[:1, :, None, None].expand_as(found))


def test_what_is_shared_is_the_same_object() -> None:
    given = {"table": BANK, "names": ["a", "b", "c"]}

    def model(inputs: Tensor, extra: Any, size: Any, number: Any) -> Tensor:
        assert extra is given
        assert (size, number) == ((8, 8), 2)
        return inputs.sum((1, 2, 3))

    pysal.gradient(model, INPUTS, 0, extra_inputs=[pysal.Shared(given), (8, 8), 2])


ROWS = "must have a row for each of the 3 images where it is pysal.PerImage"


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ([pysal.PerImage(BANK[:2])], f"extra_inputs[0] {ROWS}, got shape (2, 4)"),
        ([pysal.PerImage(torch.tensor(1.0))], f"extra_inputs[0] {ROWS}, got shape ()"),
        ([pysal.PerImage(2.0)], f"extra_inputs[0] {ROWS}, got float"),
        ({"a": pysal.PerImage(["x"])}, f"extra_inputs['a'] {ROWS}, got 1 entries"),
        (pysal.PerImage([BANK, 2.0]), f"extra_inputs[1] {ROWS}, got float"),
        (
            [pysal.PerImage({"a": BANK, "b": BANK[:2]})],
            "extra_inputs[0] must hold tensors with a row for each of the 3 images alone where it is pysal.PerImage, "
            "got shape (2, 4)",
        ),
        (
            [pysal.PerImage([BANK, BANK, BANK])],
            "extra_inputs[0] must be one tensor, or a list of something else, where a list of tensors is as long as they are, "
            "got 3 entries of 3 rows",
        ),
    ],
)
def test_rows_that_are_not_there(extra: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="extra_inputs") as caught:
        pysal.gradient(MODEL, INPUTS, 0, extra_inputs=extra)
    assert str(caught.value) == f"pysal.gradient: {sentence}"


def test_explain_and_metrics_take_them() -> None:
    extra = [pysal.PerImage(AGES), pysal.Shared(BANK)]
    found = pysal.explain(MODEL, INPUTS, 0, methods=["gradient", "integrated_gradients"], extra_inputs=extra)
    assert torch.equal(found.maps["gradient"], pysal.gradient(MODEL, INPUTS, 0, extra_inputs=extra))
    curve = pysal.metrics.deletion(MODEL, INPUTS, found.maps["gradient"], 0, extra_inputs=extra, steps=3)
    one = [pysal.PerImage(AGES[:1]), pysal.Shared(BANK)]
    alone = pysal.metrics.deletion(MODEL, INPUTS[:1], found.maps["gradient"][:1], 0, extra_inputs=one, steps=3)
    torch.testing.assert_close(curve.scores[:1], alone.scores)


def test_captum_has_its_own_rule() -> None:
    found = IntegratedGradients(lambda x, age: x.sum((1, 2, 3)) * age[:, 0]).attribute(
        INPUTS, additional_forward_args=AGES, n_steps=4
    )
    torch.testing.assert_close(found, INPUTS * AGES[:, :, None, None])


@pytest.mark.parametrize("extra", [[pysal.PerImage(AGES[:1]), pysal.Shared(BANK[:1])], [pysal.PerImage(AGES[:1]), BANK]])
def test_a_pair_model_takes_those_of_its_one_input(extra: list[Any]) -> None:
    image = INPUTS[0].movedim(0, -1).numpy()
    call = pysal.pair.torch_model(MODEL, 0, extra_inputs=extra)
    found = pysal.pair.IntegratedGradients().GetMask(image, call, x_steps=4)
    batch = np.stack([image, 0.5 * image])
    step_by_step = call(batch)["INPUT_OUTPUT_GRADIENTS"]
    bank = BANK[:1] if len(extra) and isinstance(extra[1], pysal.Shared) else BANK
    expected = [pysal.gradient(MODEL, x * INPUTS[:1], 0, extra_inputs=[extra[0], pysal.Shared(bank)]) for x in (1, 0.5)]
    np.testing.assert_allclose(step_by_step, torch.cat(expected).movedim(1, -1).numpy(), rtol=1e-11)
    assert np.isfinite(found).all()
    assert found.any()
