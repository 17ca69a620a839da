"""From a scan to an encoder's input and back: proportions, padding, sides, windows, windows over large scans."""

import dataclasses
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm import preprocess
from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.evaluate.segment import dice
from medvlm.heads import mask
from medvlm.imaging import window
from medvlm.imaging.scan import Image, Volume
from medvlm.preprocess import Frame, InputSpec, blend, fit, frame, inputs, normalise, tiles, to_tensor

ORIENTATIONS = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]
"""All 48 ways in which three axes can lie in a patient."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def image(height: int, width: int, modality="xray", unit="uint8", **info) -> Image:
    return Image("a", np.zeros((1, height, width), np.uint8), None, modality, unit, info)


@pytest.mark.parametrize(
    ("size", "spec", "inner", "offset"),
    [
        ((100, 200), (64, 64), (32, 64), (16, 0)),
        ((200, 100), (64, 64), (64, 32), (0, 16)),
        ((100, 200), (64, 96), (48, 96), (8, 0)),
        ((30, 30), (64, 64), (64, 64), (0, 0)),  # enlarged
        ((3, 7), (64, 64), (27, 64), (18, 0)),  # 3 * 64 / 7 = 27.4; 37 rows to fill: 18 above, 19 below
        ((1, 1000), (64, 64), (1, 64), (31, 0)),  # never less than a pixel
    ],
)
def test_pictures_keep_their_proportions_and_lie_in_the_middle(size, spec, inner, offset):
    place = frame(image(*size), InputSpec(spec))
    assert (place.inner, place.offset, place.size, place.input) == (inner, offset, size, spec)


def test_padding_is_zero_on_both_sides_and_the_picture_fills_the_rest():
    bright = Image("a", np.full((1, 100, 200), 255, np.uint8), None, "xray", "uint8")
    tensor, _ = to_tensor(bright, InputSpec((64, 64)))
    assert tensor.shape == (1, 64, 64) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[0, 16:48], torch.ones(32, 64))
    assert tensor[0, :16].max() == tensor[0, 48:].max() == 0


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 4000)] * 2), st.tuples(*[st.integers(1, 16).map(lambda n: n * 32)] * 2), st.tuples(*[st.floats(0, 1)] * 2))
def test_points_go_to_the_input_and_come_back(size, spec, share):
    place = frame(image(*size), InputSpec(spec))
    point = np.array(share) * size
    there = place.to_input(point)
    assert (there >= -1e-6).all() and (there <= np.array(spec) + 1e-6).all()
    np.testing.assert_allclose(place.to_image(there), point, atol=1e-6 * max(size))
    np.testing.assert_allclose(place.to_input((0, 0)), place.offset)
    np.testing.assert_allclose(place.to_input(size), np.add(place.offset, place.inner))


@pytest.mark.parametrize("size", [(331, 517), (517, 331), (255, 257), (129, 640)])
def test_a_mask_comes_back_onto_the_image(size):
    h, w = np.ogrid[: size[0], : size[1]]
    ellipse = ((h - size[0] * 0.45) / (size[0] * 0.3)) ** 2 + ((w - size[1] * 0.4) / (size[1] * 0.25)) ** 2 < 1
    place = frame(image(*size), InputSpec((256, 256)))
    coverage = place.mask_to_input(ellipse)
    assert tuple(coverage.shape) == (256, 256) and -1e-6 < float(coverage.min()) and float(coverage.max()) < 1 + 1e-6
    assert dice((place.map_to_image(coverage[None]) > 0.5)[0].numpy(), ellipse) > 0.98
    half = torch.nn.functional.avg_pool2d(coverage[None, None], 2)[0]  # as a head draws it: at stride 2
    assert dice((place.map_to_image(half) > 0.5)[0].numpy(), ellipse) > 0.97


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(MedVLMError) as e:
        frame(image(10, 20), InputSpec((64, 64))).mask_to_input(np.zeros((20, 10), bool))
    assert e.value.code == "GRID_MISMATCH" and "(20, 10)" in e.value.message and "(10, 20)" in e.value.message


def test_a_mark_on_the_upper_left_stays_there():
    pixels = np.zeros((1, 120, 200), np.uint8)
    pixels[0, 10:30, 20:50] = 255
    tensor, place = to_tensor(Image("a", pixels, None, "xray", "uint8"), InputSpec((64, 64)))
    rows, columns = np.nonzero(tensor[0].numpy() > 0.5)
    low, high = place.to_input([(10, 20), (30, 50)])
    assert abs(rows.min() - low[0]) <= 1 and abs(rows.max() + 1 - high[0]) <= 1
    assert abs(columns.min() - low[1]) <= 1 and abs(columns.max() + 1 - high[1]) <= 1 and columns.max() < 32


def test_monochrome1_is_inverted_once():
    pixels = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))[None]
    plain, _ = to_tensor(Image("a", pixels, None, "xray", "uint8"), InputSpec((64, 64)))
    inverted, _ = to_tensor(Image("a", pixels, None, "xray", "uint8", {"inverted": True}), InputSpec((64, 64)))
    torch.testing.assert_close(inverted, 1 - plain)
    assert plain[0, 0, 0] == 0 and inverted[0, 0, 0] == 1


def test_the_file_window_is_what_the_encoder_sees():
    hu = Image("a", np.array([[[-1000.0, -200, 40, 240]] * 4]), None, "ct", "HU", {"windows": [(40, 401, "")]})
    tensor, _ = to_tensor(hu, InputSpec((4, 4)))
    np.testing.assert_allclose(tensor[0, 0].numpy(), [0, 0, 0.5, 1], atol=0.01)
    wide, _ = to_tensor(hu, InputSpec((4, 4), 2, unit="HU", windows=((40, 401), (-600, 1601))))
    np.testing.assert_allclose(wide[:, 0, 1].numpy(), [0, 0.75], atol=0.01)


def test_colour_and_grey_are_made_what_the_encoder_takes():
    red = Image("a", np.stack([np.full((8, 8), v, np.uint8) for v in (255, 0, 0)]), None, "fundus", "uint8")
    tensor, _ = to_tensor(red, InputSpec((8, 8), 1))
    torch.testing.assert_close(tensor, torch.full((1, 8, 8), 0.299))
    tensor, _ = to_tensor(image(8, 8), InputSpec((8, 8), 3))
    assert tensor.shape == (3, 8, 8)
    torch.testing.assert_close(normalise(torch.full((1, 2, 2, 2), 0.5), InputSpec((2, 2), 2, mean=(0.5, 0.25), std=(1, 0.5)))[0, :, 0, 0], torch.tensor([0.0, 0.5]))


def test_what_is_standardised_looks_alike_in_any_window_and_black_stays_black():
    lot = np.random.default_rng(0)
    pixels = np.zeros((1, 40, 40), np.uint8)
    pixels[0, 10:, :] = lot.integers(60, 120, (30, 40))
    spec = InputSpec((40, 40), standardise=True)
    seen, _ = to_tensor(Image("a", pixels, None, "xray", "uint8"), spec)
    shown = seen[0, 10:]
    assert (seen[0, :10] == 0).all()
    assert abs(float(shown.mean()) - 0.5) < 1e-3 and abs(float(shown.std(correction=0)) - 0.25) < 1e-3
    other = pixels.copy()
    other[0, 10:] += pixels[0, 10:] - 40  # twice the contrast, darker
    torch.testing.assert_close(to_tensor(Image("a", other, None, "xray", "uint8"), spec)[0], seen, atol=2e-3, rtol=0)


def test_what_is_flat_is_not_made_into_noise_and_windows_keep_their_values():
    spec = InputSpec((8, 8), 3, windows=((40, 400), (-600, 1500), (400, 1800)), standardise=True)
    flat = np.full((1, 8, 8), 100, np.uint8)
    flat[0, 0, 0] = 101
    assert float(to_tensor(Image("a", flat, None, "xray", "uint8"), spec)[0].std()) < 0.01
    hu = Image("a", np.linspace(-1000, 1000, 64).reshape(1, 8, 8), None, "ct", "HU")
    torch.testing.assert_close(to_tensor(hu, spec)[0], to_tensor(hu, dataclasses.replace(spec, standardise=False))[0])
    assert (to_tensor(Image("a", np.zeros((1, 8, 8), np.uint8), None, "xray", "uint8"), spec)[0] == 0).all()


@pytest.mark.parametrize(
    ("scan", "spec", "code", "says"),
    [
        (Volume("v", np.zeros((1, 3, 8, 8)), np.eye(4)), InputSpec((64, 64)), "OUT_OF_SCOPE", "3-D"),
        (image(8, 8), InputSpec((8, 8, 8)), "OUT_OF_SCOPE", "2-D"),
        (image(8, 8), InputSpec((8, 8), unit="HU", windows=((40, 400),)), "OUT_OF_SCOPE", "uint8"),
        (Image("a", np.zeros((1, 8, 8)), None, "ct", "HU"), InputSpec((8, 8), unit="HU"), "BAD_RECIPE", "window"),
        (Image("a", np.zeros((1, 8, 8)), None, "ct", "HU"), InputSpec((8, 8), 3, unit="HU", windows=((0, 9), (0, 9))), "OUT_OF_SCOPE", "channels"),
    ],
)
def test_what_an_encoder_was_not_trained_to_see_is_refused(scan, spec, code, says):
    with pytest.raises(MedVLMError) as e:
        to_tensor(scan, spec)
    assert e.value.code == code and says in e.value.message


def test_a_frame_places_maps_without_the_padding():
    """What lies in the padding of the input does not reach the image."""
    place = Frame((4, 8), (32, 64), (16, 0), (64, 64))
    map_ = torch.full((1, 64, 64), -1.0)
    map_[0, :16] = map_[0, 48:] = 5
    assert place.map_to_image(map_).shape == (1, 4, 8) and float(place.map_to_image(map_).max()) < 0


def affine(orientation: str, spacing=(1.0, 1.0, 1.0), origin=(-40.0, 25.0, 7.0)) -> np.ndarray:
    """index (d, h, w, 1) -> LPS+ mm, with axes that grow as the letters say."""
    made = np.eye(4)
    made[:3, :3] = 0
    made[:3, 3] = origin
    for axis, (letter, step) in enumerate(zip(orientation, spacing)):
        world = next(k for k, pair in enumerate(("LR", "PA", "SI")) if letter in pair)
        made[world, axis] = step if letter in "LPS" else -step
    return made


def volume(voxels, orientation="SPL", spacing=(1.0, 1.0, 1.0), unit="HU", at=None) -> Volume:
    return Volume("v", np.asarray(voxels)[None] if np.ndim(voxels) == 3 else voxels, affine(orientation, spacing) if at is None else at, "ct", unit)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_marked_voxel_goes_where_the_patient_has_it_and_comes_back(orientation):
    """The mark lies high, behind and on the patient's left: late in D, H and W of the input, however the scan is stored."""
    upright = np.zeros((3, 4, 5), np.float32)
    upright[2, 3, 4] = 1
    spacing = dict(zip("SPL", (3.0, 2.0, 1.0)))
    scan = volume(upright, spacing=(3, 2, 1)).reorient(orientation)
    assert scan.orientation == orientation and scan.spacing == tuple(spacing[{"I": "S", "A": "P", "R": "L"}.get(x, x)] for x in orientation)
    tensor, place = to_tensor(scan, InputSpec((5, 8, 5), spacing=(3, 2, 1), unit="HU", windows=((0.5, 2),)))
    assert place.upright == (3, 4, 5) and place.offset == (1, 2, 0) and place.scale == (1, 1, 1)
    assert np.argwhere(tensor[0].numpy() > 0.6).tolist() == [[3, 5, 4]]
    native = np.argwhere(scan.voxels[0])[0]
    np.testing.assert_allclose(place.to_input(native + 0.5), (3.5, 5.5, 4.5))
    np.testing.assert_allclose(place.to_image((3.5, 5.5, 4.5)), native + 0.5)
    np.testing.assert_allclose(place.box_to_input([native, native + 1]), [(3, 5, 4), (4, 6, 5)])
    np.testing.assert_allclose(place.box_to_image([(3, 5, 4), (4, 6, 5)]), [native, native + 1])
    mark = scan.voxels[0] > 0
    coverage = place.mask_to_input(mark)
    assert coverage[3, 5, 4] == 1 and coverage.sum() == 1
    assert np.array_equal(place.masks(coverage[None], 0.5)[0], mark)
    assert np.array_equal(place.labels(torch.stack([torch.full_like(coverage, 0.5), coverage])), mark)
    np.testing.assert_array_equal(place.map_to_image(coverage[None])[0].numpy(), mark.astype(np.float32))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_slice_lies_in_the_input_as_in_its_volume_and_its_mask_comes_back(orientation):
    """The mark is behind and left, above and left, or above and behind, so late in the input's rows or first, however the slice is stored."""
    upright = np.zeros((4, 4, 5), np.float32)
    upright[3, 3, 4] = 1
    scan = volume(upright, spacing=(3, 2, 1)).reorient(orientation)
    at = int(np.argwhere(scan.voxels[0])[0][0])
    affine = scan.affine.copy()
    affine[:, 3] = affine @ np.array([at, 0, 0, 1.0])
    picture = Image("slice", scan.voxels[:, at], scan.spacing[1:], "ct", "HU", {"affine": affine})
    spec = InputSpec((24, 24), unit="HU", windows=((0.5, 2),))
    tensor, place = to_tensor(picture, spec)
    kind = {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}[orientation[0]]
    row, column = np.argwhere(tensor[0].numpy() == tensor[0].numpy().max()).mean(0)
    assert (row > 12, column > 12) == {"axial": (True, True), "coronal": (False, True), "sagittal": (False, True)}[kind]  # P and L; head up, L; head up, P
    mark = picture.pixels[0] > 0
    assert np.array_equal(place.masks(place.mask_to_input(mark)[None], 0.5)[0], mark)
    box = [np.argwhere(mark)[0], np.argwhere(mark)[0] + 1]
    low, high = place.box_to_input(box)
    assert (low < (row + 0.5, column + 0.5)).all() and (high > (row + 0.5, column + 0.5)).all()
    np.testing.assert_allclose(place.box_to_image(place.box_to_input(box)), box)


