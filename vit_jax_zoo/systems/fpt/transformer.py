"""Feature pyramid transformer (FPT): attention within and across the levels of a feature pyramid.

Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451, section 3. The authors'
code (ZHANGDONG-NJUST/FPT at c7c76f9) differs from the paper (see docs/systems/fpt.md) and does not
run as published; no trained weights were released. `variant` selects one of the two.

The paper does not state whether the projections `query`, `key` and `value` have a bias (none here),
the norms after the lateral and joining convolutions (`norm`), and the variant of its results.

"official" has two fixes, without which that code does not run: the last reshape of the grounding
transformer, and rendering transformers of non-adjacent levels, which downsample the fine map
repeatedly (the authors' answer in their issue #25). Odd map sizes, which the code refuses, work.

No code of the networks for semantic segmentation was released. Not stated in the paper, and chosen
as usual: a 3x3 convolution joins the levels before the classifier; an optional auxiliary classifier
on c4 (arXiv:1612.01105, section 3.2).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names, part_fields
from vit_jax_zoo.nn.drop import DropBlock
from vit_jax_zoo.nn.init import kaiming_normal, kaiming_uniform, pytorch_uniform
from vit_jax_zoo.nn.norm import BatchNorm, conv_norm, norm_factory
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, ConvNorm, ResNet, average_pool
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.fpt import attention
from vit_jax_zoo.systems.fpt.attention import BLOCK_ELEMENTS, Similarity
from vit_jax_zoo.systems.fpt.figures import draw_attention, explain_attention

TRANSFORMER_VARIANTS = ("paper", "official")

Map: TypeAlias = Float[Array, "b h w c"]
OtherMap: TypeAlias = Float[Array, "b y x c"]  # of another level
Pyramid: TypeAlias = Sequence[Float[Array, "b _ _ _"]]
NewMap: TypeAlias = Float[Array, "b h w d"]


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
  def __call__(self, x: Map, context: OtherMap | None = None) -> NewMap:
    """Returns the values of `context` (default: `x`), attended to from each position of `x`."""
    context = x if context is None else context
    query, key, value = (
      _pointwise(self.width, self.dtype, use_bias=False, name=name)(source)
      for name, source in (("query", x), ("key", context), ("value", context))
    )
    shape, flat = (self.num_parts, self.width), (x.shape[0], -1, self.width)
    projection = self.param("mixture", pytorch_uniform(self.num_parts), shape, jnp.float32)
    mixture = attention.mixture_weights(key.reshape(flat), projection)
    self.sow("intermediates", "mixture", mixture)
    similarity = Similarity(self.similarity)
    if self.window is None:
      query, key, value = (y.reshape(flat) for y in (query, key, value))
      weigh = attention.attention_map
      attend = functools.partial(attention.attend, block_elements=self.block_elements)
    else:
      weigh = functools.partial(attention.local_attention_map, window=self.window)
      attend = functools.partial(attention.attend_locally, window=self.window)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", weigh(query, key, mixture, similarity=similarity))
    attended = attend(query, key, value, mixture, similarity=similarity)
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
  def __call__(self, x: Map, fine: OtherMap) -> NewMap:
    """Returns the new coarse map. The sides of `fine` are a power of two times those of `x`."""
    ratio = side_ratio(fine.shape[1:3], x.shape[1:3])
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
  def __call__(self, x: Map, *, train: bool) -> NewMap:
    flat = (x.shape[0], -1, self.width)
    query_key = _pointwise(self.width, self.dtype, name="query_key")  # one convolution for both
    pooled = average_pool(x, 3, 2, 1)
    query, key = query_key(x).reshape(flat), query_key(pooled).reshape(flat)
    value = _pointwise(self.width, self.dtype, name="value")(pooled).reshape(flat)
    mixture = jnp.ones((x.shape[0], 1), jnp.float32)
    if self.num_parts > 1:
      shape = (self.num_parts, self.width)
      projection = self.param("mixture", pytorch_uniform(self.num_parts), shape, jnp.float32)
      mixture = attention.mixture_weights(query, projection)
    key_of_dropout = self.make_rng("dropout") if train and self.dropout_rate > 0 else None
    similarity = Similarity("dot", self.width**-0.5, self.dropout_rate, key_of_dropout)
    if self.is_mutable_collection("intermediates"):
      weights = attention.attention_map(query, key, mixture, similarity)
      self.sow("intermediates", "weights", weights)
    attended = attention.attend(query, key, value, mixture, similarity, self.block_elements)
    attended = attended.reshape(*x.shape[:3], self.width)
    out = _pointwise(self.width, self.dtype, use_bias=False, name="out")(attended)
    return BatchNorm(dtype=self.dtype, name="norm")(out, train=train) + x


class OfficialGroundingTransformer(nn.Module):
  """A non-local block (arXiv:1711.07971, dot-product form) from a fine to a coarse map.

  Without residual connection or softmax. The output is zero at initialization.
  """

  width: int  # channels of both maps and of the output; queries, keys and values have half of it
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Map, coarse: OtherMap, *, train: bool) -> NewMap:
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
  def __call__(self, x: Map, fine: OtherMap, *, train: bool) -> NewMap:
    """Returns the new coarse map. The sides of `fine` are a power of two times those of `x`."""
    ratio = side_ratio(fine.shape[1:3], x.shape[1:3])
    mean = jnp.mean(fine, (1, 2), keepdims=True, dtype=jnp.promote_types(fine.dtype, jnp.float32))
    gate = _pointwise(self.width, self.dtype, use_bias=False, name="gate")(mean.astype(fine.dtype))
    gate = nn.relu(BatchNorm(dtype=self.dtype, name="gate_norm")(gate, train=train))
    gated = _conv3x3(self.width, self.dtype, name="refine")(x)
    gated = BatchNorm(dtype=self.dtype, name="refine_norm")(gated, train=train) * gate
    halve = _conv3x3(self.width, self.dtype, stride=1 if ratio == 1 else 2, name="halve")
    added = fine
    for _ in range(max(1, int(math.log2(ratio)))):
      added = halve(added)
    # Kernels of the published state dict and parameter count that the code never uses.
    for name, inputs in (("reduce", fine.shape[-1]), ("concat", 2 * self.width)):
      _pointwise(self.width, self.dtype, use_bias=False, name=name)(jnp.zeros((1, inputs)))
    return nn.relu(BatchNorm(dtype=self.dtype, name="added_norm")(added, train=train) + gated)


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
  def __call__(self, pyramid: Pyramid, *, train: bool = False) -> tuple[Array, ...]:
    """Returns one map of `width` channels per level, of the level's size, from fine to coarse.

    Sides of neighbours are equal, or one is a power of two times the other, rounded up. For `train`
    see `ResNet`; dropout and DropBlock use the "dropout" stream.
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

  def _self(self, name: str, x: Map, *, train: bool) -> NewMap:
    fields = {"block_elements": self.block_elements, "dtype": self.dtype, "name": name}
    if self.variant == "paper":
      return SelfTransformer(self.width, self.self_parts, **fields)(x)
    official = OfficialSelfTransformer(self.width, self.self_parts, self.dropout_rate, **fields)
    return official(x, train=train)

  def _ground(self, name: str, x: Map, coarse: OtherMap, *, train: bool) -> NewMap:
    if self.variant == "official":
      return OfficialGroundingTransformer(self.width, self.dtype, name=name)(x, coarse, train=train)
    fields = {"window": self.window, "block_elements": self.block_elements, "dtype": self.dtype}
    return GroundingTransformer(self.width, **fields, name=name)(x, coarse)

  def _render(self, name: str, x: Map, fine: OtherMap, *, train: bool) -> NewMap:
    if self.variant == "paper":
      return RenderingTransformer(self.width, self.dtype, name=name)(x, fine)
    return OfficialRenderingTransformer(self.width, self.dtype, name=name)(x, fine, train=train)

  def _conv(self, name: str, x: Map, size: int, *, train: bool) -> NewMap:
    x = conv_norm(self, name, x, self.width, size, train=train)
    self.sow("intermediates", f"{name}_output", x)
    return x

  def _check(self, pyramid: Pyramid) -> None:
    check_names("variant", [self.variant], TRANSFORMER_VARIANTS)
    if self.window is not None and self.variant != "paper":
      raise ValueError("window: variant='official' has no windowed grounding; leave window out")
    if not pyramid:
      raise ValueError("pyramid: no levels; expected at least one")
    for level, x in enumerate(pyramid):
      if not self.lateral and x.shape[-1] != self.width:
        wrong = f"level {level} has {x.shape[-1]} channels"
        raise ValueError(f"{wrong}; expected width={self.width} with lateral=False")


