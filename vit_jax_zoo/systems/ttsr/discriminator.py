"""A convolutional critic of pictures: SRGAN's discriminator without norms, as TTSR has it."""

from collections.abc import Sequence

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.conv import Conv
from vit_jax_zoo.nn.init import pytorch_uniform

_SLOPE = 0.2


class Critic(nn.Module):
  """Tells how real a picture looks: pairs of convolutions, the second of each halves the sides.

  Without batch norms, since a gradient penalty looks at each picture by itself (arXiv:1704.00028,
  section 4). The first dense layer fixes the size of the pictures.

  Attributes:
    widths: channels of each pair.
    hidden: units of the dense layer before the last.
    dtype: of the computation.
  """

  widths: Sequence[int] = (32, 64, 128, 256, 512)
  hidden: int = 1024
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    """Returns a score for each picture in [-1, 1]; it has no unit and no bounds."""
    x = images
    for index, width in enumerate(self.widths, 1):
      for stride in (1, 2):
        conv = Conv(width, stride=stride, dtype=self.dtype, name=f"conv{index}_{stride}")
        x = nn.leaky_relu(conv(x), _SLOPE)
    x = x.reshape(x.shape[0], -1)
    x = nn.leaky_relu(_dense(self.hidden, x.shape[1], self.dtype, "hidden")(x), _SLOPE)
    return _dense(1, x.shape[1], self.dtype, "score")(x)[:, 0]


def _dense(features: int, inputs: int, dtype: Dtype, name: str) -> nn.Dense:
  """A dense layer that starts as PyTorch's does."""
  init = pytorch_uniform(inputs)
  return nn.Dense(features, kernel_init=init, bias_init=init, dtype=dtype, name=name)
