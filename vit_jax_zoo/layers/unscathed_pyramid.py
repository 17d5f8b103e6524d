"""The unscathed feature pyramid of semantic segmentation: levels that differ in reach, not in size.

Zhang et al., arXiv:2007.09451, section 4.2, with the global convolutions of Peng et al., "Large
Kernel Matters", arXiv:1703.02719. The authors released no code of it; kernels of 1, 7, 15 and 31
and 256 channels are the paper's as far as we know (its text could not be checked here).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.layers.batch_norm import norm_factory
from vit_jax_zoo.ops.sharding import shard_batch

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class GlobalConvolution(nn.Module):
  """A large kernel as a sum of two products: a column after a row, and a row after a column.

  Attributes:
    features: output channels.
    kernel_size: its side, odd; 1 is a single 1x1 convolution.
    dtype: of the computation.
  """

  features: int
  kernel_size: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Returns a map of the same size."""
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise ValueError(f"kernels of the pyramid must be odd, not {self.kernel_size}")
    if self.kernel_size == 1:
      return self._conv((1, 1), "conv")(x)
    column, row = (self.kernel_size, 1), (1, self.kernel_size)
    one = self._conv(row, "column_row")(self._conv(column, "column")(x))
    return one + self._conv(column, "row_column")(self._conv(row, "row")(x))

  def _conv(self, size: tuple[int, int], name: str) -> nn.Module:
    padding = tuple((side // 2, side // 2) for side in size)
    return nn.Conv(
      self.features, size, padding=padding, kernel_init=_he_normal, dtype=self.dtype, name=name
    )


class UnscathedPyramid(nn.Module):
  """As many levels as there are kernels, each of the size of the map that they are made of.

  Attributes:
    width: channels of each level.
    kernel_sizes: of the levels' global convolutions, from the finest level to the coarsest.
    norm: behind them, a name that `norm_factory` knows.
    dtype: of the computation.
  """

  width: int = 256
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)
  norm: str = "batch_norm"
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> tuple[Float[Array, "b h w d"], ...]:
    """Returns the levels, the one of the smallest reach first."""
    make_norm = norm_factory(self.norm, dtype=self.dtype)
    levels = []
    for index, size in enumerate(self.kernel_sizes):
      level = GlobalConvolution(self.width, size, self.dtype, name=f"branch_{index}")(x)
      level = make_norm(name=f"norm_{index}")(level, train=train)
      levels.append(shard_batch(jnp.maximum(level, 0)))
    return tuple(levels)
