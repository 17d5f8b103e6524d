"""Feature pyramid transformer (FPT): attention within and across the levels of a feature pyramid.

Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451, section 3. The authors'
code (ZHANGDONG-NJUST/FPT at c7c76f9) differs from the paper and does not run as published; no
trained weights were released. `variant` selects one of the two:

| topic                 | "paper"                              | "official"                        |
|-----------------------|--------------------------------------|-----------------------------------|
| self: similarity      | q.k of each part, unscaled           | q.k / sqrt(d), d of all parts     |
| self: projections     | separate, without bias               | queries and keys share one; bias  |
| self: keys and values | at every position                    | averaged over 3x3, stride 2       |
| self: mixture         | from the mean key                    | from the mean query               |
| self: output          | as it is                             | 1x1, batch norm, plus the input   |
| self: dropout         | none                                 | 0.1 of the attention map          |
| grounding: similarity | -|q - k|^2, softmax                  | q.k / positions, no softmax       |
| grounding: mixture    | four parts                           | none                              |
| grounding: width      | that of the pyramid                  | half of it                        |
| grounding: output     | as it is                             | 1x1, batch norm initialized to 0  |
| grounding in a window | for segmentation: `window`           | another module, used nowhere      |
| rendering: gate       | mean key                             | 1x1 of the mean, norm, ReLU       |
| rendering: gate acts  | before the 3x3 convolution           | after it and its batch norm       |
| rendering: fine map   | one convolution strided by the ratio | stride 2, repeated                |
| rendering: output     | as it is                             | batch norms, sum, ReLU            |
| unused parameters     | none                                 | two kernels of each rendering     |
| DropBlock             | on each output in training           | created, never applied            |
| joining               | concatenation, 3x3 convolution to `width` channels, in both           |

The paper does not state whether the projections `query`, `key` and `value` have a bias (none here),
the norms after the lateral and joining convolutions (`norm`), and the variant of its results.

"official" has two fixes, without which that code does not run: the last reshape of the grounding
transformer, and rendering transformers of non-adjacent levels, which downsample the fine map
repeatedly (the authors' answer in their issue #25). Odd map sizes, which the code refuses, work.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_uniform, pytorch_uniform
from vit_jax_zoo.nn.norm import BatchNorm, conv_norm
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, average_pool
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.fpt.attention import (
  BLOCK_ELEMENTS,
  Similarity,
  attend,
  attend_locally,
  attention_map,
  local_attention_map,
  mixture_weights,
)
from vit_jax_zoo.systems.fpt.figures import draw_attention, explain_attention

TRANSFORMER_VARIANTS = ("paper", "official")


class MixtureTransformer(nn.Module):
  """Attention from one map to another by a mixture of softmaxes; mixture from the mean key.

  Sows `mixture` [b p], and the full attention map as `weights` [b h*w y*x], or [b h w window^2], if
  "intermediates" is mutable: use small images.
  """

  width: int  # output channels, a multiple of `num_parts`
  num_parts: int  # softmaxes, each of its part of the channels; N in the paper
  similarity: str  # "dot" or "euclidean"
  window: int | None = None  # odd side of the window of keys around each query; None: all keys
  block_elements: int = BLOCK_ELEMENTS  # see `attend`
  dtype: Dtype = "float32"  # of the computation; softmaxes are float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], context: Float[Array, "b y x c"] | None = None
  ) -> Float[Array, "b h w d"]:
    """Returns the values of `context` (default: `x`), attended to from each position of `x`."""
    context = x if context is None else context
    query, key, value = (
      _pointwise(self.width, self.dtype, use_bias=False, name=name)(source)
      for name, source in (("query", x), ("key", context), ("value", context))
    )
    shape, flat = (self.num_parts, self.width), (x.shape[0], -1, self.width)
    projection = self.param("mixture", pytorch_uniform(self.num_parts), shape, jnp.float32)
    mixture = mixture_weights(key.reshape(flat), projection)
    self.sow("intermediates", "mixture", mixture)
    if self.window is None:
      query, key, value = (y.reshape(flat) for y in (query, key, value))
      weigh = attention_map
      attention = functools.partial(attend, block_elements=self.block_elements)
    else:
      weigh = functools.partial(local_attention_map, window=self.window)
      attention = functools.partial(attend_locally, window=self.window)
    similarity = Similarity(self.similarity)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", weigh(query, key, mixture, similarity=similarity))
    attended = attention(query, key, value, mixture, similarity=similarity)
    return attended.reshape(*x.shape[:3], self.width)


class SelfTransformer(MixtureTransformer):
  """Attention within a level: dot products, two parts (section 3.2)."""

  num_parts: int = 2
  similarity: str = "dot"


class GroundingTransformer(MixtureTransformer):
  """Attention from a fine to a coarse level: Euclidean distance, four parts (section 3.3).

  With `window`: the locality-constrained grounding transformer, for segmentation.
  """

  num_parts: int = 4
  similarity: str = "euclidean"


class RenderingTransformer(nn.Module):
  """From a fine to a coarse level (section 3.4): a channel gate, and the downsampled fine map."""

  width: int
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], fine: Float[Array, "b y x c"]
  ) -> Float[Array, "b h w d"]:
    """Returns the new coarse map. The sides of `fine` are a power of two times those of `x`."""
    ratio = side_ratio((fine.shape[1], fine.shape[2]), (x.shape[1], x.shape[2]))
    query = _pointwise(self.width, self.dtype, use_bias=False, name="query")(x)
    key = _pointwise(self.width, self.dtype, use_bias=False, name="key")(fine)
    gate = jnp.mean(key, (1, 2), keepdims=True, dtype=jnp.promote_types(key.dtype, jnp.float32))
    attended = _conv3x3(self.width, self.dtype, name="refine")(query * gate.astype(query.dtype))
    return attended + _conv3x3(self.width, self.dtype, name="value", stride=ratio)(fine)


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
    flat = (x.shape[0], -1, self.width)
    query_key = _pointwise(self.width, self.dtype, name="query_key")  # one convolution for both
    pooled = average_pool(x, 3, 2, 1)
    query = query_key(x).reshape(flat)
    key = query_key(pooled).reshape(flat)
    value = _pointwise(self.width, self.dtype, name="value")(pooled).reshape(flat)
    mixture = jnp.ones((x.shape[0], 1), jnp.float32)
    if self.num_parts > 1:
      shape = (self.num_parts, self.width)
      projection = self.param("mixture", pytorch_uniform(self.num_parts), shape, jnp.float32)
      mixture = mixture_weights(query, projection)
    key_of_dropout = self.make_rng("dropout") if train and self.dropout_rate > 0 else None
    similarity = Similarity("dot", self.width**-0.5, self.dropout_rate, key_of_dropout)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", attention_map(query, key, mixture, similarity))
    attended = attend(query, key, value, mixture, similarity, block_elements=self.block_elements)
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
    inner = self.width // 2
    value, query, key = (
      _pointwise(inner, self.dtype, name=name)(source).reshape(x.shape[0], -1, inner)
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
  """A coarse map gated by the mean of a fine one, plus the downsampled fine one."""

  width: int  # channels of both maps and of the output
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], fine: Float[Array, "b y x c"], *, train: bool
  ) -> Float[Array, "b h w d"]:
    """Returns the new coarse map. The sides of `fine` are a power of two times those of `x`."""
    ratio = side_ratio((fine.shape[1], fine.shape[2]), (x.shape[1], x.shape[2]))
    mean = jnp.mean(fine, (1, 2), keepdims=True, dtype=jnp.promote_types(fine.dtype, jnp.float32))
    gate = _pointwise(self.width, self.dtype, use_bias=False, name="gate")(mean.astype(fine.dtype))
    gate = nn.relu(BatchNorm(dtype=self.dtype, name="gate_norm")(gate, train=train))
    gated = _conv3x3(self.width, self.dtype, name="refine")(x)
    gated = BatchNorm(dtype=self.dtype, name="refine_norm")(gated, train=train) * gate
    halve = _conv3x3(self.width, self.dtype, stride=1 if ratio == 1 else 2, name="halve")
    added = fine
    for _ in range(max(1, int(math.log2(ratio)))):
      added = halve(added)
    _Unused((fine.shape[-1], self.width), name="reduce")()
    _Unused((2 * self.width, self.width), name="concat")()
    return nn.relu(BatchNorm(dtype=self.dtype, name="added_norm")(added, train=train) + gated)


class _Unused(nn.Module):
  """A kernel of the published state dict and parameter count that the code never uses."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> None:
    self.param("kernel", kaiming_uniform, self.shape, jnp.float32)


