"""Attributions and faithfulness figures for a whole dataset, in a folder of Parquet files: see docs/auditing.md."""

from importlib.util import find_spec

from pysal._checks import refuse

if find_spec("pyarrow") is None:
    missing = "pysal.audit without the package pyarrow (run: pip install 'pysal-saliency[audit]')"
    refuse("pysal", "import", "find the packages of what is imported", missing, ModuleNotFoundError)

from pysal.audit.engines import Stopped
from pysal.audit.files import DiskFault
from pysal.audit.job import Job, resume
from pysal.audit.report import report
from pysal.audit.status import Status, status
from pysal.audit.verify import verify

__all__ = ["DiskFault", "Job", "Status", "Stopped", "report", "resume", "status", "verify"]