@pytest.mark.parametrize("tilt", [np.eye(3), np.array([[1, 0, 0], [0, 0.9, -0.3], [0.1, 0.25, 0.95]]), np.array([[0.8, 0, 0.6], [0.1, -1, 0], [-0.6, 0.2, 0.8]])])
def test_an_input_voxel_holds_what_lies_at_its_place(tilt):
    """A field that is linear in the patient is linear along every axis, so scaling by any factor keeps its values.

    Within 0.15: sampled triangles are not quite even, and half a voxel's shift along any axis would be 0.22 or more.
    """
    at = affine("PIR", (1.3, 0.9, 2.1))
    at[:3, :3] = tilt @ at[:3, :3]
    grid = np.stack(np.meshgrid(*map(np.arange, (17, 23, 9)), indexing="ij"), -1)
    scan = volume(np.zeros((17, 23, 9), np.float32), at=at)
    scan = scan.with_voxels((scan.world(grid) @ (1.0, 2.0, -0.5))[None].astype(np.float32))
    for spec in (InputSpec((14, 12, 20), unit="HU", windows=((0, 4001),)), InputSpec((12, 12, 12), spacing=(2.5, 1.1, 1.7), unit="HU", windows=((0, 4001),))):
        tensor, place = to_tensor(scan, spec)
        centres = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in spec.size), indexing="ij"), -1)
        own = place.to_image(centres)
        inside = ((own > 3) & (own < np.array(place.size) - 3)).all(-1)  # away from the ends, where averages are cut
        value = tensor[0].numpy()[inside] * 4000 - 2000 - 0.5
        assert inside.sum() > 20
        np.testing.assert_allclose(value, (scan.world(own - 0.5) @ (1.0, 2.0, -0.5))[inside], atol=0.15)


