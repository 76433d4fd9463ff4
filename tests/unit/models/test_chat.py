"""Does the terminal chat answer about pictures from files and addresses, and say what is wrong with others?"""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from mllm.cli.chat import _picture_of
from mllm.cli.main import app
from mllm.errors import ConfigError, DataError
from mllm.models import chat
from tests.helpers import picture, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model, processor = tiny_model(folder / "made")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture(3).save(folder / "a picture.png")
    return folder


@pytest.fixture(scope="module")
def address(checkpoint):
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    pages = {"/a.png": buffer.getvalue(), "/page.html": b"<html>no picture</html>"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("location", "/a.png")
                self.end_headers()
                return
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(checkpoint, image):
    command = ["chat", str(checkpoint), "-i", str(image), "-q", "what?", "--max-new-tokens", "6", "--dtype", "float32"]
    return CliRunner().invoke(app, command)


def test_an_address_is_asked_about_like_the_file(checkpoint, address):
    file = ask(checkpoint, checkpoint / "a picture.png")
    assert file.exit_code == 0 and file.stdout.strip(), file.output
    for page in ("/a.png", "/moved.png"):
        assert ask(checkpoint, address + page).stdout == file.stdout


@pytest.mark.parametrize(("page", "said"), [("/none.png", "404"), ("/page.html", "page.html")])
def test_what_is_no_picture_is_named(checkpoint, address, page, said):
    session = chat.ChatSession.load(str(checkpoint), device="cpu")
    with pytest.raises(DataError, match=said):
        session.add_image(address + page)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9"):
        session.add_image("http://127.0.0.1:9/a.png")
    assert session._pending == []


def test_a_download_without_end_is_stopped(address, monkeypatch):
    monkeypatch.setattr(chat, "MAX_DOWNLOAD", 10)
    with pytest.raises(DataError, match="more than"):
        chat.fetch(f"{address}/a.png")


def test_a_conversation_takes_pasted_paths_and_addresses(checkpoint, address):
    lines = [
        f"{address}/a.png",
        "what?",
        "/image /nowhere.png",
        "/reset",
        str(checkpoint / "a picture.png"),
        "what?",
        "/quit",
    ]
    command = ["chat", str(checkpoint), "--max-new-tokens", "4", "--dtype", "float32"]
    done = CliRunner().invoke(app, command, input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    assert f"+ {address}/a.png" in done.output and "+ " + str(checkpoint / "a picture.png") in done.output
    assert "! /nowhere.png" in done.output


def test_a_question_is_no_picture():
    assert _picture_of("what is http://example.com about?") is None
    assert _picture_of("x" * 5000) is None
    assert _picture_of("'https://example.com/a.png'") == "https://example.com/a.png"


def test_a_question_longer_than_the_model_reads_is_refused_and_forgotten(checkpoint):
    """As a server refuses it; the picture waits for the next question, which is answered as if the long one had not been."""
    session = chat.ChatSession.load(str(checkpoint), dtype="float32")
    limit = session.model.config.get_text_config().max_position_embeddings
    session.add_image(str(checkpoint / "a picture.png"))
    with pytest.raises(DataError, match=rf"1 pictures has \d+ tokens, and this model reads {limit}"):
        session.ask("long " * limit)
    assert (session.turns, session.images, len(session._pending)) == ([], [], 1)
    fresh = chat.ChatSession.load(str(checkpoint), dtype="float32")
    fresh.add_image(str(checkpoint / "a picture.png"))
    assert session.ask("what?", max_new_tokens=5) == fresh.ask("what?", max_new_tokens=5)
    session.ask("and?", max_new_tokens=10 * limit)  # an answer ends where the model does


def test_the_terminal_helps_and_goes_on_after_a_refusal(checkpoint):
    typed = ["/help", "/hlep", "/video", "word " * 5000, "what?", "/quit"]
    done = CliRunner().invoke(
        app, ["chat", str(checkpoint), "--max-new-tokens", "3", "--dtype", "float32"], input="\n".join(typed)
    )
    assert done.exit_code == 0, done.output
    assert "a file or an address" in done.output and "did you mean '/help'" in done.output
    assert "/video takes a file" in done.output and "this model reads" in done.output


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        (None, 100),
        ({"rope_type": "default"}, 100),
        ({"rope_type": "llama3", "factor": 8.0}, 100),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"type": "linear", "factor": 2.0}, 200),
    ],
)
def test_the_longest_conversation_is_the_servers(rope, tokens):
    from types import SimpleNamespace

    assert chat.longest_conversation(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == tokens
    assert chat.longest_conversation(SimpleNamespace()) is None


def test_a_model_that_marks_writes_its_masks_over_the_picture(tmp_path):
    from PIL import Image

    from tests.unit.heads.test_segmentation import HEAD

    model, processor = tiny_model(tmp_path / "made", heads={"marks": HEAD})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture(3).save(tmp_path / "a.png")
    command = [
        "chat",
        str(tmp_path),
        "-i",
        str(tmp_path / "a.png"),
        "--max-new-tokens",
        "2",
        "--overlay",
        str(tmp_path / "out.png"),
    ]
    done = CliRunner().invoke(app, [*command, "-q", "Please segment it."])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out.png") as written:
        assert written.size == picture(3).size
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0 and "--overlay: give one picture" in str(refused.exception or refused.output)
    session = chat.ChatSession(model, processor)
    with pytest.raises(ConfigError, match="add one picture; there are 0"):
        session.mark("Please segment it.")
