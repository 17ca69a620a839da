"""NIfTI and its relatives: right in the patient's own millimetres, or refused by name."""

import gzip
import itertools
import json
import struct
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import nifti_corpus as corpus
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medvlm
from medvlm.errors import HINTS
from medvlm.imaging.nifti import read_nifti, save_nifti
from medvlm.imaging.scan import Image, Volume, ijk_affine, ras_lps

CASES = corpus.cases()


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_odd_file_is_right_in_world_coordinates_or_refused_by_name(case, tmp_path):
    got, warned = corpus.of_medvlm(case, case.make(tmp_path))
    assert got == case.expect
    assert set(warned) == set(case.warns)


def test_the_corpus_tells_right_from_wrong():
    """The check itself must fail for a shifted, a mirrored and a changed volume."""
    case = next(c for c in CASES if c.name == "plain")
    assert corpus.right_in_world(case.points, case.values, case)
    assert not corpus.right_in_world(case.points + (0.01, 0, 0), case.values, case)
    assert not corpus.right_in_world(case.points * (-1, 1, 1), case.values, case)
    assert not corpus.right_in_world(case.points, case.values[::-1], case)


def test_the_table_in_the_docs_names_every_case():
    lines = (Path(__file__).parents[2] / "docs" / "odd-inputs-nifti.md").read_text().splitlines()
    assert [x.split("|")[1].strip() for x in lines if x.startswith("| ")][2:] == [c.name for c in CASES]


@pytest.mark.parametrize("case", [c for c in CASES if c.heavy], ids=lambda c: c.name)
def test_bombs_are_refused_before_memory_is_taken(case, tmp_path):
    path = case.make(tmp_path)
    with pytest.raises(medvlm.MedVLMError):
        medvlm.read(path)
    tracemalloc.start()
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert e.value.code == "BOMB" and peak < 16 << 20


def plain(folder, array=None, ras=corpus.PLAIN, name="a.nii.gz"):
    """A file written by nibabel."""
    path = folder / name
    nib.save(nib.Nifti1Image(corpus.voxels() if array is None else array, ras), path)
    return path


# left is left


def scene():
    """A volume with one bright voxel towards the patient's right, front and feet; all else differs too."""
    array = np.arange(5 * 4 * 3, dtype=np.int16).reshape(5, 4, 3)
    array[0, 3, 0] = 999
    return array, np.array([[-2.0, 0, 0, 4], [0, 3, 0, -6], [0, 0, 4, 0], [0, 0, 0, 1]])


MARK = np.array([-4.0, -3.0, 0.0])
"""LPS+ mm of the bright voxel: RAS (4 - 0, -6 + 9, 0), x and y negated."""

TURNS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def stored_as(array, ras, permutation, signs):
    """The same scene with its axes stored in another order and direction."""
    out = array.transpose(permutation)[tuple(slice(None, None, s) for s in signs)]
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, s) in enumerate(zip(permutation, signs)):
        change[old, new] = s
        change[old, 3] = 0 if s > 0 else array.shape[old] - 1
    return np.ascontiguousarray(out), ras @ change


def where(volume):
    """World mm of the brightest voxel."""
    return volume.world(np.unravel_index(np.argmax(volume.voxels[0]), volume.shape[1:]))


