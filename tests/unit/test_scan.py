"""Geometry worked by hand: where a voxel lies after reorient, resample and onto."""

import numpy as np
import pytest

from medvlm.errors import ChoiceError, GeometryError
from medvlm.imaging.scan import Image, Lazy, Study, Volume, check_affine, ijk_affine, orientation, ras_lps


def volume(affine=None, shape=(2, 3, 4), **kw):
    """Voxel (d, h, w) holds 100 d + 10 h + w; axial, 5 x 2 x 1 mm, first voxel at (10, 20, 30) mm."""
    d, h, w = np.indices(shape)
    if affine is None:  # index (d, h, w): d moves along z, h along y, w along x
        affine = [[0, 0, 1, 10], [0, 2, 0, 20], [5, 0, 0, 30], [0, 0, 0, 1]]
    return Volume("v", (100 * d + 10 * h + w)[None].astype(np.int16), affine, **kw)


def test_world_and_index_are_inverse():
    v = volume()
    assert v.world((1, 2, 3)).tolist() == [10 + 3, 20 + 2 * 2, 30 + 5]
    assert np.allclose(v.index([13, 24, 35]), (1, 2, 3))
    assert v.spacing == (5, 2, 1) and v.orientation == "SPL"
    assert v.world(np.zeros((4, 5, 3))).shape == (4, 5, 3)


@pytest.mark.parametrize("to", ["SPL", "IPL", "SAR", "LPS", "RAI", "PLS"])
def test_reorient_moves_every_voxel_with_its_place(to):
    v = volume()
    r = v.reorient(to)
    assert r.orientation == to
    for d, h, w in np.ndindex(v.shape[1:]):
        index = np.rint(r.index(v.world((d, h, w)))).astype(int)
        assert r.voxels[(0, *index)] == 100 * d + 10 * h + w
    assert np.array_equal(r.reorient("SPL").voxels, v.voxels) and np.allclose(r.reorient("SPL").affine, v.affine)


def test_reorient_worked_by_hand():
    """From SPL to SAL the rows are read from the back: row 0 is old row 2, at y = 20 + 2 * 2 = 24 mm."""
    r = volume().reorient("SAL")
    assert r.voxels[0, 1, 0, 3] == 123
    assert r.affine.tolist() == [[0, 0, 1, 10], [0, -2, 0, 24], [5, 0, 0, 30], [0, 0, 0, 1]]
    sagittal = volume().reorient("LSP")
    assert sagittal.shape == (1, 4, 2, 3) and sagittal.voxels[0, 3, 1, 2] == 123


def test_reorient_keeps_source_uids_only_along_the_slices():
    v = volume(info={"sop": ["a", "b"]})
    assert v.reorient("IPL").info["sop"] == ["b", "a"] and v.reorient("LPS").info["sop"] == []
    assert v.info["sop"] == ["a", "b"]


def test_resample_worked_by_hand():
    """5 mm slices to 2.5 mm: the box from 27.5 to 37.5 mm holds four slices, at 28.75, 31.25, 33.75 and 36.25 mm."""
    v = volume()
    r = v.resample((2.5, 2, 1))
    assert r.shape == (1, 4, 3, 4) and np.allclose(r.affine[:3, 3], (10, 20, 28.75)) and np.allclose(r.spacing, (2.5, 2, 1))
    # between the slices (0 at 30 mm, 100 at 35 mm) 31.25 mm is a quarter of the way; the outer two lie within the outer voxels
    assert np.allclose(r.voxels[0, :, 0, 0], [0, 25, 75, 100])
    nearest = v.resample((2.5, 2, 1), order=0)
    assert nearest.voxels[0, :, 0, 0].tolist() == [0, 0, 100, 100] and nearest.voxels.dtype == np.int16


def test_resampling_to_its_own_spacing_changes_nothing():
    """Rounding must not push the outermost voxels out of an oblique volume."""
    c, s = np.cos(0.3), np.sin(0.3)
    oblique = np.array([[0, -s, c, 17.3], [0.1, c, s, -41.7], [2, 0, 0, 5.1], [0, 0, 0, 1]])
    oblique[:3, 0] = 2 * np.cross(oblique[:3, 1], oblique[:3, 2])
    v = volume(oblique)
    r = v.resample(v.spacing)
    assert r.same_grid(v) and np.allclose(r.voxels, v.voxels, atol=1e-3)
    assert np.array_equal(v.with_voxels(v.voxels > 50).resample(v.spacing, order=0).voxels, v.voxels > 50)


def test_masks_stay_masks():
    v = volume()
    mask = v.with_voxels(v.voxels >= 100)
    assert mask.resample((2.5, 2, 1), order=0).voxels.dtype == bool
    assert mask.resample((2.5, 2, 1), order=0).voxels.sum() == 2 * mask.voxels.sum()  # half the spacing, twice the voxels


