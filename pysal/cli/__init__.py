"""Internal: the command line, `pysal explain`, `pysal audit`, `pysal compare`, `pysal demo`, `pysal methods`, `pysal info`.

torch, NumPy and matplotlib are imported inside the commands only, so that `pysal --help` answers at once. Whatever goes
wrong is one sentence on stderr, with exit code 2 for a wrong call or bad input, 1 for a failure and 130 for Ctrl-C.
"""

import click

from pysal.cli import audit, compare, demo, explain, info
from pysal.cli.options import METHOD_NAMES, OPTION_OF, SCORE_NAMES
from pysal.cli.terminal import Commands, say

__all__ = ["METHOD_NAMES", "OPTION_OF", "SCORE_NAMES", "audit", "compare", "demo", "explain", "info", "main"]


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from pysal._library import version

        say(f"pysal {version()}")
        context.exit()


@click.group(name="pysal", cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """See why an image model answered as it did, in seven ways."""
    if context.invoked_subcommand is None:
        say(context.get_help())


for _command in (explain.explain, demo.demo, info.methods, info.info, audit.audit, compare.compare):
    main.add_command(_command)
