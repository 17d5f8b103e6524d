"""Decoding and resizing of images.

One decoder for training, evaluation and prediction; docs/IMAGES.md lists its rules. Pixels are RGB,
uint8 or float32 [h w 3], with values in [0, 255].
"""

import functools
import io
import math
import os
import re
import struct
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8
from PIL import Image, ImageCms, ImageOps

from vit_jax_zoo.data.sources.base import CorruptExampleError

try:
  import simplejpeg
except ImportError:  # pip install -e '.[fast]'; without it OpenCV decodes whole files
  simplejpeg = None

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]
AnyPixels: TypeAlias = UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]

_FIRST_TRANSPOSED = 5  # EXIF orientations from here on exchange height and width

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs; checked in the header
MAX_BYTES = 1 << 31  # of an image file: `MAX_PIXELS` of 8 bytes take less

_SUFFIXES = (
  ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
  ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

cv2.setNumThreads(0)  # one thread per image: the pipeline parallelises over images


@functools.cache
def suffixes() -> frozenset[str]:
  """Returns the suffixes, in lower case, that this Pillow, with plugins for `.heic`, can decode."""
  Image.init()
  return frozenset(suffix for suffix in _SUFFIXES if suffix in Image.EXTENSION)


def read_file(file: str | os.PathLike, length: int = -1) -> bytes:
  """Returns the first bytes (-1: all) of a regular file, not of a FIFO; or CorruptExampleError."""
  if not os.path.isfile(file) and os.path.exists(file):
    kind = "a folder; expected an image file" if os.path.isdir(file) else "not a regular file"
    raise CorruptExampleError(f"{os.fspath(file)} cannot be read ({kind})")
  try:
    with open(file, "rb") as stream:
      if os.fstat(stream.fileno()).st_size <= MAX_BYTES:
        return stream.read(length)
  except OSError as error:
    raise CorruptExampleError(f"{os.fspath(file)} cannot be read ({error.strerror})") from None
  raise CorruptExampleError(f"{os.fspath(file)} cannot be read (more than {MAX_BYTES} bytes)")


def decode_image(data: bytes, reduce: int = 1, rows: int | None = None) -> Pixels:
  """Decodes an image file to upright sRGB by the rules of docs/IMAGES.md.

  `reduce`, 1, 2, 4 or 8, decodes to about 1/reduce of the height and width, cheap for JPEG. With
  reduce=1, `rows` are the topmost rows that are needed, cheaper than the whole of most JPEG files;
  the result may have more. CorruptExampleError if it is not an image, truncated, or larger than
  `MAX_PIXELS`.
  """
  if (pixels := _decode_fast(data, reduce, rows)) is not None:
    return pixels
  pixels = _decode_with_pillow(data)
  return pixels if reduce == 1 else resize(pixels, *(-(-s // reduce) for s in pixels.shape[:2]))


def image_size(data: bytes) -> tuple[int, int]:
  """Returns (height, width) of the upright image from its header, or CorruptExampleError."""
  height, width, turn = parse_header(data)
  return (width, height) if turn >= _FIRST_TRANSPOSED else (height, width)


def bounded_size(height: int, width: int) -> tuple[int, int]:
  """Returns a resized image's size, sides at least 1; CorruptExampleError above `MAX_PIXELS`."""
  if height * width > MAX_PIXELS:
    raise CorruptExampleError(f"resized to {height}x{width}; expected at most {MAX_PIXELS} pixels")
  return max(1, height), max(1, width)


def orient(
  array: Shaped[np.ndarray, "..."], turn: int, axes: tuple[int, int] = (0, 1)
) -> Shaped[np.ndarray, "..."]:
  """Turns a stored array upright by its EXIF orientation; `axes` are those of rows and columns."""
  if turn >= _FIRST_TRANSPOSED:
    array = np.swapaxes(array, *axes)
  if turn in (3, 4, 7, 8):
    array = np.flip(array, axes[0])
  return np.flip(array, axes[1]) if turn in (2, 3, 6, 7) else array


def orient_boxes(
  boxes_xyxy: Shaped[np.ndarray, "n 4"], turn: int, height: int, width: int
) -> Shaped[np.ndarray, "n 4"]:
  """Turns boxes, in pixels, upright by the EXIF orientation; the size is the upright image's."""
  left, top, right, bottom = boxes_xyxy.T
  if turn >= _FIRST_TRANSPOSED:
    left, top, right, bottom = top, left, bottom, right
  if turn in (3, 4, 7, 8):
    top, bottom = height - bottom, height - top
  if turn in (2, 3, 6, 7):
    left, right = width - right, width - left
  return np.stack([left, top, right, bottom], axis=1)


class JpegHeader(NamedTuple):
  """Header of a JPEG file."""

  height: int  # as stored
  width: int
  channels: int  # 1 (gray), 3 or 4 (CMYK)
  sequential: bool  # stored row by row with 8 bits a sample
  offset: int  # byte offset of the height, a big-endian uint16
  orientation: int = 1  # by EXIF or XMP, 1 to 8
  icc: bytes | None = None  # embedded color profile


# Start-of-frame markers, ITU-T T.81, table B.1: baseline, extended and progressive, Huffman-coded.
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)

# Markers without a segment, and the two after which no header follows (scan, end of image).
_NO_SEGMENT = frozenset((0x00, 0x01, *range(0xD0, 0xDB), 0xFF))

_APP1, _APP2 = 0xE1, 0xE2
_ORIENTATION, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 262, 339  # tags
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:="|>)([1-8])""")  # Pillow's


def read_jpeg_header(data: bytes) -> JpegHeader | None:
  """Reads a JPEG file's header; None for other formats, unusual kinds, and above `MAX_PIXELS`."""
  if not data.startswith(_JPEG_START):
    return None
  position, exif, xmp, icc = 2, 0, 0, b""
  while position + 10 <= len(data) and data[position] == 0xFF:
    marker, start = data[position + 1], position + 4
    if marker in _SEQUENTIAL or marker in _PROGRESSIVE:
      bits, height, width, channels = struct.unpack_from(">BHHB", data, start)
      if not 0 < height * width <= MAX_PIXELS:  # a height of 0: it follows the pixels
        return None
      sequential = marker in _SEQUENTIAL and bits == 8
      turn = exif or xmp or 1
      return JpegHeader(height, width, channels, sequential, position + 5, turn, icc or None)
    if marker in _NO_SEGMENT:
      return None
    end = position + 2 + int.from_bytes(data[position + 2 : start], "big")
    if marker == _APP1 and data.startswith(_EXIF, start):
      exif = exif or _exif_orientation(data[start + len(_EXIF) : end])
    elif marker == _APP1 and data.startswith(_XMP, start):
      found = _XMP_ORIENTATION.search(data, start, end)
      xmp = int(found[1]) if found else xmp
    elif marker == _APP2 and data.startswith(_ICC, start):
      icc += data[start + len(_ICC) + 2 : end]  # after the part's number and the count
    position = end
  return None


def _exif_orientation(tiff: bytes) -> int:
  if (order := {b"II": "<", b"MM": ">"}.get(tiff[:2])) is None or len(tiff) < 14:
    return 0
  (first,) = struct.unpack_from(order + "I", tiff, 4)
  if first + 2 > len(tiff):
    return 0
  (count,) = struct.unpack_from(order + "H", tiff, first)
  for entry in range(first + 2, min(first + 2 + 12 * count, len(tiff) - 11), 12):
    tag, kind = struct.unpack_from(order + "HH", tiff, entry)
    if tag == _ORIENTATION:
      form = {3: "H", 4: "I"}.get(kind)  # SHORT, as the standard says, or LONG
      (value,) = struct.unpack_from(order + form, tiff, entry + 8) if form else (0,)
      return value if 1 <= value <= 8 else 0
  return 0


def read_header(file: str | os.PathLike) -> tuple[int, int, int]:
  """Returns a file's stored height, width and EXIF orientation, or CorruptExampleError."""
  try:
    return parse_header(read_file(file, 1 << 16))  # long enough for most headers
  except CorruptExampleError:
    return parse_header(read_file(file))


def parse_header(data: bytes) -> tuple[int, int, int]:
  """Returns height and width as stored, and EXIF orientation, 1 to 8; or CorruptExampleError."""
  if (header := read_jpeg_header(data)) is not None:
    return header.height, header.width, header.orientation
  try:
    with open_image(data) as image:
      turn = image.getexif().get(_ORIENTATION, 1)
      turn = turn if turn in range(1, 9) else 1
      width, height = image.size
  except Exception as error:
    raise CorruptExampleError(_reason(error, data)) from error
  is_upright = image.format == "TIFF" and turn >= _FIRST_TRANSPOSED  # Pillow rotates these
  return (width, height, turn) if is_upright else (height, width, turn)


_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_PNG_EXTRAS = (b"tRNS", b"iCCP", b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Transparency, color profile and orientation: Pillow decodes the PNG files that may have them."""

_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {1: 0} | {r: getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{r}") for r in (2, 4, 8)}
"""Reduced decoding omits part of JPEG's inverse cosine transform: a cheap average. The color flag
overrides the names' "grayscale"; their color variants set BGR, which excludes RGB."""


def _decode_fast(data: bytes, reduce: int, rows: int | None) -> Pixels | None:
  """Decodes plain JPEG and PNG files that end with their end marker, as Pillow does; else None."""
  header, pixels, turn, to_srgb = read_jpeg_header(data), None, 1, None
  if header is not None:
    if header.channels not in (1, 3) or not data.endswith(_JPEG_END):
      return None  # OpenCV would accept a truncated file
    mode = "L" if header.channels == 1 else "RGB"
    to_srgb = None if header.icc is None else _srgb_transform(header.icc, mode)
    if to_srgb is not None and header.channels == 1:
      return None
    turn = header.orientation
    pixels = decode_rows(data, header, rows if turn == 1 else None) if reduce == 1 else None
  elif not (data.startswith(_PNG_START) and data.endswith(_PNG_END) and _is_plain_png(data)):
    return None
  if pixels is None:
    try:
      pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _READ | _REDUCED[reduce])
    except cv2.error:
      return None
  if pixels is not None and to_srgb is not None:
    pixels = np.array(to_srgb.apply(Image.fromarray(pixels)))
  if pixels is None or turn == 1:
    return pixels
  return np.ascontiguousarray(orient(pixels, turn))  # OpenCV takes no other


def _is_plain_png(data: bytes) -> bool:
  if len(data) < 33:  # the end of the header chunk
    return False
  width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
  opaque = kind in (0, 2, 3)  # gray, RGB, palette
  small = width * height <= MAX_PIXELS
  return opaque and small and bits <= 8 and not any(extra in data for extra in _PNG_EXTRAS)


def decode_rows(data: bytes, header: JpegHeader, rows: int | None = None) -> Pixels | None:
  """Decodes the topmost `rows` of a complete gray or RGB JPEG file (default: all), as stored.

  Returns exactly the pixels of OpenCV and Pillow, maybe with rows below; None for progressive and
  damaged files, or without simplejpeg. Accepts a file without its end.
  """
  if simplejpeg is None or not header.sequential:
    return None
  source: bytes | bytearray = data
  # Chroma of half the resolution is interpolated from two rows below.
  if rows is not None and rows + 2 < header.height:
    source = bytearray(data)
    struct.pack_into(">H", source, header.offset, rows + 2)
  try:
    return simplejpeg.decode_jpeg(source, strict=False)
  except ValueError:
    return None


def open_image(data: bytes) -> Image.Image:
  """Opens an image of any format but EPS, for which Pillow would run Ghostscript."""
  Image.init()
  return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name != "EPS"])


