"""The page: what is where. What happens when something is touched is in actions.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from pysal.demo import article, tiles, words
from pysal.demo.actions import EIGHT_STEPS, SIDE_BY_SIDE, TWO_CLASSES, Actions, Reader, section_text, slider_of
from pysal.demo.session import Options, Workspace
from pysal.explanation import Explanation
from pysal.methods.registry import EVERY, METHODS
from pysal.models.photos import PHOTO_SUFFIXES

HERE = Path(__file__).parent
RUNS = 30  # at once; Gradio has 40 threads, and a run holds one of them
COMPARED = ("guided_backprop", "grad_cam", "guided_grad_cam", "integrated_gradients")
PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick]');
  if (button) trigger('pick', { key: button.dataset.pick });
});"""
# The last input of what the server is asked: a number that grows with every question, so that of two it knows the newer.
ASK = "(...values) => [...values.slice(0, -1), pysal.ask()]"
CLOSE = "() => ({ __type__: 'update', open: false })"
SCORES = [
    ("each method's own", ""),
    ("logit", "logit"),
    ("probability", "probability"),
    ("log probability", "log_probability"),
]
FILLS = [("black", "black"), ("white", "white"), ("mean colour", "mean"), ("blurred photo", "blur")]


def theme() -> gr.themes.Base:
    """Return a theme whose fonts are the system's: nothing is fetched for it."""
    fonts = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
    mono = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")
    return gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", font=fonts, font_mono=mono, radius_size="md", spacing_size="sm"
    ).set(  # Base's own small print and white on orange have less than 3 : 1
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
    )


