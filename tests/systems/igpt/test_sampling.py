"""Sampling of tokens: frequencies, top-k, greedy, prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.igpt.sampling import complete, sample_token
from vit_jax_zoo.systems.igpt.task import fit_bigrams, score_bigrams

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def sample_frequencies(**options):
  logits = jnp.broadcast_to(LOGITS, (4000, 4))
  options = {"temperature": 1.0, "top_k": None, **options}
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


class Successor:
  """Predicts the last token plus one; the cache counts the calls."""

  shifts, scan_layers = True, False

  def apply(self, variables, tokens, position=None, *, method, mutable):
    assert mutable == ["cache"]
    if method == "from_tokens":
      return None, {"cache": 0}
    return self.next_logits(tokens, position), {"cache": variables["cache"] + 1}

  def next_logits(self, previous, position):
    return 50.0 * jax.nn.one_hot(jnp.where(position == 0, 0, previous + 1) % 10, 10)


def test_each_prefix_is_continued():
  tokens = jnp.array([[9, 9, 9, 9, 9], [3, 9, 9, 9, 9], [1, 5, 9, 9, 9], [1, 2, 3, 4, 5]])
  lengths = jnp.array([0, 1, 2, 5])
  sample = jax.jit(lambda t, n: complete(Successor(), {}, t, n, jax.random.key(0)))
  expected = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [1, 5, 6, 7, 8], [1, 2, 3, 4, 5]]
  np.testing.assert_array_equal(sample(tokens, lengths), expected)


def test_common_prefix_is_skipped():
  calls = []

  class Recorder(Successor):
    def next_logits(self, previous, position):
      jax.debug.callback(lambda p: calls.append(int(p)), position)
      return super().next_logits(previous, position)

  tokens, lengths = jnp.zeros((2, 8), jnp.int32), jnp.array([5, 6])
  jax.block_until_ready(complete(Recorder(), {}, tokens, lengths, jax.random.key(0)))
  jax.effects_barrier()
  assert sorted(calls) == [5, 6, 7]


def test_samples_depend_on_key_and_row():
  class Uniform(Successor):
    def next_logits(self, previous, position):
      return jnp.zeros((previous.shape[0], 10))

  tokens = jnp.zeros((2, 30), jnp.int32)
  draw = jax.jit(lambda key: complete(Uniform(), {}, tokens, jnp.zeros(2, jnp.int32), key))
  one, again, other = (draw(jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one[0] != one[1]).any()
  assert len(np.unique(one)) > 5


def test_bigram_probabilities_and_scores():
  tokens = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
  table = fit_bigrams(tokens, 3)
  counts = np.array([[0, 2, 0], [0, 1, 2], [0, 0, 1], [2, 0, 0]])
  smoothed = counts + (np.array([2, 3, 3]) + 1) / 11
  expected = smoothed / smoothed.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(np.exp(table), expected, rtol=1e-6)
  expected = -(table[3, 0] + table[0, 1] + table[1, 1] + table[1, 2]) / 4
  scores = score_bigrams(jnp.asarray(tokens), jnp.asarray(table))
  np.testing.assert_allclose(scores[0], expected, rtol=1e-6)
