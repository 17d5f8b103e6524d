"""Where the levels of a feature pyramid transformer look from one place of each image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from matplotlib.figure import Figure

from vit_jax_zoo.ops.images import pad_images
from vit_jax_zoo.tasks import base

_CELL = 2.4  # inches


def draw_levels(
  images: Num[np.ndarray, "b h w c"],
  maps: Sequence[Float[np.ndarray, "b _ _"]],
  titles: Sequence[str],
  places: Float[np.ndarray, "b 2"],
) -> Figure:
  """Draws images with one place marked in each, and beside them where each level looks from there.

  Args:
    images: uint8, or floats in [0, 255].
    maps: weights over each level's positions; each is scaled to its own maximum.
    titles: of the maps.
    places: that are looked from, in shares of height and width.
  """
  height, width = images.shape[1:3]
  cell = _CELL * min(height / width, 2.0)
  size = (_CELL * (len(maps) + 1), cell * len(images) + 0.35)
  figure = Figure(figsize=size, dpi=110)
  grid = figure.subplots(len(images), len(maps) + 1, squeeze=False)
  figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.35 / size[1], wspace=0.04, hspace=0.04)
  for row, axes in enumerate(grid):
    axes[0].imshow(np.clip(images[row], 0, 255).astype(np.uint8), interpolation="nearest")
    y, x = places[row] * (height, width) - 0.5
    axes[0].plot(x, y, "o", mfc="none", mec="k", mew=3, ms=10)
    axes[0].plot(x, y, "o", mfc="none", mec="w", ms=10)
    for ax, weights in zip(axes[1:], maps, strict=True):
      ax.imshow(weights[row], cmap="viridis", vmin=0, interpolation="nearest")
    for ax in axes:
      ax.set_axis_off()
  for ax, title in zip(grid[0], ("from the ring", *titles), strict=True):
    ax.set_title(title, fontsize=9)
  return figure


MOST_IMAGES = 3
MOST_POSITIONS = 64**2
"""Of the finest level: whole attention maps are made to draw one row of each."""


def explain_looks(
  model: Any,
  run: Callable[[base.Batch], Mapping[str, Any]],
  batch: base.Batch,
  places: Float[Array, "b 2"],
) -> dict[str, Any]:
  """Returns what a task's `explain` returns, for the first images of a batch; traced.

  Args:
    model: whose `neck` is to be "fpt".
    run: of a batch; returns what the transformer sows.
    batch: has `image`; `looked_from` float [b 2], if it is there, is taken in place of `places`.
    places: that are looked from, in shares of height and width of the batch's images.

  Returns:
    `image`; `places`; `sizes` int32 [l 2] of the levels; `levels`, see `looks`.

  Raises:
    ValueError: there is no transformer, or its attention maps would be too large.
  """
  if getattr(model, "neck", None) != "fpt":
    raise ValueError(
      "explain draws where a pyramid's levels look, and this model has no FPT; leave explain out, "
      "or take a model with neck=fpt"
    )
  batch = {key: jnp.asarray(value)[:MOST_IMAGES] for key, value in batch.items()}
  places = jnp.asarray(batch.get("looked_from", places[:MOST_IMAGES]), jnp.float32)
  seen = run(batch)
  return {
    "image": batch["image"],
    "places": places,
    "sizes": jnp.asarray(_sizes(seen), jnp.int32),
    "levels": looks(seen, places),
  }


def looks(seen: Mapping[str, Any], places: Float[Array, "b 2"]) -> dict[str, Float[Array, "b _ _"]]:
  """Returns where the query at a place looks: over all keys, or every second of them.

  By the self-transformer of each level, "0" for the finest, and by the finest one's grounding
  transformers, "0 1" being its look at level 1. (Those in a window, and those whose weights are
  plain dot products, have none.)

  Args:
    seen: what the transformer sows.
    places: see `explain_looks`.

  Raises:
    ValueError: the attention maps would be too large.
  """
  sizes = _sizes(seen)
  height, width = max(sizes)
  if height * width > MOST_POSITIONS:
    raise ValueError(
      f"where {height}x{width} positions look cannot be drawn; give images of fewer pixels, "
      "or leave explain out"
    )
  found = {
    str(level): _rows(seen[f"self_{level}"]["weights"][0], size, size, places)
    for level, size in enumerate(sizes)
  }
  for level in range(1, len(sizes)):
    weights = seen.get(f"ground_0_{level}", {}).get("weights")
    if weights is not None and weights[0].ndim == 3:
      found[f"0 {level}"] = _rows(weights[0], sizes[0], sizes[level], places)
  return found


def padded(batch: base.Batch, multiple: int) -> base.Batch:
  """Returns a batch whose images are padded as a model pads them, so that maps cover all of them.

  Args:
    batch: as `explain_looks` takes it.
    multiple: of which the images' sides are to be.
  """
  images = jnp.asarray(batch["image"])
  framed = pad_images(images, multiple)
  before = jnp.asarray([images.shape[1:3]])
  after = {**batch, "image": framed}
  after["image_size"] = batch.get("image_size", jnp.tile(before, (len(images), 1)))
  if "looked_from" in batch:
    sides = jnp.asarray([framed.shape[1:3]])
    after["looked_from"] = jnp.asarray(batch["looked_from"]) * (before / sides)
  return after


def middles(batch: base.Batch) -> Float[Array, "b 2"]:
  """Returns where the images' middles are, in shares of height and width with the padding."""
  return 0.5 * _shares(batch)