def test_slices_fill_the_depth_and_a_plane_keeps_its_shape():
    scan = volume(np.zeros((10, 100, 60), np.float32), spacing=(5, 0.5, 1.0))  # a plane of 50 x 60 mm
    place = frame(scan, InputSpec((32, 64, 64)))
    assert place.inner == (32, 53, 64) and place.offset == (0, 5, 0)
    assert frame(Image("a", np.zeros((1, 100, 60)), (0.5, 1.0)), InputSpec((64, 64))).inner == (53, 64)
    assert frame(Image("a", np.zeros((1, 100, 60))), InputSpec((64, 64))).inner == (64, 38)


def test_a_spacing_cuts_out_the_middle_and_pads_the_rest():
    scan = volume(np.zeros((10, 100, 60), np.float32), spacing=(5, 0.5, 1.0))
    place = frame(scan, InputSpec((16, 32, 32), spacing=(5, 1, 1)))
    assert place.inner == (10, 50, 60) and place.offset == (3, -9, -14)
    seen = place.masks(torch.ones(1, 4, 8, 8))[0]  # rows 18 to 82 (32 of 50 mm), columns 14 to 46
    assert seen.all(0).sum() == seen.any(0).sum() == 64 * 32 and seen[:, 18:82, 14:46].all()
    assert place.labels(torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])).sum() == 10 * 64 * 32
    values = place.map_to_image(torch.ones(1, 4, 8, 8))[0]
    assert (values[torch.from_numpy(~seen)] == -torch.inf).all() and (values[torch.from_numpy(seen)] == 1).all()
    with pytest.raises(MedVLMError) as e:
        frame(Image("a", np.zeros((1, 8, 8))), InputSpec((8, 8), spacing=(1, 1)))
    assert e.value.code == "OUT_OF_SCOPE" and "spacing" in e.value.message


