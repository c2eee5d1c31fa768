"""What the page asks for: nothing is computed twice, refusals stay single, and work can be watched and stopped."""

import math
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pysal.demo import pictures, session
from pysal.demo.session import Options, Told, Workspace, agreement, photos, watch
from pysal.engine.prepared.payback import OnceItPays
from pysal.engine.running.chunks import Cancelled
from pysal.explain import explain
from pysal.methods.registry import EVERY, METHODS
from pysal.segments import Grid, Slic, Window
from tests.demo.small import NAMES, classifier

ROOT = Path(__file__).resolve().parents[2]
QUICK = Options(segments=9, samples=3, steps=4, sigma=4.0)


@pytest.fixture
def workspace() -> Workspace:
    return Workspace({"small": classifier, "smooth": partial(classifier, nn.GELU)})


@pytest.fixture
def image(workspace) -> torch.Tensor:
    return workspace.photo("small", "coffee")


def passes(workspace: Workspace) -> list[int]:
    """Count the rows that go through the model from now on; the list grows while it does."""
    rows: list[int] = []
    ready = workspace.model("small")
    # a prepared model does not call the modules it was made from: the original stands in for it
    ready.classifier.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    workspace._ready["small"] = session.Ready(ready.classifier, OnceItPays(ready.classifier, lambda: ready.classifier))
    return rows


def last(found):
    *_, end = found
    return end


def test_the_photos_are_those_of_the_repository() -> None:
    listed = sorted(path.name for path in (ROOT / "examples/photos").glob("*.jpg"))
    assert sorted(path.name for _, path in photos().values() if isinstance(path, Path)) == listed
    assert all(path.is_file() for _, path in photos().values() if isinstance(path, Path))


def test_the_collage_is_one_photo_beside_another() -> None:
    _, square = photos()[session.COLLAGE]
    assert square.size == (480, 480)
    cat, coffee = (square.crop(box).resize((1, 1)).getpixel((0, 0)) for box in ((0, 0, 240, 480), (240, 0, 480, 480)))
    assert coffee[0] > coffee[2] + 60, "coffee is brown"
    assert abs(cat[0] - cat[2]) < 40, "a white cat is grey"


def test_answers_are_the_largest_probabilities(workspace, image) -> None:
    table = torch.softmax(classifier()(image)[0].detach().double(), 0)
    found = workspace.answers("small", image, 3)
    assert [answer.index for answer in found] == table.argsort(descending=True)[:3].tolist()
    assert [answer.name for answer in found] == [NAMES[answer.index] for answer in found]
    assert [answer.probability for answer in found] == pytest.approx([float(table[answer.index]) for answer in found])
    assert len(workspace.answers("small", image, 50)) == len(NAMES)


def test_an_answer_by_name(workspace, image) -> None:
    assert workspace.answer("small", image, "siamese").index == 3
    assert workspace.answer("small", image, "2").name == "espresso"
    with pytest.raises(ValueError, match=r"^pysal\.models\.Classifier\.class_index: name_or_index must name a class"):
        workspace.answer("small", image, "sofa")


