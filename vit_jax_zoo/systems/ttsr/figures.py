"""Figures of super-resolution: images, source positions in the reference, matching confidence."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.figures.canvas import HEAT, QUIET, add_color_bar, hide_frame, show_image
from vit_jax_zoo.systems.ttsr.psnr_ssim import psnr_y

Arrays: TypeAlias = Mapping[str, Any]
CELL = 2.1  # inches
MAX_IMAGES = 4
COLUMNS = (  # "truth" and "wrong reference" are optional
  "input", "bicubic", "TTSR", "reference", "truth", "wrong reference",
  "positions", "matched positions", "similarity",
)  # fmt: skip

BATCH_COLUMNS = {  # of a training batch: title -> key
  "input": "low_res_image",
  "bicubic": "upsampled_image",
  "truth": "image",
  "reference": "ref_image",
  "blurred reference": "blurred_ref_image",
}


def draw_results(batch: Arrays, predictions: Arrays, *, title: str = "Super-resolution") -> Figure:
  """Draws a row of images for each of the first examples, in the columns `COLUMNS`.

  All images but the input have one scale. "matched positions" colours each cell of the input by the
  position of its match in the reference; "positions" shows the colours there. "similarity" is the
  soft attention, from 0 to 1. Batch and predictions are those of the task; `image`, `size` and
  `blurred_ref_image` of the batch are optional.
  """
  there = {"truth": "image" in batch, "wrong reference": "wrong_reference_image" in predictions}
  columns = [name for name in COLUMNS if there.get(name, True)]
  figure, rows = _grid(batch, columns, title)
  for i, row in enumerate(rows):
    _draw_row(row, batch, predictions, i)
  last = [row["similarity"] for row in rows]
  add_color_bar(figure, "", ("0", "1"), ax=last, panchor=False)
  return figure


def draw_batch(batch: Arrays) -> Figure:
  """Draws a row of `BATCH_COLUMNS` for each example of a training batch, in [0, 255]."""
  figure, rows = _grid(batch, list(BATCH_COLUMNS), "Training batch")
  for i, row in enumerate(rows):
    for name, key in BATCH_COLUMNS.items():
      picture = np.asarray(batch[key][i])
      show_image(row[name], picture, "nearest" if name == "input" else "auto")
      row[name].set_xlabel(f"{picture.shape[1]} × {picture.shape[0]}", fontsize=9)
  return figure


def position_colors(index: Int[np.ndarray, "h w"], grid: tuple[int, int]) -> UInt8[Any, "h w 3"]:
  """Returns a colour for each cell of a grid: red grows with the column, blue with the row."""
  rows, columns = np.divmod(np.asarray(index), grid[1])
  x, y = columns / max(grid[1] - 1, 1), rows / max(grid[0] - 1, 1)
  colors = np.stack([0.15 + 0.8 * x, 0.85 - 0.55 * (x + y) / 2, 0.15 + 0.8 * y], axis=-1)
  return np.round(255 * colors).astype(np.uint8)


def _draw_row(axes: Mapping[str, Axes], batch: Arrays, predictions: Arrays, i: int) -> None:
  height, width = batch["size"][i] if "size" in batch else batch["upsampled_image"].shape[1:3]
  cells = slice(0, -(-height // 4)), slice(0, -(-width // 4))
  large = {
    "bicubic": batch["upsampled_image"],
    "TTSR": predictions["image"],
    "wrong reference": predictions.get("wrong_reference_image"),
    "truth": batch.get("image"),
  }
  shown = {k: np.asarray(x[i])[:height, :width] for k, x in large.items() if x is not None}
  reference = np.asarray(batch["ref_image"][i])
  grid = reference.shape[0] // 4, reference.shape[1] // 4
  colors = position_colors(np.arange(grid[0] * grid[1]).reshape(grid), grid)
  colors = np.kron(colors, np.ones((4, 4, 1), np.float32))
  cropped = reference[: len(colors), : colors.shape[1]].astype(np.float32)
  tint = 0.75 * colors * (0.35 + 0.65 * cropped.mean(axis=-1, keepdims=True) / 255)
  shown |= {"reference": reference, "positions": 0.25 * cropped + tint}
  largest = np.max([image.shape[:2] for image in shown.values()], axis=0)
  for name, image in shown.items():
    show_image(axes[name], image)
    axes[name].set(xlim=(-0.5, largest[1] - 0.5), ylim=(largest[0] - 0.5, -0.5))
  if "truth" in shown:
    compared = [name for name in ("bicubic", "TTSR", "wrong reference") if name in shown]
    decibels = {name: psnr_y(shown[name], shown["truth"]) for name in compared}
    for name, value in decibels.items():
      weight = "bold" if value == max(decibels.values()) else "normal"
      axes[name].set_xlabel(f"{value:.2f} dB", fontsize=9, weight=weight)
  show_image(axes["input"], np.asarray(batch["low_res_image"][i])[cells], "nearest")
  index, soft = (np.asarray(predictions[k][i])[cells] for k in ("hard_attention", "soft_attention"))
  show_image(axes["matched positions"], position_colors(index, grid), "nearest")
  axes["similarity"].imshow(soft, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
  used = len(np.unique(index)) / index.size
  axes["matched positions"].set_xlabel(f"{used:.0%} distinct patches", fontsize=9)
  axes["similarity"].set_xlabel(f"{np.min(soft):.2f} to {np.max(soft):.2f}", fontsize=9)


def _grid(batch: Arrays, columns: list[str], title: str) -> tuple[Figure, list[dict[str, Axes]]]:
  count, height, width, _ = batch["upsampled_image"].shape
  rows, aspect = min(count, MAX_IMAGES), float(np.clip(height / width, 0.4, 1.6))
  if not rows:
    raise ValueError("batch: no image to draw; expected at least one")
  size = (len(columns) * CELL, rows * (CELL * aspect + 0.35) + 0.7)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
  axes = figure.subplots(rows, len(columns), squeeze=False)
  for name, ax in zip(columns, axes[0], strict=True):
    ax.set_title(name, fontsize=10)
  for ax in axes.flat:
    hide_frame(ax)
    ax.set_anchor("N")  # aligns images of other shapes with their titles
    ax.xaxis.label.set_color(QUIET)
  return figure, [dict(zip(columns, row, strict=True)) for row in axes]
