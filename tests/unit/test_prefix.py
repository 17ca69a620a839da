"""Questions that share a prefix get the answers they would get alone."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm.predictors import load
from medvlm.predictors.prefix import TRUNK, Tree
from medvlm.sample import Sample, Turn


def causal(kind="llama", **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, **more)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


TRUNKED, ROWS = [5, 6, 7, 8, 9], [[10, 11, 12], [10, 11, 13, 14], [20], [10, 11, 12, 30]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_node_has_the_logits_of_its_own_sequence(kind, attention):
    lm = causal(kind)
    lm.set_attn_implementation(attention)
    tree = Tree(lm, lm.get_input_embeddings()(torch.tensor([TRUNKED])))
    assert tree.exact
    gaps = []
    for _ in range(2):  # the trunk serves again after a cut
        logits, paths = tree.plant(ROWS)
        assert len(logits) == 7  # 10 11 12 | 13 14 | 20 | 30: what is common is run once
        more = tree.grow([paths[1][-1], TRUNK], [40, 41])
        for row, got in [*((r, logits[p]) for r, p in zip(ROWS, paths)), (ROWS[1] + [40], more[:1]), ([41], more[1:])]:
            alone = lm(input_ids=torch.tensor([TRUNKED + row])).logits[0, len(TRUNKED) :]
            gaps.append(float((got - alone[-len(got) :]).abs().max()))
        tree.cut()
    print(f"largest difference of a shared to a lone forward, {kind} {attention}: {max(gaps):.1e}")
    assert max(gaps) <= 1e-5 and tree.cache.get_seq_length() == len(TRUNKED)


def test_windows_and_recurrent_states_are_told():
    lm = causal("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    assert not Tree(lm, lm.get_input_embeddings()(torch.tensor([TRUNKED]))).exact


@torch.no_grad()
def test_scores_and_answers_are_those_of_generate():
    lm = causal()
    tree = Tree(lm, lm.get_input_embeddings()(torch.tensor([TRUNKED])))
    answers = [[1, 2], [3], [1, 4, 2], [2]]
    for row, answer, score in zip(ROWS, answers, tree.score(ROWS, answers)):
        chance = lm(input_ids=torch.tensor([TRUNKED + row + answer])).logits[0].log_softmax(-1)
        start = len(TRUNKED) + len(row) - 1
        assert float(score) == pytest.approx(float(sum(chance[start + k, t] for k, t in enumerate(answer))), abs=1e-5)
    for end in (2, int(lm(input_ids=torch.tensor([TRUNKED + ROWS[2]])).logits[0, -1].argmax())):
        for row, got in zip(ROWS, tree.write(ROWS, 7, end, [17, 3])):
            alone = lm.generate(torch.tensor([TRUNKED + row]), max_new_tokens=7, do_sample=False, eos_token_id=end, pad_token_id=0, suppress_tokens=[17, 3])
            alone = alone[0, len(TRUNKED) + len(row) :].tolist()
            assert got == (alone[: alone.index(end)] if end in alone else alone)


QUESTIONS = ("Is there consolidation?", "What is shown in this picture?", "Is this a PA or AP film?", "no", "Is there a nodule?", "Where is it?")


def asked(question, *pictures, id="s", before=()):
    return Sample(id, images={p.id: p for p in pictures}, turns=(*before, Turn("user", question), Turn("assistant", "truth")))


@pytest.fixture
def alone(reader, monkeypatch):
    """The same model without a shared prefix."""
    def one(sample):
        with monkeypatch.context() as patch:
            patch.setattr(type(reader), "_shared", lambda *_: None)
            (found,) = reader.predict([sample])
        return found

    return one


def same(a, b):
    assert (a.id, a.text, a.error) == (b.id, b.text, b.error) and a.probability == pytest.approx(b.probability, abs=1e-5)
    assert (a.choices or {}).keys() == (b.choices or {}).keys()
    for key, chance in (a.choices or {}).items():
        assert chance == pytest.approx(b.choices[key], abs=1e-5)


def test_together_as_one_by_one_in_any_order(reader, alone):
    first, second = tiny.picture(), tiny.picture(seed=9)
    samples = [asked(q, p, id=f"{q}{k}") for q in QUESTIONS for k, p in enumerate((first, second))]
    for order in (samples, samples[::-1]):
        found = reader.predict(order)
        assert [f.id for f in found] == [s.id for s in order]
        for sample, prediction in zip(order, found):
            same(prediction, alone(sample))
    assert len({f.probability for f in found}) > len(QUESTIONS)


def test_a_group_is_prefilled_once_and_a_bad_member_loses_nobody(reader, monkeypatch):
    fresh, trunks = tiny.picture(seed=77), []
    monkeypatch.setattr(Tree, "__init__", lambda self, lm, embeds, make=Tree.__init__: (trunks.append(embeds.shape), make(self, lm, embeds))[1])
    found = reader.predict([asked(q, fresh, id=q) for q in QUESTIONS])
    assert len(trunks) == 1 and all(f.error is None for f in found)
    found = reader.predict([asked("no", fresh, id="a"), asked("", fresh, id="b"), asked("Is it? " * 900, fresh, id="c"), asked("yes", fresh, id="d")])
    assert [(f.error or "").split(":")[0] for f in found] == ["", "BAD_ARGUMENT", "QUESTION_TOO_LONG", ""] and found[0].text and found[3].text


def test_choices_of_a_sample_are_scored(reader, alone):
    sample = Sample("m", images={"xray-1": tiny.picture()}, turns=(Turn("user", "Which one?"),), choices=("consolidation", "no", "cardiomegaly"))
    (found,) = reader.predict([sample])
    assert found.choices.keys() == set(sample.choices) and sum(found.choices.values()) == pytest.approx(1) and found.text in sample.choices
    same(found, alone(sample))


def test_several_images_and_turns(reader, alone):
    """Two images and three turns: as the path without a cache, and neither images nor turns can be confused."""
    old, new = tiny.picture("old"), tiny.picture("new", seed=3)
    history = (Turn("user", "Is there consolidation?"), Turn("assistant", "no"), Turn("user", "What is this?"), Turn("assistant", "yes no"))
    marked = "Is <|image:{}|> worse than <|image:{}|>?"
    samples = [
        asked("Is it worse?", old, new, id="two"), asked("Is it worse?", new, old, id="swapped"),
        asked(marked.format("new", "old"), old, new, id="marked"), asked(marked.format("old", "new"), old, new, id="marks swapped"),
        asked("Is it worse?", old, new, id="three turns", before=history), asked("Is it worse?", old, new, id="other turns", before=history[2:] + history[:2]),
    ]  # fmt: skip
    found = reader.predict(samples)
    for sample, prediction in zip(samples, found):
        same(prediction, alone(sample))
    yes = {f.id: f.choices["yes"] for f in found}
    assert len(set(yes.values())) == len(yes), yes
    assert reader.ask([old, new], "Is it worse?").choices["yes"] == pytest.approx(yes["two"], abs=1e-6)


def test_a_model_with_a_window_answers_without_sharing(tiny_folder, monkeypatch):
    model = load(tiny_folder, "cpu")
    monkeypatch.setattr(Tree, "exact", False)
    assert model._shared({"xray-1": tiny.picture()}, [model._encoded({"xray-1": tiny.picture()}, [Turn("user", "no")], False)]) is None
    assert model.ask(tiny.picture(), "Is it?").text in ("yes", "no")
