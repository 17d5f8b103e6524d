"""Drawing sequences token by token, inside one compiled loop."""

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

  One loop from the shortest length to the end, so the cost is that of the longest continuation. It
  is a `fori_loop` and not a scan over all positions that skips the given ones: XLA copies the whole
  cache in and out of the branch that would skip.

  Args:
    step: gives the logits of a position from the token before it and a cache of those before that.
    cache: of every position before the shortest length.
    tokens: prefixes; what stands after a row's length is ignored.
    lengths: how many tokens of each row are given, from 0 to n.
    rng: a key; each position draws with one of its own.
    temperature: see `sample_token`.
    top_k: see `sample_token`.
  """

  def draw(position: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
    tokens, cache = carry
    previous = jax.lax.dynamic_index_in_dim(tokens, position - 1, axis=1, keepdims=False)
    given = jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False)
    logits, cache = step(cache, previous, position)
    key = jax.random.fold_in(rng, position)
    token = sample_token(key, logits, temperature=temperature, top_k=top_k)
    token = jnp.where(position < lengths, given, token)
    return jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=1), cache

  return jax.lax.fori_loop(jnp.min(lengths), tokens.shape[1], draw, (tokens, cache))[0]
