"""What does a live server say to bad input of each kind, and does it still answer afterwards as before?

    python benchmarks/serve_refusals.py [--work FOLDER] [--flood 3000]

One real `mllm serve` of a tiny checkpoint with a key, ``--media-domain 127.0.0.1 --media-timeout 2 --max-body-mb 2``, and beside it a host
that sends pictures, redirects, hangs, trickles and sends too much. A row for each request: what was sent, the status that is right, the
status and the beginning of what came, and the seconds. Fails where a status is another one, where an answer holds a word of more than 80
characters, where a good request is answered otherwise than at the start, or where the log grows without bound.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.servers import Server, heading, picture_url, question, running, tiny_checkpoint

KEY, OPERATOR = "a-key-of-this-run", "the-key-of-the-operator"
CHAT, JSON = "/v1/chat/completions", "application/json"
LONG = "A" * 5000
MOST_LOG = 41 * 2**20
"""Bytes of both log files together, whatever is asked."""


class Host(BaseHTTPRequestHandler):
    """A host that pictures may come from."""

    picture = base64.b64decode(picture_url(3).partition(",")[2])
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind = self.path.strip("/")
        if kind == "hang":
            time.sleep(8)
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("location", f"http://localhost:{self.server.server_port}/inner")  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        self.end_headers()
        try:
            if kind == "trickle":
                for place in range(60):
                    self.wfile.write(self.picture[place : place + 1])
                    time.sleep(0.2)
            elif kind == "endless":
                for _ in range(64):
                    self.wfile.write(bytes(2**17))
            else:
                self.wfile.write(b"<html>no picture</html>" if kind == "page" else self.picture)
        except OSError:
            pass  # the server has had enough

    def log_message(self, *_: Any) -> None:
        pass


class Table:
    """Sends requests and keeps a row of each."""

    def __init__(self, server: Server):
        self.server = server
        self.http = httpx.Client(base_url=server.address, timeout=60, headers={"authorization": f"Bearer {KEY}"})
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.first = self.good()

    def good(self, url: str | None = None) -> list[int]:
        """The tokens of a good request."""
        body = question("what is it?", url or picture_url(3), return_token_ids=True)
        answer = self.http.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def keep(self, name: str, expected: int, send: Callable[[], tuple[int, str]]) -> None:
        started = time.monotonic()
        status, text = send()
        row = {"sent": name, "right": expected, "status": status, "seconds": round(time.monotonic() - started, 2)}
        row["said"] = _said(text)
        self.rows.append(row)
        if status != expected:
            self.wrong.append(f"{name}: {status} instead of {expected}: {text[:300]}")
        if status >= 400 and (long := [word for word in re.split(r"[\s\"']", _decoded(text)) if len(word) > 80]):
            self.wrong.append(f"{name}: a word of {len(long[0])} characters in the answer")
        print(f"{expected:>4} {status:>4} {row['seconds']:>6} s  {name:<58} {row['said']}", flush=True)

    def post(self, name: str, expected: int, body: Any, *, path: str = CHAT, **headers: str) -> None:
        """A body as it is (bytes) or as JSON, with headers in place of the usual ones."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": JSON, **{key.replace("_", "-"): value for key, value in headers.items()}}

        def send() -> tuple[int, str]:
            answer = self.http.post(path, content=content, headers=sent)
            return answer.status_code, answer.text

        self.keep(name, expected, send)

    def raw(self, name: str, expected: int, lines: list[str], body: bytes) -> None:
        """A request whose head is written by hand."""

        def send() -> tuple[int, str]:
            parts = urlsplit(self.server.address)
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as connection:
                head = [f"POST {CHAT} HTTP/1.1", f"hOsT: {parts.netloc}", f"AUTHORIZATION: Bearer {KEY}", *lines]
                connection.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
                told = b""
                while piece := connection.recv(65536):
                    told += piece
            head, _, rest = told.partition(b"\r\n\r\n")
            return int(head.split()[1]), rest.decode("latin-1")

        self.keep(name, expected, send)


