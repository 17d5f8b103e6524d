"""Classes of published R-CNNs: the background first, then COCO's 80 in a row, or by their ids.

Here class ids of COCO stay what they are (`data.coco`): 1 to 90, with gaps. A file with 81 outputs
(Detectron's, without gaps) or with 91 (torchvision's, with gaps) is taken to be COCO's, and gets
outputs for the ids that it lacks. Their bias is low: they never win, and could still be learned.
Other counts are taken as they are: the file's class 1 is then 0 here.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vit_jax_zoo.data.sources.coco import THINGS, names_by_id
from vit_jax_zoo.weights.key_map import Array, Flat

IDS = sorted(THINGS)
NUM_CLASSES = IDS[-1] + 1
NAMES = names_by_id(THINGS)
UNUSED = -20.0
"""Bias of an output that has no class."""

_LAYOUTS = {len(IDS) + 1: IDS, NUM_CLASSES: list(range(1, NUM_CLASSES))}
"""By a file's number of outputs: the ids behind the background, in order."""


def with_ids(arrays: Mapping[str, Array], layers: Mapping[str, int]) -> tuple[Flat, bool]:
  """Gives a COCO detector's outputs places by id, the background still first.

  Args:
    arrays: the state dict.
    layers: keys without ".weight" and ".bias" of the layers with an output for each class, and how
      many each has; the scores' layer first.

  Returns:
    The state dict, and whether it was COCO's.
  """
  first = next(iter(layers))
  ids = _LAYOUTS.get(len(arrays[f"{first}.bias"]))
  if ids is None:
    return dict(arrays), False
  places = [0, *(number + 1 for number in ids)]
  found = dict(arrays)
  for layer, per_class in layers.items():
    for key in (f"{layer}.weight", f"{layer}.bias"):
      if key in arrays and len(arrays[key]) == per_class * len(places):
        own = arrays[key].reshape(len(places), per_class, *arrays[key].shape[1:])
        fill = UNUSED if layer == first and key.endswith("bias") else 0.0
        wide = np.full((NUM_CLASSES + 1, *own.shape[1:]), fill, own.dtype)
        wide[places] = own
        found[key] = wide.reshape(-1, *arrays[key].shape[1:])
  return found, True


def without_ids(
  arrays: Mapping[str, Array], layers: Mapping[str, int], names: Sequence[str], outputs: int
) -> Flat:
  """Undoes `with_ids` for a file with so many outputs, if the classes' names are COCO's by id."""
  if tuple(names) != NAMES:
    return dict(arrays)
  places = [0, *(number + 1 for number in _LAYOUTS[outputs])]
  found = dict(arrays)
  for layer, per_class in layers.items():
    for key in (f"{layer}.weight", f"{layer}.bias"):
      if key in arrays:
        grouped = arrays[key].reshape(-1, per_class, *arrays[key].shape[1:])[places]
        found[key] = grouped.reshape(-1, *arrays[key].shape[1:])
  return found
