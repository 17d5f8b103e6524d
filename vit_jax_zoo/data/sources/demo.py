"""Demo datasets from images in the wheels of scikit-learn and scikit-image.

They are prepared as ArrayRecord at their first use (1 to 2 s, scenes and shapes 10 s; no download,
no TensorFlow) in `base.cache_dir`, and read as ImageNet is. One example in five is for test.
"""

import colorsys
import functools
import importlib.resources
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Bool, Float, Float32, Int, UInt8
from numpy.random import Generator
from PIL import Image

from vit_jax_zoo.data.sources import tfds as tfds_source
from vit_jax_zoo.data.sources.base import Splits, cache_dir
from vit_jax_zoo.errors import check_names

PHOTOS = {
  "astronaut": "skimage/data/astronaut.png",
  "cat": "skimage/data/chelsea.png",
  "coffee": "skimage/data/coffee.png",
  "flower": "sklearn/datasets/images/flower.jpg",
  "galaxies": "skimage/data/hubble_deep_field.jpg",
  "motorcycle": "skimage/data/motorcycle_left.png",
  "retina": "skimage/data/retina.jpg",
  "rocket": "skimage/data/rocket.jpg",
  "temple": "sklearn/datasets/images/china.jpg",
  "tissue": "skimage/data/ihc.png",
}
"""Color photographs by class, with their paths in the wheels."""

Record = dict[str, Any]
Opacity = Float32[np.ndarray, "h w"]  # of each pixel, in [0, 1]
Squares = UInt8[np.ndarray, "_ _ _ 3"]  # parts of a photograph, to cut textures from


def read_photo(name: str) -> np.ndarray:
  """Returns one of `PHOTOS`, or an image by its path in a wheel, uint8 [h w 3], at its size."""
  package, _, path = PHOTOS.get(name, name).partition("/")
  # By path: skimage.data's functions import a downloader.
  file = importlib.resources.files(package).joinpath(path)
  with file.open("rb") as stream, Image.open(stream) as image:
    return np.asarray(image.convert("RGB"))


def _short_side(image: np.ndarray, size: int) -> np.ndarray:
  scale = size / min(image.shape[:2])
  size_xy = (round(image.shape[1] * scale), round(image.shape[0] * scale))
  return np.asarray(Image.fromarray(image).resize(size_xy, Image.Resampling.BICUBIC))


def _encode(image: np.ndarray, image_format: str) -> bytes:
  buffer = io.BytesIO()
  options = {"compress_level": 1} if image_format == "png" else {"quality": 95}
  Image.fromarray(image).save(buffer, image_format, **options)
  return buffer.getvalue()


def _digit_images() -> tuple[np.ndarray, np.ndarray]:
  """Returns scikit-learn's handwritten digits, uint8 [n 8 8] in 0..255, and their labels [n].

  The test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998),
  with its 17 gray levels scaled to 0..255; sorted by label, so that every fifth is stratified.
  """
  from sklearn.datasets import load_digits  # slow to import

  pixels, labels = load_digits(return_X_y=True)
  order = np.argsort(labels, kind="stable")
  images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  return images[order], np.asarray(labels)[order]


def _belongs(count: int, split: str) -> Bool[np.ndarray, " n"]:
  return (np.arange(count) % 5 == 0) == (split == "test")


def digits(split: str) -> Iterator[Record]:
  """Yields 1797 handwritten digits, 8x8 gray: 1437 for training, 360 for test."""
  images, labels = _digit_images()
  for i in np.flatnonzero(_belongs(len(labels), split)):
    yield {"image": _encode(images[i], "png"), "label": int(labels[i])}


def photos(split: str) -> Iterator[Record]:
  """Yields tiles of ten color photographs; the class is the photograph.

  Each photograph is resized to a shorter side of 512 and cut into 64x64 tiles without overlap;
  every fifth tile is in the test split.
  """
  cut = [_tiles(_short_side(read_photo(name), 512), 64) for name in PHOTOS]
  tiles = [(tile, label) for label, photo in enumerate(cut) for tile in photo]
  for i in np.flatnonzero(_belongs(len(tiles), split)):
    yield {"image": _encode(tiles[i][0], "jpeg"), "label": tiles[i][1]}


