"""Images from wherever a caller has them, checked before anything large is decoded."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from adallava.errors import ImageError

MAX_PIXELS = 50_000_000
"""Larger images are refused: nothing a vision tower reads needs them, and a small file can unpack to gigabytes."""

ImageSource = Image.Image | str | Path | bytes | np.ndarray


def load_image(source: Any, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image as RGB, upright; ``ImageError`` for what cannot be read, is empty, or has over ``max_pixels``.

    source: a PIL image, a path, encoded bytes, or an array [height, width] or [height, width, 3 or 4] of bytes.
    formats: Pillow's names of those in which files and bytes may be; all that it reads when None.
    """
    if isinstance(source, np.ndarray):
        return _checked(_from_array(source), "the array", max_pixels)
    if isinstance(source, Image.Image):
        return _checked(source, "the image", max_pixels)
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), f"the {len(source)} bytes", max_pixels, formats)
    if isinstance(source, str | Path):
        if str(source).startswith(("http://", "https://")):
            raise ImageError(f"{source} is an address, and images are not fetched. Download it and pass the file.")
        path = Path(source)
        if not path.is_file():
            raise ImageError(f"there is no image file {str(path)!r}. Check the path.")
        return _open(path, f"the file {str(path)!r}", max_pixels, formats)
    raise ImageError(
        f"an image of type {type(source).__name__} was passed; expected a PIL image, a path, bytes or a uint8 array."
    )


def _open(file: Any, name: str, max_pixels: int, formats: tuple[str, ...] | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            return _checked(Image.open(file, formats=formats), name, max_pixels)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has far more than the {max_pixels:,} pixels allowed. Scale it down first.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{name} cannot be read as an image ({error}). It may be truncated or not an image: pass a PNG or JPEG."
        ) from error


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has size {width} x {height}. Pass an image of at least one pixel.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels:,} allowed. Scale it down first."
        )
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{name} is damaged or truncated ({error}). Pass a whole file.") from error


def _from_array(array: np.ndarray) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_ok:
        raise ImageError(
            f"an array of {array.dtype} {list(array.shape)} was passed; expected uint8 [height, width] or "
            "[height, width, 3 or 4]."
        )
    if 0 in array.shape:
        raise ImageError(f"the array has shape {list(array.shape)}. Pass an image of at least one pixel.")
    return Image.fromarray(array)
