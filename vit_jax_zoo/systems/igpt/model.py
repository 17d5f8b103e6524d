"""Image GPT. Chen et al., "Generative Pretraining from Pixels", ICML 2020.

From OpenAI's code and not in the paper: norms only scale (RMS norm, no bias), GELU is
x sigmoid(1.702 x), no layer has a bias, and the output matrix is not the transposed embedding.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.nn.attention import Implementation, MultiHeadAttention
from vit_jax_zoo.nn.transformer import SHARDING_RULES as SHARDING_RULES
from vit_jax_zoo.nn.transformer import Mlp, Stack
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.igpt.palette import nearest_cluster, spread_clusters

Tokens = Int[Array, "b n"]  # colours of pixels in raster order
Visible = Bool[Array, "b n"] | None
Temperature = float | Float[Array, ""]

EPSILON = 1e-5  # added under the root of every norm
normal, zeros = nn.initializers.normal, nn.initializers.zeros


class ImageGPT(nn.Module):
  """Quantizes an image, and predicts each pixel from those before, or from those visible.

  The palette is a variable (`palette/clusters` [num_colors 3], in [-1, 1]), not a parameter: it is
  fitted or loaded before training, and saved with the run.
  """

  num_colors: int = 512  # size of the palette, which is the vocabulary (section 3.2: 512)
  num_positions: int = 1024  # pixels of an image; 1024 for 32x32 (section 3.3)
  width: int = 512  # d in the paper
  depth: int = 24  # number of blocks, L
  num_heads: int = 8  # attention heads of each block
  mlp_dim: int | None = None  # hidden width of each MLP; None: 4 * width. HF's `n_inner`
  causal: bool = True  # autoregressive; False: "BERT" (section 2.2), predicts masked pixels
  # Of a causal model's shifted input; Hugging Face's `ImageGPTForImageClassification` has none.
  sos_token: bool = True
  num_classes: int | None = None  # of the classification head (section 2.3); None: no head
  use_bias: bool = False  # whether dense layers except the two heads have biases (Hugging Face)
  dtype: Dtype = "float32"  # parameters, softmax, norms' statistics and logits are float32
  remat: str = "none"  # saved activations, a key of `nn.transformer.REMAT_POLICIES`
  scan_layers: bool = True  # scans the blocks
  attention_implementation: Implementation = None  # see `nn.attention.Implementation`

  def setup(self) -> None:
    check_positive(self, "num_colors", "num_positions", "width", "depth", "num_heads")
    check_positive(self, "num_classes", hint=", or None for no head")
    colors, positions = (self.num_colors, self.width), (self.num_positions, self.width)
    self.token_embedding = self.param("token_embedding", normal(0.02), colors, jnp.float32)
    self.position_embedding = self.param("position_embedding", normal(0.01), positions, jnp.float32)
    if self.shifts:
      self.sos = self.param("sos_token", normal(0.02), (self.width,), jnp.float32)
    shared = ("num_heads", "depth", "causal", "use_bias", "dtype", "attention_implementation")
    mlp_dim = 4 * self.width if self.mlp_dim is None else self.mlp_dim
    fields = {name: getattr(self, name) for name in shared}
    block = functools.partial(DecoderBlock, mlp_dim=mlp_dim, **fields)
    self.decoder = Stack(block, self.depth, self.scan_layers, self.remat)
    self.norm = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype)
    self.pixel_head = self.param("pixel_head", zeros, colors, jnp.float32)
    if self.num_classes is not None:
      self.head = nn.Dense(self.num_classes, use_bias=False, kernel_init=zeros, dtype=jnp.float32)
    if self.is_initializing() or self.has_variable("palette", "clusters"):
      self.palette = self.variable(
        "palette", "clusters", lambda: jnp.asarray(spread_clusters(self.num_colors), jnp.float32)
      )

  def __call__(
    self, images: Float[Array, "b h w 3"], *, visible: Visible = None, train: bool = False
  ) -> dict[str, Array]:
    """Returns the result of `from_tokens`, and `tokens` int32 [b n], the colours.

    Images are in [-1, 1], with `num_positions` pixels, of which a model with `causal=False` reads
    those that are `visible`. `train` has no effect: there is no dropout.
    """
    del train
    tokens = self.encode(images)
    return {"tokens": tokens, **self.from_tokens(tokens, visible=visible)}

  def encode(self, images: Float[Array, "b h w 3"]) -> Tokens:
    height, width = images.shape[1:3]
    if height * width != self.num_positions:
      side = math.isqrt(self.num_positions)
      fits = f", such as {side}x{side}" if side * side == self.num_positions else ""
      expected = f"num_positions={self.num_positions} of them{fits}"
      fix = f"Resize the images, or train a model with num_positions={height * width}"
      raise ValueError(f"images: {height}x{width} pixels; expected {expected}. {fix}")
    if not self.has_variable("palette", "clusters"):
      raise ValueError("variables: no palette; expected {'palette': {'clusters': [k, 3]}}")
    return nearest_cluster(images, self.palette.value).reshape(images.shape[0], height * width)

  def from_tokens(self, tokens: Tokens, *, visible: Visible = None) -> dict[str, Array]:
    """Predicts pixels from their colours; a causal model also takes fewer than an image's.

    Returns, in float32, `pixel_logits` [b n num_colors]; `features` [b d], the mean over positions
    of the last norm's output, and `layer_features` [b depth+1 d], the same of each block's first
    norm and of the last norm (section 2.4); `logits` [b num_classes], unless that is None.
    """
    length = tokens.shape[1]
    if length > self.num_positions:
      raise ValueError(f"tokens: {length}; expected at most num_positions={self.num_positions}")
    x = jnp.take(self.token_embedding, tokens, axis=0)
    if visible is not None:
      if self.causal:
        raise ValueError("visible: given to a causal model; set causal=False to mask pixels")
      x = x * visible[..., None]
    if self.shifts:
      sos = jnp.broadcast_to(self.sos, (tokens.shape[0], 1, self.width))
      x = jnp.concatenate([sos, x[:, :-1]], axis=1)
    x = (x + self.position_embedding[None, :length]).astype(self.dtype)
    self.sow("intermediates", "embedded", x)

    x, layer_features = self.decoder(shard_batch(x))
    x = self.norm(x)
    self.sow("intermediates", "encoded", x)

    features = jnp.mean(x, axis=1, dtype=jnp.float32)
    outputs = {
      "pixel_logits": self._pixel_logits(x),
      "features": features,
      "layer_features": jnp.concatenate([layer_features, features[None]]).swapaxes(0, 1),
    }
    return outputs | ({} if self.num_classes is None else {"logits": self.head(features)})

  def _pixel_logits(self, x: Float[Array, "b n d"]) -> Float[Array, "b n k"]:
    kernel = self.pixel_head.astype(x.dtype)
    return jnp.einsum("bnd,kd->bnk", x, kernel, preferred_element_type=jnp.float32)

  def next_logits(
    self, previous: Int[Array, " b"], position: Int[Array, ""]
  ) -> Float[Array, "b k"]:
    """Returns the logits of the pixel at `position`, given those before in the `cache` collection.

    `previous` are the colours of the pixels at `position - 1`, ignored at position 0.
    """
    x = jnp.take(self.token_embedding, previous, axis=0)
    x = jnp.where(position == 0, self.sos[None], x)
    x = (x + jnp.take(self.position_embedding, position, axis=0)[None]).astype(self.dtype)
    x, _ = self.decoder(x[:, None], position)
    return self._pixel_logits(self.norm(x))[:, 0]

  @property
  def shifts(self) -> bool:
    """Whether the input is shifted by a start token, so that pixels can be sampled one by one."""
    return self.causal and self.sos_token

  @property
  def image_size(self) -> tuple[int, int]:
    side = math.isqrt(self.num_positions)
    return side, side


class DecoderBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)) (section 2.3); the fields are `ImageGPT`'s.

  Sows `attention_output` and `mlp_output`, before they are added, and the block's `output`.
  """

  num_heads: int
  mlp_dim: int
  depth: int
  causal: bool = True
  use_bias: bool = False
  dtype: Dtype = jnp.float32
  attention_implementation: Implementation = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], past_length: Int[Array, ""] | None = None
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Returns the output, and attention's mean input, a feature of linear probes (section 2.4)."""
    x, width = shard_batch(x), x.shape[-1]
    norm = functools.partial(nn.RMSNorm, epsilon=EPSILON, dtype=self.dtype)
    y = norm(name="attention_norm")(x)
    features = jnp.mean(y, axis=1, dtype=jnp.float32)
    init, out_init = normal(width**-0.5), normal((width * self.depth) ** -0.5)
    fields: dict[str, Any] = {"kernel_init": init, "out_kernel_init": out_init, "dtype": self.dtype}
    fields |= dict.fromkeys(("qkv_bias", "out_bias"), self.use_bias)
    fields["implementation"] = self.attention_implementation
    attention = MultiHeadAttention(self.num_heads, **fields, name="attention")
    y = attention(y, is_causal=self.causal, past_length=past_length)
    self.sow("intermediates", "attention_output", y)
    x = x + y

    y = norm(name="mlp_norm")(x)
    fields = {"use_bias": self.use_bias, "kernel_init": normal(0.02), "bias_init": zeros}
    y = Mlp(self.mlp_dim, "quick_gelu", dtype=self.dtype, **fields, name="mlp")(y)
    self.sow("intermediates", "mlp_output", y)
    x = x + y
    self.sow("intermediates", "output", x)
    return x, features


