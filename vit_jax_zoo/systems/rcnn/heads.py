"""Neck and heads of R-CNN: feature pyramid, region proposals, boxes and masks.

Inputs of box and mask heads are crops of one level of the pyramid, or (adaptive) of all levels,
finest first. Each of several levels has its own first layer, `first_<level>`, and the second
layer's input is their elementwise maximum (Liu et al., arXiv:1803.01534, section 3.2; FPT's code).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_normal, kaiming_uniform
from vit_jax_zoo.nn.norm import conv_norm, optional_norm
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.ops.sharding import shard_batch

Pyramid: TypeAlias = Sequence[Float[Array, "b _ _ _"]]  # finest first
Crops: TypeAlias = Sequence[Float[Array, "b r s s c"]]
Maps: TypeAlias = Float[Array, "n h w c"]  # with every box as an example


class FeaturePyramid(nn.Module):
  """Feature pyramid network, arXiv:1612.03144, section 3. Levels are numbered from the finest."""

  width: int = 256
  top_down: bool = True  # adds the upsampled coarser level to each level
  norm: str = "none"  # norm of all convolutions, see `conv_norm`
  drop_block_rate: float = 0.0  # of the outputs in training; arXiv:1810.12890
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, pyramid: Pyramid, *, train: bool = False) -> Pyramid:
    """Returns one map of `width` channels per level, fine to coarse, of the level's size."""
    inner: list[Array] = []
    for level, features in reversed(list(enumerate(pyramid))):
      x = conv_norm(self, f"lateral_{level}", features, self.width, 1, train=train)
      if self.top_down and inner:
        x = x + resize_nearest(inner[0], (x.shape[1], x.shape[2]))
      inner.insert(0, shard_batch(x))
    results = []
    for level, x in enumerate(inner):
      x = conv_norm(self, f"output_{level}", x, self.width, 3, train=train)
      drop = DropBlock(self.drop_block_rate, name=f"drop_block_{level}")
      results.append(shard_batch(drop(x, train=train)))
    return tuple(results)


class BottomUpPyramid(FeaturePyramid):
  """The pyramid without top-down path, the baseline of arXiv:2007.09451."""

  top_down: bool = False


class RegionProposalHead(nn.Module):
  """Objectness and box deltas of every anchor, with one set of weights (arXiv:1506.01497, 3.1)."""

  num_anchors: int  # anchors per position
  dtype: Dtype = "float32"  # dtype of the convolutions; outputs are float32

  @nn.compact
  def __call__(self, pyramid: Pyramid) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
    """Returns logits and deltas of all anchors, finest level first, in row-major order."""

    def conv(features: int, size: int, name: str) -> nn.Module:
      init = nn.initializers.normal(0.01)
      return nn.Conv(features, (size, size), kernel_init=init, dtype=self.dtype, name=name)

    hidden = conv(pyramid[0].shape[-1], 3, "conv")
    objectness = conv(self.num_anchors, 1, "objectness")
    deltas = conv(self.num_anchors * 4, 1, "deltas")
    batch, maps = len(pyramid[0]), [nn.relu(hidden(x)) for x in pyramid]
    logits = jnp.concatenate([objectness(x).reshape(batch, -1) for x in maps], axis=1)
    boxes = jnp.concatenate([deltas(x).reshape(batch, -1, 4) for x in maps], axis=1)
    return logits.astype(jnp.float32), boxes.astype(jnp.float32)


class _Head(nn.Module):
  norm: str = "none"  # norm of the convolutions, see `conv_norm`
  dtype: Dtype = "float32"

  def _convolve(self, name: str, x: Maps, features: int | None = None, *, train: bool) -> Array:
    features = features or x.shape[-1]
    return nn.relu(conv_norm(self, name, x, features, 3, train=train, kernel_init=kaiming_normal))

  def _apply(
    self, crops: Crops, layers: Sequence[tuple[Callable[..., Array], str]], *, train: bool
  ) -> Float[Array, "n ..."]:
    """Applies layers with the given names, with every box as an example."""
    inputs = [x.reshape(-1, *x.shape[2:]) for x in crops]
    if len(inputs) > 1:
      if not layers:
        raise ValueError(f"{self.name}: an adaptive head needs layers; expected num_convs > 0")
      (layer, _), *layers = layers
      firsts = [layer(f"first_{level}", x, train=train) for level, x in enumerate(inputs)]
      inputs = [jnp.max(jnp.stack(firsts), axis=0)]
    x = inputs[0]
    for layer, name in layers:
      x = layer(name, x, train=train)
    return x