def _decode_with_pillow(data: bytes) -> Pixels:
  try:
    with open_image(data) as image:
      if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.height}x{image.width} pixels")
      clear, bits = image.info.get("transparency"), data[24] if image.format == "PNG" else 8
      if image.mode == "L" and clear is not None and bits < 8:
        image.info["transparency"] = clear * 255 // (2**bits - 1)  # as Pillow scales the samples
      image.load()
      if isinstance(clear, tuple) and bits == 16:  # Pillow keeps the upper bytes only
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        samples = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags))
        is_opaque = np.any(samples != np.asarray(clear), axis=2)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(is_opaque))
      return from_pillow(image)
  except Exception as error:  # decoders raise many types
    raise CorruptExampleError(_reason(error, data)) from error


def _reason(error: Exception, data: bytes) -> str:
  text = " ".join(str(error).split())
  return f"{'not an image' if not text or 'BytesIO' in text else text} ({len(data)} bytes)"


def from_pillow(image: Image.Image) -> Pixels:
  """Returns an image opened by Pillow as upright sRGB, by the rules of docs/IMAGES.md."""
  icc, alpha = image.info.get("icc_profile"), None
  tags = getattr(image, "tag_v2", {})  # TIFF's: Pillow inverts 8 bits only, and all is signed
  inverted, unsigned = tags.get(_PHOTOMETRIC) == 0, tags.get(_SAMPLE_FORMAT) == (1,)
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16: the upper byte
    samples = np.asarray(image).astype(np.int64)
    samples = samples % (1 << 32) if unsigned else samples
    alpha = Image.fromarray(samples != image.info.get("transparency")).convert("L")
    image = _to_gray(samples >> 8, inverted)
  elif image.mode == "F":
    samples = np.nan_to_num(np.asarray(image), posinf=np.inf, neginf=-np.inf)
    largest = samples.max(initial=0, where=np.isfinite(samples))
    image = _to_gray(np.round(samples * 255 if largest <= 1 else samples), inverted)
  elif image.has_transparency_data:
    is_gray = image.mode in ("L", "LA")
    image = image.convert("RGBA")
    alpha, image = image.getchannel("A"), image.convert("L" if is_gray else "RGB")
  elif image.mode not in ("L", "CMYK"):
    image = image.convert("RGB")
  to_srgb = None if icc is None else _srgb_transform(icc, image.mode)
  pixels = np.array(image.convert("RGB") if to_srgb is None else to_srgb.apply(image))
  if alpha is None:
    return pixels
  opaque = Image.fromarray(pixels)
  opaque.putalpha(alpha)
  white = Image.new("RGBA", opaque.size, "white")
  return np.array(Image.alpha_composite(white, opaque).convert("RGB"))


