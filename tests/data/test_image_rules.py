"""The rules of docs/IMAGES.md: unusual files give the same pixels on all input paths."""

import contextlib
import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.data.images import encode, photo
from vit_jax_zoo.data import images
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.base import CorruptExampleError
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.inference.base import read_image

PHOTO = photo(24, 32)
GRAY = PHOTO[..., 0]


def with_exif(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def upright(orientation):
  lying = Image.fromarray(PHOTO)
  lying.info["exif"] = with_exif(orientation).tobytes()
  return np.asarray(ImageOps.exif_transpose(lying))


def rgb(gray):
  return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=2)


def on_white(image, alpha):
  weight = np.asarray(alpha, float)[..., None] / 255
  return np.round(image * weight + 255 * (1 - weight)).astype(np.uint8)


def swapped_profile():
  """Returns an RGB profile with red and blue primaries exchanged."""
  data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
  count = struct.unpack_from(">I", data, 128)[0]
  tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
  red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
  data[red + 4 : red + 12], data[blue + 4 : blue + 12] = (
    data[blue + 4 : blue + 12],
    data[red + 4 : red + 12],
  )
  return bytes(data)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = swapped_profile()
ALPHA = np.linspace(0, 255, GRAY.size).reshape(GRAY.shape).astype(np.uint8)


def palette_with_transparency():
  image = Image.fromarray(PHOTO).quantize(16)
  return encode(image, "PNG", transparency=3), np.where(
    (np.asarray(image) == 3)[..., None], 255, np.asarray(image.convert("RGB"))
  )


def gray_profile():
  """Returns a gray profile of gamma 1, which littleCMS cannot write."""
  white = b"XYZ " + struct.pack(">4xiii", 63190, 65536, 54061)
  curve = b"curv" + struct.pack(">4xIHxx", 1, 256)
  header = struct.pack(">I4xI4s4s4s12x4s28x", 192, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
  tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 16)
  return header + white[8:] + bytes(128 - len(header) - 12) + tags + white + curve


def gray_to_srgb(gray):
  profile = ImageCms.ImageCmsProfile(io.BytesIO(gray_profile()))
  srgb = ImageCms.createProfile("sRGB")
  return np.asarray(
    ImageCms.profileToProfile(Image.fromarray(gray), profile, srgb, outputMode="RGB")
  )


def png_chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def clear_shallow_gray(bits):
  """Returns a PNG of 2 or 4 bits a pixel whose samples of 1 are transparent, and its pixels."""
  samples = np.array([0, 1, 2, 3] if bits == 2 else [1, 11])  # a byte 0x1b
  header = struct.pack(">IIBBBBB", 8 * len(samples), 24, bits, 0, 0, 0, 0)
  data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"tRNS", b"\0\1")
  data += png_chunk(b"IDAT", zlib.compress((b"\0" + b"\x1b" * 8) * 24)) + png_chunk(b"IEND", b"")
  pixels = np.where(samples == 1, 255, samples * 255 // (2**bits - 1))
  return data, rgb(np.tile(pixels, (24, 8)))


def clear_deep_rgb():
  """A PNG of 16 bits a channel with a transparent colour, which Pillow cannot write."""
  samples = PHOTO.astype(np.uint16) * 256 + 9
  samples[:, 1] = samples[0, 0]
  samples[:, 2] = samples[0, 0] + 1  # equal to the key in the upper bytes only: opaque
  data = cv2.imencode(".png", samples[..., ::-1])[1].tobytes()
  blank = (samples[0, 0] == samples).all(2, keepdims=True)
  chunk = png_chunk(b"tRNS", struct.pack(">HHH", *samples[0, 0]))
  return data[:33] + chunk + data[33:], np.where(blank, 255, samples >> 8)  # 33: after the header


def exif_with_long(order):
  """Returns an EXIF block whose orientation, 6, is a LONG instead of the standard's SHORT."""
  name = b"II" if order == "<" else b"MM"
  return b"Exif\0\0" + name + struct.pack(order + "HIHHHIII", 42, 8, 1, 0x0112, 4, 1, 6, 0)


def profile_cases():
  yield "srgb", encode(PHOTO, "PNG", icc_profile=SRGB), PHOTO
  yield "profile", encode(PHOTO, "PNG", icc_profile=SWAPPED), PHOTO[..., ::-1]
  yield "profile jpeg", encode(PHOTO, "JPEG", icc_profile=SWAPPED), None
  yield "profile of another space", encode(GRAY, "PNG", icc_profile=SWAPPED), rgb(GRAY)
  kinds = (GRAY, np.dstack([GRAY, GRAY * 0 + 255]), GRAY.astype(np.uint16) * 256)
  for name, image in zip(("gray", "la", "16 bit"), kinds, strict=True):
    yield f"{name} profile", encode(image, "PNG", icc_profile=gray_profile()), gray_to_srgb(GRAY)
  yield "broken profile", encode(PHOTO, "PNG", icc_profile=b"broken" * 40), PHOTO


def tiff_cases():
  deep = GRAY.astype(np.uint16) * 256
  yield "16 bit tiff", encode(deep, "TIFF"), rgb(GRAY)
  inverted = [struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0)]  # WhiteIsZero
  yield "inverted 16 bit tiff", encode(deep, "TIFF").replace(*inverted), rgb(255 - GRAY)
  for value in (1 << 20, -1):  # -1 is signed; unsigned it is the largest
    bright = encode(np.full((4, 4), value, np.int32), "TIFF")
    yield f"32 bit tiff {value}", bright, np.full((4, 4, 3), 255 if value > 0 else 0)
  formats = [struct.pack("<HHIH", 339, 3, 1, value) for value in (2, 1)]
  yield "unsigned 32 bit tiff", bright.replace(*formats), np.full((4, 4, 3), 255)


