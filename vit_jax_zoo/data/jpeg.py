"""JPEG files, decoded from the top down to where a crop ends.

A baseline JPEG holds its rows from top to bottom and says in its header how many there are. A
decoder that is told of fewer stops early, with the same pixels as if it had read on; what is left
over it takes for rubbish before the end mark, which TurboJPEG, by way of simplejpeg, forgives
without a word. (OpenCV's decoder forgives it too, but prints a warning for each image.)
"""

import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

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
