"""Every `>>>` example of the package is run and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "pysal").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # an example may write a file
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.FAIL_FAST)
    assert found.attempted > 0, f"the examples of {name} are not where doctest looks"
    assert found.failed == 0
