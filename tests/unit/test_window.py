"""Windows by the formulas of DICOM PS3.3 C.11.2.1, worked by hand; MONOCHROME1 inverted exactly once."""

import numpy as np
import pytest

from medvlm.errors import UsageError
from medvlm.imaging import window
from medvlm.imaging.scan import Image, Volume


def image(values, **info):
    return Image("a", np.asarray(values)[None], info=info)


def test_linear_window_worked_by_hand():
    """Centre 40, width 400: black up to 39.5 - 199.5 = -160, white above 39.5 + 199.5 = 239."""
    x = np.array([-1000, -160, -159, 39.5, 40, 238, 239, 3000])
    expected = [0, 0, 1 / 399, 0.5, 0.5 + 0.5 / 399, 398 / 399, 1, 1]
    assert np.allclose(window.apply(x, 40, 400), expected, atol=1e-6)
    assert window.apply(x, 40, 400).dtype == np.float32


def test_width_one_is_a_step_at_half_below_the_centre():
    assert window.apply(np.array([9.0, 9.5, 9.6, 10]), 10, 1).tolist() == [0, 0, 1, 1]


def test_linear_exact_and_sigmoid_worked_by_hand():
    """Exact 0, width 4: -2 is black, 2 is white. Sigmoid: 1 / (1 + exp(-4 (x - c) / w))."""
    assert np.allclose(window.apply(np.array([-3, -2, -1, 0, 1, 2, 3]), 0, 4, "LINEAR_EXACT"), [0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert np.allclose(window.apply(np.array([0.0, 1.0, -1.0]), 0, 4, "sigmoid"), [0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])
    assert window.apply(np.array([0.25]), 0, 0.5, "linear exact")[0] == 1


@pytest.mark.parametrize(("centre", "width", "function"), [(0, 0, "linear"), (0, 0.5, "linear"), (0, -1, "sigmoid"), (np.nan, 5, "linear"), (0, np.inf, "linear"), (0, 5, "cubic")])
def test_windows_that_cannot_be_are_refused(centre, width, function):
    with pytest.raises(UsageError):
        window.apply(np.zeros(3), centre, width, function)


def test_not_a_number_is_black_and_types_do_not_matter():
    assert window.apply(np.array([np.nan, np.inf, -np.inf], np.float32), 0, 10).tolist() == [0, 1, 0]
    for kind in (np.int16, np.uint16, np.int64, np.float64, np.float16):
        assert np.allclose(window.apply(np.array([0, 100, 50], kind), 50.5, 101), [0, 1, 0.5], atol=1e-3)


def test_presets():
    """Lung -600/1500 spans -1350..150 HU; MedGemma's blue channel spans 0..80 HU."""
    lung = window.apply(np.array([-1350.0, 149.0, -600.5]), *window.PRESETS["lung"])
    assert np.allclose(lung, [0, 1, 0.5], atol=1e-3)
    assert set(window.PRESETS) == {"soft tissue", "lung", "liver", "bone", "brain", "mediastinum"}
    for (centre, width), (low, high) in zip(window.MEDGEMMA, ((-1024, 1024), (-135, 215), (0, 80))):
        assert (centre - width / 2, centre + width / 2) == (low, high)


def test_display_uses_the_files_first_window_that_can_be():
    values = np.array([[-160, 239], [39, 40]], np.int16)
    a = image(values, windows=[(10, 0, ""), (40, 400, "SOFT"), (0, 1, "")])
    assert window.display(a).tolist() == [[0, 255], [127, 128]]
    assert [w.split(":")[0] for w in a.info["warnings"]] == ["BAD_WINDOW"]
    window.display(a)
    assert len(a.info["warnings"]) == 1
    exact = image(np.array([[-2, 0, 1]]), windows=[(0, 4, "")], voi_function="LINEAR_EXACT")
    assert window.display(exact).tolist() == [[0, 128, 191]]


def test_display_puts_the_table_before_the_window():
    """Stored 10, 11, 12 map to 0, 100, 255 of 8 bits; values beyond get the first and last entry."""
    a = image(np.array([[9, 10, 11, 12, 99]]), voi_lut=[{"first": 10, "bits": 8, "values": np.array([0, 100, 255], np.uint8)}], windows=[(0, 1, "")])
    assert window.display(a).tolist() == [[0, 0, 100, 255, 255]]
    deep = image(np.array([[0, 1]]), voi_lut=[{"first": 0, "bits": 10, "values": np.array([0, 1023], np.uint16)}])
    assert window.display(deep).tolist() == [[0, 255]]


def test_monochrome1_is_inverted_once_and_the_pixels_never():
    values = np.array([[0, 100]], np.int16)
    for info in ({"windows": [(50.5, 101, "")]}, {"voi_lut": [{"first": 0, "bits": 8, "values": np.linspace(0, 255, 101).astype(np.uint8)}]}, {}):
        plain, turned = image(values, **info), image(values, **info, inverted=True)
        assert window.display(plain).tolist() == [[0, 255]] and window.display(turned).tolist() == [[255, 0]]
        assert window.display(turned).tolist() == [[255, 0]]  # a second look is the same
        assert np.array_equal(turned.pixels[0], values)
    hu = Volume("v", np.array([[[[-1000, 3000]]]], np.int16), np.eye(4), "ct", "HU", {"windows": [(1000.5, 4001, "")], "inverted": True})
    assert window.display(hu).tolist() == [[[255, 0]]]


def test_display_without_a_window():
    eight = np.array([[3, 200]], np.uint8)
    assert np.array_equal(window.display(image(eight)), eight)
    ramp = np.arange(1001, dtype=np.int16)[None]
    shown = window.display(image(ramp))  # black at 5, white at 995: the 0.5 and 99.5 percentiles
    assert shown[0, 5] == 0 and shown[0, 995] == 255 and shown[0, 500] == 128 and shown[0, 1000] == 255
    padded = ramp.copy()
    padded[0, :400] = -2000
    with_padding = window.display(image(padded, padding=(-2000, -2000)))
    assert with_padding[0, 0] == 0 and with_padding[0, 400] == 0 and with_padding[0, 700] in (127, 128)
    for flat in (np.zeros((2, 2), np.int16), np.full((2, 2), 7.5), np.full((2, 2), np.nan)):
        assert not window.display(image(flat)).any()
    mostly = np.zeros((1, 1000), np.float32)
    mostly[0, 0] = 5  # a mask: both percentiles are 0
    assert window.display(image(mostly))[0, 0] == 255


def test_colour_and_volumes_keep_their_shape():
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(3, 2, 3)
    shown = window.display(Image("a", rgb, info={"windows": [(1, 2, "")], "inverted": True}))
    assert shown.shape == (2, 3, 3) and np.array_equal(shown, rgb.transpose(1, 2, 0))
    deep = np.array([0, 32768, 65535], np.uint16)[:, None, None]
    assert window.display(Image("a", deep)).ravel().tolist() == [0, 128, 255]
    assert window.display(Volume("v", np.zeros((1, 2, 3, 4), np.int16), np.eye(4))).shape == (2, 3, 4)
    assert window.display(Volume("v", np.zeros((3, 2, 3, 4), np.uint8), np.eye(4))).shape == (2, 3, 4, 3)


@pytest.mark.parametrize(
    ("array", "info"),
    [
        (np.arange(600, dtype=np.int16), {}),
        (np.arange(600, dtype=np.int16), {"windows": [(300, 200, "")], "inverted": True}),
        (np.arange(600, dtype=np.uint8), {"inverted": True}),
        (np.arange(600) % 7, {"voi_lut": [{"first": 2, "values": [0, 9, 250, 255], "bits": 8}]}),
        (np.arange(600, dtype=np.uint16) * 100, {"colour": True}),
        (np.linspace(-3, 5, 600), {"colour": True}),
    ],
)
def test_a_part_is_shown_as_it_is_in_the_whole(array, info):
    array = array.reshape(3, 10, 20) if info.pop("colour", False) else array.reshape(1, 30, 20)
    whole = window.look(array, info)(array)
    assert whole.dtype == np.uint8 and len(np.unique(whole)) > 3
    assert np.array_equal(window.look(array, info)(array[:, 3:9, 5:]), whole[:, 3:9, 5:])
    assert np.array_equal(window.show(array, info), whole[0] if len(whole) == 1 else whole.transpose(1, 2, 0))
