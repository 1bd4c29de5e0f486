"""`edgetune-rt serve`: a real server, real sockets, clients good and bad."""

import asyncio
import contextlib
import dataclasses
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from edgetune.errors import (
    ConfigError,
    IntegrityError,
    PredictionTimeout,
    ResourceError,
)
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.serve import Server, ServeSettings, read_token
from edgetune.runtime.serve.address import without_port
from edgetune.runtime.serve.prometheus import Counter, Histogram, exposition, gauge
from edgetune.runtime.tasks.classification import Classification

TOKEN = "a-token-of-many-letters"
JSON = {"Content-Type": "application/json"}


# -- a server in a thread, and clients ----------------------------------------------------------


class Running:
    """A server on an event loop of its own, in a thread."""

    def __init__(self, model, limits=None, **settings):
        self.server = Server(model, ServeSettings(port=0, **settings))
        if limits:
            http_server = self.server._http
            http_server.limits = dataclasses.replace(http_server.limits, **limits)
        self.clients = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        try:
            self.run(self.server.__aenter__())
        except BaseException:
            self.close()
            raise
        self.port = int(self.server.url.rpartition(":")[2])

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def stop_soon(self):
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)

    def close(self):
        for client in self.clients:
            client.close()
        with contextlib.suppress(Exception):
            self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()

    def ask(self, method, path, body=None, headers=None):
        """One request on a connection of its own: (status, headers, parsed or raw body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            return self.ask_on(connection, method, path, body, headers)
        finally:
            connection.close()

    @staticmethod
    def ask_on(connection, method, path, body=None, headers=None):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        if response.getheader("Content-Type") == "application/json" and data:
            data = json.loads(data)
        return response.status, response.headers, data

    def predict(self, value, **headers):
        body = json.dumps({"input": value})
        return self.ask("POST", "/predict", body, {**JSON, **headers})

    def connect(self):
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        self.clients.append(client)
        return client

    def raw(self, data):
        """Everything that comes back for these bytes, until the server closes."""
        with self.connect() as client:
            with contextlib.suppress(ConnectionError):  # it may answer before all is sent
                client.sendall(data)
            return read_all(client)

    def metric(self, line):
        """The value of the sample that begins with `line`."""
        text = self.ask("GET", "/metrics")[2].decode()
        (found,) = [row for row in text.splitlines() if row.startswith(f"{line} ")]
        return float(found.rpartition(" ")[2])


@pytest.fixture
def start():
    """A function that starts a server; all are stopped at the end."""
    running = []

    def begin(model, **settings):
        running.append(Running(model, **settings))
        return running[-1]

    yield begin
    for server in running:
        if isinstance(server.server.model, SlowModel):
            server.server.model.go.set()
        server.close()


@pytest.fixture
def words(start, word_bundle):
    return start(EdgeModel.load(word_bundle))


@pytest.fixture
def colors(start, color_bundle):
    return start(EdgeModel.load(color_bundle))


class SlowModel:
    """Answers with the text it got once `go` is set; keeps to its time limit unless `deaf`."""

    def __init__(self, bundle, *, deaf=False):
        self.manifest = open_bundle(bundle).manifest
        self.deaf = deaf
        self.go = threading.Event()
        self.began = threading.Semaphore(0)
        self.seen = []

    def predict(self, value, *, all_scores=False, timeout=None):  # noqa: ARG002
        self.seen.append(value)
        self.began.release()
        if not self.go.wait(None if self.deaf else timeout):
            raise PredictionTimeout("too late")
        return Classification(label=value, score=1.0)


@pytest.fixture
def slow(word_bundle):
    return SlowModel(word_bundle)


class BrokenModel(SlowModel):
    def __init__(self, bundle, error):
        super().__init__(bundle)
        self.error = error

    def predict(self, value, *, all_scores=False, timeout=None):  # noqa: ARG002
        raise self.error


def in_background(function, *arguments, **options):
    """Start a call; the function that comes back waits for its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments, **options)))
    thread.start()

    def result():
        thread.join(20)
        return found[0]

    return result


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def read_all(client):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            data += piece
    return data


