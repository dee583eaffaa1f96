"""The server of the stand-in, and its faults."""

import functools
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from .contents import Answer, HubRefusalError, Request
from .protocol import TOKEN, Protocol

FAULTS = ("refuse", "hang", "401", "403", "409", "429", "500", "cut")


@dataclass
class Fault:
    kind: str
    when: Callable[[Request], bool]
    times: int | None
    seen: int = 0


class HubStandIn(Protocol):
    """The server and what lies on it.

    Args:
        large_files (`bool`): whether big binary files travel by LFS, as on the Hub. False sends every file within the
            commit, so that `huggingface_hub`'s newer upload path works without its storage service.
    """

    def __init__(self, *, large_files: bool = True) -> None:
        super().__init__(large_files=large_files)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.released = threading.Event()
        self._server: _Server | None = None
        self._port = 0

    # Running

    def __enter__(self) -> "HubStandIn":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.stop()

    def start(self) -> None:
        """Listens, on the same port as before if there was one."""
        self._server = _Server(("127.0.0.1", self._port), functools.partial(_Handler, self))
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuses connections from now on, and drops those that are open."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.drop_connections()

    def environment(self, home: Path | str, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that point a new process at the stand-in, with a cache of its own in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1" if self.large_files else "0",
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, home: Path | str, token: str | None = TOKEN) -> None:
        """Points the clients of this process, and the processes that it starts, at the stand-in."""
        import datasets.config
        import huggingface_hub.constants as constants

        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        for name, changed in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": self.large_files,
            "HF_HUB_CACHE": str(Path(home) / "hub"),
        }.items():
            monkeypatch.setattr(constants, name, changed)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(home) / "datasets")
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        # Clients that were made on import remember the address of then.
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", self.url)

    # Faults

    def fail(
        self,
        kind: str,
        *,
        path: str = "",
        when: Callable[[Request], bool] | None = None,
        times: int | None = None,
    ) -> Fault:
        """Has requests fail until `recover`.

        Args:
            kind (`str`): an HTTP status; `refuse`: the first such request is dropped and no connection is accepted
                any more; `hang`: no answer; `cut`: the connection breaks in the middle of the answer.
            path (`str`): a pattern to be found in "METHOD /path".
            when (`Callable`, *optional*): which requests, if the pattern is not enough.
            times (`int`, *optional*): how many requests; all if not given.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(FAULTS)}.")
        pattern = re.compile(path)
        fault = Fault(kind, lambda request: bool(pattern.search(request.line)) and (not when or when(request)), times)
        self.faults.append(fault)
        return fault

    def recover(self) -> None:
        """Ends all faults."""
        self.faults.clear()
        self.released.set()
        self.released = threading.Event()
        if self._server is None:
            self.start()

    def fault_of(self, request: Request) -> str | None:
        with self.lock:
            for fault in self.faults:
                if (fault.times is None or fault.seen < fault.times) and fault.when(request):
                    fault.seen += 1
                    return fault.kind
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by the other side meanwhile

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, hub: HubStandIn, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `HubStandIn.requests`."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, body)
        self.hub.requests.append(request)
        fault = self.hub.fault_of(request)
        request.status = fault
        if fault == "refuse":
            self.close_connection = True
            threading.Thread(target=self.hub.stop, daemon=True).start()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            self.close_connection = True
            self.hub.released.wait()
        elif fault == "cut" and request.method != "GET":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault in (None, "cut"):
            try:
                answer = self.hub.answer(request)
            except HubRefusalError as refusal:
                answer = self._error(refusal)
            request.status = fault or answer.status
            self._send(answer, cut=fault == "cut")
        else:
            self._send(self._error(HubRefusalError(int(fault), None, f"Fault {fault} on request")))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _error(self, refusal: HubRefusalError) -> Answer:
        headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
        return Answer({"error": refusal.message}, status=refusal.status, headers=headers)

    def _send(self, answer: Answer, *, cut: bool = False) -> None:
        content, kind = answer.encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
