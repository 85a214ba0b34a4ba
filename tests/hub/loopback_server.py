"""HTTP of the loopback Hub: connections, answers, and what goes wrong on purpose.

Everything under `/_control/` is JSON for tests and is never counted:

    POST reset {}              empties log and faults; what is stalled is dropped, what is being worked on is awaited
    GET  log                   {"requests": [{"number", "method", "path", "status"}]}; status null: still open,
                               499: ended without an answer
    POST fault {"at": n, "kind": K, "times": 1}     the n-th request since the reset, and the `times` - 1 after it
        stall_before           hangs before the work, until released or until the client goes away
        stall_after            does the work, then hangs without an answer
        close_before, close_after      drops the connection before or after the work
        status                 answers `status` and `body` (and `headers`) without doing the work
    GET  wait_fault?timeout=S  {"reached": bool}: whether the last fault set was reached, at the latest after S seconds
    POST release {}            lets what is stalled now go on
"""

import hashlib
import json
import re
import select
import socket
import socketserver
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from loopback_journal import Dropped, Fault, Journal
from loopback_store import Refused, Store


@dataclass
class Answer:
    """Status, headers and body of a response: a path is sent as the content of that file, text as it is, else JSON."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


class Request:
    """A request whose body was read into a file."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: Path | None, body_sha256: str):
        self.method, self.headers = handler.command, handler.headers
        target = urlsplit(handler.path)
        self.path, self.query = target.path, parse_qs(target.query, keep_blank_values=True)
        self.base = f"http://{handler.headers['Host']}"
        self.role: str | None = None  # of the token, once it is known
        self.body_sha256, self._body = body_sha256, body

    def text(self) -> str:
        return "" if self._body is None else self._body.read_text(encoding="utf-8")

    def json(self) -> dict[str, Any]:
        try:
            body = json.loads(self.text() or "{}")
        except ValueError as error:
            raise Refused(400, f"The body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(400, "The body is no JSON object")
        return body

    def take_body(self) -> Path:
        """The file with the body, which the caller moves elsewhere."""
        if self._body is None:
            raise Refused(400, "There is no body")
        body, self._body = self._body, None
        return body

    def discard(self) -> None:
        if self._body is not None:
            self._body.unlink(missing_ok=True)


class Application(Protocol):
    """What the server answers from."""

    store: Store

    def answer(self, request: Request) -> Answer: ...
    def control(self, what: str, body: dict[str, Any], query: dict[str, list[str]]) -> Any: ...


def serve(application: Application, port: int) -> None:
    """Answer requests until the process is killed; the line with READY says where."""
    handler = type("Handler", (_Handler,), {"application": application, "journal": Journal()})
    with _Server(("127.0.0.1", port), handler) as server:
        print(f"READY http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    application: Application
    journal: Journal

    def do_GET(self) -> None:
        if self.path.startswith("/_control/"):
            self._control()
            return
        entry, fault = self.journal.begin(self.command, self.path)
        try:
            self._respond(entry, fault)
        except (ConnectionError, Dropped):
            self.close_connection = True
        finally:
            self.journal.end(entry)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # -- one request

    def _respond(self, entry: dict[str, Any], fault: Fault | None) -> None:
        request = self._read()
        try:
            if fault is not None and fault.kind == "status":
                body = {"error": "A fault that a test asked for"} if fault.body is None else fault.body
                answer = Answer(fault.status, body, dict(fault.headers))
                self.journal.reach(fault)
            else:
                self._suffer(fault, "before", entry)
                answer = self._work(request)
                self._suffer(fault, "after", entry)
        finally:
            request.discard()
        answer.headers.setdefault("X-Request-Id", f"loopback-{entry['number']}")
        self._send(answer, entry)

    def _suffer(self, fault: Fault | None, moment: str, entry: dict[str, Any]) -> None:
        """Hang or drop the connection if the fault says so for this moment: before or after the work."""
        if fault is None:
            return
        if fault.kind == f"stall_{moment}":
            self.journal.stall(fault, entry, self._client_is_gone)
        if fault.kind == f"close_{moment}":
            self.journal.reach(fault)
            raise Dropped

    def _work(self, request: Request) -> Answer:
        try:
            return self.application.answer(request)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message.encode("ascii", "replace").decode().replace("\n", " ")}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            return Answer(refused.status, {"error": refused.message}, headers | refused.headers)
        except Exception as error:  # a mistake in this server: the test that meets it should see it
            traceback.print_exc()
            return Answer(500, {"error": f"The loopback Hub failed: {error!r}"})

    def _read(self) -> Request:
        """The request with its whole body, so that the connection is ready for the next one."""
        length, chunked = int(self.headers.get("Content-Length", 0)), "Transfer-Encoding" in self.headers
        if not chunked and length == 0:
            return Request(self, None, hashlib.sha256().hexdigest())
        path, digest = self.application.store.new_file(), hashlib.sha256()
        try:
            with open(path, "wb") as file:
                for piece in self._chunks() if chunked else self._pieces(length):
                    digest.update(piece)
                    file.write(piece)
        except ConnectionError:
            path.unlink()
            raise
        return Request(self, path, digest.hexdigest())

    def _pieces(self, length: int) -> Iterator[bytes]:
        while length > 0:
            piece = self.rfile.read(min(length, 1 << 20))
            if not piece:
                raise ConnectionAbortedError("The client left in the middle of a body")
            length -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline()
            if not line:
                raise ConnectionAbortedError("The client left in the middle of a body")
            size = int(line.split(b";")[0], 16)
            yield from self._pieces(size)
            self.rfile.readline()
            if size == 0:
                return

    def _client_is_gone(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True

    # -- answers

    def _send(self, answer: Answer, entry: dict[str, Any]) -> None:
        """Send an answer; its status is in the log before, because who has the answer may look there."""
        status, headers, body = answer.status, dict(answer.headers), answer.body
        if isinstance(body, Path):
            size = body.stat().st_size
            start, end = 0, size
            headers.setdefault("Content-Type", "application/octet-stream")
            headers["Accept-Ranges"] = "bytes"
            if self.command == "GET" and (wanted := self.headers.get("Range")):
                status, start, end = _part(wanted, size)
                if status != 200:
                    headers["Content-Range"] = f"bytes {f'{start}-{end - 1}' if status == 206 else '*'}/{size}"
            entry["status"] = status
            self._send_head(status, headers, end - start)
            if self.command != "HEAD":
                with open(body, "rb") as file:
                    self.connection.sendfile(file, start, end - start) if end > start else None
            return
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        headers.setdefault("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        entry["status"] = status
        self._send_head(status, headers, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    # -- control

    def _control(self) -> None:
        request = self._read()
        what = request.path.removeprefix("/_control/")
        try:
            answer = Answer(200, self._steer(what, request.json(), request.query))
        except Refused as refused:
            answer = Answer(refused.status, {"error": refused.message})
        except (KeyError, TypeError, ValueError) as error:
            answer = Answer(400, {"error": repr(error)})
        finally:
            request.discard()
        self._send(answer, {})

    def _steer(self, what: str, body: dict[str, Any], query: dict[str, list[str]]) -> Any:
        match what:
            case "reset":
                self.journal.reset()
            case "log":
                return {"requests": self.journal.log()}
            case "fault":
                self.journal.add_fault(body)
            case "wait_fault":
                return {"reached": self.journal.wait_fault(float(query["timeout"][0]))}
            case "release":
                self.journal.wake(go_on=True)
            case _:
                found = self.application.control(what, body, query)
                if found is None:
                    raise Refused(404, f"The loopback Hub has no control {what}")
                return found
        return {}


def _part(wanted: str, size: int) -> tuple[int, int, int]:
    """Status, start and end of what a Range header asks for; the whole file for what it cannot serve as one part."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted.strip())
    if not found or found[1] == found[2] == "":
        return 200, 0, size
    if found[1] == "":
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (206, start, end) if start < end else (416, 0, 0)