def statuses(data):
    return [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def post(body, *headers, path="/predict"):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def png(color=(0, 0, 9), size=(3, 2), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


# -- answers ------------------------------------------------------------------------------------


def test_a_text_is_answered_with_label_score_and_time(words):
    status, headers, answer = words.predict("so good")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert answer.pop("milliseconds") > 0
    # logits (0, 1): 1 / (1 + 1/e)
    assert answer == {"label": "positive", "score": pytest.approx(0.731059, abs=1e-6)}


def test_texts_are_answered_in_order(words):
    body = json.dumps({"inputs": ["good", "bad", "żółw good"]})
    status, _, answer = words.ask("POST", "/predict", body, JSON)
    assert status == 200
    assert [a["label"] for a in answer["results"]] == ["positive", "negative", "positive"]
    assert set(answer) == {"results", "milliseconds"}


def test_every_label_given_is_answered_and_counted(start, word_bundle, seal):
    seal(word_bundle, task="text-multilabel-classification")
    words = start(EdgeModel.load(word_bundle))
    _, _, answer = words.predict("bad bad")
    # logits (2, 0): 1 / (1 + e^-2) and one half
    assert answer["labels"] == ["negative", "positive"]
    scores = {"negative": pytest.approx(0.880797, abs=1e-6), "positive": 0.5}
    assert answer["scores"] == scores
    assert words.metric('edgetune_predictions_total{label="negative"}') == 1
    assert words.metric('edgetune_predictions_total{label="positive"}') == 1


def test_no_texts_have_no_answers(words):
    _, _, answer = words.ask("POST", "/predict", '{"inputs": []}', JSON)
    assert answer["results"] == []


@pytest.mark.parametrize(
    ("query", "given"), [("", False), ("?all_scores=1", True), ("?all_scores=false", False)]
)
def test_all_scores_come_when_asked_for(words, query, given):
    status, _, answer = words.ask("POST", f"/predict{query}", '{"input": "good"}', JSON)
    assert status == 200
    assert ("scores" in answer) is given
    if given:
        assert answer["scores"] == pytest.approx(
            {"negative": 0.268941, "positive": 0.731059}, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream"])
def test_an_image_is_the_body(colors, kind):
    status, _, answer = colors.ask("POST", "/predict", png(), {"Content-Type": kind})
    assert (status, answer["label"]) == (200, "blue")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_images_of_other_formats(colors, kind):
    body = png((250, 0, 0), (32, 32), kind)
    assert colors.ask("POST", "/predict", body, {"Content-Type": "image/*"})[2]["label"] == "red"


def test_a_chunked_body_is_read(words):
    chunks = iter([b'{"input": ', b'"good"}'])
    status, _, answer = words.ask("POST", "/predict", chunks, JSON)
    assert (status, answer["label"]) == (200, "positive")


def test_health_names_the_bundle(words, word_bundle):
    status, _, answer = words.ask("GET", "/healthz")
    digest = open_bundle(word_bundle).manifest.digest
    assert status == 200
    assert answer == {"status": "ok", "bundle": "words", "release": 1, "digest": digest}


def test_head_is_get_without_the_body(words):
    status, headers, body = words.ask("HEAD", "/healthz")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 20


def test_a_connection_carries_many_requests(words):
    connection = http.client.HTTPConnection("127.0.0.1", words.port, timeout=10)
    for text, label in (("good", "positive"), ("bad", "negative"), ("good", "positive")):
        body = json.dumps({"input": text})
        status, headers, answer = words.ask_on(connection, "POST", "/predict", body, JSON)
        assert (status, answer["label"], headers["Connection"]) == (200, label, None)
        # an error leaves it open too where the whole request was read
        assert words.ask_on(connection, "POST", "/predict", "{", JSON)[0] == 400
    assert words.metric("edgetune_http_connections") == 2
    connection.close()


def test_pipelined_requests_are_answered_in_order(words):
    bodies = [b'{"input": "good"}', b'{"input": "bad"}', b'{"input": "good"}']
    data = b"".join(post(body, f"Content-Length: {len(body)}") for body in bodies)
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = words.raw(data + last)
    assert statuses(answer) == [200] * 4
    assert re.findall(rb'"label": "(\w+)"', answer) == [b"positive", b"negative", b"positive"]


def test_an_http_1_0_client_is_answered_and_the_connection_closed(words):
    answer = words.raw(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert statuses(answer) == [200]
    assert b"connection: close" in answer.lower()


def test_a_client_that_asks_first_is_told_to_go_on(words):
    body = b'{"input": "good"}'
    with words.connect() as client:
        headers = (f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close")
        client.sendall(post(b"", *headers))
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert b"positive" in read_all(client)


def test_a_client_that_asks_first_does_not_send_what_is_too_large(words):
    answer = words.raw(post(b"", "Content-Length: 99999999", "Expect: 100-continue"))
    assert statuses(answer) == [413]


# -- refusals -----------------------------------------------------------------------------------

BAD_BODIES = {
    b"": (400, "no valid JSON"),
    b"{": (400, "no valid JSON"),
    b'"good"': (400, "expected an object"),
    b"[]": (400, "expected an object"),
    b"{}": (400, 'expected one key, "input" or "inputs"'),
    b'{"input": "a", "inputs": []}': (400, 'expected one key, "input" or "inputs"'),
    b'{"input": "a", "input": "b"}': (400, "a key stands there twice"),
    b'{"imput": "a"}': (400, "unknown key 'imput'; did you mean 'input'?"),
    b'{"path": "/etc/passwd"}': (400, "unknown key 'path'; known: input, inputs"),
    b'{"\\ud800": 1}': (400, r"unknown key '\ud800'"),
    b'{"input": "\xff"}': (400, "no valid JSON in UTF-8"),
    '{"input": "good"}'.encode("utf-16"): (400, "no valid JSON in UTF-8"),
    b"[" * 100_000: (400, "no valid JSON"),
    b'{"input": ' + b"9" * 5000 + b"}": (400, "no valid JSON"),
    b'{"input": 5}': (422, "input: expected a string, got a number"),
    b'{"input": ["a"]}': (422, "input: expected a string, got a list"),
    b'{"input": {"base64": ""}}': (422, "input: expected a string, got an object"),
    b'{"input": null}': (422, "input: expected a string, got null"),
    b'{"input": "\\ud800"}': (422, "is no Unicode text"),
    b'{"inputs": "good"}': (422, "inputs: expected a list of strings, got a string"),
    b'{"inputs": ["good", true]}': (422, "inputs[1]: expected a string, got true or false"),
    json.dumps({"inputs": [""] * 257}).encode(): (413, "expected at most 256, got 257"),
}


def test_a_bad_body_is_refused_with_the_reason(words):
    for body, (status, message) in BAD_BODIES.items():
        found, _, answer = words.ask("POST", "/predict", body, JSON)
        assert found == status, body[:60]
        assert message in answer["error"], body[:60]
        assert len(answer["error"]) < 250
    assert words.predict("good")[0] == 200


@pytest.mark.parametrize("query", ["all_scores=2", "all_scores", "x=1", "a&b&c", "%ff", "="])
def test_a_bad_query_is_refused(words, query):
    status, _, answer = words.ask("POST", f"/predict?{query}", '{"input": ""}', JSON)
    assert (status, answer["error"]) == (400, "query: expected nothing or all_scores=1")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "image/png", "json"]
)
def test_a_text_of_another_content_type_is_refused(words, kind):
    """A web page can send the first three anywhere without the browser asking the server."""
    headers = {"Content-Type": kind} if kind else {}
    status, _, answer = words.ask("POST", "/predict", b'{"input": "good"}', headers)
    assert status == 415
    assert "application/json" in answer["error"]


def test_a_compressed_body_is_refused(words):
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert words.ask("POST", "/predict", b"\x1f\x8b", headers)[0] == 415


@pytest.mark.parametrize("form", ['{{"input": "{0}"}}', '"{0}"', "{0}", "file://{0}"])
@pytest.mark.parametrize("kind", ["application/json", "image/png", "application/octet-stream"])
def test_a_path_is_never_opened_for_an_image_bundle(colors, tmp_path, form, kind):
    photo = tmp_path / "secret.png"
    photo.write_bytes(png())
    opened = []

    def watch(event, arguments):
        if event == "open" and str(photo) in str(arguments[0]):
            opened.append(arguments)

    sys.addaudithook(watch)
    status, _, answer = colors.ask(
        "POST", "/predict", form.format(photo).encode(), {"Content-Type": kind}
    )
    assert status == (415 if "json" in kind else 422)
    assert str(photo) not in answer["error"]
    assert opened == []


@pytest.mark.parametrize(
    "body", [b"", b"no picture", png()[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n", png(kind="GIF")]
)
def test_what_is_no_photo_is_refused(colors, body):
    status, _, answer = colors.ask("POST", "/predict", body, {"Content-Type": "image/png"})
    assert status == 422
    assert answer["error"].startswith(f"{len(body)} bytes: ")


def test_an_image_that_is_damaged_behind_its_head_is_refused(colors):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    body = file.getvalue()[:2000]
    status, _, answer = colors.ask("POST", "/predict", body, {"Content-Type": "image/png"})
    assert status == 422
    assert "cannot be decoded" in answer["error"]


def test_a_small_file_of_a_huge_image_is_not_decoded(start, color_bundle):
    server = start(EdgeModel.load(color_bundle), max_megapixels=0.5)
    body = png(size=(1000, 501))
    status, _, answer = server.ask("POST", "/predict", body, {"Content-Type": "image/png"})
    assert (status, len(body) < 3000) == (422, True)
    assert "at most 0.5 megapixels, got 0.5" in answer["error"]
    body = png(size=(1000, 500))
    assert server.ask("POST", "/predict", body, {"Content-Type": "image/png"})[0] == 200


@pytest.mark.parametrize("path", ["/", "/predict/", "/Predict", "/../etc/passwd", "/%2e", "//"])
def test_an_unknown_path_is_404(words, path):
    status, _, answer = words.ask("GET", path)
    assert status == 404
    assert "/predict, /healthz, /metrics" in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("OPTIONS", "/predict", "POST"),
        ("DELETE", "/healthz", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("get", "/healthz", "GET, HEAD"),
    ],
)
def test_another_method_is_405_and_the_right_one_named(words, method, path, allowed):
    status, headers, _ = words.ask(method, path)
    assert (status, headers["Allow"]) == (405, allowed)


def test_no_answer_opens_the_server_to_web_pages(words):
    for method in ("OPTIONS", "POST"):
        origin = {"Origin": "http://evil.example", **JSON}
        _, headers, _ = words.ask(method, "/predict", '{"input": ""}', origin)
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), max_body_mib=0.01)  # 10485 bytes
    fits = json.dumps({"input": "x" * 10_000})
    assert server.ask("POST", "/predict", fits, JSON)[0] == 200
    status, headers, answer = server.ask("POST", "/predict", " " * 10_486, JSON)
    assert (status, headers["Connection"]) == (413, "close")
    assert answer["error"] == "expected a body of at most 10485 bytes, got 10486"


def test_a_chunked_body_that_grows_too_large_is_refused(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), max_body_mib=0.01)
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    answer = server.raw(post(chunk * 500, "Transfer-Encoding: chunked"))
    assert statuses(answer) == [413]


def test_all_bodies_together_are_bounded(start, slow):
    server = start(slow, max_body_mib=0.01)  # 4 of them
    half = b" " * 10_000
    clients = [server.connect() for _ in range(4)]
    for client in clients:
        client.sendall(post(half, "Content-Length: 10001"))
    wait_until(lambda: server.server._http.bodies_bytes == 40_000)
    status, headers, _ = server.ask("POST", "/predict", half, JSON)
    assert (status, headers["Retry-After"]) == (503, "1")
    for client in clients:
        client.close()
    wait_until(lambda: server.server._http.bodies_bytes == 0)


def test_a_post_without_a_length_is_411(words):
    assert statuses(words.raw(post(b"", "Connection: close"))) == [411]


# -- malformed and hostile ----------------------------------------------------------------------

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "two words": b"GET /healthz\r\n\r\n",
    "blanks in the target": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a control character": b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: evil.example\r\n\r\n",
    "a null byte": GET + b"X: a\x00b\r\n\r\n",
    "a lone CR": GET + b"X: a\rTransfer-Encoding: chunked\r\n\r\n",
    "a blank before the colon": GET + b"Content-Length : 5\r\n\r\n",
    "no colon": GET + b"nonsense\r\n\r\n",
    "a negative length": post(b"x", "Content-Length: -1"),
    "a length with a sign": post(b"x", "Content-Length: +1"),
    "a length in hex": post(b"x", "Content-Length: 0x1"),
    "a length of many digits": post(b"x", "Content-Length: " + "9" * 100),
    "two lengths": post(b"xx", "Content-Length: 1", "Content-Length: 2"),
    "two lengths in one": post(b"xx", "Content-Length: 1, 2"),
    "length and chunks": post(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks and length": post(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5"),
    "a chunk of negative size": post(b"-1\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "a chunk without its end": post(b"1\r\nxyz\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "chunks in HTTP/1.0": post(b"0\r\n\r\n", "Transfer-Encoding: chunked").replace(b"1.1", b"1.0"),
    "two content types": post(b"{}", "Content-Type: image/png", "Content-Length: 2"),
    "the target is a star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the target is an authority": b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_400_and_nothing_behind_it_is_read(words, name):
    """What follows must not be taken for a request of its own: that is request smuggling."""
    behind = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = words.raw(MALFORMED[name] + behind)
    # that one is framed well: the next is a request of its own
    expected = [400, 404] if name == "the target is a star" else [400]
    assert statuses(answer) == expected, answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2].partition(b"\n")[0])["error"]
    assert words.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize("version", ["2.0", "9.9", "0.9"])
