"""Webdataset shards: what was written comes back, in an order that can be taken up anywhere, or is refused by name."""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from itertools import islice

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from medvlm.cli import main
from medvlm.datasets import checks, shards
from medvlm.datasets.base import open_data
from medvlm.errors import FileError, ModelError, UsageError
from medvlm.imaging import limits


def make(folder, count=60, **more):
    folder.mkdir()
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        Picture.fromarray(rng.integers(0, 255, (6, 8), np.uint8)).save(folder / f"DOE JANE {i}.v1.png")
        Picture.fromarray(rng.random((6, 8)) > 0.5).save(folder / f"masks/{i}.png")
        rows.append({"id": f"case.{i}/ü", "image": f"DOE JANE {i}.v1.png", "modality": "xray", "split": ("train", "train", "val")[i % 3], "patient": f"p{i // 2}",
                     "text": f"Report {i}: größer." if i % 2 else None, "findings": {"pneumonia": i % 2, "normal": None}, "note": {"n": i},
                     "qa": [{"qid": f"{i}-{k}", "question": f"Is it {k}?", "answer": "yes", "type": "CLOSED"} for k in range(2)],
                     "mask": {"type": "binary", "files": {"left lung": f"masks/{i}.png"}}, "boxes": [{"label": "heart", "xyxy": [1, 2, 3, 4]}], **more})  # fmt: skip
    save(folder, rows)
    return folder


def save(folder, rows):
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")


def listed(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """40 rows of train in 8 shards of 5, 20 of val in 4."""
    out = tmp_path_factory.mktemp("shards") / "set"
    shards.write(source, out, entries=5, quiet=True)
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def ids(groups):
    return [g[0].meta["row"] for g in groups]


def same(a, b):
    """Two samples say the same, to the pixel."""
    assert (a.id, a.patient, a.turns, a.choices, a.group, a.verb) == (b.id, b.patient, b.turns, b.choices, b.group, b.verb)
    assert {k: v for k, v in a.meta.items() if k != "dataset"} == {k: v for k, v in b.meta.items() if k != "dataset"}
    assert repr(a.labels) == repr(b.labels) and [(r.image, r.label, r.box) for r in a.regions] == [(r.image, r.label, r.box) for r in b.regions]
    assert [(m.image, m.label) for m in a.masks] == [(m.image, m.label) for m in b.masks] and all(np.array_equal(m.array, n.array) for m, n in zip(a.masks, b.masks))
    assert list(a.images) == list(b.images)
    for i, j in zip(a.images.values(), b.images.values()):
        assert (type(i), i.id, i.modality, i.unit, i.spacing, i.dtype) == (type(j), j.id, j.modality, j.unit, j.spacing, j.dtype)
        assert np.array_equal(checks.pixels_of(i), checks.pixels_of(j)) and np.array_equal(getattr(i, "affine", 0), getattr(j, "affine", 0))
        assert checks.digest(i) == checks.digest(j)


def compare(a, b):
    count = 0
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            same(x, y)
        count += 1
    return count


def test_what_was_written_comes_back(source, written):
    for split, count in (("train", 40), ("val", 20), ("test", 0)):
        assert compare(open_data(source).groups(split), open_data(written).groups(split)) == count
    index = shards.read_index(written)
    assert Counter(s["split"] for s in index["shards"]) == {"train": 8, "val": 4} and {s["entries"] for s in index["shards"]} == {5}
    for s in index["shards"]:
        raw = (written / s["name"]).read_bytes()
        assert s["bytes"] == len(raw) and s["sha256"] == hashlib.sha256(raw).hexdigest()
    assert {p.name for p in written.iterdir()} == {"shards.json", *(s["name"] for s in index["shards"])}
    assert not any(b"DOE JANE" in p.read_bytes() for p in written.iterdir())  # names of files may be names of patients
    with tarfile.open(written / "train-000000.tar") as tar:
        assert tar.getnames()[:3] == ["00000000.image.png", "00000000.json", "00000000.mask.0.png"]
    data = open_data(written)
    assert data.streamed and data.count("train") == 40 and not open_data(source).streamed and list(data.folders) == ["set"]


def test_a_data_set_like_any_other(source, written, tmp_path, copy):
    plain, sharded = open_data(source), open_data(written)
    for x, y in zip(plain.samples("train", None), sharded.samples("train", None), strict=True):
        same(x, y)
    words = sharded.samples("val", words=True)
    assert [(s.id, s.turns) for s in words] == [(s.id, s.turns) for s in plain.samples("val", words=True)] and not any(s.images for s in words)
    with pytest.raises(ModelError) as e:
        sharded.scored("test")
    assert e.value.code == "NO_SAMPLES" and "train or val" in e.value.hint
    assert open_data(copy / "shards.json").folders == open_data(copy).folders
    assert list(open_data(tmp_path).folders) == ["copy"] and list(open_data(tmp_path, "copy").folders) == ["copy"]
    before = open_data(tmp_path).fingerprint
    index = json.loads((copy / "shards.json").read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (copy / "shards.json").write_text(json.dumps(index))
    assert open_data(tmp_path).fingerprint != before


def test_the_order_depends_on_seed_and_epoch_only(written):
    first = ids(shards.groups(written, "train", 1, 0, buffer=8))
    assert first == ids(shards.groups(written, "train", 1, 0, buffer=8)) and sorted(first) == sorted(ids(shards.groups(written, "train", None)))
    others = [ids(shards.groups(written, "train", s, e, buffer=8)) for s, e in ((1, 1), (2, 0), (2, 1), (1, 10), (11, 0))]
    assert len({tuple(o) for o in (first, *others)}) == 6 and all(sorted(o) == sorted(first) for o in others)
    in_order = ids(shards.groups(written, "train", None))
    near = sum(abs(in_order.index(a) - in_order.index(b)) == 1 for a, b in zip(first, first[1:]))
    assert near < 12  # of 39 neighbours


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 40, 50])
@pytest.mark.parametrize("seed", [None, 4])
def test_readers_share_without_overlap_or_loss(written, n, seed):
    data = open_data(written)
    parts = [ids(data.stream("train", seed, 2, (i, n))) for i in range(n)]
    assert sorted(x for p in parts for x in p) == sorted(ids(shards.groups(written, "train", None)))
    assert [len(p) for p in parts] == [data.length("train", seed, 2, (i, n)) for i in range(n)]
    assert max(map(len, parts)) - min(map(len, parts)) <= (1 if 8 % n else 0)


