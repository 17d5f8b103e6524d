"""Masks for object queries: attention maps as a coarse guess, sharpened by the backbone's features.

DETR's panoptic head, arXiv:2005.12872, section 4.4 and figure 8. Every query is a picture of its
own from here on: all modules work on [b q], queries beside images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.nn.attention import NEGATIVE
from vit_jax_zoo.ops.resize import resize_nearest

_conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # Kaiming, a = 1


class MaskAttention(nn.Module):
  """Where each query looks: an attention map without values.

  The softmax runs over all heads and positions of a query at once, so that its heads share a sum of
  one; the published weights want it that way.

  Attributes:
    num_heads: maps for each query.
    dtype: of the projections; the softmax is in float32.
  """

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "b q d"],
    memory: Float[Array, "b h w d"],
    keep: Bool[Array, "b h w"],
  ) -> Float[Array, "b q h w m"]:
    """Returns the maps, 0 where `keep` is False."""
    width = queries.shape[-1]
    heads = (self.num_heads, width // self.num_heads)
    query = self._project("query", heads)(queries)
    key = self._project("key", heads)(memory)
    scale = heads[1] ** -0.5
    scores = jnp.einsum("bqmc,bhwmc->bqhwm", query * scale, key, preferred_element_type=jnp.float32)
    scores = jnp.where(keep[:, None, :, :, None], scores, NEGATIVE)
    return jax.nn.softmax(scores, axis=(2, 3, 4))

  def _project(self, name: str, heads: tuple[int, int]) -> nn.Module:
    init = nn.initializers.xavier_uniform()
    return nn.DenseGeneral(heads, kernel_init=init, dtype=self.dtype, name=name)


class MaskHead(nn.Module):
  """Five convolutions from the coarsest map up, taking in finer features on the way.

  Attributes:
    width: of the context, d: the layers have d + heads, d/2, d/4, d/8 and d/16 channels.
    dtype: of the convolutions; norms compute in float32.
  """

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    context: Float[Array, "b h w d"],
    maps: Float[Array, "b q h w m"],
    features: Sequence[Float[Array, "b _ _ _"]],
  ) -> Float[Array, "b q i j"]:
    """Returns mask logits (float32) at the size of the finest features.

    Args:
      context: the projected features that the encoder took in.
      maps: of every query.
      features: of the backbone, three of them, coarsest first.
    """
    batch, queries = maps.shape[:2]
    x = self._first(context, maps)
    x = self._norm(1, x.reshape(batch * queries, *x.shape[2:]))
    x = self._norm(2, self._conv("conv2", self.width // 2)(x))
    for index, feature in enumerate(features, start=1):
      adapted = self._conv(f"adapter{index}", x.shape[-1], size=1)(feature)
      x = resize_nearest(x, adapted.shape[1:3])
      # One set of features for all queries of an image.
      x = x.reshape(batch, queries, *x.shape[1:]) + adapted[:, None]
      x = x.reshape(batch * queries, *x.shape[2:])
      x = self._norm(index + 2, self._conv(f"conv{index + 2}", self.width // 2 ** (index + 1))(x))
    logits = self._conv("out", 1)(x).astype(jnp.float32)
    return logits.reshape(batch, queries, *logits.shape[1:3])

  def _first(
    self, context: Float[Array, "b h w d"], maps: Float[Array, "b q h w m"]
  ) -> Float[Array, "b q h w e"]:
    """Convolves the context with each query's maps beside it.

    A convolution is linear: the context's part, nearly all of it, is the same for every query and
    is computed once.
    """
    heads = maps.shape[-1]
    channels = context.shape[-1] + heads
    kernel = self.param("conv1_kernel", _conv_init, (3, 3, channels, channels)).astype(self.dtype)
    bias = self.param("conv1_bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
    shared = _convolve(context.astype(self.dtype), kernel[:, :, :-heads])
    flat = maps.reshape(-1, *maps.shape[2:]).astype(self.dtype)
    own = _convolve(flat, kernel[:, :, -heads:])
    own = own.reshape(*maps.shape[:2], *own.shape[1:])
    return own + (shared + bias[None, None, None])[:, None]

  def _conv(self, name: str, features: int, size: int = 3) -> nn.Module:
    return nn.Conv(features, (size, size), kernel_init=_conv_init, dtype=self.dtype, name=name)

  def _norm(self, index: int, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    groups = min(8, x.shape[-1])  # transformers' reading; the paper's code always has 8
    if x.shape[-1] % groups:
      raise ValueError(
        f"the mask head's layer {index} has {x.shape[-1]} channels, which {groups} groups do not "
        f"divide; choose a width that is a multiple of 64, and 8 heads (width is {self.width})"
      )
    norm = nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=f"norm{index}")
    return nn.relu(norm(x))


def _convolve(
  x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c f"]
) -> Float[Array, "n h w f"]:
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
