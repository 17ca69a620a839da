"""Pictures: every bit kept, every change said, every damage refused."""

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageCms

import medvlm
from medvlm.imaging.raster import _upright_array, read_raster, save_mask

GREY = (np.arange(12 * 7) * 3 % 251).astype(np.uint8).reshape(12, 7)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
DEEP = (np.arange(12 * 7) * 700 + 5).astype(np.uint16).reshape(12, 7)


def codes(image):
    return [w.split(":")[0] for w in image.info["warnings"]]


def read(path, **kw):
    return medvlm.read(path, **kw).image()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth=8, colour=2, content=None) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(bytes(1500)) if content is None else content
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp"])
def test_lossless_eight_bits_come_back_exactly(tmp_path, ending):
    for array in (GREY, COLOUR):
        Pillow.fromarray(array).save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
        image = read(tmp_path / f"x.{ending}")
        assert (image.id, image.modality, image.unit, image.spacing, image.dtype) == ("image-1", "unknown", "uint8", None, np.uint8)
        expected = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        assert np.array_equal(image.pixels, expected)
        assert codes(image) == []


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_stay_sixteen(tmp_path, ending):
    Pillow.fromarray(DEEP).save(tmp_path / f"x.{ending}")
    image = read(tmp_path / f"x.{ending}")
    assert image.dtype == np.uint16 and image.unit == "raw" and np.array_equal(image.pixels[0], DEEP)


def test_sixteen_bit_colour(tmp_path):
    """TIFF keeps it. PNG is refused, because the decoder at hand would cut it to 8 bits without a word."""
    deep = np.stack([DEEP, DEEP[::-1], DEEP // 2], -1)
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "x.tif", deep, photometric="rgb", compression=compression)
        assert np.array_equal(read(tmp_path / "x.tif").pixels, deep.transpose(2, 0, 1))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "x.png").write_bytes(png(7, 12, 16, 2, zlib.compress(rows)))
    with pytest.raises(medvlm.MedVLMError) as e:
        read(tmp_path / "x.png")
    assert e.value.code == "UNSUPPORTED"


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_applied_and_said(tmp_path, turn):
    """Compared with Pillow's own transpose for PNG, and by the TIFF 6.0 table for TIFF."""
    # TIFF 6.0: where the 0th row and the 0th column of the stored picture lie in the shown one
    shown = {
        1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1],
        5: GREY.T, 6: GREY.T[:, ::-1], 7: GREY.T[::-1, ::-1], 8: GREY.T[::-1],
    }[turn]  # fmt: skip
    exif = Pillow.Exif()
    exif[0x0112] = turn
    Pillow.fromarray(GREY).save(tmp_path / "x.png", exif=exif)
    tifffile.imwrite(tmp_path / "x.tif", GREY, extratags=[(274, 3, 1, turn, True)])
    for name in ("x.png", "x.tif"):
        image = read(tmp_path / name)
        assert np.array_equal(image.pixels[0], shown), name
        assert codes(image) == ([] if turn == 1 else ["EXIF_ROTATION"])
    assert np.array_equal(_upright_array(GREY[None], turn, [])[0], shown)


def test_transparency_is_laid_on_black(tmp_path):
    alpha = np.full_like(GREY, 255)
    Pillow.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "opaque.png")
    image = read(tmp_path / "opaque.png")
    assert np.array_equal(image.pixels, COLOUR.transpose(2, 0, 1)) and codes(image) == []
    alpha[:6], alpha[6] = 0, 51
    Pillow.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "holes.png")
    tifffile.imwrite(tmp_path / "holes.tif", np.dstack([COLOUR, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    for name in ("holes.png", "holes.tif"):
        image = read(tmp_path / name)
        assert codes(image) == ["ALPHA"]
        assert not image.pixels[:, :6].any() and np.array_equal(image.pixels[:, 7:], COLOUR[7:].transpose(2, 0, 1))
        assert np.abs(image.pixels[:, 6].T - COLOUR[6] * 0.2).max() <= 0.5  # 51 / 255
    Pillow.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "grey.png")
    image = read(tmp_path / "grey.png")
    assert image.shape == (1, 12, 7) and not image.pixels[0, :6].any() and np.array_equal(image.pixels[0, 7:], GREY[7:])


def test_palettes_become_rgb(tmp_path):
    picture = Pillow.new("P", (7, 12))
    picture.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    picture.putdata((GREY % 4).ravel().tolist())
    table = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    for name in ("p.png", "p.tif", "p.bmp"):
        picture.save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name).pixels, table[GREY % 4].transpose(2, 0, 1)), name


