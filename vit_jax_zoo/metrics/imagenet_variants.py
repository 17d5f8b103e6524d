"""Scores on ImageNet's variants: relabelled images, or a subset of the classes.

ReaL (Beyer et al., arXiv:2006.07159): an image may have several labels, any of which is correct.
ImageNet-A and -R (Hendrycks et al., arXiv:1907.07174 and 2006.16241) have 200 of the 1000 classes.
"""

import numpy as np
from jaxtyping import Bool, Int


def score_rankings(
  ranked: Int[np.ndarray, "n r"], labels: Bool[np.ndarray, "n k"], *, only_its_classes: bool = False
) -> dict[str, float]:
  """Returns "accuracy", "top5_accuracy" (of more than five classes), "images", "classes".

  The last two count images with a label, and classes that occur; with `only_its_classes`, others
  are ignored in `ranked`, which then has all classes, the most probable first.
  """
  labelled = labels.any(axis=1)
  if not labelled.any():
    raise ValueError(f"none of the {len(labels)} images has a label; there is nothing to score")
  ranked, labels = ranked[labelled], labels[labelled]
  occurring = np.asarray(labels.any(axis=0))
  if only_its_classes:
    last = np.argsort(np.logical_not(occurring[ranked]), axis=1, kind="stable")
    ranked = np.take_along_axis(ranked, last, axis=1)[:, : occurring.sum()]
  right = np.take_along_axis(labels, ranked[:, :5], axis=1)
  scores = {"accuracy": float(right[:, 0].mean())}
  if (occurring.sum() if only_its_classes else labels.shape[1]) > 5:
    scores["top5_accuracy"] = float(right.any(axis=1).mean())
  return scores | {"images": float(len(ranked)), "classes": float(occurring.sum())}