@pytest.mark.parametrize("part", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("seed", [None, 0, 9])
def test_a_resumed_stream_goes_on_where_it_was(written, part, seed, monkeypatch):
    whole = [g for g in shards.groups(written, "train", seed, 3, part, buffer=7)]
    decoded = []
    unpack = shards._unpack
    monkeypatch.setattr(shards, "_unpack", lambda *a: decoded.append(1) or unpack(*a))
    for skip in (0, 1, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 5):
        decoded.clear()
        assert compare(shards.groups(written, "train", seed, 3, part, skip, buffer=7), whole[skip:]) == len(decoded)  # what is passed over is not decoded
    first = list(islice(shards.groups(written, "train", seed, 3, part, 4, buffer=7), 2))
    assert compare(first, whole[4:6]) == 2


def test_the_buffer_shrinks_for_large_entries(written, monkeypatch):
    wide = ids(shards.groups(written, "train", 1))
    monkeypatch.setattr(shards, "HELD", 1)
    index = {s["name"]: s for s in shards.shards_of(written, "train")}
    order = ids(shards.groups(written, "train", 1))
    plan = [s["name"] for s in shards._plan(list(index.values()), 1, 0, (0, 1))[0]]
    inside = {name: [json.loads(tar.extractfile(m).read())["id"] for m in tar if m.name.endswith("json")]
              for name in plan for tar in [tarfile.open(written / name)]}  # fmt: skip
    assert order == [row for name in plan for row in inside[name]] != wide  # one entry waits: shards are permuted, and no more


def truncate(folder):
    path = folder / "train-000003.tar"
    path.write_bytes(path.read_bytes()[:-512])


def damage(folder):
    path = folder / "train-000003.tar"
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(raw)


def exchange(folder):
    raw = [(folder / f"train-00000{n}.tar").read_bytes() for n in (3, 4)]
    for n, content in zip((4, 3), raw):
        (folder / f"train-00000{n}.tar").write_bytes(content)


def remove(folder):
    (folder / "train-000003.tar").unlink()


def other_index(folder):
    (folder / "shards.json").write_text('{"format": "another"}')


def no_json(folder):
    (folder / "shards.json").write_text("{")


def a_command(folder):
    rewrite(folder, lambda index: index["shards"][3].update(name="pipe:touch run"))


@pytest.mark.parametrize("how, said", [(truncate, "train-000003.tar has"), (damage, "not what was written"), (exchange, "not what was written"), (remove, "is not in"),
                                       (other_index, "format"), (no_json, "cannot be read"), (a_command, "names a shard")])  # fmt: skip
def test_a_shard_that_is_not_what_was_written(copy, how, said):
    how(copy)
    with pytest.raises(ModelError) as e:
        list(shards.groups(copy, "train"))
    assert e.value.code == "BAD_SHARD" and said in e.value.message and e.value.hint
    if how in (truncate, remove):  # is seen before the first entry is read
        with pytest.raises(ModelError):
            shards.groups(copy, "train")
        assert len(list(shards.groups(copy, "val"))) == 20


def rewrite(folder, change):
    index = json.loads((folder / "shards.json").read_text())
    change(index)
    (folder / "shards.json").write_text(json.dumps(index))


def forge(folder, members):
    """A shard of the attacker's own, with an index to match."""
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for m, content in members:
            m.size = len(content) if m.isreg() and m.size == 0 else m.size
            tar.addfile(m, io.BytesIO(content))
    raw = path.read_bytes()
    rewrite(folder, lambda index: index["shards"][0].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))