@pytest.mark.parametrize(("size", "spec"), [((331, 517), (64, 96)), ((10, 7), (64, 64)), ((2100, 1300), (256, 256)), ((1, 1), (32, 32)), ((1, 1000), (64, 64))])
def test_scaling_is_torchs_antialiased_one(size, spec, monkeypatch):
    picture = Image("a", np.random.default_rng(0).random((3, *size), np.float32), None, "fundus", "raw")
    tensor, place = to_tensor(picture, InputSpec(spec, 3, unit="raw", windows=((0.5, 2),)))
    (top, left), (high, wide) = place.offset, place.inner
    shown = torch.from_numpy(window.apply(picture.pixels, 0.5, 2))[None]
    theirs = F.interpolate(shown, place.inner, mode="bilinear", antialias=True)[0]
    gap = float((tensor[:, top : top + high, left : left + wide] - theirs).abs().max())
    print(f"largest difference to torch's interpolate {size} -> {spec}: {gap:.2g}")
    assert gap < 2e-6
    monkeypatch.setitem(preprocess.BLOCK, 2, 37)  # in blocks or at once
    torch.testing.assert_close(to_tensor(picture, InputSpec(spec, 3, unit="raw", windows=((0.5, 2),)))[0], tensor, rtol=0, atol=2e-6)