def test_another_version_of_http_is_505(words, version):
    request = f"GET /healthz HTTP/{version}\r\nHost: localhost\r\n\r\n".encode()
    assert statuses(words.raw(request * 2)) == [505]


@pytest.mark.parametrize("coding", ["gzip", "chunked, chunked", "identity", "xchunked"])
def test_an_unknown_transfer_coding_is_501(words, coding):
    assert statuses(words.raw(post(b"0\r\n\r\n", f"Transfer-Encoding: {coding}"))) == [501]


@pytest.mark.parametrize(
    "data",
    [
        b"G" * 200_000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        GET + b"X: a\r\n" * 10_000 + b"\r\n",
        GET + b"".join(b"X%d: a\r\n" % n for n in range(10_000)),
    ],
    ids=["no line", "line", "one header", "many headers", "no end"],
)
def test_a_head_that_is_too_large_is_431(words, data):
    assert statuses(words.raw(data)) == [431]


def test_a_trailer_or_chunk_extension_that_never_ends_is_refused(words):
    for tail in (b"1;" + b"x" * 100_000, b"0\r\n" + b"X: y\r\n" * 20_000):
        assert statuses(words.raw(post(tail, "Transfer-Encoding: chunked")))[0] in {400, 431}


def test_a_body_of_tiny_chunks_is_refused(words):
    answer = words.raw(post(b"1\r\n \r\n" * 5000, "Transfer-Encoding: chunked"))
    assert statuses(answer) == [400]
    assert b"chunks are too small" in answer


