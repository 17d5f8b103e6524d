"""The three transformers of FPT, as the paper's formulas have them.

Zhang et al., "Feature Pyramid Transformer", arXiv:2007.09451, section 3: interactions within a
level of a feature pyramid, from a coarser level to a finer one, and from a finer to a coarser.
Projections are 1x1 convolutions without bias. Nothing is normalised or added in here: what they
return goes into the concatenation of `FeaturePyramidTransformer`.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.nn.init import kaiming_uniform
from vit_jax_zoo.systems.fpt.mixture_attention import (
  BLOCK_ELEMENTS,
  Similarity,
  attend,
  attention_map,
  mixture_shares,
)
from vit_jax_zoo.systems.fpt.window_attention import attend_locally, local_attention_map


class MixtureTransformer(nn.Module):
  """Attends from the positions of one map to those of another, by a mixture of softmaxes.

  The shares of the mixture follow from the mean key (section 3.2). Sows the attention map as
  `weights` [b h*w y*x], or [b h w window^2], if the collection "intermediates" is mutable: the
  whole of it, so ask for it with small maps.

  Attributes:
    width: channels of the result; a multiple of `num_parts`.
    num_parts: parts of the channels, each with a softmax; N in the paper.
    similarity: "dot" or "euclidean".
    window: keys lie in a square of this (odd) side around the query's own place; None: anywhere.
    block_elements: see `ops.mixture_attention.attend`.
    dtype: of the computation; softmaxes are float32.
  """

  width: int
  num_parts: int
  similarity: str
  window: int | None = None
  block_elements: int = BLOCK_ELEMENTS
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], context: Float[Array, "b y x c"] | None = None
  ) -> Float[Array, "b h w d"]:
    """Returns what each position of `x` gathers from `context`, by default from `x` itself."""
    context = x if context is None else context
    query, key, value = (
      nn.Dense(
        self.width, use_bias=False, kernel_init=kaiming_uniform, dtype=self.dtype, name=name
      )(source)
      for name, source in (("query", x), ("key", context), ("value", context))
    )
    bound = self.num_parts**-0.5
    weight = self.param("mixture", _uniform(bound), (self.num_parts, self.width))
    flat = (len(x), -1, self.width)
    shares = mixture_shares(key.reshape(flat), weight)
    self.sow("intermediates", "shares", shares)
    similarity = Similarity(self.similarity)
    sows = self.is_mutable_collection("intermediates")
    if self.window is not None:
      if sows:
        local = local_attention_map(query, key, shares, self.window, similarity)
        self.sow("intermediates", "weights", local)
      return attend_locally(query, key, value, shares, self.window, similarity)
    query_flat, key_flat = query.reshape(flat), key.reshape(flat)
    if sows:
      self.sow("intermediates", "weights", attention_map(query_flat, key_flat, shares, similarity))
    gathered = attend(
      query_flat,
      key_flat,
      value.reshape(flat),
      shares,
      similarity,
      block_elements=self.block_elements,
    )
    return gathered.reshape(query.shape)


class SelfTransformer(MixtureTransformer):
  """Interactions within a level: dot products, two parts (section 3.2). Called with one map."""

  num_parts: int = 2
  similarity: str = "dot"


class GroundingTransformer(MixtureTransformer):
  """A fine map looks at a coarse one: Euclidean distances, four parts (section 3.3).

  With a `window` it is the locality-constrained form, for segmentation.
  """

  num_parts: int = 4
  similarity: str = "euclidean"


class RenderingTransformer(nn.Module):
  """A coarse map takes up what a fine one holds (section 3.4): Q, K and V are of different maps.

  The fine map's mean key weighs the coarse map's channels; a 3x3 convolution refines them; the fine
  map, brought to the coarse one's size by a strided convolution, is added.

  Attributes:
    width: channels of the result.
    dtype: of the computation.
  """

  width: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], fine: Float[Array, "b y x c"]
  ) -> Float[Array, "b h w d"]:
    """Returns what `x` becomes. The sides of `fine` are a power of two times those of `x`."""
    ratio = side_ratio((fine.shape[1], fine.shape[2]), (x.shape[1], x.shape[2]))
    query = self._linear("query")(x)
    key = self._linear("key")(fine)
    gate = jnp.mean(key, (1, 2), keepdims=True, dtype=jnp.promote_types(key.dtype, jnp.float32))
    attended = self._conv("refine", 1)(query * gate.astype(query.dtype))
    return attended + self._conv("value", ratio)(fine)

  def _linear(self, name: str) -> nn.Module:
    return nn.Dense(
      self.width, use_bias=False, kernel_init=kaiming_uniform, dtype=self.dtype, name=name
    )

  def _conv(self, name: str, stride: int) -> nn.Module:
    return nn.Conv(
      self.width,
      (3, 3),
      (stride, stride),
      padding=((1, 1), (1, 1)),
      use_bias=False,
      kernel_init=kaiming_uniform,
      dtype=self.dtype,
      name=name,
    )


def side_ratio(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
  """Returns the power of two by which a fine map's sides are longer; sides are rounded up.

  Raises:
    ValueError: there is none.
  """
  ratio = 1
  while ratio <= max(fine):
    if (-(-fine[0] // ratio), -(-fine[1] // ratio)) == coarse:
      return ratio
    ratio *= 2
  raise ValueError(
    f"a map of {fine[0]}x{fine[1]} cannot be brought to {coarse[0]}x{coarse[1]} by halving it, "
    "sides rounded up; give levels whose sides follow from each other so"
  )


def _uniform(bound: float) -> nn.initializers.Initializer:
  def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    return bound * (2 * nn.initializers.uniform(1.0)(key, shape, dtype) - 1)

  return init
