"""FPT's three transformers as the authors' code has them (ZHANGDONG-NJUST/FPT at c7c76f9).

How they deviate from the paper stands in `feature_pyramid_transformer`. Two repairs, without which
that state does not run: the grounding transformer's last reshape, and a rendering transformer for
levels that are not neighbours, which halves the fine map as often as it takes (the authors' answer
in their issue #25). Maps may have odd sides, which the code refuses.

Some parameters are made and never used, as there: they belong to the published parameter counts and
to the state dict.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.init import kaiming_normal, kaiming_uniform
from vit_jax_zoo.nn.norm import BatchNorm
from vit_jax_zoo.systems.fpt.interactions import side_ratio
from vit_jax_zoo.systems.fpt.mixture_attention import (
  BLOCK_ELEMENTS,
  Similarity,
  attend,
  attend_to_sums,
  attention_map,
  mixture_shares,
)
from vit_jax_zoo.systems.fpt.window_attention import attend_by_channel, pad_window

TRANSFORMS = ("conv", "ffn", "dffn")
SIMILARITY_MODES = ("dot", "embedded", "gaussian", "concatenate")
RENDERINGS = ("head", "november_2020")


class OfficialSelfTransformer(nn.Module):
  """Self-attention with pooled keys and values, a norm and a residual connection.

  Sows the attention map as `weights` [b*heads h*w y*x] if "intermediates" is mutable.

  Attributes:
    width: channels of input and output.
    num_parts: of the mixture of softmaxes; 1 has no mixture.
    num_heads: each with `key_width` and `value_width` channels.
    key_width: of a head's queries and keys, a multiple of `num_parts`; None: `width`.
    value_width: of a head's values; None: `width`.
    transform: of the map into queries and keys, by the same weights: "conv" (1x1), "ffn" (3x3,
      norm, ReLU, 1x1) or "dffn" (the 3x3 dilated by 4).
    pool: averages keys and values over 3x3, stride 2.
    concat: puts the residual beside the result in place of adding it.
    dropout_rate: of each part's attention map.
    block_elements: see `ops.mixture_attention.attend`.
    dtype: of the computation.
  """

  width: int
  num_parts: int = 2
  num_heads: int = 1
  key_width: int | None = None
  value_width: int | None = None
  transform: str = "conv"
  pool: bool = True
  concat: bool = False
  dropout_rate: float = 0.1
  block_elements: int = BLOCK_ELEMENTS
  dtype: Dtype = "float32"

  def setup(self) -> None:
    """Makes the layers; queries and keys share theirs."""
    if self.transform not in TRANSFORMS:
      raise ValueError(
        unknown_name("transform of the self-transformer", self.transform, TRANSFORMS)
      )
    self.key_size = self.key_width or self.width
    self.value_size = self.value_width or self.width
    features = self.num_heads * self.key_size
    if self.transform != "conv":
      dilation = 4 if self.transform == "dffn" else 1
      self.query_key_conv = nn.Conv(
        features,
        (3, 3),
        padding=((dilation, dilation),) * 2,
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        kernel_init=kaiming_uniform,
        dtype=self.dtype,
      )
      self.query_key_norm = BatchNorm(dtype=self.dtype)
    self.query_key = _pointwise(features, self.dtype)
    self.value = _pointwise(self.num_heads * self.value_size, self.dtype)
    if self.num_parts > 1:
      bound = self.num_parts**-0.5
      shape = (self.num_parts, self.key_size)
      centred = nn.initializers.uniform(2 * bound)
      self.mixture = self.param("mixture", lambda *args: centred(*args) - bound, shape)
    self.out = _pointwise(self.width, self.dtype, use_bias=False)
    self.norm = BatchNorm(dtype=self.dtype)

  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w d"]:
    """Returns `x` and what each position gathers from all others.

    Args:
      x: the level.
      train: batch norms take this batch's statistics; attention weights are dropped ("dropout").
    """
    query = self._heads(self._query_key(x, train=train), self.key_size)
    if self.pool:
      pooled = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False)
      pooled = pooled.astype(x.dtype)
      key = self._heads(self._query_key(pooled, train=train), self.key_size)
      value = self._heads(self.value(pooled), self.value_size)
    else:
      key, value = query, self._heads(self.value(x), self.value_size)
    drop = train and self.dropout_rate > 0
    similarity = Similarity(
      scale=self.key_size**-0.5,
      dropout_rate=self.dropout_rate,
      key=self.make_rng("dropout") if drop else None,
    )
    shares = jnp.ones((len(query), 1), jnp.float32)
    if self.num_parts > 1:
      shares = mixture_shares(query, self.mixture)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", attention_map(query, key, shares, similarity))
    gathered = attend(query, key, value, shares, similarity, block_elements=self.block_elements)
    gathered = gathered.reshape(len(x), self.num_heads, *x.shape[1:3], self.value_size)
    gathered = jnp.moveaxis(gathered, 1, 3).reshape(*x.shape[:3], -1)
    result = self.norm(self.out(gathered), train=train)
    return jnp.concatenate([result, x.astype(result.dtype)], axis=-1) if self.concat else result + x

  def _query_key(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w d"]:
    if self.transform != "conv":
      x = nn.relu(self.query_key_norm(self.query_key_conv(x), train=train))
    return self.query_key(x)

  def _heads(self, x: Float[Array, "b h w d"], size: int) -> Float[Array, "bh n e"]:
    """Makes heads examples of their own."""
    split = x.reshape(len(x), -1, self.num_heads, size)
    return jnp.moveaxis(split, 2, 1).reshape(len(x) * self.num_heads, -1, size)


class OfficialGroundingTransformer(nn.Module):
  """A non-local block from a fine map to a coarse one, without a residual connection.

  Wang et al., arXiv:1711.07971. Its output begins as zero.

  Attributes:
    width: channels of both maps and of the output.
    inner_width: of queries, keys and values; None: half of `width`.
    mode: "dot" (dot products over the number of keys), "embedded" (their softmax), "gaussian" (the
      softmax of the maps' own dot products) or "concatenate" (see `attend_to_sums`).
    use_norm: a batch norm at the end.
    block_elements: see `ops.mixture_attention.attend`.
    dtype: of the computation.
  """

  width: int
  inner_width: int | None = None
  mode: str = "dot"
  use_norm: bool = True
  block_elements: int = BLOCK_ELEMENTS
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], coarse: Float[Array, "b y x c"], *, train: bool
  ) -> Float[Array, "b h w d"]:
    """Returns what each position of `x` gathers from `coarse`."""
    if self.mode not in SIMILARITY_MODES:
      raise ValueError(
        unknown_name("mode of the grounding transformer", self.mode, SIMILARITY_MODES)
      )
    inner = self.inner_width or self.width // 2
    value = _pointwise(inner, self.dtype, name="value")(coarse).reshape(len(x), -1, inner)
    query, key = x, coarse
    if self.mode != "gaussian":
      query = _pointwise(inner, self.dtype, name="query")(x)
      key = _pointwise(inner, self.dtype, name="key")(coarse)
    query = query.reshape(len(x), -1, query.shape[-1])
    key = key.reshape(len(x), -1, key.shape[-1])
    gathered = self._gather(query, key, value).reshape(*x.shape[:3], inner)
    zeros = nn.initializers.zeros
    init = kaiming_uniform if self.use_norm else zeros
    result = _pointwise(self.width, self.dtype, kernel_init=init, name="out")(gathered)
    if not self.use_norm:
      return result
    return BatchNorm(scale_init=zeros, dtype=self.dtype, name="norm")(result, train=train)

  def _gather(
    self, query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m c"]
  ) -> Float[Array, "b n c"]:
    if self.mode == "dot":  # linear in the weights: (q k^T) v = q (k^T v), with no map at all
      product = jnp.einsum("bmd,bmc->bdc", key, value, preferred_element_type=jnp.float32)
      summary = (product / key.shape[1]).astype(query.dtype)
      return jnp.einsum("bnd,bdc->bnc", query, summary)
    if self.mode == "concatenate":
      kernel = self.param("pair_kernel", kaiming_uniform, (2 * key.shape[-1], 1))
      bias = self.param("pair_bias", nn.initializers.zeros, (1,))
      halves = jnp.split(kernel[:, 0].astype(query.dtype), 2)
      sums = (query @ halves[0] + bias.astype(query.dtype)[None], key @ halves[1])
      return attend_to_sums(*sums, value, block_elements=self.block_elements)
    shares = jnp.ones((len(query), 1), jnp.float32)
    return attend(query, key, value, shares, block_elements=self.block_elements)


class OfficialRenderingTransformer(nn.Module):
  """A coarse map, gated by the mean of a fine one, and the fine one made smaller.

  Attributes:
    width: channels of both maps and of the output.
    rendering: "head", or "november_2020": the coarse map in place of the fine one in the sum, so
      that the fine one enters by the gate alone.
    dtype: of the computation.
  """

  width: int
  rendering: str = "head"
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], fine: Float[Array, "b y x c"], *, train: bool
  ) -> Float[Array, "b h w d"]:
    """Returns what `x` becomes. The sides of `fine` are a power of two times those of `x`."""
    if self.rendering not in RENDERINGS:
      raise ValueError(unknown_name("rendering", self.rendering, RENDERINGS))
    ratio = side_ratio((fine.shape[1], fine.shape[2]), (x.shape[1], x.shape[2]))
    mean = jnp.mean(fine, (1, 2), keepdims=True, dtype=jnp.promote_types(fine.dtype, jnp.float32))
    gate = _pointwise(self.width, self.dtype, use_bias=False, name="gate")(mean.astype(fine.dtype))
    gate = nn.relu(BatchNorm(dtype=self.dtype, name="gate_norm")(gate, train=train))
    gated = _conv3x3(self.width, self.dtype, name="refine")(x)
    gated = BatchNorm(dtype=self.dtype, name="refine_norm")(gated, train=train) * gate
    if self.rendering == "november_2020":
      added = _pointwise(self.width, self.dtype, use_bias=False, name="reduce")(x)
    else:
      halve = _conv3x3(self.width, self.dtype, stride=1 if ratio == 1 else 2, name="halve")
      added = fine
      for _ in range(max(1, int(math.log2(ratio)))):
        added = halve(added)
      _Unused((fine.shape[-1], self.width), name="reduce")()
    _Unused((2 * self.width, self.width), name="concat")()
    return nn.relu(BatchNorm(dtype=self.dtype, name="added_norm")(added, train=train) + gated)


class OfficialLocalTransformer(nn.Module):
  """Attention to a window of one map, each channel with a softmax of its own.

  The code's `LocalityconstrainedGT`, after Ramachandran et al., arXiv:1906.05909; nothing there
  uses it, and it is not the paper's locality-constrained grounding transformer.

  Attributes:
    width: channels of the output, even.
    window: side of the window, odd.
    use_bias: of the three projections.
    dtype: of the computation.
  """

  width: int
  window: int
  use_bias: bool = False
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Returns what each position gathers from its neighbours."""
    padded = pad_window(x, self.window)  # before the projections, whose biases fill the border
    project = functools.partial(
      _pointwise, self.width, self.dtype, use_bias=self.use_bias, kernel_init=kaiming_normal
    )
    half = self.width // 2
    normal = nn.initializers.normal(1.0)
    rows = self.param("row_embedding", normal, (self.window, half))
    columns = self.param("column_embedding", normal, (self.window, half))
    bias = jnp.concatenate(
      [jnp.repeat(rows, self.window, axis=0), jnp.tile(columns, (self.window, 1))], axis=-1
    )
    return attend_by_channel(
      project(name="query")(x),
      project(name="key")(padded),
      project(name="value")(padded),
      self.window,
      key_bias=bias,
    )


class OfficialLocalStem(nn.Module):
  """As `OfficialLocalTransformer`, with values mixed by place in place of positions of the keys.

  Attributes:
    width: channels of the output.
    window: side of the window, which begins half of it before the position.
    num_groups: of channels; the embeddings have the width of a group.
    num_mixed: value projections.
    use_bias: of the projections.
    dtype: of the computation.
  """

  width: int
  window: int
  num_groups: int = 1
  num_mixed: int = 4
  use_bias: bool = False
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Returns what each position gathers from its neighbours."""
    radius = self.window // 2
    padded = jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    project = functools.partial(
      _pointwise, self.width, self.dtype, use_bias=self.use_bias, kernel_init=kaiming_normal
    )
    group = self.width // self.num_groups
    normal = nn.initializers.normal(1.0)
    rows = self.param("row_embedding", normal, (group, self.window))
    columns = self.param("column_embedding", normal, (group, self.window))
    mixtures = self.param("mixture_embedding", normal, (self.num_mixed, group))
    logits = (mixtures @ rows)[:, :, None] + (mixtures @ columns)[:, None]
    values = [project(name=f"value{i}")(padded) for i in range(self.num_mixed)]
    return attend_by_channel(
      project(name="query")(x),
      project(name="key")(padded),
      jnp.concatenate(values, axis=-1),
      self.window,
      value_weights=jax.nn.softmax(logits.reshape(self.num_mixed, -1), axis=0),
    )


class _Unused(nn.Module):
  """A kernel that is made, counted and saved, and that nothing uses: see the module's docstring."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> Float[Array, "..."]:
    """Returns the kernel."""
    return self.param("kernel", kaiming_uniform, self.shape)


def _pointwise(features: int, dtype: Dtype, **fields: Any) -> nn.Dense:
  """A 1x1 convolution."""
  fields.setdefault("kernel_init", kaiming_uniform)
  return nn.Dense(features, dtype=dtype, **fields)


def _conv3x3(features: int, dtype: Dtype, *, name: str, stride: int = 1) -> nn.Conv:
  return nn.Conv(
    features,
    (3, 3),
    (stride, stride),
    padding=((1, 1), (1, 1)),
    use_bias=False,
    kernel_init=kaiming_uniform,
    dtype=dtype,
    name=name,
  )
