"""The heads of R-CNN: what the network says of each place, each box, and each pixel of a box.

Two kinds of box and mask heads. The standard ones see a box in one level of the pyramid
(arXiv:1612.03144, arXiv:1703.06870). The adaptive ones see it in every level, each through a first
layer of its own, and take the larger answer, feature by feature (Liu et al., arXiv:1803.01534,
section 3.2); they are the ones of the official code of FPT.

Crops come as a sequence of [b r s s c]: one for each level that is seen, finest first.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.init import kaiming_normal, kaiming_uniform
from vit_jax_zoo.nn.norm import norm_factory
from vit_jax_zoo.ops.checks import check_not_negative, check_positive


class RegionProposalHead(nn.Module):
  """Says of every anchor how much it looks like an object, and which box is a better one.

  Ren et al., arXiv:1506.01497, section 3.1. One head for all levels.

  Attributes:
    num_anchors: at each place, a.
    dtype: of the convolutions; results are float32.
  """

  num_anchors: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, pyramid: Sequence[Float[Array, "b _ _ d"]]
  ) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
    """Returns logits and deltas of the anchors of all levels, finest first, row by row."""
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
  """Layers that box and mask heads share.

  Attributes:
    norm: "none" (convolutions then have a bias), or a name that `norm_factory` knows.
    dtype: of the computation.
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
  """Makes every box an example: norms are taken over one box alone."""
  return crops.reshape(-1, *crops.shape[2:])


class BoxHead(_Head):
  """Describes each box by a vector: convolutions, if any, then dense layers.

  With no convolutions and two dense layers: Lin et al.'s. The official code's are adaptive, with
  group norms: `roi_2mlp_head_gn_fptnet` is this one, `roi_Xconv1fc_gn_head_fptnet` has four
  convolutions and one dense layer.

  The layer that is first is called `first_<level>` where it is adaptive, else `conv_0` or
  `dense_0`.

  Attributes:
    num_convs: 3x3 convolutions, of as many channels as the pyramid has.
    num_dense: dense layers. They have the norm as well if there are no convolutions.
    width: of the dense layers.
  """

  num_convs: int = 0
  num_dense: int = 2
  width: int = 1024

  @nn.compact
  def __call__(
    self, crops: Sequence[Float[Array, "b r s s c"]], *, train: bool = False
  ) -> Float[Array, "b r f"]:
    """Returns the vectors."""
    check_positive(self, "width")
    check_not_negative(self, "num_convs", "num_dense")
    batch, boxes = crops[0].shape[:2]
    adaptive = len(crops) > 1
    if adaptive and not self.num_convs + self.num_dense:
      raise ValueError("an adaptive box head needs a layer; give it num_convs or num_dense")
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
  """Class and box of each described box.

  Attributes:
    num_classes: without the background.
    dtype: of the products; results are float32.
  """

  num_classes: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b r f"]
  ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
    """Returns logits and deltas by class; the last class is the background."""
    count = self.num_classes + 1

    def dense(features: int, deviation: float, name: str) -> Array:
      init = nn.initializers.normal(deviation)
      return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)(x)

    logits = dense(count, 0.01, "logits").astype(jnp.float32)
    deltas = dense(4 * count, 0.001, "deltas").astype(jnp.float32)
    return logits, deltas.reshape(*deltas.shape[:2], count, 4)


class MaskHead(_Head):
  """Masks of each box, one for every class. He et al., arXiv:1703.06870, figure 4, right.

  Convolutions, a doubling of the size, and 1x1 convolutions to the classes. With `fused` a second
  branch sees the whole box through a dense layer and adds what is said of all classes alike
  (arXiv:1803.01534, section 3.3); the official code's `v1up4convs_gn_adp_ff` is the adaptive, fused
  one with group norms.

  Attributes:
    num_classes: without the background, which has a mask nevertheless, the last, as published
      weights have one.
    num_convs: at the crops' size.
    width: of the convolutions.
    fused: see above. Two layers, `fused_conv_0` and (half as wide) `fused_conv_1`, branch off
      before the last convolution.
  """

  num_classes: int = 80
  num_convs: int = 4
  width: int = 256
  fused: bool = False

  @nn.compact
  def __call__(
    self, crops: Sequence[Float[Array, "b r s s c"]], *, train: bool = False
  ) -> Float[Array, "b r m m k"]:
    """Returns float32 logits of masks of twice the crops' size."""
    check_positive(self, "width")
    check_not_negative(self, "num_convs")
    if len(crops) > 1 and not self.num_convs:
      raise ValueError("an adaptive mask head needs a layer; num_convs must be positive, not 0")
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
    """The branch that sees all of the box at once; not negative, as the official code has it."""
    side = 2 * x.shape[1]
    x = self._convolve("fused_conv_0", x, self.width, train=train)
    x = self._convolve("fused_conv_1", x, self.width // 2, train=train)
    dense = nn.Dense(side * side, kernel_init=kaiming_uniform, dtype=self.dtype, name="fused_dense")
    x = nn.relu(dense(x.reshape(len(x), -1)))
    self.sow("intermediates", "fused", x)
    return x.reshape(len(x), side, side, 1)


class Doubling(nn.Module):
  """A 2x2 convolution with stride 1/2: each place becomes four, which do not mix.

  Attributes:
    features: output channels.
    dtype: of the product.
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
