"""Which example stands at which position of a training run, and what its random numbers are.

Both are functions of (seed, position) alone, so that any host, worker or resumed run finds the same
ones without having seen the positions before.
"""

import functools

import grain
import numpy as np

_ORDER, _NUMBERS = 0, 1
"""Keep the two uses of one seed apart."""


def shuffled_index(position: int, num_examples: int, seed: int) -> int:
  """Returns the example at a position in an endless row of epochs, each one a permutation.

  Args:
    position: 0 or more; epoch e takes the positions [e * num_examples, (e + 1) * num_examples).
    num_examples: at least 1.
    seed: 0 or more.
  """
  epoch, place = divmod(position, num_examples)
  if num_examples <= _SMALL:
    return int(_permutation(seed, epoch, num_examples)[place])
  return _enciphered(place, num_examples, _epoch_seed(seed, epoch))


_SMALL = 1 << 16
"""Up to here a permutation is drawn and kept: Grain's cipher, which needs no memory, enciphers at
least 16 bits, and again and again until it hits one of the examples."""


def _enciphered(place: int, num_examples: int, key: int) -> int:
  """Returns where a permutation of range(num_examples) takes `place`, by Grain's cipher."""
  # At powers of two Grain 0.2 takes a block one bit too short; there permute one number more, and
  # follow it on whenever it comes out (cycle walking keeps this a permutation).
  last = num_examples - 1 if (num_examples - 1).bit_count() > 1 else num_examples
  while True:
    # With Grain's usual 4 rounds, neighbours stay noticeably apart.
    place = grain.experimental.index_shuffle(place, max_index=last, seed=key, rounds=8)
    if place < num_examples:
      return place


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  rng = np.random.default_rng(_epoch_seed(seed, epoch))
  return rng.permutation(np.arange(num_examples, dtype=np.uint16))


@functools.lru_cache(maxsize=64)
def _epoch_seed(seed: int, epoch: int) -> int:
  sequence = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
  return int(sequence.generate_state(1, np.uint32)[0])


class RandomNumbers:
  """The random numbers of each position, by Philox (Salmon et al., 2011): a hash of a counter.

  Making a generator takes longer than drawing a crop, so there is one, set to the numbers of a
  position by setting its counter: they begin 2**128 apart.
  """

  def __init__(self, seed: int) -> None:
    self._bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_NUMBERS,)))
    self._start = self._bits.state
    self._generator = np.random.Generator(self._bits)

  def at(self, position: int) -> np.random.Generator:
    """Returns the generator at the first number of a position; it is the same one each time."""
    self._start["state"]["counter"] = np.array([0, 0, position, 0], np.uint64)
    self._bits.state = self._start
    return self._generator
