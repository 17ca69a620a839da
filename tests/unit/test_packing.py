"""Conversations that share a row: the same losses and gradients as in rows of their own, and nothing seen of one another."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm import language
from medvlm.errors import MedVLMError
from medvlm.language import SEG, apart, bins, collate, encode, share_rows
from medvlm.sample import Mask, Sample, Turn
from medvlm.train import objectives


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_bins_hold_each_once_and_no_row_too_much(lengths):
    found = bins(lengths, 40)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in found)
    assert len(found) <= -(-sum(lengths) * 11 // (40 * 9)) + 4  # best-fit decreasing: at most 11/9 of the best, and 4


def test_bins_by_hand():
    # 9 alone fills 10 best with 1; 6 with 4; 5 with 3: longest first, each into the row it fills best
    assert sorted(map(sorted, bins([1, 9, 4, 6, 3, 5], 10))) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(MedVLMError) as e:
        bins([3, 11], 10)
    assert e.value.code == "QUESTION_TOO_LONG" and "11" in e.value.message


def conversations():
    """Texts of several lengths about two pictures and about none, one that asks for a mask, one of two turns."""
    one, two = tiny.picture("one"), tiny.picture("two", seed=1)
    mask = np.zeros(one.shape[1:], bool)
    mask[20:40, 10:30] = True
    say = lambda id, images, *turns, **more: Sample(id, images={i.id: i for i in images}, turns=tuple(Turn(r, t) for r, t in turns), **more)  # noqa: E731
    return [
        say("a", [one], ("user", "Is there consolidation in this chest X-ray?"), ("assistant", "no")),
        say("b", [two], ("user", "Segment the right lung."), ("assistant", SEG), masks=(Mask("two", "right lung", mask),)),
        say("c", [], ("user", "Describe: consolidation, present, right"), ("assistant", "Consolidation on the right.")),
        say("d", [one], ("user", "Is this a PA or AP film?"), ("assistant", "PA"), ("user", "yes?"), ("assistant", "yes")),
        say("e", [one, two], ("user", "yes"), ("assistant", "no no no")),
    ]


def batches(pack):
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    samples = conversations()
    pictures = torch.stack([torch.rand(model.encoders["picture"].spec.channels, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(2)])
    where = {"one": [("picture", 0)], "two": [("picture", 1)]}
    rows = [encode(tokenizer, s, {i: model.count("picture") for i in s.images}) for s in samples]
    order, shared = list(range(len(rows))), None
    if pack:
        packed = bins([len(r.ids) for r in rows], pack)
        order, shared = [i for row in packed for i in row], [len(row) for row in packed]
    batch = collate(tokenizer, [rows[i] for i in order], [{k: where[k] for k in samples[i].images} for i in order], {"picture": pictures}, shared=shared)
    return model, batch, order


def each(model, batch, order):
    """{conversation: its mean loss}."""
    out = model(**batch.inputs())
    losses = {}
    for i, (row, first, past) in zip(order, batch.spans):
        labels = batch.labels[row, first + 1 : past]
        losses[i] = F.cross_entropy(out.logits[row, first : past - 1].float(), labels, ignore_index=-100)
    return losses, out


@pytest.mark.parametrize("pack", [60, 120, 400])
def test_a_shared_row_gives_the_losses_and_gradients_of_rows_apart(pack):
    found = {}
    for way in (None, pack):
        model, batch, order = batches(way)
        losses, out = each(model, batch, order)
        if way:
            assert len(batch.ids) < 5 and batch.positions is not None
        gradients = {}
        for i, loss in losses.items():  # one conversation's loss alone
            model.zero_grad()
            loss.backward(retain_graph=True)
            gradients[i] = torch.cat([p.grad.flatten() for p in (*model.lm.parameters(), *model.projectors.parameters()) if p.grad is not None])
        states = model.seg_states(batch, out).detach()
        found[way] = ({i: float(v.detach()) for i, v in losses.items()}, gradients, states, float(objectives.lm(model, batch, out)["lm"].detach()))
    (apart, there, seg, mean), (shared, here, drawn, again) = found[None], found[pack]
    assert apart == pytest.approx(shared, abs=1e-5) and mean == pytest.approx(again, abs=1e-5)
    for i in apart:
        torch.testing.assert_close(here[i], there[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn, seg, rtol=1e-4, atol=1e-5)


def all_as_one(numbers):
    """A broken mask: each row as one conversation."""
    return torch.tensor([[row, 0, numbers.shape[1]] for row in range(len(numbers))])[None, None]


def leak(model, batch):
    """How far the states of a row's later conversations move when the words of its first one change."""
    row, first, past = next(s for s in batch.spans if sum(o[0] == s[0] for o in batch.spans) > 1 and s[1] == 0)
    before = model(**batch.inputs()).hidden.detach()
    changed = batch.ids.clone()
    words = (batch.ids[row, first:past] != model.config.image_token_id).nonzero()[:, 0]
    changed[row, words] = (changed[row, words] + 7) % 300 + 20
    changed[changed == model.config.image_token_id] += 1
    changed[batch.ids == model.config.image_token_id] = model.config.image_token_id
    batch.ids = changed
    after = model(**batch.inputs()).hidden.detach()
    assert (after - before)[row, first:past].abs().max() > 1e-3  # its own states do move
    return float((after - before)[row, past:].abs().max())


