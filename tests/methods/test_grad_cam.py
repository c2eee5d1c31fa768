"""Grad-CAM by hand on convolutional layers, tokens, captioners and models with two inputs, and against captum."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

import pysal
from tests.methods.networks import Answer, assert_rounding, images, rectified, seeded, smooth

# a layer's map sums at most 9 * 6 products per value, its gradients at most as many, over at most 6 channels
OPERATIONS = 4 * 54


def by_hand(activations: Tensor, gradients: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The layer's own map and the one resized, from the paper's two equations."""
    native = torch.zeros(len(activations), 1, *activations.shape[2:], dtype=activations.dtype)
    for channel in range(activations.shape[1]):
        weight = gradients[:, channel].flatten(1).sum(1) / activations[0, 0].numel()
        native[:, 0] += weight[:, None, None] * activations[:, channel]
    native = native.clamp_min(0)
    return native, F.interpolate(native, size, mode="bilinear")


def explained(model: Any, inputs: Tensor, target: Any, **options: Any) -> Any:
    return pysal.explain(model, inputs, target, methods=["grad_cam"], method_options={"grad_cam": options})["grad_cam"]


class Caption(nn.Module):
    """Writes three words about an image: logits (N, 3, vocabulary), word after word from a state that each word changes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 3, stride=2)
        self.word, self.state = nn.Linear(6, 10), nn.Linear(16, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        state = torch.relu(self.encoder(inputs)).mean((2, 3))
        words = []
        for _ in range(3):
            words.append(self.word(8 * state))
            state = torch.tanh(self.state(torch.cat([words[-1], state], 1)))
        return torch.stack(words, 1)


class Transformer(nn.Module):
    """One block of attention and one MLP over a class token and 3 x 3 patches of 2 x 2 pixels; answers from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = self.patches(inputs).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(inputs), -1, -1), patches], 1)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(self.read(self.block(tokens)))

    def read(self, tokens: Tensor) -> Tensor:
        return (tokens + self.second(tokens, tokens, tokens, need_weights=False)[0])[:, 0]


