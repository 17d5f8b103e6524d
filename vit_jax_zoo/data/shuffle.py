"""Shuffling: the example and the random numbers at each position of a training run.

Both are functions of (seed, position) only: independent of hosts and workers, and resumed at any
position at no cost.
"""

import functools

import grain
import numpy as np

_ORDER, _NUMBERS = 0, 1  # separate the two uses of one seed


def shuffled_index(position: int, num_examples: int, seed: int) -> int:
  """Returns the example at a position of the endless sequence of epochs, each a permutation."""
  epoch, index = divmod(position, num_examples)
  if num_examples <= _SMALL:
    return int(_permutation(seed, epoch, num_examples)[index])
  return _permuted(index, num_examples, _epoch_seed(seed, epoch))


_SMALL = 1 << 16
"""Up to this number of examples permutations are drawn and cached: Grain's cipher, which needs no
memory, has a block of at least 16 bits and cycle-walks until it hits one of the examples."""


def _permuted(index: int, num_examples: int, key: int) -> int:
  """Returns the image of `index` in a permutation of range(num_examples), by Grain's cipher."""
  # At powers of two Grain 0.2 takes a block one bit too short: permute one number more there, and
  # apply the cipher again when that number results (cycle walking keeps this a permutation).
  last = num_examples - 1 if (num_examples - 1).bit_count() > 1 else num_examples
  while True:
    # With Grain's default of 4 rounds, neighbors are measurably spread.
    index = grain.experimental.index_shuffle(index, max_index=last, seed=key, rounds=8)
    if index < num_examples:
      return index


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  rng = np.random.default_rng(_epoch_seed(seed, epoch))
  return rng.permutation(np.arange(num_examples, dtype=np.uint16))


@functools.lru_cache(maxsize=64)
def _epoch_seed(seed: int, epoch: int) -> int:
  sequence = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
  return int(sequence.generate_state(1, np.uint32)[0])


class RandomNumbers:
  """Random numbers of each position by Philox (Salmon et al., 2011), a counter-based generator.

  Creating a generator takes longer than drawing a crop, so one is reused: its counter is set to the
  position, and the streams are 2**128 apart.
  """

  def __init__(self, seed: int) -> None:
    self._bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_NUMBERS,)))
    self._start = self._bits.state
    self._generator = np.random.Generator(self._bits)

  def at(self, position: int) -> np.random.Generator:
    """Returns the generator, set to the first number of a position; always the same object."""
    self._start["state"]["counter"] = np.array([0, 0, position, 0], np.uint64)
    self._bits.state = self._start
    return self._generator