def _tiles(image: np.ndarray, side: int) -> list[np.ndarray]:
  return [
    image[top : top + side, left : left + side]
    for top in range(0, image.shape[0] - side + 1, side)
    for left in range(0, image.shape[1] - side + 1, side)
  ]


# demo:scenes

SIZE = 64
COUNTS = {"train": 4000, "test": 400}

TEXTURES = ("cat", "galaxies", "retina", "rocket", "tissue")  # distinguishable photographs
STUFF_FROM = 10
MAX_DIGITS = 4


def scenes(split: str) -> Iterator[Record]:
  """Yields synthetic detection and panoptic data, digits in front of photographic textures.

  A scene, 64x64, has two regions of texture (stuff) with a curved boundary, and one to four digits
  (things) of different sizes and colors that may overlap, with exact segments, boxes of the visible
  parts and classes. The features are those of TFDS's `coco/2017` and `coco/2017_panoptic`. 4000
  training and 400 test scenes have no digit and no texture region in common.
  """
  material, seed = read_material(split), {"train": 1, "test": 2}[split]
  first = 0 if split == "train" else COUNTS["train"]
  for number in range(COUNTS[split]):
    yield _record(draw_scene(material, np.random.default_rng((seed, number))), first + number)


class Material(NamedTuple):
  """Digits and textures of a split."""

  digits: list[np.ndarray]  # strength in [0, 1], float32 [h w], each cut to its stroke
  labels: Int[np.ndarray, " n"]  # of the digits
  squares: list[Squares]  # of each of `TEXTURES`


def read_material(split: str) -> Material:
  """Returns the digits and textures of a split."""
  images, labels = _digit_images()
  chosen = _belongs(len(labels), split)
  digits = [_cut(image, 48).astype(np.float32) / 255 for image in images[chosen]]
  return Material(digits, labels[chosen], [_squares(name, split) for name in TEXTURES])


def _cut(digit: np.ndarray, above: float | int) -> np.ndarray:
  rows, columns = np.flatnonzero(digit.max(1) > above), np.flatnonzero(digit.max(0) > above)
  return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _squares(name: str, split: str) -> Squares:
  photo, side = read_photo(name), SIZE * 3 // 2
  height, width = photo.shape[:2]
  top, left = round(height * (1 - 0.7) / 2), round(width * (1 - 0.7) / 2)
  squares = _tiles(_short_side(photo[top : height - top, left : width - left], 4 * side), side)
  return np.stack(squares)[_belongs(len(squares), split)]


class Scene(NamedTuple):
  """An image and its annotations."""

  image: UInt8[np.ndarray, "h w 3"]
  segment_map: Int[np.ndarray, "h w"]  # index of the visible segment at each pixel, from 0
  labels: tuple[int, ...]  # the segments' classes; the first two are stuff


def draw_scene(material: Material, rng: Generator) -> Scene:
  """Draws a scene: two textures, then digits from back to front, each at least 75 % visible."""
  textures = rng.choice(len(TEXTURES), 2, replace=False)
  segment_map = _regions(rng)
  backgrounds = [_texture(material.squares[t], rng) for t in textures]
  image = np.where(segment_map[..., None] == 0, *backgrounds).astype(np.float32)
  labels = [STUFF_FROM + int(t) for t in textures]
  areas = [0, 0]
  for _ in range(int(rng.integers(1, MAX_DIGITS, endpoint=True))):
    for _ in range(8):  # attempts to place it
      digit = int(rng.integers(len(material.digits)))
      stroke = _placed(material.digits[digit], rng)
      after = np.where(stroke > 0.5, len(labels), segment_map)
      visible = np.bincount(after.ravel(), minlength=len(labels) + 1)
      if all(visible[i] >= 0.75 * areas[i] for i in range(2, len(labels))):
        segment_map = after
        image = _painted(image, stroke, rng)
        labels.append(int(material.labels[digit]))
        areas.append(int(visible[-1]))
        break
  return Scene(np.round(image).astype(np.uint8), segment_map, tuple(labels))


