"""A convolution of several maps at once that never lays them side by side."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from vit_jax_zoo.nn.init import pytorch_uniform
from vit_jax_zoo.systems.ttsr.upsample import upsample_bicubic


class JointConv(nn.Module):
  """`Conv` of maps side by side, without laying them there: the sum of a convolution of each.

  At full size the maps laid together were the largest array of all. Each map is enlarged when its
  turn comes, so that there is one of them at a time. Parameters are those of a `Conv` of the
  concatenated maps.

  Attributes:
    features: output channels.
    dtype: of the computation; parts are summed in float32.
  """

  features: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, *maps: Float[Array, "b ..."], factors: Sequence[int] | None = None
  ) -> Float[Array, "b h w f"]:
    """Convolves maps, 3x3; with `factors`, those above 1 enlarge theirs, before a ReLU."""
    widths = [x.shape[-1] for x in maps]
    init = pytorch_uniform(9 * sum(widths))
    kernel = self.param("kernel", init, (3, 3, sum(widths), self.features), "float32")
    bias = self.param("bias", init, (self.features,), "float32")
    wide = jnp.promote_types(self.dtype, jnp.float32)
    total, first = jnp.asarray(bias, wide).reshape(1, 1, 1, -1), 0
    for x, width, factor in zip(maps, widths, factors or [1] * len(maps), strict=True):
      x, total = lax.optimization_barrier((x, total))  # one after the other
      part = jnp.asarray(kernel[:, :, first : first + width])
      total = total + _convolved(_enlarged(x, factor), part, self.dtype).astype(wide)
      first += width
    return total.astype(self.dtype)


def _convolved(
  x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"], dtype: Dtype
) -> Float[Array, "b h w f"]:
  numbers = ("NHWC", "HWIO", "NHWC")
  pads = ((1, 1), (1, 1))
  return lax.conv_general_dilated(
    x.astype(dtype), kernel.astype(dtype), (1, 1), pads, dimension_numbers=numbers
  )


def _enlarged(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hf wf c"]:
  """Enlarges bicubically, if at all, and applies a ReLU then.

  In the paper's code a 1x1 convolution stands between the two. Here it has been before: both are
  linear and a bicubic kernel's weights sum to one, so the order does not matter to the result, but
  it saves all but one in `factor`^2 products.
  """
  return x if factor == 1 else nn.relu(upsample_bicubic(x, factor))