def cases():
  yield "jpeg", encode(PHOTO, "JPEG"), None
  for turn in range(1, 9):
    yield f"png {turn}", encode(PHOTO, "PNG", exif=with_exif(turn)), upright(turn)
    yield f"jpeg {turn}", encode(PHOTO, "JPEG", exif=with_exif(turn)), None
    yield f"tiff {turn}", encode(PHOTO, "TIFF", tiffinfo={0x0112: turn}), upright(turn)
    lossless = dict(lossless=True, exif=with_exif(turn))
    yield f"webp {turn}", encode(PHOTO, "WEBP", **lossless), upright(turn)
  yield "long exif", encode(PHOTO, "JPEG", exif=exif_with_long(">")), None
  xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
  yield "xmp", encode(PHOTO, "JPEG", xmp=xmp), None
  yield "rgba", encode(np.dstack([PHOTO, ALPHA]), "PNG"), on_white(PHOTO, ALPHA)
  yield "la", encode(np.dstack([GRAY, ALPHA]), "PNG"), on_white(rgb(GRAY), ALPHA)
  yield (
    "webp alpha",
    encode(np.dstack([PHOTO, ALPHA]), "WEBP", lossless=True, exact=True),
    (on_white(PHOTO, ALPHA)),
  )
  yield "palette", encode(Image.fromarray(PHOTO).quantize(16), "PNG"), None
  yield "clear palette", *palette_with_transparency()
  clear = np.where((GRAY[0, 0] == GRAY)[..., None], 255, rgb(GRAY))
  yield "clear gray", encode(GRAY, "PNG", transparency=int(GRAY[0, 0])), clear
  yield "gray jpeg", encode(GRAY, "JPEG"), None
  yield "one bit", encode(Image.fromarray(GRAY).convert("1"), "PNG"), None
  yield "16 bit", encode(GRAY.astype(np.uint16) * 256 + 9, "PNG"), rgb(GRAY)
  yield "dark 16 bit", encode(GRAY.astype(np.uint16), "PNG"), rgb(GRAY * 0)
  deep = GRAY.astype(np.uint16) * 256
  yield "clear 16 bit", encode(deep, "PNG", transparency=int(deep[0, 0])), clear
  yield "clear 16 bit rgb", *clear_deep_rgb()
  yield "clear 2 bit", *clear_shallow_gray(2)
  yield "clear 4 bit", *clear_shallow_gray(4)
  yield from tiff_cases()
  yield "float", encode(GRAY.astype(np.float32) / 255, "TIFF"), rgb(GRAY)
  yield "float 255", encode(GRAY.astype(np.float32), "TIFF"), rgb(GRAY)
  yield "nan", encode(np.where(GRAY > 99, np.nan, 0).astype(np.float32), "TIFF"), rgb(GRAY * 0)
  bright = np.array([[np.inf, -np.inf], [np.nan, 1]], np.float32)
  bright = np.tile(bright, (4, 4))
  yield "infinity", encode(bright, "TIFF"), rgb(np.tile([[255, 0], [0, 255]], (4, 4)))
  yield "cmyk", encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"), None
  yield "cmyk tiff", encode(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"), PHOTO
  yield from profile_cases()
  yield "gif", encode(Image.fromarray(PHOTO).quantize(16), "GIF"), None
  yield "progressive", encode(PHOTO, "JPEG", progressive=True), None
  for kind in ("AVIF", "JPEG2000", "PPM", "BMP"):
    yield kind.lower(), encode(PHOTO, kind), None


CASES = {name: (data, expected) for name, data, expected in cases()}


def batch_image(source, specs):
  transforms = build_transforms(specs)
  evaluated = next(iter(eval_batches(source, transforms, batch_size=1)))["image"][0]
  with train_batches(source, transforms, batch_size=1, seed=0, num_threads=1) as batches:
    np.testing.assert_array_equal(next(batches)["image"][0], evaluated)
  return evaluated


def read_by_folder(root, path):
  return batch_image(load_source(f"folder:{root / 'images'}", "all"), [dict(name="decode")])


def read_by_coco(root, path):
  height, width = read_image(path).shape[:2]
  image = {"id": 1, "file_name": path.name, "height": height, "width": width}
  box = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
  data = {"images": [image], "annotations": [box], "categories": [{"id": 0, "name": "a"}]}
  (root / "annotations").mkdir()
  (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
  (root / "train").symlink_to(path.parent)
  source = load_source(f"coco:{root}", "train")
  assert source.image_size(0) == (height, width)
  return batch_image(source, [dict(name="load_objects"), dict(name="pad_objects", num=2)])


def read_by_segmentation(root, path):
  labels = np.zeros(read_image(path).shape[:2], np.uint8)
  (root / "labels").mkdir()
  Image.fromarray(labels).save(root / "labels" / f"{path.stem}.png")
  (root / "annotations" / "train").mkdir(parents=True)
  Image.fromarray(labels).save(root / "annotations" / "train" / f"{path.stem}.png")
  patterns = dict(images="images/{split}/{name}.*", labels="annotations/{split}/{name}.png")
  (root / "images" / "train").symlink_to(path.parent)
  source = load_source(f"segmentation:{root}", "train", **patterns)
  return batch_image(source, [dict(name="load_label_map"), dict(name="pad_label_map")])


def read_by_pairs(root, path):
  (root / "train").mkdir()
  for name in ("input", "ref"):
    (root / "train" / name).symlink_to(path.parent)
  return batch_image(load_source(f"pairs:{root}", "train"), [dict(name="super_resolution_pair")])


@pytest.mark.parametrize("name", CASES)
def test_all_paths_decode_equally(name, tmp_path):
  data, expected = CASES[name]
  path = tmp_path / "images" / "x" / "a.jpg"  # the suffix is not used
  path.parent.mkdir(parents=True)
  path.write_bytes(data)
  pixels = images.decode_image(data)
  assert images.image_size(data) == pixels.shape[:2]
  if expected is not None:
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 2
  np.testing.assert_array_equal(read_image(path), pixels)
  for number, through in enumerate(
    (read_by_folder, read_by_coco, read_by_segmentation, read_by_pairs)
  ):
    root = tmp_path if through is read_by_folder else tmp_path / str(number)
    root.mkdir(exist_ok=True)
    if through is read_by_segmentation:
      (root / "images").mkdir()
    np.testing.assert_array_equal(through(root, path), pixels, err_msg=through.__name__)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0][:2] == b"\xff\xd8"])
