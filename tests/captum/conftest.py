"""Reports, after the tests, how far ours was from captum."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.captum.peer import FOUND

    for name, (count, worst) in sorted(FOUND.items()):
        terminalreporter.write_line(f"captum: {name:24} {count:4} cases, largest difference {worst:.1e}")