UNROLLED_DEPTH = 48
"""Largest depth, L's, of which layers are unrolled for sampling. XL's 60 would take 15 times as
long to compile as a scan of them, and a second copy of the weights, 27 GB."""


def complete(
  model: Any,
  variables: Any,
  tokens: Tokens,
  lengths: Int[Array, " b"],
  rng: jax.Array,
  *,
  temperature: Temperature = 1.0,
  top_k: int | None = None,
) -> Tokens:
  """Samples the pixels of each image from its length on. For use inside `jax.jit`.

  `tokens` are images as colours, of each of which the first `lengths` pixels are given. The loop
  begins at the shortest length, up to which the cache is filled: a scan over all positions with a
  branch for the given ones would copy the cache in and out of that branch. Scanned layers are
  unrolled up to `UNROLLED_DEPTH`: a scan would copy each layer's weights and cache, and of one
  position the work is mostly to read them.
  """
  if not model.shifts:
    raise ValueError("causal, sos_token: False; expected a causal model with a start token")
  variables = {key: variables[key] for key in ("params", "palette") if key in variables}
  # 0 after the prefix: an index out of range would be embedded as NaN, and NaN times 0 is NaN.
  positions = jnp.arange(tokens.shape[1], dtype=lengths.dtype)
  prefix = jnp.where(positions[None] < lengths[:, None], tokens, 0)
  _, state = model.apply(variables, prefix, method="from_tokens", mutable=["cache"])
  cache = state["cache"]
  if model.scan_layers and model.depth <= UNROLLED_DEPTH:
    variables = {**variables, "params": _unstack(variables["params"], model.depth)}
    cache, model = _unstack(cache, model.depth), model.clone(scan_layers=False)

  def draw(position: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
    tokens, cache = carry
    previous = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=1, keepdims=False)
    given = jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False)
    logits, state = model.apply(
      {**variables, "cache": cache}, previous, position, method="next_logits", mutable=["cache"]
    )
    key = jax.random.fold_in(rng, position)
    token = sample_token(key, logits, temperature=temperature, top_k=top_k)
    token = jnp.where(position < lengths, given, token)
    return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=1), state["cache"]

  return jax.lax.fori_loop(jnp.min(lengths), tokens.shape[1], draw, (tokens, cache))[0]