@pytest.mark.parametrize("turn", TURNS, ids=lambda t: "".join("ijk"[p] + "+-"[s < 0] for p, s in zip(*t)))
def test_left_stays_left_in_all_48_ways_to_store_a_volume(tmp_path, turn):
    import SimpleITK as sitk

    folder = tmp_path
    array, ras = stored_as(*scene(), *turn)
    volume = medvlm.read(plain(folder, array, ras)).image()
    assert np.allclose(where(volume), MARK, atol=1e-3)
    reoriented = volume.reorient("SPL")
    assert reoriented.orientation == "SPL" and np.allclose(where(reoriented), MARK, atol=1e-3)
    # worked by hand: k grows to S and i to L already; j grows to A, and P is wanted
    expected = scene()[0].transpose(2, 1, 0)[:, ::-1]
    assert np.array_equal(reoriented.voxels[0], expected)

    for v, name in ((volume, "back.nii.gz"), (reoriented, "spl.nii")):
        path = save_nifti(v, folder / name)
        image = nib.load(path)
        index = np.unravel_index(np.argmax(image.dataobj), image.shape)
        assert np.allclose((image.affine @ (*index, 1))[:3] * (-1, -1, 1), MARK, atol=1e-3)
        other = sitk.ReadImage(str(path))
        k, j, i = np.unravel_index(np.argmax(sitk.GetArrayFromImage(other)), sitk.GetArrayFromImage(other).shape)
        assert np.allclose(other.TransformIndexToPhysicalPoint((int(i), int(j), int(k))), MARK, atol=1e-3)
    back = nib.load(folder / "back.nii.gz")
    assert back.shape == array.shape and np.array_equal(back.affine, ras) and np.array_equal(back.dataobj, array)


steps = st.floats(0.2, 8)
degrees = st.floats(-44, 44)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TURNS), st.tuples(*[st.integers(1, 5)] * 3), st.tuples(steps, steps, steps), st.tuples(degrees, degrees, degrees),
    st.tuples(*[st.floats(-300, 300)] * 3), st.sampled_from(["x.nii", "x.nii.gz"]),
)  # fmt: skip
def test_any_volume_keeps_every_voxel_in_its_place(tmp_path_factory, turn, shape, spacing, tilt, origin, name):
    folder = tmp_path_factory.mktemp("any")
    truth = corpus.affine(corpus.turn(*tilt), spacing, origin)
    array, ras = stored_as(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), truth, *turn)
    ras = ras.astype(np.float32).astype(float)  # as the file holds it
    volume = medvlm.read(plain(folder, array, ras, name)).image()
    case = corpus.Case("any", None, points=corpus.points(shape, truth), values=np.arange(np.prod(shape)))
    for v in (volume, volume.reorient("SPL"), volume.reorient("RAI"), medvlm.read(save_nifti(volume, folder / "again.nii")).image()):
        index = np.indices(v.shape[1:]).reshape(3, -1).T
        assert corpus.right_in_world(v.world(index), v.voxels.ravel(), case)
    again = nib.load(folder / "again.nii")
    assert again.shape == array.shape and np.array_equal(again.affine, ras)


