"""Preprocessing of images for pretrained models: resize, crop or padding, mean and std."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped, UInt8
from PIL import Image

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.data.images import METHODS, bounded_size, tf_resize
from vit_jax_zoo.data.images import resize as cv2_resize
from vit_jax_zoo.errors import check_names

_NAMES = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
PILLOW_FILTERS = {name: Image.Resampling[name.upper()] for name in _NAMES}
"""Pillow's filters, antialiased and rounded to uint8, by timm's names."""

INTERPOLATIONS = (*(f"tf_{name}" for name in METHODS), "opencv", *PILLOW_FILTERS)
"""TensorFlow's (`data.images.tf_resize`), `data.images.resize`, and Pillow's."""
FITS = ("squash", "crop", "shorter_side", "inside", "none")
ROUNDINGS = ("side", "ratio", "floor", "nearest")


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resizes, crops or pads images, then normalises them.

  `fit`: "squash" resizes to `image_size`; "crop" keeps the aspect ratio, covers `image_size` and
  crops the centre; "shorter_side" keeps the ratio and resizes the shorter side to `image_size[0]`;
  "inside" keeps the ratio and resizes to the largest size inside of `image_size`; "none" does not
  resize. `rounding`, where `max_side` limits the size: "side" rounds the shorter side before the
  longer is computed from it (official DETR: up to 1336 of 1333 pixels); "ratio" computes the longer
  side from the unrounded shorter one (transformers: at most 1333); "floor" rounds both scaled sides
  down (torchvision: 799 of 800 pixels for some sizes); "nearest" rounds both, without limit. The
  corner of a crop is rounded down with "ratio" and "nearest", else to the nearest even pixel.
  """

  image_size: tuple[int, int]  # height and width of the result; see `fit`
  mean: float | tuple[float, ...] = 0.5  # subtracted from pixels in [0, 1]; of each channel, or all
  std: float | tuple[float, ...] = 0.5  # divisor after that
  fit: str = "squash"
  interpolation: str = "tf_bilinear"  # one of `INTERPOLATIONS`; TensorFlow's is not antialiased
  # "crop", "squash": fraction of the resized image's sides that remains (timm's term); of both, or
  # of height and width.
  crop_pct: float | tuple[float, float] = 1.0
  truncate: bool = False  # drop the fractions of resized pixels, as big_vision
  max_side: int | None = None  # "shorter_side": maximum length of the longer side
  rounding: str = "side"
  pad_size: tuple[int, int] | None = None  # padded at right and bottom, with zeros once normalised
  channels: int = 3  # of the images

  def __post_init__(self) -> None:
    known = {"fit": FITS, "interpolation": INTERPOLATIONS, "rounding": ROUNDINGS}
    for field, names in known.items():
      check_names(field, [getattr(self, field)], names)

  def __call__(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, "b h w c"]:
    """Returns a normalised float32 batch of images, uint8 [h w c]; ValueError if sizes differ."""
    resized = [self.resize(image) for image in images]
    sizes = {image.shape[:2] for image in resized}
    if len(sizes) > 1 and not self.pad_size:
      raise ValueError(f"images: resized to the sizes {sorted(sizes)}; expected a single one")
    mean, std = np.asarray(self.mean), np.asarray(self.std)
    normalised = [((image / 255 - mean) / std).astype(np.float32) for image in resized]
    return np.stack([self.pad(image) for image in normalised])

  def pixel_mask(self, images: Sequence[np.ndarray]) -> Bool[np.ndarray, "b h w"]:
    """Returns True at the pixels of the images, False in the padding that `__call__` adds."""
    sizes = [self.resized_size(*image.shape[:2]) for image in images]
    return np.stack([self.pad(np.ones((*size, 1), bool))[..., 0] for size in sizes])

  def resize(self, image: Num[np.ndarray, "h w *c"]) -> Float[np.ndarray, "H W c"]:
    """Resizes and crops an image, uint8 [h w c]; values stay in [0, 255], float32."""
    if image.shape[2:] != (self.channels,):
      given = ", ".join(map(str, image.shape))
      raise ValueError(f"image: its shape is [{given}]; expected [height, width, {self.channels}]")
    size = self.resized_size(image.shape[0], image.shape[1])
    resized = _resize(np.asarray(image), *size, self.interpolation)
    resized = np.floor(np.clip(resized, 0, 255)) if self.truncate else resized
    if not self.has_fixed_size:
      return resized
    height, width = self.image_size
    nearest = int if self.rounding in ("ratio", "nearest") else round
    top, left = nearest((size[0] - height) / 2), nearest((size[1] - width) / 2)
    return resized[top : top + height, left : left + width]

  def pad(self, image: Shaped[np.ndarray, "h w c"]) -> Shaped[np.ndarray, "H W c"]:
    """Pads a resized image to `pad_size`, if any, with zeros; ValueError if it is larger."""
    if self.pad_size is None:
      return image
    (height, width), limit = image.shape[:2], self.pad_size
    bottom, right = limit[0] - height, limit[1] - width
    if min(bottom, right) < 0:
      raise ValueError(f"pad_size: the image is {[height, width]}; expected at most {list(limit)}")
    return np.pad(image, ((0, bottom), (0, right), (0, 0)))

  def from_rgb(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w c"]:
    """Converts RGB to the channels of the model: gray with ITU-R 601 weights, as timm does."""
    if self.channels != 1:
      return image
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]

  def at_size(self, image_size: tuple[int, int]) -> "Preprocess":
    """Returns the preprocessing for another image size."""
    return dataclasses.replace(self, image_size=tuple(image_size))

  def with_channels(self, channels: int) -> "Preprocess":
    """Returns the preprocessing for other channels, with the averages of mean and std."""
    if channels == self.channels:
      return self
    mean, std = float(np.mean(self.mean)), float(np.mean(self.std))
    return dataclasses.replace(self, channels=channels, mean=mean, std=std)

  @property
  def has_fixed_size(self) -> bool:
    """Whether all results have the size `image_size`."""
    return self.fit in ("squash", "crop")

  @property
  def means(self) -> list[float]:
    """The mean of each channel."""
    return np.broadcast_to(self.mean, self.channels).tolist()

  @property
  def stds(self) -> list[float]:
    """The standard deviation of each channel."""
    return np.broadcast_to(self.std, self.channels).tolist()

  @property
  def uncropped_size(self) -> tuple[int, int]:
    """Height and width before the crop; of the smallest covering image if `fit` is "crop"."""
    shares = np.broadcast_to(self.crop_pct, 2).tolist()
    height, width = (math.floor(x / y) for x, y in zip(self.image_size, shares, strict=True))
    return height, width

  def resized_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns the size to which an image is resized, before a crop or padding."""
    return bounded_size(*self._resized_size(height, width))

  def _resized_size(self, height: int, width: int) -> tuple[int, int]:
    rows, columns = self.image_size
    if self.fit == "none":
      return height, width
    if self.fit == "inside":
      scale = min(rows / height, columns / width)
      return int(height * scale), int(width * scale)
    target = self.uncropped_size
    if self.fit == "squash":
      return target
    if self.fit == "crop" and target[0] != target[1]:
      scale = max(target[0] / height, target[1] / width)
      return round(height * scale), round(width * scale)
    short, long = sorted((height, width))
    limit = self.max_side if self.fit == "shorter_side" else None
    if self.rounding == "floor":
      scale = min(target[0] / short, limit / long if limit else math.inf)
      return math.floor(height * scale), math.floor(width * scale)
    if self.rounding == "nearest":  # in float32, as TensorFlow
      ratio = np.float32(target[0]) / np.float32(short)
      return round(float(np.float32(height) * ratio)), round(float(np.float32(width) * ratio))
    exact = float(target[0])
    if limit and long / short * exact > limit:
      exact = limit * float(short) / long
    side = max(1, round(exact))
    other = int((side if self.rounding == "side" else exact) * long / short)
    if side == short:  # transformers leaves such an image as it is; so does the official code
      other = long
    return (side, other) if height <= width else (other, side)


def crop_fraction(size: tuple[int, int], resized: tuple[int, int]) -> float | tuple[float, float]:
  """Returns the `crop_pct` with which `resized` is cropped to `size`, heights and widths."""
  shares = [
    x / y if math.floor(x / (x / y)) >= y else math.nextafter(x / y, 0)
    for x, y in zip(size, resized, strict=True)
  ]
  return shares[0] if shares[0] == shares[1] else (shares[0], shares[1])


DETECTION = Preprocess(
  (800, 800), IMAGENET_MEAN, IMAGENET_STD, "shorter_side", "bilinear", max_side=1333
)
"""Shorter side 800, longer at most 1333: DETR (arXiv:2005.12872, A.4)."""


def _resize(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
  if interpolation.startswith("tf_"):
    return tf_resize(image, height, width, interpolation.removeprefix("tf_"))
  pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
  if interpolation == "opencv":
    pixels = cv2_resize(pixels, height, width)
  elif pixels.shape[:2] != (height, width):
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    resized = Image.fromarray(flat).resize((width, height), PILLOW_FILTERS[interpolation])
    pixels = np.asarray(resized).reshape(height, width, -1)
  return pixels.astype(np.float32)
