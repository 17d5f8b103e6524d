"""Where the levels of a feature pyramid transformer look from one place of a picture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax_zoo.visualize.pyramid import draw_levels

MOST_POSITIONS = 64**2
"""Of the finest level: whole attention maps are made to draw one row of each."""


def check_size(sizes: Sequence[tuple[int, int]]) -> None:
  """Raises ValueError if the largest of these levels has too many positions to be explained."""
  height, width = max(sizes)
  if height * width > MOST_POSITIONS:
    raise ValueError(
      f"where {height}x{width} positions look cannot be drawn; give a picture of fewer pixels, "
      "or leave --explain out"
    )


def intermediates(run: Callable[..., Any], *arguments: Any) -> Mapping[str, Any]:
  """Returns what `run`, which gives outputs and state, sows; compiled."""
  return jax.device_get(jax.jit(lambda *given: run(*given)[1]["intermediates"])(*arguments))


def draw_looks(
  image: np.ndarray,
  seen: Mapping[str, Any],
  sizes: Sequence[tuple[int, int]],
  place: tuple[float, float],
  titles: Sequence[str],
) -> Figure:
  """Draws what each level's self-transformer looks at, and the finest one's grounding transformers.

  Args:
    image: uint8, or floats in [0, 255].
    seen: what the transformer sows.
    sizes: height and width of the levels, from fine to coarse.
    place: that is looked from, in shares of height and width.
    titles: of the levels.
  """
  maps, names = [], []
  for level, (title, size) in enumerate(zip(titles, sizes, strict=True)):
    maps.append(_row(seen[f"self_{level}"]["weights"][0][0], size, size, place))
    names.append(title)
  for level in range(1, len(sizes)):
    weights = seen.get(f"ground_0_{level}", {}).get("weights")  # dot products over all have none
    if weights is not None and weights[0].ndim == 3:  # not those in a window
      maps.append(_row(weights[0][0], sizes[0], sizes[level], place))
      names.append(f"{titles[0]} at {titles[level]}")
  return draw_levels(image, maps, names, place)


def _row(
  weights: np.ndarray,
  queries: tuple[int, int],
  keys: tuple[int, int],
  place: tuple[float, float],
) -> np.ndarray:
  """Returns what the query at a place sees: a map of the keys, or of every second of them."""
  row, column = (
    min(int(share * side), side - 1) for share, side in zip(place, queries, strict=True)
  )
  looked = np.asarray(weights[row * queries[1] + column], np.float32)
  if len(looked) != keys[0] * keys[1]:
    keys = ((keys[0] + 1) // 2, (keys[1] + 1) // 2)
  return looked.reshape(keys)
