"""Decoding and resizing of single images, with the conventions that published numbers rest on.

Everything takes and returns RGB, uint8 or float32 [h w 3] with values in [0, 255].
"""

import io
import math
import struct
from typing import Literal, NamedTuple, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vit_jax_zoo.data.sources.base import CorruptExampleError

try:
  import simplejpeg
except ImportError:  # pip install -e '.[fast]'; until then OpenCV decodes whole files
  simplejpeg = None

# Start-of-frame markers, ITU-T T.81, table B.1: baseline, extended and progressive, Huffman-coded.
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)

# Markers that nothing belongs to, and two after which no header can follow (scan, end of image).
_NO_SEGMENT = frozenset((0x00, 0x01, *range(0xD0, 0xDB), 0xFF))

_CONTEXT = 2
"""Rows below that chroma is interpolated from, where it has half the resolution."""

_MAX_PIXELS = 1 << 28
"""Beyond it a header is more likely damaged than true. OpenCV and Pillow have their own limits."""


class Frame(NamedTuple):
  """What a JPEG's header says.

  Attributes:
    height: rows of pixels.
    width: pixels in a row.
    channels: 1 (grey), 3 or 4 (CMYK).
    sequential: whether rows are stored one after the other, of 8-bit samples.
    offset: where in the file the height stands, as two bytes, the upper first.
  """

  height: int
  width: int
  channels: int
  sequential: bool
  offset: int


def read_frame(data: bytes) -> Frame | None:
  """Reads the header of a JPEG file; None when it is not one, or of an unusual kind."""
  if not data.startswith(b"\xff\xd8"):
    return None
  position = 2
  while position + 10 <= len(data) and data[position] == 0xFF:
    marker = data[position + 1]
    if marker in _SEQUENTIAL or marker in _PROGRESSIVE:
      bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
      sequential = marker in _SEQUENTIAL and bits == 8
      found = 0 < height * width <= _MAX_PIXELS  # a height of 0 means: it stands after the pixels
      return Frame(height, width, channels, sequential, position + 5) if found else None
    if marker in _NO_SEGMENT:
      return None
    position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
  return None


def decode_rows(data: bytes, rows: int | None = None) -> UInt8[np.ndarray, "h w 3"] | None:
  """Decodes at least the topmost `rows` of a JPEG file, to RGB; all of them for None.

  The pixels are those that OpenCV and Pillow decode, exactly.

  Args:
    data: a complete file: that its end is missing would not be noticed.
    rows: how many are needed.

  Returns:
    The image, which may go on below `rows`; None for files that have to be decoded in another way:
    progressive, CMYK or damaged ones; all of them when simplejpeg is not installed.
  """
  frame = read_frame(data)
  if simplejpeg is None or frame is None or not frame.sequential or frame.channels not in (1, 3):
    return None
  wanted: bytes | bytearray = data
  if rows is not None and rows + _CONTEXT < frame.height:
    wanted = bytearray(data)
    struct.pack_into(">H", wanted, frame.offset, rows + _CONTEXT)
  try:
    return simplejpeg.decode_jpeg(wanted, strict=False)
  except ValueError:
    return None  # the other decoders may say more about it


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


def decode_image(data: bytes, reduce: int = 1, rows: int | None = None) -> Pixels:
  """Decodes a compressed image of any common format to RGB.

  As in the TensorFlow pipelines the published models were trained with: the EXIF orientation is
  ignored, an alpha channel is dropped, grey becomes three equal channels, of 16-bit samples the
  upper byte stays. CMYK is converted.

  Args:
    data: the file's bytes.
    reduce: 1, 2, 4 or 8: return about 1/reduce of the height and width. Cheap for JPEG.
    rows: with reduce=1: this many from the top are enough. Those of most JPEG files are cheaper
      than the whole; the result may have more.

  Raises:
    CorruptExampleError: the bytes are no image, or a truncated one.
  """
  whole = not data.startswith((_JPEG_START, _PNG_START)) or data.endswith((_JPEG_END, _PNG_END))
  if whole and not data.startswith(b"GIF8"):
    pixels = decode_rows(data, rows) if reduce == 1 else None
    if pixels is None and data:
      pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduce])
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
  frame = read_frame(data)
  if frame is not None:
    return frame.height, frame.width
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.size[1], image.size[0]
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise CorruptExampleError(f"not an image ({len(data)} bytes)") from error


def resize(
  image: Pixels | FloatPixels, height: int, width: int, method: Method = "antialias"
) -> UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W 3"]:
  """Resizes in whichever of the two types comes in; uint8 is rounded.

  For training: fast, and by default without aliasing. "bilinear" interpolates between the four
  nearest pixels, at half-pixel centres. "antialias" does so too, but where an axis shrinks to less
  than 1/1.2 the image is first blurred along it; where one shrinks to less than 1/2.2, it is
  "area": every output pixel is the mean of what it covers. For evaluation there is
  `data/tf_resize.py`.
  """
  scales = image.shape[0] / height, image.shape[1] / width
  if method == "antialias" and _BLUR_FROM < max(scales) <= _AREA_FROM:
    image = _blur(image, *scales)
  elif method != "bilinear" and max(scales) > 1 and (method == "area" or max(scales) > _AREA_FROM):
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


_BLUR_FROM, _AREA_FROM = 1.2, 2.2
"""In between, blurring and interpolating takes half of OpenCV's time for averaging areas, and comes
nearer to Pillow's antialiased bilinear filter. Mean error on photographs, of 255 levels, at the
scales 1.2, 1.5, 1.67, 2 and 2.2: 0.6, 0.4, 0.6, 0.2, 0.4 (area: 0.4, 1.0, 0.9, 1.6, 1.0; bilinear:
0.7, 1.0, 1.5, 1.6, 2.3). Below 1.2 a blur takes away no more than 0.1 of bilinear's."""


def _blur(image: np.ndarray, *scales: float) -> np.ndarray:
  """Blurs each axis so much that bilinear interpolation then has the variance it should have.

  Shrinking by s asks for a triangle s pixels wide on either side, of variance s^2 / 6;
  interpolation gives 1 / 6, and the kernel (a, 1 - 2a, a) adds 2a. It is called a Gaussian because
  for that OpenCV has its fastest code.
  """
  sizes, sigmas = [], []
  for scale in scales:
    weight = (scale**2 - 1) / 12 if scale > _BLUR_FROM else 0.0
    sizes.append(3 if weight else 1)
    sigmas.append(math.sqrt(0.5 / math.log((1 - 2 * weight) / weight)) if weight else 1.0)
  return cv2.GaussianBlur(image, (sizes[1], sizes[0]), sigmaX=sigmas[1], sigmaY=sigmas[0])