def test_maps_are_those_of_explain(workspace, image) -> None:
    own = {name: QUICK.of(name, (32, 32)) for name in METHODS}
    expected = explain(classifier(), image, target=2, method_options=own)
    found = last(workspace.explain("small", image, 2, list(METHODS), QUICK))
    assert found.waiting == ()
    assert list(found.explanation.results) == list(METHODS)
    assert found.explanation.target_names == ["espresso"]
    for name, map in expected.maps.items():
        torch.testing.assert_close(found.explanation.maps[name], map, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cut", ["grid", "superpixels", "windows"])
def test_any_number_of_segments_is_within_the_budget(cut, workspace, image) -> None:
    options = Options(cut=cut, segments=225)
    own = options.of("shapley", (32, 32))
    found = explain(classifier(), image, target=2, methods="shapley", method_options={"shapley": own})
    assert found["shapley"].passes <= own["passes"]
    assert QUICK.of("rise", (32, 32)) == {"fill": QUICK.fill, "samples": session.PASSES, "centred": True}


def test_methods_that_all_leaves_out(workspace, image) -> None:
    names = ["xrai", "guided_integrated_gradients", "shapley", "legrad"]
    own = {name: QUICK.of(name, (32, 32)) for name in names[:3]}
    assert own["xrai"] == {"steps": QUICK.steps}
    expected = explain(classifier(), image, target=2, methods=names[:3], method_options=own)
    found = last(workspace.explain("small", image, 2, names, QUICK))
    assert set(found.explanation.results) == set(expected.maps)
    for name, map in expected.maps.items():
        torch.testing.assert_close(found.explanation.maps[name], map, rtol=1e-3, atol=1e-4)
    assert "attend from every patch to every patch" in found.refused["legrad"]
    page = pictures.side_by_side(found, image)
    assert all(EVERY[name].title in page for name in names)


def test_what_is_found_grows(workspace, image) -> None:
    seen = list(workspace.explain("small", image, 0, ["integrated_gradients", "grad_cam", "gradient"], QUICK))
    assert seen[0].explanation is None
    assert [len(found.waiting) for found in seen] == [3, 1, 0]
    assert list(seen[1].explanation.results) == ["gradient", "grad_cam"], "the quick ones come first"
    assert list(seen[2].explanation.results) == ["gradient", "grad_cam", "integrated_gradients"]


def test_methods_of_one_pass_share_its_time(workspace, image) -> None:
    workspace.model("small")
    began = time.perf_counter()
    quick = ["gradient", "guided_backprop", "grad_cam", "guided_grad_cam"]
    found = last(workspace.explain("small", image, 0, quick, QUICK)).explanation
    elapsed = time.perf_counter() - began
    assert len({found[name].seconds for name in quick}) == 1
    assert 0 < found.seconds <= elapsed, "the sum is no longer than it took"
    assert found.seconds == pytest.approx(4 * found["gradient"].seconds)


def test_nothing_is_computed_twice(workspace, image) -> None:
    rows = passes(workspace)
    last(workspace.explain("small", image, 1, list(METHODS), QUICK))
    assert sum(rows) > 0
    rows.clear()
    again = list(workspace.explain("small", image, 1, list(METHODS), QUICK))
    assert (rows, len(again)) == ([], 1)
    fewer = last(workspace.explain("small", image.clone(), 1, ["gradient", "smooth_grad"], QUICK))
    assert rows == []
    assert list(fewer.explanation.results) == ["gradient", "smooth_grad"]


def test_an_option_costs_only_its_own_method(workspace, image) -> None:
    rows = passes(workspace)
    last(workspace.explain("small", image, 1, list(METHODS), QUICK))
    rows.clear()
    moved = Options(segments=9, samples=3, steps=4, sigma=5.0)
    found = workspace.explain("small", image, 1, list(METHODS), moved)
    assert next(found).waiting == ("blur_integrated_gradients",)
    last(found)
    assert sum(rows) <= 4 + 3, "four steps, both ends of the path and the clean image"


@pytest.mark.parametrize("change", ["photo", "class"])
def test_another_question_is_computed_anew(workspace, image, change) -> None:
    last(workspace.explain("small", image, 1, ["gradient"], QUICK))
    other, target = (workspace.photo("small", "camera"), 1) if change == "photo" else (image, 2)
    assert next(workspace.explain("small", other, target, ["gradient"], QUICK)).waiting == ("gradient",)


def test_as_many_maps_are_kept_as_said() -> None:
    workspace = Workspace({"small": classifier}, remembered=2)
    image = workspace.photo("small", "coffee")
    asked = ["gradient", "grad_cam", "guided_backprop"]
    last(workspace.explain("small", image, 0, asked, QUICK))
    assert len(next(workspace.explain("small", image, 0, asked, QUICK)).waiting) == 1


def test_a_method_that_does_not_apply_leaves_the_others_alone(workspace) -> None:
    image = workspace.photo("smooth", "coffee")
    found = last(workspace.explain("smooth", image, 0, ["gradient", "guided_backprop", "grad_cam"], QUICK))
    assert list(found.explanation.results) == ["gradient", "grad_cam"]
    assert list(found.refused) == ["guided_backprop"]
    assert found.refused["guided_backprop"].startswith("pysal.guided_backprop: ")
    assert "GELU" in found.refused["guided_backprop"]
    assert found.explanation.skipped == found.refused


def test_nothing_found_where_no_method_applies(workspace) -> None:
    image = workspace.photo("smooth", "coffee")
    found = last(workspace.explain("smooth", image, 0, ["guided_backprop", "guided_grad_cam"], QUICK))
    assert found.explanation is None
    assert sorted(found.refused) == ["guided_backprop", "guided_grad_cam"]


def test_progress_rises_to_the_end(workspace, image) -> None:
    told: list[tuple[str, float]] = []
    last(workspace.explain("small", image, 0, list(METHODS), QUICK, report=lambda *said: told.append(said)))
    shares = [share for _, share in told]
    assert all(0 < share <= 1 for share in shares)
    by_method = [share for text, share in told if text.startswith("Blur Integrated Gradients: ")]
    assert by_method == sorted(by_method)
    assert "Blur Integrated Gradients: 4 of 4 model rows" in [text for text, _ in told]
    assert max(shares) == pytest.approx(1)


def test_a_stopped_run_keeps_what_was_finished(workspace, image) -> None:
    cancel = threading.Event()

    def report(text: str, share: float) -> None:
        if text.startswith("SmoothGrad"):
            cancel.set()

    long = Options(segments=9, samples=400, steps=4, sigma=4.0)  # more rows than one pass takes
    with pytest.raises(Cancelled, match="of smooth_grad"):
        last(workspace.explain("small", image, 0, list(METHODS), long, report=report, cancel=cancel))
    first = next(workspace.explain("small", image, 0, list(METHODS), long))
    assert "gradient" in first.explanation.results
    assert first.waiting[0] == "smooth_grad"


def test_a_run_stopped_before_it_begins(workspace, image) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled, match=r"^pysal demo: cancelled before Gradient$"):
        last(workspace.explain("small", image, 0, ["gradient"], QUICK, cancel=cancel))


