"""Nine yes/no questions about one image: one shared prefix, beside encoding and generating for each question.

Vision tower of 38 M parameters (336 pixels, 576 tokens) and a Qwen2 of 39 M with random weights, the same for all ways.
``loop``: the picture is prepared, encoded and prefilled for every question, and an answer generated, as the evaluation
scripts of LLaVA-Med (model_vqa.py) and ProbMed do. ``batched``: the nine prompts as one batch of transformers' generate.
Both write one token here, the fewest there are; theirs go on to an end mark.
Rules: pairs.py. Before any time counts, the log probabilities of yes and no must be those of a forward pass of each
question alone, within 1e-5, whatever the order of the questions.

    python benchmarks/shared_prefix.py [--questions 9] [--pairs 11] [--json FILE]
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import heading, pairs, ratio_text, record

from medvlm.imaging.scan import Image
from medvlm.language import IMAGE, SEG, train_tokenizer
from medvlm.predictors.native import NativeModel, _turns
from medvlm.preprocess import to_tensor
from medvlm.sample import Sample, Turn
from medvlm.vlm import MedVLM, MedVLMConfig

FINDINGS = ("consolidation", "a pleural effusion", "a pneumothorax", "cardiomegaly", "an endotracheal tube", "pulmonary edema", "a fracture", "a nodule",
            "ground-glass opacity", "atelectasis", "a central venous line", "emphysema", "scoliosis", "free air", "a hiatal hernia", "a rib lesion",
            "pneumonia", "a nasogastric tube", "a pacemaker", "pleural thickening")  # fmt: skip
FLOORS = {"loop": 6.0, "batched": 5.0}


def build(wide: int = 512, deep: int = 12, lm_wide: int = 576, lm_deep: int = 8) -> NativeModel:
    """A tower and a language model of these widths and depths, heads of 64."""
    torch.manual_seed(0)
    questions = [f"Is there {f} in this chest X-ray?" for f in FINDINGS]
    tokenizer = train_tokenizer([*questions * 3, *("yes", "no") * 50], vocab_size=512)
    tower = {"model_type": "clip_vision_model", "hidden_size": wide, "intermediate_size": 4 * wide, "num_hidden_layers": deep, "num_attention_heads": wide // 64, "image_size": 336, "patch_size": 14}
    lm = {"model_type": "qwen2", "hidden_size": lm_wide, "intermediate_size": lm_wide * 32 // 9, "num_hidden_layers": lm_deep, "num_attention_heads": lm_wide // 64, "num_key_value_heads": max(1, lm_wide // 192),
          "vocab_size": len(tokenizer), "max_position_embeddings": 2048, "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id,
          "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}  # fmt: skip
    parts = {
        "encoders": {"picture": {"file": "image", "args": {"library": "transformers", "model": tower, "size": [336, 336]}}},
        "projectors": {"picture": {"file": "mlp", "args": {"dim": wide, "lm_dim": lm_wide}}},
        "language": {"lm": {"file": "language", "args": lm}},
    }
    token = tokenizer.convert_tokens_to_ids
    model = MedVLM(MedVLMConfig(parts, {"routes": {"*": "picture"}, "reads": ["xray"]}, image_token_id=token(IMAGE), seg_token_id=token(SEG)))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    print(f"tower {count(model.encoders):.0f} M, language model {count(model.lm):.0f} M, {model.count('picture')} tokens an image")
    return NativeModel(model.eval(), tokenizer)


def ours(reader: NativeModel, pixels: np.ndarray, questions: list[str]):
    picture = Image("xray-1", pixels, None, "xray", "uint8", {})  # a new image each time: nothing is remembered
    samples = [Sample(q, images={picture.id: picture}, turns=(Turn("user", q),)) for q in questions]
    return reader.predict(samples)


def rows(reader: NativeModel, pixels: np.ndarray, questions: list[str]):
    picture = Image("xray-1", pixels, None, "xray", "uint8", {})
    tensor = to_tensor(picture, reader.vlm.encoders["picture"].spec)[0]
    encoded = [reader._encoded({picture.id: picture}, _turns(q), False) for q in questions]
    width = max(len(e.ids) for e in encoded)
    pad = reader.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(e.ids)) + e.ids for e in encoded])
    attention = torch.tensor([[0] * (width - len(e.ids)) + [1] * len(e.ids) for e in encoded])
    return {"input_ids": ids, "attention_mask": attention, "pixel_values": {"picture": torch.stack([tensor] * len(questions))}}


def generated(reader: NativeModel, pixels: np.ndarray, questions: list[str], each: int):
    for start in range(0, len(questions), each):
        reader.vlm.generate(**rows(reader, pixels, questions[start : start + each]), max_new_tokens=1, do_sample=False, pad_token_id=reader.tokenizer.pad_token_id)


@torch.no_grad()
def gate(reader: NativeModel, pixels: np.ndarray, questions: list[str]) -> float:
    """Largest difference of ours to lone forward passes, in log probability; forwards and backwards."""
    picture = Image("xray-1", pixels, None, "xray", "uint8", {})
    there = {picture.id: picture}
    talks = [(*_turns(q), Turn("assistant", a)) for q in questions for a in ("yes", "no")]
    alone = []
    for talk in talks:
        batch, _ = reader._batch(there, [talk])
        chance = reader.vlm(**{**batch.inputs(), "pixel_values": rows(reader, pixels, questions[:1])["pixel_values"]}).logits[0].float().log_softmax(-1)
        told = batch.labels[0, 1:] >= 0
        alone.append(float(chance[:-1][told].gather(1, batch.labels[0, 1:][told][:, None]).sum()))
    shared = reader._likelihood(there, talks).tolist()
    back = reader._likelihood(there, talks[::-1]).tolist()[::-1]
    return max(max(abs(a - b), abs(a - c)) for a, b, c in zip(alone, shared, back))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    reader = build()
    pixels = np.random.default_rng(0).integers(0, 255, (1, 336, 336), dtype=np.uint8)
    questions = [f"Is there {FINDINGS[k % len(FINDINGS)]} in this chest X-ray?" for k in range(args.questions)]
    gap = gate(reader, pixels, questions)
    print(f"largest difference to lone forward passes: {gap:.1e}" + ("" if gap <= 1e-5 else ": THE GATE IS CLOSED"))
    mine = partial(ours, reader, pixels, questions)
    mine()
    control = pairs(mine, mine, args.pairs)
    found = {"medvlm": {"seconds": control["ours"]}}
    for name, each in (("loop", 1), ("batched", len(questions))):
        found[name] = pairs(mine, partial(generated, reader, pixels, questions, each), args.pairs)
    print(heading(f"{args.questions} questions on one image", control))
    print("| way | seconds | times ours (10-90 %) | floor |")
    print("| --- | --- | --- | --- |")
    for name, row in found.items():
        print(f"| {name} | {row['seconds']:.3f} | {ratio_text(row)} | {FLOORS.get(name, '')} |")
    record({"questions": args.questions, "gap": gap, "control": control, "ways": found}, args.json)


if __name__ == "__main__":
    main()
