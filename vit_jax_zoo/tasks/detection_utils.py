"""What detection's batches and models' outputs mean: sizes, masks and targets behind the padding.

The keys of a batch are those of `tasks.detection.Detection`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.tasks import base


def last_attention(intermediates: Mapping[str, Any]) -> Float[Array, "b q i j"]:
  """Returns where the queries look in a DETR's last decoder layer, mean over heads.

  Args:
    intermediates: what the model has sown.
  """
  layers = intermediates["transformer"]
  if "decoder" in layers:
    weights = layers["decoder"]["cross_attention"]["weights"][0][-1]
  else:
    last = max(int(name.removeprefix("decoder_")) for name in layers if name.startswith("decoder_"))
    weights = layers[f"decoder_{last}"]["cross_attention"]["weights"][0]
  size = intermediates["memory"][0].shape[1:3]
  return jnp.mean(weights, axis=1).reshape(weights.shape[0], weights.shape[2], *size)


def image_size(batch: base.Batch) -> Int[Array, "b 2"]:
  """Returns height and width of every image without its padding."""
  if "image_size" in batch:
    return jnp.asarray(batch["image_size"])
  shape = jnp.asarray(batch["image"].shape[1:3], jnp.int32)
  return jnp.broadcast_to(shape, (batch["image"].shape[0], 2))


def pixel_mask(batch: base.Batch) -> Bool[Array, "b h w"]:
  """Returns where a pixel belongs to an image, and not to its padding."""
  height, width = batch["image"].shape[1:3]
  size = image_size(batch)[:, :, None]
  rows = jnp.arange(height)[None] < size[:, 0]
  columns = jnp.arange(width)[None] < size[:, 1]
  return rows[:, :, None] & columns[:, None, :]


def cell_centers(batch: base.Batch, grid: tuple[int, int]) -> Float[Array, "b n 2"]:
  """Returns the centres (x, y) of a map's cells, row by row, in shares of the unpadded image."""
  rows = (jnp.arange(grid[0]) + 0.5) / grid[0]
  columns = (jnp.arange(grid[1]) + 0.5) / grid[1]
  shares = jnp.stack(jnp.meshgrid(columns, rows), axis=-1).reshape(1, -1, 2)
  padded = jnp.asarray(batch["image"].shape[1:3], jnp.float32)
  scale = padded[None] / jnp.maximum(image_size(batch), 1)
  return shares * scale[:, None, ::-1]


def is_target(batch: base.Batch) -> Bool[Array, "b t"]:
  """Returns which targets there are; none in rows that are padding altogether."""
  return jnp.asarray(batch["is_target"]).astype(bool) & base.example_mask(batch)[:, None]


def target_boxes(batch: base.Batch) -> Float[Array, "b t 4"]:
  """Returns the targets' boxes, harmless ones in the padding, whatever it holds."""
  boxes = jnp.asarray(batch["boxes_cxcywh"], jnp.float32)
  return jnp.where(is_target(batch)[..., None], boxes, 0.5)
