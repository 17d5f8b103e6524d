"""DETR. Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872.

Images of a batch are padded to one size at the right and bottom. As in the official code the
padding is zero at the input of the backbone, but not after its first norm, so predictions depend
slightly on the amount of padding. `masked_backbone` zeroes the padding after every norm: an image
then has the predictions that it has without padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.errors import check_names, part_fields
from vit_jax_zoo.nn.attention import Implementation, MultiHeadAttention, key_padding_mask
from vit_jax_zoo.nn.init import kaiming_uniform, pytorch_uniform
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, ResNet
from vit_jax_zoo.nn.transformer import SHARDING_RULES as SHARDING_RULES
from vit_jax_zoo.nn.transformer import Mlp, Stack
from vit_jax_zoo.ops.attention import MASKED
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.ops.sharding import shard_batch


def _variant(depth: int, output_stride: int = 32, **fields: Any) -> dict[str, Any]:
  return {"backbone": {"blocks": RESNET_BLOCKS[depth], "output_stride": output_stride}, **fields}


_PANOPTIC = {"num_classes": 250, "mask_head": True}  # COCO's ids of things and stuff go up to 200

VARIANTS: dict[str, dict[str, Any]] = {  # Table 1; Table 5 for the panoptic ones
  "detr_r50": _variant(50),
  "detr_r50_dc5": _variant(50, 16),
  "detr_r101": _variant(101),
  "detr_r101_dc5": _variant(101, 16),
  "detr_r50_panoptic": _variant(50, **_PANOPTIC),
  "detr_r50_dc5_panoptic": _variant(50, 16, **_PANOPTIC),
  "detr_r101_panoptic": _variant(101, **_PANOPTIC),
}
"""Fields of `Detr` by model name."""

MAX_LEARNED_POSITIONS = 50  # rows and columns of the learned tables

Map: TypeAlias = Float[Array, "b h w d"]
Keep: TypeAlias = Bool[Array, "b h w"]  # False in the padding
Tokens: TypeAlias = Float[Array, "b n d"]
Queries: TypeAlias = Float[Array, "b q d"]
Mask: TypeAlias = Bool[Array, "b 1 1 n"]


class Detr(nn.Module):
  """Backbone, encoder-decoder Transformer, class and box heads (section 3.2, figure 2)."""

  num_classes: int = 91  # highest class id + 1: COCO's 80 ids go up to 90
  num_queries: int = 100  # N (Tables 1 and 5)
  width: int = 256  # of the Transformer, d (A.4)
  encoder_depth: int = 6  # Table 2
  decoder_depth: int = 6  # figure 4
  num_heads: int = 8  # of every attention (A.4)
  mlp_dim: int = 2048  # hidden width of the feed-forward networks (A.4)
  decoder: Mapping[str, Any] | None = None  # fields of its layers, if other than the encoder's
  dropout_rate: float = 0.1  # in the Transformer (A.4)
  position_embedding: str = "sine"  # Table 1; or "learned", at most 50 x 50 features (Table 3)
  mask_head: bool = False  # also predicts masks (section 4.4, Table 5)
  dense_predictions: bool = False  # of the encoder's tokens, see `Detection.dense_weight`
  # Fields of `ResNet`, with frozen batch norms by default; "output_stride" 16 is DC5 (Table 1).
  backbone: Mapping[str, Any] | None = None
  # See the module's docstring. For DC5, whose published weights (Table 1) were trained with one
  # image a GPU, without padding. Not applied within the mask head.
  masked_backbone: bool = False
  dtype: Dtype = "float32"  # of the computation; parameters, norms, logits and boxes are float32
  remat: str = "none"  # of Transformer layers, a key of `REMAT_POLICIES`
  scan_layers: bool = True  # compiles one encoder and one decoder layer instead of all
  attention_implementation: Implementation = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], mask: Keep | None = None, *, train: bool = False
  ) -> dict[str, Array]:
    """Detects objects in normalised images; `mask` is False in their padding.

    Returns `logits` [b q num_classes + 1], the last for "no object"; `boxes_cxcywh` [b q 4],
    relative to the image without its padding; `auxiliary_logits` and `auxiliary_boxes_cxcywh`
    [l ...], those of all decoder layers but the last; with a mask head `mask_logits` [b q h/4 w/4],
    of the padded image; with `dense_predictions` `dense_logits`, `dense_boxes_cxcywh` [b i j ...].
    """
    _check(self)
    mask = jnp.ones(images.shape[:3], dtype=bool) if mask is None else mask
    init = {"kernel_init": pytorch_uniform(), "bias_init": pytorch_uniform(self.width)}
    dense = functools.partial(nn.Dense, **init)
    class_head = dense(self.num_classes + 1, name="class_head")
    layers = [dense(n, name=f"box_head_{i}") for i, n in enumerate((self.width, self.width, 4))]
    box_head = nn.Sequential([layers[0], nn.relu, layers[1], nn.relu, layers[2]])
    transformer = self._transformer()
    normal, shape = nn.initializers.normal(1.0), (self.num_queries, self.width)
    queries = self.param("query_embedding", normal, shape, jnp.float32)

    def predict(x: Float[Array, "*b d"]) -> tuple[Float[Array, "*b k"], Float[Array, "*b 4"]]:
      x = x.astype(jnp.float32)
      return class_head(x), nn.sigmoid(box_head(x))

    features = self._backbone(jnp.where(mask[..., None], images, 0), mask, train=train)
    init["bias_init"] = pytorch_uniform(features["c5"].shape[-1])
    project = nn.Conv(self.width, (1, 1), **init, dtype=self.dtype, name="input_projection")
    projected = project(features["c5"])
    keep = self._feature_mask(mask, projected)
    memory, decoded = transformer(projected, self._positions(keep), keep, queries, train=train)
    logits, boxes = predict(decoded)

    self.sow("intermediates", "memory", memory)
    predictions = {
      "logits": logits[-1],
      "boxes_cxcywh": boxes[-1],
      "auxiliary_logits": logits[:-1],
      "auxiliary_boxes_cxcywh": boxes[:-1],
    }
    if self.dense_predictions:
      predictions["dense_logits"], predictions["dense_boxes_cxcywh"] = predict(memory)
    if self.mask_head:
      attend = MaskAttention(self.num_heads, self.dtype, name="mask_attention")
      maps = attend(decoded[-1], memory, keep)
      self.sow("intermediates", "mask_maps", maps)
      mask_head = MaskHead(self.width, self.dtype, name="mask_head")
      finer = [features[name] for name in ("c4", "c3", "c2")]
      predictions["mask_logits"] = mask_head(projected, maps, finer)
    return predictions

  def _backbone(self, images: Array, mask: Array, *, train: bool) -> dict[str, Array]:
    fields: dict[str, Any] = part_fields("backbone", ResNet, self.backbone)
    fields = {"norm": "frozen_batch_norm", **fields, "dtype": self.dtype, "name": "backbone"}
    if not self.masked_backbone:
      return ResNet(**fields)(images, train=train)
    reduced = [mask[:, ::stride, ::stride] for stride in (2, 4, 8, 16, 32)]
    return _MaskedResNet(**fields, keep={m.shape[1:]: m for m in reduced})(images, train=train)

  def _feature_mask(self, mask: Keep, features: Array) -> Bool[Array, "b i j"]:
    if self.masked_backbone:
      stride = (self.backbone or {}).get("output_stride", 32)
      return mask[:, ::stride, ::stride]
    return resize_nearest(mask[..., None], (features.shape[1], features.shape[2]))[..., 0]

  def _positions(self, keep: Keep) -> Map:
    if self.position_embedding == "sine":
      return sine_positions(keep, self.width).astype(self.dtype)
    half, (rows, columns) = self.width // 2, keep.shape[1:]
    shape = (MAX_LEARNED_POSITIONS, half)
    by_row = self.param("row_embedding", nn.initializers.uniform(1.0), shape, jnp.float32)
    by_column = self.param("column_embedding", nn.initializers.uniform(1.0), shape, jnp.float32)
    if max(rows, columns) > MAX_LEARNED_POSITIONS:
      wrong = f"position_embedding='learned': a feature map of {rows} x {columns}"
      raise ValueError(f"{wrong}; expected sides up to {shape[0]}. Use smaller images, or 'sine'")
    tables = by_column[None, :columns], by_row[:rows, None]  # columns first, as in the weights
    grid = [jnp.broadcast_to(table, (*keep.shape, half)) for table in tables]
    return jnp.concatenate(grid, axis=-1).astype(self.dtype)

  def _transformer(self) -> "Transformer":
    shared = ("num_heads", "mlp_dim", "dropout_rate", "dtype", "attention_implementation")
    fields = {name: getattr(self, name) for name in shared}
    own = part_fields("decoder", DecoderLayer, self.decoder)
    return Transformer(
      encoder_layer=functools.partial(EncoderLayer, **fields),
      decoder_layer=functools.partial(DecoderLayer, **{**fields, **own}),
      encoder_depth=self.encoder_depth,
      decoder_depth=self.decoder_depth,
      remat=self.remat,
      scan_layers=self.scan_layers,
      name="transformer",
    )


class Transformer(nn.Module):
  """The encoder, and the decoder with the outputs of all its layers (section A.3, figure 10).

  Scanned, the layers' parameters are in `encoder/...` and `decoder/...` with a leading depth axis;
  unrolled, in `encoder_0/...`, `decoder_0/...`.
  """

  encoder_layer: Callable[..., nn.Module]
  decoder_layer: Callable[..., nn.Module]
  encoder_depth: int
  decoder_depth: int
  remat: str
  scan_layers: bool

  @nn.compact
  def __call__(
    self, features: Map, positions: Map, keep: Keep, queries: Float[Array, "q d"], *, train: bool
  ) -> tuple[Map, Float[Array, "l b q d"]]:
    """Returns the encoder's output, and all decoder layers', normalised; `keep` masks padding."""
    tokens = features.reshape(features.shape[0], -1, features.shape[-1])
    positions = positions.reshape(tokens.shape)
    mask = key_padding_mask(keep.reshape(tokens.shape[:2]))
    queries = jnp.broadcast_to(queries.astype(tokens.dtype), (tokens.shape[0], *queries.shape))

    encoder = self._stack("encoder", self.encoder_layer, self.encoder_depth)
    memory, _ = encoder(tokens, positions, mask, train=train)
    decoder = self._stack("decoder", self.decoder_layer, self.decoder_depth)
    _, outputs = decoder(jnp.zeros_like(queries), queries, memory, positions, mask, train=train)
    norm = nn.LayerNorm(epsilon=1e-5, dtype=tokens.dtype, name="decoder_norm")
    return memory.reshape(features.shape), norm(outputs)

  def _stack(self, name: str, layer: Callable[..., nn.Module], depth: int) -> Stack:
    names = {"scanned_name": name, "layer_name": f"{name}_{{}}"}
    stack = Stack(layer, depth, scan=self.scan_layers, remat=self.remat, **names)
    nn.share_scope(self, stack)
    return stack


class _Layer(nn.Module):
  """Fields and parts that encoder and decoder layers share; see `Detr`."""

  num_heads: int
  mlp_dim: int
  dropout_rate: float = 0.1
  dtype: Dtype = jnp.float32
  attention_implementation: Implementation = None

  def _attention(self, name: str) -> MultiHeadAttention:
    # The official code initialises query, key and value as one [3d d] matrix: half the variance.
    return MultiHeadAttention(
      self.num_heads,
      dropout_rate=self.dropout_rate,
      kernel_init=nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
      out_kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      implementation=self.attention_implementation,
      name=name,
    )

  def _add(self, name: str, x: Queries, attended: Queries, *, train: bool) -> Queries:
    """Returns the sum of both, normalised."""
    attended = nn.Dropout(self.dropout_rate)(attended, deterministic=not train)
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")(x + attended)

  def _feed_forward(self, x: Tokens, *, train: bool) -> Tokens:
    fan_in = {(self.mlp_dim,): x.shape[-1], (x.shape[-1],): self.mlp_dim}  # by shape of the bias

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> Array:
      return pytorch_uniform(fan_in[shape])(key, shape, dtype)

    mlp = Mlp(self.mlp_dim, "relu", self.dropout_rate, bias_init=init, dtype=self.dtype, name="mlp")
    norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="mlp_norm")
    return norm(x + mlp(x, train=train))


class EncoderLayer(_Layer):
  """Self-attention over the feature map, then a feed-forward network, each with a norm after."""

  @nn.compact
  def __call__(
    self, x: Tokens, position: Tokens, mask: Mask, *, train: bool
  ) -> tuple[Tokens, None]:
    x = shard_batch(x)
    attend = self._attention("attention")
    attended = attend(x + position, x + position, x, mask=mask, train=train)
    x = self._add("attention", x, attended, train=train)
    return self._feed_forward(x, train=train), None


class DecoderLayer(_Layer):
  """Self-attention of the queries, cross-attention to the feature map, feed-forward network."""

  @nn.compact
  def __call__(
    self, x: Queries, queries: Queries, memory: Tokens, position: Tokens, mask: Mask, *, train: bool
  ) -> tuple[Queries, Queries]:
    x = shard_batch(x)
    attend = self._attention("self_attention")
    attended = attend(x + queries, x + queries, x, train=train)
    x = self._add("self_attention", x, attended, train=train)
    attend = self._attention("cross_attention")
    attended = attend(x + queries, memory + position, memory, mask=mask, train=train)
    x = self._add("cross_attention", x, attended, train=train)
    x = self._feed_forward(x, train=train)
    return x, x


def sine_positions(keep: Keep, width: int) -> Map:
  """Returns fixed position embeddings, normalised to the image where `keep` is True (section A.4).

  Half of the channels encode the row, then half the column, each as sines and cosines in turn of
  angles in (0, 2 pi] at frequencies from 1 down to 1 / 10,000.
  """
  half = width // 2
  frequencies = 10_000.0 ** -(np.arange(0, half, 2) / half)
  frequencies = jnp.asarray(frequencies.astype(np.float32))[None, None, None]

  def encode(axis: int) -> Float[Array, "b h w e"]:
    count = jnp.cumsum(keep.astype(jnp.float32), axis=axis)
    last = jax.lax.slice_in_dim(count, -1, None, axis=axis)
    angles = (count / (last + 1e-6) * (2 * np.pi))[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*keep.shape, half)

  return jnp.concatenate([encode(1), encode(2)], axis=-1)


class MaskAttention(nn.Module):
  """Attention maps of the queries over the encoder's output, without values (figure 8).

  The softmax runs over all heads and positions of a query together, as in the official code.
  """

  num_heads: int  # maps for each query
  dtype: Dtype = jnp.float32  # of the projections; the softmax is in float32

  @nn.compact
  def __call__(self, queries: Queries, memory: Map, keep: Keep) -> Float[Array, "b q h w m"]:
    """Returns the maps, 0 where `keep` is False."""
    heads = (self.num_heads, queries.shape[-1] // self.num_heads)
    init = nn.initializers.xavier_uniform()
    project = functools.partial(nn.DenseGeneral, heads, kernel_init=init, dtype=self.dtype)
    query = project(name="query")(queries) * heads[1] ** -0.5
    key = project(name="key")(memory)
    scores = jnp.einsum("bqmc,bhwmc->bqhwm", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(keep[:, None, :, :, None], scores, MASKED), axis=(2, 3, 4))


class MaskHead(nn.Module):
  """Five convolutions from the coarsest map up, with the backbone's features added (figure 8)."""

  width: int
  dtype: Dtype = jnp.float32  # of the convolutions; norms compute in float32

  @nn.compact
  def __call__(
    self, projected: Map, maps: Float[Array, "b q h w m"], features: Sequence[Array]
  ) -> Float[Array, "b q i j"]:
    """Returns float32 mask logits at the size of the last, finest of three `features` [b _ _ _]."""
    batch, queries = maps.shape[:2]
    x = self._first(projected, maps)
    x = self._norm(1, x.reshape(batch * queries, *x.shape[2:]))
    x = self._norm(2, self._conv("conv2", self.width // 2)(x))
    for index, feature in enumerate(features, start=1):
      adapted = self._conv(f"adapter{index}", x.shape[-1], size=1)(feature)
      x = resize_nearest(x, adapted.shape[1:3])
      x = x.reshape(batch, queries, *x.shape[1:]) + adapted[:, None]
      x = x.reshape(batch * queries, *x.shape[2:])
      x = self._norm(index + 2, self._conv(f"conv{index + 2}", self.width // 2 ** (index + 1))(x))
    logits = self._conv("out", 1)(x).astype(jnp.float32)
    return logits.reshape(batch, queries, *logits.shape[1:3])

  def _first(self, projected: Array, maps: Array) -> Float[Array, "b q h w e"]:
    """Convolves `projected`, once for all queries, concatenated with each query's maps."""
    heads = maps.shape[-1]
    channels = projected.shape[-1] + heads
    kernel = self.param("conv1_kernel", kaiming_uniform, (3, 3, channels, channels), jnp.float32)
    bias = self.param("conv1_bias", nn.initializers.zeros, (channels,), jnp.float32)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    convolve = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    shared = convolve(projected.astype(self.dtype), kernel[:, :, :-heads])
    flat = maps.reshape(-1, *maps.shape[2:]).astype(self.dtype)
    own = convolve(flat, kernel[:, :, -heads:])
    own = own.reshape(*maps.shape[:2], *own.shape[1:])
    return own + (shared + bias[None, None, None])[:, None]

  def _conv(self, name: str, features: int, size: int = 3) -> nn.Module:
    return nn.Conv(features, (size, size), kernel_init=kaiming_uniform, dtype=self.dtype, name=name)

  def _norm(self, index: int, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    groups = min(8, x.shape[-1])  # as transformers; the official code always has 8
    if x.shape[-1] % groups:
      wrong = f"width: {self.width}, {x.shape[-1]} channels in layer {index} of the mask head"
      raise ValueError(f"{wrong}; expected a multiple of 64, with num_heads=8")
    return nn.relu(nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=f"norm{index}")(x))


class _MaskedResNet(ResNet):
  """A ResNet whose features are zero in the padding after every norm, as outside of the image."""

  keep: Mapping[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)  # by map size

  def _norm_factory(self) -> Callable[..., nn.Module]:
    make = super()._norm_factory()

    def masked(**fields: Any) -> Callable[..., Array]:
      norm = make(**fields)
      return lambda x, train: jnp.where(self.keep[x.shape[1:3]][..., None], norm(x, train=train), 0)

    return masked  # pyrefly: ignore[bad-return]


def _check(model: Detr) -> None:
  check_names("position_embedding", [model.position_embedding], ("sine", "learned"))
  check_positive(model, "num_classes", "num_queries", "encoder_depth", "decoder_depth")
  check_positive(model, "width", "num_heads", "mlp_dim")
  check_rates(model, "dropout_rate")
  if model.width % 4:
    raise ValueError(f"width: {model.width} is given; expected a multiple of 4")