class FeaturePyramidTransformer(nn.Module):
  """Maps a feature pyramid to one of the same sizes (figure 2).

  Levels are numbered from the finest, 0: in `ground_0_1`, level 0 attends to level 1; in
  `render_1_0`, level 0 is rendered into level 1.
  """

  width: int = 256  # channels of all levels inside and of the output
  variant: str = "paper"  # "paper" or "official"; see the module's docstring
  # norm after lateral and joining convolutions, see `conv_norm`; group norm has 32 groups.
  # "official" always has batch norm inside.
  norm: str = "none"
  self_parts: int = 2  # N of the self-transformers (section 3.2); read from official weights
  window: int | None = None  # of locality-constrained grounding (section 3.3); None: all positions
  lateral: bool = True  # 1x1 convolutions of the levels to `width` channels; not in segmentation
  drop_block_rate: float = 0.0  # of the outputs in training; the paper lists DropBlock
  dropout_rate: float = 0.1  # of the official self-transformers' attention maps
  block_elements: int = BLOCK_ELEMENTS  # see `attention.attend`
  dtype: Dtype = "float32"  # of the computation; parameters, softmaxes, statistics are float32

  explain = staticmethod(explain_attention)
  draw_explanation = staticmethod(draw_attention)

  @nn.compact
  def __call__(
    self, pyramid: Sequence[Float[Array, "b _ _ _"]], *, train: bool = False
  ) -> tuple[Float[Array, "b _ _ d"], ...]:
    """Returns one map of `width` channels per level, of the level's size, from fine to coarse.

    The sides of neighbours are equal, or one is a power of two times the other, rounded up, as
    strided convolutions produce them. In training norms use batch statistics (and update
    "batch_stats", which must be mutable); dropout and DropBlock use the "dropout" stream.
    """
    self._check(pyramid)
    levels = [shard_batch(x.astype(self.dtype)) for x in pyramid]
    if self.lateral:
      levels = [self._conv(f"lateral_{i}", x, 1, train=train) for i, x in enumerate(levels)]
    outputs = []
    for i, x in enumerate(levels):
      parts = {f"self_{i}": self._self(f"self_{i}", x, train=train)}
      for j in reversed(range(i)):
        parts[f"render_{i}_{j}"] = self._render(f"render_{i}_{j}", x, levels[j], train=train)
      for j in range(i + 1, len(levels)):
        parts[f"ground_{i}_{j}"] = self._ground(f"ground_{i}_{j}", x, levels[j], train=train)
      for name, part in parts.items():
        self.sow("intermediates", f"{name}_output", part)
      joined = jnp.concatenate([*map(shard_batch, parts.values()), x], axis=-1)
      output = self._conv(f"join_{i}", shard_batch(joined), 3, train=train)
      outputs.append(DropBlock(self.drop_block_rate, name=f"drop_block_{i}")(output, train=train))
    return tuple(outputs)

  def _self(self, name: str, x: Float[Array, "b h w d"], *, train: bool) -> Array:
    fields = {"block_elements": self.block_elements, "dtype": self.dtype, "name": name}
    if self.variant == "paper":
      return SelfTransformer(self.width, self.self_parts, **fields)(x)
    official = OfficialSelfTransformer(self.width, self.self_parts, self.dropout_rate, **fields)
    return official(x, train=train)

  def _ground(
    self, name: str, x: Float[Array, "b h w d"], coarse: Array, *, train: bool
  ) -> Float[Array, "b h w d"]:
    if self.variant == "official":
      return OfficialGroundingTransformer(self.width, self.dtype, name=name)(x, coarse, train=train)
    fields = {"window": self.window, "block_elements": self.block_elements, "dtype": self.dtype}
    return GroundingTransformer(self.width, **fields, name=name)(x, coarse)

  def _render(
    self, name: str, x: Float[Array, "b h w d"], fine: Array, *, train: bool
  ) -> Float[Array, "b h w d"]:
    if self.variant == "paper":
      return RenderingTransformer(self.width, self.dtype, name=name)(x, fine)
    return OfficialRenderingTransformer(self.width, self.dtype, name=name)(x, fine, train=train)

  def _conv(
    self, name: str, x: Float[Array, "b h w c"], size: int, *, train: bool
  ) -> Float[Array, "b h w d"]:
    x = conv_norm(self, name, x, self.width, size, train=train)
    self.sow("intermediates", f"{name}_output", x)
    return x

  def _check(self, pyramid: Sequence[Float[Array, "b _ _ _"]]) -> None:
    check_names("variant", [self.variant], TRANSFORMER_VARIANTS)
    if self.window is not None and self.variant != "paper":
      raise ValueError("window: variant='official' has no windowed grounding; leave window out")
    if not pyramid:
      raise ValueError("pyramid: no levels; expected at least one")
    for level, x in enumerate(pyramid):
      if not self.lateral and x.shape[-1] != self.width:
        wrong = f"level {level} has {x.shape[-1]} channels"
        raise ValueError(f"{wrong}; expected width={self.width} with lateral=False")