def head() -> str:
    """Return what goes into the page's head: its style, with the colour bars in the colours of the pictures, and its script.

    A style sheet that is handed to Gradio by itself gets other selectors than were written.
    """
    style, script = ((HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return f"<style>{style}\n{tiles.ramps()}</style><script>{script}</script>"


def build(workspace: Workspace, keep: Callable[[Explanation], str]) -> gr.Blocks:
    """Return the page.

    Args:
        workspace: what computes.
        keep: takes what was found last and returns the token of its downloads.
    """
    actions = Actions(workspace, keep)
    title = "pysal: why did the model say that?"
    blocks: gr.Blocks
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        reader = gr.State(Reader(), time_to_live=6 * 3600)
        gr.HTML(
            '<div class="pysal lede"><h1>Why did the model say that?</h1>'
            "<p>Seven ways to ask, side by side. Everything is computed on this machine; nothing leaves it.</p></div>"
        )
        with gr.Row(equal_height=False, elem_id="page"):
            with gr.Column(scale=1, min_width=270, elem_id="controls"):
                thumbnails = gr.HTML(js_on_load=PICK, elem_id="thumbnails")
                upload = gr.File(
                    label="Or your own, up to 20 MB",
                    file_types=sorted(PHOTO_SUFFIXES),
                    height=104,
                    elem_id="upload",
                )
                preview = gr.HTML(elem_id="preview")
                model = gr.Dropdown(
                    list(workspace.names), value=workspace.names[0], label="Model", interactive=len(workspace.names) > 1
                )
                answers = gr.HTML(js_on_load=PICK, elem_id="answers")
                # no list of all classes, which would lie open over the page; a near name is answered with those meant
                other = gr.Textbox(
                    label="Another class, by name or number",
                    placeholder="type it, then Enter",
                    max_lines=1,
                    elem_id="other-class",
                )
                opacity = gr.Slider(
                    0, 100, 95, step=1, label="Opacity of the maps, %", elem_id="opacity", scale=2, min_width=180
                )
                sign = gr.Radio(
                    [
                        ("each its own", "own"),
                        ("for and against", "signed"),
                        ("strength", "unsigned"),
                    ],
                    value="own",
                    label="Colours",
                    elem_id="sign",
                    scale=3,
                    min_width=260,
                )
            with gr.Column(scale=4, min_width=320, elem_id="found"):
                with gr.Row(elem_id="doing"):
                    status = gr.HTML(words.status("Loading the model …", 0.0, "busy"), elem_id="status", min_width=200)
                    explain = gr.Button("Explain", variant="primary", size="sm", scale=0, min_width=90, elem_id="explain")
                    stop = gr.Button("Stop", size="sm", scale=0, min_width=70, elem_id="stop")
                with gr.Tabs():
                    with gr.Tab("Side by side", id=SIDE_BY_SIDE) as first:
                        methods = gr.CheckboxGroup(
                            [(method.title, method.name) for method in EVERY.values()],
                            value=list(METHODS),
                            label="Methods",
                            elem_id="methods",
                        )
                        # Open until the page is there: Gradio mounts what is in a closed one when it is opened, and then
                        # overwrites what was typed into it in the same moment by the values it began with.
                        with gr.Accordion(
                            "Options: segments, noise, score, layer, steps, baseline, sigma", elem_id="options"
                        ) as options:
                            knobs = _knobs()
                        shown = gr.HTML(elem_id="shown")
                    with gr.Tab("Two classes", id=TWO_CLASSES) as second:
                        with gr.Row():
                            one = gr.Dropdown([], label="This class", filterable=True, allow_custom_value=True, elem_id="one")
                            two = gr.Dropdown([], label="or this one", filterable=True, allow_custom_value=True, elem_id="two")
                        compared = gr.CheckboxGroup(
                            [(method.title, method.name) for method in EVERY.values()],
                            value=list(COMPARED),
                            label="Methods",
                            elem_id="compared",
                        )
                        pairs = gr.HTML(elem_id="pairs")
                    with gr.Tab("Eight steps", id=EIGHT_STEPS) as third:
                        step = gr.Radio(
                            [(f"{number}. {title}", number) for number, (title, _) in enumerate(article.sections(), 1)],
                            value=1,
                            show_label=False,
                            container=False,
                            elem_classes="pysal-steps",
                            elem_id="step",
                        )
                        with gr.Row(equal_height=False):
                            with gr.Column(scale=1, min_width=300):
                                text = gr.Markdown(section_text(1), elem_id="text")
                                knob = gr.Slider(elem_id="knob", **slider_of(article.STEPS[0].knob))
                                with gr.Row():
                                    back = gr.Button("Back", size="sm", min_width=80, interactive=False)
                                    forth = gr.Button("Next step", size="sm", min_width=80, variant="primary", elem_id="next")
                            with gr.Column(scale=1, min_width=300):
                                walked = gr.HTML(elem_id="walked")

        tab = gr.Radio([SIDE_BY_SIDE, TWO_CLASSES, EIGHT_STEPS], value=SIDE_BY_SIDE, visible="hidden")
        order = gr.Number(0, precision=0, visible=False)  # see ASK
        choices = [model, methods, *knobs, one, two, compared, step, knob, tab]
        run = {
            "fn": actions.run,
            "inputs": [reader, *choices, order],
            "outputs": [status, shown, pairs, walked, answers],
            "concurrency_limit": RUNS,  # they take turns, see `turns`; with one at a time the second reader waits for the first
            "trigger_mode": "always_last",  # else what is moved while the run before it is still ending would be dropped
        }
        alone: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        quiet = {**alone, "js": ASK}
        # Gradio drops an event while the one before it is under way, unless told otherwise: the last choice counts, and of
        # picks, which it repeats with the data of the first, each one.
        last, each_one = {**quiet, "trigger_mode": "always_last"}, {**quiet, "trigger_mode": "multiple"}
        photo_outputs = [thumbnails, preview, answers, other, one, two, status]

        def then_run(event: Any) -> None:
            event.then(**run, **quiet)

        # a photo, a model, a class: what runs for the one before is stopped first
        then_run(blocks.load(actions.start, [reader, model, order], photo_outputs, **quiet))
        then_run(thumbnails.pick(actions.pick_photo, [reader, model, order], [*photo_outputs, upload], **each_one))
        then_run(upload.upload(actions.upload, [reader, model, upload, order], [*photo_outputs, upload], **last))
        then_run(model.input(actions.start, [reader, model, order], photo_outputs, **last))
        then_run(answers.pick(actions.pick_class, [reader, model, order], [answers, one, status], **each_one))
        then_run(other.submit(actions.name_class, [reader, model, other, order], [answers, one, status], **last))
        # everything else that changes what is computed
        moved = [methods.input, compared.input, one.input, two.input, explain.click, knob.release, tab.change]
        for each in knobs:
            typed = each.submit if isinstance(each, gr.Textbox) else each.input
            moved.append(each.release if isinstance(each, gr.Slider) else typed)
        then_run(gr.on(moved, actions.give_way, [reader, order], None, queue=False, **quiet))
        walk = [step, text, knob, back, forth]
        then_run(step.input(actions.walk, [reader, step, order], walk, queue=False, **last))
        then_run(back.click(actions.step_back, [reader, step, order], walk, queue=False, **last))
        then_run(forth.click(actions.step_forth, [reader, step, order], walk, queue=False, **last))
        stop.click(actions.stop, [reader], None, queue=False, **alone)
        blocks.unload(actions.leave)
        # what the browser does alone
        js = "v => { document.documentElement.style.setProperty('--pysal-opacity', v / 100); }"
        opacity.input(None, opacity, None, js=js, **alone)
        sign.input(None, sign, None, js="v => { document.documentElement.dataset.sign = v; }", **alone)
        for name, page in ((SIDE_BY_SIDE, first), (TWO_CLASSES, second), (EIGHT_STEPS, third)):
            page.select(None, None, tab, js=f"() => '{name}'", **alone)
        blocks.load(None, None, options, js=CLOSE, **alone)
    return blocks


def _knobs() -> list[gr.Slider | gr.Dropdown | gr.Textbox]:
    """Return the controls of Options, in the order of its fields."""
    start = Options()
    bases = [name for name in METHODS if not METHODS[name].noisy and METHODS[name].stored != "drops"]
    with gr.Row():
        with gr.Group():
            gr.HTML('<div class="pysal group">Leave-one-out</div>')
            cut = gr.Dropdown(["superpixels", "grid", "windows"], value=start.cut, label="Cut into")
            segments = gr.Slider(4, 225, start.segments, step=1, label="Segments, about", elem_id="segments")
            fill = gr.Dropdown(FILLS, value=start.fill, label="Hidden behind")
        with gr.Group():
            gr.HTML('<div class="pysal group">SmoothGrad</div>')
            smoothed = gr.Dropdown([(METHODS[name].title, name) for name in bases], value=start.smoothed, label="Smooths")
            noise = gr.Slider(0, 0.5, start.noise, step=0.01, label="Noise, share of the photo's range")
            samples = gr.Slider(1, 100, start.samples, step=1, label="Noisy copies", elem_id="samples")
        with gr.Group():
            gr.HTML('<div class="pysal group">All methods, Grad-CAM</div>')
            score = gr.Dropdown(SCORES, value=start.score, label="Number that is explained", elem_id="score")
            layer = gr.Textbox(label="Grad-CAM: layer", placeholder="the last that fits", max_lines=1, elem_id="layer")
        with gr.Group():
            gr.HTML('<div class="pysal group">Integrated Gradients</div>')
            baseline = gr.Dropdown(FILLS, value=start.baseline, label="From")
            steps = gr.Slider(2, 300, start.steps, step=1, label="Steps (of Blur IG, Guided IG and XRAI, too)", elem_id="steps")
            sigma = gr.Slider(1, 100, start.sigma, step=1, label="Blur IG: from a blur of, pixels")
    knobs: dict[str, gr.Slider | gr.Dropdown | gr.Textbox] = {
        "cut": cut,
        "segments": segments,
        "fill": fill,
        "smoothed": smoothed,
        "noise": noise,
        "samples": samples,
        "baseline": baseline,
        "steps": steps,
        "sigma": sigma,
        "layer": layer,
        "score": score,
    }
    return [knobs[each.name] for each in fields(Options)]
