"""Stochastic depth: whole residual branches are left out at random while training."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class DropPath(nn.Module):
  """Drops a residual branch for some examples of the batch. Huang et al., arXiv:1603.09382.

  The surviving branches are scaled by 1 / (1 - rate), so that the expectation is that of evaluation
  and nothing needs scaling there.
  """

  @nn.compact
  def __call__(
    self, branch: Float[Array, "b ..."], rate: float | Float[Array, ""], *, train: bool
  ) -> Float[Array, "b ..."]:
    """Keeps each example's branch with probability 1 - rate.

    Args:
      branch: what is about to be added to the residual stream.
      rate: in [0, 1); an array where layers are scanned. A plain 0 costs nothing.
      train: False returns `branch` untouched.
    """
    if not train or (isinstance(rate, (int, float)) and rate == 0):
      return branch
    keep = 1 - jnp.asarray(rate, dtype=jnp.float32)
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
    return branch * (kept / keep).astype(branch.dtype)


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
  """Returns each layer's rate, growing linearly from 0 at the first to `rate` at the last."""
  if not 0 <= rate < 1:
    raise ValueError(f"drop_path_rate must lie in [0, 1), not {rate}")
  return tuple(rate * layer / max(depth - 1, 1) for layer in range(depth))
