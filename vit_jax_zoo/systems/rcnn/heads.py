"""Neck and heads of R-CNN: feature pyramid, region proposals, boxes and masks.

Box and mask heads pool a box either from one level of the pyramid (arXiv:1612.03144,
arXiv:1703.06870), or, adaptive, from all levels: each level has its own first layer, whose outputs
are combined by an elementwise maximum (Liu et al., arXiv:1803.01534, section 3.2; the official code
of FPT). Their input is a sequence of [b r s s c], one per pooled level, finest first.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_normal, kaiming_uniform
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.ops.sharding import shard_batch


class FeaturePyramid(nn.Module):
  """Feature pyramid network: 1x1 convolutions, top-down path, 3x3 convolutions.

  Lin et al., arXiv:1612.03144, section 3. Levels are numbered from the finest, 0: `lateral_0`,
  `output_0`.

  Attributes:
    width: output channels.
    top_down: adds the upsampled coarser level to each level.
    norm: "none" (convolutions then have a bias) or a name of `norm_factory`.
    drop_block_rate: DropBlock rate on the outputs in training. Ghiasi et al., arXiv:1810.12890.
    drop_block_size: side of DropBlock's squares.
    dtype: dtype of the computation.
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
    """Returns one map of `width` channels per level, of the level's size.

    Args:
      pyramid: maps from fine to coarse.
      train: training mode of norms and DropBlock ("dropout" stream).
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


class BottomUpPyramid(FeaturePyramid):
  """The pyramid without top-down path, the baseline of arXiv:2007.09451."""

  top_down: bool = False


class RegionProposalHead(nn.Module):
  """Objectness and box deltas of every anchor; shared by all levels.

  Ren et al., arXiv:1506.01497, section 3.1.

  Attributes:
    num_anchors: anchors per position.
    dtype: dtype of the convolutions; outputs are float32.
  """

  num_anchors: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, pyramid: Sequence[Float[Array, "b _ _ d"]]
  ) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
    """Returns logits and deltas of all anchors, finest level first, in row-major order."""
    init = nn.initializers.normal(0.01)

    def conv(features: int, size: int, name: str) -> nn.Module:
      return nn.Conv(features, (size, size), kernel_init=init, dtype=self.dtype, name=name)

    hidden = conv(pyramid[0].shape[-1], 3, "conv")
    objectness, deltas = (
      conv(self.num_anchors, 1, "objectness"),
      conv(self.num_anchors * 4, 1, "deltas"),
    )
    batch = len(pyramid[0])
    logits, boxes = [], []
    for features in pyramid:
      x = nn.relu(hidden(features))
      logits.append(objectness(x).reshape(batch, -1))
      boxes.append(deltas(x).reshape(batch, -1, 4))
    return (
      jnp.concatenate(logits, axis=1).astype(jnp.float32),
      jnp.concatenate(boxes, axis=1).astype(jnp.float32),
    )


class _Head(nn.Module):
  """Layers of box and mask heads.

  Attributes:
    norm: "none" (convolutions then have a bias) or a name of `norm_factory`.
    dtype: dtype of the computation.
  """

  norm: str = "none"
  dtype: Dtype = "float32"

  def _convolve(
    self, name: str, x: Float[Array, "n h w c"], features: int, *, train: bool
  ) -> Float[Array, "n h w f"]:
    x = nn.Conv(
      features,
      (3, 3),
      use_bias=self.norm == "none",
      kernel_init=kaiming_normal,
      dtype=self.dtype,
      name=name,
    )(x)
    return nn.relu(self._normalized(name, x, train=train))

  def _normalized(self, name: str, x: Float[Array, "n *s f"], *, train: bool) -> Array:
    if self.norm == "none":
      return x
    return norm_factory(self.norm, dtype=self.dtype)(name=f"{name}_norm")(x, train=train)


def _each_box(crops: Float[Array, "b r s s c"]) -> Float[Array, "n s s c"]:
  """Makes every box an example; norms are computed per box."""
  return crops.reshape(-1, *crops.shape[2:])


class BoxHead(_Head):
  """Feature vector of each box: convolutions, if any, then dense layers.

  Default: no convolutions, two dense layers (Lin et al.; torchvision). FPT's official heads are
  adaptive with group norm: `roi_2mlp_head_gn_fptnet` is the default, `roi_Xconv1fc_gn_head_fptnet`
  has four convolutions and one dense layer. Adaptive first layers are named `first_<level>`.

  Attributes:
    num_convs: number of 3x3 convolutions, with the pyramid's channels.
    num_dense: number of dense layers; they have the norm if there are no convolutions.
    width: channels of the dense layers.
  """

  num_convs: int = 0
  num_dense: int = 2
  width: int = 1024

  @nn.compact
  def __call__(
    self, crops: Sequence[Float[Array, "b r s s c"]], *, train: bool = False
  ) -> Float[Array, "b r f"]:
    """Returns the feature vectors."""
    check_positive(self, "width")
    check_not_negative(self, "num_convs", "num_dense")
    batch, boxes = crops[0].shape[:2]
    adaptive = len(crops) > 1
    if adaptive and not self.num_convs + self.num_dense:
      raise ValueError("box_head: an adaptive head needs num_convs or num_dense")
    inputs = [_each_box(x) for x in crops]
    convs = [f"conv_{i}" for i in range(self.num_convs)]
    denses = [f"dense_{i}" for i in range(self.num_dense)]
    if not adaptive:
      x = inputs[0]
    else:
      layer = self._conv if convs else self._dense
      (convs if convs else denses).pop(0)
      seen = [layer(f"first_{level}", x, train=train) for level, x in enumerate(inputs)]
      x = jnp.max(jnp.stack(seen), axis=0)
    for name in convs:
      x = self._conv(name, x, train=train)
    for name in denses:
      x = self._dense(name, x, train=train)
    return x.reshape(batch, boxes, -1)

  def _conv(self, name: str, x: Float[Array, "n s s c"], *, train: bool) -> Array:
    return self._convolve(name, x, x.shape[-1], train=train)

  def _dense(self, name: str, x: Float[Array, "n *s c"], *, train: bool) -> Float[Array, "n f"]:
    layer = nn.Dense(self.width, kernel_init=kaiming_uniform, dtype=self.dtype, name=name)
    x = layer(x.reshape(len(x), -1))
    return nn.relu(x if self.num_convs else self._normalized(name, x, train=train))


class BoxOutputs(nn.Module):
  """Class logits and box deltas.

  Attributes:
    num_classes: number of classes without the background.
    dtype: dtype of the products; outputs are float32.
  """

  num_classes: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b r f"]
  ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
    """Returns logits and deltas per class; the last class is the background."""
    count = self.num_classes + 1

    def dense(features: int, deviation: float, name: str) -> Array:
      init = nn.initializers.normal(deviation)
      return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)(x)

    logits = dense(count, 0.01, "logits").astype(jnp.float32)
    deltas = dense(4 * count, 0.001, "deltas").astype(jnp.float32)
    return logits, deltas.reshape(*deltas.shape[:2], count, 4)


class MaskHead(_Head):
  """One mask per class for each box. He et al., arXiv:1703.06870, figure 4, right.

  Convolutions, a transposed convolution to twice the size, and a 1x1 convolution to the classes.

  Attributes:
    num_classes: number of classes without the background. The background has a mask, the last, as
      in published weights.
    num_convs: number of convolutions.
    width: channels of the convolutions.
    fused: adds a class-agnostic mask from a dense layer over the whole box (arXiv:1803.01534,
      section 3.3; FPT's official `v1up4convs_gn_adp_ff`). Its convolutions, `fused_conv_0` and
      (half as wide) `fused_conv_1`, branch off before the last one.
  """

  num_classes: int = 80
  num_convs: int = 4
  width: int = 256
  fused: bool = False

  @nn.compact
  def __call__(
    self, crops: Sequence[Float[Array, "b r s s c"]], *, train: bool = False
  ) -> Float[Array, "b r m m k"]:
    """Returns float32 mask logits of twice the input size."""
    check_positive(self, "width")
    check_not_negative(self, "num_convs")
    if len(crops) > 1 and not self.num_convs:
      raise ValueError("mask_head: an adaptive head needs num_convs > 0")
    batch, boxes = crops[0].shape[:2]
    inputs = [_each_box(x) for x in crops]
    names = [f"conv_{i}" for i in range(self.num_convs)]
    if len(crops) == 1:
      x = inputs[0]
    else:
      names.pop(0)
      seen = [
        self._convolve(f"first_{level}", x, self.width, train=train)
        for level, x in enumerate(inputs)
      ]
      x = jnp.max(jnp.stack(seen), axis=0)
    for name in names[:-1]:
      x = self._convolve(name, x, self.width, train=train)
    last = self._convolve(names[-1], x, self.width, train=train) if names else x
    upsampled = nn.relu(Doubling(self.width, self.dtype, name="upsample")(last))
    self.sow("intermediates", "upsampled", upsampled)
    init = kaiming_normal
    head = nn.Conv(self.num_classes + 1, (1, 1), kernel_init=init, dtype=self.dtype, name="logits")
    logits = head(upsampled).astype(jnp.float32)
    if self.fused:
      logits = logits + self._whole(x, train=train).astype(jnp.float32)
    return logits.reshape(batch, boxes, *logits.shape[1:])

  def _whole(self, x: Float[Array, "n s s c"], *, train: bool) -> Float[Array, "n m m 1"]:
    """The class-agnostic mask; non-negative, as in the official code."""
    side = 2 * x.shape[1]
    x = self._convolve("fused_conv_0", x, self.width, train=train)
    x = self._convolve("fused_conv_1", x, self.width // 2, train=train)
    dense = nn.Dense(side * side, kernel_init=kaiming_uniform, dtype=self.dtype, name="fused_dense")
    x = nn.relu(dense(x.reshape(len(x), -1)))
    self.sow("intermediates", "fused", x)
    return x.reshape(len(x), side, side, 1)


class Doubling(nn.Module):
  """A 2x2 transposed convolution with stride 2.

  Attributes:
    features: output channels.
    dtype: dtype of the product.
  """

  features: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j f"]:
    """Returns a map of twice the size."""
    batch, height, width, channels = x.shape
    kernel = self.param("kernel", kaiming_normal, (2, 2, channels, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = jnp.einsum("nhwc,ijcf->nhiwjf", x, kernel)
    return y.reshape(batch, 2 * height, 2 * width, -1) + bias.reshape(1, 1, 1, -1)
