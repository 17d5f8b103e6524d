"""The pre-norm Transformer encoder, scanned or unrolled, with a ladder of rematerialisation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.nn.attention import Implementation, MultiHeadAttention
from vit_jax_zoo.nn.drop import DropPath, drop_path_rates
from vit_jax_zoo.ops.sharding import shard_batch

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
}
"""`gelu` is the exact one (timm, Hugging Face), `gelu_tanh` its approximation (the papers' JAX);
`quick_gelu` is a coarser one (image-gpt, CLIP)."""


class Mlp(nn.Module):
  """Dense, activation, dropout, dense, dropout.

  Attributes:
    hidden_dim: width of the layer between.
    activation: a key of `ACTIVATIONS`.
    dropout_rate: after the activation and after the output.
    use_bias: whether the two layers have biases.
    kernel_init: of both kernels.
    bias_init: of both biases.
    dtype: of the computation; parameters stay float32.
  """

  hidden_dim: int
  activation: str = "gelu_tanh"
  dropout_rate: float = 0.0
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.normal(1e-6)
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
    """Applies the same perceptron to every position."""
    if self.activation not in ACTIVATIONS:
      raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))
    dense = functools.partial(
      nn.Dense,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      bias_init=self.bias_init,
      dtype=self.dtype,
    )
    hidden = checkpoint_name(dense(self.hidden_dim, name="hidden")(x), "mlp_hidden")
    hidden = ACTIVATIONS[self.activation](hidden)
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=not train)
    out = dense(x.shape[-1], name="out")(hidden)
    return nn.Dropout(self.dropout_rate)(out, deterministic=not train)


_ATTENTION = ("query", "key", "value", "attention_out")
REMAT_LADDER: dict[str, tuple[str, ...] | None] = {
  "none": None,
  "dots": (*_ATTENTION, "mlp_hidden"),
  "attention": _ATTENTION,
  "full": (),
}
"""What a block keeps for its backward pass besides its input, from most memory to least.

* "none": everything; nothing is computed twice.
* "dots": 8 widths a token (the products with weights, but for the MLP's last); norms, activations
  and the attention map are computed again. A few per cent of the step's FLOPs.
* "attention": 4 widths a token; the MLP's first product is computed again too.
* "full": nothing; the block runs forward twice, about a third more FLOPs.

A recipe takes the first that fits. The kept arrays are named by `checkpoint_name` in the layers.
"""


def rematerialize(body: Callable[..., Any], remat: str, *, scanned: bool) -> Callable[..., Any]:
  """Wraps a lifted function `body(module, ...)` so that it keeps what rung `remat` says."""
  if remat not in REMAT_LADDER:
    raise ValueError(unknown_name("remat", remat, REMAT_LADDER))
  kept = REMAT_LADDER[remat]
  if kept is None:
    return body
  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  return nn.remat(body, policy=policy, prevent_cse=not scanned)


class EncoderBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)). Eq. 2 and 3 of arXiv:2010.11929.

  Sows `attention_output` and `mlp_output`, before they are added, and the block's `output`.

  Attributes:
    num_heads: of the attention.
    mlp_dim: hidden width of the perceptron.
    dropout_rate: after attention, after the activation and after the perceptron.
    activation: a key of `mlp.ACTIVATIONS`.
    qkv_bias: whether query, key and value have biases.
    layer_norm_epsilon: under the root of both norms.
    dtype: of the computation; norms and softmax are in float32 inside.
    attention_implementation: see `attention.Implementation`.
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
    self, tokens: Float[Array, "b n d"], drop_path_rate: float | Array, *, train: bool
  ) -> Float[Array, "b n d"]:
    """Applies the block; `drop_path_rate` is the probability to leave out each branch."""
    tokens = shard_batch(tokens)
    norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
    branch = norm(name="attention_norm")(tokens)
    branch = MultiHeadAttention(
      self.num_heads,
      qkv_bias=self.qkv_bias,
      dtype=self.dtype,
      implementation=self.attention_implementation,
      name="attention",
    )(branch, train=train)
    self.sow("intermediates", "attention_output", branch)
    branch = nn.Dropout(self.dropout_rate)(branch, deterministic=not train)
    tokens = tokens + DropPath()(branch, drop_path_rate, train=train)

    branch = norm(name="mlp_norm")(tokens)
    branch = Mlp(self.mlp_dim, self.activation, self.dropout_rate, dtype=self.dtype, name="mlp")(
      branch, train=train
    )
    self.sow("intermediates", "mlp_output", branch)
    tokens = tokens + DropPath()(branch, drop_path_rate, train=train)
    self.sow("intermediates", "output", tokens)
    return tokens


class Encoder(nn.Module):
  """A stack of `EncoderBlock`s.

  Scanned, the blocks' parameters stand in `blocks/...` with a leading depth axis, and so do the
  intermediates: the program holds one block, and compiles in the time of one. Unrolled, they stand
  in `block_0/...`, `block_1/...`. `weights.table` converts between the two.

  Attributes:
    depth: number of blocks.
    block: the fields of `EncoderBlock`.
    drop_path_rate: of the last block; the first has 0, those between lie on a line.
    remat: a rung of `REMAT_LADDER`.
    scan_layers: whether the blocks are scanned.
  """

  depth: int
  block: Mapping[str, Any]
  drop_path_rate: float = 0.0
  remat: str = "none"
  scan_layers: bool = True

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n d"], *, train: bool) -> Float[Array, "b n d"]:
    """Applies all blocks, in order."""

    def body(block: EncoderBlock, x: Array, rate: float | Array) -> tuple[Array, None]:
      return block(x, rate, train=train), None

    body = rematerialize(body, self.remat, scanned=self.scan_layers)
    rates = drop_path_rates(self.drop_path_rate, self.depth)
    if not self.scan_layers:
      for i, rate in enumerate(rates):
        tokens, _ = body(EncoderBlock(**self.block, name=f"block_{i}"), tokens, rate)
      return tokens
    scan = nn.scan(
      body,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=0 if self.drop_path_rate else nn.broadcast,
      length=self.depth,
    )
    blocks = EncoderBlock(**self.block, name="blocks")
    return scan(blocks, tokens, jnp.asarray(rates) if self.drop_path_rate else 0.0)[0]


def attention_maps(intermediates: Mapping[str, Any]) -> Float[Array, "l b heads n n"]:
  """Returns the attention maps that an `Encoder` has sown, scanned or unrolled, in its order."""
  if "blocks" in intermediates:
    return intermediates["blocks"]["attention"]["weights"][0]
  blocks = [intermediates[f"block_{i}"] for i in range(len(intermediates))]
  return jnp.stack([block["attention"]["weights"][0] for block in blocks])