def test_a_refused_head_request_gets_no_body(words):
    request = b"HEAD healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = words.raw(request)
    assert statuses(answer) == [400]
    assert answer.endswith(b"\r\n\r\n")


def test_a_slow_head_is_408(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), limits={"head_s": 0.3})
    with server.connect() as client:
        client.sendall(b"GET /hea")
        for _ in range(3):  # each byte on its own must not prolong it
            time.sleep(0.15)
            with contextlib.suppress(ConnectionError):
                client.sendall(b"x")
        assert statuses(read_all(client)) == [408]


def test_a_slow_body_is_408(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), read_s=0.3)
    with server.connect() as client:
        client.sendall(post(b'{"in', "Content-Length: 17"))
        answer = read_all(client)
    assert statuses(answer) == [408]
    assert b"within 0.3 s" in answer


def test_a_silent_connection_is_closed(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), limits={"idle_s": 0.2})
    with server.connect() as client:
        assert read_all(client) == b""


def test_a_client_that_does_not_read_its_answers_is_cut_off(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), limits={"write_s": 0.3})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", server.port))
        client.settimeout(10)
        request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with pytest.raises(ConnectionError):  # it reads no more, and resets
            while True:
                client.sendall(request * 1000)
    wait_until(lambda: server.server._http.connections == 0)


