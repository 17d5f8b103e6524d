"""From a picture and its reference to what `tasks.super_resolution` learns from.

Pictures are made smaller and larger four times by Pillow's bicubic filter (a = -0.5, blurred where
they shrink, rounded to whole levels each time), exactly as TTSR's published data code makes them;
that is neither MATLAB's filter, which other papers use, nor PyTorch's inside the network.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax_zoo.data.images import Pixels
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example
from vit_jax_zoo.data.transforms.base import Transform, pixels

SCALE = 4
"""Times that sides grow."""

Resized: TypeAlias = UInt8[np.ndarray, "H W 3"]
"""`Pixels` of other sides than those that came in."""

TARGETS = ("low_res_image", "upsampled_image", "image")
REFERENCES = ("ref_image", "blurred_ref_image")


@dataclasses.dataclass(frozen=True)
class SuperResolutionPair(Transform):
  """Makes all five pictures, uint8 [h w 3], from `image` and `reference`.

  `image` is cropped to multiples of 4, from the upper left. `low_res_image` is it, four times
  smaller; `upsampled_image` that, enlarged again. `ref_image` is the reference, and
  `blurred_ref_image` the same made smaller and larger again; `reference` is consumed.

  Attributes:
    reference_side: None: the reference is cropped to multiples of 4, as in the published test; or
      the side of a square in whose upper left corner it is laid, black around it, as in the
      published training (160), where it is not cropped but its blurred form is made at a quarter
      of its sides, rounded down.
    stitch_side: where an example has several references, each is laid in a black square of this
      side, and the squares stand below each other. The authors' is 500: issue 3 of
      researchmm/TTSR.
  """

  name = "super_resolution_pair"

  reference_side: int | None = None
  stitch_side: int = 500

  def __post_init__(self) -> None:
    for field in ("reference_side", "stitch_side"):
      side = getattr(self, field)
      if side is not None and (side < SCALE or side % SCALE):
        raise ValueError(f"{field} is {side}; expected a positive multiple of {SCALE}")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with the five pictures."""
    del rng
    if "reference" not in example:
      raise ValueError("the example has no 'reference'; use a source that has, such as pairs:/path")
    image = crop_to_multiple(pixels(example["image"]), "the picture")
    low_res = shrink(image)
    reference = self._reference(example["reference"], low_res)
    blurred = enlarge(shrink(reference), reference.shape[:2])
    if self.reference_side is not None:
      reference, blurred = (
        lay_in_square(x, self.reference_side, "reference_side") for x in (reference, blurred)
      )
    others = {key: value for key, value in example.items() if key != "reference"}
    return others | {
      "image": image,
      "low_res_image": low_res,
      "upsampled_image": enlarge(low_res, image.shape[:2]),
      "ref_image": reference,
      "blurred_ref_image": blurred,
    }

  def _reference(self, given: Any, low_res: Pixels) -> Resized:
    """Returns the reference's pixels."""
    if given is None:
      given = low_res
    try:
      if isinstance(given, tuple | list):
        given = stitch([pixels(one) for one in given], self.stitch_side)
      reference = pixels(given)
    except CorruptExampleError as error:
      raise CorruptExampleError(f"its reference: {error}") from error
    if min(reference.shape[:2]) < SCALE:
      raise ValueError(f"the reference is {_sides(reference)}; expected at least {SCALE}x{SCALE}")
    return reference if self.reference_side else crop_to_multiple(reference, "the reference")


@dataclasses.dataclass(frozen=True)
class RandomPairCrop(Transform):
  """Crops `image` at random, and `reference` around the same place.

  The reference's crop has the same middle, as a share of the sides, and is larger by a margin; it
  is moved so that it lies inside. Where the reference itself is smaller, black is added below and
  at the right, as in the published training: all crops of one configuration have the same sides.

  Attributes:
    size: height and width, or the side, of the picture's crop; multiples of 4.
    margin: pixels above and below, and left and right, or on all sides, by which the reference's
      crop is larger; multiples of 2.
  """

  name = "random_pair_crop"

  size: int | Sequence[int]
  margin: int | Sequence[int] = 0

  def __post_init__(self) -> None:
    if any(side < SCALE or side % SCALE for side in _pair(self.size)):
      raise ValueError(f"size is {self.size}; expected positive multiples of {SCALE}")
    if any(margin < 0 or margin % 2 for margin in _pair(self.margin)):
      raise ValueError(f"margin is {self.margin}; expected multiples of 2, at least 0")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with both crops."""
    image, reference = (pixels(example[key]) for key in ("image", "reference"))
    size = _pair(self.size)
    wanted = (size[0] + 2 * _pair(self.margin)[0], size[1] + 2 * _pair(self.margin)[1])
    corner = [int(rng.integers(_room(image, size, axis), endpoint=True)) for axis in (0, 1)]
    other = []
    for axis in (0, 1):
      middle = (corner[axis] + size[axis] / 2) * reference.shape[axis] / image.shape[axis]
      room = max(reference.shape[axis] - wanted[axis], 0)
      other.append(min(max(round(middle - wanted[axis] / 2), 0), room))
    return {
      **example,
      "image": _crop(image, corner, size),
      "reference": _pad(_crop(reference, other, wanted), wanted, "margin"),
    }


@dataclasses.dataclass(frozen=True)
class RandomPairTurn(Transform):
  """Mirrors and turns the five pictures of `super_resolution_pair`, the official augmentation.

  Left and right are swapped or not, top and bottom are swapped or not, and there are none to three
  quarter turns, all with the same probability; for the picture in all its sizes, and independently
  for the reference.

  Attributes:
    rotate: whether there are turns; those of pictures that are not square change their shapes.
    together: the reference is treated like the picture.
  """

  name = "random_pair_turn"

  rotate: bool = True
  together: bool = False

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with the pictures turned."""
    groups = [TARGETS + REFERENCES] if self.together else [TARGETS, REFERENCES]
    turned = dict(example)
    for group in groups:
      mirror, flip = rng.integers(2, size=2)
      turns = int(rng.integers(4)) if self.rotate else 0
      for key in group:
        image = example[key]
        if self.rotate and image.shape[0] != image.shape[1]:
          raise ValueError(f"{key} is {_sides(image)}; quarter turns need squares: rotate=False")
        image = image[:: -1 if flip else 1, :: -1 if mirror else 1]
        turned[key] = np.ascontiguousarray(np.rot90(image, turns))
    return turned