class BoxHead(_Head):
  """Feature vector of each box: convolutions, if any, then dense layers.

  Default: no convolutions, two dense layers (Lin et al.; torchvision). FPT's official heads are
  adaptive with group norm: `roi_2mlp_head_gn_fptnet` is the default, `roi_Xconv1fc_gn_head_fptnet`
  has four convolutions and one dense layer.
  """

  num_convs: int = 0  # 3x3, with the pyramid's channels; 4 in `faster_rcnn_r50_fpt_official`
  num_dense: int = 2  # with the norm if there are no convolutions; 1 in `*_fpt_official`
  width: int = 1024  # channels of the dense layers

  @nn.compact
  def __call__(self, crops: Crops, *, train: bool = False) -> Float[Array, "b r f"]:
    check_positive(self, "width")
    check_not_negative(self, "num_convs", "num_dense")
    layers = [(self._convolve, f"conv_{i}") for i in range(self.num_convs)]
    layers += [(self._dense, f"dense_{i}") for i in range(self.num_dense)]
    return self._apply(crops, layers, train=train).reshape(*crops[0].shape[:2], -1)

  def _dense(self, name: str, x: Float[Array, "n *s c"], *, train: bool) -> Float[Array, "n f"]:
    layer = nn.Dense(self.width, kernel_init=kaiming_uniform, dtype=self.dtype, name=name)
    x = layer(x.reshape(len(x), -1))
    return nn.relu(x if self.num_convs else optional_norm(self, name, x, train=train))


class BoxOutputs(nn.Module):
  """Class logits and box deltas."""

  num_classes: int  # number of classes without the background
  dtype: Dtype = "float32"  # dtype of the products; outputs are float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b r f"]
  ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
    """Returns logits and deltas per class; the last class is the background."""

    def dense(features: int, deviation: float, name: str) -> Array:
      init = nn.initializers.normal(deviation)
      layer = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)
      return layer(x).astype(jnp.float32)

    logits = dense(self.num_classes + 1, 0.01, "logits")
    return logits, dense(4 * logits.shape[-1], 0.001, "deltas").reshape(*logits.shape, 4)


class MaskHead(_Head):
  """One mask per class for each box. He et al., arXiv:1703.06870, figure 4, right.

  Convolutions, a transposed convolution to twice the size, and a 1x1 convolution to the classes.
  """

  num_classes: int = 80  # without the background, which has a mask, the last, in published weights
  num_convs: int = 4  # figure 4, right, and in all published weights
  width: int = 256
  # adds a class-agnostic mask from a dense layer over the whole box (arXiv:1803.01534, section 3.3;
  # FPT's official `v1up4convs_gn_adp_ff`). Its convolutions, `fused_conv_0` and (half as wide)
  # `fused_conv_1`, branch off before the last one.
  fused: bool = False

  @nn.compact
  def __call__(self, crops: Crops, *, train: bool = False) -> Float[Array, "b r m m k"]:
    """Returns float32 mask logits of twice the input size."""
    check_positive(self, "width")
    check_not_negative(self, "num_convs")
    conv = functools.partial(self._convolve, features=self.width)
    layers = [(conv, f"conv_{i}") for i in range(self.num_convs)]
    shared = max(self.num_convs - 1, int(len(crops) > 1))  # with the fused branch
    x = last = self._apply(crops, layers[:shared], train=train)
    for layer, name in layers[shared:]:
      last = layer(name, last, train=train)
    upsampled = nn.relu(TransposedConv(self.width, self.dtype, name="upsample")(last))
    self.sow("intermediates", "upsampled", upsampled)
    fields = {"kernel_init": kaiming_normal, "dtype": self.dtype, "name": "logits"}
    logits = nn.Conv(self.num_classes + 1, (1, 1), **fields)(upsampled).astype(jnp.float32)
    if self.fused:
      logits = logits + self._fused_mask(x, train=train).astype(jnp.float32)
    return logits.reshape(*crops[0].shape[:2], *logits.shape[1:])

  def _fused_mask(self, x: Maps, *, train: bool) -> Float[Array, "n m m 1"]:
    side = 2 * x.shape[1]
    x = self._convolve("fused_conv_0", x, self.width, train=train)
    x = self._convolve("fused_conv_1", x, self.width // 2, train=train)
    dense = nn.Dense(side * side, kernel_init=kaiming_uniform, dtype=self.dtype, name="fused_dense")
    x = nn.relu(dense(x.reshape(len(x), -1)))  # as in the official code
    self.sow("intermediates", "fused", x)
    return x.reshape(len(x), side, side, 1)


class TransposedConv(nn.Module):
  """A 2x2 transposed convolution with stride 2."""

  features: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j f"]:
    batch, height, width, channels = x.shape
    kernel = self.param("kernel", kaiming_normal, (2, 2, channels, self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = jnp.einsum("nhwc,ijcf->nhiwjf", x, kernel)
    return y.reshape(batch, 2 * height, 2 * width, -1) + bias.reshape(1, 1, 1, -1)