def test_a_client_that_goes_away_in_mid_request_leaves_nothing_behind(words):
    for data in (b"", b"GE", post(b"", "Content-Length: 5"), post(b"{}", "Content-Length: 5")):
        with words.connect() as client:
            client.sendall(data)
    wait_until(lambda: words.server._http.connections == 0)
    assert words.predict("good")[0] == 200


def test_many_silent_connections_do_not_keep_others_out(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), connections=8)
    crowd = [server.connect() for _ in range(200)]
    for client in crowd[::2]:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"POST /pre")
    time.sleep(0.3)
    assert server.predict("good")[0] == 200
    assert server.server._http.connections <= 8


def test_of_many_clients_at_once_each_gets_an_answer(start, word_bundle, monkeypatch):
    # a loaded machine may take long from a client's connect to its first byte
    monkeypatch.setattr("edgetune.runtime.serve.http.GIVES_WAY_AFTER_S", 10.0)
    server = start(EdgeModel.load(word_bundle), connections=8, queue=100)
    results = [in_background(server.predict, "good") for _ in range(40)]
    found = [result()[0] for result in results]
    assert set(found) <= {200, 503}
    assert found.count(200) >= 8


def test_with_all_connections_at_work_another_is_told_to_come_back(start, slow):
    server = start(slow, connections=2)
    waiting = [in_background(server.predict, "a"), in_background(server.predict, "b")]
    wait_until(lambda: server.server._pool.busy + server.server._pool.depth == 2)
    status, headers, answer = server.ask("GET", "/healthz")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert answer["error"] == "too many connections"
    slow.go.set()
    assert [result()[0] for result in waiting] == [200, 200]
    assert server.metric('edgetune_requests_rejected_total{reason="connections"}') == 1


# -- the queue and time -------------------------------------------------------------------------


def test_a_full_queue_is_503_and_says_when_to_come_back(start, slow):
    server = start(slow, queue=2)
    waiting = [in_background(server.predict, str(n)) for n in range(3)]
    wait_until(lambda: (server.server._pool.busy, server.server._pool.depth) == (1, 2))
    assert server.metric("edgetune_queue_depth") == 2
    assert server.metric("edgetune_predictions_in_flight") == 1
    status, headers, answer = server.predict("one too many")
    assert (status, answer["error"]) == (503, "too many predictions wait already")
    assert 1 <= int(headers["Retry-After"]) <= 60
    slow.go.set()
    assert sorted(result()[2]["label"] for result in waiting) == ["0", "1", "2"]
    assert server.metric('edgetune_requests_rejected_total{reason="queue_full"}') == 1


def test_as_many_predict_at_once_as_there_are_workers(start, slow):
    server = start(slow, workers=3)
    waiting = [in_background(server.predict, str(n)) for n in range(4)]
    for _ in range(3):
        assert slow.began.acquire(timeout=10)
    wait_until(lambda: server.server._pool.depth == 1)
    assert len(slow.seen) == 3
    slow.go.set()
    assert [result()[0] for result in waiting] == [200] * 4


def test_a_prediction_that_takes_too_long_is_504(start, slow):
    server = start(slow, timeout_s=0.2)
    status, _, answer = server.predict("a")
    assert (status, answer["error"]) == (504, "the prediction took longer than 0.2 s")


def test_a_prediction_that_ignores_its_limit_is_504_and_the_server_says_it_is_stuck(
    start, word_bundle, monkeypatch, caplog
):
    monkeypatch.setattr("edgetune.runtime.serve.pool.OVERRUN_S", 0.1)
    monkeypatch.setattr("edgetune.runtime.serve.server.STUCK_S", 0.3)
    model = SlowModel(word_bundle, deaf=True)
    server = start(model, timeout_s=0.1)
    assert server.predict("a")[0] == 504
    assert "a prediction does not end" in caplog.text
    wait_until(lambda: server.ask("GET", "/healthz")[0] == 503)
    assert server.ask("GET", "/healthz")[2]["status"] == "stuck"
    # who waits behind it is told so, and that it never ran
    status, headers, answer = server.predict("b")
    assert (status, answer["error"]) == (503, "no worker was free in time")
    assert "Retry-After" in headers
    model.go.set()
    wait_until(lambda: server.ask("GET", "/healthz")[0] == 200)
    assert model.seen == ["a"]