def test_what_is_refused_is_one_sentence(workspace, image) -> None:
    with pytest.raises(ValueError, match=r"^pysal demo: methods must be out of leave_one_out, .*, got 'lime'$"):
        next(workspace.explain("small", image, 0, ["lime"], QUICK))
    with pytest.raises(ValueError, match=r"^pysal demo: methods must name at least one method, got none$"):
        next(workspace.explain("small", image, 0, [], QUICK))
    with pytest.raises(ValueError, match=r"^pysal demo: model must be one of small, smooth, got 'module\.py:function'$"):
        workspace.model("module.py:function")
    with pytest.raises(ValueError, match=r"^pysal demo: --model must name at least one model, got none$"):
        Workspace({})
    with pytest.raises(ValueError, match=r"^pysal demo: segments must be superpixels, grid or windows, got 'stars'$"):
        Options(cut="stars").of("leave_one_out", (32, 32))


def test_a_file_that_is_no_photo_is_named_without_its_folders(workspace, tmp_path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"got notes\.png \(not an image that Pillow can read\)$"):
        workspace.photo("small", path)


def test_models_are_loaded_once_and_prepared_once_it_pays(workspace, image) -> None:
    ready = workspace.model("small")
    assert workspace.model("small") is ready
    last(workspace.explain("small", image, 1, ["gradient"], Options()))
    assert ready.runner.for_work(0) is ready.classifier
    last(workspace.explain("small", image, 1, ["integrated_gradients", "smooth_grad"], Options(steps=50, samples=20)))
    assert ready.runner.for_work(0).original is ready.classifier