def _regions(rng: Generator) -> Int[np.ndarray, "h w"]:
  y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
  angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-SIZE / 6, SIZE / 6)
  across = x * np.cos(angle) + y * np.sin(angle)
  along = y * np.cos(angle) - x * np.sin(angle)
  wave = rng.uniform(0, 5) * np.sin(along / rng.uniform(5, 12) + rng.uniform(0, 2 * np.pi))
  return (across > offset + wave).astype(np.int64)


def _texture(squares: Squares, rng: Generator) -> np.ndarray:
  square = squares[rng.integers(len(squares))]
  top, left = rng.integers(square.shape[0] - SIZE, size=2, endpoint=True)
  texture = square[top : top + SIZE, left : left + SIZE]
  return texture[:, ::-1] if rng.random() < 0.5 else texture


def _placed(digit: Float32[np.ndarray, "_ _"], rng: Generator) -> Opacity:
  """Enlarges a digit and places it at random."""
  height = int(rng.integers(20, 40, endpoint=True))
  width = max(6, round(height * digit.shape[1] / digit.shape[0] * rng.uniform(0.85, 1.15)))
  margin = cv2.copyMakeBorder(digit, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
  scale_x, scale_y = width / digit.shape[1], height / digit.shape[0]
  size = (width + round(2 * scale_x), height + round(2 * scale_y))
  large = cv2.resize(margin, size, interpolation=cv2.INTER_CUBIC)
  stroke = _cut(np.clip((large - 0.3) / 0.2, 0, 1), 0.5)[:SIZE, :SIZE]
  top = int(rng.integers(SIZE - stroke.shape[0], endpoint=True))
  left = int(rng.integers(SIZE - stroke.shape[1], endpoint=True))
  opacity = np.zeros((SIZE, SIZE), np.float32)
  opacity[top : top + stroke.shape[0], left : left + stroke.shape[1]] = stroke
  return opacity


def _painted(image: np.ndarray, stroke: Opacity, rng: Generator) -> Float[np.ndarray, "h w 3"]:
  pixel = np.array([[[rng.uniform(0, 360), rng.uniform(0.1, 0.75), 1.0]]], np.float32)
  color = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] * 255
  seam = 0.75 * cv2.GaussianBlur(cv2.dilate(stroke, np.ones((3, 3))), (5, 5), 1.0)
  image = image * (1 - seam[..., None])
  return image + stroke[..., None] * (color - image)


def _record(scene: Scene, number: int, stuff_from: int = STUFF_FROM) -> Record:
  ids = np.zeros((SIZE, SIZE, 3), np.uint8)
  ids[..., 0] = scene.segment_map + 1
  segments = []
  areas = np.bincount(scene.segment_map.ravel(), minlength=len(scene.labels)).tolist()
  for i, (label, area) in enumerate(zip(scene.labels, areas, strict=True)):
    if area:  # it is visible
      left, top, width, height = cv2.boundingRect((ids[..., 0] == i + 1).view(np.uint8))
      edges = (top, left, top + height, left + width)
      box = tfds.features.BBox(*(edge / SIZE for edge in edges))
      segment = {"area": area, "bbox": box, "id": i + 1, "is_crowd": False, "label": label}
      segments.append(segment)
  return {
    "image": _encode(scene.image, "jpeg"),
    "image/id": number,
    "objects": [segment for segment in segments if segment["label"] < stuff_from],
    "panoptic_image": _encode(ids, "png"),
    "panoptic_objects": segments,
  }


# demo:shapes

SHAPE_COUNTS = {"train": 10_000, "test": 1000}

SHAPES = (
  "bar", "crescent", "disk", "dumbbell", "flower", "half disk", "heart", "hourglass", "ring",
  "sector", "spark", "square", "triangle", "cross", "frame", "H", "L", "T", "U", "Z",
)  # fmt: skip

SURFACES = {
  **{name: f"skimage/data/{name}.png" for name in ("brick", "grass", "gravel")},
  **{name: name for name in TEXTURES},
}
"""Textured photographs behind the shapes, by class of stuff, with their paths in the wheels."""