def side_ratio(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
  """Returns the power of two by which a fine map's sides are longer; sides are rounded up."""
  for ratio in (2**i for i in range(max(fine).bit_length())):
    if (-(-fine[0] // ratio), -(-fine[1] // ratio)) == coarse:
      return ratio
  wrong = f"pyramid: {fine[0]}x{fine[1]} does not halve to {coarse[0]}x{coarse[1]}"
  raise ValueError(f"{wrong}; expected levels of half the sides, rounded up")


def _pointwise(features: int, dtype: Dtype, **fields: Any) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=kaiming_uniform, **fields)


def _conv3x3(features: int, dtype: Dtype, *, name: str, stride: int = 1) -> nn.Conv:
  fields = {"use_bias": False, "kernel_init": kaiming_uniform, "dtype": dtype, "name": name}
  return nn.Conv(features, (3, 3), stride, padding=1, **fields)


# The official repository's configs: Caffe's ResNet, group norm, adaptive heads.
_OFFICIAL = {
  "num_classes": 80,
  "neck": "fpt",
  "neck_fields": {"variant": "official", "norm": "group_norm"},
  "adaptive": True,
  "box_head": {"num_convs": 4, "num_dense": 1, "norm": "group_norm"},
  "convention": "detectron",
}

DETECTORS: dict[str, dict[str, Any]] = {
  f"{kind}_rcnn_r{depth}_fpt": {"backbone": {"blocks": RESNET_BLOCKS[depth]}, "neck": "fpt", **mask}
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {}}))
  for depth in (50, 101)
} | {
  f"{kind}_rcnn_r{depth}_fpt_official": {
    "backbone": {"blocks": RESNET_BLOCKS[depth], "stride_in_1x1": True},
    **_OFFICIAL,
    **mask,
  }
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {"norm": "group_norm", "fused": True}}))
  for depth in (50, 101)
}
"""Fields of `RCNN` by name of a detector with this neck."""
