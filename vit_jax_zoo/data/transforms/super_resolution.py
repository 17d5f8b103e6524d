"""Transforms of image and reference pairs for TTSR.

Images are reduced and enlarged by 4 with Pillow's bicubic filter (a = -0.5, antialiased, rounded to
uint8), as in TTSR's data code; MATLAB's filter, which other papers use, and PyTorch's inside of the
network differ. Sizes in fields are (height, width), or the side of a square, in pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax_zoo.data.images import Pixels
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example
from vit_jax_zoo.data.transforms import Transform, pixels
from vit_jax_zoo.data.transforms.image import Size, height_width

SCALE = 4  # ratio of the sides of output and input
Resized: TypeAlias = UInt8[np.ndarray, "H W 3"]  # `Pixels` of another size than the argument

TARGETS = ("low_res_image", "upsampled_image", "image")
REFERENCES = ("ref_image", "blurred_ref_image")


@dataclasses.dataclass(frozen=True)
class SuperResolutionPair(Transform):
  """Creates the five images of the task, uint8 [h w 3], from `image` and `reference`.

  `image` is cropped to multiples of 4 from the upper left; `low_res_image` is its reduction by 4,
  `upsampled_image` the enlargement of that. `ref_image` is the reference, `blurred_ref_image` its
  reduction, enlarged again. Removes `reference`.
  """

  # None: crops the reference to multiples of 4, as in the published test; a number: pads it with
  # black to a square of this side, as in the published training (160).
  reference_side: int | None = None
  # Side of the black squares to which several references are padded before they are stacked
  # vertically; the authors use 500 (issue 3 of researchmm/TTSR).
  stitch_side: int = 500

  def __post_init__(self) -> None:
    ok = self.reference_side is None or _are_multiples(self.reference_side)
    self.check("reference_side", ok, f"a positive multiple of {SCALE}")
    self.check("stitch_side", _are_multiples(self.stitch_side), f"a positive multiple of {SCALE}")

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    if "reference" not in example:
      raise ValueError("reference: missing; use a source with references, such as pairs:/path")
    image = crop_to_multiple(pixels(example["image"]), "the image")
    low_res = shrink(image)
    reference = self._reference(example["reference"], low_res)
    blurred = enlarge(shrink(reference), reference.shape[:2])
    if self.reference_side is not None:
      size = (self.reference_side, self.reference_side)
      reference, blurred = (_pad(x, size, "reference_side") for x in (reference, blurred))
    others = {key: value for key, value in example.items() if key != "reference"}
    return others | {
      "image": image,
      "low_res_image": low_res,
      "upsampled_image": enlarge(low_res, image.shape[:2]),
      "ref_image": reference,
      "blurred_ref_image": blurred,
    }

  def _reference(self, given: Any, low_res: Pixels) -> Resized:
    if given is None:
      given = low_res
    try:
      if isinstance(given, tuple | list):
        size = (self.stitch_side, self.stitch_side)
        given = np.concatenate([_pad(pixels(one), size, "stitch_side") for one in given])
      reference = pixels(given)
    except CorruptExampleError as error:
      raise CorruptExampleError(f"its reference: {error}") from error
    if min(reference.shape[:2]) < SCALE:
      raise ValueError(f"reference: {_sides(reference)} pixels; expected at least {SCALE}x{SCALE}")
    return reference if self.reference_side else crop_to_multiple(reference, "the reference")


@dataclasses.dataclass(frozen=True)
class RandomPairCrop(Transform):
  """Crops `image` at random, and `reference` around the same relative position.

  The reference's crop is larger by a margin and shifted into the image. A smaller reference is
  padded with black at the right and bottom, so that all crops have the same size.
  """

  size: Size  # of the image's crop; multiples of 4
  margin: Size = 0  # of the reference's crop on each side; multiples of 2

  def __post_init__(self) -> None:
    self.check("size", _are_multiples(self.size), f"positive multiples of {SCALE}")
    ok = all(margin >= 0 and margin % 2 == 0 for margin in height_width(self.margin))
    self.check("margin", ok, "multiples of 2, at least 0")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    image, reference = (pixels(example[key]) for key in ("image", "reference"))
    size, margin = height_width(self.size), height_width(self.margin)
    if image.shape[0] < size[0] or image.shape[1] < size[1]:
      found = f"{size[0]}x{size[1]} is larger than an image of {_sides(image)}"
      raise ValueError(f"size: {found}; set a smaller one")
    window = (size[0] + 2 * margin[0], size[1] + 2 * margin[1])
    crops = []  # by axis: of the image, and of the reference
    for axis in (0, 1):
      start = int(rng.integers(image.shape[axis] - size[axis], endpoint=True))
      middle = (start + size[axis] / 2) * reference.shape[axis] / image.shape[axis]
      room = max(reference.shape[axis] - window[axis], 0)
      other = min(max(round(middle - window[axis] / 2), 0), room)
      crops.append((slice(start, start + size[axis]), slice(other, other + window[axis])))
    own, others = zip(*crops, strict=True)
    return {**example, "image": image[own], "reference": _pad(reference[others], window, "margin")}


@dataclasses.dataclass(frozen=True)
class RandomPairTurn(Transform):
  """Random flips and quarter turns of `image` and the other four, the official augmentation.

  Horizontal flip, vertical flip and number of quarter turns are uniform, equal for all sizes of the
  image, and independent for the reference.
  """

  rotate: bool = True  # also applies quarter turns, which need square images
  together: bool = False  # applies the same to the reference

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    turned = dict(example)
    for group in [TARGETS + REFERENCES] if self.together else [TARGETS, REFERENCES]:
      mirror, flip = rng.integers(2, size=2)
      turns = int(rng.integers(4)) if self.rotate else 0
      for key in group:
        image = example[key]
        if self.rotate and image.shape[0] != image.shape[1]:
          raise ValueError(f"{key}: {_sides(image)} pixels; expected a square. Set rotate=False")
        image = image[:: -1 if flip else 1, :: -1 if mirror else 1]
        turned[key] = np.ascontiguousarray(np.rot90(image, turns))
    return turned


@dataclasses.dataclass(frozen=True)
class PadPair(Transform):
  """Pads the five images with black at the right and bottom to common sizes, for batching.

  Adds `size`, int32 [2], the unpadded size of `image`. Outputs near padded edges differ slightly;
  published scores are measured without padding, one image per batch.
  """

  size: Size  # of the padded `image`; multiples of 4
  reference_size: Size  # of the padded reference; multiples of 4

  def __post_init__(self) -> None:
    for field in ("size", "reference_size"):
      self.check(field, _are_multiples(getattr(self, field)), f"multiples of {SCALE}")

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    large, reference = height_width(self.size), height_width(self.reference_size)
    sizes = dict.fromkeys(("image", "upsampled_image"), large)
    sizes["low_res_image"] = (large[0] // SCALE, large[1] // SCALE)
    sizes |= dict.fromkeys(REFERENCES, reference)
    unpadded = np.array(example["image"].shape[:2], np.int32)
    return {**example, **{k: _pad(example[k], sizes[k], k) for k in sizes}, "size": unpadded}


def shrink(image: Pixels) -> Resized:
  """Returns the image reduced by 4, sides rounded down."""
  return enlarge(image, [side // SCALE for side in image.shape[:2]])


def enlarge(image: Pixels, size: Sequence[int]) -> Resized:
  """Returns the image resized to height and width `size`."""
  height, width = size
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def crop_to_multiple(image: Pixels, what: str) -> Resized:
  """Crops `what`, at least 4x4 (or ValueError), to multiples of 4, from the upper left."""
  height, width = (side // SCALE * SCALE for side in image.shape[:2])
  if not height or not width:
    raise ValueError(f"{what}: {_sides(image)} pixels; expected at least {SCALE}x{SCALE}")
  return image[:height, :width]


def _pad(image: Pixels, size: tuple[int, int], what: str) -> Resized:
  height, width = size
  if image.shape[0] > height or image.shape[1] > width:
    found = f"{height}x{width} is smaller than an image of {_sides(image)}"
    raise ValueError(f"{what}: {found}; increase it or crop")
  return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)))


def _are_multiples(size: Size) -> bool:
  return all(side >= SCALE and side % SCALE == 0 for side in height_width(size))


def _sides(image: Pixels) -> str:
  return f"{image.shape[0]}x{image.shape[1]}"
