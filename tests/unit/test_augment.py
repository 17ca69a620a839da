"""Augmentation: picture, masks and boxes move together, values stay in [0, 1], the seed decides alone, nothing is flipped."""

import random
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch

from medvlm.errors import UsageError
from medvlm.sample import box_of
from medvlm.train import augment
from medvlm.train.augment import SHIFT, STRONGEST, VISIBLE, Augmentation

SIZES = {2: (96, 128), 3: (24, 64, 80)}
NOTHING = {2: np.zeros((0, 2, 2)), 3: np.zeros((0, 2, 3))}


def ball(size, centre=(0.5, 0.45, 0.55), radius=0.2):
    """An ellipse or ellipsoid: bool, with half axes of ``radius`` of each side."""
    at = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in size], indexing="ij")
    return sum(((x - c) / radius) ** 2 for x, c in zip(at, centre[-len(size) :])) < 1


def drawn(size, channels=1, **where):
    mask = ball(size, **where)
    return np.repeat(mask[None].astype(np.float32), channels, 0), mask[None].astype(np.uint8) * 255, np.array([box_of(mask)], float)


def still(monkeypatch):
    """No change of grey values, so that the picture can be compared."""
    monkeypatch.setattr(Augmentation, "_grey", lambda self, picture, lot: picture)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_disc_its_mask_and_its_box_move_together(monkeypatch, rank, seed):
    still(monkeypatch)
    size = SIZES[rank]
    picture, masks, boxes = drawn(size, channels=3 if rank == 2 else 1)
    moved = Augmentation(rank)(picture, masks, boxes, seed)
    shown, mask = moved.picture[-1] > 0.5, moved.masks[0] > 127
    assert (shown & mask).sum() / (shown | mask).sum() > (0.97 if rank == 2 else 0.93)  # edges of half-covered pixels
    weights = moved.picture[-1][moved.picture[-1] > 0]
    apart = np.abs(np.average(np.argwhere(moved.picture[-1] > 0), 0, weights) - np.argwhere(mask).mean(0))
    assert apart[-2:].max() < 0.15 and apart.max() < 0.3  # pixels; slices are not turned, so nearest neighbours round all of them alike
    assert moved.kept.all() and np.abs(moved.boxes[0] - box_of(mask)).max() <= 1
    before = masks[0] > 0
    assert (before & mask).sum() / (before | mask).sum() < 0.95  # it did move
    assert moved.picture.dtype == np.float32 and moved.masks.dtype == np.uint8 and set(np.unique(moved.masks)) <= {0, 255}
    assert moved.picture.shape == picture.shape and moved.masks.shape == masks.shape


@pytest.mark.parametrize("rank", [2, 3])
def test_a_move_worked_by_hand(monkeypatch, rank):
    """By a whole number of pixels: every value goes there, black comes in, nothing else changes."""
    still(monkeypatch)
    size = (8, 10, 12)[-rank:]
    monkeypatch.setattr(Augmentation, "_move", lambda self, lot: (np.eye(rank), np.array([0, 2, -3])[-rank:] / size))
    picture = np.random.default_rng(0).random((2, *size), np.float32)
    masks = (np.random.default_rng(1).random((1, *size)) > 0.5).astype(np.uint8) * 255
    boxes = np.array([[[1, 2, 5], [3, 6, 9]], [[0, 0, 0], [2, 2, 2.9]], [[0, 6, 2], [8, 10, 6]]], float)[:, :, -rank:]
    moved = Augmentation(rank)(picture, masks, boxes, 0)
    for before, after in ((picture, moved.picture), (masks, moved.masks)):
        expected = np.zeros_like(before)
        expected[..., 2:, :-3] = before[..., :-2, 3:]
        np.testing.assert_allclose(after, expected, atol=1e-4)
    # the second leaves the picture; the third keeps half of its rows (8 to 10 of 8 to 12) and three quarters of its columns
    assert moved.kept.tolist() == [True, False, True]
    assert moved.boxes[:, :, -2:].tolist() == [[[4, 2], [8, 6]], [[8, 0], [10, 3]]]


