"""1x1 convolutions as matrix products."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float


class PointwiseConv(nn.Module):
  """A 1x1 convolution without bias: `nn.Conv`'s parameter and numbers, by a matrix product.

  XLA on a CPU computes the gradient of such a convolution's kernel as a convolution with a window
  as large as the map; a product over all positions takes about half of that.

  Attributes:
    features: output channels.
    stride: of the positions that are looked at, the same along both sides.
    kernel_init: of `kernel` [1 1 c f].
    dtype: of the computation.
  """

  features: int
  stride: int = 1
  kernel_init: Initializer = nn.initializers.lecun_normal()
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """Returns a map of ceil(side / stride)."""
    kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
    x = x[:, :: self.stride, :: self.stride] if self.stride > 1 else x
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
