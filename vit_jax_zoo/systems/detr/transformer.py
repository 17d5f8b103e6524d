"""An encoder-decoder Transformer with positions added to queries and keys in every layer.

That of DETR, arXiv:2005.12872, section A.3 and figure 10: the encoder lets the positions of a
feature map exchange what they see; the decoder lets learned object queries look at the result, all
at once, layer by layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax_zoo.nn.attention import Implementation, MultiHeadAttention, key_padding_mask
from vit_jax_zoo.nn.transformer import Mlp, rematerialize
from vit_jax_zoo.ops.sharding import shard_batch

Initializer = nn.initializers.Initializer


def fan_in_uniform(fan_in: int) -> Initializer:
  """Returns what draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's linear layers do."""
  bound = fan_in**-0.5

  def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class _Layer(nn.Module):
  """What encoder and decoder layers share: a residual branch with its norm before or after.

  Attributes:
    num_heads: of every attention.
    mlp_dim: hidden width of the perceptron.
    dropout_rate: of attention maps, after the activation, and of each branch before it is added.
    pre_norm: normalises what enters a branch, in place of each sum.
    dtype: of the computation; norms and softmax are in float32 inside.
    attention_implementation: see `attention.Implementation`.
  """

  num_heads: int
  mlp_dim: int
  dropout_rate: float = 0.1
  pre_norm: bool = False
  dtype: Dtype = jnp.float32
  attention_implementation: Implementation = None

  def _attention(self, name: str) -> MultiHeadAttention:
    # The paper's code initialises query, key and value as one [3d d] matrix: half the variance.
    return MultiHeadAttention(
      self.num_heads,
      dropout_rate=self.dropout_rate,
      kernel_init=nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
      out_kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      implementation=self.attention_implementation,
      name=name,
    )

  def _mlp(self, x: Float[Array, "b n d"], *, train: bool) -> Float[Array, "b n d"]:
    width = x.shape[-1]

    def bias_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> Array:
      # The layer that is mlp_dim wide has `width` inputs, and the other way round.
      return fan_in_uniform(width if shape == (self.mlp_dim,) else self.mlp_dim)(key, shape, dtype)

    mlp = Mlp(
      self.mlp_dim, "relu", self.dropout_rate, bias_init=bias_init, dtype=self.dtype, name="mlp"
    )
    return mlp(x, train=train)

  def _add(
    self,
    x: Float[Array, "b n d"],
    name: str,
    branch: Callable[[Float[Array, "b n d"]], Float[Array, "b n d"]],
  ) -> Float[Array, "b n d"]:
    """Returns norm(x + branch(x)), or x + branch(norm(x))."""
    norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")
    if self.pre_norm:
      return x + branch(norm(x))
    return norm(x + branch(x))


