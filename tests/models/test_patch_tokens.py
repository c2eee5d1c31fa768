"""fill="drop" on transformers of timm, torchvision and transformers: their own modules by hand, with tokens taken away."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import torchvision_ops

torchvision_ops.define()

import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

import pysal  # noqa: E402

SIZE, PATCH, GRID, CLASSES = 32, 8, 4, 5
# what a model answers of some patches: of the images and the places (K,) of the patches that are kept
ByHand = Callable[[Tensor, Tensor], Tensor]


def of_timm(name: str, **options: Any) -> tuple[nn.Module, ByHand]:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    model = timm.create_model(name, **sizes, **options).double().eval()

    def by_hand(images: Tensor, kept: Tensor) -> Tensor:
        tokens, before = model._pos_embed(model.patch_embed(images)), model.num_prefix_tokens
        tokens = torch.cat([tokens[:, :before], tokens[:, before:][:, kept]], 1)
        return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))

    return model, by_hand


def of_torchvision() -> tuple[nn.Module, ByHand]:
    model = torchvision.models.VisionTransformer(SIZE, PATCH, 2, 2, 16, 32, num_classes=CLASSES).double().eval()
    nn.init.normal_(model.heads.head.weight)

    def by_hand(images: Tensor, kept: Tensor) -> Tensor:
        patches = model._process_input(images) + model.encoder.pos_embedding[:, 1:]
        first = (model.class_token + model.encoder.pos_embedding[:, :1]).expand(len(images), 1, -1)
        tokens = model.encoder.ln(model.encoder.layers(torch.cat([first, patches[:, kept]], 1)))
        return model.heads(tokens[:, 0])

    return model, by_hand


CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}


def one_prefix(tokens: Tensor, kept: Tensor, prefix: int = 1) -> Tensor:
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, kept]], 1)


def embedded(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def of_transformers(kind: str) -> tuple[nn.Module, ByHand]:
    if kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG, num_labels=CLASSES))
    elif kind == "dinov2":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**CONFIG, num_labels=CLASSES))
    else:
        model = transformers.BeitForImageClassification(transformers.BeitConfig(**CONFIG, num_labels=CLASSES))
    model = model.double().eval()

    def by_hand(images: Tensor, kept: Tensor) -> Tensor:
        inner = getattr(model, kind)
        tokens = one_prefix(embedded(inner.embeddings(images)), kept)
        for layer in inner.encoder.layer if kind == "dinov2" else inner.layers:
            tokens = embedded(layer(tokens))
        if kind == "beit":
            return model.classifier(inner.pooler.layernorm(tokens[:, 1:].mean(1)))
        tokens = inner.layernorm(tokens)
        first = tokens[:, 0]
        return model.classifier(first if kind == "vit" else torch.cat([first, tokens[:, 1:].mean(1)], 1))

    return model, by_hand


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.CLIPVisionConfig(**{**CONFIG, "initializer_range": 0.02}, projection_dim=CLASSES)
        self.inner = transformers.CLIPVisionModelWithProjection(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).image_embeds


def of_clip() -> tuple[nn.Module, ByHand]:
    model = Clip().double().eval()

    def by_hand(images: Tensor, kept: Tensor) -> Tensor:
        vision = model.inner.vision_model
        tokens = vision.encoder(inputs_embeds=vision.pre_layrnorm(one_prefix(vision.embeddings(images), kept)))
        return model.inner.visual_projection(vision.post_layernorm(tokens.last_hidden_state[:, 0]))

    return model, by_hand


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_timm("vit_tiny_patch16_224"),
        lambda: of_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
        lambda: of_timm("deit_tiny_distilled_patch16_224"),
        lambda: of_timm("vit_small_patch14_reg4_dinov2", init_values=0.5),
        lambda: of_timm("vit_base_patch16_clip_224"),
        of_torchvision,
        lambda: of_transformers("vit"),
        lambda: of_transformers("dinov2"),
        lambda: of_transformers("beit"),
        of_clip,
    ],
    ids=["vit", "pooled", "deit", "dinov2", "clip", "torchvision", "transformers-vit", "dinov2-hf", "beit", "clip-hf"],
)
def test_drops_are_those_of_the_models_own_modules(make: Callable[[], tuple[nn.Module, ByHand]]) -> None:
    torch.manual_seed(0)
    model, by_hand = make()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(GRID * GRID).view(GRID, GRID).clamp(max=9)  # the last segment has seven patches
    pixels = labels.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    wanted = {"leave_one_out": {"fill": "drop", "segments": pixels}}
    found = pysal.explain(model, images, 1, methods="leave_one_out", score="logit", method_options=wanted)
    everything = torch.arange(GRID * GRID)
    with torch.no_grad():
        clean = by_hand(images, everything)[:, 1]
        expected = torch.stack([clean - by_hand(images, everything[labels.flatten() != one])[:, 1] for one in range(10)], 1)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(torch.stack(found["leave_one_out"].details["drops"]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}),
    ],
)
def test_relative_rotary_and_merged_tokens_are_refused(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=SIZE, num_classes=CLASSES, **options).eval()
    with pytest.raises(ValueError, match="fill must be another than 'drop' for a model without patch tokens to leave out"):
        pysal.leave_one_out(model, torch.rand(1, 3, SIZE, SIZE), 1, segments=pysal.Grid(2, 2), fill="drop")
