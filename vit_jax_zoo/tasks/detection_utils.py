"""Sizes, padding masks and targets of detection batches; the keys are those of `Detection`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.tasks import base


def image_size(batch: base.Batch) -> Int[Array, "b 2"]:
  """Returns height and width of every image without its padding."""
  if "image_size" in batch:
    return jnp.asarray(batch["image_size"])
  shape = jnp.asarray(batch["image"].shape[1:3], jnp.int32)
  return jnp.broadcast_to(shape, (batch["image"].shape[0], 2))


def pixel_mask(batch: base.Batch) -> Bool[Array, "b h w"]:
  """Returns True at the pixels of an image, False in its padding."""
  height, width = batch["image"].shape[1:3]
  size = image_size(batch)[:, :, None]
  rows = jnp.arange(height, dtype=size.dtype)[None] < size[:, 0]
  columns = jnp.arange(width, dtype=size.dtype)[None] < size[:, 1]
  return rows[:, :, None] & columns[:, None, :]


def is_target(batch: base.Batch) -> Bool[Array, "b t"]:
  """Returns True for targets, False for padding, also in padding rows."""
  return jnp.asarray(batch["is_target"]).astype(bool) & base.example_mask(batch)[:, None]


def target_boxes(batch: base.Batch) -> Float[Array, "b t 4"]:
  """Returns the targets' boxes, and 0.5 in padding, whose values are undefined."""
  boxes = jnp.asarray(batch["boxes_cxcywh"], jnp.float32)
  return jnp.where(is_target(batch)[..., None], boxes, 0.5)