def test_a_volume_is_scaled_along_each_axis_as_a_picture_is(monkeypatch):
    monkeypatch.setitem(preprocess.BLOCK, 3, 16)
    values = torch.rand(40, 21, 50)
    tensor, _ = to_tensor(volume(values.numpy(), spacing=(1, 1, 1)), InputSpec((13, 17, 17), unit="HU", windows=((0.5, 2),), spacing=(40 / 13, 21 / 17, 50 / 17)))
    expected = torch.from_numpy(window.apply(values.numpy(), 0.5, 2))
    for axis, n in enumerate((13, 17, 17)):
        lines = expected.movedim(axis, -1)
        expected = F.interpolate(lines[None], (lines.shape[1], n), mode="bilinear", antialias=True)[0].movedim(-1, axis)
    torch.testing.assert_close(tensor[0], expected, rtol=0, atol=2e-6)


def test_a_volume_shows_its_windows_as_channels_or_what_a_viewer_shows():
    values = np.full((4, 6, 6), 40.0, np.float32)
    tensor, _ = to_tensor(volume(values), InputSpec((4, 6, 6), 2, unit="HU", windows=((40, 401), (-600, 1601))))
    assert tensor.shape == (2, 4, 6, 6)
    np.testing.assert_allclose(tensor[:, 2, 3, 3].numpy(), [0.5, 0.9], atol=0.01)
    ramp = np.random.default_rng(0).normal(0, 100, (4, 6, 6)).astype(np.float32)
    scan = volume(ramp, "LPS", unit="raw")
    shown, _ = to_tensor(scan, InputSpec((6, 6, 4), 3, spacing=(1, 1, 1)))
    np.testing.assert_allclose(shown[0].numpy(), window.display(scan.reorient("SPL")) / 255, atol=1e-6)
    assert shown.shape[0] == 3 and torch.equal(shown[0], shown[2])
    mean = normalise(torch.full((2, 1, 4, 6, 6), 0.5), InputSpec((4, 6, 6), 1, mean=(0.25,), std=(0.5,)))
    torch.testing.assert_close(mean, torch.full((2, 1, 4, 6, 6), 0.5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused(bad):
    values = np.zeros((4, 6, 6), np.float32)
    values[1, 2, 3] = bad
    picture = Image("p", values[1:2], None, "ct", "HU")
    for scan, spec in ((volume(values), InputSpec((4, 4, 4), unit="HU", windows=((40, 400),))), (volume(values), InputSpec((4, 4, 4))), (picture, InputSpec((8, 8)))):
        with pytest.raises(MedVLMError) as e:
            to_tensor(scan, spec)
        assert e.value.code == "NOT_FINITE" and scan.id in e.value.message and e.value.hint


def reference(maps, size):
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(maps[None], size, mode=mode, align_corners=False)[0]


@pytest.mark.parametrize(("grid", "size"), [((8, 12, 10), (16, 24, 30)), ((8, 12, 10), (17, 29, 31)), ((8, 12, 10), (5, 40, 3)), ((32, 24), (64, 100)), ((5, 7), (333, 250))])
def test_labels_are_the_argmax_of_what_torch_interpolates(grid, size, monkeypatch):
    monkeypatch.setattr(preprocess, "STRIP", 1000)  # rows go out in strips
    maps = torch.randn(9, *grid, generator=torch.Generator().manual_seed(0)) * 4
    place = Frame(size, grid, (0,) * len(grid), grid, "SPL" if len(grid) == 3 else None)
    full = reference(maps, size)
    torch.testing.assert_close(place.map_to_image(maps), full, rtol=0, atol=5e-5)
    labels = place.labels(maps)
    top = full.topk(2, 0).values
    sure = (top[0] - top[1] > 1e-4).numpy()
    assert labels.dtype == np.uint8 and sure.mean() > 0.999
    assert np.array_equal(labels[sure], full.argmax(0).numpy()[sure])
    assert np.array_equal(place.masks(maps)[:, sure], (full > 0).numpy()[:, sure]) or (full.abs() < 1e-4).any()


def test_many_classes_and_ties():
    place = Frame((4, 4), (2, 2), (0, 0), (2, 2))
    maps = torch.zeros(300, 2, 2)
    maps[299, 0, 0] = maps[7, 1, 1] = maps[9, 1, 1] = 1  # of equal ones the first, as argmax
    labels = place.labels(maps)
    assert labels.dtype == np.uint16 and labels[0, 0] == 299 and labels[3, 3] == 7
    assert place.labels(torch.zeros(3, 2, 2)).max() == 0


def test_half_precision_maps_come_back_too():
    place = Frame((4, 6), (8, 12), (0, 0), (8, 12))
    maps = torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]]).bfloat16()
    assert np.array_equal(place.masks(maps), place.masks(maps.float())) and place.map_to_image(maps).dtype == torch.float32


