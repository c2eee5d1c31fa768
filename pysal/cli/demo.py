"""`pysal demo`: photos explained in a browser."""

import functools
import signal
from collections.abc import Sequence

import click

from pysal.cli.options import ModelChoice, device_of, model_options
from pysal.cli.terminal import errors_as_sentences, say


@click.command(short_help="Explain photos in a browser.")
@model_options
@click.option("--also", multiple=True, metavar="SOURCE", help="Another model to offer on the page; may be given several times.")
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets other machines in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    metavar="N",
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="Device to run on: auto, cpu, cuda or cuda:N."
)
def demo(model: ModelChoice, also: Sequence[str], host: str, port: int, device: str) -> None:
    """Show the methods side by side in a browser. Only this machine can open the page, unless --host lets others in.

    Needs the extra `demo`: pip install 'pysal-saliency[demo]'.
    """
    with errors_as_sentences("pysal demo"):
        from pysal import models
        from pysal.demo.server import serve

        place = device_of(device)
        others = {source: functools.partial(models.load, source, device=place) for source in also}
        loaders = {model.source: functools.partial(model.load, place), **others}

        def ready(address: str) -> None:
            say(f"pysal demo: open {address} (Ctrl-C stops it)")

        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed however it ends
        try:
            serve(loaders, host=host, port=port, device=place, ready=ready)
        finally:
            signal.signal(signal.SIGTERM, before)
