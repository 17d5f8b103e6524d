"""Published checkpoints: containers, key tables, formats, downloads.

Files that cannot be read or do not fit a model raise `WeightsError`: one line, with all problems.
"""

from vit_jax_zoo.weights.checkpoint import Pretrained
from vit_jax_zoo.weights.finetune_init import fit_to_model, load_parts, relayout
from vit_jax_zoo.weights.key_map import WeightsError, check_finite
from vit_jax_zoo.weights.load import load_into, load_pretrained
from vit_jax_zoo.weights.preprocess import Preprocess

__all__ = [
  "Preprocess",
  "Pretrained",
  "WeightsError",
  "check_finite",
  "fit_to_model",
  "load_into",
  "load_parts",
  "load_pretrained",
  "relayout",
]