def test_nothing_leaks_and_a_broken_mask_is_seen_to(monkeypatch):
    with torch.no_grad():
        model, batch, _ = batches(400)
        assert leak(model, batch) == 0
        model, batch, _ = batches(400)
        assert share_rows(model.lm)
        monkeypatch.setattr(language, "apart", all_as_one)
        assert leak(model, batch) > 1e-3


@pytest.mark.parametrize("kind, more", [("llama", {"num_key_value_heads": 1}), ("mistral", {"sliding_window": 3}), ("qwen3", {"head_dim": 8}),
                                        ("gemma3_text", {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]})])  # fmt: skip
def test_shared_rows_give_the_states_that_each_conversation_has_alone(kind, more):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | more))).eval()
    texts = [torch.randint(1, 50, (n,)) for n in (9, 1, 6)]
    rows, numbers = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    positions = torch.zeros(2, 12, dtype=torch.long)
    for row, start, number, text in zip((0, 0, 1), (0, 9, 0), (1, 2, 1), texts):
        there = slice(start, start + len(text))
        rows[row, there], numbers[row, there], positions[row, there] = text, number, torch.arange(len(text))
    assert apart(numbers).tolist() == [[[[0, 0, 9], [0, 9, 10], [1, 0, 6]]]]
    with torch.no_grad():
        alone = [lm(input_ids=text[None]).logits[0] for text in texts]
        assert share_rows(lm)
        together = lm(input_ids=rows, attention_mask=apart(numbers), position_ids=positions).logits
        again = lm(input_ids=rows[:1, :9], attention_mask=torch.ones(1, 9)).logits[0]  # one row, one conversation: as before
    for own, mixed in zip(alone, (together[0, :9], together[0, 9:10], together[1, :6])):
        torch.testing.assert_close(mixed, own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, alone[0], rtol=1e-5, atol=1e-6)


def test_a_model_whose_state_runs_along_the_row_is_found_out(monkeypatch):
    assert share_rows(tiny.model(tiny.tokenizer()).lm)
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4))
    assert not share_rows(mamba)
    monkeypatch.setattr(language, "apart", all_as_one)
    assert not share_rows(tiny.model(tiny.tokenizer()).lm)


def test_a_question_that_guides_the_image_shares_no_row():
    model, batch, _ = batches(400)
    model.projectors["picture"].guided = True
    with pytest.raises(MedVLMError) as e:
        model(**batch.inputs())
    assert e.value.code == "BAD_RECIPE" and "pack" in e.value.hint