def test_scale_and_rotation_worked_by_hand(monkeypatch):
    """A turn from h towards w about the centre of 9 x 9 pixels, which is pixel (4, 4); then twice the size."""
    still(monkeypatch)
    quarter = np.array([[0, -1], [1, 0]])  # (h, w) from the centre -> (-w, h)
    picture = np.zeros((1, 9, 9), np.float32)
    picture[0, 4, 6] = 1
    monkeypatch.setattr(Augmentation, "_move", lambda self, lot: (quarter, np.zeros(2)))
    moved = Augmentation(2)(picture, np.zeros((0, 9, 9), np.uint8), np.array([[[4, 6], [5, 7]]], float), 0)
    assert moved.picture[0, 2, 4] == 1 and moved.picture.sum() == 1 and moved.boxes.tolist() == [[[2, 4], [3, 5]]]
    monkeypatch.setattr(Augmentation, "_move", lambda self, lot: (2 * np.eye(2), np.zeros(2)))
    moved = Augmentation(2)(picture, np.zeros((0, 9, 9), np.uint8), np.array([[[4, 6], [5, 7]]], float), 0)
    assert moved.picture[0, 4, 8] == 1 and moved.boxes.tolist() == [[[3.5, 7.5], [5.5, 9]]]  # three quarters of it are inside


@pytest.mark.parametrize("rank", [2, 3])
def test_one_seed_is_one_move_whatever_the_size(monkeypatch, rank):
    """An image seen by two encoders, at one and at two times the size."""
    still(monkeypatch)
    small = SIZES[rank]
    for seed in range(4):
        found = [np.argwhere(Augmentation(rank)(*drawn(n), seed).masks[0]).mean(0) + 0.5 for n in (small, tuple(3 * n for n in small))]
        assert np.abs(found[0] - found[1] / 3).max() < 0.6 and np.abs(found[0] - found[1] / 3)[-2:].max() < 0.1  # pixels
    place = np.array([[[0.25] * rank, [0.5] * rank]])
    a, b = (Augmentation(rank)(np.zeros((1, *n), np.float32), np.zeros((0, *n), np.uint8), place * n, 5).boxes / n for n in (small, tuple(3 * n for n in small)))
    np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_seed_alone_decides(rank):
    size = SIZES[rank]
    picture, masks, boxes = drawn(size)
    picture = picture * 0.5 + 0.2
    given = [x.copy() for x in (picture, masks, boxes)]
    Augmentation(rank)(picture, masks, boxes, 0)  # libraries are imported
    np.random.seed(3), random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    first = [Augmentation(rank)(picture, masks, boxes, seed) for seed in range(6)]
    assert np.array_equal(states[0], np.random.get_state()[1]) and states[1] == random.getstate() and torch.equal(states[2], torch.get_rng_state())  # noqa: NPY002
    np.random.seed(9), random.seed(9), torch.manual_seed(9)  # noqa: NPY002
    again = [Augmentation(rank)(picture, masks, boxes, seed) for seed in range(6)]
    for a, b in zip(first, again):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))
    assert len({a.picture.tobytes() for a in first}) == 6 and len({a.masks.tobytes() for a in first}) == 6
    assert all(np.array_equal(x, y) for x, y in zip(given, (picture, masks, boxes)))  # the arrays given are not written to


@pytest.mark.parametrize("rank", [2, 3])
def test_values_stay_in_range_and_each_change_happens(rank):
    size = SIZES[rank]
    picture = np.random.default_rng(0).random((3, *size), np.float32)
    picture[:, ..., :3], picture[:, ..., -3:] = 0, 1
    grey = [Augmentation(rank, STRONGEST)(picture, np.zeros((0, *size), np.uint8), NOTHING[rank], seed, move=False).picture for seed in range(40)]
    assert all(p.dtype == np.float32 and p.shape == picture.shape and p.flags.c_contiguous and 0 <= p.min() and p.max() <= 1 for p in grey)
    rough = [np.abs(np.diff(p[0], axis=-1)).mean() / p[0].std() for p in grey]
    plain = np.abs(np.diff(picture[0], axis=-1)).mean() / picture[0].std()
    assert min(rough) < 0.8 * plain  # some are blurred
    flat = np.full((1, *size), 0.5, np.float32)
    flats = [Augmentation(rank)(flat, np.zeros((0, *size), np.uint8), NOTHING[rank], seed, move=False).picture for seed in range(60)]
    noisy = [p.std() > 1e-3 for p in flats]
    assert 0.1 < np.mean(noisy) < 0.55 and np.ptp([p.mean() for p in flats]) > 0.2  # noise on three in ten, darker and brighter


