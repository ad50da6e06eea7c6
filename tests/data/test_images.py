"""The one reader of images: files of every kind as they are meant to be seen, and one line for what cannot be read."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvcapsule.data.images import images_of, open_image
from kvcapsule.errors import DataError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def half(mode: str = "RGB", left: object = RED, right: object = BLUE) -> Image.Image:
    """16 wide and 8 high, its left half of one colour."""
    image = Image.new(mode, (16, 8), right)  # type: ignore[arg-type]
    image.paste(left, (0, 0, 8, 8))  # type: ignore[arg-type]
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path: Path, orientation: int) -> None:
    """Every orientation of EXIF leads to the same picture: red on the left."""
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that a camera would have to undo.
    image = half() if orientation == 1 else half().transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(saved(tmp_path / "a.png", image, exif=exif))
    assert upright.size == (16, 8) and upright.mode == "RGB"
    assert upright.getpixel((2, 4)) == RED and upright.getpixel((13, 4)) == BLUE


def _sixteen(dtype: str) -> Callable[[Path], Path]:
    """A greyscale scan of 16 bits: black, middle, white."""

    def write(folder: Path) -> Path:
        levels = np.array([[0, 32896, 65535]] * 4, dtype=dtype)
        return saved(folder / ("a.png" if dtype == "uint16" else "a.tiff"), Image.fromarray(levels))

    return write


def _palette_with_transparency(folder: Path) -> Path:
    image = half("P", 1, 2)
    image.putpalette([0, 0, 0, *RED, *BLUE])
    return saved(folder / "a.png", image, transparency=2)


def _animation(folder: Path) -> Path:
    frames = [half(), half("RGB", BLUE, RED)]
    return saved(folder / "a.gif", frames[0], save_all=True, append_images=frames[1:])


KINDS: dict[str, tuple[Callable[[Path], Path], tuple[int, int, int], tuple[int, int, int]]] = {
    "greyscale": (lambda f: saved(f / "a.png", half("L", 10, 200)), (10, 10, 10), (200, 200, 200)),
    "one bit": (lambda f: saved(f / "a.png", half("1", 0, 1)), (0, 0, 0), WHITE),
    "alpha": (lambda f: saved(f / "a.png", half("RGBA", (0, 0, 0, 0), (*BLUE, 255))), WHITE, BLUE),
    "half alpha": (lambda f: saved(f / "a.png", half("RGBA", (0, 0, 0, 51), (*BLUE, 255))), (204, 204, 204), BLUE),
    "grey and alpha": (lambda f: saved(f / "a.png", half("LA", (0, 0), (9, 255))), WHITE, (9, 9, 9)),
    "palette and transparency": (_palette_with_transparency, RED, WHITE),
    "cmyk": (lambda f: saved(f / "a.tiff", half("CMYK", (0, 255, 255, 0), (255, 255, 0, 0))), RED, BLUE),
    "first frame": (_animation, RED, BLUE),
    "16 bits": (_sixteen("uint16"), (0, 0, 0), WHITE),
    "32 bits": (_sixteen("int32"), (0, 0, 0), WHITE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_left_and_right(tmp_path: Path, kind: str) -> None:
    write, left, right = KINDS[kind]
    image = open_image(write(tmp_path))
    assert image.mode == "RGB"
    assert image.getpixel((0, 2)) == left and image.getpixel((image.width - 1, 2)) == right
    if "bits" in kind and image.width == 3:
        assert image.getpixel((1, 2)) == (128, 128, 128)


def test_bytes_are_read_as_files_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", half("RGBA", (0, 0, 0, 0), (*BLUE, 255)))
    (image,) = images_of({"image": {"bytes": path.read_bytes(), "path": None}}, "row 1")
    assert image.tobytes() == open_image(path).tobytes()


def _bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels, all of its data missing."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT")


def _cut(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()[: file.tell() // 2]


BROKEN = {
    "jpeg": (_cut("JPEG"), "cannot be read as an image"),
    "png": (_cut("PNG"), "cannot be read as an image"),
    "webp": (_cut("WEBP"), "cannot be read as an image"),
    "bomb": (_bomb(), r"too large to be read .*400000000 pixels"),
    "text": (b"this is no image", "cannot be read as an image"),
    "nothing": (b"", "cannot be read as an image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    content, says = BROKEN[kind]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png.*{says}") as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=f"^line 7: the image.*{says}"):
        images_of({"image": [{"bytes": content, "path": None}]}, "line 7")
    with pytest.raises(DataError, match=rf"^line 7: .*a\.png.*{says}"):
        images_of({"image": {"bytes": None, "path": str(tmp_path / "a.png")}}, "line 7")


def test_what_is_no_image_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot be read as an image"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="is a URL: download it first"):
        open_image("https://example.org/a.png")
    saved(tmp_path / "a.tiff", Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    with pytest.raises(DataError, match="floating-point"):
        open_image(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="line 7: the image is missing"):
        images_of({"image": None}, "line 7")
