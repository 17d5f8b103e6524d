"""Normalisation and padding of images on the device."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped


def normalize_images(
  images: Shaped[Array, "b h w c"],
  mean: float | Sequence[float] = 0.5,
  std: float | Sequence[float] = 0.5,
) -> Float[Array, "b h w c"]:
  """Maps pixels in [0, 255] to float32 `(pixels / 255 - mean) / std`, by default in [-1, 1].

  Runs inside the jitted step: images are transferred to the device as uint8. `mean` and `std` have
  one value, or one per channel; else ValueError.
  """
  channels = images.shape[-1]

  def per_channel(name: str, value: float | Sequence[float]) -> Float[Array, "1 1 1 #c"]:
    array = jnp.asarray(value, jnp.float32)
    if array.ndim > 1 or array.size not in (1, channels):
      given = f"{array.size} values for images with {channels} channels"
      raise ValueError(f"image_{name}: {given}; expected one or {channels}")
    return array.reshape(1, 1, 1, -1)

  center, scale = 255.0 * per_channel("mean", mean), 255.0 * per_channel("std", std)
  return (images.astype(jnp.float32) - center) / scale


def clear_padding(
  images: Float[Array, "b h w c"], image_size: Num[Array, "b 2"]
) -> Float[Array, "b h w c"]:
  """Sets the padding right of and below the images to zero; sizes are (height, width)."""
  rows = jnp.arange(images.shape[1], dtype=image_size.dtype)[None] < image_size[:, :1]
  columns = jnp.arange(images.shape[2], dtype=image_size.dtype)[None] < image_size[:, 1:]
  return jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0)


def pad_images(images: Shaped[Array, "b h w c"], multiple: int) -> Shaped[Array, "b i j c"]:
  """Pads with zeros at the right and bottom to multiples of a number."""
  below, right = (-side % multiple for side in images.shape[1:3])
  return jnp.pad(images, ((0, 0), (0, below), (0, right), (0, 0)))