def first_targets(batch: base.Batch) -> Float[Array, "b 2"]:
  """Returns where each image's first target has its middle, or where the image has its own."""
  if "boxes_cxcywh" not in batch or not batch["boxes_cxcywh"].shape[1]:
    return middles(batch)
  first = jnp.asarray(batch["boxes_cxcywh"])[:, 0, 1::-1]
  return jnp.where(jnp.asarray(batch["is_target"])[:, :1], first, 0.5) * _shares(batch)


def draw_looks(explanation: Mapping[str, Any], model: Any) -> Figure:
  """Draws what `explain_looks` returned, as numpy arrays; the model names its levels."""
  titles = [
    f"{name}: {height}x{width}"
    for name, (height, width) in zip(model.level_names, explanation["sizes"], strict=True)
  ]

  def title(key: str) -> str:
    level, _, other = key.partition(" ")
    return f"{titles[int(level)]} at {titles[int(other)]}" if other else titles[int(level)]

  levels = explanation["levels"]
  keys = sorted(levels, key=lambda key: (len(key.split()), key))
  return draw_levels(
    explanation["image"],
    [np.asarray(levels[key]) for key in keys],
    [title(key) for key in keys],
    explanation["places"],
  )


def _shares(batch: base.Batch) -> Float[Array, "b 2"]:
  """Returns the images' share of the batch's height and width."""
  sides = jnp.asarray([batch["image"].shape[1:3]], jnp.float32)
  if "image_size" not in batch:
    return jnp.ones((len(batch["image"]), 2))
  return jnp.asarray(batch["image_size"]).astype(jnp.float32) / sides


def _sizes(seen: Mapping[str, Any]) -> list[tuple[int, int]]:
  """Returns height and width of the levels, from fine to coarse."""
  sizes = []
  while (name := f"self_{len(sizes)}_output") in seen:
    sizes.append((seen[name][0].shape[1], seen[name][0].shape[2]))
  return sizes


def _rows(
  weights: Float[Array, "b n m"],
  queries: tuple[int, int],
  keys: tuple[int, int],
  places: Float[Array, "b 2"],
) -> Float[Array, "b _ _"]:
  size = jnp.asarray(queries)[None]
  at = jnp.minimum((places * size).astype(jnp.int32), size - 1)
  index = at[:, 0] * queries[1] + at[:, 1]
  rows = jnp.take_along_axis(weights, index[:, None, None], axis=1)[:, 0]
  if rows.shape[-1] != keys[0] * keys[1]:
    keys = ((keys[0] + 1) // 2, (keys[1] + 1) // 2)
  return rows.reshape(len(rows), *keys).astype(jnp.float32)
