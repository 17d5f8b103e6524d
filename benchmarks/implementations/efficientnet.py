"""EfficientNet (arXiv:1905.11946) in Linen, for `efficientnet_tpu.py` alone.

Mobile inverted bottlenecks with squeeze and excitation, scaled as in the paper. Stochastic depth
and dropout are omitted; their cost is negligible.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_STAGES = (
  # B0 (table 1): expansion, channels, blocks, stride, kernel
  (1, 16, 1, 1, 3),
  (6, 24, 2, 2, 3),
  (6, 40, 2, 2, 5),
  (6, 80, 3, 2, 3),
  (6, 112, 3, 1, 5),
  (6, 192, 4, 2, 5),
  (6, 320, 1, 1, 3),
)

SIZES = {
  # From the official code: width, depth, image size in pixels
  "efficientnet_b0": (1.0, 1.0, 224),
  "efficientnet_b6": (1.8, 2.6, 528),
  "efficientnet_b7": (2.0, 3.1, 600),
}


def scale_channels(channels: int, width: float) -> int:
  """Returns the scaled channels, rounded to a multiple of 8 but not below 90 % of them."""
  scaled = channels * width
  rounded = max(8, int(scaled + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * scaled else rounded


class EfficientNet(nn.Module):
  """Images [b h w 3] to logits [b num_classes]."""

  width: float  # channel multiplier
  depth: float  # multiplier of the blocks per stage
  num_classes: int = 1000
  dtype: Any = jnp.float32  # of the computation; parameters and logits are float32

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w 3"], *, train: bool = False
  ) -> Float[Array, "b n"]:
    """Returns the logits."""
    x = self._conv(images, scale_channels(32, self.width), 3, 2, train=train)
    for expansion, channels, blocks, stride, kernel in _STAGES:
      channels = scale_channels(channels, self.width)
      for block in range(math.ceil(blocks * self.depth)):
        x = self._block(x, expansion, channels, stride if block == 0 else 1, kernel, train=train)
    x = self._conv(x, scale_channels(1280, self.width), 1, 1, train=train)
    return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)).astype(jnp.float32))

  def _block(
    self, x: Array, expansion: int, channels: int, stride: int, kernel: int, *, train: bool
  ) -> Array:
    narrow, wide = x.shape[-1], x.shape[-1] * expansion
    out = self._conv(x, wide, 1, 1, train=train) if expansion > 1 else x
    out = self._conv(out, wide, kernel, stride, train=train, groups=wide)
    gate = nn.swish(nn.Dense(narrow // 4, dtype=self.dtype)(out.mean(axis=(1, 2))))
    out = out * nn.sigmoid(nn.Dense(wide, dtype=self.dtype)(gate))[:, None, None]
    out = self._conv(out, channels, 1, 1, train=train, act=False)
    return out + x if out.shape == x.shape else out

  def _conv(
    self,
    x: Array,
    channels: int,
    kernel: int,
    stride: int,
    *,
    train: bool,
    groups: int = 1,
    act: bool = True,
  ) -> Array:
    x = nn.Conv(
      channels,
      (kernel, kernel),
      stride,
      feature_group_count=groups,
      use_bias=False,
      dtype=self.dtype,
    )(x)
    x = nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=self.dtype)(x)
    return nn.swish(x) if act else x


def create(name: str, **fields: Any) -> EfficientNet:
  """Returns the EfficientNet of a name in `SIZES`."""
  width, depth, _ = SIZES[name]
  return EfficientNet(width, depth, **fields)