class EncoderLayer(_Layer):
  """Self-attention over the positions of the map, then a perceptron."""

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b n d"],
    positions: Float[Array, "b n d"],
    keep: Bool[Array, "b n"],
    *,
    train: bool,
  ) -> Float[Array, "b n d"]:
    """Applies the layer.

    Args:
      tokens: of the map, row by row.
      positions: added to queries and keys.
      keep: False where the map is padding: nothing looks there.
      train: whether dropout is on.
    """
    tokens = shard_batch(tokens)
    drop = nn.Dropout(self.dropout_rate, deterministic=not train)
    attention = self._attention("attention")
    mask = key_padding_mask(keep)

    def attend(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
      placed = x + positions
      return drop(attention(placed, placed, x, mask=mask, train=train))

    tokens = self._add(tokens, "attention", attend)
    return self._add(tokens, "mlp", functools.partial(self._mlp, train=train))


class DecoderLayer(_Layer):
  """Self-attention among the queries, attention to the map, then a perceptron."""

  @nn.compact
  def __call__(
    self,
    targets: Float[Array, "b q d"],
    query_positions: Float[Array, "b q d"],
    memory: Float[Array, "b n d"],
    positions: Float[Array, "b n d"],
    keep: Bool[Array, "b n"],
    *,
    train: bool,
  ) -> Float[Array, "b q d"]:
    """Applies the layer.

    Args:
      targets: what each query knows so far.
      query_positions: the object queries, added to queries and to the keys among them.
      memory: the encoder's output.
      positions: of the map, added to the keys there.
      keep: False where the map is padding.
      train: whether dropout is on.
    """
    targets = shard_batch(targets)
    drop = nn.Dropout(self.dropout_rate, deterministic=not train)
    self_attention, cross_attention = (
      self._attention("self_attention"),
      self._attention("cross_attention"),
    )
    mask = key_padding_mask(keep)

    def among(x: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
      placed = x + query_positions
      return drop(self_attention(placed, placed, x, train=train))

    def look(x: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
      placed = x + query_positions
      return drop(cross_attention(placed, memory + positions, memory, mask=mask, train=train))

    targets = self._add(targets, "self_attention", among)
    targets = self._add(targets, "cross_attention", look)
    return self._add(targets, "mlp", functools.partial(self._mlp, train=train))


class EncoderDecoder(nn.Module):
  """The encoder, and the decoder with what each of its layers says.

  Scanned, the layers' parameters stand in `encoder/...` and `decoder/...` with a leading depth
  axis; unrolled, in `encoder_0/...`, `decoder_0/...`.

  Attributes:
    encoder_depth: number of encoder layers.
    decoder_depth: number of decoder layers.
    encoder_layer: fields of `EncoderLayer`.
    decoder_layer: fields of `DecoderLayer`.
    remat: a rung of `transformer.REMAT_LADDER`.
    scan_layers: whether layers are scanned.
  """

  encoder_depth: int
  decoder_depth: int
  encoder_layer: dict[str, Any]
  decoder_layer: dict[str, Any]
  remat: str = "none"
  scan_layers: bool = True

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b n d"],
    positions: Float[Array, "b n d"],
    keep: Bool[Array, "b n"],
    queries: Float[Array, "b q d"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "b n d"], Float[Array, "l b q d"]]:
    """Returns the memory, and the normalised output of every decoder layer.

    Args:
      tokens: the map's features, row by row.
      positions: of the map.
      keep: False where the map is padding.
      queries: the object queries.
      train: whether dropout is on.
    """

    def encode(layer: nn.Module, x: Array) -> tuple[Array, Array]:
      x = layer(x, positions, keep, train=train)
      return x, x

    make = functools.partial(EncoderLayer, **self.encoder_layer)
    memory, _ = self._stack(make, "encoder", self.encoder_depth, encode, tokens)
    if self.encoder_layer.get("pre_norm"):
      memory = self._norm("encoder_norm")(memory)

    def decode(layer: nn.Module, x: Array) -> tuple[Array, Array]:
      x = layer(x, queries, memory, positions, keep, train=train)
      return x, x

    make = functools.partial(DecoderLayer, **self.decoder_layer)
    start = jnp.zeros_like(queries)
    _, outputs = self._stack(make, "decoder", self.decoder_depth, decode, start)
    # Each layer hands on what it computed, and shows it through one norm that all layers share.
    return memory, self._norm("decoder_norm")(outputs)

  def _norm(self, name: str) -> nn.Module:
    dtype = self.decoder_layer.get("dtype", jnp.float32)
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)

  def _stack(
    self,
    make: Callable[..., nn.Module],
    name: str,
    depth: int,
    body: Callable[[nn.Module, Array], tuple[Array, Array]],
    x: Float[Array, "b n d"],
  ) -> tuple[Float[Array, "b n d"], Float[Array, "l b n d"]]:
    """Returns the last layer's output, and those of all."""
    body = rematerialize(body, self.remat, scanned=self.scan_layers)
    if not self.scan_layers:
      outputs = []
      for index in range(depth):
        x, output = body(make(name=f"{name}_{index}"), x)
        outputs.append(output)
      return x, jnp.stack(outputs)
    scan = nn.scan(
      body,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      length=depth,
    )
    return scan(make(name=name), x)
