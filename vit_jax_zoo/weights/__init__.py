"""Published checkpoints: containers, key tables, formats, downloads.

Files that cannot be read or do not fit a model raise `WeightsError`: one line, with all problems.
"""

from vit_jax_zoo.weights.finetune_init import fit_to_model, relayout
from vit_jax_zoo.weights.key_map import WeightsError, check_finite
from vit_jax_zoo.weights.load import Pretrained, load_into, load_pretrained
from vit_jax_zoo.weights.preprocess import Preprocess
from vit_jax_zoo.weights.pretrained_parts import find_files, load_parts, still_needed

__all__ = [
  "Preprocess",
  "Pretrained",
  "WeightsError",
  "check_finite",
  "find_files",
  "fit_to_model",
  "load_into",
  "load_parts",
  "load_pretrained",
  "relayout",
  "still_needed",
]
