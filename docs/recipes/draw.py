"""Draw the pictures of the recipes: `python docs/recipes/draw.py [NAME ... | common_det.onnx]`, a file of the package ddddocr.

What needs a trained network trains a small one, in about a minute each, on drawn shapes (`shapes.py`).
"""

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import pysal

HERE = Path(__file__).resolve().parent
OUT = HERE / "pictures"


def save(explained: pysal.Explanation | list[pysal.Explanation], name: str) -> None:
    """Write the panel of an explanation, or of several below each other, as a photo that a page can show."""
    panels = []
    for found in explained if isinstance(explained, list) else [explained]:
        file = io.BytesIO()
        found.plot().savefig(file, format="png", dpi=110)
        picture = Image.open(file).convert("RGB")
        panels.append(picture.resize((960, round(960 * picture.height / picture.width))))
    whole = Image.new("RGB", (960, sum(one.height for one in panels)), "white")
    for number, one in enumerate(panels):
        whole.paste(one, (0, sum(above.height for above in panels[:number])))
    OUT.mkdir(exist_ok=True)
    whole.save(OUT / f"{name}.jpg", quality=85, optimize=True)


def of_a_page(name: str) -> None:
    """Run a page's code and draw what it found."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (HERE / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block.replace('found.save("errors")', ""), name, "exec"), names)
    save(names["found"], name)


class Detector(nn.Module):
    """ddddocr's, of images in [0, 1]: it takes blue first, in [0, 255]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Return boxes (1, 3549, 6) of images (1, 3, 416, 416)."""
        return self.network(images.flip(1) * 255)


def detection(file: str) -> None:
    """Explain what makes a detector of characters find the first of three."""
    import onnx
    import onnx2torch

    picture = Image.new("RGB", (416, 416), (235, 235, 230))
    for text, place in (("A", (60, 70)), ("7", (250, 100)), ("K", (150, 270))):
        ImageDraw.Draw(picture).text(place, text, fill=(40, 60, 120), font=ImageFont.load_default(60))
    model = Detector(onnx2torch.convert(onnx.load(file))).eval()
    found = pysal.explain(
        model,
        pysal.read_image(np.asarray(picture)),
        pysal.targets.Box(0, layout="yolox"),
        methods=["gradient", "leave_one_out"],
        method_options={"leave_one_out": {"segments": pysal.Grid(13, 13)}},
        batch_size=1,
    )
    save(found, "detection")


def _generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, wanted)


PARTS = {"segments": pysal.Grid(8, 8)}


def many_labels() -> None:
    """Explain one of three labels of an image that has two of them."""

    def present(found: shapes.Shapes) -> Tensor:
        return nn.functional.one_hot(found.kinds, 3).amax(1).float()

    network = shapes.classifier(3)
    shapes.learn(network, lambda x: nn.functional.binary_cross_entropy_with_logits(network(x.images), present(x)), 400)
    seen = shapes.shapes(1, _generator(), kinds=torch.tensor([[0, 2]]))
    found = pysal.explain(
        network,
        seen.images,
        "cross",
        class_names=shapes.KINDS,
        score="sigmoid",
        methods=["leave_one_out", "grad_cam"],
        method_options={"leave_one_out": PARTS},
    )
    save(found, "many_labels")


def regression() -> None:
    """Explain the radius of a disc beside a square."""
    network = nn.Sequential(shapes.eye(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2))

    def loss(found: shapes.Shapes) -> Tensor:
        kinds = torch.tensor([[0, 1], [1, 0]])[torch.arange(len(found.kinds)) % 2]
        made = shapes.shapes(len(kinds), _generator(int(found.radii[0, 0] * 1e6)), kinds=kinds)
        wanted = torch.where(kinds[:, :1] == 0, made.radii, made.radii.flip(1))
        return nn.functional.mse_loss(network(made.images), wanted)

    shapes.learn(network, loss, 500, rate=1e-2)
    seen = shapes.shapes(1, _generator(3), kinds=torch.tensor([[0, 1]]))
    print("  radius", network(seen.images)[0, 0].item(), seen.radii[0, 0].item())
    found = pysal.explain(
        network,
        seen.images,
        pysal.targets.Output(0),
        methods=["leave_one_out", "integrated_gradients"],
        method_options={"leave_one_out": {**PARTS, "fill": "mean"}, "integrated_gradients": {"baseline": "mean"}},
    )
    save(found, "regression")


class SameColour(nn.Module):
    """Says whether the shapes of two images have one colour."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(shapes.eye(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return logits (N, 2) of "different" and "same"."""
        one, other = self.eye(first), self.eye(second)
        return self.head(torch.cat([one * other, (one - other).abs()], 1))