def _to_gray(samples: Shaped[np.ndarray, "h w"], inverted: bool) -> Image.Image:  # noqa: FBT001
  levels = np.clip(samples, 0, 255).astype(np.uint8)
  return Image.fromarray(~levels if inverted else levels)


@functools.lru_cache(maxsize=256)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
  """Returns the transform to sRGB; None for a damaged or unfit profile, or one like sRGB."""
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
      return None
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
  except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
    return None
  if mode == "CMYK":
    return transform
  levels = np.linspace(0, 255, 18).astype(np.uint8)
  grid = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
  plain = grid.reshape(1, len(grid), -1).astype(int)
  moved = np.abs(np.array(transform.apply(Image.fromarray(grid[None]))) - plain)
  return None if moved.max() <= 2 else transform  # in levels: it is sRGB


def resize(
  image: AnyPixels, height: int, width: int, method: str = "antialias"
) -> UInt8[np.ndarray, "H W c"] | Float32[np.ndarray, "H W c"]:
  """Resizes an image for training; evaluation has TensorFlow's exact resizes, `tf_resize`.

  "bilinear" interpolates the four nearest pixels, at half-pixel centres; "antialias" is bilinear,
  after a blur of the axes that shrink to less than 1/1.2; if one shrinks to less than 1/2.2, the
  mean of the covered area. uint8 results are rounded.
  """
  height, width = bounded_size(height, width)
  scales = image.shape[0] / height, image.shape[1] / width
  if method == "antialias" and max(scales) > AREA_FROM:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  if method == "antialias" and max(scales) > BLUR_FROM:
    image = _blur(image, *scales)
  return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


