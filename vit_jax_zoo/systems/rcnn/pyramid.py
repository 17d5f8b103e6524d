"""Feature pyramids made of a backbone's maps: with a way back from coarse to fine, or without."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_uniform
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.ops.sharding import shard_batch


class FeaturePyramid(nn.Module):
  """Brings all maps to one width: 1x1 convolutions, the way from coarse to fine, 3x3 convolutions.

  Lin et al., arXiv:1612.03144, section 3. Without the way back it is the plain bottom-up pyramid,
  in which no level knows of a coarser one: the baseline of arXiv:2007.09451.

  Levels are numbered from the finest, 0: `lateral_0`, `output_0`.

  Attributes:
    width: channels of the result, d.
    top_down: each level takes up the coarser one, enlarged to its size.
    norm: "none" (convolutions then have a bias) or a name that `norm_factory` knows.
    drop_block_rate: of the results, while training. Ghiasi et al., arXiv:1810.12890.
    drop_block_size: side of its squares.
    dtype: of the computation.
  """

  width: int = 256
  top_down: bool = True
  norm: str = "none"
  drop_block_rate: float = 0.0
  drop_block_size: int = 3
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, pyramid: Sequence[Float[Array, "b _ _ _"]], *, train: bool = False
  ) -> tuple[Float[Array, "b _ _ d"], ...]:
    """Returns one map of `width` channels for each level, of its size.

    Args:
      pyramid: from fine to coarse.
      train: for norms and DropBlock, which draws from the "dropout" stream.
    """
    inner: list[Array] = []
    for level, features in reversed(list(enumerate(pyramid))):
      x = self._conv(f"lateral_{level}", features, 1, train=train)
      if self.top_down and inner:
        x = x + resize_nearest(inner[0], (x.shape[1], x.shape[2]))
      inner.insert(0, shard_batch(x))
    results = []
    for level, x in enumerate(inner):
      x = self._conv(f"output_{level}", x, 3, train=train)
      drop = DropBlock(self.drop_block_rate, self.drop_block_size, name=f"drop_block_{level}")
      results.append(shard_batch(drop(x, train=train)))
    return tuple(results)

  def _conv(
    self, name: str, x: Float[Array, "b h w c"], size: int, *, train: bool
  ) -> Float[Array, "b h w d"]:
    x = nn.Conv(
      self.width,
      (size, size),
      use_bias=self.norm == "none",
      kernel_init=kaiming_uniform,
      dtype=self.dtype,
      name=name,
    )(x)
    if self.norm != "none":
      x = norm_factory(self.norm, dtype=self.dtype)(name=f"{name}_norm")(x, train=train)
    return x


def subsample(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
  """Returns every second row and column: the level beyond the coarsest, for large anchors."""
  return jnp.asarray(x[:, ::2, ::2])
