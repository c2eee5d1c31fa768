"""The package's other name: `pysal_saliency` in a checkout, `pysal` in a wheel (pysal/_names.py).

`import pysal_saliency` is what works beside PySAL, the spatial analysis library, whose name is `pysal` too.
"""

import os
import sys

MIXED = (
    "pysal_saliency: a checkout must not share an environment with PySAL, the spatial analysis library, whose `pysal` was "
    "found first: install a wheel, which lies beside it (pip install --no-build-isolation FOLDER_OF_THE_SOURCES)"
)
try:
    from pysal import _names
except ImportError as error:
    raise ImportError(MIXED) from error
if os.path.dirname(str(sys.modules[_names.PACKAGE].__file__)) != os.path.dirname(_names.__file__):
    # an editable install finds its own modules below whatever is called pysal
    raise ImportError(MIXED)

if __name__ == "__main__":
    from pysal.cli import main

    main()
else:
    _names.also_called(__name__)
