"""`pysal methods` and `pysal info`: what there is to run, and on what."""

import os
import platform

import click

from pysal.cli.terminal import columns, errors_as_sentences, readable, say


@click.command(short_help="List the methods and what they cost.")
def methods() -> None:
    """List the methods: what each map says and what it costs in model passes per image."""
    with errors_as_sentences("pysal methods"):
        from pysal.methods.registry import EVERY

        rows = [("method", "what the map says", "model passes per image")]
        rows += [(method.name, method.summary, method.cost) for method in EVERY.values()]
        say(*columns(rows))


@click.command(short_help="Show versions and which native kernels run.")
def info() -> None:
    """Show versions, libraries, and for each op whether a native kernel runs."""
    with errors_as_sentences("pysal info"):
        from pysal import ops  # noqa: F401 (registers the ops)
        from pysal._library import HERE, build_info

        build = build_info()
        kernels = build.pop("kernels")
        facts = {
            "version": build.pop("version"),
            "python": platform.python_version(),
            "system": platform.platform(),
            "folder": os.fspath(HERE),
        }
        facts |= build
        say(*columns((name.replace("_", " "), readable(value)) for name, value in facts.items()), "")
        devices = list(dict.fromkeys(device for kinds in kernels.values() for device in kinds))
        table = [("op", *devices), *((name, *(kinds[device] for device in devices)) for name, kinds in kernels.items())]
        say(*columns(table))
