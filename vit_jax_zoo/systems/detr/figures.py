"""Where object queries look: DETR's figure 6, the decoder's attention beside the box it gave."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw

Segments: TypeAlias = tuple[Int[np.ndarray, "_ _"], Sequence[int] | Int[np.ndarray, " _"]]
"""The number of the segment at every pixel, negative where there is none; segments' class ids."""

_OPACITY = 0.55


def draw_segments(
  truths: Sequence[Segments],
  finds: Sequence[Segments],
  images: Sequence[np.ndarray],
  class_names: Sequence[str] = (),
  *,
  title: str = "True and predicted segments",
) -> Figure:
  """Draws every image with its true segments, and with those that were found.

  Args:
    truths: of each image.
    finds: likewise.
    images: uint8 [h w 3], of any sizes.
    class_names: by class id; ids by default.
    title: of the figure.
  """
  columns = 2 if len(images) < 2 else 4  # two images side by side
  figure, axes = draw.grid(-(-2 * len(images) // columns), columns, title)
  cells = iter(axes.flat)
  for image, truth, find in zip(images, truths, finds, strict=True):
    for (segment_map, labels), what in ((truth, "truth"), (find, "found")):
      count = len(np.unique(segment_map[segment_map >= 0]))
      ax = next(cells)
      draw.show(ax, paint_segments(image, segment_map))
      _write_names(ax, segment_map, [name_of(label, class_names) for label in labels])
      ax.set_title(f"{what}: {count}", fontsize=8.5, loc="left")
  return figure


def paint_segments(image: np.ndarray, segment_map: Int[np.ndarray, "h w"]) -> np.ndarray:
  """Returns the image in the map's size, tinted by segment; as it is where there is none."""
  image = cv2.resize(image, segment_map.shape[::-1], interpolation=cv2.INTER_LINEAR)
  tints = np.asarray(colormaps["tab20"](np.arange(20) * 7 % 20))[:, :3] * 255
  tinted = (1 - _OPACITY) * image + _OPACITY * tints[segment_map % len(tints)]
  return np.where(segment_map[..., None] < 0, image, tinted).astype(np.uint8)


def _write_names(ax: Axes, segment_map: Int[np.ndarray, "h w"], names: Sequence[str]) -> None:
  """Writes each segment's name where most of it lies."""
  outline: list[patheffects.AbstractPathEffect] = [
    patheffects.withStroke(linewidth=2, foreground="black")
  ]
  for index, name in enumerate(names):
    rows, columns = np.nonzero(segment_map == index)
    if not len(rows):
      continue
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    ax.text(
      columns[middle], rows[middle], name, color="white", fontsize=7, ha="center", va="center",
      path_effects=outline, clip_on=True,
    )  # fmt: skip


def draw_query_attention(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  threshold: float = 0.0,
  title: str = "Where the queries look",
  max_images: int = 3,
  max_queries: int = 4,
) -> Figure:
  """Draws images with their surest boxes, and beside them each box's query: where it looked.

  Args:
    batch: as the detection task has it.
    predictions: as `draw_predictions` has them, and `attention` [b q i j]: of each query over the
      map of the padded image.
    class_names: by class id; ids by default.
    threshold: shows queries that are at least as sure, and always the surest.
    title: of the figure.
    max_images: draws the first so many.
    max_queries: the surest so many of each image.
  """
  rows = draw.real_rows(batch)[:max_images]
  surest = [_surest(np.asarray(predictions["scores"][row]), threshold, max_queries) for row in rows]
  figure, axes = draw.grid(len(rows), 1 + max(map(len, surest), default=0), title)
  for index, (row, best) in enumerate(zip(rows, surest, strict=True)):
    image = draw.image_of(batch, row)
    scale = draw.to_shown(batch, row, image)
    scores = np.asarray(predictions["scores"][row])
    labels = np.asarray(predictions["labels"][row])[best]
    boxes = np.asarray(predictions["boxes_xyxy"][row])[best] * scale
    names = [name_of(label, class_names) for label in labels]
    draw.show(axes[index, 0], image)
    draw.draw_boxes(axes[index, 0], boxes, names, labels)
    for column, query in enumerate(best):
      ax = axes[index, 1 + column]
      padded = np.asarray(batch["image"]).shape[1:3]
      draw.show(ax, _lit(image, np.asarray(predictions["attention"][row][query]), padded))
      one = slice(column, column + 1)
      draw.draw_boxes(ax, boxes[one], names[one], labels[one])
      ax.set_title(f"query {query}: {scores[query]:.0%}", fontsize=8.5, loc="left")
  return figure


def _surest(
  scores: Float[np.ndarray, " q"], threshold: float, max_queries: int
) -> Int[np.ndarray, " s"]:
  """Returns the queries to be shown, the surest first."""
  best = np.argsort(-scores, kind="stable")[:max_queries]
  return best[(scores[best] >= threshold) | (best == best[0])]


def _lit(
  image: np.ndarray, attention: Float[np.ndarray, "i j"], padded: tuple[int, ...]
) -> np.ndarray:
  """Returns the image, dark where nobody looks."""
  light = cv2.resize(attention.astype(np.float32), padded[::-1], interpolation=cv2.INTER_LINEAR)
  light = light[: image.shape[0], : image.shape[1]]
  light = light / max(float(light.max()), 1e-9)
  return (image * (0.15 + 0.85 * light[..., None])).astype(np.uint8)