def test_a_client_that_left_the_queue_costs_no_prediction(start, slow):
    server = start(slow)
    first = in_background(server.predict, "first")
    assert slow.began.acquire(timeout=10)
    body = b'{"input": "gone"}'
    with server.connect() as client:
        client.sendall(post(body, f"Content-Length: {len(body)}"))
        wait_until(lambda: server.server._pool.depth == 1)
    last = in_background(server.predict, "last")
    wait_until(lambda: server.server._pool.depth == 2)
    slow.go.set()
    assert [first()[0], last()[0]] == [200, 200]
    assert slow.seen == ["first", "last"]


@pytest.mark.parametrize(
    "error",
    [ValueError("secret"), IntegrityError("secret"), MemoryError("secret"), OSError("secret")],
)
def test_an_error_of_the_model_is_500_without_its_text_and_is_logged(
    start, word_bundle, caplog, error
):
    server = start(BrokenModel(word_bundle, error))
    status, _, answer = server.predict("a")
    assert status == 500
    assert "secret" not in answer["error"]
    assert "secret" in caplog.text


def test_the_access_log_has_a_line_a_request(words, caplog):
    with caplog.at_level(logging.INFO, logger="edgetune.serve"):
        words.predict("some private text")
        words.ask("GET", "/x?query=private")
        words.raw(b"private\r\n\r\n")
    wait_until(lambda: len(caplog.messages) == 3)
    shapes = [re.sub(r"[\d.]+ ms$", "T ms", message) for message in caplog.messages]
    assert shapes == [
        "127.0.0.1 POST /predict 200 T ms",
        "127.0.0.1 GET /x 404 T ms",
        "127.0.0.1 - - 400 T ms",
    ]


# -- who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8080", 200),
        ("127.0.0.1", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8080", 421),
        ("localhost:80@evil.example", 421),
        ("", 421),
    ],
)
def test_without_a_token_only_loopback_names_are_answered(words, host, status):
    """Else any web page could reach it by DNS rebinding."""
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert statuses(words.raw(request.encode())) == [status]


def test_the_host_of_an_absolute_target_counts(words):
    for target, status in (("http://localhost/healthz", 200), ("HTTP://evil.example/healthz", 421)):
        request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert statuses(words.raw(request.encode())) == [status]


@pytest.mark.parametrize("path", ["/predict", "/healthz", "/metrics", "/nothing"])
@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "\xff"]
)
def test_a_server_with_a_token_answers_nothing_without_it(start, slow, path, given):
    server = start(slow, token=TOKEN)
    headers = {"Authorization": given} if given else {}
    status, answer_headers, answer = server.ask("POST", path, "{}", {**JSON, **headers})
    assert status == 401
    assert answer_headers["WWW-Authenticate"].startswith("Bearer")
    assert "token" in answer["error"]


def test_a_server_with_a_token_answers_who_has_it_by_any_name(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), token=TOKEN)
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {TOKEN}", "Host": "kitchen.local"}
        assert server.predict("good", **headers)[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_an_address_that_others_reach_needs_a_token(start, slow, host):
    with pytest.raises(ConfigError, match="a token is needed"):
        start(slow, host=host)


def test_an_address_that_others_reach_answers_with_a_token(start, word_bundle):
    server = start(EdgeModel.load(word_bundle), host="0.0.0.0", token=TOKEN)
    assert server.server.url == f"http://0.0.0.0:{server.port}"
    assert server.ask("GET", "/healthz")[0] == 401
    assert server.predict("good", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_it_listens_on_ipv6(start, word_bundle):
    try:
        server = start(EdgeModel.load(word_bundle), host="::1")
    except (ResourceError, ConfigError):
        pytest.skip("this machine has no IPv6")
    assert server.server.url == f"http://[::1]:{server.port}"
    connection = http.client.HTTPConnection("::1", server.port, timeout=10)
    assert server.ask_on(connection, "GET", "/healthz")[0] == 200
    connection.close()


def test_localhost_is_127_0_0_1(start, slow):
    assert start(slow, host="localhost").server.url.startswith("http://127.0.0.1:")


def test_a_port_in_use_is_an_error_of_the_machine(slow, words):
    async def enter():
        async with Server(slow, ServeSettings(port=words.port)):
            pass

    with pytest.raises(ResourceError, match=rf"127\.0\.0\.1:{words.port}: cannot be listened on"):
        asyncio.run(enter())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("short", "at least 16 characters, got 5"),
        ("fifteen-letters", "at least 16 characters, got 15"),
        ("with blanks in the middle", "visible ASCII"),
        ("żółwżółwżółwżółw", "visible ASCII"),
        ("line\nbreak-and-more-letters", "visible ASCII"),
    ],
)
def test_a_poor_token_is_refused(text, message):
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        read_token(text, where="here")
    with pytest.raises(ConfigError, match=message):
        ServeSettings(token=text)


def test_a_token_is_read_without_the_blanks_around_it_and_not_shown():
    assert read_token(" sixteen-letters!\n", where="here") == "sixteen-letters!"
    assert TOKEN not in repr(ServeSettings(token=TOKEN))


@pytest.mark.parametrize(
    "change",
    [
        {"port": 65536}, {"port": -1}, {"workers": 0}, {"queue": -1}, {"max_body_mib": 0},
        {"timeout_s": 0}, {"timeout_s": float("nan")}, {"grace_s": -1}, {"connections": 0},
    ],
)  # fmt: skip
def test_settings_out_of_bounds_are_named(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name}: expected "):
        ServeSettings(**change)


