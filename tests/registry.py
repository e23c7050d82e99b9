"""A stand-in for a schema registry: its HTTP interface as far as clients use it, on 127.0.0.1, with the errors of the real one.

It keeps its port and what is registered when it is stopped and started again. Avro schemas are checked to be backward
compatible, as a registry does by default, by the library ``avro``; JSON schemas, and Avro schemas with references, are only
checked to be JSON.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import avro.compatibility
import avro.errors
import avro.schema


class Refused(Exception):
    """An answer that is an error: the HTTP status is the first three digits of the code, as in the real one."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Registry:
    """``with Registry() as registry: ... registry.url``.

    ``asked`` is every request so far (``GET /schemas/ids/1``). ``login`` (``user:password``) is asked for where it is set.
    ``trouble`` answers everything: a status, ``hang`` (never), or ``page`` (200, and a page of HTML).
    """

    login: str | None = None
    trouble: int | str | None = None
    asked: list[str] = field(default_factory=list)
    schemas: dict[int, dict[str, Any]] = field(default_factory=dict)
    subjects: dict[str, list[int]] = field(default_factory=dict)
    port: int = 0
    _server: _Server | None = None
    _thread: threading.Thread | None = None
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._ended.clear()
        registry = self

        class Handler(_Handler):
            def do(self) -> None:
                registry._answer(self)

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the connections that are kept open too, as when the process dies."""
        self._ended.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.close_connections()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def register(self, subject: str, schema: Any, kind: str = "AVRO") -> int:
        """What another program registered."""
        number: int = self._register(subject, {"schema": json.dumps(schema), "schemaType": kind})["id"]
        return number

    # The interface.

    def _answer(self, handler: _Handler) -> None:
        address = urlsplit(handler.path)
        path = [unquote(part) for part in address.path.split("/")[1:]]
        size = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(size)) if size else {}
        self.asked.append(f"{handler.command} {address.path}")
        if self.trouble == "hang":
            self._ended.wait(60)
            return
        if self.trouble == "page":
            handler.give(200, b"<html>We are working on it</html>", "text/html")
            return
        if isinstance(self.trouble, int):
            handler.give_json(self.trouble, {"error_code": self.trouble, "message": "in trouble"})
            return
        if self.login is not None and not self._is_let_in(handler.headers.get("Authorization", "")):
            handler.give_json(401, {"error_code": 401, "message": "Unauthorized"})
            return
        try:
            handler.give_json(200, self._result(handler.command, path, parse_qs(address.query), body))
        except Refused as error:
            handler.give_json(int(str(error.code)[:3]), {"error_code": error.code, "message": str(error)})

    def _is_let_in(self, header: str) -> bool:
        assert self.login is not None
        return header == "Basic " + base64.b64encode(self.login.encode()).decode()

    def _result(self, command: str, path: list[str], query: dict[str, list[str]], body: dict[str, Any]) -> Any:
        match command, path:
            case "GET", ["subjects"]:
                return sorted(self.subjects)
            case "POST", ["subjects", subject]:
                return self._look_up(subject, body)
            case "GET", ["subjects", subject, "versions"]:
                return list(range(1, len(self._versions(subject)) + 1))
            case "POST", ["subjects", subject, "versions"]:
                return self._register(subject, body)
            case "GET", ["subjects", subject, "versions", version]:
                return self._version(subject, version)
            case "GET", ["schemas", "ids", number]:
                return self._schema(int(number))
            case "GET", ["schemas", "types"]:
                return ["JSON", "AVRO"]
        raise Refused(404, "HTTP 404 Not Found")

    def _versions(self, subject: str) -> list[int]:
        if subject not in self.subjects:
            raise Refused(40401, f"Subject '{subject}' not found.")
        return self.subjects[subject]

    def _schema(self, number: int) -> dict[str, Any]:
        if number not in self.schemas:
            raise Refused(40403, f"Schema {number} not found")
        return self.schemas[number]

    def _version(self, subject: str, version: str) -> dict[str, Any]:
        numbers = self._versions(subject)
        index = len(numbers) if version in ("latest", "-1") else int(version)
        if not 1 <= index <= len(numbers):
            raise Refused(40402, f"Version {version} not found.")
        number = numbers[index - 1]
        return {"subject": subject, "version": index, "id": number, **self.schemas[number]}

    def _look_up(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        for index, number in enumerate(self._versions(subject), 1):
            if _same(self.schemas[number], _checked(body)):
                return self._version(subject, str(index))
        raise Refused(40403, "Schema not found")

    def _register(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        schema = _checked(body)
        numbers = self.subjects.get(subject, [])
        number = next((n for n, known in self.schemas.items() if _same(known, schema)), len(self.schemas) + 1)
        if number not in numbers:
            if numbers:
                _check_compatible(subject, self.schemas[numbers[-1]], schema)
            self.schemas[number] = schema
            self.subjects.setdefault(subject, []).append(number)
        return {"id": number}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.get("schemaType") == other.get("schemaType") and json.loads(one["schema"]) == json.loads(
        other["schema"]
    )


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a schema; the type is left out for Avro, as in the real one's answers."""
    kind = body.get("schemaType") or "AVRO"
    references = body.get("references") or []
    try:
        if kind == "AVRO" and not references:
            avro.schema.parse(body["schema"])
        else:
            json.loads(body["schema"])
    except (avro.errors.AvroException, ValueError, KeyError) as error:
        raise Refused(42201, f"Invalid schema {body}, details: {error}") from error
    return {
        "schema": body["schema"],
        **({} if kind == "AVRO" else {"schemaType": kind}),
        **({"references": references} if references else {}),
    }


def _check_compatible(subject: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if any("schemaType" in schema or "references" in schema for schema in (old, new)):
        return
    checker = avro.compatibility.ReaderWriterCompatibilityChecker()
    result = checker.get_compatibility(avro.schema.parse(new["schema"]), avro.schema.parse(old["schema"]))
    if result.compatibility is not avro.compatibility.SchemaCompatibilityType.compatible:
        reasons = "; ".join(sorted(result.messages))
        raise Refused(
            409, f'Schema being registered is incompatible with an earlier schema for subject "{subject}": {reasons}'
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._open):
            self.shutdown_request(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that were closed under it, here or by the client."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.do()

    def do_POST(self) -> None:
        self.do()

    def give_json(self, status: int, answer: Any) -> None:
        self.give(status, json.dumps(answer).encode(), "application/vnd.schemaregistry.v1+json")

    def give(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""