def test_one_bit_pictures_are_black_and_white(tmp_path):
    mask = GREY > 100
    path = save_mask(mask, tmp_path / "m.png")
    with Pillow.open(path) as picture:
        assert picture.mode == "1" and np.array_equal(np.asarray(picture), mask)
    assert np.array_equal(read(path).pixels[0], mask * np.uint8(255))
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(tmp_path / "m.tif", mask, photometric=photometric)
        shown = mask if photometric == "minisblack" else ~mask
        assert np.array_equal(read(tmp_path / "m.tif").pixels[0], shown * np.uint8(255))
    with pytest.raises(medvlm.MedVLMError):
        save_mask(GREY, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_white_zero_tiff_is_inverted_only_for_display(tmp_path):
    from medvlm.imaging import window

    tifffile.imwrite(tmp_path / "w.tif", GREY, photometric="miniswhite")
    image = read(tmp_path / "w.tif")
    assert np.array_equal(image.pixels[0], GREY) and image.info["inverted"]
    assert np.array_equal(window.display(image), 255 - GREY)


def test_equal_channels_become_one(tmp_path):
    """A radiograph saved as RGB, also through JPEG."""
    for name, args in (("g.png", {}), ("g.jpg", {"quality": 90}), ("g.webp", {"lossless": True})):
        Pillow.fromarray(np.dstack([GREY] * 3)).save(tmp_path / name, **args)
        image = read(tmp_path / name)
        assert image.shape == (1, 12, 7) and image.info["grey_from_rgb"]
    almost = np.dstack([GREY] * 3)
    almost[3, 3, 2] ^= 1
    Pillow.fromarray(almost).save(tmp_path / "almost.png")
    assert read(tmp_path / "almost.png").shape == (3, 12, 7)


def test_cmyk_and_profiles_become_srgb(tmp_path):
    flat = np.zeros((8, 8, 4), np.uint8)
    flat[..., 0], flat[..., 3] = 255, 0  # pure cyan
    Pillow.fromarray(flat, "CMYK").save(tmp_path / "c.tif")
    image = read(tmp_path / "c.tif")
    assert codes(image) == ["COLOUR"]
    assert image.pixels[0].max() == 0 and image.pixels[1].min() == 255 and image.pixels[2].min() == 255
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Pillow.fromarray(COLOUR).save(tmp_path / "s.png", icc_profile=srgb)
    image = read(tmp_path / "s.png")
    assert np.array_equal(image.pixels, COLOUR.transpose(2, 0, 1)) and codes(image) == []
    Pillow.fromarray(COLOUR).save(tmp_path / "b.png", icc_profile=b"this is no profile" * 10)
    image = read(tmp_path / "b.png")
    assert np.array_equal(image.pixels, COLOUR.transpose(2, 0, 1)) and codes(image) == ["ICC"]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    Pillow.fromarray(COLOUR).save(tmp_path / "x.png", icc_profile=lab)
    assert codes(read(tmp_path / "x.png")) == ["ICC"]


def test_pages_are_images_and_reduced_copies_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "p.tif") as out:
        for n in range(3):
            out.write(GREY + np.uint8(n))
        out.write(GREY[::2, ::2], subfiletype=1)
    for keep in (True, False):
        images = read_raster(tmp_path / "p.tif", "p", "image-1", keep=keep)
        assert [i.id for i in images] == ["image-1-p1", "image-1-p2", "image-1-p3"]
        assert [np.array_equal(i.pixels[0], GREY + np.uint8(n)) for n, i in enumerate(images)] == [True] * 3
        assert codes(images[0]) == ["PAGES", "PAGES"] and codes(images[1]) == []


