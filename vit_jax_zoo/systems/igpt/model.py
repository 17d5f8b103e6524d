"""Image GPT. Chen et al., "Generative Pretraining from Pixels", ICML 2020.

A GPT-2 decoder over the pixels of a small image in raster order, each replaced by the nearest of
512 colours. As the paper's code has it, and the paper does not say: norms only scale (RMS norm, no
mean, no bias), GELU is x sigmoid(1.702 x), no layer has a bias, and the output matrix is not the
transposed embedding. Hugging Face's port adds biases, zero in the published weights (`use_bias`),
and its classifier sees the pixels unshifted (`sos_token=False`).
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
from vit_jax_zoo.nn.transformer import Mlp, Stack
from vit_jax_zoo.ops.checks import check_num_classes, check_positive
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.systems.igpt.palette import nearest_cluster, raster, spread_clusters
from vit_jax_zoo.systems.igpt.sampling import continue_sequences

# Section 3.3 and OpenAI's code. The heads of XL are not published; 24 have the 128 channels of M's.
# With the 1024 positions of a 32x32 image XL has the paper's 6801M parameters; it ran on 4096.
VARIANTS: dict[str, dict[str, Any]] = {
  "igpt_s": {"width": 512, "depth": 24, "num_heads": 8},
  "igpt_m": {"width": 1024, "depth": 36, "num_heads": 8},
  "igpt_l": {"width": 1536, "depth": 48, "num_heads": 16},
  "igpt_xl": {"width": 3072, "depth": 60, "num_heads": 24},
}
"""Fields of `ImageGPT` by model name."""

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

EPSILON = 1e-5
"""Under the root of every norm."""

UNROLLED_DEPTH = 48
"""As many layers, L's, are unrolled to draw a pixel. XL's 60 would take 15 times as long to compile
as a scan of them, and a second copy of the weights, 27 GB."""


class DecoderBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); the equations of section 2.3.

  Sows `attention_output` and `mlp_output`, before they are added, and the block's `output`.

  Attributes:
    num_heads: of the attention.
    mlp_dim: hidden width of the perceptron.
    depth: of the stack that the block stands in; the deeper, the smaller attention starts.
    causal: a position sees only itself and those before.
    use_bias: whether all dense layers have biases.
    dtype: of the computation; norms and softmax are in float32 inside.
    attention_implementation: see `attention.Implementation`.
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
    self, tokens: Float[Array, "b n d"], past_length: Int[Array, ""] | None = None
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Applies the block.

    Returns:
      Its output, and the mean over positions of what its attention sees: the feature of a linear
      probe at this depth (section 2.4), float32.
    """
    tokens = shard_batch(tokens)
    width = tokens.shape[-1]
    norm = functools.partial(nn.RMSNorm, epsilon=EPSILON, dtype=self.dtype)
    normal = nn.initializers.normal
    branch = norm(name="attention_norm")(tokens)
    features = jnp.mean(branch, axis=1, dtype=jnp.float32)
    branch = MultiHeadAttention(
      self.num_heads,
      qkv_bias=self.use_bias,
      out_bias=self.use_bias,
      kernel_init=normal(width**-0.5),
      out_kernel_init=normal((width * self.depth) ** -0.5),
      dtype=self.dtype,
      implementation=self.attention_implementation,
      name="attention",
    )(branch, is_causal=self.causal, past_length=past_length)
    self.sow("intermediates", "attention_output", branch)
    tokens = tokens + branch

    branch = norm(name="mlp_norm")(tokens)
    branch = Mlp(
      self.mlp_dim,
      "quick_gelu",
      use_bias=self.use_bias,
      kernel_init=normal(0.02),
      bias_init=nn.initializers.zeros,
      dtype=self.dtype,
      name="mlp",
    )(branch)
    self.sow("intermediates", "mlp_output", branch)
    tokens = tokens + branch
    self.sow("intermediates", "output", tokens)
    return tokens, features


