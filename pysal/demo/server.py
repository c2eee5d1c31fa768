"""The server of `pysal demo`: on loopback unless asked, with no way to other machines, other files or other sites."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from pysal._checks import refuse
from pysal.demo.session import Workspace
from pysal.explanation import Explanation
from pysal.models import Classifier

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

WHERE = "pysal demo"
KEPT = 20  # explanations that can be downloaded

# What the browser may fetch: this server alone. Gradio's page needs inline scripts and styles, and evaluates templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


class Downloads:
    """The explanations shown lately, under names that nobody can guess."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[str, Explanation] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, explanation: Explanation) -> str:
        """Return the token under which an explanation can be fetched until `most` later ones are kept."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[token] = explanation
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return token

    def file(self, token: str, kind: str) -> bytes | None:
        """Return the panel ("png") or the arrays ("npz") of an explanation, None where there is no such thing."""
        with self._lock:
            explanation = self._kept.get(token)
        if explanation is None or kind not in ("png", "npz"):
            return None
        with tempfile.TemporaryDirectory(prefix="pysal-demo-") as folder:
            explanation.save(folder, "explanation", pictures=kind == "png")
            with open(os.path.join(folder, f"explanation.{kind}"), "rb") as file:
                return file.read()


def build_app(workspace: Workspace, host: str) -> FastAPI:
    """Return the application: the page, the downloads, and what keeps others out.

    Args:
        workspace: what computes.
        host: the address it will be served on; on loopback, requests for any other host name are refused, so that no
            site can reach it through a name of its own.

    Raises:
        ModuleNotFoundError: Gradio is not installed; the sentence has the pip command.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported, which reads it
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError as error:
        missing = f"without {error.name} (run: pip install 'pysal-saliency[demo]')"
        refuse(WHERE, "the page", "be served with the extra `demo` installed", missing, ModuleNotFoundError)
    from fastapi import FastAPI, Request, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from pysal.demo import page
    from pysal.demo.gate import MOST_BYTES, Gate

    downloads = Downloads()
    app = FastAPI(title="pysal demo", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/found/{token}/explanation.{kind}")
    def found(token: str, kind: str) -> Response:
        content = downloads.file(token, kind)
        if content is None:
            return Response("This explanation is no longer kept: run it again.", status_code=404, media_type="text/plain")
        media = {"png": "image/png", "npz": "application/octet-stream"}[kind]
        name = f'attachment; filename="explanation.{kind}"'
        return Response(content, media_type=media, headers={"Content-Disposition": name})

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    app.add_middleware(Gate)
    if _is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    blocks = page.build(workspace, downloads.keep)
    # Gradio checks that a file was uploaded only once this is set, which mounting does not do; the gate has checked before.
    blocks.has_launched = True
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=page.theme(),
        head=page.head(),
    )
    return mounted


def serve(
    loaders: Mapping[str, Callable[[], Classifier]],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "cpu",
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the page until it is interrupted; then it returns, and the uploads are gone.

    Args:
        loaders: models on offer, name -> what loads one; the first one is chosen.
        host: address to listen on; loopback unless other machines shall reach it.
        port: to listen on; 0 takes a free one.
        device: where the models run.
        ready: called with the page's address once it is being served.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        OSError: the port is taken, or the address is none of this machine.
        ValueError: a model that cannot be loaded.
    """
    workspace = Workspace(loaders, device=device)
    with _private_folder(), _listening(host, port) as listener:
        app = build_app(workspace, host)
        workspace.model(workspace.names[0])  # a model that cannot be loaded is said before anybody waits for a page
        import uvicorn

        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                workspace.close()  # else threads compute on, and the process waits for them
                # pages that are still open end in tracebacks about their streams, which is no error
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
                super().handle_exit(sig, frame)

        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
        server = Server(config)
        threading.Thread(target=_tell, args=(server, ready, address), daemon=True).start()
        with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
            server.run(sockets=[listener])


def _tell(server: uvicorn.Server, ready: Callable[[str], object], address: str) -> None:
    while not server.started:
        if server.should_exit:
            return
        threading.Event().wait(0.05)
    ready(address)


@contextmanager
def _private_folder() -> Iterator[None]:
    """Keep uploads in a folder of this server's own, readable by this user alone, gone when it ends."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="pysal-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port before anything is loaded, so that a taken one is said at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        shown = f"{host}:{port} ({error.strerror or error})"
        refuse(WHERE, "--host and --port", "be an address of this machine and a free port", shown, OSError)
    with listener:
        yield listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
