"""Vision Transformer. Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929.

Defaults follow the paper's code. The hybrids' ResNet is Big Transfer's, arXiv:1912.11370, section
3.1, with TensorFlow's SAME padding: for an even side, one more at the bottom and right.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax_zoo.errors import check_names, field_names
from vit_jax_zoo.nn.attention import Implementation, MultiHeadAttention
from vit_jax_zoo.nn.drop import DropPath, drop_path_rates
from vit_jax_zoo.nn.transformer import SHARDING_RULES as SHARDING_RULES
from vit_jax_zoo.nn.transformer import Mlp, Stack
from vit_jax_zoo.ops.checks import check_positive, check_rates
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.vit import figures


class VisionTransformer(nn.Module):
  """Patch embedding, Transformer encoder, classification head (Eq. 1 to 4)."""

  num_classes: int | None = 1000  # None: no head, as Hugging Face's `ViTModel`
  patch_size: int = 16  # side of a patch, in pixels, or in positions of a hybrid's ResNet output
  width: int = 768  # D in the paper (Table 1)
  depth: int = 12  # number of encoder blocks, L
  num_heads: int = 12  # attention heads of each block
  mlp_dim: int = 3072  # hidden width of each block's MLP
  resnet: Mapping[str, Any] | None = None  # fields of a hybrid's `StandardizedResNet` (section 3.1)
  pool: str = "cls"  # head's input: "cls" token, or "mean" over patch tokens (appendix D.3)
  # None: if the pool needs one. MAE's fine-tuned weights have one and pool patches.
  cls_token: bool | None = None
  fc_norm: bool = False  # norm after the pool instead of before it: MAE, timm
  # "learned_1d", "learned_2d", "none" (Table 8), or "sincos_2d" (arXiv:2205.01580)
  position_embedding: str = "learned_1d"
  # "learned_1d" has a row for the class token; big_vision's and DeiT-3's weights have none
  cls_token_position: bool = True
  representation_size: int | None = None  # tanh layer before the head (section 3.1); None: none
  dropout_rate: float = 0.0  # after positions and dense layers except query, key, value (Table 3)
  drop_path_rate: float = 0.0  # of the last block, linear from 0 at the first (arXiv:2106.10270)
  # "gelu_tanh" (Google), "gelu" (timm, Hugging Face), or another of `nn.transformer.ACTIVATIONS`
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6  # 1e-6 (Google, timm) or 1e-12 (Hugging Face)
  qkv_bias: bool = True  # timm's `vit_base_patch16_224_miil` has none
  head_bias_init: float = 0.0  # -10 in the paper's pre-training with sigmoid losses
  dtype: Dtype = "float32"  # parameters, softmax, norms' statistics and logits are float32
  remat: str = "none"  # saved activations, a key of `nn.transformer.REMAT_POLICIES`
  scan_layers: bool = True  # scans the encoder blocks, and the equal units of a hybrid's stages
  attention_implementation: Implementation = None  # see `nn.attention.Implementation`

  @nn.compact
  def __call__(
    self, images: Float[Array | np.ndarray, "b h w c"], *, train: bool = False
  ) -> dict[str, Array]:
    """Classifies normalised images (in [-1, 1] for Google's weights).

    Sides are multiples of the token stride. Dropout and stochastic depth use the "dropout" stream.

    Returns `features` float32 [b d], the input of the head; `tokens` [b n width], the encoder's
    output, class token first; `logits` float32 [b num_classes], unless `num_classes` is None. Sows
    `patches` [b h w width], `embedded`, `encoded`, `pooled`, and the blocks' intermediates.
    """
    _check(self, (images.shape[1], images.shape[2]))
    x = shard_batch(jnp.asarray(images))
    if self.resnet is not None:
      fields: dict[str, Any] = {"remat": self.remat != "none", "scan_layers": self.scan_layers}
      fields = {**fields, "dtype": self.dtype, **self.resnet}
      x = StandardizedResNet(**fields, name="resnet")(x)

    # Eq. 1: patch embedding, position embedding, class token.
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(self.width, patch, patch, padding="VALID", dtype=self.dtype, name="embedding")(x)
    self.sow("intermediates", "patches", x)
    grid, x = (x.shape[1], x.shape[2]), x.reshape(x.shape[0], -1, self.width)
    learned = self.position_embedding == "learned_1d"
    cls_row = self.has_cls_token and self.cls_token_position and learned
    positions = PositionEmbedding(self.position_embedding, cls_row, name="position_embedding")
    positions = positions(grid, self.width).astype(x.dtype)
    self.sow("intermediates", "positions", positions)
    if not cls_row:
      x = x + positions
    if self.has_cls_token:
      cls = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)
      x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
    if cls_row:
      x = x + positions
    self.sow("intermediates", "embedded", x)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)

    # Eq. 2 and 3: the encoder blocks.
    rates = drop_path_rates(self.drop_path_rate, self.depth) if self.drop_path_rate else None
    shared = {name: getattr(self, name) for name in field_names(EncoderBlock)}
    block = functools.partial(EncoderBlock, **shared)
    encoder = Stack(block, self.depth, self.scan_layers, self.remat, name="encoder")
    x, _ = encoder(x, per_layer=rates, train=train)

    # Eq. 4: the last norm, and the pool.
    norm = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm")
    x = x if self.fc_norm else norm(x)
    self.sow("intermediates", "encoded", x)
    if self.pool == "cls":
      features = jax.lax.index_in_dim(x, 0, axis=1, keepdims=False)  # no gather in exports
    else:
      patches = x[:, int(self.has_cls_token) :]
      features = jnp.mean(patches, axis=1, dtype=jnp.float32).astype(x.dtype)
    features = norm(features) if self.fc_norm else features
    self.sow("intermediates", "pooled", features)
    return {"tokens": x, **self._head(features)}

  def _head(self, features: Float[Array, "b d"]) -> dict[str, Array]:
    if self.representation_size is not None:
      dense = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")
      features = jnp.tanh(dense(features))
    features = features.astype(jnp.float32)
    if self.num_classes is None:
      return {"features": features}
    zeros, bias = nn.initializers.zeros, nn.initializers.constant(self.head_bias_init)
    init = {"kernel_init": zeros, "bias_init": bias}
    head = nn.Dense(self.num_classes, **init, dtype=jnp.float32, name="head")
    return {"features": features, "logits": head(features)}

  @property
  def token_stride(self) -> int:
    """Pixels of the image per token along each side: a hybrid's stride times the patch size."""
    hybrid = 4 * 2 ** max(len(self.resnet["stage_sizes"]) - 1, 0) if self.resnet else 1
    return self.patch_size * hybrid

  def token_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
    return image_size[0] // self.token_stride, image_size[1] // self.token_stride

  @property
  def has_cls_token(self) -> bool:
    return self.pool == "cls" if self.cls_token is None else self.cls_token

  explain = figures.explain
  draw_explanation = figures.draw_explanation


class EncoderBlock(nn.Module):
  """x + MSA(LN(x)), then x + MLP(LN(x)): Eq. 2 and 3; the fields are `VisionTransformer`'s.

  Sows `attention_output` and `mlp_output`, before they are added, and the block's `output`.
  """

  num_heads: int
  mlp_dim: int
  dropout_rate: float = 0.0
  activation: str = "gelu_tanh"
  qkv_bias: bool = True
  layer_norm_epsilon: float = 1e-6
  dtype: Dtype = jnp.float32
  attention_implementation: Implementation = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], drop_path_rate: float | Array = 0.0, *, train: bool
  ) -> tuple[Float[Array, "b n d"], None]:
    """Applies the block; `drop_path_rate` is the probability of dropping each branch."""
    x = shard_batch(x)
    norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
    y = norm(name="attention_norm")(x)
    fields = {"qkv_bias": self.qkv_bias, "implementation": self.attention_implementation}
    attention = MultiHeadAttention(self.num_heads, **fields, dtype=self.dtype, name="attention")
    y = attention(y, train=train)
    self.sow("intermediates", "attention_output", y)
    y = nn.Dropout(self.dropout_rate)(y, deterministic=not train)
    x = x + DropPath()(y, drop_path_rate, train=train)

    y = norm(name="mlp_norm")(x)
    mlp = Mlp(self.mlp_dim, self.activation, self.dropout_rate, dtype=self.dtype, name="mlp")
    y = mlp(y, train=train)
    self.sow("intermediates", "mlp_output", y)
    x = x + DropPath()(y, drop_path_rate, train=train)
    self.sow("intermediates", "output", x)
    return x, None


