"""Targets on the outputs of libraries' own models, as small as they can be made: nobody wraps what they return."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import pysal
from pysal import targets
from pysal.testing import assert_no_worse
from tests.models.torchvision_ops import loads

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
TOKENS = torch.tensor([0, 5, 6, 7])
OPTIONS = {"leave_one_out": {"segments": pysal.Grid(2, 2)}, "integrated_gradients": {"steps": 2}}


def pictures(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes = {
        f"{side}_{what}": 16 if what == "ffn_dim" else 1 for side in ("encoder", "decoder") for what in ("ffn_dim", "layers")
    }
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(**own, **heads, **sizes, d_model=16, num_queries=7, num_labels=4)
    )


def clip() -> nn.Module:
    text = {**TINY, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29, "bos_token_id": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))


def captioner() -> nn.Module:
    encoder, decoder = (
        transformers.ViTConfig(**VISION),
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0),
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(both)


def blip() -> nn.Module:
    text = {**TINY, "vocab_size": 30, "max_position_embeddings": 8, "encoder_hidden_size": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2}
    return transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=12)
    )


def segformer() -> nn.Module:
    four = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(**four, decoder_hidden_size=16, num_labels=4)
    )


def yolos() -> nn.Module:
    config = transformers.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=5, num_labels=3)
    return transformers.YolosForObjectDetection(config)


def d_fine() -> nn.Module:
    sizes = {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 16], "stage_mid_channels": [8, 8, 8, 8]}
    sizes |= {"stage_out_channels": [8, 16, 16, 16], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4}
    sizes |= {"stage_downsample": [False, True, True, True], "stage_light_block": [False] * 4, "stage_kernel_size": [3] * 4}
    sizes |= {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4}
    backbone = transformers.HGNetV2Config(**sizes, out_features=["stage2", "stage3", "stage4"])
    own = {f"{side}_in_channels": [16] * 3 for side in ("encoder", "decoder")}
    own |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")} | {"d_model": 16, "encoder_hidden_dim": 16}
    own |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")} | {"decoder_n_points": [2] * 3}
    config = transformers.DFineConfig(
        backbone_config=backbone, **own, decoder_layers=2, num_queries=8, num_labels=4, num_denoising=0
    )
    return transformers.DFineForObjectDetection(config)


def dino() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION))


def lraspp() -> nn.Module:
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def of_tokens(name: str) -> dict[str, Any]:
    return {"extra_inputs": {name: pysal.PerImage(TOKENS.repeat(2, 1))}}


def text_of(output: Any) -> Tensor:
    """The score of TOKENS, in the field's own words: minus the cross-entropy of each from the one before."""
    logits = output.logits[:, :-1]
    labels = TOKENS[1:].expand(len(logits), 3)
    return -nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(-1, 3).sum(1)


