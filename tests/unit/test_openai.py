"""An OpenAI-compatible server behind our verbs: a real server on this machine that keeps what it was sent."""

import base64
import io
import json
import math
import threading

import numpy as np
import pytest
import tiny
from endpoint import Handler, Server, completion
from PIL import Image as Pillow

from medvlm import cli
from medvlm.errors import ModelError
from medvlm.imaging.scan import Image, Volume
from medvlm.predictors import load, openai
from medvlm.sample import Sample, Turn

CLOSED = "Is there a pleural effusion?"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai, "WAIT", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def model(server):
    return load(f"openai:{server.url}#reader-1", allow_upload=True)


def refused(call, code):
    with pytest.raises(ModelError) as e:
        call()
    assert e.value.code == code and "secret" not in str(e.value), e.value
    return e.value.message


def test_nothing_is_sent_without_the_flag(server, capsys, tmp_path):
    for address in (server.url, f"{server.url}#reader-1", "https://api.example.org/v1#x"):
        refused(lambda a=address: load(f"openai:{a}"), "UPLOAD_NOT_ALLOWED")
    picture = tmp_path / "a.png"
    Pillow.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    assert cli.main(["ask", str(picture), CLOSED, "--model", f"openai:{server.url}#reader-1"]) == 2
    err = capsys.readouterr().err
    assert "[UPLOAD_NOT_ALLOWED]" in err and "--allow-upload" in err and server.seen == []
    assert cli.main(["ask", str(picture), CLOSED, "--model", f"openai:{server.url}#reader-1", "--allow-upload"]) == 0
    assert "yes   (no probability given)" in capsys.readouterr().out and len(server.seen) == 1
    assert cli.main(["classify", str(picture), "pneumonia", "--model", f"openai:{server.url}#reader-1", "--allow-upload", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pneumonia": None}


def test_a_question_travels_as_png_and_text_and_nothing_else(server, model):
    picture = tiny.picture("xray-1", (30, 50), patient="DOE^JANE", windows=[(100, 80)])
    answer = model.ask(picture, CLOSED)
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret" and body["model"] == "reader-1" and body["temperature"] == 0
    (message,) = body["messages"]
    image, question, pick = message["content"]
    assert question == {"type": "text", "text": CLOSED} and "yes, no" in pick["text"] and message["role"] == "user"
    head, _, data = image["image_url"]["url"].partition(",")
    shown = Pillow.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and shown.size == (50, 30) and shown.info == {}
    from medvlm.imaging.window import display

    assert (np.asarray(shown) == display(picture)[..., None]).all()
    sent = json.dumps(body)
    assert "DOE" not in sent and "xray-1" not in sent
    assert answer.text == "yes" and math.isnan(answer.probability) and answer.choices is None and answer.to_json("q")["probability"] is None


def test_probabilities_are_the_servers_where_it_gives_them(server, model):
    server.say(completion("Yes.", [{" Yes": 0.6, "No": 0.2, "yes": 0.1, "Perhaps": 0.05}, {".": 0.5}]))
    answer = model.ask(tiny.picture(), CLOSED)
    assert answer.text == "yes" and answer.choices == pytest.approx({"yes": 0.7 / 0.9, "no": 0.2 / 0.9}) and answer.probability == answer.choices["yes"]
    assert model.classify(tiny.picture(), ["pneumonia"]) == pytest.approx({"pneumonia": 0.7 / 0.9})
    server.say(completion("A nodule.", [{"A": 0.5, "The": 0.4}, {" nodule": 0.5}, {".": 0.8}]))
    answer = model.ask(tiny.picture(), "What is seen?")
    assert answer.text == "A nodule." and answer.probability == pytest.approx(0.2) and answer.choices is None
    for tokens in ([{"Based": 0.9, "Yes": 0.1}], [{"\n": 1.0}], None):  # the first word tells nothing
        server.say(completion("Based on the film, yes", tokens))
        answer = model.ask(tiny.picture(), CLOSED)
        assert answer.text == "Based on the film, yes" and math.isnan(answer.probability) and answer.choices is None
    sample = Sample("a", images={"a": tiny.picture()}, turns=(Turn("user", "Which?"),), choices=("left lung", "left heart", "right lung"))
    server.say(completion("left lung", [{"left": 0.9, "right": 0.1}]))  # "left" is two of them
    (row,) = model.predict([sample])
    assert row.text == "left lung" and math.isnan(row.probability) and row.choices is None


def test_conversations_volumes_and_several_images_keep_their_order(server, model):
    a, b = tiny.picture("a", (8, 9)), tiny.picture("b", (10, 11))
    turns = (Turn("system", "Be brief."), Turn("user", "Before: <|image:b|>"), Turn("assistant", "Normal."), Turn("user", f"<|image:a|>{CLOSED}"), Turn("assistant", "no"))
    (row,) = model.predict([Sample("q", images={"a": a, "b": b}, turns=turns)])
    messages = server.seen[0][2]["messages"]

    def size(part):
        return Pillow.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).size

    assert row.text == "yes" and [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "Be brief." and messages[2]["content"] == "Normal."
    assert messages[1]["content"][0]["text"] == "Before: " and size(messages[1]["content"][1]) == (11, 10) and size(messages[3]["content"][0]) == (9, 8)
    scan = Volume("ct-1", np.zeros((1, 3, 6, 7), np.uint8), np.diag([2.0, 1, 1, 1])[[2, 1, 0, 3]], "ct", "uint8")
    server.say(completion("FINDINGS: Clear.\nIMPRESSION: Normal."))
    report = model.report([scan, a])
    assert report.findings == "Clear." and report.impression == "Normal."
    assert [size(p) for p in server.seen[0][2]["messages"][0]["content"][:-1]] == [(7, 6)] * 3 + [(9, 8)]


def test_many_questions_keep_their_order_and_a_failure_is_a_row(server, model):
    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"][1]["text"]
        said = json.dumps(completion(asked) if "3" not in asked else {"error": {"code": "content_policy", "message": asked}}).encode()
        self.send_response(400 if "3" in asked else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    server.RequestHandlerClass = type("Echoing", (Handler,), {"do_POST": answer})
    samples = [Sample(str(k), images={"a": tiny.picture()}, turns=(Turn("user", f"Say {k}"),)) for k in range(8)]
    rows = model.predict(samples)
    assert [r.id for r in rows] == [s.id for s in samples] and [r.text for k, r in enumerate(rows) if k != 3] == [f"Say {k}" for k in range(8) if k != 3]
    assert rows[3].error.startswith("SERVER_ERROR: ") and "content_policy" in rows[3].error and "Say" not in rows[3].error


def test_a_busy_server_is_asked_again_and_a_broken_one_named(server, model, monkeypatch):
    waits = []
    monkeypatch.setattr(openai.time, "sleep", waits.append)
    monkeypatch.setattr(openai, "WAIT", 1.0)
    busy = (503, {"error": {"message": "sk-secret busy"}}, {})
    server.say((429, {}, {"Retry-After": "7"}), busy, busy, completion("yes"))
    assert model.ask(tiny.picture(), CLOSED).text == "yes" and len(server.seen) == 4 and waits == [7.0, 2.0, 4.0]
    server.say((429, {}, {"Retry-After": "999999"}), busy)
    assert "HTTP 503" in refused(lambda: model.ask(tiny.picture(), CLOSED), "SERVER_ERROR") and len(server.seen) == 4 and waits[3] == openai.LONGEST_WAIT
    for answer, said in (
        ((401, {"error": {"code": "invalid_api_key", "message": "Incorrect API key provided: sk-secret"}}, {}), "HTTP 401 (invalid_api_key)"),
        ((302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), "HTTP 302"), ((200, b"<html>", {}), "HTTP 200"), ((200, {"choices": []}, {}), "no chat completion"),
        ((200, [], {}), "HTTP 200"), (completion(None, reason="content_filter"), "gave no text (content_filter)"), ((200, {"choices": "no"}, {}), "no chat completion"),
    ):  # fmt: skip
        server.say(answer)
        assert said in refused(lambda: model.ask(tiny.picture(), CLOSED), "SERVER_ERROR"), said
        assert len(server.seen) == 1


def test_options_that_a_server_does_not_take_are_left_out(server, model):
    def wrong(name):
        return 400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name, "code": "unsupported_parameter"}}, {}

    server.say(wrong("max_tokens"), wrong("logprobs"), completion("yes"))
    assert model.ask(tiny.picture(), CLOSED).text == "yes"
    bodies = [body for _, _, body in server.seen]
    assert "max_tokens" in bodies[0] and "max_tokens" not in bodies[1] and bodies[1]["max_completion_tokens"] == bodies[0]["max_tokens"]
    assert bodies[1]["top_logprobs"] == 20 and not {"logprobs", "top_logprobs"} & bodies[2].keys()
    server.say(completion("no"))
    assert model.ask(tiny.picture(), CLOSED).text == "no" and len(server.seen) == 1  # it is remembered


def test_a_server_that_is_silent_or_gone_is_an_error_that_names_no_secret(server, monkeypatch):
    monkeypatch.setattr(openai, "TIMEOUT", 0.05)
    gone = load("openai:http://127.0.0.1:9/v1?key=secret#m", allow_upload=True)
    assert "127.0.0.1:9 does not answer (ConnectionRefusedError)" in refused(lambda: gone.ask(tiny.picture(), CLOSED), "SERVER_ERROR")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        slow = load(f"openai:http://127.0.0.1:{mute.getsockname()[1]}/v1#m", allow_upload=True)
        assert "does not answer" in refused(lambda: slow.ask(tiny.picture(), CLOSED), "SERVER_ERROR")


def test_addresses_keys_and_models_are_checked_before_anything_is_sent(server, monkeypatch):
    for address in ("", "ftp://h/v1", "file:///etc/passwd", "http://user:secret@127.0.0.1/v1", "http://h:99999999/v1", "http://[/v1"):
        refused(lambda a=address: load(f"openai:{a}", allow_upload=True), "BAD_ARGUMENT")
    refused(lambda: load("openai:http://gpu.example.org:8000/v1#m", allow_upload=True), "BAD_ARGUMENT")  # the key would travel in the open
    server.say({"data": [{"id": "only"}]}, completion("yes"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not carry what is meant for this machine
    model = load(f"openai:{server.url}", allow_upload=True)
    assert model.name == "only" and model.ask(tiny.picture(), CLOSED).text == "yes" and [s[0] for s in server.seen] == ["/v1/models", "/v1/chat/completions"]
    server.say({"data": [{"id": "a"}, {"id": "b"}]})
    assert "2 models: a, b" in refused(lambda: load(f"openai:{server.url}", allow_upload=True), "BAD_ARGUMENT")
    monkeypatch.delenv("OPENAI_API_KEY")
    server.say(completion("yes"))
    load(f"openai:{server.url}#m", allow_upload=True).ask(tiny.picture(), CLOSED)
    assert "Authorization" not in server.seen[0][1]


def test_a_picture_with_text_burned_in_and_too_many_pictures_stay_here(server, model):
    marked = tiny.picture("us-1", burned_in=True)
    assert "us-1" in refused(lambda: model.ask([tiny.picture(), marked], CLOSED), "BURNED_IN")
    rows = model.predict([Sample("a", images={"a": marked}, turns=(Turn("user", CLOSED),)), Sample("b", images={"a": tiny.picture()}, turns=(Turn("user", CLOSED),))])
    assert rows[0].error.startswith("BURNED_IN") and rows[1].text == "yes" and len(server.seen) == 1
    refused(lambda: model.ask([Image("a", np.zeros((1, 4, 4), np.uint8))] * 500, CLOSED), "TOO_MANY_IMAGES")
    refused(lambda: model.ask(tiny.picture(), " "), "BAD_ARGUMENT")
    refused(lambda: model.segment(tiny.picture(), "lung"), "UNSUPPORTED_VERB")
    assert len(server.seen) == 1
