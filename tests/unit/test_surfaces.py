"""Distances between surfaces: worked by hand, against MONAI (voxel) and DeepMind's surface-distance (surfel), and their symmetries."""

import math
import warnings

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from medvlm.errors import MedVLMError
from medvlm.evaluate import surfaces as module
from medvlm.evaluate.surfaces import KINDS, surfaces
from medvlm.sample import box_of


def points(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


def blob(shape, seed, share=0.5):
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return field > np.quantile(field, 1 - share)


def cases():
    """(prediction, reference, spacing): blobs that touch the border, sparse ones, single voxels, lines, planes, whole images, far corners."""
    rng = np.random.default_rng(0)
    for n, shape in enumerate([(14, 20, 17), (9, 13, 24), (31, 26), (40, 17)]):
        for share in (0.5, 0.15):
            yield blob(shape, n, share), blob(shape, n + 9, share), rng.uniform(0.4, 3, len(shape))
    for shape, spacing in (((7, 9, 8), (2.5, 0.8, 0.8)), ((11, 12), (0.3, 1.7))):
        middle, corner, edge = tuple(n // 2 for n in shape), (0,) * len(shape), tuple(n - 1 for n in shape)
        line = points(shape, (slice(None), *corner[1:]))
        whole = np.ones(shape, bool)
        yield points(shape, corner), points(shape, edge), spacing
        yield points(shape, middle), points(shape, middle, corner), spacing
        yield line, points(shape, edge), spacing
        yield whole, points(shape, middle), spacing
        yield whole, ~points(shape, middle), spacing
    yield blob((12, 15, 14), 3), blob((12, 15, 14), 4), (0.5, 0.5, 1.0)  # ties with the tolerance
    yield blob((12, 15, 14), 5), blob((12, 15, 14), 6), (0.1, 0.2, 0.3)  # ties that rounding decides


def test_single_voxels_by_hand():
    # one row apart 0 times 2 mm, three columns times 0.5 mm
    s = surfaces(points((5, 7), (2, 2)), points((5, 7), (2, 5)), (2, 0.5))
    assert s.hausdorff() == s.average() == 1.5 and s.nsd(1.49) == 0 and s.nsd(1.5) == 1
    # sqrt((1 * 3)^2 + 0 + (2 * 2)^2) = 5
    s = surfaces(points((4, 4, 4), (1, 1, 1)), points((4, 4, 4), (2, 1, 3)), (3, 1, 2))
    assert s.hausdorff() == s.average() == 5.0
    assert surfaces(points((4, 4, 4), (1, 1, 1)), points((4, 4, 4), (2, 1, 3))).average() == math.sqrt(5)  # pixels


def test_the_border_is_what_touches_the_outside():
    cube, square = points((7, 7, 7), (slice(2, 5),) * 3), points((9, 9), (slice(2, 7),) * 2)
    assert len(surfaces(cube, cube).predicted) == 26 and len(surfaces(square, square).predicted) == 16
    assert len(surfaces(np.ones((4, 4)), np.ones((4, 4))).predicted) == 12  # beyond the image is outside


def test_the_percentile_is_between_ranks_and_the_larger_of_two():
    line, short = points((1, 20), (0, slice(None))), points((1, 20), (0, slice(19)))
    # from the line: 19 zeros and one 1; at rank 0.95 * 19 = 18.05 that is 0.05. From the short one: zeros only
    assert surfaces(line, short).hausdorff(95) == pytest.approx(0.05) == surfaces(short, line).hausdorff(95)
    assert surfaces(line, short).hausdorff(100) == 1 and surfaces(line, short).hausdorff(50) == 0
    assert surfaces(line, short).average() == pytest.approx(1 / 39)  # one of 20 + 19 elements is 1 away
    assert surfaces(line, short).nsd(0.5) == pytest.approx(38 / 39)


def test_surface_elements_by_hand():
    # a pixel of 3 x 4 mm has four corners, each cut by half a diagonal of 5 mm
    a, b = points((3, 4), (1, 1)), points((3, 4), (1, 2))
    s = surfaces(a, b, (3, 4), "surfel")
    assert s.predicted_size.tolist() == [2.5] * 4
    # two corners are shared, two lie one pixel of 4 mm away, on either side
    assert sorted(s.predicted.tolist()) == [0, 0, 4, 4] and s.nsd(1) == 0.5 and s.average() == 2 and s.hausdorff(95) == 4 and s.hausdorff(50) == 0
    # a voxel of 1 mm: eight corners of sqrt(3) / 8
    one = surfaces(points((3, 3, 3), (1, 1, 1)), points((3, 3, 3), (1, 1, 1)), (1, 1, 1), "surfel")
    assert len(one.predicted) == 8 and one.predicted_size.sum() == pytest.approx(math.sqrt(3))
    # a plate of 2 x 30 x 30: 1 mm² at each of the 29 x 29 corners inside either face and of the 29 on each side, half way up
    plate = points((4, 30, 30), slice(1, 3))
    sizes = surfaces(plate, plate, (1, 1, 1), "surfel").predicted_size
    assert np.isclose(sizes, 1).sum() == 2 * 29 * 29 + 4 * 29


def test_the_box_around_a_mask():
    assert box_of(points((5, 6, 7), (1, 2, 3), (3, 2, 0))) == ((1, 2, 0), (4, 3, 4)) and box_of(np.zeros((3, 4), bool)) is None
    for seed in range(30):
        rng = np.random.default_rng(seed)
        mask = rng.random(rng.integers(1, 9, rng.integers(1, 4))) < 0.05
        found = np.argwhere(mask)
        assert box_of(mask) == ((tuple(found.min(0)), tuple(found.max(0) + 1)) if len(found) else None)


def test_empty_masks():
    some, none = points((4, 4), (1, 1)), np.zeros((4, 4), bool)
    for kind in KINDS:
        missed = surfaces(none, some, None, kind)
        assert missed.nsd(1) == 0 and math.isnan(missed.hausdorff()) and math.isnan(missed.average()) and np.isinf(missed.reference).all()
        assert len(missed.predicted) == 0
        assert math.isnan(surfaces(none, none, None, kind).nsd(1))


def test_voxel_surfaces_are_those_of_monai():
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    for p, r, spacing in cases():
        ours, spacing = surfaces(p, r, spacing), [float(s) for s in spacing]
        a, b = torch.from_numpy(p)[None, None], torch.from_numpy(r)[None, None]
        for tolerance in (0.3, 0.5, 1.0, 2.0):
            theirs = compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing).item()
            assert ours.nsd(tolerance) == pytest.approx(theirs, abs=1e-6)
        theirs = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing).item()
        assert ours.hausdorff(95) == pytest.approx(theirs, abs=1e-6, rel=1e-6)
        theirs = compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=spacing).item()
        assert ours.average() == pytest.approx(theirs, abs=1e-6, rel=1e-6)