def side_ratio(fine: tuple[int, ...], coarse: tuple[int, ...]) -> int:
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


class GlobalConvolution(nn.Module):
  """A large kernel as the sum of two separable ones, column-row and row-column."""

  features: int
  kernel_size: int  # side of the kernel, odd; 1 is a 1x1 convolution
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Map) -> NewMap:
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise ValueError(f"kernel_sizes: {self.kernel_size}; expected odd numbers")
    fields = {"kernel_init": kaiming_normal, "dtype": self.dtype}
    conv = functools.partial(nn.Conv, self.features, **fields)
    if self.kernel_size == 1:
      return conv((1, 1), name="conv")(x)
    column, row = (self.kernel_size, 1), (1, self.kernel_size)
    one = conv(row, name="column_row")(conv(column, name="column")(x))
    return one + conv(column, name="row_column")(conv(row, name="row")(x))


class UnscathedPyramid(nn.Module):
  """Unscathed feature pyramid: maps of one size, smallest receptive field first."""

  width: int = 256  # channels of each level
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)  # from the finest to the coarsest level
  norm: str = "batch_norm"  # after the convolutions, a name of `norm_factory`
  dtype: Dtype = "float32"

  @nn.compact
  def __call__(self, x: Map, *, train: bool) -> tuple[NewMap, ...]:
    make_norm = norm_factory(self.norm, dtype=self.dtype)
    levels = []
    for index, size in enumerate(self.kernel_sizes):
      level = GlobalConvolution(self.width, size, self.dtype, name=f"branch_{index}")(x)
      level = make_norm(name=f"norm_{index}")(level, train=train)
      levels.append(shard_batch(jnp.maximum(level, 0)))
    return tuple(levels)


