"""What attention maps say when they are taken together: where a model looks in the end, how far.

Maps come with the layers stacked in front, [l b heads n n]; rows sum to 1. If there are tokens
beside the patches (a class token), they stand before these.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def attention_rollout(
  weights: Float[Array | np.ndarray, "l b heads n n"], *, residual: float = 0.5
) -> Float[Array, "b n n"]:
  """Follows attention through all layers, down to the input tokens.

  Abnar and Zuidema, arXiv:2005.00928, section 3: the maps, averaged over heads and mixed with the
  identity for the residual connection, are multiplied. It is what figure 6 of the ViT paper shows
  (appendix D.8).

  Args:
    weights: attention maps.
    residual: share of the identity.

  Returns:
    For each output token (row), how much of it comes from each input token; rows sum to 1.
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
  """Returns how far each head looks: the mean distance between a patch and those it attends to.

  Figure 7, right, of the ViT paper. Attention to and from tokens that are no patch is left out, and
  the rest of each row brought to sum to 1.

  Args:
    weights: attention maps.
    grid: height and width, in patches.
    patch_size: side of a patch, in the unit of the answer (pixels).
  """
  maps = patch_tokens(patch_tokens(weights, grid, axis=-1), grid, axis=-2).astype(jnp.float32)
  maps = maps / jnp.maximum(maps.sum(axis=-1, keepdims=True), 1e-12)
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2)
  distances = np.linalg.norm(places[:, None] - places[None], axis=-1).astype(np.float32)
  return (maps * distances[None, None, None]).sum(axis=-1).mean(axis=(1, 3)) * patch_size


def patch_tokens(
  values: Float[Array | np.ndarray, "..."], grid: tuple[int, int], axis: int
) -> Float[Array, "..."]:
  """Keeps the patches along an axis of tokens: the last height * width of them.

  Raises:
    ValueError: there are fewer.
  """
  count, found = grid[0] * grid[1], values.shape[axis]
  if found < count:
    raise ValueError(f"the maps have {found} tokens, but the grid {grid} has {count}")
  keep = [slice(None)] * values.ndim
  keep[axis] = slice(found - count, None)
  return jnp.asarray(values)[tuple(keep)]
