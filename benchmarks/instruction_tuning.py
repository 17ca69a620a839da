"""Instruction tuning on conversations of medical VQA's lengths: this toolkit's loop beside transformers' Trainer, same language model.

Lengths: 0 to 4 images of 256 tokens each and a lognormal number of words (median 60), 16 conversations a step, drawn at
random. ``packed``: medvlm.train with rows that conversations share, up to 16,384 tokens long. ``padded``: medvlm.train, a row each.
``Trainer``: transformers' Trainer and its padding collator, as LLaVA's. All three see every conversation twice, with AdamW,
cosine rate, clipping at 1, and bf16 autocast; what is compared is useful tokens (all but padding) a second of the steps
alone. Image tokens stand in the prompt as words, so that the language model alone is timed. Rules: pairs.py.

    python benchmarks/instruction_tuning.py [--pairs 3] [--count 160] [--json FILE]
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import heading, ratio_text, ratios, record
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from medvlm.language import encode, train_tokenizer
from medvlm.recipes.base import Recipe, Stage
from medvlm.sample import Sample, Turn
from medvlm.train.loop import train
from medvlm.vlm import MedVLMConfig

WORDS = [a + b for a in "bcdfghjklmnpqrst" for b in "aeiouy"]
BATCH, WIDTH = 16, 16384
FLOORS = {"packed": 1.9, "padded": 1.0}


def conversations(count: int) -> list[dict]:
    """Manifest rows of text: a long prompt that stands for images and question, a short answer."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        words = int(rng.integers(0, 5)) * 256 + max(8, int(rng.lognormal(np.log(60), 0.8)))
        said = [WORDS[k] for k in rng.integers(0, len(WORDS), words)]
        answer = max(1, int(0.06 * words))
        found.append({"id": str(i), "image": None, "modality": "other", "split": "train",
                      "qa": [{"qid": f"q{i}", "question": " ".join(said[answer:]), "answer": " ".join(said[:answer])}]})  # fmt: skip
    return found


def shape(tokenizer) -> dict:
    return {"model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 4096, "vocab_size": len(tokenizer), "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50, vocab_size=700)
    rows = conversations(args.count)
    samples = [Sample(r["id"], turns=(Turn("user", q["question"]), Turn("assistant", q["answer"]))) for r in rows for q in r["qa"]]
    encoded = [encode(tokenizer, s, {}, limit=4096) for s in samples]
    useful, steps = 2 * sum(len(e.ids) for e in encoded), 2 * args.count // BATCH
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data/words"
        folder.mkdir(parents=True)
        (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))

        def ours(pack: int | None) -> float:
            recipe = Recipe(
                "tuning", "a benchmark", lambda t: MedVLMConfig({"language": {"lm": {"file": "language", "args": shape(t)}}}), lambda group, name, split: group,
                lambda texts, args: tokenizer, (Stage("tune", "lm", ("*",), {"words": 1.0}, lr=1e-4, steps=steps, batch=BATCH, turns=1, pack=pack, augment=0.0, warmup=2),),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as out:
                train(recipe, Path(place) / "data", Path(out) / "run", device="cpu", save_minutes=60)
                last = [json.loads(x) for x in (Path(out) / "run/log.jsonl").read_text().splitlines() if '"train"' in x][-1]
            return steps * BATCH / last["rate"]

        def theirs() -> float:
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape(tokenizer)))
            options = TrainingArguments(
                output_dir=place, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1.0,
                bf16=True, use_cpu=True, report_to=[], save_strategy="no", logging_steps=20, disable_tqdm=True, optim="adamw_torch",
            )  # fmt: skip
            data = [{"input_ids": e.ids, "attention_mask": [1] * len(e.ids), "labels": e.labels} for e in encoded]
            return Trainer(lm, options, DataCollatorForSeq2Seq(tokenizer, padding=True), data).train().metrics["train_runtime"]

        ways = {"packed": lambda: ours(WIDTH), "padded": lambda: ours(None), "Trainer": theirs, "Trainer again": theirs}
        seconds = {name: [] for name in ways}
        for turn in range(args.pairs + 1):  # the first is for warming up
            for name in sorted(ways, reverse=turn % 2 == 1):
                spent = ways[name]()
                if turn:
                    seconds[name].append(spent)
    found = {name: ratios(seconds[name], seconds["Trainer"]) for name in ("packed", "padded")}
    control = ratios(seconds["Trainer again"], seconds["Trainer"])
    longest = [max(len(encoded[i].ids) for i in part) for part in np.random.default_rng(0).permutation(len(encoded)).reshape(-1, BATCH)]
    print(heading(f"{args.count} conversations, {useful // 2} tokens, {useful / 2 / (BATCH * sum(longest)):.0%} of a padded batch", control))
    print("| way | useful tokens a second | times Trainer (10-90 %) | floor |\n| --- | --- | --- | --- |")
    for name in ways:
        rate = f"{useful / float(np.median(seconds[name])):,.0f}"
        print(f"| {name} | {rate} | {ratio_text(found[name]) if name in found else ''} | {FLOORS.get(name, '')} |")
    record({"useful": useful, "control": control, **found}, args.json)


if __name__ == "__main__":
    main()
