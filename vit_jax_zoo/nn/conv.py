"""Convolution with PyTorch's initialization and padding."""

import jax
from flax import linen as nn
from flax.typing import Dtype, PrecisionLike
from jaxtyping import Array, Float

from vit_jax_zoo.nn.init import pytorch_uniform


class Conv(nn.Module):
  """An odd square convolution with a bias; sides become ceil(side / stride).

  Attributes:
    features: output channels.
    kernel_size: side of the kernel; half of it is padded with zeros on all sides.
    stride: the same along both sides.
    dtype: of the computation.
    precision: of the products on devices that have several.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  dtype: Dtype = "float32"
  precision: PrecisionLike = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """Convolves `x`."""
    pad = self.kernel_size // 2
    init = pytorch_uniform(self.kernel_size**2 * x.shape[-1])
    kernel = self.param(
      "kernel", init, (self.kernel_size, self.kernel_size, x.shape[-1], self.features), "float32"
    )
    bias = self.param("bias", init, (self.features,), "float32")
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=self.precision,
    )
    return x + bias.reshape(1, 1, 1, -1)
