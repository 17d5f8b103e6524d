"""Mirroring, at random."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax_zoo.data.geometry import GeometricTransform, Mirror, Size, Step


@dataclasses.dataclass(frozen=True)
class RandomFlip(GeometricTransform):
  """Mirrors `image`, and what is marked in it, left to right with a probability."""

  name = "random_flip"

  probability: float = 0.5

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the mirror, or nothing."""
    del size
    return (Mirror(),) if rng.random() < self.probability else ()
