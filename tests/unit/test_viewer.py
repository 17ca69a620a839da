"""What the review page draws: left is left, masks lie where they were made, text stays text."""

import itertools

import numpy as np
import pytest

from medvlm.demo import viewer
from medvlm.imaging.export import outlined
from medvlm.imaging.scan import GROWTH, Image, Volume
from medvlm.sample import Region

EVERY = ["".join(signs) for axes in itertools.permutations(GROWTH) for signs in itertools.product(*axes)]


def stored(letters: str) -> Volume:
    """A head-shaped number: voxel value = 10 L + 100 P + 1000 S in steps of 2, 3 and 4 mm, stored as ``letters`` say."""
    x, y, z = np.arange(7), np.arange(6), np.arange(5)
    voxels = (10 * x + 100 * y[:, None] + 1000 * z[:, None, None]).astype(np.int16)[None]
    return Volume("v", voxels, [[0, 0, 2, -6], [0, 3, 0, 30], [4, 0, 0, -8], [0, 0, 0, 1]], "ct", "HU").reorient(letters)


@pytest.mark.parametrize("letters", EVERY)
def test_left_is_left_however_the_voxels_are_stored(letters):
    volume = stored(letters)
    scene = viewer.Scene(volume)
    edges = dict(zip(("left", "right", "top", "bottom"), scene.letters))
    plane = {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}[letters[0]]
    assert edges == {
        "axial": {"left": "R", "right": "L", "top": "A", "bottom": "P"},
        "coronal": {"left": "R", "right": "L", "top": "S", "bottom": "I"},
        "sagittal": {"left": "A", "right": "P", "top": "S", "bottom": "I"},
    }[plane]
    mask = volume.voxels[0] == 3000 + 200 + 50  # L index 5, P index 2, S index 3
    (at,), (row,), (column,) = scene.masks([Region("v", "dot", mask=mask)]).nonzero()
    assert (at, row, column) == {"axial": (3, 2, 5), "coronal": (2, 1, 5), "sagittal": (5, 1, 2)}[plane]
    assert scene.volume.voxels[0, at, row, column] == 3250
    assert scene.place(at) == {"axial": "slice 4 of 5, S 4.0 mm", "coronal": "slice 3 of 6, P 36.0 mm", "sagittal": "slice 6 of 7, L 4.0 mm"}[plane]
    high, wide = scene.size
    assert (high, wide) == {"axial": (18, 14), "coronal": (20, 14), "sagittal": (20, 18)}[plane]


def test_the_other_side_of_the_origin_has_the_other_letter():
    assert viewer.Scene(stored("SPL")).place(0) == "slice 1 of 5, I 8.0 mm"


def test_a_picture_has_letters_only_where_its_place_is_known():
    pixels = np.zeros((1, 4, 6), np.uint8)
    assert viewer.Scene(Image("x", pixels, (1, 1), "xray", "uint8", {"view": "PA"})).letters is None
    affine = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]  # d left, h to the feet, w back: a sagittal slice
    assert viewer.Scene(Image("s", pixels, (1, 1), "mr", "raw", {"affine": affine})).letters == ("A", "P", "S", "I")


def test_windows():
    scene = viewer.Scene(stored("SPL"))
    assert scene.presets == ("of the file", "soft tissue", "lung", "liver", "bone", "brain", "mediastinum")
    shown = scene.grey(0, "soft tissue")
    assert shown[0, 4] == 128 and shown[4, 0] == 255 and shown.dtype == np.uint8  # 40 HU is the centre, 400 above it
    assert (scene.grey(0, "soft tissue", invert=True) == 255 - shown).all()
    assert [scene.grey(k).max() for k in range(5)] == sorted(scene.grey(k).max() for k in range(5))  # one window for all slices
    inverted = Image("x", np.array([[[0, 255]]], np.uint8), None, "xray", "uint8", {"inverted": True})
    assert viewer.Scene(inverted).presets == ("of the file",) and viewer.Scene(inverted).grey(0).tolist() == [[255, 0]]


def test_boxes_are_drawn_as_what_they_enclose():
    scene = viewer.Scene(Image("x", np.zeros((1, 8, 10), np.uint8)))
    mask = scene.masks([Region("x", "nodule", box=((1, 2), (4, 6)))])
    assert mask.shape == (1, 8, 10) and mask[0, 1:4, 2:6].all() and mask.sum() == 12


def test_overlays_blend_and_keep_proportions():
    left, right = np.zeros((2, 4, 8), bool)
    left[:, :5], right[:, 3:] = True, True
    over = viewer.paint([("#ff0000", left), ("#0000ff", right)], (20.0, 10.0), 1.0, True)
    assert over.shape == (1000, 500, 4)
    assert over[500, 100].tolist() == [255, 0, 0, 115] and over[500, 400].tolist() == [0, 0, 255, 115]
    both = over[500, 250]
    assert both[0] > 60 and both[2] > 130 and both[3] == 178  # 1 - 0.55 * 0.55
    outline = viewer.paint([("#ff0000", left)], (20.0, 10.0), 0.5, False)
    assert outline[500, 100, 3] == 0 and outline[500, 0].tolist() == [255, 0, 0, 128]


def test_text_cannot_become_page():
    image = Image('"><script>', np.zeros((1, 2, 2), np.uint8), None, "xray", "uint8")
    shown = viewer.stage(viewer.Scene(image), 0, viewer.FILE_WINDOW, False, (), 1, False)
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert viewer.alarm("<b>{{x}}") == '<div class="mv-error" role="alert">&lt;b&gt;&#123;&#123;x&#125;&#125;</div>' and viewer.alarm("") == ""


@pytest.mark.parametrize("stored", ["SPL", "LAS", "SAR", "PIL", "IPR"])
def test_a_preview_is_turned_as_a_radiologist_reads_it_and_lettered(stored):
    """A mark on the patient's right and front: left and, of an axial slice, above; however the volume is stored."""
    voxels, mark = np.zeros((1, 12, 40, 60), np.int16), np.zeros((12, 40, 60), bool)
    mark[6, 4:10, 6:14] = True
    voxels[0][mark] = 1000
    whole = Volume("ct-1", voxels, np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]]), "ct", "HU", {"warnings": []})
    assert whole.orientation == "SPL"
    scan = whole.reorient(stored)
    own = whole.with_voxels(mark[None].astype(np.uint8)).reorient(stored).voxels[0] > 0
    canvas, colours = outlined(scan, [Region("ct-1", "spot", None, own, None)], longest=300)
    blue = (np.abs(canvas.astype(int) - [int(colours["spot"][k : k + 2], 16) for k in (1, 3, 5)]).sum(-1) < 12)
    rows, columns = (np.argwhere(blue).mean(0) / canvas.shape[:2])
    if stored[0] in "SI":
        assert rows < 0.5 and columns < 0.5
    plain, _ = outlined(Image("x", voxels[:, 6], None, "ct", "HU", {"warnings": []}), [], longest=300)
    middle = canvas[canvas.shape[0] // 2 - 8 : canvas.shape[0] // 2 + 8]
    assert middle[:, :20].max() > 200 and middle[:, -20:].max() > 200 and plain[92:108, :20].max() < 100
