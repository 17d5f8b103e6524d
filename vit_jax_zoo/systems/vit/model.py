"""Vision Transformer. Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929.

The defaults are those of the paper's own code: tanh-approximated GELU, layer-norm epsilon 1e-6,
class token with a position of its own. timm and Hugging Face have the exact GELU, and the latter
epsilon 1e-12: the fields `activation` and `layer_norm_epsilon` say so.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.attention import Implementation
from vit_jax_zoo.nn.drop import drop_path_rates
from vit_jax_zoo.nn.transformer import EncoderBlock, Stack
from vit_jax_zoo.ops.checks import check_num_classes, check_positive, check_rates
from vit_jax_zoo.ops.interpretability import Explanation
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.vit.attention_maps import (
  attention_distances,
  attention_rollout,
  patch_tokens,
)
from vit_jax_zoo.systems.vit.hybrid import StandardizedResNet, total_stride
from vit_jax_zoo.systems.vit.position import PositionEmbedding


def _size(width: int, depth: int, mlp_dim: int, num_heads: int) -> dict[str, Any]:
  return {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}


# B, L and H: Table 1. Ti and S: arXiv:2012.12877. giant and gigantic ("g", "G"): arXiv:2106.04560,
# Table 2. so400m: arXiv:2305.13035. e: arXiv:2209.06794. mu and m: google-research/big_vision.
_SIZES = {
  "mu": _size(32, 1, 128, 2),
  "ti": _size(192, 12, 768, 3),
  "s": _size(384, 12, 1536, 6),
  "m": _size(512, 12, 2048, 8),
  "b": _size(768, 12, 3072, 12),
  "l": _size(1024, 24, 4096, 16),
  "so400m": _size(1152, 27, 4304, 16),
  "h": _size(1280, 32, 5120, 16),
  "giant": _size(1408, 40, 6144, 16),
  "gigantic": _size(1664, 48, 8192, 16),
  "e": _size(1792, 56, 15360, 16),
}
_PATCHES = {
  "mu": (16,),
  "ti": (16,),
  "s": (8, 16, 32),
  "m": (16, 32),
  "b": (8, 16, 32),
  "l": (14, 16, 32),
  "so400m": (14, 16),
  "h": (14, 16),
  "giant": (14, 16),
  "gigantic": (14,),
  "e": (14,),
}
# Appendix B.1 and arXiv:2106.10270: stages of the ResNet, size and patch of the Transformer.
# Without stages the root's stride 4 and 8x8 patches give 32, although the published name says 16.
_HYBRIDS = {
  "r_ti16": ((), "ti", 8),
  "r_b16": ((), "b", 8),
  "r26_s32": ((2, 2, 2, 2), "s", 1),
  "r26_b32": ((2, 2, 2, 2), "b", 1),
  "r50_b16": ((3, 4, 9), "b", 1),
  "r50_b32": ((3, 4, 6, 3), "b", 1),
  "r50_l16": ((3, 4, 9), "l", 1),
  "r50_l32": ((3, 4, 6, 3), "l", 1),
}

VARIANTS: dict[str, dict[str, Any]] = {
  f"vit_{size}{patch}": {**_SIZES[size], "patch_size": patch}
  for size, patches in _PATCHES.items()
  for patch in patches
} | {
  f"vit_{name}": {**_SIZES[size], "patch_size": patch, "resnet": {"stage_sizes": stages}}
  for name, (stages, size, patch) in _HYBRIDS.items()
}
"""Fields of `VisionTransformer` by model name."""

SHARDING_RULES = (
  (r".*/(query|key|value)/kernel", ("fsdp", "model", None)),
  (r".*/(query|key|value)/bias", ("model", None)),
  (r".*/attention/out/kernel", ("model", None, "fsdp")),
  (r".*/mlp/hidden/kernel", ("fsdp", "model")),
  (r".*/mlp/hidden/bias", ("model",)),
  (r".*/mlp/out/kernel", ("model", "fsdp")),
  (r".*/(bias|scale)", ()),
  (r".*", "fsdp"),
)
"""Heads and hidden units over `model`, the other side of each matrix over `fsdp`."""

POOLS = ("cls", "mean")


class VisionTransformer(nn.Module):
  """Cuts the image into patches, encodes them as a sequence, classifies (Eq. 1 to 4).

  Attributes:
    num_classes: size of the label set; None leaves out the head and returns features alone.
    patch_size: side of a patch, in pixels of the image, or of the ResNet's output in a hybrid.
    width: of the token vectors, D in the paper.
    depth: number of encoder blocks, L.
    num_heads: attention heads in each block.
    mlp_dim: hidden width of each block's perceptron.
    resnet: fields of `StandardizedResNet`, at least `stage_sizes`, for a hybrid.
    pool: what the head sees: "cls", the class token, or "mean" over the patches' tokens.
    cls_token: whether there is a class token; None: exactly if the pool needs it.
    norm_after_pool: normalises the pooled vector, and not the tokens (timm's `fc_norm`).
    position_embedding: "learned_1d", "learned_2d", "sincos_2d" or "none" (Table 8).
    cls_token_position: whether the class token has a row in the "learned_1d" table (as in the
      paper's code); big_vision adds positions before it prepends the token.
    representation_size: width of the tanh layer before the head (pre-training, section 3.1); None
      leaves it out.
    dropout_rate: after positions are added and after each dense layer but query, key and value.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
    activation: "gelu_tanh" or "gelu".
    layer_norm_epsilon: under the root of every layer norm.
    qkv_bias: whether query, key and value have biases.
    head_bias_init: value of the head's bias at the start; -10 for sigmoid losses with many classes.
    dtype: of the computation. Parameters, softmax, norms' statistics and logits are float32.
    remat: what blocks keep for the backward pass: a key of `REMAT_POLICIES`.
    scan_layers: one block compiled and run `depth` times, or `depth` blocks; so, too, for the equal
      units of a hybrid's stages.
    attention_implementation: see `attention.Implementation`.
  """

  num_classes: int | None = 1000
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int = 3072
  resnet: Mapping[str, Any] | None = None
  pool: str = "cls"
  cls_token: bool | None = None
  norm_after_pool: bool = False
  position_embedding: str = "learned_1d"
  cls_token_position: bool = True
  representation_size: int | None = None
  dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6
  qkv_bias: bool = True
  head_bias_init: float = 0.0
  dtype: Dtype = "float32"
  remat: str = "none"
  scan_layers: bool = True
  attention_implementation: Implementation = None

  @property
  def patch_side(self) -> int:
    """Pixels of the image behind one token, along each side: a hybrid's stride counts."""
    stride = 1 if self.resnet is None else total_stride(self.resnet["stage_sizes"])
    return stride * self.patch_size

  @nn.compact
  def __call__(
    self, images: Float[Array | np.ndarray, "b h w c"], *, train: bool = False
  ) -> dict[str, Array]:
    """Classifies `images`.

    Args:
      images: normalised, to [-1, 1] in the paper's code. Their sides must be multiples of the
        patch size (of the hybrid's stride times the patch size); they need not be square.
      train: switches dropout and stochastic depth on; they draw from the "dropout" stream.

    Returns:
      `features` [b d], what the head sees; `tokens` [b n width], the encoder's output, the class
      token first if there is one; `logits` [b num_classes], unless `num_classes` is None. Features
      and logits are float32. With `mutable="intermediates"` also `patches` [b h w width],
      `embedded`, `encoded`, `pooled`, and below `encoder` what `EncoderBlock` and
      `MultiHeadAttention` sow: each block's output, each attention map.
    """
    self._check()
    patches = self._patches(jnp.asarray(images))
    grid = (patches.shape[1], patches.shape[2])
    tokens = patches.reshape(patches.shape[0], -1, self.width)
    tokens = self._prefix(tokens, grid)  # Eq. 1
    self.sow("intermediates", "embedded", tokens)
    tokens = nn.Dropout(self.dropout_rate)(tokens, deterministic=not train)
    rates = drop_path_rates(self.drop_path_rate, self.depth) if self.drop_path_rate else None
    tokens, _ = self._encoder()(tokens, per_layer=rates, train=train)  # Eq. 2 and 3

    norm = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm")
    if not self.norm_after_pool:
      tokens = norm(tokens)  # Eq. 4
    self.sow("intermediates", "encoded", tokens)
    first = int(self._has_cls_token)
    features = tokens[:, 0] if self.pool == "cls" else self._mean(tokens[:, first:])
    if self.norm_after_pool:
      features = norm(features)
    self.sow("intermediates", "pooled", features)
    return {"tokens": tokens, **self._head(features)}

  def explain(
    self, variables: Mapping[str, Any], intermediates: Any, image_size: tuple[int, int]
  ) -> Explanation:
    """Returns what figures 6 and 7 of the paper show; see `ops.explanation`.

    The head sees the class token, or the mean over the patches: that is what looks.
    """
    grid = (image_size[0] // self.patch_side, image_size[1] // self.patch_side)
    weights = _attention_maps(intermediates["encoder"])
    params, cls = variables["params"], self.pool == "cls"

    def seen_by_head(maps: Array) -> Array:
      maps = patch_tokens(maps, grid, axis=-1)
      seen = maps[..., 0, :] if cls else patch_tokens(maps, grid, axis=-2).mean(axis=-2)
      return seen.reshape(*seen.shape[:-1], *grid)

    hybrid = self.resnet is not None
    return Explanation(
      looked_at=seen_by_head(attention_rollout(weights)),
      heads=seen_by_head(weights.swapaxes(0, 1)),
      distances=attention_distances(weights, grid, patch_size=float(self.patch_side)),
      positions=self._positions(params, grid),
      filters=params["resnet"]["root_conv"]["kernel"] if hybrid else params["embedding"]["kernel"],
      viewer="the class token" if cls else "the patches' mean",
      principal=not hybrid,
      grid=grid,
    )

  def _positions(self, params: Mapping[str, Any], grid: tuple[int, int]) -> Array | None:
    """Returns what is added to each patch, or None."""
    if self.position_embedding == "none":
      return None
    own = params.get("position_embedding", {})
    count = own["table"].shape[1] if "table" in own else grid[0] * grid[1]
    add = PositionEmbedding(self.position_embedding, parent=None)
    table = add.apply({"params": own}, jnp.zeros((1, count, self.width)), grid)
    return patch_tokens(jnp.asarray(table)[0], grid, axis=0)

  def _patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    self._check_sides(images.shape[1], images.shape[2])
    x = shard_batch(images)
    if self.resnet is not None:
      settings: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat != "none"}
      settings.update(self.resnet)
      x = StandardizedResNet(scan_layers=self.scan_layers, name="resnet", **settings)(x)
    side = (self.patch_size, self.patch_size)
    x = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype, name="embedding")(x)
    self.sow("intermediates", "patches", x)
    return x

  def _prefix(self, tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b m d"]:
    """Prepends the class token and adds positions, in the order the fields ask for."""
    position = PositionEmbedding(self.position_embedding, name="position_embedding")
    has_cls = self._has_cls_token
    cls_row = has_cls and self.cls_token_position and self.position_embedding == "learned_1d"
    if not cls_row:
      tokens = position(tokens, grid)
    if has_cls:
      cls = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
      cls = jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, self.width))
      tokens = jnp.concatenate([cls, tokens], axis=1)
    return position(tokens, grid) if cls_row else tokens

  def _encoder(self) -> Stack:
    block = functools.partial(
      EncoderBlock,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      dropout_rate=self.dropout_rate,
      activation=self.activation,
      qkv_bias=self.qkv_bias,
      layer_norm_epsilon=self.layer_norm_epsilon,
      dtype=self.dtype,
      attention_implementation=self.attention_implementation,
    )
    return Stack(block, self.depth, self.scan_layers, self.remat, name="encoder")

  def _head(self, features: Float[Array, "b d"]) -> dict[str, Array]:
    if self.representation_size is not None:
      dense = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")
      features = jnp.tanh(dense(features))
    features = features.astype(jnp.float32)
    if self.num_classes is None:
      return {"features": features}
    head = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros,
      bias_init=nn.initializers.constant(self.head_bias_init),
      dtype=jnp.float32,
      name="head",
    )
    return {"features": features, "logits": head(features)}

  @staticmethod
  def _mean(tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    return jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)

  @property
  def _has_cls_token(self) -> bool:
    return self.pool == "cls" if self.cls_token is None else self.cls_token

  def _check_sides(self, height: int, width: int) -> None:
    stride = self.patch_side
    for name, side in (("height", height), ("width", width)):
      if side % stride or not side:
        below, above = side // stride * stride, (side // stride + 1) * stride
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
          f"image {name} {side} is not a multiple of {stride}, the side of a patch in pixels; "
          f"resize to {fits}"
        )

  def _check(self) -> None:
    if self.pool not in POOLS:
      raise ValueError(unknown_name("pool", self.pool, POOLS))
    if self.pool == "cls" and not self._has_cls_token:
      raise ValueError("pool 'cls' needs the class token; set cls_token=True or pool='mean'")
    check_num_classes(self)
    check_positive(self, "patch_size", "width", "depth", "num_heads", "mlp_dim")
    check_rates(self, "dropout_rate")


def _attention_maps(intermediates: Mapping[str, Any]) -> Float[Array, "l b heads n n"]:
  """Returns the attention maps that the encoder has sown, scanned or unrolled."""
  if "blocks" in intermediates:
    return intermediates["blocks"]["attention"]["weights"][0]
  blocks = [intermediates[f"block_{i}"] for i in range(len(intermediates))]
  return jnp.stack([block["attention"]["weights"][0] for block in blocks])
