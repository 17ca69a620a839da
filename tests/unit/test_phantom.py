"""Made anatomy: sides in the patient's geometry, projections against the analytic integral, words against what was drawn."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from medvlm.datasets import facts, instruct, manifest, mirror, phantom
from medvlm.datasets.checks import refuse_leaks
from medvlm.datasets.phantom_canvas import Canvas, egg, turned_by
from medvlm.datasets.phantom_eye import photographed
from medvlm.datasets.phantom_film import WATER, attenuation, project
from medvlm.errors import ModelError, UsageError
from medvlm.evaluate.perturb import mirrored
from medvlm.imaging.scan import Volume
from medvlm.sample import box_of

SMALL = {"chest-xray": (96, 112), "chest-ct": (24, 56, 64), "abdomen-ct": (32, 64, 64), "head-ct": (32, 56, 56), "abdomen-mr": (32, 64, 64),
         "head-mr": (32, 56, 56)}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("phantom")
    return {kind: phantom.write(top / kind, 28 if kind == "chest-xray" else 10, kind, 2, size) for kind, size in SMALL.items()}


@pytest.fixture(scope="module")
def made(folders):
    """{kind: [(row, image, {name: mask})]}, volumes turned to SPL."""
    found = defaultdict(list)
    for kind, folder in folders.items():
        for row in manifest.rows(folder):
            (image,) = manifest.open_images(row)
            masks = {m.label: m.array for m in manifest.read_masks(row, image)}
            if isinstance(image, Volume):
                masks = {n: image.with_voxels(m[None]).reorient("SPL").voxels[0] for n, m in masks.items()}
            found[kind].append((row, image.reorient("SPL") if isinstance(image, Volume) else image, masks))
    return found


def middle(mask):
    """(d,) h, w of its middle, as a share of the array's size."""
    return np.argwhere(mask).mean(0) / np.array(mask.shape)


