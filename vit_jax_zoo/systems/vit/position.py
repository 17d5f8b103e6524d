"""Position embeddings of a grid of tokens: 1-D learned, 2-D learned, 2-D sine-cosine, none."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name

KINDS = ("learned_1d", "learned_2d", "sincos_2d", "none")
"""What the ablation of the ViT paper compares (Table 8), and the fixed one of arXiv:2205.01580."""


def sincos_2d(height: int, width: int, dim: int, temperature: float = 10_000.0) -> np.ndarray:
  """Returns the fixed table [height * width, dim], row by row, of arXiv:2104.02057.

  A quarter of the channels each for sin x, cos x, sin y, cos y, at `dim / 4` frequencies that fall
  geometrically from 1 to 1 / temperature.
  """
  if dim % 4 or dim < 8:
    raise ValueError(f"sincos_2d needs a width that is a multiple of 4 and at least 8, not {dim}")
  frequencies = temperature ** -np.linspace(0, 1, dim // 4)
  y, x = np.mgrid[:height, :width].reshape(2, -1, 1) * frequencies
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class PositionEmbedding(nn.Module):
  """Adds to each token what says where it stands.

  Attributes:
    kind: one of `KINDS`. "learned_1d" has a row for each token, `table` [1 n d]; "learned_2d" joins
      half a row for the token's row and half for its column, `rows` [h d/2] and `columns` [w d/2].
  """

  kind: str = "learned_1d"

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b n d"]:
    """Adds positions to `tokens`.

    Args:
      tokens: the grid's tokens row by row. "learned_1d" also takes others among them (a class
        token), which then have rows of their own.
      grid: height and width of the grid, in tokens.
    """
    return tokens + self._table(tokens.shape[1:], grid).astype(tokens.dtype)

  def _table(self, shape: tuple[int, ...], grid: tuple[int, int]) -> Float[Array, "1 n d"]:
    normal = nn.initializers.normal(0.02)
    if self.kind == "learned_1d":
      return jnp.asarray(self.param("table", normal, (1, *shape)))
    if self.kind == "learned_2d":
      half = shape[-1] // 2
      rows = self.param("rows", normal, (grid[0], half))
      columns = self.param("columns", normal, (grid[1], shape[-1] - half))
      rows = jnp.broadcast_to(rows[:, None, :], (*grid, rows.shape[-1]))
      columns = jnp.broadcast_to(columns[None, :, :], (*grid, columns.shape[-1]))
      return jnp.concatenate([rows, columns], axis=-1).reshape(1, *shape)
    if self.kind == "sincos_2d":
      return jnp.asarray(sincos_2d(*grid, shape[-1]))[None]
    if self.kind == "none":
      return jnp.zeros((1, *shape))
    raise ValueError(unknown_name("position embedding", self.kind, KINDS))
