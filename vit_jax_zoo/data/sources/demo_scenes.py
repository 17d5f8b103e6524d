"""`demo:scenes`: synthetic detection and panoptic data, digits in front of photographic textures.

A scene has two regions of texture (stuff) with a curved boundary, and one to four digits (things)
of different sizes and colors that may overlap, with exact segments, boxes of the visible parts and
classes. The features are those of TFDS's `coco/2017` and `coco/2017_panoptic`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Float32, Int, UInt8

from vit_jax_zoo.data.sources import demo as demo_base

SIZE = 64
COUNTS = {"train": 4000, "test": 400}
SEEDS = {"train": 1, "test": 2}

TEXTURES = ("cat", "galaxies", "retina", "rocket", "tissue")
"""Photographs with distinguishable textures."""
MIDDLE = 0.7
"""Central fraction of a photograph that is used."""
STUFF_FROM = 10
CLASS_NAMES = (*"0123456789", *TEXTURES)

MAX_DIGITS = 4
HEIGHTS = (20, 40)
LEAST_VISIBLE = 0.75
"""Smallest visible fraction of a digit."""


class Scenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """4000 training and 400 test scenes of 64x64; the splits share no digit and no texture region."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
        "image/id": np.int64,
        "objects": _objects(CLASS_NAMES[:STUFF_FROM]),
        "panoptic_image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
        "panoptic_objects": _objects(CLASS_NAMES),
      }
    )
    return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager
    return {split: self._generate_examples(split) for split in COUNTS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    material = Material.of(split)
    first = 0 if split == "train" else COUNTS["train"]
    for number in range(COUNTS[split]):
      scene = draw_scene(material, np.random.default_rng((SEEDS[split], number)))
      yield number, _record(scene, first + number)


@dataclasses.dataclass(frozen=True)
class Material:
  """Digits and textures of a split.

  Attributes:
    digits: strength of the stroke in [0, 1], float32 [h w], each cut to its stroke.
    labels: which digit each of them is.
    places: for each of `TEXTURES`, the square places that textures are cut from, uint8
      [p side side 3].
  """

  digits: tuple[np.ndarray, ...]
  labels: Int[np.ndarray, " n"]
  places: tuple[np.ndarray, ...]

  @classmethod
  def of(cls, split: str) -> "Material":
    """Returns a split's material; one in five digits and places belongs to the test split."""
    images, labels = demo_base.digit_images()
    order = np.argsort(labels, kind="stable")
    mine = order[_belongs(len(order), split)]
    digits = tuple(_cut(images[i]).astype(np.float32) / 255 for i in mine)
    return cls(digits, labels[mine], tuple(_places(name, split) for name in TEXTURES))


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image and its annotations.

  Attributes:
    image: RGB.
    segment_map: index of the visible segment at each pixel, from 0.
    labels: the segments' classes; the first ones are stuff.
  """

  image: UInt8[np.ndarray, "h w 3"]
  segment_map: Int[np.ndarray, "h w"]
  labels: tuple[int, ...]


def draw_scene(material: Material, rng: np.random.Generator) -> Scene:
  """Draws a scene: two textures, then digits from back to front."""
  textures = rng.choice(len(TEXTURES), 2, replace=False)
  segment_map = _regions(rng).astype(np.int64)
  backgrounds = np.stack([_texture(material.places[t], rng) for t in textures])
  image = np.where(segment_map[..., None] == 0, backgrounds[0], backgrounds[1]).astype(np.float32)
  labels = [STUFF_FROM + int(t) for t in textures]
  areas = [0, 0]
  for _ in range(int(rng.integers(1, MAX_DIGITS, endpoint=True))):
    for _ in range(8):  # attempts to find it a place
      digit = int(rng.integers(len(material.digits)))
      stroke = _placed(material.digits[digit], rng)
      after = np.where(stroke > 0.5, len(labels), segment_map)
      seen = np.bincount(after.ravel(), minlength=len(labels) + 1)
      if all(seen[i] >= LEAST_VISIBLE * areas[i] for i in range(2, len(labels))):
        segment_map = after
        image = _painted(image, stroke, rng)
        labels.append(int(material.labels[digit]))
        areas.append(int(seen[-1]))
        break
  return Scene(np.round(image).astype(np.uint8), segment_map, tuple(labels))


def _regions(rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
  """Returns the pixels on one side of a wavy line through the image."""
  y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
  angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-SIZE / 6, SIZE / 6)
  across = x * np.cos(angle) + y * np.sin(angle)
  along = y * np.cos(angle) - x * np.sin(angle)
  wave = rng.uniform(0, 5) * np.sin(along / rng.uniform(5, 12) + rng.uniform(0, 2 * np.pi))
  return across > offset + wave


def _texture(places: UInt8[np.ndarray, "p _ _ 3"], rng: np.random.Generator) -> np.ndarray:
  """Crops a random place at random, and mirrors it with probability 0.5."""
  place = places[rng.integers(len(places))]
  top, left = rng.integers(place.shape[0] - SIZE, size=2, endpoint=True)
  texture = place[top : top + SIZE, left : left + SIZE]
  return texture[:, ::-1] if rng.random() < 0.5 else texture


def _placed(
  digit: Float32[np.ndarray, "_ _"], rng: np.random.Generator
) -> Float32[np.ndarray, "h w"]:
  """Enlarges a digit, places it at random and returns the opacity of each pixel, in [0, 1]."""
  height = int(rng.integers(HEIGHTS[0], HEIGHTS[1], endpoint=True))
  width = max(6, round(height * digit.shape[1] / digit.shape[0] * rng.uniform(0.85, 1.15)))
  margin = cv2.copyMakeBorder(digit, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
  scale_x, scale_y = width / digit.shape[1], height / digit.shape[0]
  size = (width + round(2 * scale_x), height + round(2 * scale_y))
  large = cv2.resize(margin, size, interpolation=cv2.INTER_CUBIC)
  stroke = np.clip((large - 0.3) / 0.2, 0, 1)
  rows, columns = np.flatnonzero(stroke.max(axis=1) > 0.5), np.flatnonzero(stroke.max(0) > 0.5)
  stroke = stroke[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:SIZE, :SIZE]
  top = int(rng.integers(SIZE - stroke.shape[0], endpoint=True))
  left = int(rng.integers(SIZE - stroke.shape[1], endpoint=True))
  whole = np.zeros((SIZE, SIZE), np.float32)
  whole[top : top + stroke.shape[0], left : left + stroke.shape[1]] = stroke
  return whole


def _painted(
  image: Float[np.ndarray, "h w 3"],
  stroke: Float32[np.ndarray, "h w"],
  rng: np.random.Generator,
) -> Float[np.ndarray, "h w 3"]:
  """Draws a stroke of a bright color with a dark outline over the image."""
  hue, saturation = rng.uniform(0, 360), rng.uniform(0.1, 0.75)
  pixel = np.array([[[hue, saturation, 1.0]]], np.float32)
  color = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] * 255
  seam = 0.75 * cv2.GaussianBlur(cv2.dilate(stroke, np.ones((3, 3))), (5, 5), 1.0)
  image = image * (1 - seam[..., None])
  return image + stroke[..., None] * (color - image)


def _belongs(count: int, split: str) -> Bool[np.ndarray, " n"]:
  """Returns which of `count` items belong to a split."""
  test = np.arange(count) % demo_base.TEST_EVERY == 0
  return test if split == "test" else ~test


def _places(name: str, split: str) -> UInt8[np.ndarray, "p _ _ 3"]:
  """Cuts the center of a photograph into squares of 1.5 times a scene's side."""
  photo, side = demo_base.read_photo(name), SIZE * 3 // 2
  height, width = photo.shape[:2]
  top, left = round(height * (1 - MIDDLE) / 2), round(width * (1 - MIDDLE) / 2)
  photo = demo_base.short_side(photo[top : height - top, left : width - left], 4 * side)
  places = [
    photo[y : y + side, x : x + side]
    for y in range(0, photo.shape[0] - side + 1, side)
    for x in range(0, photo.shape[1] - side + 1, side)
  ]
  return np.stack(places)[_belongs(len(places), split)]


def _cut(digit: UInt8[np.ndarray, "8 8"]) -> UInt8[np.ndarray, "_ _"]:
  """Returns a digit without the empty rows and columns around it."""
  rows, columns = np.flatnonzero(digit.max(axis=1) > 48), np.flatnonzero(digit.max(axis=0) > 48)
  return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _objects(names: tuple[str, ...]) -> tfds.features.Sequence:
  return tfds.features.Sequence(
    {
      "area": np.int64,
      "bbox": tfds.features.BBoxFeature(),
      "id": np.int64,
      "is_crowd": np.bool_,
      "label": tfds.features.ClassLabel(names=names),
    }
  )


def _record(scene: Scene, number: int) -> dict[str, Any]:
  """Returns a scene's TFDS record; ids start at 1, as 0 is COCO's "no segment"."""
  ids = np.zeros((SIZE, SIZE, 3), np.uint8)
  ids[..., 0] = scene.segment_map + 1
  segments = [_segment(scene, i) for i in range(len(scene.labels))]
  things = [segment for segment in segments if segment and segment["label"] < STUFF_FROM]
  return {
    "image": demo_base.encode(scene.image, "jpeg"),
    "image/id": number,
    "objects": things,
    "panoptic_image": demo_base.encode(ids, "png"),
    "panoptic_objects": [segment for segment in segments if segment],
  }


def _segment(scene: Scene, number: int) -> dict[str, Any] | None:
  """Returns a segment's record; None if it is invisible."""
  rows, columns = np.nonzero(scene.segment_map == number)
  if not len(rows):
    return None
  edges = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
  return {
    "area": len(rows),
    "bbox": tfds.features.BBox(*(float(edge) / SIZE for edge in edges)),
    "id": number + 1,
    "is_crowd": False,
    "label": scene.labels[number],
  }