@pytest.mark.parametrize("name", ["oblique", "sheared", "left-handed"])
def test_every_voxel_keeps_its_place_through_reorient_resample_and_save(tmp_path, name):
    """Three volumes hold the x, y and z (LPS+ mm) of each voxel. Linear interpolation keeps such a ramp exactly, so after
    each step every voxel must still hold its own place: in our reader, in nibabel and, where it reads shear, in SimpleITK."""
    import SimpleITK as sitk

    turn = corpus.turn(20, -15, 35)
    ras = corpus.affine({"left-handed": turn @ np.diag([-1, 1, 1])}.get(name, turn), (1.5, 2, 3), (-20, 30, 11))
    if name == "sheared":
        ras[:3, 2] += 0.4 * ras[:3, 1]
    places = corpus.points((11, 9, 7), ras).reshape(11, 9, 7, 3).astype(np.float32)
    sources = [medvlm.read(plain(tmp_path, places[..., axis], ras, f"{axis}.nii.gz")).image() for axis in range(3)]

    def steps(v):
        yield "read", v
        yield "reorient", v.reorient("SPL")
        yield "resample", v.resample((1.1, 1.3, 0.9))
        yield "resample, reorient", v.resample((2.0, 1.0, 1.0)).reorient("LAS")
        grid = corpus.affine(corpus.turn(5, 10, 15), (0.7, 0.8, 0.9))[:, [2, 1, 0, 3]]
        grid[:3, 3] = v.world((3, 4, 5)) - 2  # slanted, around the middle
        grid = Volume("g", np.zeros((1, 5, 6, 7)), grid)
        yield "onto", v.onto(grid)

    for (what, x), (_, y), (_, z) in zip(*(steps(v) for v in sources)):
        index = np.indices(x.shape[1:]).reshape(3, -1).T
        inside = sources[0].index(x.world(index))
        inside = ((inside > -1e-6) & (inside < np.array(sources[0].shape[1:]) - 1 + 1e-6)).all(1)
        assert inside.sum() > 20, what
        held = np.stack([v.voxels.ravel() for v in (x, y, z)], 1)
        assert np.abs(held - x.world(index))[inside].max() < 1e-3, what

        paths = [save_nifti(v, tmp_path / f"out{axis}.nii.gz") for axis, v in enumerate((x, y, z))]
        ijk = index[:, ::-1]
        images = [nib.load(p) for p in paths]
        there = (ijk @ images[0].affine[:3, :3].T + images[0].affine[:3, 3]) * (-1, -1, 1)
        held = np.stack([np.asarray(i.dataobj)[tuple(ijk.T)] for i in images], 1)
        assert np.abs(held - there)[inside].max() < 1e-3, what
        again = medvlm.read(paths[0]).image()
        assert np.abs(again.world(index) - x.world(index)).max() < 1e-3 and np.array_equal(again.voxels, x.voxels)
        if name != "sheared" or what not in ("read", "reorient"):
            images = [sitk.ReadImage(str(p)) for p in paths]
            there = np.array([images[0].TransformIndexToPhysicalPoint([int(n) for n in i]) for i in ijk])
            held = np.stack([sitk.GetArrayFromImage(i).ravel() for i in images], 1)
            assert np.abs(held - there)[inside].max() < 1e-3, what


def test_resampling_keeps_a_voxel_that_falls_on_the_new_grid(tmp_path):
    """3 x finer with an odd factor: old centres are new centres, so linear interpolation returns them exactly."""
    array, ras = scene()
    volume = medvlm.read(plain(tmp_path, array, ras)).image()
    fine = volume.resample(tuple(s / 3 for s in volume.spacing))
    assert fine.shape[1:] == tuple(3 * n for n in volume.shape[1:])
    index = np.indices(volume.shape[1:]).reshape(3, -1).T
    there = fine.index(volume.world(index))
    assert np.allclose(there, np.rint(there), atol=1e-6)
    d, h, w = np.rint(there).astype(int).T
    assert np.allclose(fine.voxels[0, d, h, w], volume.voxels[0].ravel(), atol=1e-3)


# saving