class ImageGPT(nn.Module):
  """Encodes an image as colours, and predicts each pixel from those before, or from those visible.

  The palette belongs to the model's variables (`palette/clusters` [num_colors 3], in [-1, 1]), not
  to its parameters: it is fitted or loaded before training, and stored with the run.

  Attributes:
    num_colors: size of the palette, and of the vocabulary.
    num_positions: pixels of an image; 1024 for 32x32.
    width: of the token vectors, d in the paper.
    depth: number of blocks, L.
    num_heads: attention heads in each block.
    mlp_dim: hidden width of each block's perceptron; None: four times the width.
    causal: True: autoregressive; the input is shifted by a start token, and position i predicts
      pixel i from those before. False: "BERT"; the pixels that are not visible are predicted.
    sos_token: whether a causal model has the start token and shifts its input. Without, position i
      sees pixel i and speaks of the next; only Hugging Face's classifier has it so.
    num_classes: size of the label set of the classification head; None leaves it out.
    use_bias: whether dense layers have biases (Hugging Face), except for the two heads.
    dtype: of the computation. Parameters, softmax, norms' statistics and logits are float32.
    remat: what blocks keep for the backward pass: a key of `REMAT_POLICIES`.
    scan_layers: one block compiled and run `depth` times, or `depth` blocks.
    attention_implementation: see `attention.Implementation`.
  """

  num_colors: int = 512
  num_positions: int = 1024
  width: int = 512
  depth: int = 24
  num_heads: int = 8
  mlp_dim: int | None = None
  causal: bool = True
  sos_token: bool = True
  num_classes: int | None = None
  use_bias: bool = False
  dtype: Dtype = "float32"
  remat: str = "none"
  scan_layers: bool = True
  attention_implementation: Implementation = None

  @property
  def image_size(self) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    side = math.isqrt(self.num_positions)
    return side, side

  def setup(self) -> None:  # noqa: D102 Linen's
    self._check()
    normal, zeros = nn.initializers.normal, nn.initializers.zeros
    self.token_embedding = self.param(
      "token_embedding", normal(0.02), (self.num_colors, self.width)
    )
    self.position_embedding = self.param(
      "position_embedding", normal(0.01), (self.num_positions, self.width)
    )
    if self._shifts:
      self.sos = self.param("sos_token", normal(0.02), (self.width,))
    block = functools.partial(
      DecoderBlock,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width if self.mlp_dim is None else self.mlp_dim,
      depth=self.depth,
      causal=self.causal,
      use_bias=self.use_bias,
      dtype=self.dtype,
      attention_implementation=self.attention_implementation,
    )
    self.decoder = Stack(block, self.depth, self.scan_layers, self.remat)
    self.norm = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype)
    self.pixel_head = self.param("pixel_head", zeros, (self.num_colors, self.width))
    if self.num_classes is not None:
      self.head = nn.Dense(self.num_classes, use_bias=False, kernel_init=zeros, dtype=jnp.float32)
    if self.is_initializing() or self.has_variable("palette", "clusters"):
      self.palette = self.variable(
        "palette", "clusters", lambda: jnp.asarray(spread_clusters(self.num_colors))
      )

  def __call__(
    self,
    images: Float[Array, "b h w 3"],
    *,
    visible: Bool[Array, "b n"] | None = None,
    train: bool = False,
  ) -> dict[str, Array]:
    """Predicts pixels.

    Args:
      images: normalised to [-1, 1], with exactly `num_positions` pixels.
      visible: which pixels a model that is not causal may see; None: all.
      train: changes nothing; the model has no dropout.

    Returns:
      What `from_tokens` returns, and `tokens` int32 [b n], the pixels' colours in raster order.
    """
    del train
    tokens = self.encode(images)
    return {"tokens": tokens, **self.from_tokens(tokens, visible=visible)}

  def encode(self, images: Float[Array, "b h w 3"]) -> Int[Array, "b n"]:
    """Returns each pixel's nearest colour, in raster order."""
    height, width = images.shape[1:3]
    if height * width != self.num_positions:
      side = math.isqrt(self.num_positions)
      fits = f", such as {side}x{side}" if side * side == self.num_positions else ""
      raise ValueError(
        f"the model has {self.num_positions} positions{fits}, but the images are {height}x{width} "
        "pixels; resize them, or train a model with num_positions="
        f"{height * width}"
      )
    if not self.has_variable("palette", "clusters"):
      raise ValueError("the variables hold no palette; add {'palette': {'clusters': [k, 3]}}")
    return raster(nearest_cluster(images, self.palette.value))

  def from_tokens(
    self, tokens: Int[Array, "b n"], *, visible: Bool[Array, "b n"] | None = None
  ) -> dict[str, Array]:
    """Predicts pixels from their colours.

    Args:
      tokens: colours, in [0, num_colors), in raster order; a causal model also takes fewer than
        `num_positions`.
      visible: see `__call__`.

    Returns:
      `pixel_logits` [b n num_colors]; `features` [b d], the mean over positions of the last norm's
      output, and `layer_features` [b depth+1 d], which begins with the mean of the first block's
      normalised input and ends with `features`; `logits` [b num_classes], unless that is None. All
      float32.
    """
    length = tokens.shape[1]
    if length > self.num_positions:
      raise ValueError(f"{length} tokens were given to a model with {self.num_positions} positions")
    x, layer_features = self.decoder(self._embed(tokens, visible))
    x = self.norm(x)
    self.sow("intermediates", "encoded", x)
    features = jnp.mean(x, axis=1, dtype=jnp.float32)
    outputs = {
      "pixel_logits": self._pixel_logits(x),
      "features": features,
      "layer_features": jnp.concatenate([layer_features, features[None]]).swapaxes(0, 1),
    }
    return outputs | ({} if self.num_classes is None else {"logits": self.head(features)})

  def _embed(
    self, tokens: Int[Array, "b n"], visible: Bool[Array, "b n"] | None
  ) -> Float[Array, "b n d"]:
    x = jnp.take(self.token_embedding, tokens, axis=0)
    if visible is not None:
      if self.causal:
        raise ValueError("a causal model sees all pixels before its own; set causal=False to mask")
      x = x * visible[..., None]
    if self._shifts:
      first = jnp.broadcast_to(self.sos, (tokens.shape[0], 1, self.width))
      x = jnp.concatenate([first, x[:, :-1]], axis=1)
    x = (x + self.position_embedding[None, : tokens.shape[1]]).astype(self.dtype)
    self.sow("intermediates", "embedded", x)
    return shard_batch(x)

  def _pixel_logits(self, x: Float[Array, "b n d"]) -> Float[Array, "b n k"]:
    kernel = self.pixel_head.astype(x.dtype)
    return jnp.einsum("bnd,kd->bnk", x, kernel, preferred_element_type=jnp.float32)

  def next_logits(
    self, previous: Int[Array, " b"], position: Int[Array, ""]
  ) -> Float[Array, "b k"]:
    """Returns the logits of the pixel at `position`, given those before in `cache`.

    Args:
      previous: colours of the pixels at `position - 1`; ignored at position 0.
      position: of the pixels asked for.
    """
    x = jnp.take(self.token_embedding, previous, axis=0)
    x = jnp.where(position == 0, self.sos[None], x)
    x = (x + jnp.take(self.position_embedding, position, axis=0)[None]).astype(self.dtype)
    x, _ = self.decoder(x[:, None], position)
    return self._pixel_logits(self.norm(x))[:, 0]

  @nn.nowrap
  def complete(
    self,
    variables: Any,
    tokens: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    rng: jax.Array,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | None = None,
  ) -> Int[Array, "b n"]:
    """Draws the pixels of each image from its length on. For use inside `jax.jit`.

    Keys and values of all positions are kept, so a pixel costs one position's work and not an
    image's. The given pixels go through the model together. For one pixel layers are unrolled, up
    to `UNROLLED_DEPTH` of them: of one position the work is mostly to read the weights and what is
    kept, and a scan would copy each layer's share of both first.

    Args:
      variables: the model's.
      tokens: images as colours; what stands after a row's length is ignored.
      lengths: how many pixels of each image are given, from 0 to all.
      rng: a key.
      temperature: see `sampling.sample_token`; 0 is greedy.
      top_k: see `sampling.sample_token`.
    """
    if not self._shifts:
      raise ValueError("only a causal model with a start token can draw pixels one by one")
    variables = {key: variables[key] for key in ("params", "palette") if key in variables}
    # A filler that is no colour is embedded as NaN, which a weight of zero does not hide.
    given = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 0)
    _, state = self.apply(variables, given, method="from_tokens", mutable=["cache"])
    model, cache = self, state["cache"]
    if self.scan_layers and self.depth <= UNROLLED_DEPTH:
      model = self.clone(scan_layers=False)
      variables = {**variables, "params": _unstack(variables["params"], self.depth)}
      cache = _unstack(cache, self.depth)

    def step(cache: Any, previous: Array, position: Array) -> tuple[Array, Any]:
      logits, state = model.apply(
        {**variables, "cache": cache}, previous, position, method="next_logits", mutable=["cache"]
      )
      return logits, state["cache"]

    return continue_sequences(
      step, cache, tokens, lengths, rng, temperature=temperature, top_k=top_k
    )

  @property
  def _shifts(self) -> bool:
    return self.causal and self.sos_token

  def _check(self) -> None:
    check_positive(self, "num_colors", "num_positions", "width", "depth", "num_heads")
    check_num_classes(self)


def _unstack(tree: Any, depth: int) -> Any:
  """Returns a collection of a model that scans its layers as one that does not has it."""
  blocks = tree["decoder"]["blocks"]
  layers = {f"block_{i}": jax.tree.map(operator.itemgetter(i), blocks) for i in range(depth)}
  return {**tree, "decoder": layers}
