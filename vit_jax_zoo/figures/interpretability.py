"""Figures of an `Explanation`: attention, lambdas, position embeddings, filters."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Num
from matplotlib.figure import Figure

from vit_jax_zoo.figures.attention import (
  draw_attention,
  draw_attention_distances,
  draw_filters,
  draw_heads,
  draw_lambdas,
  draw_position_similarity,
)
from vit_jax_zoo.ops.interpretability import Explanation


def draw_of_images(
  images: Num[np.ndarray, "b h w c"], captions: Sequence[str], seen: Explanation
) -> dict[str, Figure]:
  """Draws the parts that depend on the images.

  Args:
    images: inputs of the model, in [0, 255].
    captions: of the images.
    seen: explanation of these images, as numpy arrays.

  Returns:
    By name, if available: "attention", the rollout; "heads", of the first image; "distances", over
    all images; "lambdas", of the first image.
  """
  figures = {}
  if seen.looked_at is not None:
    by = f"rolled out from {seen.viewer} to the patches"
    figures["attention"] = draw_attention(images, seen.looked_at, captions, subtitle=by)
  if seen.heads is not None:
    by = f"of {seen.viewer}; each map scaled to its own maximum"
    figures["heads"] = draw_heads(images[0], seen.heads[0], subtitle=by)
  if seen.distances is not None:
    figures["distances"] = draw_attention_distances(seen.distances)
  if seen.lambdas:
    first = {name: norms[0] for name, norms in seen.lambdas.items()}
    figures["lambdas"] = draw_lambdas(images[0], first)
  return figures


def draw_of_model(seen: Explanation) -> dict[str, Figure]:
  """Draws the parts that do not depend on images: "positions" and "filters", if available."""
  figures = {}
  if seen.positions is not None:
    figures["positions"] = draw_position_similarity(seen.positions, seen.grid)
  if seen.filters is not None:
    figures["filters"] = draw_filters(seen.filters, principal=seen.principal)
  return figures