@functools.cache
def silhouettes() -> tuple[Float32[np.ndarray, "_ _"], ...]:
  """Returns the opacity of each of `SHAPES`, within a disk, in [0, 1]."""
  y, x = (np.mgrid[:256, :256] + 0.5) / 128 - 1
  radius, angle, large = np.hypot(x, y), np.arctan2(y, x), np.maximum(abs(x), abs(y))
  inside = {
    "bar": (abs(x) < 0.85) & (abs(y) < 0.25),
    "crescent": (radius < 0.9) & (np.hypot(x - 0.45, y) > 0.75),
    "disk": radius < 0.85,
    "dumbbell": (np.hypot(abs(x) - 0.55, y) < 0.35) | ((abs(x) < 0.5) & (abs(y) < 0.12)),
    "flower": radius < 0.62 + 0.28 * np.cos(5 * angle),
    "half disk": (radius < 0.9) & (y > 0),
    "heart": (1.3 * x * x + (1.3 * y) ** 2 - 0.6) ** 3 < -1.9 * x * x * y**3,
    "hourglass": (abs(x) < abs(y)) & (abs(y) < 0.65),
    "ring": (radius < 0.9) & (radius > 0.5),
    "sector": (radius < 0.9) & (abs(angle) > 0.7),
    "spark": np.sqrt(abs(x)) + np.sqrt(abs(y)) < 0.97,
    "square": large < 0.62,
    "triangle": (y < 0.5) & (y > 2 * abs(x) - 0.9),
  }
  cells = (0o272, 0o757, 0o575, 0o447, 0o722, 0o557, 0o623)  # a digit for each row of 3x3 cells
  row, column = (np.clip((axis / 0.65 + 1) * 1.5, 0, 2).astype(int) for axis in (y, x))
  for name, bits in zip(SHAPES[-7:], cells, strict=True):
    inside[name] = (bits >> (8 - 3 * row - column) & 1 > 0) & (large < 0.65)
  masks = (inside[name].astype(np.float32) for name in SHAPES)
  return tuple(cv2.resize(mask, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for mask in masks)


def shapes(split: str, count: int | None = None) -> Iterator[Record]:
  """Yields scenes of textured shapes, for classification, detection and segmentation.

  A scene, 64x64, has two regions of texture (eight classes of stuff) and one to six shapes (twenty
  classes of things) of any rotation and of sides from 8 to 54 pixels, each at least 75 % visible.
  `label` is the class of the largest one, with 2.5 times the side of the others at least; other
  features are those of `scenes`. 10,000 training and 1000 test scenes, or `count`, have no
  photographic texture in common.
  """
  surfaces, seed = [_squares(path, split) for path in SURFACES.values()], {"train": 3, "test": 4}
  first = 0 if split == "train" else 10_000_000  # ids differ for any count
  for number in range(SHAPE_COUNTS[split] if count is None else count):
    scene = draw_shapes(surfaces, np.random.default_rng((seed[split], number)))
    yield {**_record(scene, first + number, len(SHAPES)), "label": scene.labels[2]}


def draw_shapes(surfaces: list[Squares], rng: Generator) -> Scene:
  """Draws a scene: two textures, the largest shape, then others in front of it."""
  opacities, textures = silhouettes(), rng.choice(len(surfaces), 2, replace=False)
  segment_map = _regions(rng)
  first, second = (np.float32(rng.uniform(0.5, 1)) * _texture(surfaces[t], rng) for t in textures)
  image = np.where(segment_map[..., None] == 0, first, second)
  labels, areas = [len(opacities) + int(t) for t in textures], [0, 0]
  largest = rng.uniform(30, 54)
  others = np.geomspace(8, largest / 2.5, 100)[rng.integers(100, size=rng.integers(6))]
  for side in (round(largest), *(round(s) for s in sorted(others, reverse=True))):
    for _ in range(8):  # attempts to place it
      label = int(rng.integers(len(opacities)))
      turned, (top, left) = _turned(opacities[label], side, rng), rng.integers(SIZE - side, size=2)
      window, after = np.s_[top : top + side, left : left + side], segment_map.copy()
      after[window][turned > 0.5] = len(labels)
      visible = np.bincount(after.ravel(), minlength=len(labels) + 1)
      if visible[-1] and all(visible[2:-1] >= 0.75 * np.array(areas[2:])):
        segment_map, image[window] = after, _colored(image[window], turned, rng)
        labels.append(label)
        areas.append(int(visible[-1]))
        break
  return Scene(np.round(image).astype(np.uint8), segment_map, tuple(labels))


def _turned(opacity: np.ndarray, side: int, rng: Generator) -> np.ndarray:
  """Returns a silhouette [side side], turned by a random angle."""
  small, middle = cv2.resize(opacity, (side, side), interpolation=cv2.INTER_AREA), (side - 1) / 2
  turn = cv2.getRotationMatrix2D((middle, middle), rng.uniform(0, 360), 1)
  return cv2.warpAffine(small, turn, (side, side), flags=cv2.INTER_LINEAR)


def _colored(image: np.ndarray, opacity: np.ndarray, rng: Generator) -> np.ndarray:
  """Draws a silhouette [s s] on an image [s s 3]: bright or dark, with a pattern and an outline."""
  color = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.9), 1), np.float32)
  is_bright, side, patterns = rng.random() < 0.5, len(image), _patterns()
  pattern = patterns[rng.integers(len(patterns)), :side, :side, None]
  fill = (color if is_bright else np.float32(0.35) * color) * pattern
  seam = 0.8 * cv2.dilate(opacity, np.ones((3, 3)))[..., None]
  image = image * (1 - seam) + seam * (0 if is_bright else 255)
  return image + opacity[..., None] * (fill - image)