def two_inputs() -> None:
    """Explain both images of a network that compares them."""
    network = SameColour()

    def loss(found: shapes.Shapes) -> Tensor:
        colours = shapes.only(found, found.colours)
        half = len(colours) // 2
        order = torch.cat([colours[:half].argsort(), half + torch.randperm(half)])  # of equal colours enough
        pairs = order.roll(1)
        same = (colours[order] == colours[pairs]).long()
        return _cross_entropy(network(found.images[order], found.images[pairs]), same)

    shapes.learn(network, loss, 400, single=True)
    seen = shapes.shapes(24, _generator(), single=True)
    colours, kinds = (shapes.only(seen, one) for one in (seen.colours, seen.kinds))
    second = next(n for n in range(1, 24) if colours[n] == colours[0] and kinds[n] != kinds[0])
    images = [seen.images[n : n + 1] for n in (0, second)]

    def first_image(one: Tensor, other: Tensor) -> Tensor:
        return network(one, other)

    def second_image(one: Tensor, other: Tensor) -> Tensor:
        return network(other, one)

    explained = []
    for here, model in enumerate((first_image, second_image)):
        found = pysal.explain(
            model,
            images[here],
            "same",
            class_names=["different", "same"],
            score="logit",
            extra_inputs=[pysal.PerImage(images[1 - here])],
            methods=["leave_one_out", "integrated_gradients"],
            method_options={"leave_one_out": {**PARTS, "fill": "mean"}, "integrated_gradients": {"baseline": "mean"}},
        )
        explained.append(found)
    save(explained, "two_inputs")


def segmentation() -> None:
    """Explain the class of a pixel of a cross."""
    up = nn.Upsample(scale_factor=4, mode="bilinear")
    network = nn.Sequential(shapes.eye(), nn.Conv2d(48, 48, 5, padding=2), nn.ReLU(), nn.Conv2d(48, 4, 1), up)
    weights = torch.tensor([0.2, 1.0, 1.0, 1.0])
    shapes.learn(network, lambda x: nn.functional.cross_entropy(network(x.images), x.classes, weights), 400)
    seen = shapes.shapes(1, _generator(), kinds=torch.tensor([[1, 2]]))
    rows, columns = (seen.classes[0] == 3).nonzero().float().mean(0).long().tolist()
    found = pysal.explain(
        network,
        seen.images,
        pysal.targets.Pixel(at=(rows, columns)),
        methods=["leave_one_out", "grad_cam", "gradient"],
        method_options={"leave_one_out": {**PARTS, "fill": "mean"}},
    )
    save(found, "segmentation")


_TINY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_VISION = {**_TINY, "image_size": shapes.SIZE, "patch_size": 6}


def transformers_classifier() -> None:
    """Explain what a residual network takes for a cross."""
    import transformers

    labels = dict(enumerate(shapes.KINDS))
    sizes = {"embedding_size": 24, "hidden_sizes": [24, 48, 48], "depths": [1, 1, 1], "downsample_in_first_stage": False}
    config = transformers.ResNetConfig(
        **sizes, layer_type="basic", id2label=labels, label2id={name: number for number, name in labels.items()}
    )
    network = transformers.ResNetForImageClassification(config)
    shapes.learn(network, lambda x: _cross_entropy(network(x.images).logits, shapes.only(x, x.kinds)), 300, single=True)
    seen = shapes.shapes(1, _generator(2), single=True, kinds=torch.tensor([[2, 2]]))
    found = pysal.explain(
        pysal.models.wrap(network, size=shapes.SIZE, normalize="none"),
        seen.images,
        methods=["leave_one_out", "grad_cam", "guided_backprop"],
        score="logit",  # the probability is so near 1 that hiding parts changes nothing
        # of so small a photo the last layer has 3 x 3 cells
        method_options={
            "leave_one_out": {**PARTS, "fill": "mean"},
            "grad_cam": {"layer": "network.model.model.resnet.encoder.stages.1"},
        },
    )
    save(found, "transformers_classifier")


def clip() -> None:
    """Explain which of two shapes is like a text."""
    import transformers

    text = {**_TINY, "vocab_size": 12, "max_position_embeddings": 4, "eos_token_id": 11, "bos_token_id": 1}
    network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=32))
    texts = torch.tensor([[1, 2 + colour, 5, 11] for colour in range(3)])

    def loss(found: shapes.Shapes) -> Tensor:
        logits = network(input_ids=texts, pixel_values=found.images).logits_per_image
        return _cross_entropy(logits, shapes.only(found, found.colours))

    shapes.learn(network, loss, 400, single=True, rate=1e-3)
    seen = shapes.shapes(1, _generator(6), kinds=torch.tensor([[1, 0]]))
    names = [f"a {colour} shape" for colour in shapes.COLOURS]
    model = pysal.models.wrap(network, size=shapes.SIZE, normalize="none", class_names=names)
    found = pysal.explain(
        model,
        seen.images,
        int(seen.colours[0, 1]),
        score="logit",
        extra_inputs={"input_ids": pysal.Shared(texts)},
        methods=["leave_one_out", "grad_cam", "gradient"],
        method_options={"leave_one_out": {**PARTS, "fill": "mean"}},
    )
    save(found, "clip")