def test_a_task_that_no_request_can_carry_is_refused(slow):
    slow.manifest = dataclasses.replace(slow.manifest, task="smell-classification")
    with pytest.raises(ConfigError, match="cannot be served over HTTP; text, image can"):
        Server(slow)


@pytest.mark.parametrize(
    ("host", "name"),
    [("A.b:80", "a.b"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]"), ("a:b", "a:b"), ("", "")],
)
def test_the_port_is_cut_from_a_host(host, name):
    assert without_port(host) == name


# -- metrics ------------------------------------------------------------------------------------

# https://prometheus.io/docs/instrumenting/exposition_formats/, text format 0.0.4
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
NUMBER = r"[+-]?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|Inf)|NaN"
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ({NUMBER})")
HELP = re.compile(rf"# HELP ({NAME}) (?:[^\\\n]|\\[\\n])+")
TYPE = re.compile(rf"# TYPE ({NAME}) (counter|gauge|histogram)")


def parse_exposition(text):
    """Return {(name, labels): value}, having checked every line and the order of lines."""
    assert text.endswith("\n")
    values, kinds, current = {}, {}, None
    for line in text[:-1].split("\n"):
        if match := HELP.fullmatch(line):
            current = match[1]
            assert current not in kinds, "a family stands there twice"
            continue
        if match := TYPE.fullmatch(line):
            assert match[1] == current
            kinds[current] = match[2]
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        base = re.sub(r"_(bucket|sum|count)$", "", match[1])
        assert (base if kinds[current] == "histogram" else match[1]) == current
        assert (match[1], match[2] or "") not in values, line
        values[match[1], match[2] or ""] = float(match[3].replace("Inf", "inf"))
        if kinds[current] == "counter":
            assert current.endswith("_total")
            assert float(match[3]) >= 0
    for name, kind in kinds.items():
        if kind == "histogram":
            check_histogram(name, values)
    return values


def check_histogram(name, values):
    buckets = [(labels, v) for (n, labels), v in values.items() if n == f"{name}_bucket"]
    bounds = [float(labels[4:-1].replace("Inf", "inf")) for labels, _ in buckets]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == values[f"{name}_count", ""]


def test_metrics_follow_the_grammar_and_count(words, word_bundle):
    words.ask("POST", "/predict", '{"inputs": ["good", "good", "bad"]}', JSON)
    words.predict("good")
    words.ask("POST", "/predict", "{", JSON)
    words.ask("GET", "/a/path/of/an/attacker")
    words.raw(b"nonsense\r\n\r\n")
    status, headers, body = words.ask("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    values = parse_exposition(body.decode())
    requests = {k[1]: v for k, v in values.items() if k[0] == "edgetune_http_requests_total"}
    assert requests == {
        'path="/predict",status="200"': 2,
        'path="/predict",status="400"': 1,
        'path="other",status="404"': 1,
        'path="other",status="400"': 1,
    }
    assert values["edgetune_predictions_total", 'label="positive"'] == 3
    assert values["edgetune_predictions_total", 'label="negative"'] == 1
    assert values["edgetune_predict_request_duration_seconds_count", ""] == 3
    assert values["edgetune_prediction_duration_seconds_count", ""] == 2
    assert values["edgetune_queue_depth", ""] == 0
    assert values["edgetune_http_connections", ""] == 1
    digest = open_bundle(word_bundle).manifest.digest
    assert (
        values[
            "edgetune_bundle_info",
            f'name="words",release="1",digest="{digest}",task="text-classification",'
            'precision="fp32"',
        ]
        == 1
    )
    assert 10 * 2**20 < values["process_resident_memory_bytes", ""] < 2**36
    assert abs(time.time() - values["process_start_time_seconds", ""]) < 60
    assert values["process_cpu_seconds_total", ""] > 0


def test_a_label_with_any_letters_is_escaped():
    counter = Counter("x_total", "a\\b\nc", ("label",))
    counter.add('quote " back \\ line \n żółw {},')
    counter.set_zero("zero")
    text = exposition([counter.family()]).decode()
    assert text == (
        "# HELP x_total a\\\\b\\nc\n# TYPE x_total counter\n"
        'x_total{label="quote \\" back \\\\ line \\n żółw {},"} 1\nx_total{label="zero"} 0\n'
    )
    assert len(parse_exposition(text)) == 2


def test_histogram_buckets_are_cumulative_and_bounds_inclusive():
    histogram = Histogram("h", "help", (0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value)
    assert exposition([histogram.family(), gauge("g", "help", 0.25)]).decode() == (
        '# HELP h help\n# TYPE h histogram\nh_bucket{le="0.1"} 2\nh_bucket{le="1"} 3\n'
        'h_bucket{le="+Inf"} 4\nh_sum 7.65\nh_count 4\n'
        "# HELP g help\n# TYPE g gauge\ng 0.25\n"
    )


# -- stopping -----------------------------------------------------------------------------------


def test_a_stop_answers_what_runs_and_waits_and_refuses_the_rest(start, slow):
    server = start(slow)
    waiting = [in_background(server.predict, "runs"), in_background(server.predict, "waits")]
    wait_until(lambda: (server.server._pool.busy, server.server._pool.depth) == (1, 1))
    idle = server.connect()
    late_check, late_request = server.connect(), server.connect()
    late_check.sendall(b"GET /healthz HTTP/1.1\r\n")
    late_request.sendall(b"POST /predict HTTP/1.1\r\n")
    wait_until(lambda: sum(not c.idle for c in server.server._http._connections) == 4)
    stopped = server.stop_soon()
    assert read_all(idle) == b""
    late_check.sendall(b"Host: localhost\r\n\r\n")
    answer = read_all(late_check)
    assert statuses(answer) == [503]
    assert b'"status": "stopping"' in answer
    rest = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    late_request.sendall(rest)
    assert statuses(read_all(late_request)) == [503]
    with pytest.raises(ConnectionRefusedError):
        server.connect()
    slow.go.set()
    assert sorted(result()[2]["label"] for result in waiting) == ["runs", "waits"]
    assert waiting[0]()[1]["Connection"] == "close"
    assert stopped.result(10) == 0
    for client in (idle, late_check, late_request):
        client.close()


def test_what_outlasts_the_grace_period_is_told_so(start, word_bundle):
    model = SlowModel(word_bundle, deaf=True)
    server = start(model, grace_s=0.2)
    waiting = [in_background(server.predict, "runs"), in_background(server.predict, "waits")]
    wait_until(lambda: (server.server._pool.busy, server.server._pool.depth) == (1, 1))
    assert server.stop_soon().result(10) == 1
    for result in waiting:
        status, _, answer = result()
        assert (status, answer["error"]) == (503, "the server is stopping")
    model.go.set()


# -- the command --------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*arguments, **environment):
    """`edgetune-rt serve` as a process on a free port: (process, port)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgetune.runtime.cli", "serve", *map(str, arguments), "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        line = process.stdout.readline()
        yield process, int(line.rpartition(":")[2]) if line else process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command_with_exit_code_0(word_bundle, number):
    with command(word_bundle, "--access-log") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        status, _, answer = Running.ask_on(
            connection, "POST", "/predict", '{"input": "good"}', JSON
        )
        assert (status, answer["label"]) == (200, "positive")
        process.send_signal(number)
        assert process.wait(10) == 0
        assert re.fullmatch(
            r"INFO 127\.0\.0\.1 POST /predict 200 [\d.]+ ms\nINFO stopping\n", process.stderr.read()
        )
        connection.close()


def test_a_second_signal_ends_the_command_at_once(word_bundle):
    with command(word_bundle) as (process, port), socket.socket() as client:
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /healthz HTTP/1.1\r\n")  # begun: it is waited for
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_systemd_is_told_ready_alive_and_stopping(word_bundle, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with command(word_bundle, **environment) as (process, _):
            told = [systemd.recv(100) for _ in range(4)]
            process.terminate()
            assert process.wait(10) == 0
        assert told == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        while (last := systemd.recv(100)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


def test_the_command_takes_its_token_from_a_file_or_the_environment(word_bundle, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for options, environment in (
        (["--token-file", tmp_path / "token"], {"EDGETUNE_TOKEN": "another-token-of-many"}),
        ([], {"EDGETUNE_TOKEN": TOKEN}),
    ):
        with command(word_bundle, "--host=0.0.0.0", *options, **environment) as (_, port):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            headers = {"Authorization": f"Bearer {TOKEN}"}
            assert Running.ask_on(connection, "GET", "/healthz")[0] == 401
            assert Running.ask_on(connection, "GET", "/healthz", None, headers)[0] == 200
            connection.close()


@pytest.mark.parametrize(
    ("options", "environment", "code", "message"),
    [
        (["--host=0.0.0.0"], {}, 2, "0.0.0.0: can be reached from outside, so a token is needed"),
        ([], {"EDGETUNE_TOKEN": "short"}, 2, "EDGETUNE_TOKEN: expected a token of at least 16"),
        (["--token-file=/nowhere/token"], {}, 2, "/nowhere/token: expected a file with a token"),
        (["--host=no.such.name.invalid"], {}, 2, "host 'no.such.name.invalid': is no address"),
        (["--workers=0"], {}, 2, "workers: expected 1 to 64, got 0"),
    ],
)
def test_a_command_that_cannot_serve_says_why(word_bundle, options, environment, code, message):
    with command(word_bundle, *options, **environment) as (process, error):
        assert process.wait(10) == code
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


def test_without_h11_the_command_names_the_extra(python, word_bundle):
    code = (
        "import sys; sys.modules['h11'] = None; from edgetune.runtime.cli.main import main;"
        f" sys.argv = ['edgetune-rt', 'serve', {str(word_bundle)!r}]; main()"
    )
    done = python("-c", code)
    assert done.returncode == 2
    message = "error: h11 is not installed; it comes with: pip install 'edgetune[server]'\n"
    assert done.stderr.decode() == message
