"""The page in a real browser: what a reader does, and what the page does then."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from pysal import viz
from pysal.demo import actions, article
from pysal.demo.session import Options, Workspace
from pysal.explanation import Explanation
from pysal.methods.registry import METHODS
from tests.demo.small import NAMES, classifier

TITLES = [method.title for method in METHODS.values()]


def titles(seen, where: str = "#shown") -> list[str]:
    return seen.page.locator(f"{where} figure.tile > figcaption > b").all_inner_texts()


def tab(seen, name: str) -> str:
    return seen.changed(seen.page.get_by_role("tab", name=name).click)


def test_the_first_look_needs_no_click_and_nothing_from_elsewhere(seen) -> None:
    assert titles(seen) == TITLES
    assert seen.settled().startswith("Done.")
    assert seen.page.locator(".thumbnails button").count() == 8
    hosts = {urlsplit(url).hostname for url in seen.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    assert seen.complaints == [], "what the policy of the page blocks is said on the console"
    assert seen.page.title() == "pysal: why did the model say that?"


def test_the_five_most_probable_classes_are_offered(seen) -> None:
    rows = seen.page.locator(".answers button").all_inner_texts()
    assert len(rows) == 5
    shares = [float(re.search(r"([\d.]+) %", row)[1]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert seen.page.locator(".answers [aria-checked=true]").count() == 1
    assert seen.page.inner_text("#shown h2").startswith(rows[0].split("\n")[0])


def test_a_class_is_picked_or_named(seen) -> None:
    second = seen.page.locator(".answers button").nth(1)
    name = second.locator("span").inner_text()
    assert seen.changed(second.click).startswith("Done.")
    assert seen.page.inner_text("#shown h2").startswith(name)
    box = seen.page.locator("#other-class").locator("input, textarea")
    box.fill("siamese")
    assert seen.changed(lambda: box.press("Enter")).startswith("Done.")
    assert seen.page.inner_text("#shown h2").startswith("Siamese cat")
    assert "Siamese cat" in seen.page.inner_text(".answers [aria-checked=true]")
    box.fill("sofa")
    said = seen.changed(lambda: box.press("Enter"))
    assert re.match(r"What you typed must name a class.*, got 'sofa'", said)


def test_opacity_and_colours_are_the_browsers_own(seen) -> None:
    page = seen.page
    layer = page.locator("#shown .tile .layer.unsigned").nth(1)
    pictures = page.locator("#shown").inner_html()
    before = len(seen.requests)
    page.locator("#opacity input[type=number]").fill("40")
    page.wait_for_function("getComputedStyle(document.querySelector('#shown .layer')).opacity === '0.4'")
    own = page.evaluate("[...document.querySelectorAll('#shown .layer')].map(x => getComputedStyle(x).visibility)")
    assert own[:4] == ["visible", "hidden", "hidden", "visible"], "leave-one-out is signed, the gradient is not"
    page.get_by_label("for and against").check()
    page.wait_for_function("getComputedStyle(document.querySelectorAll('#shown .layer.unsigned')[1]).visibility === 'hidden'")
    assert set(
        page.evaluate("[...document.querySelectorAll('#shown .layer.signed')].map(x => getComputedStyle(x).visibility)")
    ) == {"visible"}
    page.get_by_label("strength").check()
    layer.wait_for(state="visible")
    assert page.locator("#shown").inner_html() == pictures
    assert [url for url in seen.requests[before:] if not url.startswith("data:")] == []


def test_what_is_ticked_is_seen_to_be_with_the_pointer_on_it(seen) -> None:
    page = seen.page
    for which in ("#sign input[value=own]", "#methods input >> nth=0"):
        ticked = page.locator(which)
        page.mouse.move(0, 0)
        colour = ticked.evaluate("element => getComputedStyle(element).backgroundColor")
        ticked.hover()
        assert ticked.evaluate("element => getComputedStyle(element).backgroundColor") == colour
        assert ticked.is_checked()


def luminance(colour: str) -> float:
    """The relative luminance of "rgb(r, g, b)", as WCAG 2.2 defines it."""
    red, green, blue = (int(value) / 255 for value in re.findall(r"\d+", colour)[:3])
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(look, scheme) -> None:
    page = look(color_scheme=scheme).page
    js = """element => {
      const under = (box) => getComputedStyle(box).backgroundColor;
      let behind = element;
      while (behind.parentElement && under(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
      return [getComputedStyle(element).color, under(behind)];
    }"""
    for which in (
        ".lede p",
        ".status p",
        ".tile figcaption small",
        ".unit",
        ".residual",
        ".verdict em",
        ".verdict small",
        "#explain",
    ):
        text, under = (luminance(colour) for colour in page.locator(which).first.evaluate(js))
        contrast = (max(text, under) + 0.05) / (min(text, under) + 0.05)
        assert contrast >= 4.5, f"{which}: {contrast:.1f} : 1"


def test_unticking_shows_less_and_ticking_again_computes_nothing(seen) -> None:
    page = seen.page
    box = page.locator("#methods").get_by_label("SmoothGrad")
    times = page.locator("#shown figcaption small").all_inner_texts()
    seen.changed(box.uncheck)
    assert titles(seen) == [title for title in TITLES if title != "SmoothGrad"]
    seen.changed(box.check)
    assert titles(seen) == TITLES
    assert page.locator("#shown figcaption small").all_inner_texts() == times, "the same maps with the same times"


def test_an_option_recomputes_its_own_method(seen) -> None:
    page = seen.page
    page.get_by_text("Options: segments").click()
    steps = page.locator("#steps input[type=number]")
    before = page.locator("#shown figcaption small").all_inner_texts()

    def move() -> None:
        steps.fill("7")
        steps.blur()
        page.locator("#explain").click()

    assert seen.changed(move).startswith("Done.")
    after = page.locator("#shown figcaption small").all_inner_texts()
    changed = [title for title, old, new in zip(TITLES, before, after, strict=True) if old != new]
    assert all(time.endswith(" 7 passes") for time in after[-2:])
    assert changed == ["Integrated Gradients", "Blur Integrated Gradients"]
    assert "residual" in page.locator("#shown .tile").nth(6).inner_text()


def test_what_is_moved_while_a_run_ends_is_not_lost(seen) -> None:
    page = seen.page
    page.get_by_text("Options: segments").click()
    steps = page.locator("#steps input[type=number]")

    def move_again_and_again() -> None:
        for number in range(5, 9):
            steps.fill(str(number))
            steps.blur()
            page.locator("#explain").click()

    assert seen.changed(move_again_and_again).startswith("Done.")
    assert all(time.endswith(" 8 passes") for time in page.locator("#shown figcaption small").all_inner_texts()[-2:])


def test_what_is_typed_the_moment_the_options_open_stays(seen) -> None:
    page = seen.page
    # whatever the page still wants to do when the next picture of it is drawn has to wait until it is called
    page.evaluate("() => { window.held = []; window.requestAnimationFrame = (call) => held.push(call); }")
    page.get_by_text("Options: segments").click()
    steps = page.locator("#steps input[type=number]")
    steps.fill("7")
    page.evaluate("() => { while (held.length) held.shift()(performance.now()); }")
    assert seen.changed(steps.blur).startswith("Done.")
    assert steps.input_value() == "7"


def test_of_two_picks_the_later_one_counts_even_where_it_arrives_first(seen) -> None:
    page = seen.page
    second, third = (page.locator(".answers button").nth(place) for place in (1, 2))
    name = third.locator("span").inner_text()
    held = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    second.click()
    assert seen.changed(third.click).startswith("Done.")
    assert page.inner_text("#shown h2").startswith(name)
    assert seen.changed(held[0].continue_).startswith("Done.")
    assert page.inner_text("#shown h2").startswith(name)
    assert name in page.inner_text(".answers [aria-checked=true]")


def test_pointing_at_a_segment_hides_it_and_says_what_that_does(seen) -> None:
    page = seen.page
    picture = page.locator("#shown .picture[data-labels]")
    picture.scroll_into_view_if_needed()
    picture.hover(position={"x": 60, "y": 60})
    told = page.locator("#shown .told")
    told.wait_for(state="visible")
    assert re.fullmatch(r"[\d.<>]+ % → [\d.<>]+ %|no change", told.inner_text())
    readings = page.locator("#shown output").all_inner_texts()
    assert len(readings) == len(TITLES)
    assert all(re.fullmatch(rf"{viz.MINUS}?[\d.e{viz.MINUS}+]+", reading) for reading in readings)
    drawn = page.evaluate(
        "(() => { const c = document.querySelector('#shown canvas');"
        " return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(value => value > 0); })()"
    )
    assert drawn
    page.locator("h1").hover()
    told.wait_for(state="hidden")


def test_the_bars_of_the_largest_falls_have_one_length(seen) -> None:
    bars = seen.page.locator(".ranking .bar")
    assert bars.count() > 1
    assert len({round(bar.bounding_box()["width"], 1) for bar in bars.all()}) == 1


def test_photos_are_picked_and_uploaded(seen, tmp_path) -> None:
    page = seen.page
    seen.changed(page.locator(".thumbnails [data-pick=coffee]").click)
    assert "Coffee" in page.inner_text(".preview")
    assert page.locator(".thumbnails [aria-checked=true]").get_attribute("data-pick") == "coffee"
    own = tmp_path / "my <b> own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(own)
    assert seen.changed(lambda: page.set_input_files("#upload input[type=file]", own)).startswith("Done.")
    assert "own" in page.inner_text(".preview b")
    assert page.locator(".preview b b").count() == 0
    assert page.locator(".thumbnails [aria-checked=true]").count() == 0


def test_a_second_photo_goes_the_same_way_as_the_first(seen, tmp_path) -> None:
    for name, ending in (("first", "avif"), ("second", "webp")):
        own = tmp_path / f"{name}.{ending}"
        Image.new("RGB", (40, 30), "red").save(own)
        assert seen.changed(lambda own=own: seen.page.set_input_files("#upload input[type=file]", own)).startswith("Done.")
        assert f"{name}.{ending}" in seen.page.inner_text(".preview b")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_what_was_found_is_seen_without_scrolling(look, width, height) -> None:
    seen = look(width, height)
    page = seen.page

    def top(where: str) -> float:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        return page.locator(f"{where} .picture").first.bounding_box()["y"]

    assert top("#shown") < 0.75 * height
    assert tab(seen, "Two classes").startswith("Done.")
    assert top("#pairs") < 0.9 * height  # below the names of two classes
    assert tab(seen, "Eight steps").startswith("Done.")
    assert top("#walked") < 0.9 * height


def test_values_and_segments_by_keyboard(seen) -> None:
    page = seen.page
    first = page.locator("#shown .picture[data-labels]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    told = page.locator("#shown .told").first
    told.wait_for(state="visible")
    assert re.search(r"→|no change", told.inner_text())
    assert page.locator("#shown .unit output").nth(1).inner_text() != "", "all maps say their value there"
    page.keyboard.press("Escape")
    told.wait_for(state="hidden")
    page.locator("#shown .ranking li").first.focus()
    told.wait_for(state="visible")


def test_values_by_touch(look) -> None:
    page = look(400, 800, has_touch=True).page
    page.locator("#shown .picture[data-labels]").first.tap()
    page.locator("#shown .told").first.wait_for(state="visible")


def test_a_tile_is_enlarged_and_made_small_again(seen) -> None:
    tile = seen.page.locator("#shown .tile").nth(1)
    small = tile.bounding_box()["width"]
    button = tile.locator(".enlarge")
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert tile.bounding_box()["width"] > 1.5 * small
    button.click()
    assert tile.bounding_box()["width"] == pytest.approx(small)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_axe_finds_nothing_that_keeps_people_out(look, width, scheme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = look(width, color_scheme=scheme).page
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found] == []


def test_a_file_that_is_no_photo_is_refused_in_a_sentence(seen, tmp_path) -> None:
    notes = tmp_path / "notes.png"
    notes.write_text("no picture at all")
    said = seen.changed(lambda: seen.page.set_input_files("#upload input[type=file]", notes))
    assert said.strip() == ("Your file must be a readable image file, got notes.png (not an image that Pillow can read).")
    assert str(tmp_path) not in seen.page.content()


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=window.hit=1>.png", "'\"><svg onload=window.hit=1>.png", "${window.hit=1}.png"]
)
def test_names_of_files_are_text(seen, tmp_path, name) -> None:
    own = tmp_path / name
    Image.new("RGB", (40, 30), "red").save(own)
    assert seen.changed(lambda: seen.page.set_input_files("#upload input[type=file]", own)).startswith("Done.")
    assert seen.page.evaluate("window.hit") is None
    assert seen.page.locator("img[src=x], svg[onload]").count() == 0


def test_an_upload_has_a_size_that_it_may_not_exceed(seen, tmp_path) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(21 * 1024 * 1024))
    seen.page.set_input_files("#upload input[type=file]", large)
    toast = seen.page.locator(".toast-body.error, .toast-wrap")
    toast.first.wait_for()
    assert "size" in toast.first.inner_text().lower()


def test_a_run_can_be_stopped_and_keeps_what_was_finished(seen) -> None:
    page = seen.page
    page.locator("#controls").get_by_label("Model").click()
    page.get_by_role("option", name="slow").click()
    page.wait_for_function("/SmoothGrad: \\d+ of \\d+ model rows/.test(document.querySelector('#status .busy')?.innerText)")
    assert page.locator("#shown .tile.waiting").count() > 0
    page.locator("#stop").click()
    said = seen.settled()
    assert re.match(r"Stopped: cancelled (after \d+ of \d+ rows of|before) .*\. What was finished is kept\.", said)
    shown = titles(seen)
    assert shown == TITLES[: len(shown)], "what was finished, and nothing that would still be computing"
    assert 5 <= len(shown) < len(TITLES)
    assert page.get_by_role("link", name="Arrays (NPZ)").is_visible()


def test_a_method_that_does_not_apply_says_so_in_its_place(seen) -> None:
    page = seen.page
    page.locator("#controls").get_by_label("Model").click()
    assert seen.changed(page.get_by_role("option", name="smooth").click).startswith("Done.")
    refused = page.locator("#shown .tile.refused")
    assert refused.locator("b").all_inner_texts() == ["Guided backprop", "Guided Grad-CAM"]
    assert "GELU" in refused.first.inner_text()


def test_a_step_whose_method_does_not_apply_shows_no_other_steps_pictures(seen) -> None:
    page = seen.page
    page.locator("#controls").get_by_label("Model").click()
    seen.changed(page.get_by_role("option", name="smooth").click)
    assert tab(seen, "Eight steps").startswith("Done.")
    page.wait_for_selector("#walked .swipe")  # the first step shows two maps
    seen.changed(page.locator("#next").click)
    assert seen.changed(page.locator("#next").click).startswith("Done.")
    assert titles(seen, "#walked") == [article.GUIDED.title]
    assert "GELU" in page.inner_text("#walked .refused")


def test_no_method_is_a_sentence_too(seen) -> None:
    page = seen.page
    ticked = page.locator("#methods input:checked")
    for _ in range(ticked.count()):
        said = seen.changed(ticked.first.uncheck)
    assert said.strip() == "Methods must name at least one method, got none."


def test_downloads_hold_what_is_shown(seen, tmp_path) -> None:
    page = seen.page
    for label, name in (("Arrays (NPZ)", "explanation.npz"), ("Panel (PNG)", "explanation.png")):
        with page.expect_download() as started:
            page.get_by_role("link", name=label).click()
        assert started.value.suggested_filename == name
        started.value.save_as(tmp_path / name)
    loaded = Explanation.load(tmp_path / "explanation.npz")
    assert list(loaded.results) == list(METHODS)
    assert page.inner_text("#shown h2").startswith(loaded.target_names[0])
    with Image.open(tmp_path / "explanation.png") as panel:
        assert min(panel.size) > 500


def test_two_classes_on_one_photo(seen) -> None:
    page = seen.page
    assert tab(seen, "Two classes").startswith("Done.")
    rows = page.locator("#pairs .pair h3").all_inner_texts()
    assert [row.split(" correlation")[0].strip() for row in rows] == [
        "Guided backprop",
        "Grad-CAM",
        "Guided Grad-CAM",
        "Integrated Gradients",
    ]
    first, second = (page.locator(f"#{box} input").input_value() for box in ("one", "two"))
    assert titles(seen, "#pairs .pair:first-child") == [first, second, "Difference"]
    assert {first, second} <= set(NAMES)
    box = page.locator("#two input")
    box.fill("tripod")
    assert seen.changed(lambda: box.press("Enter")).startswith("Done.")
    assert titles(seen, "#pairs .pair:first-child")[1] == "tripod"
    # both look chosen in the list, which is read as a choice of one class and one beside it
    assert page.inner_text(".answers [aria-checked=true] span") == first
    assert page.inner_text(".answers .beside span") == "tripod beside it"
    other = page.locator(".answers button:not(.beside):not([aria-checked=true])").first
    picked = other.locator("span").inner_text()
    assert seen.changed(other.click).startswith("Done.")  # a class that is picked is the first of the two
    assert titles(seen, "#pairs .pair:first-child")[:2] == [picked, "tripod"]
    assert page.locator("#one input").input_value() == picked
    tab(seen, "Side by side")
    page.wait_for_selector(".answers:not(:has(.beside))")
    assert picked in page.inner_text(".answers [aria-checked=true]")
    tab(seen, "Two classes")
    box.fill("")
    assert "Both boxes must name a class" in seen.changed(page.locator("#explain").click)


def test_eight_steps_from_the_first_to_the_last(seen) -> None:
    page = seen.page
    assert tab(seen, "Eight steps").startswith("Done.")
    for number, (step, (title, _)) in enumerate(zip(article.STEPS, article.sections(), strict=True), 1):
        if number > 1:
            assert seen.changed(page.locator("#next").click).startswith("Done.")
        page.wait_for_function(f"document.querySelector('#text').innerText.startsWith('{number}. {title}')")
        assert page.locator("#walked figcaption b").all_inner_texts() == [step.left.title, step.right.title]
        assert page.locator("#knob").is_visible() == (step.knob is not None)
    assert page.locator("#next").is_disabled()


def test_the_divider_is_drawn_from_side_to_side(seen) -> None:
    page = seen.page
    tab(seen, "Eight steps")
    left = page.locator("#walked .side.left")
    assert left.evaluate("x => getComputedStyle(x).clipPath") == "inset(0px 50% 0px 0px)"
    page.locator("#walked input[type=range]").fill("80")
    assert left.evaluate("x => getComputedStyle(x).clipPath") == "inset(0px 20% 0px 0px)"


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(look, width) -> None:
    seen = look(width, 800)
    for name in ("Side by side", "Two classes", "Eight steps"):
        if name != "Side by side":
            tab(seen, name)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


# Runs that overtake each other, without a browser --------------------------------------------------------------------


class Asked:
    """A reader of a page without a browser, and the numbers of the questions asked for them."""

    def __init__(self) -> None:
        self.actions = actions.Actions(Workspace({"small": classifier}), lambda found: "token")
        self.reader = actions.Reader()

    def run(self, order: int, steps: int = 4) -> Iterator[list[object]]:
        options = Options(segments=9, samples=3, steps=steps, sigma=4.0)
        chosen = [list(METHODS), *astuple(options), "cat", "dog", [], 1, None, actions.SIDE_BY_SIDE]
        return self.actions.run(self.reader, "small", *chosen, order)


def said(outputs: Iterable[list[object]]) -> list[str]:
    """The status lines of a run that are no progress."""
    return [line for line, *_ in outputs if isinstance(line, str) and "busy" not in line]


def test_a_run_that_what_was_moved_has_overtaken_computes_nothing() -> None:
    asked = Asked()
    asked.actions.give_way(asked.reader, 3)
    assert list(asked.run(2)) == []
    (line,) = said(asked.run(4))
    assert 'data-run="4"' in line
    assert "Done." in line


def test_a_run_that_gives_way_ends_without_a_word() -> None:
    asked = Asked()
    running = asked.run(2)
    next(running)
    asked.actions.give_way(asked.reader, 3)
    assert said(running) == []


def test_a_run_that_is_stopped_says_so() -> None:
    asked = Asked()
    running = asked.run(2)
    next(running)
    asked.actions.stop(asked.reader)
    (line,) = said(running)
    assert "Stopped: cancelled" in line
    (again,) = said(asked.run(3))
    assert again == line.replace('data-run="2"', 'data-run="3"'), "a run that was held back until this one ended"
    asked.actions.give_way(asked.reader, 4)
    (line,) = said(asked.run(5))
    assert "Done." in line


def test_an_emptied_box_is_no_class() -> None:
    asked = Asked()
    before = asked.reader.target
    for empty in ("", "  ", None):
        assert asked.actions.name_class(asked.reader, "small", empty, 2) == [gr.skip()] * 3
    assert asked.reader.target == before


def test_a_choice_that_a_newer_one_has_overtaken_changes_nothing() -> None:
    asked = Asked()
    asked.actions.name_class(asked.reader, "small", "tripod", 2)
    outputs = asked.actions.name_class(asked.reader, "small", "lynx", 1)
    assert outputs == [gr.skip()] * 3
    assert asked.reader.target == NAMES.index("tripod")
