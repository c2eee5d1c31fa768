"""What the server lets out and whom it lets in."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Page

from pysal.demo import gate, server
from pysal.explanation import Explanation
from tests.browser import PATIENCE
from tests.demo.small import classifier
from tests.demo.test_pictures import explanation, result


def visitor(address: str) -> dict[str, str]:
    """Return the headers of a browser that has opened the page: its session."""
    cookie = ask(address, "/")[1]["set-cookie"].split(";")[0]
    return {"Cookie": cookie, "Origin": address}


def ask(
    address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    host = urlsplit(address)
    connection = http.client.HTTPConnection(host.hostname, host.port, timeout=600)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return found


def test_the_policy_lets_the_browser_fetch_from_this_server_alone(address) -> None:
    status, headers, _ = ask(address, "/")
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["connect-src"] == "'self'"
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert all("http" not in sources and "*" not in sources for sources in policy.values())
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_names_no_other_server(address) -> None:
    _, _, page = ask(address, "/")
    config = json.loads(ask(address, "/config")[2])
    assert "googleapis" not in page.decode()
    assert config["stylesheets"] == []
    assert config["analytics_enabled"] is False


def test_loopback_alone_is_listened_on(address) -> None:
    port = urlsplit(address).port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)


@pytest.mark.parametrize("host", ["attacker.example", "192.168.1.5:7860"])
def test_a_name_that_leads_to_loopback_is_turned_away(address, host) -> None:
    assert ask(address, "/", Host=host)[0] == 400
    assert ask(address, "/config", Host=host)[0] == 400


def test_other_machines_get_in_where_that_was_asked_for(served) -> None:
    port = urlsplit(served("0.0.0.0")).port
    assert ask(f"http://127.0.0.2:{port}", "/", Host="workstation.example")[0] == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "pyproject.toml", "pysal/demo/page.py", "."])
def test_files_of_the_machine_are_out_of_reach(address, path) -> None:
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/static/", "/static/"):
        status, _, body = ask(address, f"{route}{path}")
        assert status in (403, 404), (route, status)
        assert b"root:" not in body
        assert b"[project]" not in body


def test_a_path_that_was_never_uploaded_is_not_read(address) -> None:
    config = json.loads(ask(address, "/config")[2])
    upload = next(one for one in config["components"] if one["props"].get("elem_id") == "upload")
    event = next(
        one for one in config["dependencies"] if [upload["id"], "upload"] in [list(target) for target in one["targets"]]
    )
    value = {"path": "/etc/passwd", "orig_name": "passwd", "meta": {"_type": "gradio.FileData"}}
    data = [value if each == upload["id"] else None for each in event["inputs"]]
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "stranger"}).encode()
    status, _, said = ask(address, "/gradio_api/queue/join", "POST", body, Content_Type="application/json")
    if status == 200:
        said = ask(address, "/gradio_api/queue/data?session_hash=stranger")[2]
        assert b'"success":false' in said or b'"success": false' in said
    assert b"root:" not in said


def test_an_upload_that_is_too_large_is_refused(address) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = head + bytes(gate.MOST_BYTES + 1) + b"\r\n--x--\r\n"
    status, _, _ = ask(
        address, "/gradio_api/upload", "POST", body, Content_Type="multipart/form-data; boundary=x", **visitor(address)
    )
    assert status == 413


@pytest.mark.parametrize(
    "path", ["/found/guess/explanation.npz", "/found/guess/explanation.png", "/found/guess/explanation.py"]
)
def test_a_token_cannot_be_guessed(address, path) -> None:
    assert ask(address, path)[0] == 404


def test_downloads_are_kept_for_the_latest(tmp_path) -> None:
    downloads = server.Downloads(most=2)
    found = explanation("cat", gradient=result("gradient", torch.randn(1, 3, 12, 12)))
    tokens = [downloads.keep(found) for _ in range(3)]
    assert len(set(tokens)) == 3
    assert downloads.file(tokens[0], "npz") is None
    assert downloads.file(tokens[2], "txt") is None
    path = tmp_path / "found.npz"
    path.write_bytes(downloads.file(tokens[2], "npz"))
    assert torch.equal(Explanation.load(path).maps["gradient"], found.maps["gradient"])
    assert downloads.file(tokens[1], "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.168.1.5", False), ("pc", False)],
)
def test_what_loopback_is(host, loopback) -> None:
    assert server._is_loopback(host) is loopback


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pysal", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = demo("--port", str(port))
    sentence = f"pysal demo: --host and --port must be an address of this machine and a free port, got 127.0.0.1:{port} "
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{sentence}(Address already in use)\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(tmp_path, how) -> None:
    command = [sys.executable, "-m", "pysal", "demo", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = re.fullmatch(r"pysal demo: open (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", line)[1]
        assert ask(address, "/")[0] == 200
        (folder,) = tmp_path.glob("pysal-demo-*")
        assert folder.stat().st_mode & 0o077 == 0, "for this user alone"
        process.send_signal(how)
        left = process.communicate(timeout=600)
    assert (process.returncode, *left) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def long_run(browser) -> Iterator[tuple[subprocess.Popen[str], str, Page]]:
    """A server of its own, computing for one reader what takes many minutes."""
    command = [sys.executable, "-m", "tests.demo.small", "127.0.0.1", "endless"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        page = browser.new_page()
        page.goto(address)
        page.get_by_text(" model rows").wait_for(timeout=PATIENCE)
        yield process, address, page
        process.kill()


def test_the_server_ends_in_the_middle_of_a_run(long_run) -> None:
    process, _, _ = long_run
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=600)[1] == "", "the run would take an hour"
    assert process.returncode == 0


def test_a_second_reader_does_not_wait_for_the_first(long_run, browser) -> None:
    _, address, first = long_run
    second = browser.new_page()
    second.goto(address)
    second.get_by_text(" model rows").wait_for(timeout=PATIENCE)
    assert first.locator("#status .busy").count() == 1, "the first one's run goes on"
    first.close()


def test_without_gradio_the_sentence_has_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError) as refused:
        server.build_app(server.Workspace({"small": classifier}), "127.0.0.1")
    assert str(refused.value) == (
        "pysal demo: the page must be served with the extra `demo` installed, "
        "got without gradio (run: pip install 'pysal-saliency[demo]')"
    )
