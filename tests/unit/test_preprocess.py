"""From a scan to an encoder's input and back: proportions, padding, sides, windows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.errors import MedVLMError
from medvlm.evaluate.segmentation import dice
from medvlm.imaging.scan import Image, Volume
from medvlm.preprocess import Frame, InputSpec, frame, normalise, to_tensor


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