def grid(n, half):
    axis = np.linspace(-half, half, n, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij")), [2 * half / (n - 1)] * 3


@pytest.mark.parametrize("turn", [None, turned_by(z=30, y=-20, x=50)])
def test_the_projection_of_an_ellipsoid_is_its_line_integral(turn):
    points, step = grid(61, 60)
    canvas, radii = Canvas(points, step), np.array((25.0, 40.0, 30.0))
    canvas.blob((3, -4, 5), radii, 0, 7, turn=turn)
    found = project(canvas.hu, step[1])
    # |R' (p - c) / r| = 1 along y: a t^2 + 2 b t + c = 1
    shape = np.eye(3) if turn is None else turn
    inverse = shape @ np.diag(1 / radii**2) @ shape.T
    z, x = points[0, :, 0] - 3, points[2, :, 0] - 5
    a, b = inverse[1, 1], inverse[1, 0] * z + inverse[1, 2] * x
    c = inverse[0, 0] * z * z + 2 * inverse[0, 2] * z * x + inverse[2, 2] * x * x
    length = 2 * np.sqrt(np.maximum(b * b - a * (c - 1), 0)) / a / 10  # cm
    off = np.abs(found / WATER - length)
    assert off[length > 3].max() < 0.04 and off.mean() < 0.01 and (length > 3).sum() > 200  # voxels of 2 mm: at the rim a ray passes one or misses it
    assert found.max() == pytest.approx(WATER * length.max(), rel=0.002)
    volume = 4 / 3 * np.pi * radii.prod()
    assert (canvas.tissue == 7).sum() * np.prod(step) == pytest.approx(volume, rel=0.02)
    assert project(canvas.hu, step[1]).sum() * step[0] * step[2] / 100 == pytest.approx(WATER * volume / 1000, rel=0.01)


def test_attenuation_is_that_of_the_tables():
    assert np.allclose(attenuation(np.array([-1000, -2000, 0, 1500], np.float32)), [0, 0, 0.206, 0.593], atol=1e-3)  # cortical bone: 0.60


def test_distances_are_counted_in_steps():
    points, step = grid(41, 40)
    far = egg(points, np.array((2.0, 2.0, 2.0), np.float32), (0, 0, 0), (20, 20, 20))
    away = np.linalg.norm(points, axis=0)
    near = np.abs(away - 20) < 4
    assert np.allclose(far[near], (away[near] - 20) / 2, atol=0.25)
    box = egg(points, np.array((2.0, 2.0, 2.0), np.float32), (0, 0, 0), (20, 10, 20), power=4)
    assert box[20, 20, 20] < -2 and box[20, 26, 20] > 0 > box[28, 20, 28]  # fuller than an ellipsoid


def test_tubes_have_their_length_and_girth():
    points, step = grid(61, 60)
    canvas = Canvas(points, step)
    canvas.tube([(-40, -30, 0), (40, 30, 0)], 8, 50, 9)
    expected = np.pi * 64 * 100 + 4 / 3 * np.pi * 512
    assert (canvas.tissue == 9).sum() * np.prod(step) == pytest.approx(expected, rel=0.05)
    assert canvas.hu[30, 30, 30] == 50 and canvas.hu[0, 0, 0] == -1000


def test_organs_lie_on_their_side_of_the_patient(made):
    """LPS: w grows to the patient's left, h to the back, d to the head."""
    higher = []
    for kind in ("abdomen-ct", "abdomen-mr"):
        for _, image, masks in made[kind]:
            assert image.orientation == "SPL"
            spine = middle(np.logical_or.reduce([m for n, m in masks.items() if n.startswith("vertebrae")]))
            place = {n: middle(m) for n, m in masks.items() if m.any()}
            assert place["liver"][2] < spine[2] - 0.08 and place["spleen"][2] > spine[2] + 0.08 and place["stomach"][2] > spine[2]
            assert place["kidney_right"][2] < spine[2] < place["kidney_left"][2]
            higher.append(place["kidney_left"][0] - place["kidney_right"][0])
            assert place["gallbladder"][2] < spine[2] and place["inferior_vena_cava"][2] < place["aorta"][2]
            assert all(place[n][1] < spine[1] for n in ("liver", "stomach", "aorta")) and place["kidney_left"][0] < place["spleen"][0]
    assert np.mean(higher) > 0.02 and np.mean(np.array(higher) > 0) > 0.6  # the left one, as a rule
    for _, _, masks in made["chest-ct"]:
        place = {n: middle(m) for n, m in masks.items() if m.any()}
        assert place["heart"][2] > place["spinal_cord"][2] and place["heart"][1] < place["spinal_cord"][1] and place["sternum"][1] < place["heart"][1]
        assert place["lung_lower_lobe_right"][2] < place["heart"][2] < place["lung_lower_lobe_left"][2]
        assert place["lung_lower_lobe_right"][0] < place["lung_upper_lobe_right"][0] and place["rib_left_8"][2] > place["rib_right_8"][2]
        assert place["clavicula_left"][2] > place["clavicula_right"][2] and place["vertebrae_T4"][0] > place["vertebrae_T8"][0]
    for kind in ("head-ct", "head-mr"):
        for _, _, masks in made[kind]:
            assert middle(masks["lateral_ventricle_left"])[2] > middle(masks["lateral_ventricle_right"])[2]
            if "eye_left" in masks and "eye_right" in masks:
                assert middle(masks["eye_left"])[2] > middle(masks["eye_right"])[2] and middle(masks["eye_left"])[1] < middle(masks["brain"])[1]


def test_organs_have_the_size_of_organs(made):
    """Millilitres; ICRP Publication 89 has 1.4 to 1.8 kg, 130 to 150 g, 140 to 155 g, 1.3 to 1.45 kg for adults of one size."""
    limits = {"liver": (700, 2300), "spleen": (60, 320), "kidney_left": (80, 260), "brain": (900, 1700), "heart": (300, 1500)}
    for kind, found in made.items():
        for row, image, masks in found:
            for name, (low, high) in limits.items() if kind != "chest-xray" else ():
                mask = masks.get(name)
                if mask is not None and not any(mask[i].any() for i in (0, -1)) and "cardiomegaly" not in str(row["objects"]):
                    assert low < mask.sum() * np.prod(image.spacing) / 1000 < high, (row["id"], name)


def test_ct_is_in_hu_and_mr_shows_tissue(made):
    for row, image, masks in made["abdomen-ct"]:
        hu = {n: float(np.median(image.voxels[0][m])) for n, m in masks.items() if m.sum() > 20}
        assert image.unit == "HU" and image.voxels.dtype == np.int16 and image.voxels.min() >= -1024, row["id"]
        assert 35 < hu["liver"] < 140 and -960 < hu["lung_lower_lobe_right"] < -650 and hu["vertebrae_T12"] > 90
    for row, image, masks in made["head-mr"]:
        bright = {n: float(np.median(image.voxels[0][masks[n]])) for n in ("brain", "skull", "lateral_ventricle_left")}
        assert bright["skull"] < bright["brain"] and (bright["lateral_ventricle_left"] > bright["brain"]) == (row["labels"]["sequence"] == "T2")


def test_pictures_show_the_patients_right_on_their_left(made):
    volume = Counter()
    for row, image, masks in made["chest-xray"]:
        right, left, heart = masks["right_lung"], masks["left_lung"], masks["cardiomediastinum"]
        assert middle(right)[1] < middle(heart)[1] < middle(left)[1] and (right & left).sum() < 0.02 * right.sum()
        spine = middle(masks["airways"])[1]
        assert middle(heart)[1] > spine - 0.03 and masks["airways"].any() and row["labels"]["view"] in ("PA", "AP")
        assert (heart & left).sum() > 0.1 * heart.sum()  # what lies behind the heart is lung
        volume[bool(middle(heart)[1] > spine)] += 1
        seen = image.pixels[0]
        assert image.shape == (1, 96, 112) and seen.dtype == np.uint8 and seen[heart].mean() > seen[(left | right) & ~heart].mean()
    assert volume[True] >= 0.9 * sum(volume.values())


def test_enlarged_hearts_are_wider(made):
    ratio = defaultdict(list)
    for row, _, masks in made["chest-xray"]:
        wide = [np.ptp(np.flatnonzero(m.any(0))) + 1 for m in (masks["cardiomediastinum"], masks["right_lung"] | masks["left_lung"])]
        ratio[row["findings"]["cardiomegaly"]].append(wide[0] / wide[1])
    assert max(ratio[0]) < 0.57 < np.median(ratio[1]) and max(ratio[0]) < min(ratio[1])


def test_masks_boxes_and_words_agree_with_what_was_drawn(made):
    opposite = {"right": "left", "left": "right"}
    sided = Counter()
    for kind, found in made.items():
        for row, _, masks in found:
            drawn = {o["finding"]: o for o in row["objects"]}
            assert {f for f, v in row["findings"].items() if v == 1} == set(drawn) and set(row["findings"]) == set(phantom.FINDINGS[kind])
            for name, one in drawn.items():
                mask = masks.get(phantom.OUTLINED.get(name, name) if kind == "chest-xray" else name)
                assert (mask is None or not mask.any()) == (name in phantom.SHAPELESS), (row["id"], name)
                side = one.get("side")
                if mask is None or side not in opposite:
                    continue
                if kind == "chest-xray":
                    lungs = {s: (mask & masks[f"{s}_lung"]).sum() for s in opposite}
                    assert lungs[side] > 4 * lungs[opposite[side]], (row["id"], name)
                elif kind.startswith(("chest", "abdomen")):
                    spine = middle(masks["spinal_cord"])[2]
                    assert (middle(mask)[2] < spine) == (side == "right"), (row["id"], name)
                else:
                    assert (middle(mask)[2] < middle(masks["brain"] | masks["skull"])[2]) == (side == "right"), (row["id"], name)
                sided[kind] += 1
            for name in ("consolidation", "pneumothorax", "liver lesion", "hemorrhage"):
                assert name in drawn or not masks.get(name, np.zeros(1)).any()
            for box in row.get("boxes", ()):
                (top, left), (bottom, right) = box_of(masks[box["label"]])
                assert box["xyxy"] == [left, top, right, bottom]
    assert all(sided[kind] >= 3 for kind in SMALL)


def test_every_answer_is_true_and_pairs_are_one_of_each(made):
    for found in made.values():
        for row, _, masks in found:
            drawn, pairs = {o["finding"]: o for o in row["objects"]}, defaultdict(list)
            for qa in row["qa"]:
                pairs[qa["pair"]].append(qa["answer"])
                about, text = qa["category"][0], qa["question"]
                name = next((f for f in row["findings"] if f in text), None)
                if about == "finding":
                    true = name in drawn
                elif about in ("side", "zone"):
                    true = drawn[name][about] in text.replace("bright", "")
                else:
                    organ = next(n for n in phantom.ORGANS if f" {phantom.sentences.spoken(n)}?" in text)
                    known = {"heart": "cardiomediastinum", "trachea": "airways"} if row["modality"] == "xray" else {}
                    true = bool(masks.get(known.get(organ, organ), np.zeros(1)).any())
                assert (qa["answer"] == "yes") == true, (row["id"], qa)
            assert all(sorted(answers) == ["no", "yes"] for answers in pairs.values())


def test_reports_say_what_is_there_with_the_negatives(made):
    for found in made.values():
        for row, _, _ in found:
            there = [s for s in row["sections"]["findings"].split(". ") if not s.startswith(("No ", "There is no "))]
            lacking = " ".join(s for s in row["sections"]["findings"].split(". ") if s.startswith(("No ", "There is no "))).lower()
            for name, value in row["findings"].items():
                assert any(name in s.lower() for s in there) == (value == 1) and (name in lacking) == (value == 0)
            for one in row["objects"]:
                said = next(s for s in there if one["finding"] in s.lower())
                if one.get("side") in ("right", "left"):
                    assert one["side"] in said.replace("bright", "") and ({"right": "left", "left": "right"}[one["side"]] not in said)
            assert row["text"] == f"FINDINGS: {row['sections']['findings']} IMPRESSION: {row['sections']['impression']}" and row["synthetic"] is True


def test_findings_come_equally_often_and_patients_keep_their_split(folders):
    made = phantom._Set("chest-xray", 0, phantom.SIZE)
    count = Counter(f for found in phantom._dealt(made, ["chest-xray"] * 350) for f in found)
    assert max(count.values()) - min(count.values()) <= 2 and 0.25 < count["nodule"] / 350 < 0.32
    deals = phantom._dealt(made, ["chest-ct", "head-ct"] * 40)
    assert all(set(f) <= set(phantom.FINDINGS[k]) and len(set(f)) == len(f) for k, f in zip(["chest-ct", "head-ct"] * 40, deals))
    refuse_leaks({name: manifest.samples(folders["chest-xray"], name) for name in ("train", "val", "test")})


def test_the_toolkit_says_the_same_sides(folders, made):
    """By another road than the words: outlines and geometry, through conversations."""
    asked = Counter()
    for kind in ("chest-xray", "abdomen-ct"):
        for row in manifest.rows(folders[kind]):
            group = manifest.row_group(row, pixels=True)
            case = facts.case_of(group)
            assert facts.part(case) == kind.split("-")[0] and (facts.view(case) == row["labels"].get("view"))
            for one in row["objects"]:
                found = facts.side(case, one["finding"])
                assert found in (one.get("side"), None) or not one.get("side"), (row["id"], one)
                asked[kind] += found is not None
            talks = list(instruct.conversations(group))
            located = {s.question: s.answer for s in talks if s.meta["kind"] == "locate"}
            for one in row["objects"]:
                said = [a for q, a in located.items() if one["finding"] in q and q.startswith(("Where", "Locate", "In which"))]
                assert not one.get("side") or all(a.startswith("In both") or one["side"] in a or a.startswith("In the") for a in said)
            if kind == "abdomen-ct":
                said = {name: {a for q, a in located.items() if q.endswith((f" the {name}?", f" the {name}.", f" the {name} lie?"))} for name in ("spleen", "liver")}
                assert said["spleen"] == {"On the patient's left side."} and "On the patient's left side." not in said["liver"]
            else:
                segments = {s.question for s in talks if s.meta["kind"] == "segment"}
                assert any("right lung" in q for q in segments) and any("heart and mediastinum" in q for q in segments)
    assert asked["chest-xray"] > 15 and asked["abdomen-ct"] > 2


def test_the_mirror_image_of_a_sample_is_consistent(folders):
    swapped = {"right_lung": "left_lung", "left_lung": "right_lung"}
    twins = 0
    for row in manifest.rows(folders["chest-xray"]):
        for s in manifest.row_samples(row):
            if s.question and s.meta["category"] == ["side"]:
                twin = mirror.mirror(s)
                assert twin.question == s.question.translate(str.maketrans({})).replace("left", "\0").replace("right", "left").replace("\0", "right")
                assert twin.answer == s.answer
                twins += 1
            elif s.masks and s.masks[0].label in swapped:
                twin, (image,) = mirror.mirror(s), s.images.values()
                assert twin.masks[0].label == swapped[s.masks[0].label] and (twin.masks[0].array == s.masks[0].array[:, ::-1]).all()
                assert (next(iter(twin.images.values())).pixels == mirrored(image).pixels).all()
    assert twins > 10
    sample = next(s for row in manifest.rows(folders["abdomen-ct"]) for s in manifest.row_samples(row) if s.masks and s.masks[0].label == "kidney_left")
    twin = mirror.mirror(sample)
    (before,), (after,) = sample.images.values(), twin.images.values()
    axis = next(i for i, letter in enumerate(before.orientation) if letter in "LR")
    assert twin.masks[0].label == "kidney_right" and (twin.masks[0].array == np.flip(sample.masks[0].array, axis)).all()
    assert (after.voxels == np.flip(before.voxels, axis + 1)).all()


def test_the_disc_lies_towards_the_nose_and_vessels_are_dark():
    """Of a right eye the nose is on the right of the picture."""
    from scipy.ndimage import gaussian_filter

    sides, apart = Counter(), 0
    for seed in range(30):
        picture, vessels, eye = photographed((128, 160), np.random.default_rng(seed))
        assert picture.shape == (128, 160, 3) and picture.dtype == np.uint8 and vessels.shape == (128, 160) and 0.02 < vessels.mean() < 0.25
        assert picture[vessels][:, 1].mean() < 0.9 * picture[~vessels & (picture[..., 0] > 30)][:, 1].mean()  # darker than the ground in green
        disc = np.unravel_index(gaussian_filter(picture[..., 1].astype(float), 5).argmax(), vessels.shape)
        off = (disc[1] - 80) / 64
        if abs(off) > 0.25:
            assert (off > 0) == (eye == "right"), seed
            apart += 1
        sides[eye] += 1
    assert apart > 8 and min(sides.values()) > 8


def test_whose_eye_it_is_is_asked_in_pairs_and_follows_the_mirror(tmp_path):
    folder, eyes = phantom.write(tmp_path / "eyes", 10, "eye-fundus", 2, (96, 96)), set()
    for row in manifest.rows(folder):
        assert row["modality"] == "fundus" and row["labels"]["body_part"] == "eye" and row["synthetic"] is True
        eye = row["labels"]["eye"]
        eyes.add(eye)
        assert {q["question"]: q["answer"] for q in row["qa"]} == {f"Is this the {side} eye?": "yes" if side == eye else "no" for side in ("right", "left")}
        asked = [s for s in manifest.row_samples(row) if s.question]
        twins = [mirror.mirror(s) for s in asked]
        assert len({q["pair"] for q in row["qa"]}) == 1 and [t.answer for t in twins] == [s.answer for s in asked] and {t.question for t in twins} == {s.question for s in asked}
        (picture,) = manifest.open_images(row)
        assert [m.label for m in manifest.read_masks(row, picture)] == ["vessel"]
    assert eyes == {"right", "left"}


def test_same_seed_same_bytes(tmp_path):
    for kind, size in (("chest-xray", (64, 64)), ("head-mr", (16, 48, 48)), ("eye-fundus", (64, 64))):
        once, again, other = ({p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in (
            phantom.write(tmp_path / f"{kind}{name}", 10, kind, seed, size) for name, seed in (("a", 3), ("b", 3), ("c", 4))))  # fmt: skip
        assert once == again and not {v for k, v in once.items() if "images" in str(k)} & set(other.values())


def test_what_takes_room_in_the_head_pushes_the_middle_away(made):
    met = 0
    for kind in ("head-ct", "head-mr"):
        for row, image, masks in made[kind]:
            drawn = {o["finding"]: o for o in row["objects"]}
            horns = np.argwhere(masks["lateral_ventricle_left"] | masks["lateral_ventricle_right"]).mean(0)[2]
            skull = np.argwhere(masks["skull"]).mean(0)[2]
            off = (horns - skull) * image.spacing[2]
            if "midline shift" in drawn:
                assert (off > 1.5) if drawn["midline shift"]["side"] == "left" else (off < -1.5), (row["id"], off)
                met += 1
                assert all(o["side"] != drawn["midline shift"]["side"] for f, o in drawn.items() if f != "midline shift")
            else:
                assert abs(off) < 4
    assert met >= 4


def test_volumes_are_stored_along_different_axes(folders):
    stored = {image.orientation for kind in SMALL if kind != "chest-xray" for row in manifest.rows(folders[kind]) for image in manifest.open_images(row)}
    assert len(stored) >= 4


@pytest.mark.parametrize("wrong", [{"count": 9}, {"seed": -1}, {"kind": "knee-ct"}, {"size": (64, 64)}, {"kind": "chest-xray", "size": (8, 64)},
                                   {"kind": "head-ct", "size": (64, 64)}])  # fmt: skip
def test_what_cannot_be_made_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError) as error:
        phantom.write(tmp_path / "new", **wrong)
    assert error.value.code == "BAD_ARGUMENT" and not (tmp_path / "new").exists()


def test_the_command(tmp_path, capsys):
    assert phantom.main([str(tmp_path / "set"), "--count", "12", "--kind", "head-ct", "--size", "16", "48", "48", "--seed", "2"]) == 0
    assert "12 images" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "set/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["modality"] for row in rows} == {"ct"} and rows[0]["id"] == "phantom-head-ct-s2-00000"
    assert phantom.main([str(tmp_path / "set"), "--count", "10"]) == 2 and "OUTPUT_EXISTS" in capsys.readouterr().err


def test_situs_is_never_claimed_to_be_mirrored(folders):
    """A text that names a side and an unpaired organ has no mirror image; those refused are refused for that."""
    for row in manifest.rows(folders["abdomen-ct"]):
        for s in manifest.row_samples(row):
            try:
                mirror.mirror(s)
            except ModelError as error:
                assert error.code == "FLIP_REFUSED"
