import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.raising import refuses
from tests.scoring.drawing import as_anyone, draw

from dpdmd_pipeline.scoring.sets import MAY_NOT_READ, read_picture


def test_a_picture_is_decoded_as_a_viewer_shows_it(tmp_path):
    hidden = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 0, 255, 255))
    hidden.save(tmp_path / "alpha.png")
    hidden.convert("LA").save(tmp_path / "grey.png")
    keyed = Image.new("P", (2, 2), 0)
    keyed.putpalette([255, 0, 0, 0, 0, 255])
    keyed.putpixel((0, 0), 1)
    keyed.save(tmp_path / "palette.png", transparency=0)
    for name in ("alpha.png", "palette.png"):
        image = read_picture(tmp_path / name)
        assert image.mode == "RGB"
        assert [image.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [(0, 0, 255)] + 3 * [(255, 255, 255)]
    assert read_picture(tmp_path / "grey.png").getpixel((1, 1)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (2, 4)
    turned.save(tmp_path / "odd.jpg", exif=b"Exif\0\0rubbish")  # unreadable EXIF is ignored
    assert read_picture(tmp_path / "odd.jpg").size == (4, 2)


def test_exif_that_pillow_cannot_write_again_is_no_fault(tmp_path, recwarn):
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")  # text in place of a fraction
    tags = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + orientation + resolution + bytes(4)
    Image.new("RGB", (4, 2), "red").save(tmp_path / "odd.jpg", exif=tags)
    assert read_picture(tmp_path / "odd.jpg").size == (4, 2) and not recwarn.list


def test_an_opaque_alpha_channel_changes_no_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(np.dstack([pixels, np.full((6, 5), 255, np.uint8)])).save(tmp_path / "opaque.png")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "opaque.png")), pixels)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_an_animated_picture_is_a_fault(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(OSError, match="^animated"):
        read_picture(tmp_path / f"x.{ending}")


def test_a_picture_beyond_pillow_s_limit_has_a_fault_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(OSError, match=r"\b4 million"):
        read_picture(draw(tmp_path / "x.png", (2100, 2000)))


@pytest.mark.parametrize("kind", ["eps", "gif", "tiff", "ppm"])
def test_only_the_decoders_of_the_promised_formats_open_a_file(tmp_path, monkeypatch, kind):
    def start(*arguments, **options):
        pytest.fail(f"started {arguments}")

    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", kind)
    with refuses(OSError, "PNG", "JPEG", "WebP", "BMP"):
        read_picture(tmp_path / "x.png")


def test_a_telephone_s_picture_with_a_preview_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    red, _, blue = read_picture(tmp_path / "x.jpg").getpixel((0, 0))
    assert red > 200 > blue


def test_a_picture_without_the_right_to_read_has_a_fault_of_its_own(tmp_path, monkeypatch):
    draw(tmp_path / "x.png").chmod(0)
    draw(tmp_path / "inner" / "y.png")
    (tmp_path / "inner").chmod(0)
    with as_anyone(tmp_path, monkeypatch):
        for name in ("x.png", "inner/y.png"):
            with pytest.raises(OSError, match=f"^{MAY_NOT_READ}$"):
                read_picture(Path(name))