class Peak:
    """Bytes by which the process's memory grew at most within the block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = self._read("VmHWM") - self.before

    def _read(self, name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is read from Linux's /proc")


@linux
@torch.no_grad()
def test_a_whole_ct_goes_in_through_a_mask_head_and_back_in_little_memory():
    """300 slices of 512 x 512: 300 MiB as float32. The input here is 6 MiB, each mask on the scan's own grid 75 MiB."""
    voxels = np.broadcast_to(np.arange(-1000, 200, 4, dtype=np.int16).reshape(1, 300, 1, 1), (1, 300, 512, 512))
    scan = Volume("ct", voxels, affine("SPL", (1.25, 0.7, 0.7)), "ct", "HU")
    head = mask.build((1, 1), (4, 16), 8, (96, 128, 128), dim=16, stride=16, heads=2).eval()
    with Peak() as peak:
        tensor, place = to_tensor(scan, InputSpec((96, 128, 128), unit="HU", windows=((40, 400),)))
    assert tensor.shape == (1, 96, 128, 128) and peak.bytes < 64 << 20, peak.bytes
    point = torch.tensor(place.to_input((150.5, 256.5, 256.5)) - 0.5).float().reshape(1, 1, 3)
    with Peak() as peak:
        features = Features(None, (1,), None, (F.avg_pool3d(tensor[None], 4), F.avg_pool3d(tensor[None], 16)))
        drawn = head(features, mask.Prompts(torch.tensor([0]), points=point, labels=torch.tensor([[1]])))
        outline = place.masks(drawn.logits)[0]
        labels = place.labels(torch.stack([torch.full((24, 32, 32), 0.5), features.levels[0][0, 0]]))
    assert drawn.logits.shape == (1, 24, 32, 32) and outline.shape == labels.shape == (300, 512, 512)
    assert labels[0].max() == 0 and labels[-1].min() == 1
    assert peak.bytes < (2 * 75 + 40) << 20, peak.bytes


