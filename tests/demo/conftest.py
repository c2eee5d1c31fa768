"""The page of a small classifier in a process of its own, and Debian's Chromium to look at it."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds, on a machine that is busy elsewhere


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[[str], str]]:
    """Serve the page on an address: its URL."""
    processes: dict[str, tuple[subprocess.Popen[str], str]] = {}

    def serve(host: str) -> str:
        if host not in processes:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.demo.small", host]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            timer = threading.Timer(120, process.kill)
            timer.start()
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            timer.cancel()
            assert address.startswith("http://"), "the page was not served"
            processes[host] = process, address
        return processes[host][1]

    yield serve
    for process, _ in processes.values():
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def address(served) -> str:
    """The page on loopback."""
    return served("127.0.0.1")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium must be installed (apt-get install chromium)"
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        environment = {**os.environ, "HOME": home}
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, env=environment, timeout=PATIENCE)
        yield browser
        browser.close()


@dataclass
class Seen:
    """A page, every request it made, and what its console said was wrong."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def settled(self, since: int = 0) -> str:
        """Wait until the newest question, one after number `since`, has its answer; return what the status line says."""
        answered = """since => {
          const line = document.querySelector('#status .status:not(.busy)');
          return window.pysal?.asked > since && Number(line?.dataset.run) === pysal.asked && line.innerText;
        }"""
        said = self.page.wait_for_function(answered, arg=since).json_value()
        assert isinstance(said, str)
        return said

    def changed(self, act: Callable[[], object]) -> str:
        """Do something that starts a run, wait for the end of the last run it starts, return what the status line says."""
        asked = self.page.evaluate("pysal.asked")
        act()
        return self.settled(asked)


@pytest.fixture
def look(browser, address) -> Iterator[Callable[..., Seen]]:
    """Open the page, as wide as asked, and wait until its first pictures are there."""
    contexts = []

    def open_page(width: int = 1280, height: int = 900, **options: object) -> Seen:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        seen = Seen(context.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.goto(address)
        seen.settled()
        return seen

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def seen(look) -> Seen:
    """The page on a desk."""
    return look()
