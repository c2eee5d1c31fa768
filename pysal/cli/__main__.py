"""`python -m pysal.cli` is `pysal`."""

from pysal.cli import main

main()
