"""Majority vote over several views of an image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def majority_vote(labels: Int[Array, "v b"], rng: jax.Array) -> Int[Array, " b"]:
  """Returns the most frequent label of v views of each image; ties are broken at random."""
  agreeing = jnp.sum(labels[:, None] == labels[None], axis=1)
  # Tied labels have as many views each, so a view drawn among theirs is a label drawn evenly.
  chosen = jnp.argmax(agreeing + jax.random.uniform(rng, labels.shape), axis=0)
  return jnp.take_along_axis(labels, chosen[None], axis=0)[0]
