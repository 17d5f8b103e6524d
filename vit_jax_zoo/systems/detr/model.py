"""DETR. Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872.

A backbone, a Transformer, and as many predictions as there are object queries: a class, or "no
object", and a box for each. No anchors, no suppression of duplicates.

`num_classes` is the highest class id + 1 where ids are used as they are: 91 for COCO, whose 80
classes have ids up to 90. The last logit, one more, is "no object".

Images of a batch are padded to one size at the right and bottom. As in the paper's code the padding
is zero where it enters the backbone, but not behind the first bias in it, so that what lies beside
an image's border touches its features there: predictions depend, a little, on the padding (much in
the DC5 variants, whose published weights have seen none). `masked_backbone` keeps it zero
throughout: an image is then seen as if it came alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.errors import part_fields, unknown_name
from vit_jax_zoo.nn.attention import Implementation
from vit_jax_zoo.nn.resnet import RESNET_BLOCKS, ResNet
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.resize import resize_nearest
from vit_jax_zoo.systems.detr.mask_head import MaskAttention, MaskHead
from vit_jax_zoo.systems.detr.transformer import DecoderLayer, EncoderDecoder, fan_in_uniform


def _variant(depth: int, output_stride: int = 32, **fields: Any) -> dict[str, Any]:
  return {
    "backbone": {"blocks": RESNET_BLOCKS[depth], "output_stride": output_stride},
    **fields,
  }


# COCO's things and stuff, ids as they are: the highest is 200, the published weights have room.
_PANOPTIC = {"num_classes": 250, "mask_head": True}

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

SHARDING_RULES = (
  (r".*/(query|key|value)/kernel", ("fsdp", "model", None)),
  (r".*/(query|key|value)/bias", ("model", None)),
  (r".*attention/out/kernel", ("model", None, "fsdp")),
  (r".*/mlp/hidden/kernel", ("fsdp", "model")),
  (r".*/mlp/hidden/bias", ("model",)),
  (r".*/mlp/out/kernel", ("model", "fsdp")),
  (r".*(bias|scale)", ()),
  (r".*", "fsdp"),
)
"""Heads and hidden units over `model`, the other side of each matrix over `fsdp`."""

POSITION_EMBEDDINGS = ("sine", "learned")
MAX_LEARNED_POSITIONS = 50  # rows and columns of the learned tables


class Detr(nn.Module):
  """Finds objects as a set (section 3.2, figure 2).

  Attributes:
    num_classes: highest class id + 1; see the module's docstring.
    num_queries: how many objects it can find in an image, N in the paper.
    width: of the Transformer, d.
    encoder_depth: number of encoder layers.
    decoder_depth: number of decoder layers.
    num_heads: of every attention.
    mlp_dim: hidden width of the layers' perceptrons.
    decoder: fields of the decoder's layers where they differ from the encoder's, such as
      {"mlp_dim": 1024}; None: they are alike, as in the paper.
    dropout_rate: in the Transformer.
    pre_norm: norms before attention and perceptron in place of after the sum.
    position_embedding: "sine", or "learned" (at most 50 rows and columns of features).
    mask_head: also predicts masks (section 4.4).
    cell_predictions: also asks class and box heads what they see in every cell of the encoder's
      map, for `Detection.cell_weight`; there is nothing to learn in addition. Not in the paper.
    backbone: fields of `ResNet`, over batch norms that are frozen. "output_stride" 16 is DC5.
    masked_backbone: see the module's docstring; with published weights, predictions of images
      without padding stay what they are. The mask head's own convolutions see the padding.
    dtype: of the computation. Parameters, softmax, norms' statistics, logits and boxes are float32.
    remat: what Transformer layers keep for the backward pass: a rung of `REMAT_LADDER`.
    scan_layers: one encoder and one decoder layer compiled, or all of them.
    attention_implementation: see `attention.Implementation`.
  """

  num_classes: int = 91
  num_queries: int = 100
  width: int = 256
  encoder_depth: int = 6
  decoder_depth: int = 6
  num_heads: int = 8
  mlp_dim: int = 2048
  decoder: Mapping[str, Any] | None = None
  dropout_rate: float = 0.1
  pre_norm: bool = False
  position_embedding: str = "sine"
  mask_head: bool = False
  cell_predictions: bool = False
  backbone: Mapping[str, Any] | None = None
  masked_backbone: bool = False
  dtype: Dtype = "float32"
  remat: str = "none"
  scan_layers: bool = True
  attention_implementation: Implementation = None

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w"] | None = None,
    *,
    train: bool = False,
  ) -> dict[str, Array]:
    """Detects objects.

    Args:
      images: normalised with ImageNet's mean and standard deviation.
      mask: True where a pixel belongs to the image, False in the padding, whose content does not
        matter. None: there is no padding.
      train: switches dropout on, which draws from the "dropout" stream.

    Returns:
      `logits` [b q num_classes + 1], the last for "no object"; `boxes_cxcywh` [b q 4], in shares of
      the image without its padding; `auxiliary_logits` and `auxiliary_boxes_cxcywh` [l ...], the
      same of all decoder layers but the last; with a mask head `mask_logits` [b q h/4 w/4], of the
      image with its padding; with `cell_predictions` `cell_logits` and `cell_boxes_cxcywh` [b i j
      ...]. All float32.
    """
    self._check()
    if mask is None:
      mask = jnp.ones(images.shape[:3], dtype=bool)
    features = self._features(jnp.where(mask[..., None], images, 0), mask, train=train)
    coarse = features["c5"]
    keep = self._feature_mask(mask, (coarse.shape[1], coarse.shape[2]))
    context = self._input_projection(coarse)
    positions = self._positions(keep).astype(self.dtype)
    flat = (len(images), -1, self.width)
    memory, outputs = self._transformer()(
      context.reshape(flat),
      positions.reshape(flat),
      keep.reshape(len(images), -1),
      self._queries(len(images)),
      train=train,
    )
    memory = memory.reshape(context.shape)
    self.sow("intermediates", "memory", memory)
    heads = self._heads()
    logits, boxes = heads(outputs.astype(jnp.float32))
    predictions = {
      "logits": logits[-1],
      "boxes_cxcywh": boxes[-1],
      "auxiliary_logits": logits[:-1],
      "auxiliary_boxes_cxcywh": boxes[:-1],
    }
    if self.cell_predictions:
      predictions["cell_logits"], predictions["cell_boxes_cxcywh"] = heads(
        memory.astype(jnp.float32)
      )
    if self.mask_head:
      attention = MaskAttention(self.num_heads, self.dtype, name="mask_attention")
      maps = attention(outputs[-1], memory, keep)
      predictions["mask_logits"] = self._masks(context, maps, features)
    return predictions

  def _masks(
    self,
    context: Float[Array, "b i j d"],
    maps: Float[Array, "b q i j heads"],
    features: Mapping[str, Array],
  ) -> Float[Array, "b q h w"]:
    """Returns a mask for each query, from where it looks."""
    self.sow("intermediates", "mask_maps", maps)
    finer = [features[name] for name in ("c4", "c3", "c2")]
    return MaskHead(self.width, self.dtype, name="mask_head")(context, maps, finer)

  def _features(
    self, images: Float[Array, "b h w c"], mask: Bool[Array, "b h w"], *, train: bool
  ) -> dict[str, Float[Array, "b _ _ _"]]:
    fields: dict[str, Any] = {
      "norm": "frozen_batch_norm",
      **part_fields("backbone", ResNet, self.backbone),
      "dtype": self.dtype,
    }
    if not self.masked_backbone:
      return ResNet(**fields, name="backbone")(images, train=train)
    keep = {}
    for stride in (2, 4, 8, 16, 32):
      reduced = mask[:, ::stride, ::stride]  # as many as ceil(side / stride), padded or not
      keep[reduced.shape[1:]] = reduced
    return _MaskedResNet(**fields, keep=keep, name="backbone")(images, train=train)

  def _feature_mask(
    self, mask: Bool[Array, "b h w"], size: tuple[int, int]
  ) -> Bool[Array, "b i j"]:
    """Returns where features belong to the image, at the size of the feature map."""
    if self.masked_backbone:
      stride = (self.backbone or {}).get("output_stride", 32)
      return mask[:, ::stride, ::stride]
    return resize_nearest(mask[..., None], size)[..., 0]

  def _input_projection(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    projection = nn.Conv(
      self.width,
      (1, 1),
      kernel_init=_linear_init,
      bias_init=fan_in_uniform(features.shape[-1]),
      dtype=self.dtype,
      name="input_projection",
    )
    return projection(features)

  def _positions(self, keep: Bool[Array, "b h w"]) -> Float[Array, "b h w d"]:
    if self.position_embedding == "sine":
      return sine_positions(keep, self.width)
    half, size = self.width // 2, keep.shape[1:]
    shape = (MAX_LEARNED_POSITIONS, half)
    rows = self.param("row_embedding", nn.initializers.uniform(1.0), shape)
    columns = self.param("column_embedding", nn.initializers.uniform(1.0), shape)
    if max(size) > MAX_LEARNED_POSITIONS:
      raise ValueError(
        f"a feature map of {size[0]} x {size[1]} is larger than the learned position tables of "
        f"{MAX_LEARNED_POSITIONS} rows and columns; use smaller images or position_embedding='sine'"
      )
    columns = jnp.broadcast_to(columns[None, : size[1]], (*size, half))
    rows = jnp.broadcast_to(rows[: size[0], None], (*size, half))
    table = jnp.concatenate([columns, rows], axis=-1)  # columns first: the weights have it so
    return jnp.broadcast_to(table, (len(keep), *table.shape))

  def _queries(self, batch: int) -> Float[Array, "b q d"]:
    shape = (self.num_queries, self.width)
    table = self.param("query_embedding", nn.initializers.normal(1.0), shape)
    return jnp.broadcast_to(table.astype(self.dtype), (batch, *shape))

  def _transformer(self) -> EncoderDecoder:
    layer = {
      "num_heads": self.num_heads,
      "mlp_dim": self.mlp_dim,
      "dropout_rate": self.dropout_rate,
      "pre_norm": self.pre_norm,
      "dtype": self.dtype,
      "attention_implementation": self.attention_implementation,
    }
    return EncoderDecoder(
      self.encoder_depth,
      self.decoder_depth,
      layer,
      {**layer, **part_fields("decoder", DecoderLayer, self.decoder)},
      self.remat,
      self.scan_layers,
      name="transformer",
    )

  def _heads(self) -> Callable[[Float[Array, "*b d"]], tuple[Array, Array]]:
    """Returns what turns outputs of any layer into logits [... k] and boxes [... 4]."""

    def dense(features: int, name: str) -> nn.Module:
      bias_init = fan_in_uniform(self.width)
      return nn.Dense(features, kernel_init=_linear_init, bias_init=bias_init, name=name)

    class_head = dense(self.num_classes + 1, "class_head")
    box_head = [dense(n, f"box_head_{i}") for i, n in enumerate((self.width, self.width, 4))]

    def predict(x: Float[Array, "*b d"]) -> tuple[Float[Array, "*b k"], Float[Array, "*b 4"]]:
      hidden = nn.relu(box_head[1](nn.relu(box_head[0](x))))
      return class_head(x), nn.sigmoid(box_head[2](hidden))

    return predict

  def _check(self) -> None:
    if self.position_embedding not in POSITION_EMBEDDINGS:
      raise ValueError(
        unknown_name("position_embedding", self.position_embedding, POSITION_EMBEDDINGS)
      )
    check_positive(self, "num_classes", "num_queries", "encoder_depth", "decoder_depth")
    check_positive(self, "width", "num_heads", "mlp_dim")
    check_rates(self, "dropout_rate")
    if self.width % 4:
      raise ValueError(f"width must be a multiple of 4 for its positions, not {self.width}")


class _MaskedResNet(ResNet):
  """A ResNet whose features are zero in the padding behind every norm, as beyond an image's border.

  All its convolutions pad with zeros, and its max-pool sees values that are not negative.

  Attributes:
    keep: True where a pixel belongs to the image, by size of the map.
  """

  keep: Mapping[tuple[int, ...], Any] | None = None

  def _norm_factory(self) -> Callable[..., nn.Module]:
    make = super()._norm_factory()
    keep = self.keep or {}

    def masked(**fields: Any) -> Callable[..., Array]:
      norm = make(**fields)

      def call(x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        return jnp.where(keep[x.shape[1:3]][..., None], norm(x, train=train), 0)

      return call

    return masked  # pyrefly: ignore[bad-return]


_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


def sine_positions(
  keep: Bool[Array, "b h w"],
  width: int,
  *,
  temperature: float = 10_000.0,
  normalize: bool = True,
) -> Float[Array, "b h w d"]:
  """Returns fixed positions that count the image's own pixels (section A.4).

  Half of the channels for the row, then half for the column, each alternating sine and cosine at
  falling frequencies.

  Args:
    keep: False in the padding, which does not count.
    width: number of channels, a multiple of 4.
    temperature: ratio of the highest frequency to the (not quite reached) lowest.
    normalize: scales an image's rows and columns to (0, 2 pi].
  """
  half = width // 2
  frequencies = temperature ** -(np.arange(0, half, 2) / half)
  frequencies = jnp.asarray(frequencies.astype(np.float32))[None, None, None]

  def encode(axis: int) -> Float[Array, "b h w e"]:
    count = jnp.cumsum(keep.astype(jnp.float32), axis=axis)
    if normalize:
      last = jax.lax.slice_in_dim(count, -1, None, axis=axis)
      count = count / (last + 1e-6) * (2 * np.pi)
    angles = count[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*keep.shape, half)

  return jnp.concatenate([encode(1), encode(2)], axis=-1)