def _unstack(tree: Any, depth: int) -> Any:
  blocks = tree["decoder"]["blocks"]
  layers = {f"block_{i}": jax.tree.map(operator.itemgetter(i), blocks) for i in range(depth)}
  return {**tree, "decoder": layers}


def sample_token(
  rng: jax.Array, logits: Float[Array, "b k"], *, temperature: Temperature, top_k: int | None
) -> Int[Array, " b"]:
  """Samples a token for each row.

  The temperature divides the logits; at 0 the most likely token is taken, the first of several. All
  but the `top_k` most likely tokens, and those that tie with the last, have probability 0.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if top_k is not None and top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  heat = jnp.asarray(temperature, jnp.float32)
  drawn = jax.random.categorical(rng, logits / jnp.where(heat > 0, heat, 1.0))
  return jnp.where(heat > 0, drawn.astype(jnp.int32), best)


# Section 3.3 and OpenAI's code. The heads of XL are not published; 24 have the 128 channels of M's.
# With the 1024 positions of a 32x32 image XL has the paper's 6801M parameters; it ran on 4096.
VARIANTS: dict[str, dict[str, Any]] = {
  "igpt_s": {"width": 512, "depth": 24, "num_heads": 8},
  "igpt_m": {"width": 1024, "depth": 36, "num_heads": 8},
  "igpt_l": {"width": 1536, "depth": 48, "num_heads": 16},
  "igpt_xl": {"width": 3072, "depth": 60, "num_heads": 24},
}
"""Fields of `ImageGPT` by model name."""
