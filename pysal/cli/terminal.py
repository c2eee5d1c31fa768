"""What people read on the terminal: lines, columns, and every error as one sentence with its exit code."""

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click


class BadInput(click.ClickException):
    """What was asked for cannot be done."""

    exit_code = 2


class Failure(click.ClickException):
    """What was asked for went wrong on the way."""

    exit_code = 1


class Interrupted(click.ClickException):
    """Somebody pressed Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """A group of commands whose every error is one sentence on stderr."""

    own_process = False

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code; with `standalone_mode=False`, return or raise as click does."""
        self.own_process = standalone_mode and args is None  # the process was started for the command
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name or "pysal", complete_var, standalone_mode=False, **extra)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "pysal"
            say(f"{command}: {one_line(error.format_message()).rstrip('.')} (see {command} --help)", error=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            say(one_line(error.format_message()), error=True)
            sys.exit(error.exit_code)
        except click.Abort:
            say("pysal: interrupted, wrote nothing", error=True)
            sys.exit(Interrupted.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def errors_as_sentences(command: str, written: Sequence[Path] = ()) -> Iterator[None]:
    """Raise what goes wrong as one sentence, with the exit code it deserves; show warnings as sentences, too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {one_line(str(message))}", error=True)
            yield
    except KeyboardInterrupt as error:
        files = ", ".join(map(click.format_filename, written)) or "nothing"
        raise Interrupted(f"{command}: interrupted, wrote {files}") from error
    except click.ClickException:
        raise
    except Exception as error:
        if click.get_current_context().find_root().params["debug"] or isinstance(error, BrokenPipeError):
            raise
        sentence = one_line(str(error))
        ours = sentence.startswith("pysal")
        if ours and isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            raise BadInput(sentence) from error
        unexpected = (
            f"{command}: {type(error).__name__}: {first_words(str(error))} (pysal --debug {command.split()[-1]} shows where)"
        )
        raise Failure(sentence if ours else unexpected) from error


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Import what a command needs without Python's search for garbage: it would go through all of torch, again and again.

    In a process of its own, what has been imported then is left out of all later searches.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if getattr(click.get_current_context().find_root().command, "own_process", False):
                gc.freeze()
            gc.enable()


MOST_LETTERS = 300
"""Most letters of an error that is not pysal's own: libraries put whole graphs into theirs."""


def first_words(text: str) -> str:
    """Return what an error of another library begins with, on one line, without the graph or the traceback in it."""
    kept: list[str] = []
    for line in text.strip().splitlines():
        if not line.strip() or line.lstrip().startswith(("graph(", "Traceback", "%", "File ")):
            break
        kept.append(line)
    sentence = one_line(" ".join(kept)) or "it says no more"
    return sentence if len(sentence) <= MOST_LETTERS else sentence[:MOST_LETTERS].rstrip() + "..."


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def readable(value: object) -> str:
    """Return a fact as a reader has it: "yes", "no", "none", a list with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{key} ({readable(item)})" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


def one_line(text: str) -> str:
    """Return the text with its blanks and line ends merged."""
    return " ".join(text.split())


def say(*lines: str, error: bool = False) -> None:
    """Print the lines, with escapes for what the terminal's encoding lacks."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        for line in lines:
            click.echo(line.encode(encoding, "backslashreplace").decode(encoding), err=error)
    except BrokenPipeError:
        raise  # nobody reads any more, as in `pysal methods | head -1`: click ends quietly
    except OSError as problem:
        # What is still buffered must not be tried again when Python shuts down: that would change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise Failure(f"pysal: the output cannot be written ({problem.strerror})") from problem
