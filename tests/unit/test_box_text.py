"""Boxes in the words of language models: written as each family writes them, and read back."""


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.datasets.sentences import BOX_STYLES, box_text, boxes_in
from medvlm.errors import MedVLMError

pixels = st.integers(2, 3000)


@st.composite
def boxes_of_pictures(draw):
    size = draw(pixels), draw(pixels)
    sides = [sorted(draw(st.tuples(*[st.floats(0, n, width=32)] * 2).filter(lambda p: p[0] != p[1]))) for n in size]
    return ((sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])), size


@pytest.mark.parametrize("style", BOX_STYLES)
@settings(max_examples=150, deadline=None)
@given(case=boxes_of_pictures(), label=st.sampled_from(["", "left lung", 'a "quoted" name', "größe"]))
def test_a_box_written_is_the_box_read(style, case, label):
    box, size = case
    ((back, name),) = boxes_in(f"Found: {box_text(box, size, label, style)}.", size, style)
    assert name.rstrip(".") == label
    for axis, n in enumerate(size):
        step = n / (BOX_STYLES[style] or n)
        assert abs(back[0][axis] - box[0][axis]) <= step * 1.001 and abs(back[1][axis] - box[1][axis]) <= step * 1.001
        if box[1][axis] - box[0][axis] > step:
            assert abs(back[0][axis] - box[0][axis]) <= step * 0.501
        assert 0 <= back[0][axis] < back[1][axis] <= n


def test_boxes_are_written_as_the_models_write_them():
    box, size = ((20, 50), (120, 150)), (200, 500)
    assert box_text(box, size, "nodule") == '{"bbox_2d": [100, 100, 300, 600], "label": "nodule"}'
    assert box_text(box, size, style="qwen2.5") == '{"bbox_2d": [50, 20, 150, 120]}'
    assert box_text(((0, 0), (200, 500)), size) == '{"bbox_2d": [0, 0, 1000, 1000]}'
    # 1023 * 0.1, 0.1, 0.6, 0.3 in the order y, x, y, x
    assert box_text(box, size, "nodule", "paligemma") == "<loc0102><loc0102><loc0614><loc0307> nodule"
    assert box_text(((0, 0), (200, 500)), size, style="paligemma") == "<loc0000><loc0000><loc1023><loc1023>"


def test_boxes_are_read_out_of_what_models_say():
    said = '```json\n[\n\t{"bbox_2d": [100, 100, 300, 600], "label": "nodule"},\n\t{"label": \'cyst\', "bbox_2d":[0,0,1000,1000,]},\n\t{"bbox_2d": [5, 5'
    assert boxes_in(said, (200, 500)) == [(((20, 50), (120, 150)), "nodule"), (((0, 0), (200, 500)), "cyst")]
    two = "<loc0000><loc0000><loc1023><loc1023> lung ; <loc0000><loc0000><loc0341><loc1023><seg001><seg002> heart"
    assert boxes_in(two, (30, 60), "paligemma") == [(((0, 0), (30, 60)), "lung"), (((0, 0), (10, 60)), "heart")]


@pytest.mark.parametrize(
    "text",
    ["", "no box", "[1, 2, 3, 4]", '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": [1, 2, 3, "4"]}', '{"bbox_2d": [300, 1, 100, 9]}', '{"bbox_2d": [1, 9, 9, 9]}', '{"bbox_2d": [1, 1, 9, 1001]}',
     '{"bbox_2d": [-1, 1, 9, 9]}', '{"bbox_2d": [1e9, 1, 2, 3]}', '{"bbox_2d": [NaN, 1, 9, 9]}', '{"bbox_2d": [1, 2, 3, 4]', '{"bbox": [1, 2, 3, 4]}', "{" * 5000, '{"bbox_2d": [' * 3000],
)  # fmt: skip
def test_what_is_no_box_is_none(text):
    assert boxes_in(text, (100, 100)) == []


@pytest.mark.parametrize("text", ["<loc0001><loc0002><loc0003>", "<loc0001>" * 5, "<loc0009><loc0001><loc0003><loc0004>", "<loc0000><loc0000><loc1024><loc0004>", "<loc1><loc2><loc3><loc4>"])
def test_what_is_no_place_is_none(text):
    assert boxes_in(text, (100, 100), "paligemma") == []


@pytest.mark.parametrize(
    ("box", "size", "style"),
    [(((0, 0), (0, 5)), (9, 9), "qwen3"), (((0, 0), (10, 5)), (9, 9), "qwen3"), (((-1, 0), (3, 5)), (9, 9), "qwen3"), (((0, 0, 0), (1, 1, 1)), (9, 9, 9), "qwen3"),
     (((0, 0), (3, 5)), (9, 9), "qwen"), (((float("nan"), 0), (3, 5)), (9, 9), "qwen3"), (((0, 0), (1, 1)), (0, 9), "qwen3")],
)  # fmt: skip
def test_what_is_no_box_is_not_written(box, size, style):
    with pytest.raises(MedVLMError) as e:
        box_text(box, size, style=style)
    assert e.value.code == "BAD_ARGUMENT"
