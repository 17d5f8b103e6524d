"""Sampling of images pixel by pixel, in one compiled loop with a cache of keys and values."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNROLLED_DEPTH = 48
"""Largest depth, L's, of which layers are unrolled for sampling. XL's 60 would take 15 times as
long to compile as a scan of them, and a second copy of the weights, 27 GB."""

Tokens = Int[Array, "b n"]
Temperature = float | Float[Array, ""]


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
