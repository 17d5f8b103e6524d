"""ResNet (arXiv:1512.03385), ResNet-D (arXiv:1812.01187) and ResNet-RS (arXiv:2103.07579).

Bottleneck blocks with PyTorch's padding, pooling and norms, for published weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.nn.drop import DropPath, drop_path_rates
from vit_jax_zoo.nn.init import kaiming_normal
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.ops.sharding import shard_batch


def pointwise_conv(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "1 1 c f"],
  window_strides: tuple[int, int],
  padding: Any,
  *,
  precision: Any = None,
  **unused: Any,
) -> Float[Array, "b h2 w2 f"]:
  """A 1x1 `conv_general_dilated` for `nn.Conv`, whose kernel gradient is a matrix product.

  XLA on CPUs computes that gradient as a convolution with a window of the map's size, which is two
  to ten times slower.
  """
  del padding, unused  # no effect for a 1x1 kernel without groups
  return _convolve(x, kernel, tuple(window_strides), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any) -> Any:
  return jax.lax.conv_general_dilated(
    x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
  )


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any) -> Any:
  return _convolve(x, kernel, strides, precision), (x, kernel)


def _backward(strides: tuple[int, int], precision: Any, kept: Any, gradient: jax.Array) -> Any:
  x, kernel = kept
  convolve = functools.partial(_convolve.fun, strides=strides, precision=precision)
  (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
  used = x[:, :: strides[0], :: strides[1]]
  # XLA on CPUs transposes the left factor, slowly; make it the narrower one.
  if used.shape[-1] > gradient.shape[-1]:
    of_kernel = jnp.einsum("bhwf,bhwc->fc", gradient, used, precision=precision).T
  else:
    of_kernel = jnp.einsum("bhwc,bhwf->cf", used, gradient, precision=precision)
  return of_x, of_kernel[None, None]


_convolve.defvjp(_forward, _backward)


# arXiv:1512.03385, Table 1; from 200 on, ResNet-RS (arXiv:2103.07579).
RESNET_BLOCKS = {
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
  270: (4, 29, 53, 4),
  350: (4, 36, 72, 4),
  420: (4, 44, 87, 4),
}
"""Network depth -> blocks in each of the four stages."""

STAGES = ("c2", "c3", "c4", "c5")  # names of the stage outputs; `c<i>` has stride 2^i
STEMS = ("conv7", "deep", "deep_strided", "tiered", "conv3")
SHORTCUTS = ("conv", "avg_pool")
ACTIVATIONS = {"relu": nn.relu, "silu": nn.silu}


def average_pool(
  x: Float[Array, "b h w c"], side: int, stride: int, padding: str | int
) -> Float[Array, "b h2 w2 c"]:
  """Returns the means of windows without padding; `nn.avg_pool` breaks with `jax_enable_x64`."""
  pads = padding if isinstance(padding, str) else ((padding, padding),) * 2
  sizes, ones = ((side, side), (stride, stride)), jnp.ones((1, *x.shape[1:3], 1), x.dtype)
  total, count = (nn.pool(y, 0.0, jax.lax.add, *sizes, pads) for y in (x, ones))
  return total / count


class ConvNorm(nn.Module):
  """Convolution without bias, norm, activation."""

  features: int  # output channels
  kernel_size: int  # odd
  norm: Callable[..., nn.Module]  # creates the norm
  stride: int = 1
  dilation: int = 1
  activation: str | None = "relu"  # a key of `ACTIVATIONS`, or None
  scale_init: Initializer = nn.initializers.ones  # of the norm
  # computes gradients of 1x1 kernels as matrix products: faster on CPUs, with another rounding
  pointwise_products: bool = False
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
    """Returns a map of ceil(side / stride), with symmetric padding."""
    pad = self.dilation * (self.kernel_size // 2)
    as_product = self.pointwise_products and self.kernel_size == 1
    options = {"use_bias": False, "kernel_init": kaiming_normal, "dtype": self.dtype}
    options["kernel_dilation"] = (self.dilation, self.dilation)
    options["conv_general_dilated"] = pointwise_conv if as_product else None
    window = ((self.kernel_size,) * 2, (self.stride,) * 2, ((pad, pad), (pad, pad)))
    x = nn.Conv(self.features, *window, **options, name="conv")(x)
    x = self.norm(scale_init=self.scale_init, name="norm")(x, train=train)
    return x if self.activation is None else ACTIVATIONS[self.activation](x)


class SqueezeExcite(nn.Module):
  """Squeeze-and-excitation: channel gates from the map's mean. Hu et al., arXiv:1709.01507."""

  ratio: float = 0.25  # hidden width / channels
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns `x` times the gates."""
    channels, wide = x.shape[-1], jnp.promote_types(x.dtype, jnp.float32)
    pooled = jnp.mean(x, (1, 2), keepdims=True, dtype=wide).astype(x.dtype)
    hidden = nn.Dense(max(1, int(channels * self.ratio)), dtype=self.dtype, name="reduce")(pooled)
    gates = nn.Dense(channels, dtype=self.dtype, name="expand")(nn.relu(hidden))
    return x * nn.sigmoid(gates)


class Stem(nn.Module):
  """First layers, with total stride 4 ("conv3": 1), most with a max-pool."""

  kind: str  # one of `STEMS`
  width: int  # output channels
  norm: Callable[..., nn.Module]
  activation: str = "relu"
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
    """Returns the feature map."""
    half, whole = self.width // 2, self.width
    layers = {  # channels, side of the kernel, stride
      "conv7": ((whole, 7, 2),),
      "deep": ((half, 3, 2), (half, 3, 1), (whole, 3, 1)),  # ResNet-D
      "deep_strided": ((half, 3, 2), (half, 3, 1), (whole, 3, 1), (whole, 3, 2)),  # ResNet-RS
      "tiered": ((3 * whole // 8, 3, 2), (half, 3, 1), (whole, 3, 1)),  # timm
      "conv3": ((whole, 3, 1),),  # for tiny images
    }[self.kind]
    for index, (features, size, stride) in enumerate(layers, start=1):
      fields = {"activation": self.activation, "dtype": self.dtype, "name": f"conv{index}"}
      x = ConvNorm(features, size, self.norm, stride, **fields)(x, train=train)
    if self.kind not in ("deep_strided", "conv3"):
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    self.sow("intermediates", "output", x)
    return x


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 to four times the width, plus the shortcut; activation after the sum."""

  width: int  # channels of the first two convolutions
  norm: Callable[..., nn.Module]
  stride: int = 1  # in the 3x3 convolution (torchvision, timm) unless `stride_in_1x1`
  dilation: int = 1  # of the 3x3 convolution
  # if the shape changes: "conv" (strided 1x1), or "avg_pool" (ResNet-D: 2x2 average pooling, 1x1)
  shortcut: str = "conv"
  se_ratio: float = 0.0  # of squeeze-and-excitation before the sum; 0: none
  drop_path_rate: float = 0.0
  activation: str = "relu"
  stride_in_1x1: bool = False  # as in the 2015 paper and Caffe's weights
  pointwise_products: bool = False  # see `ConvNorm`
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
    """Returns a map of ceil(side / stride) with four times `width` channels."""
    first_stride, stride = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
    y = self._conv(self.width, 1, first_stride, name="conv1")(x, train=train)
    y = self.spatial(y, stride, train=train)
    # Starts as identity (arXiv:1706.02677, section 5.1).
    fields = {"activation": None, "scale_init": nn.initializers.zeros}
    y = self._conv(4 * self.width, 1, **fields, name="conv3")(y, train=train)
    if self.se_ratio:
      y = SqueezeExcite(self.se_ratio, self.dtype, name="se")(y)
    y = DropPath(name="drop_path")(y, self.drop_path_rate, train=train)
    y = ACTIVATIONS[self.activation](y + self._skip(x, train=train))
    self.sow("intermediates", "output", y)
    return y

  def spatial(self, x: Float[Array, "b h w c"], stride: int, *, train: bool) -> Array:
    """Applies the 3x3 convolution, which subclasses may replace; returns [b h2 w2 c]."""
    return self._conv(self.width, 3, stride, dilation=self.dilation, name="conv2")(x, train=train)

  def _skip(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
    features, stride = 4 * self.width, self.stride
    if x.shape[-1] == features and stride == 1:
      return x
    if self.shortcut == "avg_pool" and stride > 1:
      x, stride = average_pool(x, stride, stride, "SAME"), 1
    return self._conv(features, 1, stride, activation=None, name="shortcut")(x, train=train)

  def _conv(self, features: int, size: int, stride: int = 1, **fields: Any) -> ConvNorm:
    own = ("activation", "pointwise_products", "dtype")
    fields = {name: getattr(self, name) for name in own} | fields
    return ConvNorm(features, size, self.norm, stride, **fields)


class ResNet(nn.Module):
  """Four stages of bottleneck blocks, with the fields of `Bottleneck`; returns all outputs."""

  blocks: tuple[int, ...] = RESNET_BLOCKS[50]  # per stage
  widths: tuple[int, ...] = (64, 128, 256, 512)  # bottleneck channels; outputs: four times as many
  stem: str = "conv7"  # torchvision's weights; other kinds with their sources: `Stem`
  stem_width: int = 64  # output channels of the stem
  shortcut: str = "conv"  # torchvision's and timm's weights; "avg_pool": ResNet-D and -RS
  se_ratio: float = 0.0  # torchvision's weights; 0.25: ResNet-RS
  se_stages: tuple[str, ...] = STAGES  # stages with squeeze-and-excitation
  activation: str = "relu"
  norm: str = "batch_norm"  # a kind of `norm_factory`
  norm_momentum: float = 0.9  # of running averages; 0.9999 in arXiv:2102.08602, tables 3 to 5
  norm_epsilon: float = 1e-5
  # 32; 16, 8 or 4 replace strides of the last stages by dilation, as in torchvision: a stage's
  # first block has the dilation of the previous stage (DC5: 16)
  output_stride: int = 32
  stride_in_1x1: bool = False  # True: Caffe's weights, of FPT's official detectors too
  drop_path_rate: float = 0.0  # of the last block, linear from 0 (arXiv:2102.08602, appendix)
  # off for detectors, whose training curves are compared with the reference's step by step
  pointwise_products: bool = False
  dtype: Dtype = "float32"  # of the computation; parameters and statistics are float32

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"], *, train: bool = False) -> dict[str, Array]:
    """Returns "c2" to "c5" of normalized images, with strides 4, 8, 16, 32, or `output_stride`.

    The stem "conv3" has a quarter of these strides. With `train`, batch norms use batch statistics
    (and update "batch_stats", which must be mutable); stochastic depth uses the "dropout" stream.
    """
    return self.pyramid(images, train=train)

  def pyramid(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Returns the feature pyramid, for subclasses with a head."""
    self.check()
    make_norm = self._norm_factory()
    x = shard_batch(images.astype(self.dtype))
    stem = Stem(self.stem, self.stem_width, make_norm, self.activation, self.dtype, name="stem")
    x = stem(x, train=train)
    rates = iter(drop_path_rates(self.drop_path_rate, sum(self.blocks)))
    names = ("shortcut", "activation", "stride_in_1x1", "pointwise_products", "dtype")
    fields = {"norm": make_norm, **{name: getattr(self, name) for name in names}}
    features = {}
    for stage, width, strides in zip(STAGES, self.widths, self._strides(), strict=True):
      fields |= {"width": width, "se_ratio": self.se_ratio * (stage in self.se_stages)}
      for index, (stride, dilation) in enumerate(strides):
        fields |= {"stride": stride, "dilation": dilation, "drop_path_rate": next(rates)}
        block = self.block(stage, index, **fields, name=f"{stage}_block{index}")
        x = shard_batch(block(x, train=train))
      features[stage] = x
    return features

  def block(self, stage: str, index: int, **fields: Any) -> nn.Module:
    """Returns block `index` of `stage`; subclasses may return other classes."""
    del stage, index
    return Bottleneck(**fields)

  def _strides(self) -> list[list[tuple[int, int]]]:
    reached, dilation, stages = 4, 1, []
    for stage, count in enumerate(self.blocks):
      stride = 1 if stage == 0 else 2
      first_dilation = dilation
      if reached * stride > self.output_stride:
        dilation, stride = dilation * stride, 1
      reached *= stride
      stages.append([(stride, first_dilation)] + [(1, dilation)] * (count - 1))
    return stages

  def _norm_factory(self) -> Callable[..., nn.Module]:
    averages = {"momentum": self.norm_momentum, "epsilon": self.norm_epsilon}
    return norm_factory(self.norm, **averages, dtype=self.dtype)

  def check(self) -> None:
    """Raises ValueError for fields that are unknown or do not fit together."""
    for field, known in (("stem", STEMS), ("shortcut", SHORTCUTS), ("activation", ACTIVATIONS)):
      check_names(field, [getattr(self, field)], known)
    check_names("stage", self.se_stages, STAGES)
    for field in ("blocks", "widths"):
      if (count := len(getattr(self, field))) != len(STAGES):
        raise ValueError(f"{field}: {count} entries; expected four, for c2 to c5")
    check_positive(self, "blocks", "widths", "stem_width")
    if self.output_stride not in (4, 8, 16, 32):
      raise ValueError(f"output_stride: {self.output_stride}; expected 4, 8, 16 or 32")
