"""RandAugment, in the two flavours that published models were trained with.

  Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search
  space", arXiv:1909.13719

A layer draws one operation and applies it at a common magnitude M, in tenths of a range; N layers
follow each other, each drawn from the whole list again. So far the paper; the rest differs:

|                 | `rand_augment`                       | `timm_rand_augment`               |
|-----------------|--------------------------------------|-----------------------------------|
| comes from      | EfficientNet's TPU code; big_vision  | timm: `rand-m9-mstd0.5-inc1`      |
| operations      | 16                                   | 15: no cutout                     |
| a layer acts    | always                               | with probability 0.5              |
| magnitude       | M, also above 10 (AugReg has 20)     | normal about M, cut to [0, 10]    |
| enhancements    | 0.1 + 0.18 M                         | 1 +- 0.09 M, at least 0.1 (*)     |
| posterize       | keeps 0.4 M bits; 1 for 0, 9 or more | keeps 4 - 0.4 M bits (*)          |
| solarize        | from (25.6 M modulo 256) on          | from 256 - 25.6 M on (*)          |
| solarize_add    | 11 M                                 | 11 M                              |
| shear, rotate   | 0.03 M, 3 M degrees, either way      | the same                          |
| translate       | 10 M pixels, either way              | 4.5 M % of the side, either way   |
| cutout          | a square of side 8 M                 | (elsewhere: `random_erasing`)     |
| contrast's grey | the number of pixels / 256           | the image's mean brightness       |
| new pixels      | grey 128                             | `fill`: the data's mean colour    |
| interpolation   | nearest                              | bilinear or bicubic, drawn        |

Enhancements are brightness, color, contrast, sharpness. (*) With `increasing`; without it as on the
left, but thresholds do not overflow, and posterize may keep no bit.

The left column is what was run, not what was meant. TensorFlow keeps the threshold of solarize in
eight bits, so at M = 10 and 20, where it should do nothing, it inverts the image, as it does at
M = 0; and it shifts a byte by seven bits at most. (Tried with TensorFlow 2.15 and NumPy 1.23; with
NumPy 2 that threshold is an error.) Strength does not grow with M: RandAugment(2, 0) is one of the
strong ones.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import numpy as np
from PIL import Image

from vit_jax_zoo.data import augment_ops as ops
from vit_jax_zoo.data.transform_base import ImageTransform
from vit_jax_zoo.ops.names import unknown_name

Pixels: TypeAlias = np.ndarray

GREY = (128, 128, 128)

INTERPOLATIONS = {
  "nearest": (ops.NEAREST,),
  "bilinear": (ops.BILINEAR,),
  "bicubic": (ops.BICUBIC,),
  "random": (ops.BILINEAR, ops.BICUBIC),
}

COMMON = (
  "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
  "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""The operations of both flavours."""


