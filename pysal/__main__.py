"""`python -m pysal` is `pysal`."""

from pysal.cli import main

main()
