"""TTSR's losses (arXiv:2006.04139, 3.3), per example, and the networks that they use."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, PrecisionLike
from jaxtyping import Array, Float

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.nn.init import pytorch_uniform

Maps: TypeAlias = Float[Array, "b h w c"]  # images or features
PerExample: TypeAlias = Float[Array, " b"]


def reconstruction_loss(images: Maps, truths: Maps) -> PerExample:
  """Returns the mean absolute difference."""
  return jnp.mean(jnp.abs(images - truths), axis=(1, 2, 3))


def squared_difference(features: Maps, truths: Maps) -> PerExample:
  """Returns the mean squared difference."""
  return jnp.mean((features - truths) ** 2, axis=(1, 2, 3))


def transferal_loss(features: Sequence[Array], textures: Sequence[Array]) -> PerExample:
  """Returns the mean squared difference, also over levels, of the output's features (3.3)."""
  levels = [
    squared_difference(feature.astype(jnp.float32), texture.astype(jnp.float32))
    for feature, texture in zip(features, textures, strict=True)
  ]
  return jnp.mean(jnp.stack(levels), axis=0)


def wasserstein_loss(
  score: Callable[[Maps], PerExample], images: Maps, truths: Maps, epsilon: PerExample
) -> tuple[PerExample, PerExample]:
  """Returns score(image) - score(truth) and (|gradient| - 1)^2: WGAN-GP, arXiv:1704.00028, Eq. 3.

  The gradient is that of `score` at `images` and `truths` mixed, with the weight `epsilon` of the
  truth; each score depends on its own image only.
  """
  weight = epsilon.reshape(-1, 1, 1, 1)
  mixed = images * (1 - weight) + truths * weight
  gradients = jax.grad(lambda x: jnp.sum(score(x)))(mixed)
  # The root has no gradient at zero.
  norms = jnp.sqrt(jnp.maximum(jnp.sum(gradients**2, axis=(1, 2, 3)), 1e-24))
  return score(images) - score(truths), (norms - 1) ** 2


class Conv(nn.Module):
  """Convolution with PyTorch's initialisation and padding; sides become ceil(side / stride)."""

  features: int
  kernel_size: int = 3  # odd; half of it is padded with zeros on all sides
  stride: int = 1
  dtype: Dtype = "float32"
  precision: PrecisionLike = None

  @nn.compact
  def __call__(self, x: Maps) -> Float[Array, "b h2 w2 f"]:
    init, side = pytorch_uniform(self.kernel_size**2 * x.shape[-1]), self.kernel_size
    conv = nn.Conv(
      self.features, (side, side), self.stride, side // 2,
      kernel_init=init, bias_init=init, dtype=self.dtype, precision=self.precision,
    )  # fmt: skip
    nn.share_scope(self, conv)
    return conv(x)


class Discriminator(nn.Module):
  """SRGAN's discriminator without norms: pairs of convolutions, the second with stride 2.

  The gradient penalty excludes batch norms (arXiv:1704.00028, section 4).
  """

  widths: Sequence[int] = (32, 64, 128, 256, 512)  # channels of each pair, in the official code
  hidden: int = 1024  # units of the dense layer before the last, in the official code

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"]) -> PerExample:
    """Returns an unbounded score for each image in [-1, 1]."""
    for index, width in enumerate(self.widths, 1):
      for stride in (1, 2):
        x = nn.leaky_relu(Conv(width, stride=stride, name=f"conv{index}_{stride}")(x), 0.2)
    x = x.reshape(x.shape[0], -1)
    x = nn.leaky_relu(self._dense(self.hidden, x.shape[1], "hidden")(x), 0.2)
    return self._dense(1, x.shape[1], "score")(x)[:, 0]

  def _dense(self, features: int, inputs: int, name: str) -> nn.Dense:
    init = pytorch_uniform(inputs)
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)


VGG_DEPTHS = (2, 2, 4, 4, 4)  # convolutions in each stage; max-pools between stages


class VGG19(nn.Module):
  """Features of VGG-19, up to the last one in `outputs`. arXiv:1409.1556, Table 1, column E."""

  outputs: tuple[str, ...] = ("relu5_1",)  # "relu<stage>_<convolution>", counted from 1
  # Of the stages: column E's; the texture extractor of published TTSRs has the first three.
  widths: Sequence[int] = (64, 128, 256, 512, 512)
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, images: Maps, *, precise: bool = False) -> dict[str, Array]:
    """Returns `outputs` of images in [-1, 1]; `precise`: in float32 at the highest precision."""
    dtype = jnp.promote_types(images.dtype, jnp.float32) if precise else self.dtype
    precision = "highest" if precise else None
    mean, std = (jnp.asarray(x, dtype).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    x, features = ((images.astype(dtype) + 1) / 2 - mean) / std, {}
    for stage, (depth, width) in enumerate(zip(VGG_DEPTHS, self.widths, strict=False), 1):
      x = nn.max_pool(x, (2, 2), (2, 2)) if stage > 1 else x
      for number in range(1, depth + 1):
        name = f"{stage}_{number}"
        conv = Conv(width, dtype=dtype, precision=precision, name=f"conv{name}")
        x = features[f"relu{name}"] = nn.relu(conv(x))
        if features.keys() >= set(self.outputs):
          return {name: features[name] for name in self.outputs}
    unknown = sorted(set(self.outputs) - features.keys())
    raise ValueError(f"outputs: VGG-19 has no {unknown}; expected relu1_1, relu1_2, ... relu5_4")