def _decoded(text: str) -> str:
    """JSON with its escapes read."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except ValueError:
        return text


def _said(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])[:110]
    except (ValueError, KeyError, TypeError):
        found = re.search(r'"content":"(.{0,30})', text)
        return f"answered {found.group(1)!r}" if found else text[:80].replace("\n", " ")


def headers_and_encodings(table: Table) -> None:
    fine = question("what is it?", picture_url(3))
    named = question("what is it?", picture_url(3))
    named["messages"][0]["content"][0]["uuid"] = "0" * 64
    text = json.dumps(fine)
    table.post("Content-Type: application/JSON", 200, fine, content_type="application/JSON")
    table.post("Content-Type: application/JSON and a uuid", 400, named, content_type="application/JSON")
    table.post(
        "Content-Type: APPLICATION/json; CHARSET=UTF-8, uuid",
        400,
        named,
        content_type="APPLICATION/json; CHARSET=UTF-8",
    )
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/json, text/plain",
    ):
        table.post(f"Content-Type: {kind}", 415, fine, content_type=kind)
    table.post("charset=utf-16 in the header", 415, fine, content_type="application/json; charset=utf-16")
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        table.post(f"body in {encoding}", 400, text.encode(encoding))
    table.post("body in latin-1", 400, json.dumps(question("ü"), ensure_ascii=False).encode("latin-1"))
    table.post("Content-Encoding: gzip", 415, fine, content_encoding="gzip")
    table.post("a key twice", 400, text.replace('"max_tokens": 16', '"max_tokens": 16, "max_tokens": 17').encode())
    table.post("a key twice, one of them escaped", 400, text.replace('"model"', '"mod\\u0065l": "x", "model"').encode())
    table.post("NaN", 400, text.replace("16", "NaN").encode())
    table.post("65 levels", 400, b'{"model": ' + b"[" * 65 + b"]" * 65 + b"}")
    data = text.encode()
    kind, length = f"cOnTeNt-TyPe: {JSON}", f"CONTENT-LENGTH: {len(data)}"
    table.raw("header names in odd case", 200, [kind, length], data)
    table.raw("two Content-Type headers", 415, [kind, "Content-Type: text/plain", length], data)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(data[k : k + 999]), data[k : k + 999]) for k in range(0, len(data), 999))
    table.raw("body in chunks", 200, [kind, "tRaNsFeR-eNcOdInG: chunked"], chunks + b"0\r\n\r\n")
    table.raw("head of 100 kB", 400, [kind, length, "X: " + "y" * 100_000], b"")


def parts_and_addresses(table: Table) -> None:
    def chat(*parts: Any) -> dict[str, Any]:
        return {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": list(parts)}]}

    url, text = {"url": picture_url(3)}, {"type": "text", "text": "what?"}
    table.post("a picture without type", 200, chat({"image_url": url}, text))
    table.post("a picture without type, with a uuid", 400, chat({"image_url": url, "uuid": "0" * 64}, text))
    table.post("a text without type", 200, chat({"text": "what?"}))
    table.post("a part of nothing", 400, chat({}))
    for name, value in (
        ("null", None),
        ('{"url": null}', {"url": None}),
        ('{"url": ""}', {"url": ""}),
        ("{}", {}),
        ("[]", []),
    ):
        table.post(f"image_url: {name}", 400, chat({"type": "image_url", "image_url": value}, text))
        table.post(f"image_url: {name} without type, a uuid", 400, chat({"image_url": value, "uuid": "0" * 64}, text))
    table.post("video_url: null", 400, chat({"type": "video_url", "video_url": None}, text))
    table.post("input_image: null", 400, chat({"type": "input_image", "image_url": None}, text))
    responses = {"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": None}]}]}
    table.post("/v1/responses, image_url: null", 400, responses, path="/v1/responses")
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": None}}
    anthropic = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": [source]}]}
    table.post("/v1/messages, data: null", 400, anthropic, path="/v1/messages")
    table.post("file:///etc/passwd", 400, chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, text))
    for field in ("size", "images_kwargs", "router_input_ids", "expert_weights", "device"):
        table.post(f"mm_processor_kwargs: {field}", 400, {**chat(text), "mm_processor_kwargs": {field: {"x": 1}}})
    table.post("experts at the top level", 400, {**chat(text), "experts": ["detail"]})
    for path in (
        "/scale_elastic_ep",
        "/v1/load_lora_adapter",
        "/collective_rpc",
        "/sleep",
        "/reset_mm_cache",
        "/pause",
    ):
        table.post(f"POST {path} with a client's key", 404, {}, path=path)
    table.post("a wrong key", 401, chat(text), authorization="Bearer wrong")
    table.keep("a connection that rested for 12 s", 200, lambda: rested(table, chat(text), 12.0))


def rested(table: Table, body: dict[str, Any], seconds: float) -> tuple[int, str]:
    """The second answer on one connection, after a rest; status 0 where the server has hung up meanwhile."""
    import http.client

    parts = urlsplit(table.server.address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    headers = {"content-type": JSON, "authorization": f"Bearer {KEY}"}
    connection.auto_open = 0
    connection.connect()
    for pause in (seconds, 0.0):
        try:
            connection.request("POST", CHAT, json.dumps(body), headers)
            answer = connection.getresponse()
        except (http.client.HTTPException, OSError) as error:
            return 0, f"{type(error).__name__}: {error}"
        status, text = answer.status, answer.read().decode()
        time.sleep(pause)
    return status, text


def other_hosts(table: Table, host: ThreadingHTTPServer) -> None:
    def at(place: str, name: str = "127.0.0.1") -> dict[str, Any]:
        return question("what is it?", f"http://{name}:{host.server_port}/{place}")

    table.post("--media-domain: a picture", 200, at("picture"))
    for place in ("redirect", "hang", "trickle", "endless", "missing", "page"):
        table.post(f"--media-domain: {place}", 400, at(place))
    table.post("a host that is not named (localhost)", 400, at("picture", "localhost"))
    table.post("the host with a user's name", 400, at("picture", "u:p@127.0.0.1"))
    table.post("nobody listens there", 400, question("what?", "http://127.0.0.1:9/a.png"))
    if "/inner" in Host.asked:
        table.wrong.append("a redirect was followed")
    if table.good(f"http://127.0.0.1:{host.server_port}/picture") != table.first:
        table.wrong.append("a picture by its address is answered otherwise than embedded")


def files_and_echoes(table: Table) -> None:
    from tests.integration.test_serve_http import with_text

    good = picture_url(4)
    table.post("PNG: 60 MB of text before the pixels", 400, question("what?", with_text(good, after=False)))
    table.post(
        "PNG: 60 MB of text after the pixels (never unpacked)", 200, question("what?", with_text(good, after=True))
    )
    table.post("half a PNG", 400, question("what?", good[: len(good) // 2 // 4 * 4]))
    table.post("base64 that is none, 5000 characters", 400, question("what?", "data:image/png;base64," + "*" * 5000))
    table.post("base64 of 5000 letters", 400, question("what?", "data:image/png;base64," + LONG))
    table.post("an address of 5000 letters", 400, question("what?", LONG))
    table.post("a media type of 5000 letters", 400, question("what?", f"data:{LONG};base64,AAAA"))
    for name, value in (
        ("temperature", LONG),
        ("tools", [LONG]),
        ("stop", [[LONG]]),
        (LONG, 1),
        ("response_format", LONG),
    ):
        table.post(f"{name[:20]}: 5000 letters", 400, {**question("what?"), name: value})
    table.post("model: 5000 letters", 404, {**question("what?"), "model": LONG})
    table.post("a body above --max-body-mb", 413, question("what?", "data:image/png;base64," + "A" * 3_000_000))


def flood(table: Table, count: int, logs: Callable[[], list[Path]]) -> dict[str, Any]:
    """Bad requests that all differ: what they leave in the logs and on the terminal."""
    sizes = lambda: sum(path.stat().st_size for path in logs() if path.is_file())  # noqa: E731
    terminal = table.server.log.stat().st_size
    before, started = sizes(), time.monotonic()
    told: dict[int, int] = {}
    for number in range(count):
        body = {
            **question(f"{number}?", f"data:image/png;base64,{number:08d}" + LONG[: number % 4000]),
            f"field_{number}": number,
        }
        kind = number % 4
        if kind:
            del body[f"field_{number}"]
        if kind == 2:
            body = {**question(f"{number}?"), "stop": [[f"{number}" + LONG]]}  # gets as far as vLLM's own check
        elif kind == 3:
            body = {**question(f"{number}?"), "model": f"{number}" + LONG}
        status = table.http.post(CHAT, json=body).status_code
        told[status] = told.get(status, 0) + 1
    grown = sizes() - before
    found = {"requests": count, "answers": told, "seconds": round(time.monotonic() - started, 1), "log_bytes": grown,
             "log_bytes_a_request": round(grown / count), "terminal_bytes": table.server.log.stat().st_size - terminal,
             "log_at_most": MOST_LOG}  # fmt: skip
    if found["log_bytes_a_request"] > 2000 or found["terminal_bytes"] > 20_000 or set(told) - {400, 404}:
        table.wrong.append(f"the flood: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "serve_refusals")
    parser.add_argument("--flood", type=int, default=3000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(heading("python benchmarks/serve_refusals.py"), flush=True)
    checkpoint = tiny_checkpoint("film", arguments.work)
    host = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    options = ["--media-domain", "127.0.0.1", "--media-timeout", "2", "--max-body-mb", "2", "--max-pixels", "1000000"]
    log = arguments.work / "server.log"
    log.unlink(missing_ok=True)
    with running(checkpoint, log, *options, MLLM_API_KEY=KEY, MLLM_ADMIN_KEY=OPERATOR) as server:
        named = re.search(r"writes to (\S+\.log)", log.read_text(errors="replace"))
        assert named is not None
        path = Path(named.group(1))
        table = Table(server)
        print("right, status, time, what was sent, what was said", flush=True)
        headers_and_encodings(table)
        parts_and_addresses(table)
        other_hosts(table, host)
        files_and_echoes(table)
        print(
            "RESULT flood " + json.dumps(flood(table, arguments.flood, lambda: [path, Path(f"{path}.1")])), flush=True
        )
        same = table.good() == table.first and table.good(picture_url(3)) == table.first
        if not same:
            table.wrong.append("a good request is answered otherwise than at the start")
        tracebacks = path.read_text(errors="replace").count("Traceback")
        rows = len(table.rows)
        print("RESULT refusals " + json.dumps({"requests": rows, "as they must be": rows - len(table.wrong), "wrong": table.wrong,
              "good request as before": same, "tracebacks in the log": tracebacks}), flush=True)  # fmt: skip
    host.shutdown()
    sys.exit(bool(table.wrong))


if __name__ == "__main__":
    main()