@dataclasses.dataclass(frozen=True)
class PadPair(Transform):
  """Brings the pictures of `super_resolution_pair` to one size, so that they can share a batch.

  Black is added at the right and below; `size`, int32 [2], is what counts of `image`. Near the
  edges that are padded results differ a little from those of the pictures alone, so published
  scores are measured without, one picture in each batch.

  Attributes:
    size: height and width, or the side, of `image` afterwards; multiples of 4.
    reference_size: the same of the reference.
  """

  name = "pad_pair"

  size: int | Sequence[int]
  reference_size: int | Sequence[int]

  def __post_init__(self) -> None:
    for field in ("size", "reference_size"):
      if any(side < SCALE or side % SCALE for side in _pair(getattr(self, field))):
        raise ValueError(f"{field} is {getattr(self, field)}; expected multiples of {SCALE}")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with padded pictures, and `size`."""
    del rng
    large, reference = _pair(self.size), _pair(self.reference_size)
    small = (large[0] // SCALE, large[1] // SCALE)
    sizes = dict.fromkeys(("image", "upsampled_image"), large)
    sizes |= {"low_res_image": small} | dict.fromkeys(REFERENCES, reference)
    counted = np.array(example["image"].shape[:2], np.int32)
    return {**example, **{k: _pad(example[k], sizes[k], k) for k in sizes}, "size": counted}


def shrink(image: Pixels) -> Resized:
  """Returns the picture with a quarter of its sides, rounded down."""
  return _resize(image, image.shape[0] // SCALE, image.shape[1] // SCALE)


def enlarge(image: Pixels, size: Sequence[int]) -> Resized:
  """Returns the picture with height and width `size`."""
  return _resize(image, *size)


def _resize(image: Pixels, height: int, width: int) -> Resized:
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def crop_to_multiple(image: Pixels, what: str = "the picture") -> Resized:
  """Crops a picture to multiples of 4, from the upper left.

  Raises:
    ValueError: nothing would be left.
  """
  height, width = (side // SCALE * SCALE for side in image.shape[:2])
  if not height or not width:
    raise ValueError(f"{what} is {_sides(image)}; expected at least {SCALE}x{SCALE} pixels")
  return image[:height, :width]


def stitch(images: Sequence[Any], side: int) -> Resized:
  """Lays pictures, uint8 [h w 3] of any sides, in black squares, one below the other.

  Raises:
    ValueError: one of them is larger.
  """
  return np.concatenate([lay_in_square(image, side, "stitch_side") for image in images])


def lay_in_square(image: Pixels, side: int, field: str) -> Resized:
  """Lays a picture in the upper left corner of a black square; `field` is what sets the side."""
  return _pad(image, (side, side), field)


def _pad(image: Pixels, size: tuple[int, int], what: str) -> Resized:
  height, width = size
  if image.shape[0] > height or image.shape[1] > width:
    raise ValueError(
      f"a picture of {_sides(image)} does not fit in {height}x{width} ({what}); crop it or set more"
    )
  padded = np.zeros((height, width, 3), image.dtype)
  padded[: image.shape[0], : image.shape[1]] = image
  return padded


def _room(image: Pixels, size: Sequence[int], axis: int) -> int:
  """Returns how far a crop may be from the upper or left edge."""
  room = image.shape[axis] - size[axis]
  if room < 0:
    raise ValueError(
      f"a picture of {_sides(image)} has no crop of {size[0]}x{size[1]}; set a smaller size"
    )
  return room


def _crop(image: Pixels, corner: Sequence[int], size: Sequence[int]) -> Resized:
  top, left = corner
  return image[top : top + size[0], left : left + size[1]]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
  return (value, value) if isinstance(value, int) else (value[0], value[1])


def _sides(image: Pixels) -> str:
  return f"{image.shape[0]}x{image.shape[1]}"
