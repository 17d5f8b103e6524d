"""ResNet of a hybrid ViT: Big Transfer, arXiv:1912.11370, section 3.1, as in vision_transformer.

TensorFlow's SAME padding: for an even side, one more at the bottom and right.
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
  """A square convolution without bias, with weight standardization (arXiv:1903.10520) in float32.

  Mean and biased variance are over height, width and input channels. `variance_epsilon` and
  `std_epsilon` are 0 and 1e-5 in vision_transformer, 1e-8 and 0 in timm.
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
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(kernel**2, axis=(0, 1, 2), keepdims=True)
    kernel = kernel / (jnp.sqrt(variance + self.variance_epsilon) + self.std_epsilon)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


class BottleneckUnit(nn.Module):
  """1x1, 3x3 with the stride, 1x1 to four times the width; ReLU after the sum with the shortcut."""

  width: int
  stride: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 f"], None]:
    x = shortcut = shard_batch(x)
    if x.shape[-1] != 4 * self.width or self.stride != 1:
      shortcut = self.conv(4 * self.width, 1, self.stride, name="shortcut_conv")(x)
      shortcut = self.norm(name="shortcut_norm")(shortcut)
    y = nn.relu(self.norm(name="norm_1")(self.conv(self.width, 1, name="conv_1")(x)))
    y = self.conv(self.width, 3, self.stride, name="conv_2")(y)
    y = nn.relu(self.norm(name="norm_2")(y))
    y = self.conv(4 * self.width, 1, name="conv_3")(y)
    y = nn.relu(shortcut + self.norm(name="norm_3", scale_init=nn.initializers.zeros)(y))
    self.sow("intermediates", "output", y)
    return y, None


def total_stride(stage_sizes: Sequence[int]) -> int:
  """Returns the stride of the output in pixels."""
  return 4 * 2 ** max(len(stage_sizes) - 1, 0)


class StandardizedResNet(nn.Module):
  """7x7 stride-2 root with max-pool, then stages of bottleneck units.

  The units of a stage after the first, `stage_0_unit_0`, are equal. Scanned, since convolutions
  compile slowly for TPUs, they are in `stage_0_units/...` with a leading axis; unrolled, or if
  there is only one, in `stage_0_unit_1/...`. `weights.key_map` converts.
  """

  stage_sizes: tuple[int, ...]  # units in each stage; (): only the root, with stride 4
  width: int = 64  # channels of the root; stage i has width * 2^i and returns four times that
  group_norm_epsilon: float = 1e-6  # 1e-6 in vision_transformer, 1e-5 in timm
  std_epsilon: float = 1e-5  # see `StandardizedConv`, as for `variance_epsilon`
  variance_epsilon: float = 0.0
  remat: bool = False  # saves only the units' inputs for the backward pass
  scan_layers: bool = True  # scans the equal units of a stage
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    epsilons = {"std_epsilon": self.std_epsilon, "variance_epsilon": self.variance_epsilon}
    conv = functools.partial(StandardizedConv, **epsilons, dtype=self.dtype)
    epsilon = self.group_norm_epsilon
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=epsilon, dtype=self.dtype)
    x = norm(name="root_norm")(conv(self.width, 7, 2, name="root_conv")(images))
    x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
    for stage, size in enumerate(self.stage_sizes):
      name = f"stage_{stage}_unit"
      unit = functools.partial(BottleneckUnit, self.width * 2**stage, conv=conv, norm=norm)
      names = {"scanned_name": f"{name}s", "layer_name": f"{name}_{{}}"}
      make = functools.partial(Stack, remat="full" if self.remat else "none", **names)
      scan = self.scan_layers and size > 2
      for stack in (
        make(functools.partial(unit, stride=2 if stage else 1), 1, scan=False),
        make(functools.partial(unit, stride=1), size - 1, scan=scan, first=1),
      ):
        nn.share_scope(self, stack)
        x, _ = stack(x)
    return x
