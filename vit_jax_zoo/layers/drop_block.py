"""DropBlock: dropout of whole squares of a feature map. Ghiasi et al., arXiv:1810.12890."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class DropBlock(nn.Module):
  """Sets squares of each channel's map to zero while training, and scales up what remains.

  Attributes:
    rate: expected share of a map that is dropped, in [0, 1), but for squares that overlap.
    block_size: side of the squares; smaller maps have squares of their own smaller side.
  """

  rate: float
  block_size: int = 3

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
    """Returns `x` with squares dropped, drawing from the "dropout" stream, if `train`.

    Raises:
      ValueError: the rate or the side of the squares is out of its range.
    """
    if not 0 <= self.rate < 1:
      raise ValueError(f"the rate of DropBlock must lie in [0, 1), but is {self.rate}")
    if self.block_size < 1:
      raise ValueError(f"block_size must be positive, not {self.block_size}")
    if not train or not self.rate:
      return x
    batch, height, width, channels = x.shape
    size = min(self.block_size, height, width)
    places = (height - size + 1, width - size + 1)  # where a square's first corner can lie
    share = self.rate * height * width / (size**2 * places[0] * places[1])  # Eq. 1
    corners = jax.random.bernoulli(
      self.make_rng("dropout"), min(share, 1.0), (batch, *places, channels)
    )
    pad = (size - 1, size - 1)
    dropped = nn.max_pool(corners.astype(jnp.float32), (size, size), padding=(pad, pad))
    keep = 1.0 - dropped
    scale = keep.size / jnp.maximum(jnp.sum(keep), 1.0)  # Algorithm 1, line 7
    return x * (keep * scale).astype(x.dtype)
