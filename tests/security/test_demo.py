"""The page's server against requests that its page would not send: generated from the server's own routes and events."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from pysal.demo import gate

# A request to a server takes longer than a call: a fifth of the cases.
LIVE = settings(
    max_examples=settings.default.max_examples // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
SECRET = "root:x:0:0"
# What the page itself asks for; `file=` is answered for own uploads alone.
ASKED = {
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/config/"),
    ("GET", "/theme.css"),
    ("GET", "/robots.txt"),
    ("GET", "/favicon.ico"),
    ("GET", "/manifest.json"),
    ("GET", "/pwa_icon"),
    ("GET", "/pwa_icon/{size}"),
    ("GET", "/assets/{path:path}"),
    ("GET", "/static/{path:path}"),
    ("GET", "/svelte/{path:path}"),
    ("GET", "/gradio_api/theme.css"),
    ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/app_id"),
    ("GET", "/gradio_api/app_id/"),
    ("GET", "/gradio_api/heartbeat/{session_hash}"),
    ("GET", "/gradio_api/queue/data"),
    ("GET", "/gradio_api/upload_progress"),
    ("GET", "/gradio_api/file={path_or_url:path}"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/run/{api_name}"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/reset/"),
}


# Gradio leaves event loops open, which would be noticed in this process.
ROUTES = """
import json
from starlette.routing import Mount
from pysal.demo.server import build_app
from pysal.demo.session import Workspace
from tests.demo.small import classifier

def every(routes, prefix=""):
    for route in routes:
        path = prefix + getattr(route, "path", "")
        inner = getattr(route, "original_router", route)  # where FastAPI keeps what another router was included with
        yield from every(getattr(inner, "routes", ()), path)
        for method in getattr(route, "methods", None) or ():
            yield method, path.replace("//", "/")