class PyramidSegmenter(nn.Module):
  """Classifies every pixel."""

  num_classes: int = 19
  width: int = 256  # channels of the pyramid's levels
  kernel_sizes: Sequence[int] = (1, 7, 15, 31)  # of `UnscathedPyramid` (the paper's UFP)
  neck: str = "fpt"  # "fpt", or "ufp": the pyramid without transformer, the paper's baseline
  window: int | None = 5  # of grounding, not stated in the paper; None: all positions
  transformer: Mapping[str, Any] | None = None  # further fields of `FeaturePyramidTransformer`
  norm: str = "batch_norm"  # norm of everything after the backbone; see `norm_factory`
  dropout_rate: float = 0.1  # before the classifiers (torchvision's FCNHead)
  auxiliary_head: bool = False  # on c4 in training (arXiv:1612.01105, section 3.2; the recipes)
  backbone: Mapping[str, Any] | None = None  # fields of `ResNet`; default "output_stride": 8
  dtype: Dtype = "float32"  # of the computation; parameters, statistics, logits are float32

  @nn.compact
  def __call__(self, images: Map, *, train: bool = False) -> dict[str, Array]:
    """Segments images, normalized with ImageNet's mean and standard deviation.

    Returns `logits` float32 [b i j num_classes], of the size of the backbone's last map; in
    training with an auxiliary head also `auxiliary_logits`. For `train` see `ResNet`; dropout
    uses the "dropout" stream.
    """
    check_names("neck", [self.neck], ("fpt", "ufp"))
    check_positive(self, "num_classes", "width", "kernel_sizes")
    check_rates(self, "dropout_rate")
    fields: dict[str, Any] = {"output_stride": 8, **part_fields("backbone", ResNet, self.backbone)}
    fields["dtype"] = self.dtype
    features = ResNet(**fields, name="backbone")(images, train=train)
    fields = {"width": self.width, "norm": self.norm, "dtype": self.dtype}
    ufp = UnscathedPyramid(**fields, kernel_sizes=self.kernel_sizes, name="pyramid")
    pyramid = ufp(features["c5"], train=train)
    if self.neck == "fpt":
      fields = {"norm": self.norm, "window": self.window}
      fields |= part_fields("transformer", FeaturePyramidTransformer, self.transformer)
      fields |= {"width": self.width, "lateral": False, "dtype": self.dtype}
      pyramid = FeaturePyramidTransformer(**fields, name="transformer")(pyramid, train=train)
    for level, x in enumerate(pyramid):
      self.sow("intermediates", f"level_{level}", x)
    joined = jnp.concatenate([nn.relu(x) for x in pyramid], axis=-1)
    outputs = {"logits": self._classify("head", joined, self.width, train=train)}
    if self.auxiliary_head and (train or self.is_initializing()):
      c4, width = features["c4"], max(1, features["c4"].shape[-1] // 4)
      outputs["auxiliary_logits"] = self._classify("auxiliary_head", c4, width, train=train)
    return outputs

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f"kernel {size}" for size in self.kernel_sizes)

  def _classify(self, name: str, x: Map, width: int, *, train: bool) -> NewMap:
    norm = norm_factory(self.norm, dtype=self.dtype)
    x = ConvNorm(width, 3, norm, dtype=self.dtype, name=f"{name}_conv")(x, train=train)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
    fields = {"kernel_init": nn.initializers.normal(0.01), "name": name}
    return nn.Dense(self.num_classes, dtype=jnp.promote_types(x.dtype, jnp.float32), **fields)(x)


