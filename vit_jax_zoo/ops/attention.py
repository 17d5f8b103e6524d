"""Attention and dense layers in the form that XLA runs fastest on CPUs.

Results are those of `jax.nn.dot_product_attention` and `jax.lax.dot_general`, except for rounding.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked pair: finite, so that a row without any key gives no NaN."""


def matrix_product(
  x: Float[Array, "..."], kernel: Float[Array, "..."], dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
  """A `dot_general` for `nn.Dense` and `nn.DenseGeneral` as a product of two matrices.

  For products of more dimensions, XLA on CPUs copies and transposes operands and gradients.
  """
  count = len(dimension_numbers[0][0])  # Linen contracts the last axes of x with the kernel's first
  inner = math.prod(kernel.shape[:count])
  out = jax.lax.dot(x.reshape(-1, inner), kernel.reshape(inner, -1), **options)
  return out.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:])


@jax.custom_vjp
def attend_on_cpu(
  query: Float[Array, "b h n d"],
  key: Float[Array, "b h m d"],
  value: Float[Array, "b h m d"],
  mask: Bool[Array, "#b #h #n #m"] | None,
) -> Float[Array, "b h n d"]:
  """Returns softmax(query key^T / sqrt(d)) value, with a backward pass that keeps the softmax."""
  return _forward(query, key, value, mask)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> Any:
  scores = _product("snd,smd->snm", query, key) * query.shape[-1] ** -0.5
  if mask is not None:
    scores = jnp.where(mask, scores, NEGATIVE)
  weights = jax.nn.softmax(scores, axis=-1)
  out = _product("snm,smd->snd", weights.astype(value.dtype), value).astype(value.dtype)
  return out, (query, key, value, mask, weights, out)


def _backward(kept: Any, gradient: jax.Array) -> Any:
  query, key, value, mask, weights, out = kept
  of_value = _product("snm,snd->smd", weights.astype(value.dtype), gradient)
  of_weights = _product("snd,smd->snm", gradient, value)
  inner = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
  of_scores = weights * (of_weights - inner) * query.shape[-1] ** -0.5
  if mask is not None:  # the weights of a row without any key are not 0
    of_scores = jnp.where(mask, of_scores, 0)
  of_scores = of_scores.astype(query.dtype)
  of_query = _product("snm,smd->snd", of_scores, key).astype(query.dtype)
  of_key = _product("snm,snd->smd", of_scores, query).astype(key.dtype)
  return of_query, of_key, of_value.astype(value.dtype), None


attend_on_cpu.defvjp(_forward, _backward)


def _product(formula: str, a: Float[Array, "b h _ _"], b: Float[Array, "b h _ _"]) -> jax.Array:
  """Returns the products of all batches and heads, flattened to one axis, in float32."""
  flat = (x.reshape(-1, *x.shape[2:]) for x in (a, b))
  out = jnp.einsum(formula, *flat, preferred_element_type=jnp.float32)
  return out.reshape(*a.shape[:2], *out.shape[1:])