def link():
    m = tarfile.TarInfo("00000000.image.png")
    m.type, m.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return m


@pytest.mark.parametrize("member", [tarfile.TarInfo("../00000000.json"), tarfile.TarInfo("/tmp/00000000.json"), tarfile.TarInfo("00000000.image/../../x"),
                                    tarfile.TarInfo("00000000..json"), tarfile.TarInfo("00000000.pth"), link()], ids=lambda m: m.name)  # fmt: skip
def test_a_shard_with_a_path_or_a_link_inside(copy, member, tmp_path):
    forge(copy, [(tarfile.TarInfo("00000000.json"), b"{}"), (member, b"x" if member.isreg() else b"")])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError) as e:
        list(shards.groups(copy, "train", None))
    assert e.value.code == "UNSAFE_PATH" and sorted(tmp_path.rglob("*")) == before


def test_a_row_that_points_out_of_its_entry(copy, tmp_path):
    Picture.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "secret.png")
    for image, code in ((str(tmp_path / "secret.png"), "BAD_MANIFEST"), ("../../secret.png", "BAD_MANIFEST"), ("image.png", "NOT_FOUND")):
        row = {"id": "x", "image": image, "modality": "xray", "split": "train"}
        forge(copy, [(tarfile.TarInfo("00000000.json"), json.dumps(row).encode())])
        with pytest.raises(ModelError) as e:
            list(shards.groups(copy, "train", None))
        assert e.value.code == code and "train-000000.tar, entry 00000000" in e.value.message
    for content, code in ((b"{", "BAD_MANIFEST"), (b'{"id": "x", "image": null, "modality": "xray", "split": "val"}', "BAD_SHARD")):
        forge(copy, [(tarfile.TarInfo("00000000.json"), content)])
        with pytest.raises(ModelError) as e:
            list(shards.groups(copy, "train", None))
        assert e.value.code == code
    left: list[dict] = []
    row = {"id": "x", "image": "image.png", "modality": "xray", "split": "train"}
    forge(copy, [(tarfile.TarInfo("00000000.json"), json.dumps(row).encode())])
    assert len(list(shards.groups(copy, "train", None, bad=left))) == 35 and [(b["row"], b["code"]) for b in left] == [("x", "NOT_FOUND")]


def test_a_huge_entry_is_refused_when_written_and_when_read(source, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "max_bytes", 100)
    with pytest.raises(ModelError) as e:
        shards.write(source, tmp_path / "out", quiet=True)
    assert e.value.code == "TOO_LARGE" and "manifest line 1" in e.value.message
    with pytest.raises(ModelError) as e:
        list(shards.groups(copy, "train"))
    assert e.value.code == "TOO_LARGE" and "entry" in e.value.message


def test_a_sparse_file_does_not_grow(copy):
    sparse = tarfile.TarInfo("00000000.image.png")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,1"}
    forge(copy, [(sparse, b"x")])
    with pytest.raises(ModelError) as e:
        list(shards.groups(copy, "train", None))
    assert e.value.code in ("UNSAFE_PATH", "TOO_LARGE")