BLUR_FROM, AREA_FROM = 1.2, 2.2
"""In between, blur and interpolation take half the time of OpenCV's area averaging, and are nearer
to Pillow's antialiased bilinear filter. Mean absolute error on photographs at scales
1.2 to 2.2: 0.2 to 0.6 of 255 levels (area: 0.4 to 1.6). Below 1.2, a blur gains at most 0.1."""


def _blur(image: np.ndarray, *scales: float) -> np.ndarray:
  """Blurs each axis so that bilinear interpolation has the variance of an antialiasing filter.

  Shrinking by s needs a triangle of half-width s, with variance s^2 / 6; interpolation has 1 / 6,
  and the kernel (a, 1 - 2a, a) adds 2a. It is written as a Gaussian, OpenCV's fastest filter.
  """
  sizes, sigmas = [], []
  for scale in scales:
    weight = (scale**2 - 1) / 12 if scale > BLUR_FROM else 0.0
    sizes.append(3 if weight else 1)
    sigmas.append(math.sqrt(0.5 / math.log((1 - 2 * weight) / weight)) if weight else 1.0)
  return cv2.GaussianBlur(image, (sizes[1], sizes[0]), sigmaX=sigmas[1], sigmaY=sigmas[0])


METHODS = ("bilinear", "area", "antialias")  # of `tf_resize`

_cached = functools.lru_cache(256)  # of neighbours and weights, by (old size, new size)
_ONE, _HALF = np.float32(1), np.float32(0.5)