def test_grey_values_worked_by_hand(monkeypatch):
    """Brightness 1.1, contrast 0.8 about the mean, then the power: 0.2 and 0.6 have the mean 0.44 when brighter."""

    class Lot:
        def uniform(self, low, high, n=None):
            return np.array([0.4, -0.2 / augment.CONTRAST]) if n == 2 else low

        def normal(self, mean, deviation):
            return np.log(2)

        def random(self, n):
            return np.ones(n)

    picture = np.array([[[0.2, 0.6]]], np.float32)
    out = Augmentation(2)._grey(picture, Lot())
    np.testing.assert_allclose(out, [[[(0.44 + 0.8 * (0.22 - 0.44)) ** 2, (0.44 + 0.8 * (0.66 - 0.44)) ** 2]]], rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_blur_is_gaussian_and_stays_within_a_slice(rank):
    from scipy.ndimage import gaussian_filter

    picture = np.zeros((2, *SIZES[rank]), np.float32)
    picture[0][tuple(n // 2 for n in SIZES[rank])] = 1
    blur = augment._blur_picture if rank == 2 else augment._blur_volume
    sigma = 1.3 if rank == 2 else (1.3**2 + 1 / 12) ** 0.5  # MONAI's kernel is averaged over each pixel, whose variance is 1/12
    np.testing.assert_allclose(blur(picture, 1.3), gaussian_filter(picture, (*[0] * (rank - 1), sigma, sigma)), atol=2e-3)


@pytest.mark.parametrize("rank", [2, 3])
def test_nothing_is_flipped_and_left_stays_left(rank):
    for strength in (0.5, 1.0, STRONGEST):
        for seed in range(200):
            linear, shift = Augmentation(rank, strength)._move(np.random.default_rng(seed))
            assert np.linalg.det(linear) > 0 and (np.diag(linear) > 0.5).all() and np.abs(shift).max() <= SHIFT * strength
            assert (np.abs(linear - np.diag(np.diag(linear))) < np.diag(linear).min()).all()  # less than an eighth of a turn
            assert rank == 2 or linear[0, 1:].tolist() == linear[1:, 0].tolist() == [0, 0]  # no tilt


def test_strength_nought_changes_nothing():
    picture, masks, boxes = drawn((20, 30))
    moved = Augmentation(2, 0)(picture, masks, boxes, 7)
    assert moved.picture is picture and moved.masks is masks and moved.boxes is boxes and moved.kept.tolist() == [True]
    near = Augmentation(2, 1e-6)(picture, masks, boxes, 7)
    np.testing.assert_allclose(near.picture, picture, atol=1e-3)
    assert np.array_equal(near.masks, masks) and np.abs(near.boxes - boxes).max() < 1e-3


def test_without_a_move_places_stay():
    picture, masks, boxes = drawn((40, 50))
    for seed in range(5):
        moved = Augmentation(2)(picture * 0.5, masks, boxes, seed, move=False)
        assert moved.masks is masks and moved.boxes is boxes and moved.kept.all() and not np.array_equal(moved.picture, picture * 0.5)
        assert np.corrcoef(moved.picture.ravel(), picture.ravel())[0, 1] > 0.95


def test_boxes_that_leave_are_cut_or_dropped_and_labels_follow():
    """Boxes at every edge: those kept lie inside, and hold at least a quarter of what they held before the cut."""
    size, labels = (60, 80), np.arange(400)
    lot = np.random.default_rng(0)
    lower = lot.uniform(0, [55, 75], (400, 2))
    boxes = np.stack([lower, np.minimum(lower + lot.uniform(1, 30, (400, 2)), size)], 1)
    dropped = 0
    for seed in range(10):
        moved = Augmentation(2, STRONGEST)(np.zeros((1, *size), np.float32), np.zeros((0, *size), np.uint8), boxes, seed)
        linear, shift = Augmentation(2, STRONGEST)._move(np.random.default_rng(seed))
        assert len(moved.boxes) == len(labels[moved.kept]) and (moved.boxes >= 0).all() and (moved.boxes <= size).all()
        for box, i in zip(moved.boxes, labels[moved.kept]):
            reach = np.sqrt(((linear * (boxes[i, 1] - boxes[i, 0]) / 2) ** 2).sum(1))
            assert (box[1] - box[0]).prod() >= VISIBLE * (2 * reach).prod() - 1e-9
            middle = linear @ (boxes[i].mean(0) - np.array(size) / 2) + np.array(size) / 2 + shift * size
            np.testing.assert_allclose(box, np.clip([middle - reach, middle + reach], 0, size))
        dropped += (~moved.kept).sum()
    assert dropped > 10
    empty = Augmentation(2)(np.zeros((1, 9, 9), np.float32), np.zeros((0, 9, 9), np.uint8), np.array([[[4, 4], [4, 6]]], float), 0)
    assert not empty.kept.any() and empty.boxes.shape == (0, 2, 2)  # a box without extent


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.full((1, 8, 8), 1000, np.uint16), "uint16"),
        (np.full((1, 8, 8), 128, np.uint8), "uint8"),
        (np.full((1, 8, 8), 0.5), "float64"),
        (np.full((1, 8, 8), -1000, np.float32), "-1000 to -1000"),  # raw HU
        (np.linspace(0, 1.01, 64, dtype=np.float32).reshape(1, 8, 8), "0 to 1.01"),
        (np.where(np.eye(8) > 0, np.nan, 0.5).astype(np.float32)[None], "nan"),
        (np.where(np.eye(8) > 0, np.inf, 0.5).astype(np.float32)[None], "inf"),
    ],
)
def test_only_windowed_pictures_are_taken(picture, words):
    for strength in (0.0, 1.0):
        with pytest.raises(UsageError, match=words) as e:
            Augmentation(2, strength)(picture, np.zeros((0, 8, 8), np.uint8), NOTHING[2], 0)
        assert e.value.code == "NOT_WINDOWED" and "window" in e.value.hint