def test_a_packed_tar_is_refused(copy):
    raw = (copy / "train-000000.tar").read_bytes()
    import gzip

    packed = gzip.compress(raw)
    (copy / "train-000000.tar").write_bytes(packed)
    rewrite(copy, lambda index: index["shards"][0].update(bytes=len(packed), sha256=hashlib.sha256(packed).hexdigest()))
    with pytest.raises(ModelError) as e:
        list(shards.groups(copy, "train"))
    assert e.value.code == "BAD_SHARD" and "not a tar file" in e.value.message


def test_bad_rows_end_the_writing_or_are_listed(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "bad")
    rows = listed(folder)[:6]
    rows[1]["image"] = "missing.png"
    rows[2]["qa"][0]["answer"] = " "
    rows[3]["mask"]["files"]["left lung"] = "small.png"
    Picture.fromarray(np.zeros((3, 3), bool)).save(folder / "small.png")
    save(folder, rows)
    with pytest.raises(ModelError) as e:
        shards.write(folder, tmp_path / "out", quiet=True)
    assert e.value.code == "NOT_FOUND" and "line 2" in e.value.message and "'missing.png'" in e.value.message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))  # all or nothing
    left: list[dict] = []
    index = shards.write(folder, tmp_path / "out", bad=left, quiet=True)
    assert [(b["line"], b["row"], b["code"]) for b in left] == [(2, "case.1/ü", "NOT_FOUND"), (3, "case.2/ü", "EMPTY_TEXT"), (4, "case.3/ü", "GRID_MISMATCH")]
    assert index["left_out"] == left and "(3, 3)" in left[2]["message"]
    data = open_data(tmp_path / "out")
    assert [[s.id for s in g] for g in data.groups("val")] == [["2-1", "case.2/ü/left lung"], ["5-0", "5-1", "case.5/ü/left lung", "case.5/ü"]]
    assert ids(data.groups("train")) == ["case.0/ü", "case.4/ü"]


