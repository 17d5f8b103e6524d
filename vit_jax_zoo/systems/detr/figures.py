"""Figures of DETR: attention maps of the queries (figure 6 of the paper), panoptic segments."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of, shorten
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.figures.canvas import add_color_bar, heat_map
from vit_jax_zoo.systems.detr.panoptic import Arrays, Segmentation

_OPACITY = 0.55
MAX_IMAGES, MAX_QUERIES = 3, 4  # of a figure of queries


def draw_segments(
  truths: Sequence[Segmentation],
  predicted: Sequence[Segmentation],
  images: Sequence[np.ndarray],
  class_names: Sequence[str] = (),
) -> Figure:
  """Draws images, uint8 [h w 3] of any sizes, with their true and their predicted segments."""
  columns = 2 if len(images) < 2 else 4  # two images side by side
  rows, title = -(-2 * len(images) // columns), "True and predicted segments"
  figure, axes = draw.grid(rows, columns, title, images[0][None])
  cells = iter(axes.flat)
  for image, *both in zip(images, truths, predicted, strict=True):
    for what, given in zip(("truth", "predicted"), both, strict=True):
      ax, segment_map = next(cells), given.segment_map
      draw.show(ax, paint_segments(image, segment_map))
      _write_names(ax, segment_map, [name_of(label, class_names) for label in given.labels])
      count = len(np.unique(segment_map[segment_map >= 0]))
      ax.set_title(f"{what}: {count}", fontsize=8.5, loc="left")
  return figure


def paint_segments(image: np.ndarray, segment_map: Int[np.ndarray, "h w"]) -> np.ndarray:
  """Returns the image in the size of the map, tinted by segment."""
  image = cv2.resize(image, segment_map.shape[::-1], interpolation=cv2.INTER_LINEAR)
  tints = np.asarray(colormaps["tab20"](np.arange(20) * 7 % 20))[:, :3] * 255
  tinted = (1 - _OPACITY) * image + _OPACITY * tints[segment_map % len(tints)]
  return np.where(segment_map[..., None] < 0, image, tinted).astype(np.uint8)


def _write_names(ax: Axes, segment_map: Int[np.ndarray, "h w"], names: Sequence[str]) -> None:
  for index, name in enumerate(names):
    rows, columns = np.nonzero(segment_map == index)
    if not len(rows):
      continue
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    style = {"color": "white", "fontsize": 7, "ha": "center", "va": "center", "clip_on": True}
    text = ax.text(columns[middle], rows[middle], name, **style)
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def draw_query_attention(
  batch: Arrays, predictions: Arrays, class_names: Sequence[str] = (), *, threshold: float = 0.0
) -> Figure:
  """Draws images with the boxes of highest score, and the attention map of each box's query.

  Predictions are those of `draw_predictions`, and `attention` [b q i j] over the padded image. The
  query of highest score is always drawn.
  """
  rows = draw.real_rows(batch)[:MAX_IMAGES]
  drawn = [_best(np.asarray(predictions["scores"][row]), threshold) for row in rows]
  columns = 1 + max(map(len, drawn), default=0)
  figure, axes = draw.grid(len(rows), columns, "Attention of the queries", batch["image"])
  for index, (row, best) in enumerate(zip(rows, drawn, strict=True)):
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
      height, width = np.asarray(batch["image"]).shape[1:3]
      attention = np.asarray(predictions["attention"][row][query], np.float32)
      values = cv2.resize(attention, (width, height), interpolation=cv2.INTER_LINEAR)
      values = values[: image.shape[0], : image.shape[1]]
      draw.show(ax, heat_map(image, values / max(float(values.max()), 1e-9)))
      draw.draw_boxes(ax, boxes[[column]], [""], labels[[column]])
      title = f"{shorten(names[column], 20)} {scores[query]:.0%}, query {query}"
      ax.set_title(title, fontsize=9, loc="left")
  add_color_bar(figure, "attention", ("0", "largest"), ax=axes, shrink=0.7, aspect=30)
  return figure


def _best(scores: np.ndarray, threshold: float) -> Int[np.ndarray, " s"]:
  best = np.argsort(-scores, kind="stable")[:MAX_QUERIES]
  return best[(scores[best] >= threshold) | (best == best[0])]