EMBEDDING = torch.linspace(-1, 1, 16)
# model, target, further arguments, the score in the library's own terms
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], Callable[[Any], Tensor] | None]] = {
    "DETR's best box": (detr, targets.Box(0), {}, lambda o: o.logits.softmax(-1)[..., :-1].amax((1, 2))),
    "YOLOS' best box": (yolos, targets.Box(0), {}, lambda o: o.logits.softmax(-1)[..., :-1].amax((1, 2))),
    "YOLOS' best box of a class": (
        yolos,
        targets.Box(0, of="LABEL_1"),
        {},
        lambda o: o.logits.softmax(-1)[..., 1].amax(1),
    ),
    "D-FINE's best box": (d_fine, targets.Box(0), {}, lambda o: o.logits.sigmoid().amax((1, 2))),
    "SegFormer at a point": (segformer, targets.Pixel("LABEL_1", at=(4, 31)), {}, lambda o: o.logits[:, 1, 1, 7]),
    "torchvision's segmenter": (
        lraspp,
        targets.Pixel(2, mask=torch.ones(32, 32)),
        {},
        lambda o: o["out"][:, 2].mean((1, 2)),
    ),
    "DINOv2 against an embedding": (
        dino,
        targets.Similarity(EMBEDDING),
        {},
        lambda o: nn.functional.cosine_similarity(o.pooler_output, EMBEDDING[None].to(o.pooler_output)),
    ),
    "DINOv2's norm": (dino, targets.Norm(), {}, lambda o: o.pooler_output.norm(dim=1)),
    "ViT-GPT2's caption": (captioner, targets.Caption(TOKENS), of_tokens("decoder_input_ids"), text_of),
    "ViT-GPT2's next word": (
        captioner,
        targets.Token(3),
        of_tokens("decoder_input_ids"),
        lambda o: o.logits[:, -1].log_softmax(-1)[:, 3],
    ),
    "BLIP's caption": (blip, targets.Caption(TOKENS), of_tokens("input_ids"), text_of),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def assert_as_by_hand(
    model: nn.Module, images: Tensor, score: Callable[[nn.Module, Tensor], Tensor], found: pysal.Explanation
) -> None:
    """Compare with autograd by hand, whose own rounding float64 tells."""
    by_hand = []
    for one, leaf in ((model, images.clone()), (copy.deepcopy(model).double(), images.double())):
        scores = score(one, leaf.requires_grad_())
        by_hand.append((scores.detach(), *torch.autograd.grad(scores.sum(), leaf)))
    for ours, plain, exact in zip((found.scores, found.maps["gradient"]), *by_hand, strict=True):
        assert_no_worse(ours, exact, plain)


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients(case: str) -> None:
    make, target, more, oracle = CASES[case]
    model, images = made(make), pictures()
    methods = ["gradient", "leave_one_out", "integrated_gradients", "grad_cam"]
    found = pysal.explain(model, images, target, methods=methods, method_options=OPTIONS, **more)
    arguments = {name: value.value for name, value in more.get("extra_inputs", {}).items()}
    assert oracle is not None
    assert_as_by_hand(model, images, lambda model, images: oracle(model(images, **arguments)), found)


def test_clip_against_prompts() -> None:
    """A class of CLIP is a prompt; so is an embedding of a text."""
    model, images = made(clip), pictures()
    prompts = torch.tensor([[1, 2, 3, 29], [1, 4, 5, 29], [1, 6, 7, 29]])

    def classifier(images: Tensor) -> Any:
        return model(input_ids=prompts, pixel_values=images)

    text = classifier(images).text_embeds.detach()
    by_class = pysal.explain(classifier, images, 1, methods="gradient", score="logit")
    by_embedding = pysal.explain(classifier, images, targets.Similarity(text[1]), methods="gradient")
    scale = float(model.logit_scale.detach().exp())

    def cosine(model: nn.Module, images: Tensor) -> Tensor:
        seen = model.get_image_features(pixel_values=images)  # type: ignore[operator]
        return nn.functional.cosine_similarity(getattr(seen, "pooler_output", seen), text[1:2].to(images))

    assert_as_by_hand(model, images, cosine, by_embedding)
    assert_as_by_hand(model, images, lambda model, images: cosine(model, images) * scale, by_class)


def test_a_model_whose_images_come_second_says_how_to_hand_them_over() -> None:
    """CLIP's tokens come first; its own error for images in their place would be read as one of the images."""
    prompts = pysal.Shared(torch.tensor([[1, 2, 3, 29]]))
    for more in ({}, {"extra_inputs": {"input_ids": prompts}}):
        requirement = r"take images as its first argument \(pysal.models.wrap hands them over by name\)"
        with pytest.raises(
            TypeError, match=rf"^pysal.gradient: model must {requirement}, got CLIPModel, whose first is 'input_ids' \("
        ):
            pysal.gradient(made(clip), pictures(), 0, **more)


class TorchvisionDetector:
    """Faster R-CNN, whose suppression of overlapping boxes needs torchvision's compiled library, or a loop."""

    @staticmethod
    def make(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
        if not loads():
            monkeypatch.setattr(torchvision.ops.boxes, "nms", TorchvisionDetector.nms)
            module = importlib.import_module("torchvision.ops.roi_align")  # its loops are compiled at the first call otherwise
            monkeypatch.setattr(module, "_roi_align", module._roi_align.__wrapped__)
        detection = torchvision.models.detection
        sizes = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 8, "box_score_thresh": 0.0}
        make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
        return made(lambda: make(weights=None, weights_backbone=None, num_classes=4, **sizes))

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        kept: list[int] = []
        overlaps = torchvision.ops.boxes.box_iou(boxes, boxes).detach()
        for one in scores.argsort(descending=True).tolist():
            if all(float(overlaps[one, other]) <= iou_threshold for other in kept):
                kept.append(one)
        return torch.tensor(kept, dtype=torch.int64)


def test_torchvisions_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a batch as it is and answers with a list: of each image its best box, and what its score depends on."""
    model, images = TorchvisionDetector.make(monkeypatch), pictures(64)
    found = pysal.explain(
        model,
        images,
        targets.Box(0),
        methods=["gradient", "leave_one_out"],
        method_options={"leave_one_out": OPTIONS["leave_one_out"]},
    )
    # they are sorted
    assert_as_by_hand(model, images, lambda model, images: torch.stack([one["scores"][0] for one in model(images)]), found)
    with pytest.raises(TypeError, match=r"got dict; pass pysal.targets.Box\(...\), a detection$"):
        pysal.gradient(model, images, 1)


REFUSED = {
    "DETR": (detr, "target must be pysal.targets.Token, Caption or Box(...) or another callable output -> (N,)"),
    "SegFormer": (segformer, "target must be pysal.targets.Pixel(...) or another callable output -> (N,)"),
    "DINOv2": (dino, "pass pysal.targets.Similarity(...) or Norm(), of an embedding"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_of_what_has_none_says_what_there_is(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises((ValueError, TypeError)) as caught:
        pysal.gradient(made(make), pictures(), 0)
    assert message in str(caught.value)