def test_writing_refuses_before_it_writes(source, written, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for out in (tmp_path / "full", tmp_path / "full/x"):
        with pytest.raises(UsageError) as e:
            shards.write(source, out, quiet=True)
        assert e.value.code == "OUTPUT_EXISTS"
    with pytest.raises(FileError) as e:
        shards.write(source, tmp_path / "full/x/y", quiet=True)
    assert e.value.code == "CANNOT_WRITE"
    for wrong in ({"size": 0}, {"entries": 0}):
        with pytest.raises(UsageError):
            shards.write(source, tmp_path / "out", quiet=True, **wrong)
    with pytest.raises(UsageError) as e:
        shards.write(written, tmp_path / "out", quiet=True)
    assert "no manifest" in e.value.message
    with pytest.raises(ModelError) as e:
        shards.write(source, tmp_path / "out", splits=["test"], quiet=True)
    assert e.value.code == "NO_SAMPLES"
    with pytest.raises(UsageError) as e:
        shards.write(source, tmp_path / "out", shares=checks.SHARES, quiet=True)
    assert "names a split" in e.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    again = [shards.write(source, tmp_path / name, size=4000, splits=["val"], quiet=True)["shards"] for name in ("empty", "new")]
    assert again[0] == again[1] and len(again[0]) > 1  # the same bytes each time; shards close by size too


def test_several_sets_are_written_one_by_one(source, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / "both" / name)
    with pytest.raises(UsageError) as e:
        shards.write(tmp_path / "both", tmp_path / "out", quiet=True)
    assert "a, b" in e.value.message


def test_volumes_series_and_pairs(tmp_path):
    from dicom_corpus import series
    from dicom_corpus import write as write_dicom

    folder = tmp_path / "scans"
    for name in ("pair", "ct"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(1)
    first, *_ = write_dicom(folder / "ct", series())
    first.rename(first.with_suffix(".v1"))  # endings say nothing of DICOM
    (folder / "ct/notes.txt").write_text("no image")
    nibabel.save(nibabel.Nifti1Image(rng.integers(0, 99, (5, 6, 7)).astype(np.int16), np.diag([1, 2, 3, 1])), folder / "mr.NII.GZ")
    nibabel.save(nibabel.Nifti1Image((rng.random((5, 6, 7)) > 0.5).astype(np.uint8), np.diag([1, 2, 3, 1])), folder / "organ.nii.gz")
    nibabel.save(nibabel.Nifti1Pair(rng.random((3, 4, 5), np.float32), np.eye(4)), folder / "pair/x.y.hdr")
    labels = {"type": "volume_labelmap", "files": {"all": "organ.nii.gz"}, "labels": {"1": "liver", "0": "none"}}
    save(folder, [
        {"id": "ct", "image": "ct", "modality": "ct", "text": "A scan."}, {"id": "mr", "image": "mr.NII.GZ", "modality": "mr", "mask": labels},
        {"id": "pair", "image": "pair/x.y.hdr", "modality": "mr"}, {"id": "words", "image": None, "modality": "unknown", "text": "Only words."},
    ])  # fmt: skip
    shards.write(folder, tmp_path / "out", quiet=True)
    assert compare(open_data(folder).groups(None), shards.groups(tmp_path / "out", None, None)) == 4
    with tarfile.open(tmp_path / "out/rows-000000.tar") as tar:
        names = tar.getnames()
    assert sum(n.startswith("00000000.images.") for n in names) == len(list((folder / "ct").iterdir())) and {"00000000.images.000000", "00000000.images.000001.dcm"} <= set(names)
    assert {"00000001.image.nii.gz", "00000001.mask.0.nii.gz", "00000002.image.hdr", "00000002.image.img", "00000003.json"} <= set(names)
    group = next(iter(open_data(tmp_path / "out").groups(None)))
    image = next(iter(group[0].images.values()))
    image.release()  # the file it came from is gone, the pixels are not
    assert checks.pixels_of(image).shape == image.shape


def test_command_line(source, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "plain")
    rows = [{k: v for k, v in r.items() if k != "split"} for r in listed(folder)]
    rows[7]["image"] = "missing.png"
    save(folder, rows)
    out = tmp_path / "out"
    call = ["shard", str(folder), "--out", str(out), "--split-by-patient", "0.6,0.2,0.2", "--seed", "5", "--entries", "10"]
    assert main([*call, "--json"]) == 2 and "line 8" in capsys.readouterr().err and not out.exists()
    assert main([*call, "--skip-bad", "--json"]) == 0
    index = json.loads(capsys.readouterr().out)
    assert index["split_by_patient"] == {"shares": {"train": 0.6, "val": 0.2, "test": 0.2}, "seed": 5} and index == shards.read_index(out)
    assert [b["line"] for b in index["left_out"]] == [8]
    data = open_data(out)
    splits = {s: [x for g in data.groups(s) for x in g] for s in ("train", "val", "test")}
    assert all(splits.values()) and checks.leaks(splits) == [] and all(x.meta["split"] == s for s, found in splits.items() for x in found)
    for s, found in splits.items():
        assert all(checks.split_by_patient(x.patient, x.meta["row"], index["split_by_patient"]["shares"], 5) == s for x in found)
    assert main(["shard", str(source), "--out", str(tmp_path / "two"), "--split", "val"]) == 0
    assert "20 rows of val in 1 shards" in capsys.readouterr().out
    assert main(["shard", str(source), "--out", str(out)]) == 2 and "OUTPUT_EXISTS" in capsys.readouterr().err
    for wrong in ("0.5,0.5", "a,b,c", "0.5,0.5,0.5"):
        assert main(["shard", str(folder), "--out", str(tmp_path / "no"), "--skip-bad", "--split-by-patient", wrong]) == 2
        assert "BAD_ARGUMENT" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_vqa_rad_comes_back(data, tmp_path):
    shards.write(data / "vqa_rad", tmp_path / "rad", size=2 << 20, splits=("val", "test"), quiet=True)
    plain, sharded = open_data(data / "vqa_rad"), open_data(tmp_path / "rad")
    assert [compare(plain.groups(s), sharded.groups(s)) for s in ("val", "test")] == [42, 31]


@pytest.mark.parametrize("name, keep", [("dicom_series", "dcmqi_ct_3slice"), ("vol_totalseg", None), ("xray_covid", None)])
def test_real_scans_and_masks_come_back(data, tmp_path, name, keep):
    rows = [r for r in listed(data / name) if r["id"] == keep or (keep is None and r.get("mask"))]
    rows = sorted(rows, key=lambda r: (data / name / r["image"]).stat().st_size)[:3]
    for r in rows:
        for file in (r["image"], *r["mask"]["files"].values()):
            there = tmp_path / name / file
            there.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (data / name / file).is_dir() else shutil.copy)(data / name / file, there)
    save(tmp_path / name, rows)
    shards.write(tmp_path / name, tmp_path / "out", quiet=True)
    plain, sharded = open_data(tmp_path / name), open_data(tmp_path / "out")
    assert sum(compare(plain.groups(s), sharded.groups(s)) for s in ("train", "val", "test")) == len(rows) > 0
