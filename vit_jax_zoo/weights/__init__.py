"""Published checkpoints, in and out: one declarative table a format, read in both directions."""

from vit_jax_zoo.weights.load import Pretrained, load_into, load_pretrained
from vit_jax_zoo.weights.parts import find_files, load_parts, still_needed
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.table import WeightsError, check_finite
from vit_jax_zoo.weights.transfer import adapt, relayout

__all__ = [
  "Preprocess",
  "Pretrained",
  "WeightsError",
  "adapt",
  "check_finite",
  "find_files",
  "load_into",
  "load_parts",
  "load_pretrained",
  "relayout",
  "still_needed",
]
