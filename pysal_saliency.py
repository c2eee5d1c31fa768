"""The package's other name: `pysal_saliency` in a checkout, `pysal` in a wheel (pysal/_names.py).

`import pysal_saliency` is what works beside PySAL, the spatial analysis library, whose name is `pysal` too.
"""

try:
    from pysal._names import also_called
except ImportError as error:
    raise ImportError(
        "pysal_saliency: a checkout must not share an environment with PySAL, the spatial analysis library, whose `pysal` was "
        "found first: install a wheel, which lies beside it (pip install --no-build-isolation FOLDER_OF_THE_SOURCES)"
    ) from error

if __name__ == "__main__":
    from pysal.cli import main

    main()
else:
    also_called(__name__)
