"""What happens to a picture before a published model sees it: as its accuracy was measured."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from vit_jax_zoo.data.resize import tf_resize
from vit_jax_zoo.errors import unknown_name

PILLOW_FILTERS = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
  "box": Image.Resampling.BOX,
  "hamming": Image.Resampling.HAMMING,
}
"""Pillow's, which widen when they shrink and round to whole grey levels; by timm's names."""

INTERPOLATIONS = ("tf_bilinear", *PILLOW_FILTERS)
FITS = ("squash", "crop", "shorter_side")


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Turns pictures into what a model takes, as the published accuracies were measured.

  Attributes:
    image_size: height and width of the result.
    mean: subtracted from pixels in [0, 1]; one for each channel or for all.
    std: divided by afterwards; as `mean`.
    fit: "squash" resizes straight to the size, whatever the aspect ratio; "crop" keeps the ratio,
      covers the size and takes the middle; "shorter_side" keeps the ratio and brings the shorter
      side to `image_size[0]`, so that pictures keep sizes of their own.
    interpolation: "tf_bilinear" (TensorFlow's, which sees of a large photo only scattered pixels)
      or a key of `PILLOW_FILTERS`.
    crop_pct: share of the resized picture's side that the middle takes (timm's word).
    max_side: with "shorter_side": the longer side is at most so long.
    channels: of pictures.
  """

  image_size: tuple[int, int]
  mean: float | tuple[float, ...] = 0.5
  std: float | tuple[float, ...] = 0.5
  fit: str = "squash"
  interpolation: str = "tf_bilinear"
  crop_pct: float = 1.0
  max_side: int | None = None
  channels: int = 3

  def __post_init__(self) -> None:
    if self.fit not in FITS:
      raise ValueError(unknown_name("fit", self.fit, FITS))
    if self.interpolation not in INTERPOLATIONS:
      raise ValueError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))

  def __call__(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, "b h w c"]:
    """Stacks pictures, uint8 [h w c] of any sizes, to one normalised batch of float32.

    Raises:
      ValueError: as `resize`; or with "shorter_side", when the results differ in size.
    """
    resized = [self.resize(image) for image in images]
    sizes = {image.shape[:2] for image in resized}
    if len(sizes) > 1:
      raise ValueError(f"the pictures have different sizes, {sorted(sizes)}; give them one by one")
    mean, std = np.asarray(self.mean), np.asarray(self.std)
    return ((np.stack(resized) / 255 - mean) / std).astype(np.float32)

  def resize(self, image: Num[np.ndarray, "h w *c"]) -> Float[np.ndarray, "H W c"]:
    """Brings a picture, uint8 [h w c], to the size; values stay in [0, 255], float32.

    Raises:
      ValueError: the model takes pictures of another number of channels.
    """
    if image.shape[2:] != (self.channels,):
      given = ", ".join(map(str, image.shape))
      raise ValueError(
        f"the model takes pictures [height, width, {self.channels}]; this one is [{given}]"
      )
    size = self._resized_size(image.shape[0], image.shape[1])
    return self._cropped(_resize(np.asarray(image), *size, self.interpolation))

  def from_rgb(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w c"]:
    """Returns a picture as it was read with the channels that the model takes: gray as timm's are.

    With weights of ITU-R 601. What has neither one channel nor three, `resize` refuses.
    """
    if self.channels != 1:
      return image
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]

  def at_size(self, image_size: tuple[int, int]) -> "Preprocess":
    """Returns the same for another size of images."""
    return dataclasses.replace(self, image_size=tuple(image_size))

  def with_channels(self, channels: int) -> "Preprocess":
    """Returns the same for pictures of another kind, with the average of mean and deviation."""
    if channels == self.channels:
      return self
    mean, std = float(np.mean(self.mean)), float(np.mean(self.std))
    return dataclasses.replace(self, channels=channels, mean=mean, std=std)

  @property
  def means(self) -> list[float]:
    """The mean of each channel."""
    return np.broadcast_to(self.mean, self.channels).tolist()

  @property
  def stds(self) -> list[float]:
    """The deviation of each channel."""
    return np.broadcast_to(self.std, self.channels).tolist()

  def _resized_size(self, height: int, width: int) -> tuple[int, int]:
    rows, columns = self.image_size
    target = math.floor(rows / self.crop_pct), math.floor(columns / self.crop_pct)
    if self.fit == "squash":
      return target
    if self.fit == "crop" and target[0] != target[1]:
      scale = max(target[0] / height, target[1] / width)
      return round(height * scale), round(width * scale)
    short, long = sorted((height, width))
    side = target[0]
    if self.fit == "shorter_side" and self.max_side and long / short * side > self.max_side:
      side = round(self.max_side * short / long)
    other = int(side * long / short)
    return (side, other) if height <= width else (other, side)

  def _cropped(self, image: np.ndarray) -> np.ndarray:
    if self.fit == "shorter_side":
      return image
    height, width = self.image_size
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def _resize(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
  if interpolation == "tf_bilinear":
    return tf_resize(image, height, width)
  pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
  if pixels.shape[:2] != (height, width):
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    resized = Image.fromarray(flat).resize((width, height), PILLOW_FILTERS[interpolation])
    pixels = np.asarray(resized).reshape(height, width, -1)
  return pixels.astype(np.float32)
