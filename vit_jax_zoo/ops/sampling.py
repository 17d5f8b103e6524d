"""Drawing sequences token by token, inside one `jax.lax.scan`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step: TypeAlias = Callable[[Any, Array, Array], tuple[Array, Any]]
"""`step(cache, previous, position) -> logits [b k], cache`: `previous` int32 [b] are the tokens at
`position - 1`, to be ignored at position 0; the logits are those of the token at `position`."""


def sample_token(
  rng: jax.Array,
  logits: Float[Array, "b k"],
  *,
  temperature: float | Float[Array, ""] = 1.0,
  top_k: int | None = None,
) -> Int[Array, " b"]:
  """Draws a token for each row.

  Args:
    rng: a key.
    logits: unnormalised log-probabilities.
    temperature: divides the logits; at 0 the most likely token is taken, the first of several.
    top_k: draw among so many of the most likely tokens (and those that tie with the last of them);
      None: among all.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if top_k is not None and top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  heat = jnp.asarray(temperature, jnp.float32)
  drawn = jax.random.categorical(rng, logits / jnp.where(heat > 0, heat, 1.0))
  return jnp.where(heat > 0, drawn.astype(jnp.int32), best)


def continue_sequences(
  step: Step,
  cache: Any,
  tokens: Int[Array, "b n"],
  lengths: Int[Array, " b"],
  rng: jax.Array,
  *,
  temperature: float | Float[Array, ""] = 1.0,
  top_k: int | None = None,
) -> Int[Array, "b n"]:
  """Fills each row of `tokens` from its length on; what comes before stays as it is.

  One `jax.lax.scan` over all positions; up to the shortest length it does nothing, so the cost is
  that of the longest continuation.

  Args:
    step: gives the logits of a position from the token before it and a cache of those before that.
    cache: of every position before the shortest length.
    tokens: prefixes; what stands after a row's length is ignored.
    lengths: how many tokens of each row are given, from 0 to n.
    rng: a key; each position draws with one of its own.
    temperature: see `sample_token`.
    top_k: see `sample_token`.
  """
  first = jnp.min(lengths)

  def draw(carry: tuple[Array, Any], position: Array) -> tuple[Array, Any]:
    tokens, cache = carry
    previous = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=1, keepdims=False)
    given = jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False)
    logits, cache = step(cache, previous, position)
    key = jax.random.fold_in(rng, position)
    token = sample_token(key, logits, temperature=temperature, top_k=top_k)
    token = jnp.where(position < lengths, given, token)
    return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=1), cache

  def body(carry: tuple[Array, Any], position: Array) -> tuple[tuple[Array, Any], None]:
    return jax.lax.cond(position < first, lambda c, _: c, draw, carry, position), None

  (tokens, _), _ = jax.lax.scan(body, (tokens, cache), jnp.arange(tokens.shape[1]))
  return tokens