@linux
def test_a_picture_of_20000_by_20000_pixels_goes_in():
    """400 MiB as bytes; as float32 in one piece it would be 1.5 GiB."""
    pixels = np.broadcast_to((np.arange(20000) // 79).astype(np.uint8), (1, 20000, 20000))
    with Peak() as peak:
        tensor, place = to_tensor(Image("a", pixels, None, "pathology", "uint8"), InputSpec((256, 256)))
    np.testing.assert_allclose(tensor[0, 128, 2:-2].numpy() * 255, (np.arange(256) * 20000 / 256 / 79)[2:-2], atol=1.1)
    assert peak.bytes < 64 << 20, peak.bytes


def test_one_pixel():
    for scan, spec in ((Image("a", np.full((1, 1, 1), 255, np.uint8), None, "xray", "uint8"), InputSpec((32, 32))), (volume(np.full((1, 1, 1), 255, np.uint8), unit="uint8"), InputSpec((8, 8, 8)))):
        tensor, place = to_tensor(scan, spec)
        assert (tensor == 1).all() and place.masks(torch.ones(1, *(4,) * len(spec.size))).shape == (1, *scan.shape[1:])


@pytest.mark.parametrize(("size", "zoom", "overlap", "multiple"), [((300, 500), 4, 0.25, 8), ((300, 500), 3.3, 0.0, 16), ((500, 90), 2, 0.5, 32), ((300, 500), 1, 0.25, 32), ((64, 64), 0.5, 0.25, 1)])
def test_windows_over_a_picture_are_the_picture(size, zoom, overlap, multiple):
    """A model that gives back what it sees: joined, its windows are the whole picture at that resolution, with no seam."""
    picture = Image("a", np.random.default_rng(1).integers(0, 255, (1, *size), dtype=np.uint8), None, "fundus", "uint8")
    spec = InputSpec((64, 64))
    tiled = tiles(picture, spec, zoom, overlap, multiple)
    assert all(p.input == (64, 64) and p.inner == tiled.whole.inner for p in tiled.frames) and len(set(tiled.frames)) == len(tiled.frames)
    assert (zoom == 1) == (tiled == (frame(picture, spec), (frame(picture, spec),)))
    seen = list(inputs(picture, spec, tiled.frames))
    whole = fit(picture.pixels, tiled.whole, lambda part: part.astype(np.float32) / 255)
    torch.testing.assert_close(blend(tiled, seen), whole, rtol=0, atol=1e-5)
    pooled = blend(tiled, (F.avg_pool2d(t, multiple) for t in seen))
    torch.testing.assert_close(pooled, F.avg_pool2d(whole, multiple), rtol=0, atol=1e-5)
    mask = np.zeros(size, bool)
    mask[: size[0] // 2, size[1] // 3 :] = True
    back = tiled.whole.masks(blend(tiled, (p.mask_to_input(mask)[None] for p in tiled.frames)), 0.5)[0]
    assert dice(back, mask) > 0.97


def test_windows_cover_a_volume_at_its_spacing():
    scan = volume(np.random.default_rng(2).normal(0, 200, (20, 50, 44)).astype(np.float32), "RIP", (1.0, 1.5, 0.8))
    spec = InputSpec((16, 24, 16), spacing=(1.5, 1.0, 1.2), unit="HU", windows=((0, 800),))
    tiled = tiles(scan, spec, multiple=4)
    assert tiled.whole.inner == (50, 35, 17) and len(tiled.frames) > 4
    joined = blend(tiled, inputs(scan, spec, tiled.frames))
    torch.testing.assert_close(joined, fit(scan.voxels, tiled.whole, lambda part: window.apply(part, 0, 800)), rtol=0, atol=1e-5)
    mark = np.zeros((20, 50, 44), bool)
    mark[3:9, 30:48, 5:20] = True
    back = tiled.whole.masks(blend(tiled, (p.mask_to_input(mark)[None] for p in tiled.frames)), 0.5)[0]
    assert dice(back, mark) > 0.93


@pytest.mark.parametrize("given", [{"zoom": 0}, {"zoom": np.nan}, {"overlap": 1.0}, {"overlap": -0.1}, {"multiple": 0}, {"zoom": 1e4}])
def test_windows_that_cannot_be_are_refused(given):
    with pytest.raises(MedVLMError) as e:
        tiles(image(100, 200), InputSpec((64, 64)), **given)
    assert e.value.code == "BAD_ARGUMENT"


def test_maps_whose_stride_the_windows_do_not_keep_are_refused():
    tiled = tiles(image(300, 500), InputSpec((64, 64)), 3, multiple=8)
    with pytest.raises(MedVLMError) as e:
        blend(tiled, (torch.zeros(1, 4, 4) for _ in tiled.frames))
    assert e.value.code == "BAD_ARGUMENT" and "multiple" in e.value.hint
