"""ResNet of a hybrid ViT, with group norm and weight standardization.

Big Transfer, arXiv:1912.11370, section 3.1, as in vision_transformer: post-activation bottlenecks,
the stride in the 3x3 convolution, and TensorFlow's SAME padding (for an even side, one more at the
bottom and right).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.transformer import Stack
from vit_jax_zoo.ops.sharding import shard_batch


class StandardizedConv(nn.Module):
  """A convolution without bias with weight standardization, arXiv:1903.10520.

  w -> (w - mean) / (sqrt(var + variance_epsilon) + std_epsilon) for each output channel, over
  height, width and input channels, with the biased variance.

  Attributes:
    features: output channels.
    kernel_size: side of the square kernel.
    stride: along both sides.
    std_epsilon: added to the standard deviation; 1e-5 in vision_transformer, 0 in timm.
    variance_epsilon: added under the root; 0 in vision_transformer, 1e-8 in timm.
    dtype: of the convolution; the kernel is standardized in float32.
  """

  features: int
  kernel_size: int
  stride: int = 1
  std_epsilon: float = 1e-5
  variance_epsilon: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """Convolves with SAME padding; sides become ceil(side / stride)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(kernel**2, axis=(0, 1, 2), keepdims=True)
    kernel = kernel / (jnp.sqrt(variance + self.variance_epsilon) + self.std_epsilon)
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class BottleneckUnit(nn.Module):
  """1x1, 3x3 with the stride, 1x1 to four times the width; ReLU after the sum.

  Attributes:
    width: channels of the middle convolution.
    stride: of the unit.
    conv: makes a convolution from features, kernel size, stride and name.
    norm: makes a group norm.
  """

  width: int
  stride: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 f"], None]:
    """Returns the unit's output; the shortcut is projected if the shape changes."""
    x = shard_batch(x)
    shortcut = x
    if x.shape[-1] != 4 * self.width or self.stride != 1:
      shortcut = self.conv(4 * self.width, 1, self.stride, name="shortcut_conv")(x)
      shortcut = self.norm(name="shortcut_norm")(shortcut)
    y = self.conv(self.width, 1, name="conv_1")(x)
    y = nn.relu(self.norm(name="norm_1")(y))
    y = self.conv(self.width, 3, self.stride, name="conv_2")(y)
    y = nn.relu(self.norm(name="norm_2")(y))
    y = self.conv(4 * self.width, 1, name="conv_3")(y)
    y = self.norm(name="norm_3", scale_init=nn.initializers.zeros)(y)
    y = nn.relu(shortcut + y)
    self.sow("intermediates", "output", y)
    return y, None


def total_stride(stage_sizes: Sequence[int]) -> int:
  """Returns the stride of the output in pixels."""
  return 4 * 2 ** max(len(stage_sizes) - 1, 0)


class StandardizedResNet(nn.Module):
  """7x7 stride-2 root with max-pool, then stages of bottleneck units.

  The units of a stage after the first, `stage_0_unit_0`, are equal. Scanned, their parameters and
  intermediates are in `stage_0_units/...` with a leading axis, since convolutions compile slowly
  for TPUs. Unrolled, or if there is only one, they are in `stage_0_unit_1/...`.
  `weights.key_map` converts.

  Attributes:
    stage_sizes: units in each stage; (): only the root, with stride 4. Each stage after the first
      halves the sides.
    width: channels of the root; stage i has width * 2^i and returns four times that.
    group_norm_epsilon: 1e-6 in vision_transformer, 1e-5 in timm.
    std_epsilon: see `StandardizedConv`.
    variance_epsilon: see `StandardizedConv`.
    remat: saves only the units' inputs for the backward pass.
    scan_layers: scans the equal units of a stage.
    dtype: of the computation.
  """

  stage_sizes: tuple[int, ...]
  width: int = 64
  group_norm_epsilon: float = 1e-6
  std_epsilon: float = 1e-5
  variance_epsilon: float = 0.0
  remat: bool = False
  scan_layers: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """Returns the last stage's activations."""
    conv = functools.partial(
      StandardizedConv,
      std_epsilon=self.std_epsilon,
      variance_epsilon=self.variance_epsilon,
      dtype=self.dtype,
    )
    norm = functools.partial(
      nn.GroupNorm, num_groups=32, epsilon=self.group_norm_epsilon, dtype=self.dtype
    )
    x = conv(self.width, 7, 2, name="root_conv")(images)
    x = norm(name="root_norm")(x)
    x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
    for stage, size in enumerate(self.stage_sizes):
      x = self._stage(x, stage, size, functools.partial(BottleneckUnit, conv=conv, norm=norm))
    return x

  def _stage(
    self, x: Float[Array, "b h w c"], stage: int, size: int, unit: Callable[..., BottleneckUnit]
  ) -> Float[Array, "b h2 w2 f"]:
    width, name = self.width * 2**stage, f"stage_{stage}_unit"
    make = functools.partial(
      Stack,
      remat="full" if self.remat else "none",
      scanned_name=f"{name}s",
      layer_name=f"{name}_{{}}",
    )
    first = make(functools.partial(unit, width, 1 if stage == 0 else 2), 1, scan=False)
    scan = self.scan_layers and size > 2
    others = make(functools.partial(unit, width, 1), size - 1, scan=scan, first=1)
    for stack in (first, others):
      nn.share_scope(self, stack)
      x, _ = stack(x)
    return x