class Swin(nn.Module):
    """Works on maps with channels last, (N, h, w, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed = self.mix(F.gelu(self.patches(inputs).permute(0, 2, 3, 1)))
        return self.head(torch.tanh(8 * mixed).mean((1, 2)))


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (1, 1, 6, 8), (3, 4, 5, 5)], ids=str)
@pytest.mark.parametrize("layer", ["0", "1", "2", "3"])
def test_is_the_two_equations(shape: tuple[int, ...], layer: str) -> None:
    inputs, model = images(*shape), rectified(shape[1])
    activations = model[: int(layer) + 1](inputs).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model[int(layer) + 1 :](activations)[:, 2].sum(), activations)
    native, resized = by_hand(activations.detach(), gradients, shape[2:])
    assert float(resized.max()) > 0

    found = explained(model, inputs, 2, layer=layer)
    assert_rounding(found.map, resized, OPERATIONS)
    assert_rounding(found.details["native"], native, OPERATIONS)
    assert found.details["layer"] == layer
    assert torch.equal(pysal.grad_cam(model, inputs, 2, layer=model[int(layer)]), found.map)


def test_of_a_pooled_linear_head_is_its_class_activation_map() -> None:
    # f_k = sum_c v_kc * mean(A_c): df/dA is v / (h w) everywhere, so the map is relu(sum_c v_kc A_c) / (h w)
    inputs = images(2, 3, 9, 7)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)))
    activations = model[0](inputs).detach()
    for target in range(4):
        native = torch.einsum("c,bchw->bhw", model[3].weight[target].detach(), activations).clamp_min(0)[:, None] / 35
        found = explained(model, inputs, target, layer="0")
        assert_rounding(found.details["native"], native, OPERATIONS)
        assert_rounding(found.map, F.interpolate(native, (9, 7), mode="bilinear"), OPERATIONS)


def test_default_layer_is_the_last_with_a_spatial_map() -> None:
    inputs, model = images(2, 3, 9, 7), rectified()
    found = explained(model, inputs, 1)
    assert found.details["layer"] == "3", "the ReLU before the pool"
    assert torch.equal(found.map, explained(model, inputs, 1, layer="3").map)


def test_speaks_only_for_the_score() -> None:
    # negated scores have negated maps, and their positive parts do not overlap
    inputs, model = images(2, 3, 9, 7), smooth()
    positive = explained(model, inputs, lambda output: output[:, 1], layer="2").details["native"]
    negative = explained(model, inputs, lambda output: -output[:, 1], layer="2").details["native"]
    assert float(positive.max()) > 0
    assert float(negative.max()) > 0
    assert float((positive * negative).abs().max()) == 0


@pytest.mark.parametrize("model", [smooth(), rectified()], ids=["smooth", "rectified"])
def test_equals_captum(model: nn.Sequential) -> None:
    inputs = images(3, 3, 9, 8)
    for layer in (0, 2, 3):
        theirs = LayerGradCam(model, model[layer]).attribute(inputs, target=1, relu_attributions=True)
        found = explained(model, inputs, 1, layer=str(layer))
        assert_rounding(found.details["native"], theirs, OPERATIONS)
        resized = LayerAttribution.interpolate(theirs, (9, 8), interpolate_mode="bilinear")
        assert_rounding(found.map, resized, OPERATIONS)


@pytest.mark.parametrize("position", [0, 2])
def test_explains_a_word_of_a_caption(position: int) -> None:
    inputs, model = images(3, 3, 9, 7), seeded(Caption)

    def log_probability_of_word(output: Tensor) -> Tensor:
        return output[:, position].log_softmax(1)[:, 6]

    activations = model.encoder(inputs).detach().requires_grad_()

    class Rest(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return activations

    rest = seeded(Caption)
    rest.encoder = Rest()
    (gradients,) = torch.autograd.grad(log_probability_of_word(rest(inputs)).sum(), activations)
    _, expected = by_hand(activations.detach(), gradients, (9, 7))
    found = pysal.grad_cam(model, inputs, log_probability_of_word, layer="encoder", batch_size=2)
    assert float(expected.max()) > 0
    assert_rounding(found, expected, 10 * OPERATIONS)  # the recurrence comes back through up to 6 linear layers of 16


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize("by_name", [False, True])
def test_answers_about_an_image_and_a_question(by_name: bool, batch_size: int | None) -> None:
    inputs, model = images(3, 3, 9, 7), seeded(Answer)
    questions = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 0, 0]])
    extra = pysal.PerImage({"question": questions} if by_name else (questions,))
    found = pysal.grad_cam(model, inputs, 2, layer="relu", extra_inputs=extra, batch_size=batch_size)

    # f = sum_c v_c q_c mean(A_c) * 8, so df/dA_c = 8 v_c q_c / (h w) everywhere
    with torch.no_grad():
        seen, asked = model.relu(model.encoder(inputs)), model.words(questions).sum(1)
        gradients = (8 * model.head.weight[2] * asked / 12)[:, :, None, None].expand_as(seen)
    _, expected = by_hand(seen, gradients, (9, 7))
    assert float(expected.flatten(1).amax(1).min()) > 0
    assert_rounding(found, expected, OPERATIONS)


def test_reads_the_tokens_of_a_vision_transformer() -> None:
    inputs, model = images(2, 3, 6, 6), seeded(Transformer)
    kept: list[Tensor] = []
    handle = model.block.register_forward_hook(lambda _m, _a, output: kept.append(output.detach()))
    model(inputs)
    handle.remove()
    tokens = kept[0].requires_grad_()
    (gradients,) = torch.autograd.grad(model.head(model.read(tokens))[:, 0].sum(), tokens)
    assert tokens.shape == (2, 1 + 9, 8)

    native = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    for patch in range(9):  # token 0 is the class token, 1 + 3 i + j the patch in row i, column j
        for channel in range(8):
            weight = gradients[:, 1:, channel].sum(1) / 9
            native[:, 0, patch // 3, patch % 3] += weight * tokens[:, 1 + patch, channel].detach()
    native = native.clamp_min(0)
    found = explained(model, inputs, 0, layer="block", tokens="vit")
    assert float(native.max()) > 0
    assert_rounding(found.details["native"], native, 10 * OPERATIONS)
    assert_rounding(found.map, F.interpolate(native, (6, 6), mode="bilinear"), 10 * OPERATIONS)

    def read(values: Tensor) -> Tensor:
        return values[:, 1:].transpose(1, 2).unflatten(2, (3, 3))

    assert torch.equal(pysal.grad_cam(model, inputs, 0, layer="block", tokens=read), found.map)


def test_reads_the_tokens_of_a_swin_transformer() -> None:
    inputs, model = images(2, 3, 6, 10), seeded(Swin)
    with torch.no_grad():
        mixed = model.mix(F.gelu(model.patches(inputs).permute(0, 2, 3, 1)))
        # f = mean over places of <v, tanh(8 m)>: df/dm = 8 v (1 - tanh^2) / (h w)
        gradients = 8 * model.head.weight[3] * (1 - torch.tanh(8 * mixed) ** 2) / 15
    native, resized = by_hand(mixed.permute(0, 3, 1, 2), gradients.permute(0, 3, 1, 2), (6, 10))
    found = explained(model, inputs, 3, layer="mix", tokens="swin")
    assert float(native.max()) > 0
    assert native.shape == (2, 1, 3, 5)
    assert_rounding(found.details["native"], native, OPERATIONS)
    assert_rounding(found.map, resized, OPERATIONS)


def test_layer_that_returns_more_than_its_map() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, inputs: Tensor) -> tuple[Tensor, str]:
            return self.conv(inputs), "and a word"

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(5, 4)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            values, word = self.pair(inputs)
            assert word == "and a word"
            return {"logits": self.head(torch.relu_(values).mean((2, 3)))}

    inputs, model = images(2, 3, 9, 7), seeded(Whole)
    activations = model.pair.conv(inputs).detach()
    # the ReLU after the layer works in place; the layer's own output has its negative values
    gradients = torch.where(activations > 0, model.head.weight[1, :, None, None].detach() / 35, 0.0)
    native, _ = by_hand(activations, gradients, (9, 7))
    assert float(native.max()) > 0
    assert_rounding(explained(model, inputs, 1, layer="pair").details["native"], native, OPERATIONS)