class PositionEmbedding(nn.Module):
  """Position embeddings of a grid of patches (appendix D.4).

  "learned_1d" has a row per token, `table` [1 n d]; "learned_2d" concatenates half a vector per
  row, `rows` [h d/2], and half a vector per column, `columns` [w d/2]; "sincos_2d" is fixed.
  """

  kind: str = "learned_1d"  # or "learned_2d", "sincos_2d", "none"
  cls_row: bool = False  # "learned_1d" begins with a row for the class token

  @nn.compact
  def __call__(self, grid: tuple[int, int], width: int) -> Float[Array, "1 n d"]:
    """Returns the embeddings of a grid (height, width) of patches, row by row."""
    normal, (h, w) = nn.initializers.normal(0.02), grid
    if self.kind == "learned_1d":
      return jnp.asarray(self.param("table", normal, (1, self.cls_row + h * w, width), jnp.float32))
    if self.kind == "learned_2d":
      rows = self.param("rows", normal, (h, width // 2), jnp.float32)[:, None]
      columns = self.param("columns", normal, (w, width - width // 2), jnp.float32)[None]
      halves = [jnp.broadcast_to(half, (h, w, half.shape[-1])) for half in (rows, columns)]
      return jnp.concatenate(halves, axis=-1).reshape(1, h * w, width)
    if self.kind == "sincos_2d":
      return jnp.asarray(sincos_2d(h, w, width))[None]
    known = ("learned_1d", "learned_2d", "sincos_2d", "none")
    check_names("position_embedding", [self.kind], known)
    return jnp.zeros((1, h * w, width))


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
  """Returns the fixed table [height * width, dim] of MoCo v3 (arXiv:2104.02057), row by row.

  A quarter of the channels each for sin x, cos x, sin y, cos y, at `dim / 4` frequencies in
  geometric progression from 1 to 1 / 10,000.
  """
  if dim % 4 or dim < 8:
    raise ValueError(f"width: {dim} with sincos_2d; expected a multiple of 4 of at least 8")
  frequencies = 10_000.0 ** -np.linspace(0, 1, dim // 4)
  y, x = np.mgrid[:height, :width].reshape(2, -1, 1) * frequencies
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class StandardizedConv(nn.Module):
  """A square convolution without bias, with weight standardization (arXiv:1903.10520) in float32.

  Mean and biased variance are over height, width and input channels. `variance_epsilon` and
  `std_epsilon` are 0 and 1e-5 in vision_transformer, 1e-8 and 0 in timm.
  """

  features: int
  kernel_size: int
  stride: int = 1
  std_epsilon: float = 1e-5
  variance_epsilon: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    """Convolves with SAME padding; sides become ceil(side / stride)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(kernel**2, axis=(0, 1, 2), keepdims=True)
    kernel = kernel / (jnp.sqrt(variance + self.variance_epsilon) + self.std_epsilon)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


class BottleneckUnit(nn.Module):
  """1x1, 3x3 with the stride, 1x1 to four times the width; ReLU after the sum with the shortcut."""

  width: int
  stride: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 f"], None]:
    x = shortcut = shard_batch(x)
    if x.shape[-1] != 4 * self.width or self.stride != 1:
      shortcut = self.conv(4 * self.width, 1, self.stride, name="shortcut_conv")(x)
      shortcut = self.norm(name="shortcut_norm")(shortcut)
    y = nn.relu(self.norm(name="norm_1")(self.conv(self.width, 1, name="conv_1")(x)))
    y = self.conv(self.width, 3, self.stride, name="conv_2")(y)
    y = nn.relu(self.norm(name="norm_2")(y))
    y = self.conv(4 * self.width, 1, name="conv_3")(y)
    y = nn.relu(shortcut + self.norm(name="norm_3", scale_init=nn.initializers.zeros)(y))
    self.sow("intermediates", "output", y)
    return y, None


class StandardizedResNet(nn.Module):
  """7x7 stride-2 root with max-pool, then stages of bottleneck units.

  The units of a stage after the first, `stage_0_unit_0`, are equal. Scanned, since convolutions
  compile slowly for TPUs, they are in `stage_0_units/...` with a leading axis; unrolled, or if
  there is only one, in `stage_0_unit_1/...`. `weights.key_map` converts.
  """

  stage_sizes: tuple[int, ...]  # units in each stage; (): only the root, with stride 4
  width: int = 64  # channels of the root; stage i has width * 2^i and returns four times that
  group_norm_epsilon: float = 1e-6  # 1e-6 in vision_transformer, 1e-5 in timm
  std_epsilon: float = 1e-5  # see `StandardizedConv`, as for `variance_epsilon`
  variance_epsilon: float = 0.0
  remat: bool = False  # saves only the units' inputs for the backward pass
  scan_layers: bool = True  # scans the equal units of a stage
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
    epsilons = {"std_epsilon": self.std_epsilon, "variance_epsilon": self.variance_epsilon}
    conv = functools.partial(StandardizedConv, **epsilons, dtype=self.dtype)
    epsilon = self.group_norm_epsilon
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=epsilon, dtype=self.dtype)
    x = norm(name="root_norm")(conv(self.width, 7, 2, name="root_conv")(images))
    x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
    for stage, size in enumerate(self.stage_sizes):
      name = f"stage_{stage}_unit"
      unit = functools.partial(BottleneckUnit, self.width * 2**stage, conv=conv, norm=norm)
      names = {"scanned_name": f"{name}s", "layer_name": f"{name}_{{}}"}
      make = functools.partial(Stack, remat="full" if self.remat else "none", **names)
      scan = self.scan_layers and size > 2
      for stack in (
        make(functools.partial(unit, stride=2 if stage else 1), 1, scan=False),
        make(functools.partial(unit, stride=1), size - 1, scan=scan, first=1),
      ):
        nn.share_scope(self, stack)
        x, _ = stack(x)
    return x


def _check(model: VisionTransformer, image_size: tuple[int, int]) -> None:
  check_names("pool", [model.pool], ("cls", "mean"))
  if model.pool == "cls" and not model.has_cls_token:
    raise ValueError("cls_token: False with pool='cls'; set cls_token=True or pool='mean'")
  check_positive(model, "num_classes", hint=", or None for no head")
  check_positive(model, "patch_size", "width", "depth", "num_heads", "mlp_dim")
  check_rates(model, "dropout_rate", "drop_path_rate")
  stride = model.token_stride
  for name, side in zip(("height", "width"), image_size, strict=True):
    if side % stride or not side:
      below, above = side // stride * stride, (side // stride + 1) * stride
      fits = f"token stride {stride}. Resize to " + (f"{below} or {above}" if below else f"{above}")
      raise ValueError(f"image {name}: {side} pixels; expected a multiple of the {fits}")


def _size(width: int, depth: int, mlp_dim: int, num_heads: int, patches: tuple[int, ...]) -> Any:
  return {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}, patches


# B, L and H: Table 1. Ti and S: arXiv:2012.12877. giant and gigantic ("g", "G"): arXiv:2106.04560,
# Table 2. so400m: arXiv:2305.13035. e: arXiv:2209.06794. mu and m: google-research/big_vision.
_SIZES = {
  "mu": _size(32, 1, 128, 2, (16,)),
  "ti": _size(192, 12, 768, 3, (16,)),
  "s": _size(384, 12, 1536, 6, (8, 16, 32)),
  "m": _size(512, 12, 2048, 8, (16, 32)),
  "b": _size(768, 12, 3072, 12, (8, 16, 32)),
  "l": _size(1024, 24, 4096, 16, (14, 16, 32)),
  "so400m": _size(1152, 27, 4304, 16, (14, 16)),
  "h": _size(1280, 32, 5120, 16, (14, 16)),
  "giant": _size(1408, 40, 6144, 16, (14, 16)),
  "gigantic": _size(1664, 48, 8192, 16, (14,)),
  "e": _size(1792, 56, 15360, 16, (14,)),
}
# Appendix B.1 and arXiv:2106.10270: stages of the ResNet, size and patch of the Transformer.
# Without stages the root's stride 4 and 8x8 patches give 32, although the published name has 16.
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
  f"vit_{name}{patch}": {**fields, "patch_size": patch}
  for name, (fields, patches) in _SIZES.items()
  for patch in patches
} | {
  f"vit_{name}": {**_SIZES[size][0], "patch_size": patch, "resnet": {"stage_sizes": stages}}
  for name, (stages, size, patch) in _HYBRIDS.items()
}
"""Fields of `VisionTransformer` by model name."""
