"""Decoding and resizing of single images, with the conventions that published numbers rest on.

Everything takes and returns RGB, uint8 or float32 [h w 3] with values in [0, 255].
"""

import io
from typing import Literal, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vit_jax_zoo.data.base import CorruptExampleError

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]
FloatPixels: TypeAlias = Float32[np.ndarray, "h w 3"]
Method: TypeAlias = Literal["bilinear", "area", "antialias"]

METHODS = ("bilinear", "area", "antialias")

cv2.setNumThreads(0)  # one image, one thread: the pipeline has enough images at hand

_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
  1: _READ,
  2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | _READ,
  4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | _READ,
  8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | _READ,
}
"""Reduced decoding leaves out part of JPEG's inverse cosine transform: an average, and cheap.
The names say grey, but that is the colour flag's to decide; theirs set BGR, which excludes RGB."""

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def decode_image(data: bytes, reduce: int = 1) -> Pixels:
  """Decodes a compressed image of any common format to RGB.

  As in the TensorFlow pipelines the published models were trained with: the EXIF orientation is
  ignored, an alpha channel is dropped, grey becomes three equal channels, of 16-bit samples the
  upper byte stays. CMYK is converted.

  Args:
    data: the file's bytes.
    reduce: 1, 2, 4 or 8: return about 1/reduce of the height and width. Cheap for JPEG.

  Raises:
    CorruptExampleError: the bytes are no image, or a truncated one.
  """
  whole = not data.startswith((_JPEG_START, _PNG_START)) or data.endswith((_JPEG_END, _PNG_END))
  if whole and not data.startswith(b"GIF8"):
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduce]) if data else None
    if pixels is not None:
      return pixels
  # Pillow tells a file with something after its end from a truncated one, which OpenCV would fill
  # up with grey, and reads what OpenCV does not know.
  pixels = _decode_with_pillow(data)
  return pixels if reduce == 1 else resize(pixels, *(-(-s // reduce) for s in pixels.shape[:2]))


def _decode_with_pillow(data: bytes) -> Pixels:
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
      if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
      return np.array(image.convert("RGB"))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    reason = str(error) if str(error) and "BytesIO" not in str(error) else "not an image"
    raise CorruptExampleError(f"{reason} ({len(data)} bytes)") from error


def image_size(data: bytes) -> tuple[int, int]:
  """Returns (height, width) from an image's header, without decoding it.

  Raises:
    CorruptExampleError: the bytes are no image.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.size[1], image.size[0]
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise CorruptExampleError(f"not an image ({len(data)} bytes)") from error


def resize(
  image: Pixels | FloatPixels, height: int, width: int, method: Method = "antialias"
) -> UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W 3"]:
  """Resizes in whichever of the two types comes in; uint8 is rounded.

  For training: fast, and without aliasing. Where an axis shrinks, every output pixel is the mean of
  the area it covers ("antialias", "area"); otherwise, or for "bilinear", the four nearest pixels
  are interpolated at half-pixel centres. For evaluation there is `data/tf_resize.py`.
  """
  shrinks = height < image.shape[0] or width < image.shape[1]
  area = method != "bilinear" and shrinks
  return cv2.resize(
    image, (width, height), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR
  )
