"""What a reader sees of the page of a small classifier."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page

from tests.browser import PATIENCE


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