@pytest.mark.parametrize("case", [c for c in CASES if c.expect == "right" and "4-D" not in c.name and not c.args], ids=lambda c: c.name)
def test_saving_gives_the_files_own_shape_affine_and_values_back(case, tmp_path):
    path = case.make(tmp_path)
    volume = medvlm.read(path).image()
    out = save_nifti(volume, tmp_path / "saved.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = nib.load(path)
            shape, affine, unit = source.shape, source.affine, source.header.get_xyzt_units()[0]
        except Exception:  # nibabel does not open what we could
            source = None
    image = nib.load(out)
    if source is not None and "BAD_SFORM" not in case.warns:
        assert image.shape == shape[: len(image.shape)] and all(n == 1 for n in shape[len(image.shape) :])
        assert image.header.get_xyzt_units()[0] == unit
        assert np.allclose(image.affine, affine, atol=1e-6)
        if source.header["sform_code"] > 0:
            assert np.array_equal(image.affine, affine)
            assert image.header["sform_code"] == source.header["sform_code"]
    again = medvlm.read(out).image()
    assert np.allclose(again.affine, volume.affine, atol=1e-5)
    assert again.dtype == volume.dtype and np.array_equal(again.voxels, volume.voxels, equal_nan=volume.dtype.kind == "f")


def test_sheared_volumes_have_no_qform_and_straight_ones_have_both(tmp_path):
    straight = medvlm.read(plain(tmp_path)).image()
    header = nib.load(save_nifti(straight, tmp_path / "s.nii")).header
    assert header["qform_code"] > 0 and np.allclose(header.get_qform(), corpus.PLAIN, atol=1e-5)
    slanted = Volume("x", straight.voxels, straight.affine + np.array([[0, 0, 0, 0], [1.0, 0, 0, 0], [0] * 4, [0] * 4]))
    header = nib.load(save_nifti(slanted, tmp_path / "t.nii")).header
    assert header["qform_code"] == 0 and np.allclose(header.get_sform(), ras_lps(ijk_affine(slanted.affine)))


def test_nifti2_stays_nifti2_and_masks_become_uint8(tmp_path):
    nib.save(nib.Nifti2Image(corpus.voxels(), corpus.PLAIN), tmp_path / "two.nii")
    volume = medvlm.read(tmp_path / "two.nii").image()
    assert isinstance(nib.load(save_nifti(volume, tmp_path / "again.nii")), nib.Nifti2Image)
    mask = volume.with_voxels(volume.voxels > 0)
    saved = nib.load(save_nifti(mask, tmp_path / "mask.nii.gz"))
    assert saved.get_data_dtype() == np.uint8 and np.array_equal(np.asarray(saved.dataobj).T, mask.voxels[0])


def test_the_same_volume_gives_the_same_bytes(tmp_path, monkeypatch):
    volume = medvlm.read(plain(tmp_path)).image()
    first = save_nifti(volume, tmp_path / "one.nii.gz").read_bytes()
    monkeypatch.setattr("time.time", lambda: 1e9)  # neither the time nor the name is in the stream
    assert save_nifti(volume, tmp_path / "two.nii.gz").read_bytes() == first


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    volume = medvlm.read(plain(tmp_path)).image()
    out = tmp_path / "out.nii.gz"
    out.write_bytes(b"old")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(medvlm.MedVLMError, match="No space left") as e:
        save_nifti(volume, out)
    assert e.value.code == "CANNOT_WRITE"
    assert out.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_nifti_cannot_hold_is_refused(tmp_path):
    volume = medvlm.read(plain(tmp_path)).image()
    for bad, code in (
        (Image("a", np.zeros((1, 4, 4))), "ORIENTATION_UNKNOWN"),
        (Volume("a", np.zeros((2, 3, 4, 5), np.float32), np.eye(4)), "UNSUPPORTED"),
        (Volume("a", np.zeros((1, 3, 4, 5), np.complex64), np.eye(4)), "UNSUPPORTED"),
    ):
        with pytest.raises(medvlm.MedVLMError) as e:
            save_nifti(bad, tmp_path / "x.nii")
        assert e.value.code == code
    for name, code in (("x.png", "BAD_ARGUMENT"), ("no/such/folder/x.nii", "CANNOT_WRITE")):
        with pytest.raises(medvlm.MedVLMError) as e:
            save_nifti(volume, tmp_path / name)
        assert e.value.code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz"]


# reading


def test_units_modality_and_plausible_hu(tmp_path):
    ct = np.full((4, 4, 4), -1000, np.int16)
    ct[1:3] = 60
    path = plain(tmp_path, ct)
    untold = medvlm.read(path).image()
    assert (untold.id, untold.modality, untold.unit) == ("image-1", "unknown", "raw")
    told = medvlm.read(path, modality="ct")
    assert (told.image().id, told.image().unit, told.warnings) == ("ct-1", "HU", ())
    windowed = plain(tmp_path, np.arange(64, dtype=np.uint8).reshape(4, 4, 4), name="w.nii.gz")
    assert [w.split(":")[0] for w in medvlm.read(windowed, modality="ct").warnings] == ["HU_IMPLAUSIBLE"]
    assert "0 to 63" in medvlm.read(windowed, modality="ct").warnings[0]
    assert medvlm.read(windowed, modality="mr").image().unit == "raw"


def test_non_finite_voxels_are_counted(tmp_path):
    array = np.zeros((4, 4, 4), np.float32)
    array[0, 0], array[3, 3, 3] = np.nan, np.inf
    for name in ("n.nii", "n.nii.gz"):
        (warning,) = medvlm.read(plain(tmp_path, array, name=name)).warnings
        assert warning.startswith("NOT_FINITE: 5 of 64 voxels")
    array = np.zeros((4, 4, 4))
    array[0, 0, 0], array[1, 1, 1] = 1e39, 3e38
    (warning,) = medvlm.read(plain(tmp_path, array)).warnings
    assert warning.startswith("NOT_FINITE: 1 of 64 voxels")


def test_time_points_are_images_of_their_own(tmp_path):
    film = corpus.voxels((5, 4, 3, 3))
    for name in ("f.nii", "f.nii.gz"):
        path = plain(tmp_path, film, name=name)
        for keep in (True, False):
            volumes = read_nifti(path, "f", "mr-1", keep=keep)
            assert [v.id for v in volumes] == ["mr-1-t1", "mr-1-t2", "mr-1-t3"]
            for t in (2, 0, 1):  # any order
                assert np.array_equal(volumes[t].voxels[0].T, film[..., t])


def test_voxels_are_read_when_first_used(tmp_path):
    """A folder's volumes are checked to the end when it is read, and decompressed again when used."""
    (volume,) = read_nifti(plain(tmp_path), "a", "x", keep=False)
    assert volume.shape == (1, 3, 4, 5) and volume.dtype == np.int16
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(FileNotFoundError):
        _ = volume.voxels


def test_mgh(tmp_path):
    ras = corpus.affine(corpus.turn(10, 20, 30))
    array = corpus.voxels(kind="f4")
    for name in ("m.mgh", "m.mgz"):
        nib.save(nib.MGHImage(array, ras), tmp_path / name)
        volume = medvlm.read(tmp_path / name).image()
        index = np.indices(volume.shape[1:]).reshape(3, -1).T
        case = corpus.Case("mgh", None, points=corpus.points(corpus.SIZE, ras), values=array.ravel())
        assert corpus.right_in_world(volume.world(index), volume.voxels.ravel(), case)
    whole = (tmp_path / "m.mgh").read_bytes()
    lost = bytearray(whole)
    lost[28:30] = b"\0\0"  # goodRASFlag
    for name, content, code in (
        ("cut.mgh", whole[:300], "TRUNCATED"),
        ("lost.mgh", bytes(lost), "ORIENTATION_UNKNOWN"),
        ("cut.mgz", gzip.compress(whole)[:-9], "TRUNCATED"),
        ("text.mgh", b"text " * 100, "UNKNOWN_FORMAT"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(medvlm.MedVLMError) as e:
            medvlm.read(tmp_path / name)
        assert e.value.code == code


def test_analyze_can_be_told_where_it_lies(tmp_path):
    case = next(c for c in CASES if c.name == "Analyze")
    affine = np.diag([4.0, 3, 2, 1])
    volume = medvlm.read(case.make(tmp_path), affine=affine).image()
    assert np.array_equal(volume.affine, affine) and np.array_equal(volume.voxels[0].T, corpus.voxels())


def test_errors_never_quote_what_is_inside(tmp_path):
    (tmp_path / "DOE^JANE.nii").write_bytes(corpus.header((5, 4, 3), "i2", sform=corpus.PLAIN) + b"12345")
    (tmp_path / "ok.nii").write_bytes(next(c for c in CASES if c.name == "plain").make(tmp_path).read_bytes())
    study = medvlm.read(tmp_path)
    (refused,) = [w for w in study.warnings if w.startswith("TRUNCATED")]
    assert "DOE" not in refused and "file 1 of 3 in name order" in refused


# the shared files


def test_every_shared_odd_file_is_what_nibabel_says_or_a_named_error(data):
    folder = data / "nifti_odd"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 25
    refused = {}
    for row in rows:
        path = folder / row["image"]
        try:
            study = medvlm.read(path)
        except medvlm.MedVLMError as e:
            refused[path.name] = e.code
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = nib.load(path)
            truth = np.asanyarray(image.dataobj)
        if truth.dtype.names:
            truth = np.stack([truth[c] for c in "RGB"])
            got = study.image().voxels.transpose(0, 3, 2, 1)
        else:
            got = np.stack([v.voxels[0].T for v in study.images], -1).reshape(truth.shape)
            truth = truth if got.dtype.kind in "iu" else truth.astype(np.float32)
        assert np.array_equal(got, truth, equal_nan=got.dtype.kind == "f"), path.name
        for v in study.images:
            assert np.allclose(v.affine, ijk_affine(ras_lps(image.affine)), atol=1e-6), path.name
        expect = row["labels"]["expect"]
        if expect.get("n_nan"):
            assert any(f"NOT_FINITE: {expect['n_nan']} of" in w for w in study.warnings)
    assert refused == {
        "T2.PAR": "NO_DATA_FILE",
        "analyze.hdr": "NO_DATA_FILE",
        "nifti1.hdr": "NO_DATA_FILE",
        "nifti2.hdr": "NO_DATA_FILE",
        "anat_truncated.nii.gz": "TRUNCATED",
        "empty.tck": "NOT_AN_IMAGE",
    }


def test_a_cut_par_rec_pair_is_refused(data, tmp_path):
    for end in (".PAR", ".REC"):
        content = (data / "nifti_odd" / f"phantom_EPI_asc_CLEAR_2_1{end}").read_bytes()
        (tmp_path / f"p{end}").write_bytes(content if end == ".PAR" else content[:-100])
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "p.PAR")
    assert e.value.code == "TRUNCATED"


@pytest.mark.parametrize("name", ["tiny.mnc", "test.mgz", "anatomical.nii", "standard.nii.gz", "phantom_EPI_asc_CLEAR_2_1.PAR"])
def test_damaged_headers_end_in_a_study_or_a_named_error(data, tmp_path, name):
    """Byte flips in the first part of each format: never a foreign exception, never endless memory."""
    content = (data / "nifti_odd" / name).read_bytes()
    if name.endswith(".PAR"):
        (tmp_path / "x.REC").write_bytes((data / "nifti_odd" / name.replace(".PAR", ".REC")).read_bytes())
    path = tmp_path / f"x{name[name.index('.') :]}"
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for at in random.integers(0, min(len(content), 3000), 3):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            study = medvlm.read(path)
            for image in study.images[:4]:
                assert image.voxels.shape == image.shape
        except medvlm.MedVLMError as e:
            assert e.code in HINTS


def test_hdf5_that_is_no_minc_is_refused(tmp_path):
    import h5py

    for name, code in (("x.h5", "UNKNOWN_FORMAT"), ("x.mnc", "CORRUPT")):
        with h5py.File(tmp_path / name, "w") as f:
            f["data"] = np.zeros((3, 3))
        with pytest.raises(medvlm.MedVLMError) as e:
            medvlm.read(tmp_path / name)
        assert e.value.code == code


def test_unknown_sizes_do_not_pass(tmp_path):
    """dims of 0 and steps that are not numbers."""
    for dim in ([3, 0, 4, 3, 1, 1, 1, 1], [0, 5, 4, 3, 1, 1, 1, 1]):
        (tmp_path / "x.nii").write_bytes(corpus.header((5, 4, 3), "i2", sform=corpus.PLAIN, dim=dim) + bytes(120))
        with pytest.raises(medvlm.MedVLMError) as e:
            medvlm.read(tmp_path / "x.nii")
        assert e.value.code == "BAD_VALUE"
    nan = bytearray(corpus.header((5, 4, 3), "i2", q=(0, 0, 0, 1, 2, 3), qcode=1))
    struct.pack_into("<f", nan, 80, np.nan)
    (tmp_path / "x.nii").write_bytes(bytes(nan) + bytes(120))
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "x.nii")
    assert e.value.code == "BAD_AFFINE"
