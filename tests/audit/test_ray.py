"""Shards on Ray: the same bytes as anywhere else, on one node and on two."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pysal.audit import Stopped, status, verify
from tests.audit.conftest import contents
from tests.audit.test_commands import process

ROOT = Path(__file__).resolve().parents[2]
# Ray gives its workers a low priority and its clusters a token; neither is what is tested.
SETTINGS = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    # of Ray itself, about its own future and its own sockets
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _settings(monkeypatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at its first import
        import ray  # noqa: F401


@pytest.fixture
def cluster():
    """A head and a second node, each of one processor, in processes of their own; yields the address."""
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    assert ray is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    folder = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie below it, and their paths have at most 107 bytes
    own = {**os.environ, **SETTINGS}
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes = []
    for which in (head, [f"--address={address}"]):
        command = [ray, "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *which]
        nodes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for line in nodes[-1].stdout:
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("ray start ended")
    yield address
    for node in reversed(nodes):
        node.terminate()
        node.wait(600)
        node.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_workers_of_one_node_give_the_same_bytes(job) -> None:
    planned, inline = job(out="ray"), job(out="inline")
    inline.run(engine="inline")
    assert planned.run(engine="ray", workers=2).complete
    assert contents(planned.out) == contents(inline.out)
    assert verify(planned.out, images=True) == []
    assert set(pq.read_table(planned.out / "timings")["process"].to_pylist()).isdisjoint({os.getpid()})


def test_two_nodes_give_the_same_bytes(job, cluster) -> None:
    inline, planned = job(out="inline", shard_size=1), job(out="ray", shard_size=1)
    inline.run(engine="inline")
    assert planned.run(engine="ray", address=cluster).complete
    assert contents(planned.out) == contents(inline.out)
    # a node has one processor and a task takes most of it: two processes worked, and each was on a node of its own
    assert len(set(pq.read_table(planned.out / "timings")["process"].to_pylist())) == 2


def test_a_cluster_that_nobody_named_is_left_alone(job, cluster, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert job().run(engine="ray", workers=2).complete


def test_what_goes_wrong_in_a_task_sets_its_shard_aside(job, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ARMED", str(tmp_path / "armed"))
    planned = job(model="tests.audit.tiny:starving", prepared=False)
    (tmp_path / "armed").touch()
    with pytest.raises(
        Stopped, match=r"^pysal.audit: shard .* went wrong \(cat/01.png alone does not fit into the memory of cpu\)"
    ):
        planned.run(engine="ray", workers=1)
    (tmp_path / "armed").unlink()
    assert planned.run(engine="inline").complete


def test_an_address_where_nobody_listens_is_refused_at_once(job) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ConnectionError) as caught:
            job().run(engine="ray", address=address)
    assert str(caught.value) == f"pysal.audit: address must be that of a Ray cluster, got '{address}' (connection refused)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_what_is_done(photos, tmp_path, number) -> None:
    """Ray handles SIGTERM itself, and would end the process without a word."""
    out = tmp_path / "out"
    slow = ["--model", "tests.audit.tiny:slow", "--methods", "gradient,grad-cam", "--shard-size", "1"]
    running = process("run", photos, "--out", out, *slow, "--engine", "ray", "--workers", "1")
    while not (out / "shards").exists() or not any((out / "shards").glob("*.parquet")):
        assert running.poll() is None, running.communicate()
        threading.Event().wait(0.05)
    running.send_signal(number)
    _, error = running.communicate(timeout=600)
    done = status(out).shards_done
    assert running.returncode == 130
    assert 1 <= done < 11
    go_on = f"pysal audit resume {out} --allow-code goes on with the rest"
    assert error.splitlines()[-1] == f"pysal audit run: interrupted, {done} of 11 shards are done; {go_on}"
    assert "Traceback" not in error
    assert not list(out.rglob(".*"))
