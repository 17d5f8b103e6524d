import contextlib
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode, photo
from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import CorruptExampleError

NOISE = np.random.default_rng(0).integers(256, size=(53, 70, 3), dtype=np.uint8)
KINDS = {
  "4:2:0": dict(subsampling=2),
  "4:2:2": dict(subsampling=1),
  "4:4:4": dict(subsampling=0),
  "rgb": dict(keep_rgb=True, subsampling=0),
  "rough": dict(quality=10),
  "restart markers by rows": dict(restart_marker_rows=1),
  "restart markers by blocks": dict(restart_marker_blocks=3),
  "custom huffman tables": dict(optimize=True),
  "thumbnail": dict(exif=b"Exif\0\0" + encode(photo(20, 20))),
}
UNUSUAL = {
  "progressive": encode(NOISE, progressive=True),
  "cmyk": encode(Image.fromarray(NOISE).convert("CMYK")),
  "png": encode(NOISE, "PNG"),
  "empty": b"",
}


def by_opencv(data):
  return cv2.imdecode(np.frombuffer(data, np.uint8), images._READ)


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
class TestRows:
  def data(self, kind):
    return encode(NOISE[..., 0]) if kind == "grey" else encode(NOISE, **KINDS[kind])

  def test_equal_to_full_decode(self, kind, capfd):
    data = self.data(kind)
    whole, header = by_opencv(data), images.read_jpeg_header(data)
    for rows in range(1, 54):
      decoded = images.decode_rows(data, header, rows)
      assert decoded.shape[0] <= rows + 2
      np.testing.assert_array_equal(decoded[:rows], whole[:rows])
    np.testing.assert_array_equal(images.decode_rows(data, header), whole)
    assert not capfd.readouterr().err

  def test_independent_of_decoder(self, kind, monkeypatch):
    data = self.data(kind)
    decoded = images.decode_image(data, rows=30)[:30]
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(images.decode_image(data, rows=30)[:30], decoded)

  def test_header_fields(self, kind):
    frame = images.read_jpeg_header(self.data(kind))
    assert frame[:4] == (53, 70, 1 if kind == "grey" else 3, True)


@pytest.mark.parametrize("factor", ["411", "420", "422", "440", "444"])
def test_chroma_subsamplings(factor):
  flag = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{factor}")
  data = cv2.imencode(".jpg", NOISE, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, flag])[1].tobytes()
  for rows in (1, 15, 16, 17, 31, 32, 50):
    decoded = images.decode_rows(data, images.read_jpeg_header(data), rows)
    np.testing.assert_array_equal(decoded[:rows], by_opencv(data)[:rows])


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unsupported_files_use_fallback(kind):
  data = UNUSUAL[kind]
  with contextlib.nullcontext() if data else pytest.raises(CorruptExampleError):
    assert images.decode_image(data, rows=8).shape == (53, 70, 3)


def test_progressive_header():
  assert images.read_jpeg_header(UNUSUAL["progressive"])[:4] == (53, 70, 3, False)
  assert images.image_size(UNUSUAL["progressive"]) == (53, 70)


@pytest.mark.parametrize("height", [0, 0xFFFF])
def test_implausible_header_rejected(height):
  data = bytearray(encode(NOISE))
  struct.pack_into(">HH", data, images.read_jpeg_header(bytes(data)).offset, height, 0xFFFF)
  assert images.read_jpeg_header(bytes(data)) is None


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.6, 0.95])
def test_truncated_below_rows_corrupt(fraction):
  data = encode(photo(200, 200))
  with pytest.raises(CorruptExampleError):
    images.decode_image(data[: int(len(data) * fraction)], rows=8)


def test_damaged_header_decoded_or_corrupt():
  """Random bytes in the file give pixels or CorruptExampleError, never a crash."""
  data, rng = encode(photo(24, 24)), np.random.default_rng(0)
  for _ in range(300):
    damaged = bytearray(data)
    for place in rng.integers(2, len(data) - 2, size=3):
      damaged[place] = rng.integers(256)
    with contextlib.suppress(CorruptExampleError, cv2.error):
      assert images.decode_image(bytes(damaged), rows=8).ndim == 3
