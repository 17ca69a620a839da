"""The rule labeller on sentences written for it, on whole reports, and against codes of real reports."""

import json

import pytest

from medvlm.evaluate.labeller import FINDINGS, FIVE, label, mentions, sections, sentences

E, C, O, L, ED, CO, PN, A, PX, PE, PO, F, D = FINDINGS[1:]

SENTENCES = [
    # plain presence
    ("There is a moderate left pleural effusion.", {PE: 1}),
    ("Cardiomegaly.", {C: 1}),
    ("Patchy airspace disease in the right lower lobe.", {O: 1}),
    ("Streaky retrocardiac opacities.", {O: 1}),
    ("A spiculated mass projects over the right upper lobe.", {L: 1}),
    ("Two small nodules in the lingula.", {L: 1}),
    ("Interstitial edema with central vascular congestion.", {ED: 1}),
    ("Dense consolidation of the middle lobe.", {CO: 1}),
    ("Bibasilar subsegmental atelectasis.", {A: 1}),
    ("Complete collapse of the left lower lobe.", {A: 1}),
    ("Small right apical pneumothorax.", {PX: 1}),
    ("A right hydropneumothorax has formed.", {PX: 1, PE: 1}),
    ("Biapical pleural thickening.", {PO: 1}),
    ("Healed fracture of the seventh rib.", {F: 1}),
    ("A dual-lead pacemaker is in place, its leads intact.", {D: 1}),
    ("The endotracheal tube ends 4 cm above the carina.", {D: 1}),
    ("Air-space opacity and air space opacity are the same.", {O: 1}),
    # negation before
    ("No pneumothorax.", {PX: 0}),
    ("No consolidation, effusion, or pneumothorax.", {CO: 0, PE: 0, PX: 0}),
    ("There is no evidence of acute fracture.", {F: 0}),
    ("The lungs are free of consolidation and edema.", {CO: 0, ED: 0}),
    ("Lungs are clear of infiltrate.", {O: 0}),
    ("Negative for pneumothorax or pleural effusion.", {PX: 0, PE: 0}),
    ("Hazy opacity without effusion.", {O: 1, PE: 0}),
    ("Neither effusion nor pneumothorax.", {PE: 0, PX: 0}),
    ("The film does not show a pneumothorax.", {PX: 0}),
    ("Resolution of the left effusion.", {PE: 0}),
    ("Scar rather than nodule.", {O: 1, L: 0}),
    ("No large effusion, small pneumothorax, or focal opacity.", {PE: 0, PX: 0, O: 0}),
    # negation after
    ("Pleural effusion is not seen.", {PE: 0}),
    ("Pneumothorax or effusion is not identified.", {PX: 0, PE: 0}),
    ("The right pneumothorax has resolved.", {PX: 0}),
    ("Consolidation, atelectasis, and effusion have cleared.", {CO: 0, A: 0, PE: 0}),
    ("A pneumothorax is no longer seen.", {PX: 0}),
    ("Stable cardiomegaly, pneumothorax is not seen.", {C: 1, PX: 0}),
    # the end of a scope
    ("No pneumothorax, small left pleural effusion.", {PX: 0, PE: 1}),
    ("No pneumothorax but a large effusion remains.", {PX: 0, PE: 1}),
    ("No consolidation and there is a right effusion.", {CO: 0, PE: 1}),
    ("No focal opacity other than basilar atelectasis.", {O: 0, A: 1}),
    ("No pneumothorax; moderate effusion.", {PX: 0, PE: 1}),
    ("No effusion. Mild edema.", {PE: 0, ED: 1}),
    # what looks like negation
    ("No change in the right effusion.", {PE: 1}),
    ("No significant interval change of left basilar atelectasis.", {A: 1}),
    ("Left lower lobe consolidation without significant change.", {CO: 1}),
    ("The pneumonia is not significantly improved.", {PN: 1}),
    ("No increase in the size of the effusion.", {PE: 1}),
    # doubt
    ("Possible left lower lobe pneumonia.", {PN: -1}),
    ("Opacity which may represent pneumonia.", {O: 1, PN: -1}),
    ("Findings suspicious for pulmonary edema.", {ED: -1}),
    ("Atelectasis versus infiltrate at the left base.", {A: -1, O: -1}),
    ("Basilar atelectasis or scarring.", {A: -1, O: -1}),
    ("Blunted angle, perhaps a small effusion.", {PE: -1}),
    ("A rib fracture is suspected.", {F: -1}),
    ("A nodule could be present.", {L: -1}),
    ("Cannot exclude a small pneumothorax.", {PX: -1}),
    ("A small pneumothorax is not excluded.", {PX: -1}),
    ("Pneumonia cannot be ruled out.", {PN: -1}),
    ("Underlying consolidation is difficult to exclude.", {CO: -1}),
    # heart and mediastinum
    ("Heart size is normal.", {C: 0}),
    ("The heart is not enlarged.", {C: 0}),
    ("Normal heart size and mediastinal contours.", {C: 0, E: 0}),
    ("The cardiac silhouette is mildly enlarged.", {C: 1}),
    ("Moderate enlargement of the cardiac silhouette.", {C: 1}),
    ("Borderline heart size.", {C: -1}),
    ("Heart size is at the upper limits of normal.", {C: 0}),
    ("The heart may be enlarged.", {C: -1}),
    ("The cardiomediastinal silhouette is within normal limits.", {E: 0}),
    ("Widened mediastinum.", {E: 1}),
    ("No mediastinal widening.", {E: 0}),
    ("Heart size is normal and the mediastinum is widened.", {C: 0, E: 1}),
    ("The heart is stable.", {}),
    ("Heart size normal with a prominent aortic knob.", {C: 0}),
    # not a mention
    ("Pericardial effusion.", {}),
    ("Calcified granuloma in the left upper lobe.", {}),
    ("Emphysema.", {}),
    ("Evaluation for pneumothorax is limited.", {}),
    ("The lungs are clear.", {O: 0}),
    ("Hyperexpanded lungs.", {}),
    # de-identified words stand where others stood
    ("There is XXXX pleural effusion on the XXXX.", {PE: 1}),
    ("No XXXX pneumothorax or XXXX effusion.", {PX: 0, PE: 0}),
    ("Sternotomy XXXX are intact.", {D: 1}),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences(text, expected):
    got = {f: v for f, v in label(text).items() if v is not None and f != "No Finding"}
    assert got == expected


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("Small right pleural effusion and left basilar atelectasis.", {PE: "right", A: "left"}),
        ("Bilateral pleural effusions, right greater than left.", {PE: "both"}),
        ("Pleural effusion on the left.", {PE: "left"}),
        ("Consolidation in the middle lobe.", {CO: "right"}),
        ("Opacity within the lingula.", {O: "left"}),
        ("Atelectasis at the right base, pneumothorax on the left.", {A: "right", PX: "left"}),
        ("Left-sided pneumothorax.", {PX: "left"}),
        ("A nodule is seen in the right upper lobe.", {L: "right"}),
        ("Right and left lower lobe opacities.", {O: "both"}),
        ("No left effusion.", {PE: "left"}),
        ("Cardiomegaly with right effusion.", {C: None, PE: "right"}),
        ("Pulmonary edema.", {ED: None}),
    ],
)
def test_sides(text, sides):
    assert {m.finding: m.side for m in mentions(text) if m.finding != "No Finding"} == sides