def test_jpeg_equals_pillow(name):
  data = CASES[name][0]
  fast = images._decode_fast(data, 1, None)
  if fast is None:
    assert "cmyk" in name
  else:
    np.testing.assert_array_equal(fast, images._decode_with_pillow(data))
    assert fast.flags.c_contiguous


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_stored_as_long(order):
  data = encode(PHOTO, "JPEG", exif=exif_with_long(order))
  assert images.parse_header(data) == (24, 32, 6)
  assert images.decode_image(data).shape == (32, 24, 3)


def test_orient_and_orient_boxes():
  for turn in range(1, 9):
    np.testing.assert_array_equal(images.orient(PHOTO, turn), upright(turn))
    masks = images.orient(np.moveaxis(PHOTO, 2, 0), turn, (1, 2))
    np.testing.assert_array_equal(masks, np.moveaxis(upright(turn), 2, 0))
    marked = np.zeros(PHOTO.shape[:2], bool)
    marked[3:9, 5:20] = True
    turned = images.orient(marked, turn)
    (box,) = images.orient_boxes(np.array([[5, 3, 20, 9]]), turn, *turned.shape)
    rows, columns = np.nonzero(turned)
    assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def huge(kind):
  """Returns a file with 60,000 x 60,000 pixels in its header."""
  data = bytearray(encode(PHOTO, kind))
  if kind == "PNG":
    struct.pack_into(">II", data, 16, 60_000, 60_000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
  elif kind == "JPEG":
    offset = images.read_jpeg_header(bytes(data)).offset
    struct.pack_into(">HH", data, offset, 60_000, 60_000)
  elif kind == "BMP":
    struct.pack_into("<ii", data, 18, 60_000, 60_000)
  else:
    return b"P6\n60000 60000\n255\n"
  return bytes(data)


def test_eps_is_no_image():  # Pillow would start Ghostscript
  data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
  for read in (images.decode_image, images.image_size):
    with pytest.raises(CorruptExampleError, match="not an image"):
      read(data)


def test_huge_file_raises(tmp_path):
  with (tmp_path / "sparse.jpg").open("wb") as stream:
    stream.truncate(images.MAX_BYTES + 1)
  for read in (images.read_file, images.read_header):
    with pytest.raises(CorruptExampleError, match=r"sparse\.jpg .*bytes"):
      read(tmp_path / "sparse.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "PPM"])
def test_huge_header_raises(kind):
  with pytest.raises(CorruptExampleError, match=r"exceeds limit|pixels|not an image") as error:
    images.decode_image(huge(kind))
  assert "\n" not in str(error.value)


def test_max_pixels_all_formats(monkeypatch):
  monkeypatch.setattr(images, "MAX_PIXELS", PHOTO.shape[0] * PHOTO.shape[1] - 1)
  for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"):
    with pytest.raises(CorruptExampleError, match="24x32 pixels"):
      images.decode_image(encode(PHOTO, kind))


def test_damaged_files_decoded_or_corrupt():
  rng = np.random.default_rng(0)
  for name in ("rgba", "16 bit tiff", "webp alpha", "gif", "profile", "avif", "jpeg2000", "ppm"):
    data = CASES[name][0]
    for _ in range(40):
      damaged = bytearray(data)
      for place in rng.integers(len(data), size=3):
        damaged[place] = rng.integers(256)
      with contextlib.suppress(CorruptExampleError):
        assert images.decode_image(bytes(damaged)).ndim == 3


def test_label_map_follows_exif_orientation(tmp_path):
  labels = (np.arange(GRAY.size).reshape(GRAY.shape) % 200).astype(np.uint8)
  (load,) = build_transforms([dict(name="load_label_map")])
  image = encode(PHOTO, "JPEG", exif=with_exif(6))
  turned = images.orient(labels, 6)
  for stored in (labels, turned):
    example = {"image": image, "label_map": encode(stored, "PNG")}
    loaded = load(example, np.random.default_rng(0))
    assert loaded["image"].shape[:2] == turned.shape
    np.testing.assert_array_equal(loaded["label_map"], turned)