@dataclasses.dataclass(frozen=True)
class _Policy(ImageTransform):
  """What both flavours do: draw operations, and look up how each is applied.

  Attributes:
    num_layers: the paper's N.
    magnitude: the paper's M.
  """

  operations: ClassVar[tuple[str, ...]] = COMMON

  num_layers: int = 2
  magnitude: float | int = 10

  def __post_init__(self) -> None:
    if self.num_layers < 1 or not 0 <= self.magnitude <= 30:
      raise ValueError(
        f"{self.name} needs num_layers of at least 1 and a magnitude in [0, 30], not "
        f"{self.num_layers} and {self.magnitude}"
      )

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the augmented image, uint8.

    Raises:
      ValueError: the image is not uint8.
    """
    if image.dtype != np.uint8:
      raise ValueError(
        f"{self.name} needs uint8 images, but this one is {image.dtype}; put it before transforms "
        "with dtype='float32'"
      )
    for _ in range(self.num_layers):
      image = self.apply_layer(image, self.operations[rng.integers(len(self.operations))], rng)
    return image

  @abc.abstractmethod
  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""


@dataclasses.dataclass(frozen=True)
class RandAugment(_Policy):
  """RandAugment as EfficientNet's TPU code has it, and big_vision's `randaug(N,M)`.

  Its enhanced contrast blends from a grey level that is the number of pixels / 256 (196 at 224x224)
  where the image's mean was meant; models were trained with it, so it stays. TensorFlow computes a
  few values otherwise than Pillow, by one grey level at most.

  Attributes:
    num_layers: N, how many operations an image goes through.
    magnitude: M, in tenths of the ranges above.
  """

  name = "rand_augment"
  operations = (*COMMON, "cutout")

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""
    share = self.magnitude / 10
    if operation in _MOVES:
      move = _MOVES[operation]
      return move(image, _signed(share, rng), 100.0, GREY, ops.NEAREST)
    if operation == "cutout":
      center = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
      return ops.cutout(image, center, int(share * 40), GREY)
    if operation == "contrast":
      grey = min(255, image.shape[0] * image.shape[1] // 256)
      return ops.contrast(image, 0.1 + 1.8 * share, grey)
    if operation in _ENHANCEMENTS:
      return _ENHANCEMENTS[operation](image, 0.1 + 1.8 * share)
    if operation == "posterize":
      bits = int(share * 4)
      return ops.posterize(image, bits if 0 < bits <= 8 else 1)
    if operation == "solarize":
      return ops.solarize(image, int(share * 256) % 256)
    if operation == "solarize_add":
      return ops.solarize_add(image, int(share * 110))
    return _PLAIN[operation](image)


@dataclasses.dataclass(frozen=True)
class TimmRandAugment(_Policy):
  """RandAugment as timm has it; the defaults are its `rand-m9-mstd0.5-inc1`.

  Attributes:
    num_layers: N, how many operations are drawn.
    magnitude: M, in tenths of the ranges above.
    magnitude_std: standard deviation of each operation's magnitude; 0: always M.
    probability: that a drawn operation is applied.
    increasing: all operations grow stronger with M.
    interpolation: "random" draws "bilinear" or "bicubic" each time; or one of these, or "nearest".
    fill: colour of what comes into view, in [0, 255]; timm takes the mean of the data.
  """

  name = "timm_rand_augment"

  magnitude: float | int = 9
  magnitude_std: float | int = 0.5
  probability: float | int = 0.5
  increasing: bool = True
  interpolation: str = "random"
  fill: Sequence[int] = GREY

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.interpolation not in INTERPOLATIONS:
      raise ValueError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))
    if not 0 <= self.probability <= 1 or self.magnitude_std < 0 or len(self.fill) != 3:
      raise ValueError(
        f"{self.name} needs a probability in [0, 1], a magnitude_std of at least 0 and a fill of 3 "
        f"values, not {self.probability}, {self.magnitude_std} and {self.fill}"
      )

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation, or as it was."""
    if rng.random() >= self.probability:
      return image
    magnitude = rng.normal(self.magnitude, self.magnitude_std)
    share = float(np.clip(magnitude, 0, 10)) / 10
    if operation in _MOVES:
      return self._move(image, operation, share, rng)
    if operation in _ENHANCEMENTS:
      # The mean brightness is contrast's own default.
      factor = max(0.1, 1 + _signed(0.9 * share, rng)) if self.increasing else 0.1 + 1.8 * share
      return _ENHANCEMENTS[operation](image, factor)
    if operation == "posterize":
      bits = int(share * 4)
      return ops.posterize(image, 4 - bits if self.increasing else bits)
    if operation == "solarize":
      threshold = min(256, int(share * 256))
      return ops.solarize(image, 256 - threshold if self.increasing else threshold)
    if operation == "solarize_add":
      return ops.solarize_add(image, min(128, int(share * 110)))
    return _PLAIN[operation](image)

  def _move(self, image: Pixels, operation: str, share: float, rng: np.random.Generator) -> Pixels:
    choices = INTERPOLATIONS[self.interpolation]
    resample = choices[rng.integers(len(choices))]
    side = image.shape[1] if operation == "translate_x" else image.shape[0]
    fill = (self.fill[0], self.fill[1], self.fill[2])
    return _MOVES[operation](image, _signed(share, rng), 0.45 * side, fill, resample)


def _signed(value: float, rng: np.random.Generator) -> float:
  return value if rng.random() < 0.5 else -value


def _move(
  kind: str,
  image: Pixels,
  share: float,
  way: float,
  fill: ops.Color,
  resample: Image.Resampling,
) -> Pixels:
  """Moves pixels by a share of the longest way: 30 degrees, a shear of 0.3, or `way` pixels."""
  if kind == "rotate":
    return ops.rotate(image, 30 * share, fill, resample)
  shear, shift = 0.3 * share, way * share
  # TensorFlow, which takes the nearest, shears about the centre of the first pixel; Pillow about
  # its corner.
  start = -0.5 * shear if resample == ops.NEAREST else 0.0
  matrix = {
    "shear_x": (1, shear, start, 0, 1, 0),
    "shear_y": (1, 0, 0, shear, 1, start),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[kind]
  return ops.affine(image, matrix, fill, resample)


_MOVES: dict[str, Callable[..., Pixels]] = {
  kind: functools.partial(_move, kind)
  for kind in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
}
_ENHANCEMENTS: dict[str, Callable[[Pixels, float], Pixels]] = {
  "brightness": ops.brightness,
  "color": ops.color,
  "contrast": ops.contrast,
  "sharpness": ops.sharpness,
}
_PLAIN: dict[str, Callable[[Pixels], Pixels]] = {
  "auto_contrast": ops.auto_contrast,
  "equalize": ops.equalize,
  "invert": ops.invert,
}