def tf_resize(
  image: AnyPixels, height: int, width: int, method: str = "bilinear"
) -> Float32[np.ndarray, "H W c"]:
  """Resizes an image, in [0, 255], bit for bit as `tf.image.resize`, without rounding.

  Published accuracies were measured with it. Their pipelines drop the fraction in a cast to uint8,
  so a rounding error becomes one grey level: on a white background, in half of the pixels. Hence
  the float32 operations are in TensorFlow's order (core/kernels/image: resize_bilinear_op,
  resize_area_op and scale_and_translate_op), unlike OpenCV's.

  "bilinear" interpolates the four nearest pixels, at half-pixel centres, so that a large image
  shrinks to a scatter of its pixels; it is TensorFlow's default. "area" is the mean of the covered
  area. "antialias" is bilinear with a triangle as wide as the shrinkage.
  """
  image = image.astype(np.float32)
  if method == "bilinear":
    return _bilinear(image, height, width)
  if method == "antialias":
    rows = _weighted_sum(image, *_triangle(image.shape[0], height), axis=0)
    return _weighted_sum(rows, *_triangle(image.shape[1], width), axis=1)
  columns = _weighted_sum(image, *_cover(image.shape[1], width), axis=1)
  total = _weighted_sum(columns, *_cover(image.shape[0], height), axis=0)
  # The area in float32, its inverse in double: the kernel divides the literal 1.0.
  area = _scale(image.shape[0], height) * _scale(image.shape[1], width)
  return total * np.float32(1.0 / float(area))


def _scale(old: int, new: int) -> np.float32:
  return np.float32(old) / np.float32(new)


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
  top, bottom, y = _neighbours(image.shape[0], height)
  left, right, x = _neighbours(image.shape[1], width)
  x, y = x[None, :, None], y[:, None, None]
  # Only the rows that are needed, each interpolated once.
  rows, where = np.unique(np.concatenate([top, bottom]), return_inverse=True)
  image = image[rows]
  first = image[:, left]
  image = first + (image[:, right] - first) * x
  upper = image[where[:height]]
  return upper + (image[where[height:]] - upper) * y


@_cached
def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the lower and the upper neighbour of each new centre, and the upper one's weight."""
  centres = (np.arange(new, dtype=np.float32) + _HALF) * _scale(old, new) - _HALF
  floor, ceiling = np.floor(centres), np.ceil(centres)
  lower, upper = (np.clip(i, 0, old - 1).astype(np.int64) for i in (floor, ceiling))
  return lower, upper, np.asarray(centres - floor)


def _weighted_sum(
  image: np.ndarray,
  starts: Int[np.ndarray, "new"],
  weights: Float32[np.ndarray, "new taps"],
  axis: int,
) -> np.ndarray:
  """Sums, tap by tap, `weights[i, k]` times the pixel `starts[i] + k` of an axis."""
  shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
  total = np.zeros((), np.float32)
  for tap in range(weights.shape[1]):
    indices = np.minimum(starts + tap, image.shape[axis] - 1)
    total = np.add(total, image.take(indices, axis) * weights[:, tap].reshape(shape))
  return total


@_cached
def _cover(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first pixel of the interval [i, i + 1) * old/new, and the covered fractions."""
  scale = _scale(old, new)
  begin = np.arange(new, dtype=np.float32) * scale
  end = np.arange(1, new + 1, dtype=np.float32) * scale
  starts = np.floor(begin).astype(np.int64)
  counts = np.ceil(end).astype(np.int64) - starts
  pixels = (starts[:, None] + np.arange(counts.max())).astype(np.float32)
  begin, end = begin[:, None], end[:, None]
  inside = np.where(pixels + _ONE > end, end - pixels, _ONE)
  first = np.where(pixels + _ONE > end, scale, pixels + _ONE - begin)
  weights = np.where(pixels < begin, first, inside)
  return starts, np.where(np.arange(counts.max()) < counts[:, None], weights, np.float32(0))


@_cached
def _triangle(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first pixel below a triangle around each new centre, and the pixels' weights."""
  inverse_scale = _ONE / (np.float32(new) / np.float32(old))
  radius = max(inverse_scale, _ONE)
  centres = (np.arange(new, dtype=np.float32) + _HALF) * inverse_scale
  starts = np.maximum(np.ceil(centres - radius - _HALF), 0).astype(np.int64)
  stops = np.minimum(np.floor(centres + radius - _HALF), old - 1).astype(np.int64) + 1
  taps = np.arange((stops - starts).max())
  distance = (starts[:, None] + taps).astype(np.float32) + _HALF - centres[:, None]
  weights = np.maximum(_ONE - np.abs(distance * (_ONE / radius)), np.float32(0))
  weights = np.where(taps < (stops - starts)[:, None], weights, np.float32(0))
  total = np.zeros(new, np.float32)
  for tap in taps:
    total += weights[:, tap]
  return starts, weights * (_ONE / total)[:, None]