# Words of captions; the first one begins them.
WORDS = ("begin", "and", *shapes.COLOURS)


def caption() -> None:
    """Explain two words of what a captioner says of two shapes."""
    import transformers

    encoder = transformers.ViTConfig(**_VISION)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": len(WORDS), "n_positions": 8}
    decoder = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    network = transformers.VisionEncoderDecoderModel(config)

    def written(found: shapes.Shapes) -> Tensor:
        """Return the tokens (N, 4) of "begin blue and red"."""
        left, right = (2 + found.colours).unbind(1)
        begin, also = (torch.full_like(left, token) for token in (0, 1))
        return torch.stack([begin, left, also, right], 1)

    def loss(found: shapes.Shapes) -> Tensor:
        tokens = written(found)
        logits = network(pixel_values=found.images, decoder_input_ids=tokens[:, :-1]).logits
        return _cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    shapes.learn(network, loss, 400, rate=1e-3)
    seen = shapes.shapes(1, _generator(6), kinds=torch.tensor([[1, 0]]))
    tokens = network.generate(seen.images, max_new_tokens=3, do_sample=False)[0]
    print("  writes", [WORDS[token] for token in tokens])
    model = pysal.models.wrap(network, size=shapes.SIZE, normalize="none")
    explained = []
    for place, other in ((1, 3), (3, 1)):
        word, instead = int(tokens[place]), int(tokens[other])

        def against(output: Any, word: int = word, instead: int = instead) -> Tensor:
            logits: Tensor = output.logits[:, -1]
            return logits[:, word] - logits[:, instead]

        against.__name__ = f"{WORDS[word]}, not {WORDS[instead]}"
        found = pysal.explain(
            model,
            seen.images,
            against,
            extra_inputs={"decoder_input_ids": pysal.PerImage(tokens[None, :place])},
            methods=["leave_one_out", "grad_cam", "gradient"],
            method_options={"leave_one_out": {**PARTS, "fill": "mean"}},
        )
        explained.append(found)
    save(explained, "caption")


def gradio_app() -> None:
    """Show an app of EfficientNet-Lite0 whose answer is explained."""
    import shutil

    import gradio
    from playwright.sync_api import sync_playwright

    model = pysal.models.load()

    def classify(picture: np.ndarray[Any, Any]) -> dict[str, float]:
        with torch.no_grad():
            best = model(pysal.read_image(picture, model)).softmax(1)[0].topk(3)
        return {model.class_names[int(index)]: float(value) for value, index in zip(*best, strict=True)}

    parts = {"inputs": gradio.Image(label="Photo", height=300), "outputs": gradio.Label(label="Answer")}
    app = gradio.Interface(classify, **parts, title="What is it?", flagging_mode="never")
    _, address, _ = pysal.gradio.add_explanations(app).launch(prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(address)
        page.locator("button.pysal-explain").wait_for()
        page.locator("input[type=file]").first.set_input_files(str(HERE.parents[1] / "examples/photos/coffee.jpg"))
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("espresso").first.wait_for()
        page.locator("button.pysal-explain").click()
        page.locator(".pysal-picture img").wait_for()
        page.wait_for_timeout(2000)  # until the picture has been laid out
        drawn = page.locator(".pysal-picture").bounding_box() or {"y": 0.0, "height": 1000.0}
        whole = {
            "x": 0,
            "y": 0,
            "width": 1100,
            "height": drawn["y"] + drawn["height"] + 16,
        }  # the seconds below are a machine's
        seen = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=whole))).convert("RGB")
        browser.close()
    app.close()
    seen.resize((960, round(960 * seen.height / seen.width))).save(OUT / "gradio_app.jpg", quality=85, optimize=True)


TRAINED = (many_labels, regression, two_inputs, segmentation, transformers_classifier, caption, clip)
PAGES = ("my_networks_errors", "http_black_box")

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    from tests.models import torchvision_ops

    torchvision_ops.define()  # beside a torch for the CPU, torchvision cannot be imported, and transformers tries
    chosen = [name for name in sys.argv[1:] if not name.endswith(".onnx")] or [
        *PAGES,
        *(one.__name__ for one in (*TRAINED, gradio_app)),
    ]
    for name in chosen:
        torch.manual_seed(0)
        print(name, flush=True)
        if name in PAGES:
            of_a_page(name)
        else:
            next(one for one in (*TRAINED, gradio_app) if one.__name__ == name)()
    for file in sys.argv[1:]:
        if file.endswith(".onnx"):
            detection(file)
