"""Explanations in apps of others, as a reader sees them: an Interface and a Blocks page that know nothing of pysal."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from tests.browser import PATIENCE, ROOT


@pytest.fixture(params=["interface", "blocks"])
def app(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The name and the address of an app."""
    off = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SERVER_PORT": ""}
    environment = {**os.environ, **off, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    del environment["GRADIO_SERVER_PORT"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.demo.foreign", request.param]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        timer = threading.Timer(PATIENCE / 1000, process.kill)
        timer.start()
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), "the app was not served"
        yield request.param, address
        timer.cancel()
        process.kill()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """An empty page."""
    context = browser.new_context(viewport={"width": 1280, "height": 1200})
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


def photo() -> bytes:
    """A picture that is bright on its left."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 230
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def test_an_app_of_somebody_else_explains_its_answer(app: tuple[str, str], page: Page, tmp_path: Path) -> None:
    """A photo is uploaded, the app answers as before, and a click shows what the answer depends on; without one, a sentence."""
    kind, address = app
    page.goto(address)
    button = page.locator("button.pysal-explain")
    button.wait_for()
    assert button.inner_text() == {"interface": "Explain", "blocks": "Why?"}[kind]
    button.click()
    page.get_by_text("pysal.gradio: the image must be chosen first").first.wait_for()
    page.locator("input[type=file]").first.set_input_files({"name": "left.png", "mimeType": "image/png", "buffer": photo()})
    if kind == "interface":
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("left", exact=True).first.wait_for()
    else:
        page.wait_for_function("() => document.querySelector('textarea')?.value")
    button.click()
    picture = page.locator(".pysal-picture img")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    table = page.locator(".pysal-table pre").inner_text()
    if kind == "interface":
        assert "Leave-one-out" in table
        assert "left" in table
    else:
        said = page.locator("textarea").first.input_value()
        assert "Grad-CAM" in table
        assert said in table