def test_options_reach_their_method() -> None:
    options = Options(
        cut="grid", segments=16, fill="blur", smoothed="integrated_gradients", noise=0.2, samples=7, baseline="mean"
    )
    assert options.of("leave_one_out", (64, 64)) == {"segments": Grid(4, 4), "fill": "blur"}
    path = {"baseline": "mean", "steps": 50}
    assert options.of("integrated_gradients", (64, 64)) == path
    smooth = {"base": "integrated_gradients", "method_options": path, "noise": 0.2, "samples": 7}
    assert options.of("smooth_grad", (64, 64)) == smooth
    assert options.of("gradient", (64, 64)) == {}
    assert Options(segments=30).of("leave_one_out", (64, 64))["segments"] == Slic(30)
    assert Options(sigma=9).of("blur_integrated_gradients", (64, 64)) == {"max_sigma": 9.0, "steps": 50}


def test_the_layer_and_the_score_are_the_ones_asked_for(workspace, image) -> None:
    own, logit = (
        last(
            workspace.explain("small", image, 1, ["leave_one_out", "grad_cam"], replace(QUICK, score=score, layer=layer))
        ).explanation
        for score, layer in (("", ""), ("logit", "network.0"))
    )
    assert own["leave_one_out"].score_kind == "probability"
    assert logit["leave_one_out"].score_kind == "logit"
    assert own["grad_cam"].details["layer"] != "network.0"
    assert logit["grad_cam"].details["layer"] == "network.0"
    with pytest.raises(ValueError, match="layer must"):
        last(workspace.explain("small", image, 1, ["grad_cam"], replace(QUICK, layer="nowhere")))


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (240, 160)])
@pytest.mark.parametrize("segments", [4, 25, 225])
def test_windows_overlap_and_cover_the_photo(size, segments) -> None:
    window = Options(cut="windows", segments=segments).of("leave_one_out", size)["segments"]
    assert isinstance(window, Window)
    covered = torch.zeros(size)
    for top, left, bottom, right in window.cut(torch.zeros(1, 3, *size)).boxes.tolist():
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert covered.max() >= 4


def test_agreement() -> None:
    map = torch.randn(8, 8)
    assert agreement(map, 3 * map + 1) == pytest.approx(1)
    assert agreement(map, -map) == pytest.approx(-1)
    ramp = torch.linspace(-1, 1, 8)
    assert agreement(ramp[None].expand(8, 8), ramp[:, None].expand(8, 8)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(agreement(map, torch.ones(8, 8)))


# Watching ------------------------------------------------------------------------------------------------------------


def test_watching_yields_items_in_order_and_the_newest_report() -> None:
    def work(report):
        for number in range(100):
            report(f"row {number}", number / 100)
        yield "first"
        yield "second"

    seen = list(watch(work, threading.Event(), pause=5.0))
    assert seen == ["first", "second"], "reports that something newer follows at once are not shown"


def test_watching_tells_while_the_work_goes_on() -> None:
    go = threading.Event()

    def work(report):
        report("half", 0.5)
        go.wait(600)
        yield "end"

    seen = watch(work, threading.Event(), pause=0.01)
    assert next(seen) == Told("half", 0.5)
    go.set()
    assert list(seen) == ["end"]


def test_what_the_work_raises_arrives() -> None:
    def work(report):
        yield 1
        raise ValueError("pysal: broken")

    seen = watch(work, threading.Event())
    assert next(seen) == 1
    with pytest.raises(ValueError, match=r"^pysal: broken$"):
        next(seen)


def test_whoever_stops_watching_stops_the_work() -> None:
    cancel, ended = threading.Event(), threading.Event()

    def work(report):
        yield 1
        cancel.wait(600)
        ended.set()

    seen = watch(work, cancel)
    next(seen)
    seen.close()
    assert cancel.is_set()
    assert ended.wait(600)