def test_onto_worked_by_hand():
    """A grid of 1 mm steps whose first voxel lies on voxel (0, 1, 1); beyond the volume the least value, or what is told."""
    v = volume()
    grid = Volume("g", np.zeros((1, 6, 3, 2), np.int16), [[0, 0, 1, 11], [0, 1, 0, 22], [1, 0, 0, 30], [0, 0, 0, 1]])
    o = v.onto(grid)
    assert o.same_grid(grid) and o.id == "v"
    assert np.allclose(o.voxels[0, 0, :, 0], [11, 16, 21])  # y = 22, 23, 24 mm
    assert np.allclose(o.voxels[0, :, 0, 1], [12, 32, 52, 72, 92, 112])  # z = 30 .. 35 mm
    far = Volume("f", np.zeros((1, 1, 1, 1)), [[0, 0, 1, 500], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert v.with_voxels(v.voxels - 7).onto(far).voxels.item() == -7
    beside = Volume("b", np.zeros((1, 1, 1, 3)), [[0, 0, 0.5, 9], [0, 1, 0, 20], [1, 0, 0, 30], [0, 0, 0, 1]])
    assert v.with_voxels(v.voxels + 5).onto(beside, outside=-1).voxels.ravel().tolist() == [-1, 5, 5]  # x = 9, 9.5, 10 mm; the first voxel begins at 9.5
    assert v.onto(far, order=0).voxels.item() == 0 and v.onto(far, outside=-1024).voxels.item() == -1024


def test_onto_the_same_grid_changes_nothing():
    v = volume()
    shifted = v.affine.copy()
    shifted[0, 3] += 0.0005
    assert v.onto(Volume("w", v.voxels, shifted)).voxels is v.voxels
    shifted[0, 3] += 0.01
    assert not v.same_grid(Volume("w", v.voxels, shifted)) and not v.same_grid(volume(shape=(2, 3, 5)))


def test_a_sheared_volume_is_straightened_only_by_resampling():
    """Each slice lies 1 mm further back (gantry tilt): y = 20 + 2 h + d."""
    tilted = np.array([[0, 0, 1, 10], [1, 2, 0, 20], [5, 0, 0, 30], [0, 0, 0, 1.0]])
    v = volume(tilted)
    assert np.allclose(v.reorient("SAL").world((1, 0, 0)), [10, 20 + 2 * 2 + 1, 35])
    r = v.resample((5, 2, 1))
    columns = r.affine[:3, :3] / np.linalg.norm(r.affine[:3, :3], axis=0)
    assert np.allclose(columns.T @ columns, np.eye(3), atol=1e-9) and r.orientation == "SPL"
    values = (v.world(np.indices(v.shape[1:]).reshape(3, -1).T)).min(0)
    assert (r.world((0, 0, 0)) <= values + 1e-9).all()  # covers the whole box


def test_orientation_letters():
    assert orientation(np.diag([1, 1, 1, 1.0])) == "LPS" and orientation(np.diag([-1, -1, -1, 1.0])) == "RAI"
    c, s = np.cos(0.7), np.sin(0.7)  # 40 degrees: still nearest to its own axis
    assert orientation(np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])) == "LPS"


def test_ras_and_ijk_are_their_own_inverse():
    a = np.array([[2.0, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    assert ras_lps(a).tolist() == [[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3], [0, 0, 0, 1]]
    assert ijk_affine(a).tolist() == [[0, 0, 2, 1], [0, 3, 0, 2], [4, 0, 0, 3], [0, 0, 0, 1]]
    assert np.array_equal(ras_lps(ras_lps(a)), a) and np.array_equal(ijk_affine(ijk_affine(a)), a)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3), np.diag([1, 1, 1, 2]), [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]])
def test_affines_that_cannot_be_are_refused(bad):
    with pytest.raises(GeometryError) as e:
        check_affine(bad)
    assert e.value.code == "BAD_AFFINE"


def test_spacing_and_orientation_that_cannot_be_are_refused():
    for spacing in ((0, 1, 1), (1, 1), (1, np.nan, 1)):
        with pytest.raises(GeometryError, match="BAD_SPACING"):
            volume().resample(spacing)
    for letters in ("SPP", "SP", "XYZ"):
        with pytest.raises(GeometryError, match="BAD_ORIENTATION"):
            volume().reorient(letters)
    with pytest.raises(GeometryError, match="GRID_MISMATCH"):
        volume().with_voxels(np.zeros((1, 9, 9, 9)))
    with pytest.raises(GeometryError, match="GRID_MISMATCH"):
        Image("a", np.zeros((1, 2, 3))).with_pixels(np.zeros((1, 3, 2)))


def test_lazy_pixels_are_read_once_and_must_keep_their_promise():
    calls = []

    def load():
        calls.append(1)
        return np.ones((1, 2, 3))

    image = Image("a", Lazy((1, 2, 3), float, load))
    assert image.shape == (1, 2, 3) and "spacing" not in repr(image) and not calls
    assert image.pixels.sum() == 6 and image.pixels.sum() == 6 and len(calls) == 1
    with pytest.raises(GeometryError, match="MIXED_SIZE"):
        _ = Image("a", Lazy((1, 3, 2), float, load)).pixels


def test_a_study_lists_its_images():
    study = Study("s", images=[Image("a", np.zeros((1, 2, 3))), volume()], warnings=["X: y"])
    study.images[0].info["warnings"].append("LATE: found when read")
    assert study.warnings == ("X: y", "LATE: found when read (image a)")
    assert study.image("v") is study.images[1]
    with pytest.raises(ChoiceError, match="MANY_IMAGES") as e:
        study.image()
    assert "a (unknown, 2 x 3)" in str(e.value) and "v (unknown, 2 x 3 x 4)" in str(e.value)
    with pytest.raises(ChoiceError, match="NO_SUCH_IMAGE"):
        study.image("b")
