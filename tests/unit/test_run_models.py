"""One code path for every kind of model: hf:, an endpoint that serves the same model, and its saved answers score the same."""

import base64
import io
import json
import threading

import foreign
import numpy as np
import pytest
from endpoint import Handler, Server, completion
from PIL import Image as Picture

from medvlm.datasets.predictions import rows
from medvlm.evaluate.run import evaluate
from medvlm.imaging.scan import Image
from medvlm.predictors import load, openai

QUESTIONS = ("Is there a pleural effusion?", "Is the heart large?", "Is this an X-ray?")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng, lines = tmp_path_factory.mktemp("data") / "set", np.random.default_rng(0), []
    folder.mkdir()
    for i in range(6):
        Picture.fromarray(rng.integers(0, 255, (24, 32), np.uint8)).save(folder / f"{i}.png")
        qa = [{"qid": f"{i}-{k}", "question": q, "answer": "yes" if (i + k) % 2 else "no", "type": "CLOSED"} for k, q in enumerate(QUESTIONS)]
        lines.append({"id": str(i), "image": f"{i}.png", "modality": "xray", "split": "test", "qa": qa})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return foreign.save(foreign.llava, tmp_path_factory.mktemp("llava"))


class Serving(Handler):
    """Answers with what the checkpoint says of the picture and the question that were sent."""

    def answer(self):
        raw = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, question, *_ = raw["messages"][0]["content"]
        pixels = np.asarray(Picture.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))).convert("L"))
        said = self.server.model.ask(Image("x", pixels[None], None, "xray", "uint8", {}), question["text"])
        body = json.dumps(completion(said.text, [said.choices])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = answer


@pytest.fixture
def endpoint(checkpoint, monkeypatch):
    monkeypatch.setattr(openai, "WAIT", 0.0)
    made = Server()
    made.RequestHandlerClass, made.model = Serving, load(f"hf:{checkpoint}")
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_one_model_scores_the_same_by_every_way(data, checkpoint, endpoint, tmp_path):
    here = evaluate("vqa", load(f"hf:{checkpoint}"), data, tmp_path / "hf", quiet=True)
    there = evaluate("vqa", load(f"openai:{endpoint.url}#tiny", allow_upload=True), data, tmp_path / "openai", quiet=True)
    saved = evaluate("vqa", load(f"file:{tmp_path / 'hf'}"), data, tmp_path / "file", quiet=True)
    assert here["errors"] == {"vqa": 0} and {s["n"] for s in here["scores"] if s["name"] == "closed accuracy"} == {18}
    plain = lambda record: [(s["name"], s["slice"], s["n"], s["low"], s["high"]) for s in record["scores"]]  # noqa: E731
    assert plain(saved) == plain(here)
    answered = [{k: r["text"] for k, r in rows(tmp_path / way / "predictions.jsonl").items()} for way in ("hf", "openai", "file")]
    assert answered[0] == answered[1] == answered[2]
    closed = [next(s for s in record["scores"] if s["name"] == "closed accuracy") for record in (here, there, saved)]
    assert closed[0] == closed[1] == closed[2]


def test_an_endpoint_that_does_not_answer_is_tried_again_and_then_recorded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(openai, "WAIT", 0.0)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        server.say((503, {"error": {"code": "busy"}}, {}))
        record = evaluate("vqa", load(f"openai:{server.url}#tiny", allow_upload=True), data, tmp_path / "run", quiet=True)
        assert record["errors"] == {"vqa": 18} and len(server.seen) == 18 * openai.TRIES
        assert {r["error"].split(":")[0] for r in rows(tmp_path / "run" / "predictions.jsonl").values()} == {"SERVER_ERROR"}
        assert next(s for s in record["scores"] if s["name"] == "closed accuracy")["value"] == 0.0
    finally:
        server.shutdown()
        server.server_close()


def test_a_model_without_its_eyes_is_scored_beside_itself(data, checkpoint, tmp_path):
    model = load(f"hf:{checkpoint}")
    record = evaluate("vqa", model, data, tmp_path / "run", words=load(f"blind:hf:{checkpoint}"), quiet=True)
    assert "no image" in record["baselines"]
    blind = rows(tmp_path / "run" / "predictions-no-image.jsonl")
    assert not any(r["error"] for r in blind.values())
    for question in range(3):  # the words alone give the same answer whatever the picture is
        assert len({blind[f"{i}-{question}"]["text"] for i in range(6)}) == 1


def test_the_bundled_kind_of_model_without_its_eyes(data, tiny_folder, tmp_path):
    record = evaluate("vqa", load(f"blind:{tiny_folder}"), data, tmp_path / "run", quiet=True)
    assert record["errors"] == {"vqa": 0}
    said = rows(tmp_path / "run" / "predictions.jsonl")
    assert len({said[f"{i}-0"]["probability"] for i in range(6)}) == 1


def test_asked_at_a_temperature_a_model_wavers_and_at_none_it_does_not(data, checkpoint, tiny_folder):
    from medvlm.evaluate.run import plan
    from medvlm.sample import Sample, Turn

    _, (job,) = plan("vqa", data)
    closed = job.samples[0]
    free = Sample("free", images=closed.images, turns=(Turn("user", "Describe what you see."),))
    for name in (f"hf:{checkpoint}", str(tiny_folder)):
        model = load(name)
        assert len({model.predict([closed, free])[k].text for _ in range(4) for k in (0,)}) == 1
        assert len({model.predict([free])[0].text for _ in range(3)}) == 1
        model.temperature = 1.0
        assert len({model.predict([closed])[0].text for _ in range(24)}) == 2, name  # random weights: yes about as often as no
        assert len({model.predict([free])[0].text for _ in range(4)}) > 1, name
