"""Figures 6 and 7 of the ViT paper: attention rollout, attention distances, embeddings, filters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from matplotlib.figure import Figure

from vit_jax_zoo.figures import attention as draw

Maps = Float[Array | np.ndarray, "l b heads n n"]


def explain(
  model: Any, variables: Mapping[str, Any], intermediates: Any, image_size: tuple[int, int]
) -> dict[str, Array]:
  """Returns the arrays for `draw_explanation`, from a `VisionTransformer`'s intermediates.

  `rollout` [b gh gw] and `heads` [b l heads gh gw]: attention of the head's input to each patch;
  `distances` [l heads], in pixels; `positions` [gh*gw d], if any; `filters` [kh kw c n].
  """
  grid, is_cls = model.token_grid(image_size), model.pool == "cls"
  encoder = intermediates["encoder"]
  if "blocks" in encoder:  # scanned
    weights = encoder["blocks"]["attention"]["weights"][0]
  else:
    blocks = [encoder[f"block_{i}"] for i in range(model.depth)]
    weights = jnp.stack([block["attention"]["weights"][0] for block in blocks])

  def of_the_head(maps: Array) -> Array:
    maps = patch_tokens(maps, grid, axis=-1)
    row = maps[..., 0, :] if is_cls else patch_tokens(maps, grid, axis=-2).mean(-2)
    return row.reshape(*row.shape[:-1], *grid)

  params = variables["params"]
  first = params["embedding"] if model.resnet is None else params["resnet"]["root_conv"]
  explanation = {
    "rollout": of_the_head(attention_rollout(weights)),
    "heads": of_the_head(weights.swapaxes(0, 1)),
    "distances": attention_distances(weights, grid, patch_size=float(model.token_stride)),
    "filters": first["kernel"],
  }
  if model.position_embedding != "none":
    explanation["positions"] = patch_tokens(intermediates["positions"][0][0], grid, axis=0)
  return explanation


def draw_explanation(
  model: Any,
  images: Num[np.ndarray, "b h w c"],
  captions: Sequence[str],
  explanation: Mapping[str, np.ndarray],
) -> tuple[dict[str, Figure], dict[str, Figure]]:
  """Draws the arrays of `explain`: figures of the images (in [0, 255]), and of the model alone."""
  query = "the class token" if model.pool == "cls" else "the patches' mean"
  rolled = f"rolled out from {query} to the patches"
  scaled = f"of {query}; each map scaled to its own maximum"
  of_images = {
    "attention": draw.draw_attention(images, explanation["rollout"], captions, subtitle=rolled),
    "heads": draw.draw_heads(images[0], explanation["heads"][0], subtitle=scaled),
    "distances": draw.draw_attention_distances(explanation["distances"]),
  }
  of_model = {"filters": draw.draw_filters(explanation["filters"], principal=model.resnet is None)}
  if "positions" in explanation:
    grid = explanation["rollout"].shape[1:]
    of_model["positions"] = draw.draw_position_similarity(explanation["positions"], grid)
  return of_images, of_model


def attention_rollout(weights: Maps) -> Float[Array, "b n n"]:
  """Returns the weight of each input token (column) in each output token (row); rows sum to 1.

  Abnar and Zuidema, arXiv:2005.00928, section 3, as in figure 6 of the ViT paper (appendix D.8):
  the product of the maps' means over heads, each averaged with the identity, for the residual
  connection.
  """
  maps = jnp.asarray(weights, jnp.float32)
  mixed = 0.5 * maps.mean(axis=2) + 0.5 * jnp.eye(maps.shape[-1], dtype=maps.dtype)[None, None]
  total = mixed[0]
  for layer in mixed[1:]:
    total = jnp.matmul(layer, total, precision="highest")
  return total


def attention_distances(
  weights: Maps, grid: tuple[int, int], patch_size: float = 1.0
) -> Float[Array, "l heads"]:
  """Returns the mean distance, in units of `patch_size`, of attended patches (figure 7, right)."""
  maps = patch_tokens(patch_tokens(weights, grid, axis=-1), grid, axis=-2).astype(jnp.float32)
  maps = maps / jnp.maximum(maps.sum(axis=-1, keepdims=True), 1e-12)
  points = np.indices(grid).reshape(2, -1).T
  distances = np.linalg.norm(points[:, None] - points[None], axis=-1).astype(np.float32)
  return (maps * distances[None, None, None]).sum(axis=-1).mean(axis=(1, 3)) * patch_size


def patch_tokens(
  values: Float[Array | np.ndarray, "..."], grid: tuple[int, int], axis: int
) -> Float[Array, "..."]:
  """Returns the patches along an axis of tokens: its last height * width elements."""
  count, tokens = grid[0] * grid[1], values.shape[axis]
  if tokens < count:
    raise ValueError(f"attention maps: {tokens} tokens; expected {count} or more for grid {grid}")
  return jax.lax.slice_in_dim(jnp.asarray(values), tokens - count, tokens, axis=axis)