@functools.cache
def _patterns() -> Float32[np.ndarray, "n _ _"]:
  """Returns the brightness of plain, striped and checked squares, 40 of each."""
  (y, x), patterns, rng = np.mgrid[:SIZE, :SIZE], [], np.random.default_rng(5)
  for kind in np.repeat(range(3), 40):
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 9)  # in pixels
    turned = (x + 1j * y) * np.exp(1j * angle) * 2 * np.pi / period
    waves = np.sin(turned.real) * (np.sin(turned.imag) if kind == 2 else 1)
    patterns.append(1 - 0.4 * ((waves > 0) & (kind > 0)))
  return np.stack(patterns).astype(np.float32)


# demo:stereo

SHIFT = 34
"""Columns by which the right image is shifted to the right. Disparities are 8 to 60 columns, and at
most 26 after the shift."""

STRIP = slice(232, 328)  # rows of the test split
MARGIN = 28  # columns on either side of a test image that its reference also covers

TEST_WIDTH, WINDOW = 112, (160, 256)
"""Width of test images; height and width of training images, which are cropped at random."""

Pair = tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]  # an image and its reference


def stereo(split: str) -> Iterator[Record]:
  """Yields super-resolution of one image of a stereo pair with the other as reference.

  The pair is scikit-image's motorcycle, from the Middlebury stereo data of 2014 (Scharstein et al.,
  "High-resolution stereo datasets with subpixel-accurate ground truth"): the left image is
  enlarged, the right one is the reference. A strip of both is the test split: six images of 96x112.
  The training split has windows outside of it, and photographs with a simulated second view.
  """
  for image, reference in _test_pairs() if split == "test" else _train_pairs():
    yield {"image": _encode(image, "png"), "reference": _encode(reference, "png")}


def read_stereo() -> Pair:
  """Returns the left and the right image, [500 707 3], shifted by `SHIFT`."""
  left, right = read_photo("motorcycle"), read_photo("skimage/data/motorcycle_right.png")
  return left[:, SHIFT:], right[:, :-SHIFT]