def test_mentions_stand_where_they_say():
    text = "FINDINGS: Mild edema.\nNo right\teffusion; 2.5 cm nodule.\nIMPRESSION: 1. Edema. 2. Nodule."
    found = mentions(text)
    assert [(m.finding, m.polarity, text[slice(*m.span)]) for m in found] == [
        (ED, 1, "edema"), (PE, 0, "effusion"), (L, 1, "nodule"), (ED, 1, "Edema"), (L, 1, "Nodule")]  # fmt: skip
    assert text[slice(*found[1].cue)] == "No" and found[0].cue is None
    parts = [text[a:b] for a, b in sentences(text)]
    assert all(parts[m.sentence].find(text[slice(*m.span)]) >= 0 for m in found)
    assert [m.sentence for m in found] == sorted(m.sentence for m in found)


def test_the_surest_presence_counts():
    assert label("No effusion. Possible effusion.")[PE] == -1
    assert label("Possible effusion. No edema. Effusion.")[PE] == 1
    assert label("No effusion on the right. No effusion on the left.")[PE] == 0


def test_no_finding():
    assert label("Clear lungs. Heart size is normal. No acute cardiopulmonary abnormality.")["No Finding"] == 1
    assert label("A central line ends in the SVC. No pneumothorax.") | {} == {f: None for f in FINDINGS} | {"No Finding": 1, D: 1, PX: 0}
    assert label("Possible pneumonia.")["No Finding"] == 0
    assert label("Thoracic scoliosis. The lungs are clear.")["No Finding"] == 0  # nothing of the 14, but something
    for nothing in ("", " .", "I am sorry, I do not read images."):
        assert label(nothing) == dict.fromkeys(FINDINGS)  # no words about a chest are no normal report


def test_only_what_the_report_says_itself_is_read():
    text = "INDICATION: Rule out pneumonia.\nCOMPARISON: Effusion in May.\nFINDINGS: Clear lungs.\nIMPRESSION: No effusion."
    assert {f: v for f, v in label(text).items() if v is not None} == {"No Finding": 1, O: 0, PE: 0}
    assert sections(text) == {
        "indication": "Rule out pneumonia.", "comparison": "Effusion in May.", "findings": "Clear lungs.", "impression": "No effusion."}  # fmt: skip
    assert sections("Clear lungs. Conclusion: Normal.") == {"": "Clear lungs.", "impression": "Normal."}
    assert sections("Findings: a. Impression: b. Findings: c.") == {"findings": "a. c.", "impression": "b."}


def test_the_fourteen_and_the_five():
    assert len(FINDINGS) == 14 and set(FIVE) == {C, ED, CO, A, PE}


def test_a_broken_line_is_no_end_of_a_sentence():
    assert label("There is no pleural\neffusion or\npneumothorax.") == label("There is no pleural effusion or pneumothorax.")


def test_case_does_not_matter():
    for text, _ in SENTENCES:
        assert label(text.upper()) == label(text.lower())


def test_real_reports(data):
    """Codes of the held-out reports: what the reader coded is found, and most of what is found was coded."""
    lines = [json.loads(line) for line in (data / "report_iu" / "manifest.jsonl").open(encoding="utf-8")]
    held = [r for r in lines if r["split"] == "val"]
    labels = [label(r["text"]) for r in held]
    wanted = [("Cardiomegaly", C, 0.8), ("Pleural Effusion", PE, 0.7), ("Pulmonary Atelectasis", A, 0.7), ("normal", "No Finding", 0.8)]
    for head, finding, precision in wanted:
        coded = [any(c.split("/")[0] == head for c in r["labels"]["mesh_major"]) for r in held]
        said = [x[finding] in (1, -1) for x in labels]
        both = sum(a and b for a, b in zip(coded, said))
        assert sum(coded) >= 10 and both / sum(coded) >= 0.9 and both / sum(said) >= precision, finding