def test_wrong_shapes_and_arguments_are_named():
    picture, masks, boxes = drawn((8, 9))
    for wrong in [
        (picture[0], masks, boxes), (picture, masks[:, :-1], boxes), (picture, masks / 255, boxes), (picture, masks > 0, boxes), (picture, masks, boxes[0]),
        (picture, masks, NOTHING[3]), (picture[None], masks, boxes), (picture[:0], masks, boxes),
    ]:  # fmt: skip
        with pytest.raises(UsageError) as e:
            Augmentation(2)(*wrong, 0)
        assert e.value.code == "BAD_ARGUMENT"
    for arguments in ((1, 1.0), (4, 1.0), (2, -0.1), (2, STRONGEST + 0.1), (2, float("nan"))):
        with pytest.raises(UsageError):
            Augmentation(*arguments)


def test_the_libraries_stay_what_they_are():
    """The MIT package, never its AGPL successor of the same import name; imported late, quiet, and without touching a random state."""
    about = metadata.metadata("albumentations")
    assert about["License"].splitlines()[0] == "MIT License" and metadata.version("albumentations").startswith("2.")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("albumentationsx")
    code = (
        "import random, socket, sys, numpy as np, torch\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n"
        "from medvlm.train.augment import Augmentation\n"
        "assert 'albumentations' not in sys.modules and 'monai' not in sys.modules\n"
        "states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()\n"
        "Augmentation(2)(np.zeros((1, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8), np.zeros((0, 2, 2)), 0)\n"
        "assert 'albumentations' in sys.modules and 'monai' not in sys.modules\n"
        "assert (states[0] == np.random.get_state()[1]).all() and states[1] == random.getstate() and torch.equal(states[2], torch.get_rng_state())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:albumentations", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