def test_a_file_that_lost_its_last_pages_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "p.tif") as out:
        for n in range(3):
            out.write(GREY + np.uint8(n))
    content = (tmp_path / "p.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "p.tif") as t:
        last = t.pages[2].offset
    (tmp_path / "p.tif").write_bytes(content[:last])  # the first two are whole
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "p.tif")
    assert e.value.code == "TRUNCATED"


def test_a_strip_that_is_not_there_is_no_black_band(tmp_path):
    """tifffile fills a strip of no bytes with zeros."""
    noise = np.random.default_rng(0).integers(1, 256, (64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", noise, compression="zlib", rowsperstrip=16)
    assert np.array_equal(read(tmp_path / "s.tif").pixels[0], noise)
    content = bytearray((tmp_path / "s.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "s.tif") as t:
        counts = t.pages[0].tags["StripByteCounts"]
        content[counts.valueoffset + 2 : counts.valueoffset + 4] = bytes(2)  # four numbers of two bytes: the second
        assert counts.dtype == 3 and counts.count == 4
    (tmp_path / "s.tif").write_bytes(content)
    assert (tifffile.imread(tmp_path / "s.tif")[16:32] == 0).all()
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "s.tif")
    assert e.value.code == "TRUNCATED"


def test_print_resolution_is_no_spacing_and_ome_is(tmp_path):
    Pillow.fromarray(GREY).save(tmp_path / "r.png", dpi=(300, 300))
    Pillow.fromarray(GREY).save(tmp_path / "r.jpg", dpi=(300, 300))
    tifffile.imwrite(tmp_path / "r.tif", GREY, resolution=(300, 300), resolutionunit="INCH")
    for name in ("r.png", "r.jpg", "r.tif"):
        assert read(tmp_path / name).spacing is None
        assert read(tmp_path / name, spacing=(0.2, 0.1)).spacing == (0.2, 0.1)
    tifffile.imwrite(tmp_path / "o.ome.tif", GREY, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "axes": "YX"})
    assert np.allclose(read(tmp_path / "o.ome.tif").spacing, (0.25e-3, 0.5e-3))  # micrometres
    tifffile.imwrite(tmp_path / "o.ome.tif", GREY, metadata={"PhysicalSizeX": 2, "PhysicalSizeXUnit": "mm", "PhysicalSizeY": 3, "PhysicalSizeYUnit": "mm"})
    image = read(tmp_path / "o.ome.tif", spacing=(1, 1))
    assert image.spacing == (1, 1) and codes(image) == ["SPACING"]


def test_float_tiff_counts_what_is_not_finite(tmp_path):
    array = DEEP.astype(np.float32)
    array[0, :3] = np.nan
    tifffile.imwrite(tmp_path / "f.tif", array)
    image = read(tmp_path / "f.tif")
    assert np.array_equal(image.pixels[0], array, equal_nan=True)
    assert image.info["warnings"] == ["NOT_FINITE: 3 of 84 pixels are NaN or infinite"]


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"])
def test_tiff_compressions(tmp_path, compression):
    Pillow.fromarray(COLOUR).save(tmp_path / "c.tif", compression=compression)
    image = read(tmp_path / "c.tif")
    if compression == "jpeg":
        with Pillow.open(tmp_path / "c.tif") as picture:
            assert np.array_equal(image.pixels, np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    else:
        assert np.array_equal(image.pixels, COLOUR.transpose(2, 0, 1))


# damage


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.tif", "deflate.tif", "lzw.tif", "x.webp"])
def test_cut_pictures_are_refused_wherever_they_are_cut(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    whole = io.BytesIO()
    ending = name.split(".")[-1]
    how = {"deflate.tif": {"compression": "tiff_adobe_deflate"}, "lzw.tif": {"compression": "tiff_lzw"}}.get(name, {})
    Pillow.fromarray(noise).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **how)
    whole = whole.getvalue()
    path = tmp_path / name
    for keep in (0.2, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(medvlm.MedVLMError) as e:
            medvlm.read(path)
        assert e.value.code == "TRUNCATED", keep
    path.write_bytes(whole)
    assert read(path).shape == (3, 40, 50)


def test_a_library_that_forgives_truncation_does_not_change_ours(tmp_path, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    out = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(out, "JPEG")
    (tmp_path / "x.jpg").write_bytes(out.getvalue()[:-900])
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "x.jpg")
    assert e.value.code == "TRUNCATED" and ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_flipped_bit_in_a_png_fails_its_checksum(tmp_path):
    Pillow.fromarray(COLOUR).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 4
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(tmp_path / "x.png")
    assert e.value.code == "CHECKSUM"


def bombs():
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0)
    jpeg = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 30000, 30000, 3) + bytes([1, 34, 0, 2, 17, 1, 3, 17, 1])
    jpeg += b"\xff\xda" + struct.pack(">HB", 12, 3) + bytes([1, 0, 2, 17, 3, 17, 0, 63, 0]) + bytes(2000) + b"\xff\xd9"
    webp = b"RIFF" + struct.pack("<I", 2000) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\0" * 2 + bytes(1980)
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, GREY, compression="zlib")
    tiff = bytearray(tiff.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(tiff))) as t:
        for tag in (256, 257, 278):
            at = t.pages[0].tags[tag].valueoffset
            struct.pack_into("<H" if t.pages[0].tags[tag].dtype == 3 else "<I", tiff, at, 60000)
    return {"x.png": png(30000, 30000), "x.bmp": head + bytes(2000), "x.jpg": jpeg, "x.webp": webp, "x.tif": bytes(tiff)}


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.jpg", "x.webp", "x.tif"])
def test_two_kilobytes_that_claim_gigabytes_are_refused_before_memory_is_taken(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    assert path.stat().st_size < 4000
    with pytest.raises(medvlm.MedVLMError):
        medvlm.read(path)  # loads the libraries
    tracemalloc.start()
    with pytest.raises(medvlm.MedVLMError) as e:
        medvlm.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert e.value.code == "BOMB" and peak < 2 << 20


def test_damaged_bytes_end_in_an_image_or_a_named_error(tmp_path):
    random = np.random.default_rng(1)
    for name, args in (("a.png", {}), ("a.jpg", {}), ("a.bmp", {}), ("a.tif", {}), ("b.tif", {"compression": "tiff_lzw"}), ("a.webp", {})):
        Pillow.fromarray(COLOUR).save(tmp_path / name, **args)
        content = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for at in random.integers(0, len(content), 3):
                damaged[at] = random.integers(256)
            (tmp_path / name).write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    for image in medvlm.read(tmp_path / name).images:
                        assert image.pixels.shape == image.shape
                except medvlm.MedVLMError as e:
                    assert e.code in ("TRUNCATED", "CORRUPT", "CHECKSUM", "BOMB", "TOO_LARGE", "UNSUPPORTED", "UNKNOWN_FORMAT", "NO_CODEC")


def test_every_shared_picture_is_read(data):
    """Real radiographs, photographs and smears: no damage, no colour where there is none."""
    shapes = {}
    for folder in ("xray_covid", "fundus_chase", "path_bccd", "vqa_rad"):
        files = sorted(p for p in (data / folder).rglob("*") if p.suffix in (".jpg", ".png"))[:6]
        assert files
        for path in files:
            image = read(path)
            shapes.setdefault(folder, set()).add(image.shape[0])
            assert image.pixels.dtype == np.uint8 and min(image.shape[1:]) > 50
    assert shapes["xray_covid"] == {1} and shapes["path_bccd"] == {3} and 3 in shapes["fundus_chase"]
