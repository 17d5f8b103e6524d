"""TTSR's losses (arXiv:2006.04139, 3.3), per example, and the networks that they use."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, PrecisionLike
from jaxtyping import Array, Float

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.nn.init import pytorch_uniform


def reconstruction_loss(
  images: Float[Array, "b h w c"], truths: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
  """Returns the mean absolute difference."""
  return _mean(jnp.abs(images - truths))


def wasserstein_loss(
  score: Callable[[Float[Array, "b h w c"]], Float[Array, " b"]],
  images: Float[Array, "b h w c"],
  truths: Float[Array, "b h w c"],
  epsilon: Float[Array, " b"],
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """Returns the two terms of the discriminator's loss: WGAN-GP, arXiv:1704.00028, Eq. 3.

  Args:
    score: the discriminator; each score depends on its own image alone.
    images: of the generator.
    truths: of the data.
    epsilon: weight of the truth in the mixture at which the gradient is penalised.

  Returns:
    For each example score(image) - score(truth), and (|gradient| - 1)^2.
  """
  share = epsilon.reshape(-1, 1, 1, 1)
  mixed = images * (1 - share) + truths * share
  gradients = jax.grad(lambda x: jnp.sum(score(x)))(mixed)
  # Kept off zero, where the root has no gradient.
  norms = jnp.sqrt(jnp.maximum(jnp.sum(gradients**2, axis=(1, 2, 3)), 1e-24))
  return score(images) - score(truths), (norms - 1) ** 2


def perceptual_loss(
  features: Float[Array, "b h w c"], truths: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
  """Returns the mean squared difference of VGG-19's relu5_1."""
  return _mean((features - truths) ** 2)


def transferal_loss(
  features: Sequence[Float[Array, "b ..."]], textures: Sequence[Float[Array, "b ..."]]
) -> Float[Array, " b"]:
  """Returns the mean squared difference from the transferred textures, averaged over levels.

  Args:
    features: of the output, by the texture extractor; the coarsest level first.
    textures: transferred maps, in the same order.
  """
  levels = [
    _mean((feature.astype(jnp.float32) - texture.astype(jnp.float32)) ** 2)
    for feature, texture in zip(features, textures, strict=True)
  ]
  return jnp.mean(jnp.stack(levels), axis=0)


def _mean(values: Float[Array, "b ..."]) -> Float[Array, " b"]:
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


class Conv(nn.Module):
  """Convolution with PyTorch's initialisation and padding; sides become ceil(side / stride).

  Attributes:
    features: output channels.
    kernel_size: side of the kernel, odd; half of it is padded with zeros on all sides.
    stride: stride along both axes.
    dtype: dtype of the computation.
    precision: precision of the products on devices with several.
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


class Discriminator(nn.Module):
  """SRGAN's discriminator without norms: pairs of convolutions, the second with stride 2.

  The gradient penalty excludes batch norms (arXiv:1704.00028, section 4). The first dense layer
  fixes the size of the images.

  Attributes:
    widths: channels of each pair (the paper's; the tests have fewer).
    hidden: units of the dense layer before the last.
    dtype: of the computation.
  """

  widths: Sequence[int] = (32, 64, 128, 256, 512)
  hidden: int = 1024
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    """Returns an unbounded score for each image in [-1, 1]."""
    x = images
    for index, width in enumerate(self.widths, 1):
      for stride in (1, 2):
        conv = Conv(width, stride=stride, dtype=self.dtype, name=f"conv{index}_{stride}")
        x = nn.leaky_relu(conv(x), 0.2)
    x = x.reshape(x.shape[0], -1)
    x = nn.leaky_relu(self._dense(self.hidden, x.shape[1], "hidden")(x), 0.2)
    return self._dense(1, x.shape[1], "score")(x)[:, 0]

  def _dense(self, features: int, inputs: int, name: str) -> nn.Dense:
    init = pytorch_uniform(inputs)
    return nn.Dense(features, kernel_init=init, bias_init=init, dtype=self.dtype, name=name)


VGG_DEPTHS = (2, 2, 4, 4, 4)
"""Convolutions in each stage; max-pools between stages."""

VGG_WIDTHS = (64, 128, 256, 512, 512)


class VGG19(nn.Module):
  """Features of VGG-19, up to the last one asked for. arXiv:1409.1556, Table 1, column E.

  Attributes:
    outputs: names "relu<stage>_<convolution>", both counted from 1.
    widths: output channels of each stage.
    dtype: of the computation.
  """

  outputs: tuple[str, ...] = ("relu5_1",)
  widths: Sequence[int] = VGG_WIDTHS
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w 3"], *, precise: bool = False
  ) -> dict[str, Float[Array, "b ..."]]:
    """Returns features by the names of `outputs`.

    Args:
      images: in [-1, 1]; normalised here with ImageNet's mean and standard deviation.
      precise: computes in float32 at the highest precision, whatever `dtype`.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32) if precise else self.dtype
    precision = "highest" if precise else None
    mean, std = (jnp.asarray(x, dtype).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((images.astype(dtype) + 1) / 2 - mean) / std
    last = max(map(_position, self.outputs))
    features = {}
    for stage, depth in enumerate(VGG_DEPTHS, 1):
      for number in range(1, depth + 1):
        if (stage, number) > last:
          return {name: features[name] for name in self.outputs}
        if stage > 1 and number == 1:
          x = nn.max_pool(x, (2, 2), (2, 2))
        conv = Conv(
          self.widths[stage - 1], dtype=dtype, precision=precision, name=f"conv{stage}_{number}"
        )
        x = features[f"relu{stage}_{number}"] = nn.relu(conv(x))
    return {name: features[name] for name in self.outputs}


def _position(name: str) -> tuple[int, int]:
  match = re.fullmatch(r"relu([1-5])_([1-4])", name)
  if match is None or int(match[2]) > VGG_DEPTHS[int(match[1]) - 1]:
    raise ValueError(f"outputs: VGG-19 has no {name!r}; expected relu1_1, relu1_2, ... relu5_4")
  return int(match[1]), int(match[2])