def test_surface_elements_are_those_of_deepmind():
    peer = pytest.importorskip("surface_distance")

    for p, r, spacing in cases():
        ours = surfaces(p, r, spacing, "surfel")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports scipy's modules by their old names
            theirs = peer.metrics.compute_surface_distances(r, p, spacing)
        for tolerance in (0.3, 0.5, 1.0, 2.0):
            assert ours.nsd(tolerance) == pytest.approx(peer.metrics.compute_surface_dice_at_tolerance(theirs, tolerance), abs=1e-9)
        for percent in (50, 95, 100):
            assert ours.hausdorff(percent) == pytest.approx(peer.metrics.compute_robust_hausdorff(theirs, percent), abs=1e-9)
        sides = [(theirs[f"distances_{d}"], theirs[f"surfel_areas_{a}"]) for d, a in (("gt_to_pred", "gt"), ("pred_to_gt", "pred"))]
        assert ours.average() == pytest.approx(sum((d * a).sum() for d, a in sides) / sum(a.sum() for _, a in sides), abs=1e-9)


def test_every_way_to_the_nearest_gives_the_same(monkeypatch):
    """Steps from the point, the tree and the distance transform, each alone, beside scipy on the whole image."""
    for steps, cost in ((128, 64), (1, 0), (1, 10**9), (40, 0)):
        monkeypatch.setattr(module, "STEPS", steps)
        monkeypatch.setattr(module, "TREE_COST", cost)
        module._steps.cache_clear()
        for p, r, spacing in cases():
            s = surfaces(p, r, spacing)
            edges = [m & (distance_transform_edt(np.pad(m, 1))[(slice(1, -1),) * m.ndim] <= 1) for m in (p, r)]
            assert np.allclose(s.predicted, distance_transform_edt(~edges[1], sampling=spacing)[edges[0]], atol=1e-9)
            assert np.allclose(s.reference, distance_transform_edt(~edges[0], sampling=spacing)[edges[1]], atol=1e-9)
    module._steps.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_mirrored_scaled(kind):
    for p, r, spacing in cases():
        spacing, s = np.array(spacing), surfaces(p, r, spacing, kind)
        seen = (s.nsd(1), s.hausdorff(), s.average())
        for other in (surfaces(r, p, spacing, kind), surfaces(np.flip(p), np.flip(r), spacing, kind), surfaces(p.T, r.T, spacing[::-1], kind)):
            assert (other.nsd(1), other.hausdorff(), other.average()) == pytest.approx(seen)
        twice = surfaces(p, r, 2 * spacing, kind)
        assert (twice.nsd(2), twice.hausdorff(), twice.average()) == pytest.approx((seen[0], 2 * seen[1], 2 * seen[2]))
        same = surfaces(p, p, spacing, kind)
        assert (same.nsd(0), same.hausdorff(), same.average()) == (1, 0, 0)


def test_what_is_no_pair_of_masks_is_refused():
    mask = np.ones((3, 4), bool)
    for wrong, code in (((mask, mask.T), "GRID_MISMATCH"), ((mask, mask, (1, 0)), "BAD_ARGUMENT"), ((mask, mask, (1, 1, 1)), "BAD_ARGUMENT"), ((mask, mask, (1, math.inf)), "BAD_ARGUMENT"),
                        ((mask, mask, None, "mesh"), "BAD_ARGUMENT"), ((mask[0], mask[0]), "BAD_ARGUMENT")):  # fmt: skip
        with pytest.raises(MedVLMError) as e:
            surfaces(*wrong)
        assert e.value.code == code
