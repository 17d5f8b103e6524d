"""Sampling of tokens: frequencies, top-k, greedy, prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.igpt.sampling import continue_sequences, sample_token
from vit_jax_zoo.systems.igpt.task import count_bigrams, log_bigrams, score_bigrams

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def sample_frequencies(**options):
  logits = jnp.broadcast_to(LOGITS, (4000, 4))
  draw = jax.jit(lambda key: sample_token(key, logits, **options))
  return np.bincount(draw(jax.random.key(0)), minlength=4) / 4000


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [0.1, 0.2, 0.3, 0.4]),
    ({"temperature": 0.5}, np.array([1, 4, 9, 16]) / 30),
    ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
    ({"temperature": 0.0}, [0, 0, 0, 1]),
    ({"top_k": 1}, [0, 0, 0, 1]),
  ],
)
def test_sample_frequencies_equal_probabilities(options, expected):
  np.testing.assert_allclose(sample_frequencies(**options), expected, atol=0.03)
  np.testing.assert_array_equal(sample_frequencies(**options) > 0, np.array(expected) > 0)


def predict_successor(cache, previous, position):
  """Predicts the last token plus one; the cache counts the calls."""
  following = jnp.where(position == 0, 0, previous + 1) % 10
  return 50.0 * jax.nn.one_hot(following, 10), cache + 1


def test_continue_sequences_continues_each_prefix():
  tokens = jnp.array([[9, 9, 9, 9, 9], [3, 9, 9, 9, 9], [1, 5, 9, 9, 9], [1, 2, 3, 4, 5]])
  lengths = jnp.array([0, 1, 2, 5])
  complete = jax.jit(lambda t, n: continue_sequences(predict_successor, 0, t, n, jax.random.key(0)))
  expected = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [1, 5, 6, 7, 8], [1, 2, 3, 4, 5]]
  np.testing.assert_array_equal(complete(tokens, lengths), expected)


def test_continue_sequences_skips_common_prefix():
  calls = []

  def step(cache, previous, position):
    jax.debug.callback(lambda p: calls.append(int(p)), position)
    return predict_successor(cache, previous, position)

  tokens = jnp.zeros((2, 8), jnp.int32)
  jax.block_until_ready(continue_sequences(step, 0, tokens, jnp.array([5, 6]), jax.random.key(0)))
  jax.effects_barrier()
  assert sorted(calls) == [5, 6, 7]


def test_samples_depend_on_key_and_row():
  def step(cache, previous, position):
    return jnp.zeros((previous.shape[0], 10)), cache

  tokens = jnp.zeros((2, 30), jnp.int32)
  draw = jax.jit(lambda key: continue_sequences(step, 0, tokens, jnp.zeros(2, jnp.int32), key))
  one, again, other = (draw(jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one[0] != one[1]).any()
  assert len(np.unique(one)) > 5


def test_bigram_counts_and_scores():
  tokens = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
  counts = count_bigrams(tokens, 3)
  np.testing.assert_array_equal(counts, [[0, 2, 0], [0, 1, 2], [0, 0, 1], [2, 0, 0]])
  table = log_bigrams(counts)
  np.testing.assert_allclose(np.exp(table).sum(axis=1), 1, rtol=1e-6)
  unigrams = (np.array([2, 3, 3]) + 1) / 11
  np.testing.assert_allclose(np.exp(table[1]), (counts[1] + unigrams) / 4, rtol=1e-6)
  expected = -(table[3, 0] + table[0, 1] + table[1, 1] + table[1, 2]) / 4
  scores = score_bigrams(jnp.asarray(tokens), jnp.asarray(table))
  np.testing.assert_allclose(scores[0], expected, rtol=1e-6)