def _test_pairs() -> Iterator[Pair]:
  left, right = read_stereo()
  width, whole = left.shape[1], TEST_WIDTH + 2 * MARGIN
  for start in range((width % TEST_WIDTH) // 2, width - TEST_WIDTH + 1, TEST_WIDTH):
    other = min(max(start - MARGIN, 0), width - whole)
    yield left[STRIP, start : start + TEST_WIDTH], right[STRIP, other : other + whole]


def _train_pairs() -> Iterator[Pair]:
  left, right = read_stereo()
  for rows in (slice(None, STRIP.start), slice(STRIP.stop, None)):
    for window in _windows(left[rows], (72, 64)):
      yield left[rows][window], right[rows][window]
  rng = np.random.default_rng(0)
  for name in ("astronaut", "cat", "coffee", "flower", "rocket", "temple"):
    image = _short_side(read_photo(name), 320)
    for window in _windows(image, WINDOW):
      yield image[window], _second_view(image, rng)[window]


def _second_view(image: np.ndarray, rng: Generator) -> np.ndarray:
  """Returns the image with a random horizontal shift, as large as the pair's, and scale."""
  size = (image.shape[1], image.shape[0])
  middle = (size[0] / 2, size[1] / 2)
  motion = cv2.getRotationMatrix2D(middle, rng.uniform(-1, 1), rng.uniform(0.97, 1.03))
  motion[:, 2] += rng.uniform(-20, 20), rng.uniform(-2, 2)
  options = dict(flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
  moved = cv2.warpAffine(image, motion, size, **options)
  return np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)


def _windows(image: np.ndarray, step: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
  last = image.shape[0] - WINDOW[0], image.shape[1] - WINDOW[1]
  for top in [*range(0, last[0], step[0]), last[0]]:
    for left in [*range(0, last[1], step[1]), last[1]]:
      yield slice(top, top + WINDOW[0]), slice(left, left + WINDOW[1])


class Demo(NamedTuple):
  """Records of a split, and their features."""

  records: Callable[[str], Iterator[Record]]
  features: Record
  shuffle: bool = True


def _image(side: int | None, channels: int, encoding: str) -> tfds.features.Image:
  return tfds.features.Image(shape=(side, side, channels), encoding_format=encoding)


def _label(names: Iterable[str]) -> tfds.features.ClassLabel:
  return tfds.features.ClassLabel(names=tuple(names))


def _objects(names: Iterable[str]) -> tfds.features.Sequence:
  box = {"area": np.int64, "bbox": tfds.features.BBoxFeature(), "id": np.int64}
  return tfds.features.Sequence({**box, "is_crowd": np.bool_, "label": _label(names)})


def _scene_features(things: Iterable[str], stuff: Iterable[str]) -> Record:
  return {
    "image": _image(SIZE, 3, "jpeg"),
    "image/id": np.int64,
    "objects": _objects(things),
    "panoptic_image": _image(SIZE, 3, "png"),
    "panoptic_objects": _objects((*things, *stuff)),
  }


DEMOS = {
  "digits": Demo(digits, {"image": _image(8, 1, "png"), "label": _label("0123456789")}),
  "photos": Demo(photos, {"image": _image(64, 3, "jpeg"), "label": _label(PHOTOS)}),
  "scenes": Demo(scenes, _scene_features("0123456789", TEXTURES)),
  "shapes": Demo(shapes, {**_scene_features(SHAPES, SURFACES), "label": _label(SHAPES)}),
  "stereo": Demo(stereo, dict.fromkeys(("image", "reference"), _image(None, 3, "png")), False),
}


def open_splits(location: str, *, label_key: str | None = None, panoptic: bool = False) -> Splits:
  """Opens a demo by its name; prepares it at its first use.

  With `panoptic`, scenes and shapes have things and stuff with their segments; with
  `label_key="label"`, shapes have one label an image. ValueError for an unknown demo, or one
  without these; OSError if the cache folder cannot be written.
  """
  check_names("demo", [location], DEMOS)
  folder = cache_dir() / "demos" / location / "1.0.0"
  if not folder.is_dir():
    logging.info("preparing demo:%s in %s, at its first use", location, folder)
    _prepare(location, folder)
  return tfds_source.open_folder(folder, f"demo:{location}", (None, label_key), panoptic=panoptic)


def _prepare(name: str, folder: pathlib.Path) -> None:
  """Writes to a temporary folder and renames it; of several processes, the first is used."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=folder.parent, prefix=".preparing-")
  except OSError as error:
    text = f"cache folder {cache_dir()} cannot be written ({error.strerror})"
    raise OSError(f"{text}; set VIT_JAX_ZOO_CACHE to another folder") from error
  demo = DEMOS[name]
  splits = {split: demo.records(split) for split in ("train", "test")}
  try:
    written = tfds_source.write_dataset(name, demo.features, splits, scratch, shuffle=demo.shuffle)
    os.rename(written, folder)
  except OSError:
    if not folder.is_dir():
      raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
