"""What the page shows: pictures that are those of viz, numbers that can be read out, and nothing that is not escaped."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pysal import viz
from pysal.demo import article, pictures, segments, tiles, words
from pysal.demo.session import Answer, Found, Options, Workspace
from pysal.explanation import Explanation, MethodResult
from pysal.methods.registry import EVERY, METHODS
from pysal.models import Classifier

NASTY = "<img src=x onerror=\"alert(1)\"> & 'co'"
SIZE = 12


def explanation(name: str = NASTY, **results: MethodResult) -> Explanation:
    return Explanation(
        images=torch.rand(1, 3, SIZE, SIZE),
        target=torch.tensor([3]),
        target_names=[name],
        scores=torch.tensor([0.95]),
        score_kind="probability",
        probabilities=torch.tensor([0.95]),
        results=results,
        model_name=NASTY,
    )


def result(name: str, map: torch.Tensor, **details: object) -> MethodResult:
    method = METHODS[name]
    return MethodResult(name, method.title, map, method.reduction, method.signed, 0.04, 2, details, method.score)


def left_out(drops: list[float], labels: torch.Tensor) -> MethodResult:
    map = torch.tensor(drops)[labels][None, None]
    return result("leave_one_out", map, drops=[torch.tensor(drops)], labels=labels[None].int())


def quarters() -> torch.Tensor:
    half = torch.arange(SIZE) // (SIZE // 2)
    return 2 * half[:, None] + half[None]


def sources(page: str, kind: str = "") -> list[np.ndarray]:
    """The pictures of a page whose class holds a word, decoded."""
    found = re.findall(rf'<img class="layer {kind}[^"]*"[^>]*src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_everything_from_outside_is_escaped() -> None:
    found = explanation(gradient=result("gradient", torch.randn(1, 3, SIZE, SIZE)))
    other = explanation(grad_cam=result("grad_cam", torch.rand(1, 1, SIZE, SIZE), layer=NASTY))
    page = "".join(
        [
            words.answers([Answer(1, NASTY, 0.5)], 1),
            words.thumbnails({NASTY: (NASTY, "data:,")}, NASTY),
            words.preview(found.images[0], NASTY),
            words.status(NASTY, 0.5, "busy"),
            pictures.side_by_side(Found(found, ("grad_cam",), {"guided_backprop": NASTY}), found.images),
            pictures.side_by_side(Found(other, (), {}), found.images),
            pictures.two_classes(Found(found, (), {"smooth_grad": NASTY}), Found(found, (), {}), found.images),
            pictures.swipe(found.images[0], *[pictures.swipe_side(found, "gradient", NASTY)] * 2),
        ]
    )
    assert "<img src=x" not in page
    assert 'onerror="' not in page
    assert page.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; &#x27;co&#x27;") >= 12


def test_the_light_is_that_of_viz() -> None:
    map = torch.randn(1, 3, SIZE, SIZE)
    found = explanation(integrated_gradients=result("integrated_gradients", map, residual=torch.tensor([0.1])))
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    (signed,), (strength,) = sources(page, "signed"), sources(page, "unsigned")
    np.testing.assert_allclose(signed / 255, viz.layer(map[0].sum(0), signed=True), atol=0.5 / 255 + 1e-9)
    np.testing.assert_allclose(strength / 255, viz.layer(map[0].abs().sum(0), signed=False), atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize(
    ("name", "own"), [("gradient", "unsigned"), ("integrated_gradients", "signed"), ("grad_cam", "unsigned")]
)
def test_each_method_begins_with_its_own_colours(name, own) -> None:
    map = torch.randn(1, 1 if name == "grad_cam" else 3, SIZE, SIZE)
    views = tiles.Views.of(explanation(**{name: result(name, map)}).panel(name))
    assert views.own == own
    exact, roundings = map[0].double(), len(map[0]) * torch.finfo(torch.float32).eps
    assert ((views.signed - exact.sum(0)).abs() <= roundings * exact.abs().sum(0)).all()
    reduced = map[0].abs().amax(0) if name == "gradient" else map[0].abs().sum(0)
    torch.testing.assert_close(views.unsigned, reduced, check_dtype=False)
    assert f'class="tile {own}-own"' in pictures.side_by_side(Found(explanation(**{name: result(name, map)}), (), {}), map)


@pytest.mark.parametrize(
    ("name", "signed", "unsigned"),
    [
        ("gradient", "d logit / d value", "|d logit / d value|"),
        ("grad_cam", "weighted activation", "weighted activation"),
        ("integrated_gradients", "logit per pixel", "|logit per pixel|"),
    ],
)
def test_each_view_says_what_its_own_values_mean(name, signed, unsigned) -> None:
    found = explanation(**{name: result(name, torch.rand(1, 1, SIZE, SIZE))})
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    assert f'<p class="unit"><span class="signed">{signed}</span><span class="unsigned">{unsigned}</span>' in page


def test_values_can_be_read_out_of_the_page() -> None:
    map = torch.randn(1, 3, SIZE, SIZE)
    found = explanation(gradient=result("gradient", map))
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    read = {}
    for kind, values, bound in re.findall(r'class="layer (\w+)".*?data-values="([^"]+)" data-bound="([^"]+)"', page):
        bytes_ = np.frombuffer(base64.b64decode(values), np.int8).reshape(SIZE, SIZE)
        read[kind] = (bytes_ / 127 * float(bound), float(bound))
    for kind, expected in (("signed", map[0].sum(0)), ("unsigned", map[0].abs().amax(0))):
        values, bound = read[kind]
        np.testing.assert_allclose(values, expected.clamp(-bound, bound), atol=bound / 254 + 1e-6)
    assert read["unsigned"][1] == pytest.approx(viz.limits(map[0].abs().amax(0), signed=False)[1], rel=1e-6)


def test_a_map_that_is_zero_or_no_number_is_shown_all_the_same() -> None:
    for value in (0.0, float("nan")):
        found = explanation(gradient=result("gradient", torch.full((1, 3, SIZE, SIZE), value)))
        page = pictures.side_by_side(Found(found, (), {}), found.images)
        assert page.count("zero everywhere") == 2
        assert len(sources(page)) == 2


# Segments ------------------------------------------------------------------------------------------------------------


def edges(path: str) -> set[tuple[int, int, str]]:
    """The unit edges that an SVG path draws: (x, y, "h" or "v")."""
    found = set()
    strokes = re.findall(r"M(\d+) (\d+)([hv])(\d+)", path)
    assert "".join(f"M{x} {y}{kind}{length}" for x, y, kind, length in strokes) == path
    for x, y, kind, length in strokes:
        for step in range(int(length)):
            found.add((int(x) + step, int(y), "h") if kind == "h" else (int(x), int(y) + step, "v"))
    return found


def test_borders_lie_between_different_labels_and_nowhere_else() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (7, 9))
    expected = {(x, y, "h") for y in range(1, 7) for x in range(9) if labels[y, x] != labels[y - 1, x]}
    expected |= {(x, y, "v") for y in range(7) for x in range(1, 9) if labels[y, x] != labels[y, x - 1]}
    assert edges(segments.border_path(labels)) == expected
    assert segments.border_path(np.zeros((4, 4), np.int64)) == ""
    assert segments.border_path(quarters().numpy()) == f"M0 6h{SIZE}M6 0v{SIZE}"


def test_falls_are_drawn_as_the_article_draws_them() -> None:
    found = explanation(leave_one_out=left_out([0.28, -0.04, 0.0, 0.1], quarters()))
    panel = found.panel("leave_one_out")
    assert [(segment, text) for segment, text, _ in segments.falls(panel, 8)] == [(0, "95 % → 67 %"), (3, "95 % → 85 %")]
    assert [after for *_, after in segments.falls(panel, 8)] == pytest.approx([0.67, 0.85])
    assert len(segments.falls(panel, 1)) == 1
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    assert re.findall(r'class="fall"[^>]*>([^<]+)<', page) == ["95 % → 67 %", "95 % → 85 %"]
    assert re.findall(r'<li data-segment="(\d)"[^>]*>.*?<i style="width:([\d.]+)%"></i><b style="width:([\d.]+)%"', page) == [
        ("0", "95.0", "67.0"),
        ("3", "95.0", "85.0"),
    ]
    assert 'data-falls="95 % → 67 %|95.0 % → 99.0 %|no change|95 % → 85 %"' in page
    (labels,) = re.findall(r'data-labels="([^"]+)"', page)
    read = np.frombuffer(base64.b64decode(labels), np.int16).reshape(SIZE, SIZE)
    np.testing.assert_array_equal(read, quarters().numpy())


def test_no_fall_is_said_in_words() -> None:
    found = explanation(leave_one_out=left_out([0.0, -0.1, 0.0, 0.0], quarters()))
    assert "No single segment makes a difference" in pictures.side_by_side(Found(found, (), {}), found.images)


def test_boxes_are_segments_unless_they_overlap() -> None:
    boxes = torch.tensor([[0, 0, 6, 12], [6, 0, 12, 12]])
    found = explanation(
        leave_one_out=result("leave_one_out", torch.zeros(1, 1, SIZE, SIZE), drops=[torch.tensor([0.28, 0.1])], boxes=boxes)
    )
    labels = segments.label_map(found.panel("leave_one_out"))
    np.testing.assert_array_equal(labels, np.repeat([0, 1], 6)[:, None].repeat(12, 1))
    overlapping = result(
        "leave_one_out",
        torch.zeros(1, 1, SIZE, SIZE),
        drops=[torch.tensor([0.28, 0.1])],
        boxes=boxes - torch.tensor([0, 0, 0, 0]),
    )
    overlapping.details["boxes"] = torch.tensor([[0, 0, 8, 12], [4, 0, 12, 12]])
    found = explanation(leave_one_out=overlapping)
    assert segments.label_map(found.panel("leave_one_out")) is None
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    assert "data-labels" not in page
    assert re.findall(r'class="fall"[^>]*>([^<]+)<', page) == ["95 % → 67 %", "95 % → 85 %"]


# Words ---------------------------------------------------------------------------------------------------------------


def test_overlapping_windows_cannot_be_pointed_at() -> None:
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 12, 12]])
    overlapping = result("leave_one_out", torch.rand(1, 1, SIZE, SIZE), drops=[torch.tensor([0.3, 0.1])], boxes=boxes)
    for found, said in ((overlapping, "Windows overlap"), (left_out([0.3, 0.1, 0.0, 0.0], quarters()), "Point at a segment")):
        page = pictures.side_by_side(Found(explanation(leave_one_out=found), (), {}), torch.rand(1, 3, SIZE, SIZE))
        assert [word in page for word in ("Windows overlap", "Point at a segment")].count(True) == 1
        assert said in page


def test_what_a_reader_can_choose_is_not_said_to_be_the_default() -> None:
    map = torch.rand(1, 3, SIZE, SIZE)
    found = explanation(
        integrated_gradients=result("integrated_gradients", map), smooth_grad=result("smooth_grad", map, base="guided_backprop")
    )
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    assert "black" not in page
    assert "mean gradient" not in page


def test_completeness_is_said_with_its_residual() -> None:
    map = torch.full((1, 3, SIZE, SIZE), 4.5 / (3 * SIZE * SIZE))
    found = explanation(integrated_gradients=result("integrated_gradients", map, residual=torch.tensor([-0.5])))
    assert words.completeness(found, "integrated_gradients") == f"Adds up to 4.5 of 5: residual {viz.MINUS}0.5 (10 %)."
    page = pictures.side_by_side(Found(found, (), {}), found.images)
    assert f'<span class="residual">Adds up to 4.5 of 5: residual {viz.MINUS}0.5 (10 %).</span>' in page
    assert "40 ms · 2 passes" in page
    assert words.completeness(explanation(gradient=result("gradient", map)), "gradient") == ""


@pytest.mark.parametrize(("value", "said"), [(0.0412, "41 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s")])
def test_seconds(value, said) -> None:
    assert words.seconds(value) == said


def test_what_is_to_come_and_what_does_not_apply_keep_their_places() -> None:
    found = explanation(grad_cam=result("grad_cam", torch.rand(1, 1, SIZE, SIZE)))
    page = pictures.side_by_side(
        Found(found, ("integrated_gradients",), {"gradient": "pysal.gradient: no, it cannot"}), found.images
    )
    titles = re.findall(r'<figure class="tile ([\w-]+)"><figcaption><b>([^<]+)</b>', page)
    assert titles == [("refused", "Gradient"), ("unsigned-own", "Grad-CAM"), ("waiting", "Integrated Gradients")]
    assert "<p>No, it cannot.</p>" in page
    assert pictures.side_by_side(Found(None, ("gradient",), {}), found.images).count('class="tile waiting"') == 1


# Two classes and eight steps -----------------------------------------------------------------------------------------


def test_two_classes_have_one_scale_and_their_difference() -> None:
    one = torch.rand(1, 1, SIZE, SIZE)
    two = one + 2 * torch.rand(1, 1, SIZE, SIZE)  # alike enough for the sign of their correlation
    first, second = (explanation(name, grad_cam=result("grad_cam", map)) for name, map in (("cat", one), ("dog", two)))
    page = pictures.two_classes(Found(first, (), {}), Found(second, (), {}), first.images)
    bounds = [float(bound) for bound in re.findall(r'class="layer unsigned".*?data-bound="([^"]+)"', page)]
    largest = viz.limits(two[0, 0], signed=False)[1]
    assert bounds[:2] == pytest.approx([largest, largest])
    difference = sources(page, "signed")[2]
    np.testing.assert_allclose(difference / 255, viz.layer((one - two)[0, 0], signed=True), atol=0.5 / 255 + 1e-9)
    expected = np.corrcoef(one.flatten().numpy(), two.flatten().numpy())[0, 1]
    assert f"correlation <em>{float(expected):.2f}</em>".replace("-", "\N{MINUS SIGN}") in page


def test_the_same_class_twice_is_correlation_one_and_no_difference() -> None:
    found = Found(explanation("cat", gradient=result("gradient", torch.randn(1, 3, SIZE, SIZE))), (), {})
    page = pictures.two_classes(found, found, found.explanation.images)
    assert "correlation <em>1.00</em>" in page
    assert "zero everywhere" in page


def test_two_classes_of_a_model_that_no_method_applies_to() -> None:
    reason = {"gradient": "pysal.gradient: no, it cannot", "grad_cam": "pysal.grad_cam: nor this"}
    image = torch.rand(1, 3, SIZE, SIZE)
    page = pictures.two_classes(Found(None, (), reason), Found(None, (), reason), image)
    assert re.findall(r"<b>([^<]+)</b>.*?<p>([^<]+)</p>", page) == [("Gradient", "No, it cannot."), ("Grad-CAM", "Nor this.")]
    page = pictures.two_classes(Found(None, (), reason), Found(None, ("smooth_grad",), {}), image)
    assert re.findall(r'<figure class="tile ([\w-]+)"><figcaption><b>([^<]+)</b>', page) == [("waiting", "SmoothGrad")]


def test_eight_steps_have_their_text_and_their_pictures() -> None:
    titles = [title for title, _ in article.sections()]
    assert titles == [
        "Leave one out",
        "Gradient",
        "Guided backprop",
        "Grad-CAM",
        "SmoothGrad",
        "Integrated Gradients",
        "Blur IG",
        "Shapley values",
    ]
    assert len(article.STEPS) == 8
    for step, (_, text) in zip(article.STEPS, article.sections(), strict=True):
        assert "**Look:**" in text
        assert {step.left.method, step.right.method} <= set(EVERY)
        assert (step.left.method, step.left.options) != (step.right.method, step.right.options)
        if step.knob is not None:
            assert hasattr(Options(), step.knob.option)
            assert step.knob.low <= step.knob.value <= step.knob.high
            moved = step.sides(step.knob.high)
            assert all(getattr(side.options, step.knob.option) == step.knob.high for side in moved)
        assert step.sides(None) == (step.left, step.right)


def test_each_step_goes_on_from_the_one_before() -> None:
    for before, after in zip(article.STEPS[:3], article.STEPS[1:3], strict=False):
        assert after.left == before.right
    assert article.STEPS[6].left == article.STEPS[5].right


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("pysal demo: methods must name at least one method, got none", "Methods must name at least one method, got none."),
        (
            "pysal.models.Classifier.class_index: name_or_index must be in [0, 7), got 9",
            "What you typed must be in [0, 7), got 9.",
        ),
        (
            "pysal.guided_backprop: no ReLU was met; pass other_activations='plain' if that is what you want",
            "No ReLU was met.",
        ),
    ],
)
def test_a_refusal_names_no_arguments_of_python(refusal, sentence) -> None:
    assert words.plain(refusal) == sentence


def test_a_model_without_a_layer_for_grad_cam_is_told_nothing_that_cannot_be_done_here() -> None:
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), name="flat", class_names=["a", "b"], input_size=(4, 4))
    workspace = Workspace({"flat": flat.eval})
    image = workspace.photo("flat", "coffee")
    *_, found = workspace.explain("flat", image, 0, ["grad_cam"], Options())
    assert words.plain(found.refused["grad_cam"]) == "The model has no layer with a spatial map (N, C, h, w)."