print(json.dumps(list(every(build_app(Workspace({"small": classifier}), "127.0.0.1").routes))))
"""


def browser(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=600, trust_env=False)


@pytest.fixture(scope="module")
def client(address) -> Iterator[httpx.Client]:
    """A browser that has opened the page."""
    with browser(address) as client:
        assert client.get("/").status_code == 200
        yield client


@pytest.fixture
def stranger(address) -> Iterator[httpx.Client]:
    """Another one."""
    with browser(address) as client:
        client.get("/")
        yield client


@pytest.fixture(scope="module")
def config(client) -> dict[str, Any]:
    found = client.get("/config").json()
    assert len(found["dependencies"]) > 10
    return found


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("home") / "secret.png"
    path.write_text(SECRET)
    return str(path)


def test_what_the_page_does_not_ask_for_is_not_there(client) -> None:
    routes = {tuple(pair) for pair in json.loads(subprocess.check_output([sys.executable, "-c", ROUTES], text=True))}
    assert len(routes) > 50, "Gradio's own routes are among them"
    left = routes - ASKED - {("GET", "/found/{token}/explanation.{kind}")}
    assert ("GET", "/gradio_api/openapi.json") in left
    for method, path in left:
        if method == "HEAD":  # of what may be asked for with GET
            continue
        answer = client.request(method, path.replace(":path", "").replace("{", "").replace("}", ""))
        assert answer.status_code == 404, (method, path)
        assert answer.text == "pysal demo: there is nothing here.", (method, path)


def payloads(secret: str) -> st.SearchStrategy[Any]:
    """Return things that Gradio takes for a file, none of which was uploaded."""
    path = st.sampled_from(
        [
            secret,
            f"file://{secret}",
            "/etc/passwd",
            "../../../../etc/passwd",
            "http://169.254.169.254/latest/meta-data",
            "https://attacker.example/x.png",
            "\\\\attacker.example\\share\\x.png",
            "/proc/self/environ",
            "",
        ]
    )
    single = st.fixed_dictionaries(
        {"path": path | st.none() | st.just([secret])},
        optional={
            "url": path,
            "orig_name": st.text(max_size=5),
            "meta": st.just({"_type": "gradio.FileData"}),
            "is_stream": st.booleans(),
            "mime_type": st.just("image/svg+xml"),
            "size": st.integers(),
            "unknown": st.none(),
        },
    )
    only_url = st.fixed_dictionaries({"url": path, "meta": st.just({"_type": "gradio.FileData"})})
    files = single | only_url
    return (
        files | files.map(lambda one: [one]) | files.map(lambda one: {"files": [one]}) | files.map(lambda one: [[{"a": one}]])
    )


@given(st.data())
@LIVE
def test_a_file_in_any_input_of_any_event_is_refused(client, config, secret, data) -> None:
    event = data.draw(st.sampled_from(config["dependencies"]))
    values: list[Any] = [None] * max(len(event["inputs"]), 1)
    payload = data.draw(payloads(secret))
    values[data.draw(st.integers(0, len(values) - 1))] = payload
    body = {"data": values, "fn_index": event["id"], "session_hash": "tab1"}
    if data.draw(st.booleans()):
        body |= {"data": [], "event_data": payload}
    for route in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        answer = client.post(route, json=body)
        assert answer.status_code == 403
        assert answer.text == "pysal demo: this file was not uploaded by this browser."


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "url", "meta", "b64", "key", "files"]) | st.text(max_size=4), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_file_but_an_upload_of_the_session_is_handed_on(value) -> None:
    uploads = {"/uploads/mine.png"}
    try:
        handed = gate._without_strange_files(value, uploads)
    except gate.Refused:
        return

    def files(one: Any) -> list[Any]:
        if isinstance(one, list):
            return [found for each in one for found in files(each)]
        if not isinstance(one, dict):
            return []
        own = [one] if one.keys() & {"path", "url", "b64"} else []
        return own + [found for each in one.values() for found in files(each)]

    assert all(set(one) == {"path", "orig_name", "meta"} and one["path"] in uploads for one in files(handed))


def test_an_upload_is_its_own_browsers_alone(address, client, stranger) -> None:
    content = b"\x89PNG private"
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", content)}).json()
    assert client.get(f"/gradio_api/file={path}").content == content
    with browser(address) as nobody:
        assert nobody.get(f"/gradio_api/file={path}").status_code == 403, "no page opened, no session"
    assert stranger.get(f"/gradio_api/file={path}").status_code == 403
    payload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = stranger.post("/gradio_api/queue/join", json={"data": [payload], "fn_index": 0, "session_hash": "tab2"})
    assert answer.status_code == 403


def test_a_tab_is_its_own_browsers_alone(client, stranger) -> None:
    body = {"data": [None, "small", 1], "fn_index": 10**6, "session_hash": "tab3"}
    assert client.post("/gradio_api/queue/join", json=body).status_code != 403, "claimed"
    for ask in (
        lambda: stranger.post("/gradio_api/queue/join", json=body),
        lambda: stranger.get("/gradio_api/queue/data?session_hash=tab3"),
        lambda: stranger.get("/gradio_api/heartbeat/tab3"),
        lambda: stranger.post("/gradio_api/cancel", json={"session_hash": "tab3", "fn_index": 0, "event_id": "x"}),
    ):
        assert ask().text == "pysal demo: this tab is another browser's."


@given(
    up=st.integers(1, 9),
    name=st.sampled_from(["etc/passwd", "etc/hostname", "proc/self/environ"]),
    dots=st.sampled_from(["..", "%2e%2e", "..%2f"]),
)
@LIVE
def test_no_way_leads_out_of_the_uploads(client, up, name, dots) -> None:
    for base in ("/gradio_api/file=", "/gradio_api/file=/tmp/", "/assets/", "/static/", "/svelte/", "/gradio_api/file/"):
        answer = client.get(base + "/".join([dots] * up) + "/" + name)
        assert answer.status_code in (403, 404), base
        assert "root:" not in answer.text


# PORT is that of the page
ORIGINS = [
    "https://attacker.example",
    "http://localhost:3000",
    "http://127.0.0.1:1",
    "http://127.0.0.1",
    "http://127.0.0.1:PORT.attacker.example",
    "http://attacker.example/127.0.0.1:PORT",
    "http://attacker.example#127.0.0.1:PORT",
    "file://127.0.0.1:PORT",
    "null",
    "",
    "http://[",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_of_other_origins_neither_read_nor_send(client, origin) -> None:
    headers = {"Origin": origin.replace("PORT", str(client.base_url.port))}
    for answer in (
        client.get("/config", headers=headers),
        client.post("/gradio_api/upload", files={"files": ("a.png", b"x")}, headers=headers),
        client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "tab1"}, headers=headers),
        client.options("/config", headers={**headers, "Access-Control-Request-Method": "GET"}),
    ):
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pictures_and_scripts_of_other_pages_load_nothing_from_here(client, site) -> None:
    assert client.get("/config", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert client.get("/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}).status_code == 200, "a link"


@given(host=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30))
@LIVE
def test_hosts_of_other_names_are_turned_away(client, host) -> None:
    answer = client.get("/config", headers={"Host": host})
    name = host.split(":")[0]
    assert answer.status_code == 200 if name in ("127.0.0.1", "localhost") else answer.status_code in (400, 403)


@given(body=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
@LIVE
def test_what_is_no_question_gets_a_sentence(client, body) -> None:
    answer = client.post("/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 403)
    assert answer.text.startswith("pysal demo: ")


def test_a_question_that_nests_without_end_gets_a_sentence(client) -> None:
    body = b'{"session_hash": "tab1", "data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert client.post("/gradio_api/queue/join", content=body).status_code == 400


class Uploads:
    """The gate before an application that takes every upload, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gate = gate.Gate(self.take, clock=lambda: self.now)

    async def take(self, scope, receive, send) -> None:
        await JSONResponse(["/uploads/a.png"])(scope, receive, send)

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "127.0.0.1", **headers}.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": pairs}
        # In a thread: where a browser was driven before, an event loop is at work in this one.
        thread = threading.Thread(target=lambda: asyncio.run(self.gate(scope, receive, send)))
        thread.start()
        thread.join()
        return said[0]["status"], {name.decode(): value.decode() for name, value in said[0]["headers"]}

    def visitor(self) -> str:
        return self.ask("GET", "/")[1]["set-cookie"].split(";")[0]

    def upload(self, cookie: str, size: int = gate.MOST_BYTES) -> int:
        return self.ask("POST", "/gradio_api/upload", cookie=cookie, content_length=str(size))[0]


