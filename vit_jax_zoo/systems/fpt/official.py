"""The three transformers of FPT as in the authors' code (ZHANGDONG-NJUST/FPT at c7c76f9).

`transformer` lists the differences from the paper. Only what the code's detectors build is here.
Two fixes, without which that code does not run: the last reshape of the grounding transformer, and
rendering transformers of non-adjacent levels, which downsample the fine map repeatedly (the
authors' answer in their issue #25). Odd map sizes, which the code refuses, work.

Some parameters are created and never used, as there: they are part of the published parameter
counts and of the state dict.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.init import kaiming_uniform, pytorch_uniform
from vit_jax_zoo.nn.norm import BatchNorm
from vit_jax_zoo.systems.fpt.attention import (
  BLOCK_ELEMENTS,
  Similarity,
  attend,
  attention_map,
  mixture_shares,
)

RENDERINGS = ("head", "november_2020")


class OfficialSelfTransformer(nn.Module):
  """Self-attention with pooled keys and values, a norm and a residual connection.

  Sows the attention map as `weights` [b h*w y*x] if "intermediates" is mutable.
  """

  width: int  # channels of input, output, queries, keys and values
  num_parts: int = 2  # of the mixture of softmaxes; 1 is plain attention
  dropout_rate: float = 0.1  # of each part's attention map
  block_elements: int = BLOCK_ELEMENTS  # see `attend`
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w d"]:
    """Returns one level's map plus the attention output."""
    flat = (len(x), -1, self.width)
    query_key = _pointwise(self.width, self.dtype, name="query_key")  # one convolution for both
    pooled = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False)
    pooled = pooled.astype(x.dtype)
    query = query_key(x).reshape(flat)
    key = query_key(pooled).reshape(flat)
    value = _pointwise(self.width, self.dtype, name="value")(pooled).reshape(flat)
    shares = jnp.ones((len(x), 1), jnp.float32)
    if self.num_parts > 1:
      shape = (self.num_parts, self.width)
      mixture = self.param("mixture", pytorch_uniform(self.num_parts), shape, jnp.float32)
      shares = mixture_shares(query, mixture)
    similarity = Similarity(
      scale=self.width**-0.5,
      dropout_rate=self.dropout_rate,
      key=self.make_rng("dropout") if train and self.dropout_rate > 0 else None,
    )
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", attention_map(query, key, shares, similarity))
    attended = attend(query, key, value, shares, similarity, block_elements=self.block_elements)
    attended = attended.reshape(*x.shape[:3], self.width)
    out = _pointwise(self.width, self.dtype, use_bias=False, name="out")(attended)
    return BatchNorm(dtype=self.dtype, name="norm")(out, train=train) + x


class OfficialGroundingTransformer(nn.Module):
  """A non-local block from a fine to a coarse map, without residual connection or softmax.

  Wang et al., arXiv:1711.07971, its dot-product form. The output is zero at initialization.
  """

  width: int  # channels of both maps and of the output; queries, keys and values have half of it
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], coarse: Float[Array, "b y x c"], *, train: bool
  ) -> Float[Array, "b h w d"]:
    """Returns the features that each position of `x` gathers from `coarse`."""
    inner = self.width // 2
    value, query, key = (
      _pointwise(inner, self.dtype, name=name)(source).reshape(len(x), -1, inner)
      for name, source in (("value", coarse), ("query", x), ("key", coarse))
    )
    # Linear in the weights: (q k^T) v = q (k^T v), without an attention map.
    summary = jnp.einsum("bmd,bmc->bdc", key, value, preferred_element_type=jnp.float32)
    summary = (summary / key.shape[1]).astype(query.dtype)
    gathered = jnp.einsum("bnd,bdc->bnc", query, summary).reshape(*x.shape[:3], inner)
    out = _pointwise(self.width, self.dtype, name="out")(gathered)
    norm = BatchNorm(scale_init=nn.initializers.zeros, dtype=self.dtype, name="norm")
    return norm(out, train=train)


class OfficialRenderingTransformer(nn.Module):
  """A coarse map gated by the mean of a fine one, plus the downsampled fine one.

  With rendering "november_2020" the sum has the coarse map instead of the fine one, which then only
  contributes the gate.
  """

  width: int  # channels of both maps and of the output
  rendering: str = "head"
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], fine: Float[Array, "b y x c"], *, train: bool
  ) -> Float[Array, "b h w d"]:
    """Returns the new coarse map. The sides of `fine` are a power of two times those of `x`."""
    if self.rendering not in RENDERINGS:
      raise ValueError(unknown_name("rendering", self.rendering, RENDERINGS))
    ratio = side_ratio((fine.shape[1], fine.shape[2]), (x.shape[1], x.shape[2]))
    mean = jnp.mean(fine, (1, 2), keepdims=True, dtype=jnp.promote_types(fine.dtype, jnp.float32))
    gate = _pointwise(self.width, self.dtype, use_bias=False, name="gate")(mean.astype(fine.dtype))
    gate = nn.relu(BatchNorm(dtype=self.dtype, name="gate_norm")(gate, train=train))
    gated = conv3x3(self.width, self.dtype, name="refine")(x)
    gated = BatchNorm(dtype=self.dtype, name="refine_norm")(gated, train=train) * gate
    if self.rendering == "november_2020":
      added = _pointwise(self.width, self.dtype, use_bias=False, name="reduce")(x)
    else:
      halve = conv3x3(self.width, self.dtype, stride=1 if ratio == 1 else 2, name="halve")
      added = fine
      for _ in range(max(1, int(math.log2(ratio)))):
        added = halve(added)
      _Unused((fine.shape[-1], self.width), name="reduce")()
    _Unused((2 * self.width, self.width), name="concat")()
    return nn.relu(BatchNorm(dtype=self.dtype, name="added_norm")(added, train=train) + gated)


def side_ratio(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
  """Returns the power of two by which a fine map's sides are longer; sides are rounded up."""
  for ratio in (2**i for i in range(max(fine).bit_length())):
    if (-(-fine[0] // ratio), -(-fine[1] // ratio)) == coarse:
      return ratio
  raise ValueError(
    f"a map of {fine[0]}x{fine[1]} does not halve to {coarse[0]}x{coarse[1]} (sides rounded up); "
    "expected levels whose sides are halves of each other"
  )


class _Unused(nn.Module):
  """A kernel that is created and saved but not used; see the module's docstring."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> None:
    self.param("kernel", kaiming_uniform, self.shape, jnp.float32)


def _pointwise(features: int, dtype: Dtype, **fields: Any) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=kaiming_uniform, **fields)


def conv3x3(features: int, dtype: Dtype, *, name: str, stride: int = 1) -> nn.Conv:
  """Returns a 3x3 convolution without bias, padded by 1."""
  fields = {"use_bias": False, "kernel_init": kaiming_uniform, "dtype": dtype, "name": name}
  return nn.Conv(features, (3, 3), (stride, stride), padding=((1, 1), (1, 1)), **fields)
