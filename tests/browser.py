"""One server of a small classifier's page and one Chromium for all tests that look at something in a browser."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
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
PATIENCE = 240_000  # milliseconds, on a machine that is busy elsewhere: what fails waits that long, what works does not


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[[str], str]]:
    """Serve the page on an address: its URL."""
    processes: dict[str, tuple[subprocess.Popen[str], str]] = {}

    def serve(host: str) -> str:
        if host not in processes:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.demo.small", host]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            timer = threading.Timer(PATIENCE / 1000, process.kill)
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
        process.wait(PATIENCE / 1000)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def address(served) -> str:
    """The page on loopback."""
    return served("127.0.0.1")


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Debian's Chromium."""
    from playwright.sync_api import sync_playwright  # here, so that tests without a browser need none

    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium must be installed (apt-get install chromium)"
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        environment = {**os.environ, "HOME": home}
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, env=environment, timeout=PATIENCE)
        yield browser
        browser.close()
