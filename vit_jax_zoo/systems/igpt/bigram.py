"""The baseline of a sequence model: each token depends on the one before it alone."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int64, Integer


def count_bigrams(tokens: Integer[np.ndarray, "b n"], num_tokens: int) -> Int64[np.ndarray, "m k"]:
  """Returns how often token j (column) follows token i (row); the last row is for the first token.

  Args:
    tokens: sequences of numbers in [0, num_tokens).
    num_tokens: k; the result has k + 1 rows.
  """
  previous = np.full_like(tokens, num_tokens)
  previous[:, 1:] = tokens[:, :-1]
  pairs = previous.astype(np.int64) * num_tokens + tokens
  counts = np.bincount(pairs.ravel(), minlength=(num_tokens + 1) * num_tokens)
  return counts.reshape(num_tokens + 1, num_tokens).astype(np.int64)


def log_bigrams(counts: Int64[np.ndarray, "m k"]) -> Float32[np.ndarray, "m k"]:
  """Turns counts into log-probabilities of each row.

  What was never seen after a token gets its share of how often it occurs at all: each row is
  counted together with one observation that is spread as all tokens are (and that, in turn, as if
  each had been seen once more).
  """
  overall = counts.sum(axis=0) + 1.0
  smoothed = counts + overall / overall.sum()
  return np.log(smoothed / smoothed.sum(axis=1, keepdims=True)).astype(np.float32)


def score_bigrams(
  tokens: Int[Array, "b n"], log_probabilities: Float[Array, "m k"]
) -> Float[Array, " b"]:
  """Returns the mean negative log-likelihood of each sequence's tokens, in nats."""
  first = jnp.full_like(tokens[:, :1], log_probabilities.shape[1])
  previous = jnp.concatenate([first, tokens[:, :-1]], axis=1)
  return -jnp.mean(log_probabilities[previous, tokens], axis=1)
