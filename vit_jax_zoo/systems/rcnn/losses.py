"""The losses of R-CNN, for every box by itself: who calls divides by how many there are."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def smooth_l1(errors: Float[Array, "*n d"], beta: float) -> Float[Array, "*n"]:
  """Returns a loss that is quadratic below `beta` and linear above, summed over the last axis.

  Girshick, arXiv:1504.08083, Eq. 3, where beta is 1. With 0 it is the absolute error.
  """
  size = jnp.abs(errors)
  if not beta:
    return jnp.sum(size, axis=-1)
  return jnp.sum(jnp.where(size < beta, 0.5 / beta * size**2, size - 0.5 * beta), axis=-1)


def class_loss(logits: Float[Array, "*n k"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns the cross-entropy; labels outside the classes count as the nearest one."""
  wanted = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, axis=-1)[..., 0]


def mask_loss(logits: Float[Array, "*n m m"], masks: Bool[Array, "*n m m"]) -> Float[Array, "*n"]:
  """Returns the binary cross-entropy of each mask, its mean over pixels."""
  losses = optax.sigmoid_binary_cross_entropy(logits, masks.astype(logits.dtype))
  return jnp.mean(losses, axis=(-2, -1))


def of_class(values: Float[Array, "*n k d"], labels: Int[Array, "*n"]) -> Float[Array, "*n d"]:
  """Returns what `values` has for each one's class; the nearest one for labels outside."""
  index = jnp.clip(labels, 0, values.shape[-2] - 1)[..., None, None]
  return jnp.take_along_axis(values, index, axis=-2)[..., 0, :]


def mask_of_class(
  masks: Float[Array, "*n m m k"], labels: Int[Array, "*n"]
) -> Float[Array, "*n m m"]:
  """Returns the mask of each one's class; of the nearest one for labels outside."""
  index = jnp.clip(labels, 0, masks.shape[-1] - 1)[..., None, None, None]
  return jnp.take_along_axis(masks, index, axis=-1)[..., 0]


def rows(values: Array, index: Int[Array, " r"]) -> Array:
  """Returns the chosen rows; zeros where there are no rows at all."""
  if not len(values):
    return jnp.zeros((len(index), *values.shape[1:]), values.dtype)
  return values[index]
