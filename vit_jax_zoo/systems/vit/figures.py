"""Numbers behind figures 6 and 7 of the ViT paper: attention rollout, attention distances.

Attention maps have the layers in front, [l b heads n n]; rows sum to 1. Tokens that are no patches
(the class token) come before the patches.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax_zoo.ops.interpretability import Explanation


def explain(
  model: Any, params: Mapping[str, Any], intermediates: Any, image_size: tuple[int, int]
) -> Explanation:
  """Returns rollout, attention of the head's token, distances, position embeddings and filters.

  The query is the class token, or the mean over the patches, as the head's input is.

  Args:
    model: a `VisionTransformer`.
    params: of the model.
    intermediates: sown by the model for a batch of images.
    image_size: height and width of the images.
  """
  grid = model.token_grid(image_size)
  weights = attention_maps(intermediates["encoder"])

  def of_the_head(maps: Array) -> Array:
    maps = patch_tokens(maps, grid, axis=-1)
    row = maps[..., 0, :] if model.pool == "cls" else patch_tokens(maps, grid, axis=-2).mean(-2)
    return row.reshape(*row.shape[:-1], *grid)

  positions = intermediates["positions"][0][0]
  first = params["embedding" if model.resnet is None else "resnet"]
  return Explanation(
    looked_at=of_the_head(attention_rollout(weights)),
    heads=of_the_head(weights.swapaxes(0, 1)),
    distances=attention_distances(weights, grid, patch_size=float(model.token_stride)),
    positions=patch_tokens(positions, grid, axis=0) if model.position_embedding != "none" else None,
    filters=first["kernel"] if model.resnet is None else first["root_conv"]["kernel"],
    viewer="the class token" if model.pool == "cls" else "the patches' mean",
    principal=model.resnet is None,
    grid=grid,
  )


def attention_maps(intermediates: Mapping[str, Any]) -> Float[Array, "l b heads n n"]:
  """Returns the attention maps that the encoder has sown, scanned or unrolled."""
  if "blocks" in intermediates:
    return intermediates["blocks"]["attention"]["weights"][0]
  blocks = [intermediates[f"block_{i}"] for i in range(len(intermediates))]
  return jnp.stack([block["attention"]["weights"][0] for block in blocks])


def attention_rollout(
  weights: Float[Array | np.ndarray, "l b heads n n"], *, residual: float = 0.5
) -> Float[Array, "b n n"]:
  """Returns the share of each input token (column) in each output token (row); rows sum to 1.

  Abnar and Zuidema, arXiv:2005.00928, section 3, as in figure 6 of the ViT paper (appendix D.8):
  the product of the maps, averaged over heads and mixed with the identity.

  Args:
    weights: attention maps.
    residual: weight of the identity, which stands for the residual connection.
  """
  maps = jnp.asarray(weights, jnp.float32)
  mixed = (1 - residual) * maps.mean(axis=2) + residual * jnp.eye(maps.shape[-1])[None, None]
  total = mixed[0]
  for layer in mixed[1:]:
    total = jnp.matmul(layer, total, precision="highest")
  return total


def attention_distances(
  weights: Float[Array | np.ndarray, "l b heads n n"],
  grid: tuple[int, int],
  *,
  patch_size: float = 1.0,
) -> Float[Array, "l heads"]:
  """Returns the mean distance between a patch and the patches it attends to (figure 7, right).

  Rows are renormalised to the patches, without other tokens.

  Args:
    weights: attention maps.
    grid: height and width, in patches.
    patch_size: side of a patch, in the unit of the result (pixels).
  """
  maps = patch_tokens(patch_tokens(weights, grid, axis=-1), grid, axis=-2).astype(jnp.float32)
  maps = maps / jnp.maximum(maps.sum(axis=-1, keepdims=True), 1e-12)
  points = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2)
  distances = np.linalg.norm(points[:, None] - points[None], axis=-1).astype(np.float32)
  return (maps * distances[None, None, None]).sum(axis=-1).mean(axis=(1, 3)) * patch_size


def patch_tokens(
  values: Float[Array | np.ndarray, "..."], grid: tuple[int, int], axis: int
) -> Float[Array, "..."]:
  """Returns the patches along an axis of tokens: its last height * width elements."""
  count, tokens = grid[0] * grid[1], values.shape[axis]
  if tokens < count:
    raise ValueError(f"attention maps: {tokens} tokens; expected {count} or more for grid {grid}")
  keep = [slice(None)] * values.ndim
  keep[axis] = slice(tokens - count, None)
  return jnp.asarray(values)[tuple(keep)]
