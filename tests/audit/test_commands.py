"""`pysal audit`: what it prints, its exit codes, and one sentence for whatever goes wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pysal import cli
from pysal.audit import status
from tests.audit.conftest import contents

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--model", "tests.audit.tiny:classifier", "--methods", "gradient,grad-cam", "--shard-size", "2"]


def run(*arguments: object) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ops without a native kernel, in a checkout that is not built
        return CliRunner().invoke(cli.main, ["audit", *(str(argument) for argument in arguments)])


def succeeded(*arguments: object) -> list[str]:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout.splitlines()


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr[:-1]


def process(*arguments: object) -> subprocess.Popen[str]:
    code = f"import sys; sys.argv[1:] = {['audit', *map(str, arguments)]!r}; from pysal.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore it
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True, preexec_fn=heard)


def test_run_status_verify_resume(photos, tmp_path) -> None:
    out = tmp_path / "out"
    lines = succeeded("run", photos, "--out", out, *TINY, "--engine", "inline", "--labels", "folder")
    assert lines[:2] == ["6 of 6 shards, 11 of 11 images", "11 explained, 0 could not be"]
    assert lines[-1] == f"wrote {out}"
    assert not [line for line in lines if line.startswith("left out")]
    assert succeeded("status", out)[-1] == "complete"
    assert succeeded("verify", out, "--images") == ["11 images in 6 shards: all is as it should be"]
    assert succeeded("verify", out, "--recompute", "2", "--allow-code") == ["11 images in 6 shards: all is as it should be"]
    before = contents(out)
    (out / "shards" / "00003.parquet").unlink()
    assert succeeded("status", out)[0] == "5 of 6 shards, 9 of 11 images"
    assert refused(1, "verify", out) == f"pysal audit verify: {out} has 1 problem"
    assert run("verify", out).stdout == "shard 3 is missing\n"
    assert succeeded("resume", out, "--engine", "inline", "--allow-code")[0] == "6 of 6 shards, 11 of 11 images"
    assert contents(out) == before


def test_files_that_are_left_out_are_counted(photos, tmp_path) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("notes.txt", "README", ".hidden"):
        (folder / name).write_text("")
    lines = succeeded("run", folder, "--out", tmp_path / "out", *TINY, "--engine", "inline")
    assert lines[0] == "left out: 2 files whose names do not end as a photo's (1 .txt, 1 without an ending)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "magic"], "Invalid value for '--method' / '--methods': 'magic' is not one of 'leave_one_out', .*"),
        (["--methods", "gradient", "--samples", "3"], "--samples is for smooth_grad and rise, which --method leaves out"),
        (["--steps", "3", "--tolerance", "0.1"], "--steps and --tolerance exclude each other"),
        (["--engine", "magic"], "Invalid value for '--engine': 'magic' is not one of 'pool', 'ray', 'inline'"),
    ],
)
def test_wrong_calls(photos, tmp_path, arguments, sentence) -> None:
    found = refused(2, "run", photos, "--out", tmp_path / "out", *arguments)
    assert re.fullmatch(rf"pysal audit run: {sentence} \(see pysal audit run --help\)", found), found
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path) -> None:
    assert refused(2, "status", tmp_path) == (
        f"pysal.audit.status: out must be the folder of an audit, got {tmp_path} (no manifest.json in it)"
    )
    assert refused(2, "run", tmp_path, "--out", tmp_path / "out", *TINY) == (
        f"pysal.audit.Job: data must hold at least one image, got {tmp_path}"
    )


def test_a_function_of_a_module_is_told_its_size(photos, tmp_path) -> None:
    network = ["--model", "tests.audit.tiny:network", "--methods", "gradient", "--engine", "inline"]
    assert refused(2, "run", photos, "--out", tmp_path / "out", *network) == (
        "pysal.audit.Job: size must be given for a model that is no pysal.models.Classifier, got None"
    )
    succeeded("run", photos, "--out", tmp_path / "out", *network, "--size", "12x10")
    assert succeeded("verify", tmp_path / "out") == ["11 images in 1 shard: all is as it should be"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(photos, tmp_path, number) -> None:
    out = tmp_path / "out"
    slow = ["--model", "tests.audit.tiny:slow", "--methods", "gradient,grad-cam", "--shard-size", "2"]
    running = process("run", photos, "--out", out, *slow, "--workers", "1")
    while not (out / "shards").exists() or not any((out / "shards").glob("*.parquet")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(number)
    _, error = running.communicate(timeout=600)
    done = status(out).shards_done
    assert running.returncode == 130
    assert 1 <= done < 6
    go_on = f"pysal audit resume {out} --allow-code goes on with the rest"
    assert error == f"pysal audit run: interrupted, {done} of 6 shards are done; {go_on}\n"
    assert not list(out.rglob(".*"))
    assert succeeded("resume", out, "--engine", "inline", "--allow-code")[:1] == ["6 of 6 shards, 11 of 11 images"]


def test_report(photos, tmp_path) -> None:
    out = tmp_path / "out"
    succeeded("run", photos, "--out", out, *TINY, "--engine", "inline", "--labels", "folder")
    assert succeeded("report", out) == [f"wrote {out / 'report.html'}"]
    assert succeeded("report", out, "--to", tmp_path / "page.html", "--images", "2") == [f"wrote {tmp_path / 'page.html'}"]
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert "images must be a whole number from 1 to 24, got 0" in refused(2, "report", out, "--images", "0")
    assert "no manifest.json in it" in refused(2, "report", tmp_path)
