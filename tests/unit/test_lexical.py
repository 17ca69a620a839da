"""BLEU, ROUGE-L, METEOR and CIDEr-D by hand and against the libraries that define them."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate.lexical import bleu_counts, bleu_of, cider_d, corpus_bleu, meteor, rouge_l, sentence_bleu, tokens

WORDS = "the a heart lung lungs lobe clear normal size is are effusion effusions enlarged small no".split()


def pairs(count: int, longest: int = 14) -> list[tuple[str, str]]:
    rng = random.Random(3)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(2)) for _ in range(count)]


def test_tokens():
    assert tokens("Heart-size: NORMAL, 1.5 cm (T8).") == ["heart", "size", "normal", "1.5", "cm", "t8"]
    assert tokens("Épanchement à gauche") == ["épanchement", "à", "gauche"] and tokens("右肺 CT") == ["右", "肺", "ct"]
    assert tokens(" ...\n_") == []


def test_bleu_by_hand():
    hypothesis, reference = "The heart is enlarged.", ["the heart is normal"]
    assert sentence_bleu(hypothesis, reference, 1) == pytest.approx(3 / 4)
    assert sentence_bleu(hypothesis, reference, 2) == pytest.approx(math.sqrt(3 / 4 * 2 / 3))  # the-heart, heart-is of 3
    assert sentence_bleu(hypothesis, reference, 4) == 0  # the one 4-gram is not there
    assert sentence_bleu(hypothesis, reference, 4, smooth=True) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)  # 0/1 counts as a half
    assert sentence_bleu("the heart", reference, 2) == pytest.approx(math.exp(1 - 4 / 2))  # all there, but half as long
    assert sentence_bleu("heart heart heart", ["the heart"], 1) == pytest.approx(1 / 3)  # a word counts as often as in the reference
    assert sentence_bleu("no effusion", ["effusion", "no change"], 1) == 1.0  # each word is in one of the references
    # 3 of 4 and 2 of 2 words, 2 of 3 and 1 of 1 pairs
    assert corpus_bleu([hypothesis, "clear lungs"], [*reference, "clear lungs"], 2) == pytest.approx(math.sqrt(5 / 6 * 3 / 4))


def test_rouge_l_by_hand():
    hypothesis, reference = "heart size is normal", "the heart is of normal size"  # heart, is, normal: 3 of 4 and of 6
    assert rouge_l(hypothesis, reference) == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert rouge_l(hypothesis, reference, beta=1.2) == pytest.approx(2.44 * 0.75 * 0.5 / (0.5 + 1.44 * 0.75))
    assert rouge_l("effusion", "clear lungs") == 0 and rouge_l("lungs clear", "clear lungs") == 0.5


def test_meteor_by_hand():
    # clear, and lungs by its stem: P 2/3, R 2/4, apart from each other: two chunks of two matches, penalty 0.5
    assert meteor("lungs are clear", "the lung is clear") == pytest.approx(0.5 * (1 / 3) / (0.9 * 2 / 3 + 0.1 / 2))
    assert meteor("clear lungs bilaterally", "clear lungs bilaterally") == pytest.approx(1 - 0.5 / 27)  # one chunk of three
    assert meteor("big heart", "enlarged heart") == pytest.approx(0.5 * 0.25 / 0.5)  # big is a synonym, which is not looked up: one chunk of one
    assert meteor("effusion", "clear") == 0


def test_meteor_is_that_of_nltk_without_synonyms():
    from nltk.translate.meteor_score import align_words, single_meteor_score

    class Empty:
        def synsets(self, word):
            return []

    for hypothesis, reference in pairs(60):
        words, other = hypothesis.split(), reference.split()
        assert meteor(hypothesis, reference) == pytest.approx(single_meteor_score(other, words, wordnet=Empty()), abs=1e-12)
        matches = align_words(words, other, wordnet=Empty())[0]
        chunks = sum(i == 0 or (b[0] - a[0], b[1] - a[1]) != (1, 1) for i, (a, b) in enumerate(zip([None, *matches], matches)))
        p, r = len(matches) / len(words), len(matches) / len(other)
        by_hand = (1 - 0.5 * (chunks / len(matches)) ** 3) * p * r / (0.9 * p + 0.1 * r) if matches else 0
        assert meteor(hypothesis, reference) == pytest.approx(by_hand)


def test_cider_d_by_hand():
    # two references without a common word: every n-gram weighs log 2, and the length penalty is exp(-difference^2 / 72)
    same, half, longer = "clear lungs", "big lungs", "big big heart"
    assert cider_d([same, half], ["clear lungs", "big heart"]) == pytest.approx([10 * (1 + 1 + 0 + 0) / 4, 10 * 0.5 / 4])
    got = cider_d([same, longer], ["clear lungs", "big heart"])[1]  # big counts once of twice; bigrams: 1 of 2; lengths 2 and 1 bigrams
    assert got == pytest.approx(10 * math.exp(-1 / 72) * (2 / math.sqrt(5 * 2) + 1 / math.sqrt(2)) / 4)
    # "the" stands in two of three references and weighs log 3/2, "lungs" log 3; "rib" is in one too
    common, rare = math.log(3 / 2) ** 2, math.log(3) ** 2
    got = cider_d(["the rib", "the heart", "a rib"], ["the lungs", "the heart", "a rib"])
    assert got == pytest.approx([10 * common / (common + rare) / 4, 5, 5])
    assert cider_d(["clear lungs"], ["clear lungs"]).tolist() == [0]  # one reference: nothing is rare


@pytest.mark.filterwarnings("ignore:(?s).*overlaps:UserWarning")
def test_bleu_is_that_of_sacrebleu_and_nltk():
    import sacrebleu
    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as nltk_bleu

    hypotheses, references = zip(*pairs(80))
    for order in (1, 2, 4):
        whole = sacrebleu.BLEU(max_ngram_order=order, smooth_method="none", tokenize="none", force=True).corpus_score(hypotheses, [references])
        assert corpus_bleu(hypotheses, references, order) == pytest.approx(whole.score / 100)
    for h, r in zip(hypotheses, references):
        assert sentence_bleu(h, [r], 4, smooth=True) == pytest.approx(sacrebleu.sentence_bleu(h, [r], tokenize="none").score / 100)
        theirs = nltk_bleu([r.split()], h.split(), (0.5, 0.5), smoothing_function=SmoothingFunction().method0)
        assert sentence_bleu(h, [r], 2) == pytest.approx(theirs, abs=1e-12)
    punctuated = [h.capitalize() + "." for h in hypotheses]
    assert corpus_bleu(punctuated, references) == corpus_bleu(hypotheses, references)


def test_counts_of_a_subset_sum_to_its_bleu():
    hypotheses, references = zip(*pairs(30, 30))
    counts, picked = bleu_counts(hypotheses, references), [3, 3, 7, 20, 29]
    assert bleu_of(counts[picked]) == pytest.approx(corpus_bleu([hypotheses[i] for i in picked], [references[i] for i in picked]))


def test_rouge_l_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    for h, r in pairs(60):
        assert rouge_l(h, r) == pytest.approx(scorer.score(r, h)["rougeL"].fmeasure, abs=1e-12)


def test_empty_texts_count_and_empty_references_do_not():
    full = "clear lungs and a normal heart"
    for metric in (lambda h, r: sentence_bleu(h, [r]), rouge_l, meteor):
        assert metric("", full) == metric(" .", full) == 0
        assert math.isnan(metric(full, "")) and math.isnan(metric("", " - "))
    values = cider_d([full, "", full], [full, "no effusion", ""])
    assert values[0] > 0 and values[1] == 0 and math.isnan(values[2])
    assert np.isnan(bleu_counts([full], [""])).all() and math.isnan(corpus_bleu(["x"], [""])) and math.isnan(corpus_bleu([], []))
    assert corpus_bleu([full, full], [full, ""]) == 1 and corpus_bleu([full, ""], [full, full]) == pytest.approx(math.exp(1 - 12 / 6))
    assert math.isnan(sentence_bleu(full, [])) and sentence_bleu(full, ["", full]) == pytest.approx(1)


def test_all_is_best_for_the_reference_itself():
    references = [r for _, r in pairs(12) if len(r.split()) >= 4]
    wrong = references[1:] + references[:1]
    assert corpus_bleu(references, references) == pytest.approx(1) and rouge_l(references[0], references[0]) == 1
    assert (cider_d(references, references) > cider_d(wrong, references)).all() and cider_d(references, references) == pytest.approx(10)


def test_bad_calls_are_refused():
    with pytest.raises(MedVLMError, match="2 texts"):
        cider_d(["a", "b"], ["a"])
    with pytest.raises(MedVLMError, match="order 0"):
        sentence_bleu("a", ["a"], 0)


def test_importing_it_loads_no_scorer():
    code = "import sys, medvlm.evaluate.lexical; print([m for m in ('nltk', 'sacrebleu', 'rouge_score', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
