"""Few compiled programs for images of many sizes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

MAX_PROGRAMS = 32  # compiled sizes of images that a predictor keeps, about 15 MB each


def jit_by_image_size(
  predict: Callable[[Any, Mapping[str, Any]], Any],
) -> Callable[[Any, Mapping[str, Any]], Any]:
  """Returns `jax.jit(predict)` with bounded memory for images of many sizes."""

  @functools.lru_cache(MAX_PROGRAMS)
  def program(_: tuple[int, ...]) -> Callable[[Any, Mapping[str, Any]], Any]:
    return jax.jit(functools.partial(predict))  # jax.jit shares programs between equal functions

  return lambda variables, batch: program(batch["image"].shape)(variables, batch)


def pad_example(
  example: Mapping[str, Any], round_up: Callable[[int], int]
) -> dict[str, np.ndarray]:
  """Returns `image`, padded with zeros at the right and bottom, and `image_size` without padding.

  `round_up` maps a side to the padded one, so that images of many sizes share few programs.
  """
  image = np.asarray(example["image"])
  size = np.asarray(example.get("image_size", image.shape[:2]), np.int32)
  padding = [(0, round_up(side) - side) for side in image.shape[:2]]
  return {"image": np.pad(image, (*padding, (0, 0))), "image_size": size}