VARIANTS: dict[str, dict[str, Any]] = {
  f"fpt_segmentation_r{depth}{suffix}": {"backbone": {"blocks": RESNET_BLOCKS[depth]}, **neck}
  for suffix, neck in (("", {}), ("_ufp", {"neck": "ufp"}))
  for depth in (50, 101)
} | {
  "fpt_pyramid": {},
  "fpt_pyramid_official": {"variant": "official"},
  "fpt_pyramid_official_gn": {"variant": "official", "norm": "group_norm"},
}
"""Fields by model name: of `PyramidSegmenter` ("ufp": without transformer), and of
`FeaturePyramidTransformer`, whose input is a pyramid instead of images."""

SHARDING_RULES = ((r".*/(bias|scale|mixture)", ()), (r".*", "fsdp"))
"""Kernels are sharded over `fsdp`, small arrays replicated."""

DETECTORS: dict[str, dict[str, Any]] = {
  f"{kind}_rcnn_r{depth}_fpt": {"backbone": {"blocks": RESNET_BLOCKS[depth]}, "neck": "fpt", **mask}
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {}}))
  for depth in (50, 101)
} | {
  # The official repository's configs: Caffe's ResNet, group norm, adaptive heads.
  f"{kind}_rcnn_r{depth}_fpt_official": {
    "backbone": {"blocks": RESNET_BLOCKS[depth], "stride_in_1x1": True},
    "num_classes": 80,
    "neck": "fpt",
    "neck_fields": {"variant": "official", "norm": "group_norm"},
    "adaptive": True,
    "box_head": {"num_convs": 4, "num_dense": 1, "norm": "group_norm"},
    "convention": "detectron",
    **mask,
  }
  for kind, mask in (("faster", {}), ("mask", {"mask_head": {"norm": "group_norm", "fused": True}}))
  for depth in (50, 101)
}
"""Fields of `RCNN` by name of a detector with this neck."""
