"""DropBlock and stochastic depth."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax_zoo.ops.checks import check_positive, check_rates


class DropBlock(nn.Module):
  """Zeroes squares of each channel's map in training, rescales the rest. arXiv:1810.12890."""

  rate: float  # expected fraction of a map that is dropped, overlaps not counted, in [0, 1)
  block_size: int = 3  # side of the squares, at most the map's smaller side

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
    """Returns `x`, in training with squares dropped ("dropout" stream)."""
    check_rates(self, "rate")
    check_positive(self, "block_size")
    if not train or not self.rate:
      return x
    batch, height, width, channels = x.shape
    size = min(self.block_size, height, width)
    rows, columns = height - size + 1, width - size + 1  # of valid first corners of squares
    gamma = self.rate * height * width / (size**2 * rows * columns)  # Eq. 1
    rng, shape = self.make_rng("dropout"), (batch, rows, columns, channels)
    corners = jax.random.bernoulli(rng, min(gamma, 1.0), shape).astype(jnp.float32)
    keep = 1.0 - nn.max_pool(corners, (size, size), padding=((size - 1, size - 1),) * 2)
    scale = keep.size / jnp.maximum(jnp.sum(keep), 1.0)  # Algorithm 1, line 7
    return x * (keep * scale).astype(x.dtype)


class DropPath(nn.Module):
  """Stochastic depth: drops a residual branch per example, rescales kept ones. arXiv:1603.09382."""

  @nn.compact
  def __call__(
    self, branch: Float[Array, "b ..."], rate: float | Float[Array, ""], *, train: bool
  ) -> Float[Array, "b ..."]:
    """Keeps each example's branch with probability 1 - rate; all unless `train`."""
    if not train or (isinstance(rate, (int, float)) and rate == 0):
      return branch
    probability = 1 - jnp.asarray(rate, dtype=jnp.float32)
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(self.make_rng("dropout"), probability, shape)
    return branch * (keep / probability).astype(branch.dtype)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
  """Returns each layer's rate, linear from 0 in the first to `rate` in the last."""
  if not 0 <= rate < 1:
    raise ValueError(f"drop_path_rate: {rate}; expected a number in [0, 1)")
  return tuple(rate * layer / max(depth - 1, 1) for layer in range(depth))