def test_uploads_of_a_session_and_of_all_have_a_limit_while_they_are_kept() -> None:
    uploads = Uploads()
    first = uploads.visitor()
    taken = [uploads.upload(first) for _ in range(gate.MOST_OF_A_SESSION // gate.MOST_BYTES + 1)]
    assert taken == [200] * (len(taken) - 1) + [429]
    while uploads.upload(other := uploads.visitor()) == 200:
        while uploads.upload(other) == 200:
            pass
    held = sum(one.held(uploads.now) for one in uploads.gate._sessions.values())
    assert gate.MOST_OF_ALL - gate.MOST_BYTES < held <= gate.MOST_OF_ALL
    uploads.now += gate.UPLOADS_LAST + 1
    assert uploads.upload(first) == 200


@pytest.mark.parametrize(("length", "status"), [(None, 411), ("x", 411), ("-1", 411), ("9" * 13, 411), (str(10**9), 413)])
def test_an_upload_says_how_long_it_is(length, status) -> None:
    uploads = Uploads()
    headers = {} if length is None else {"content_length": length}
    assert uploads.ask("POST", "/gradio_api/upload", cookie=uploads.visitor(), **headers)[0] == status


def test_sessions_are_forgotten_not_hoarded() -> None:
    uploads = Uploads()
    first = uploads.visitor()
    for _ in range(gate.SESSIONS):
        uploads.visitor()
    assert len(uploads.gate._sessions) == gate.SESSIONS
    assert uploads.upload(first) == 403
