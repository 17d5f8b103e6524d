"""Pictures of super-resolution: small, bicubic, ours, truth, and where each patch was taken from.

Figures are made without `pyplot`, so that nothing is kept alive and no window opens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.ops.picture_quality import psnr_y

QUIET = "#555555"
CELL = 2.1  # inches
COLUMNS = ("small", "bicubic", "ours", "truth", "reference", "taken from", "trust")


def draw_results(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  *,
  title: str = "Super-resolution",
  max_images: int = 4,
) -> Figure:
  """Draws a row of seven pictures for each example.

  "taken from" gives each cell of the small picture the colour of the place in the reference where
  its patch was found; those colours are laid over the reference. "trust" is the soft attention,
  dark where it is least and bright where it is greatest in this picture.

  Args:
    batch: as `tasks.super_resolution` has it: `low_res_image`, `upsampled_image`, `image`,
      `ref_image`, in [0, 255]; `size` optional.
    predictions: `image` in [0, 255], `hard_attention` and `soft_attention` [b h w].
    title: of the figure.
    max_images: draws the first so many.
  """
  shown = min(len(batch["image"]), max_images)
  if not shown:
    raise ValueError("there is no image to draw")
  figure, axes = _grid(shown, _aspect(batch["image"]))
  figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
  for name, ax in zip(COLUMNS, axes[0], strict=True):
    ax.set_title(name, fontsize=10)
  for i, row in enumerate(axes):
    _draw_row(row, _example(batch, predictions, i))
  return figure


def position_colors(index: Int[np.ndarray, "h w"], grid: tuple[int, int]) -> UInt8[Any, "h w 3"]:
  """Returns the colour of each place `index` in a grid of cells, `[rows, columns]`.

  Red grows with the column, blue with the row, green where both are far from their corner: near
  places look alike, far ones differ.
  """
  rows, columns = np.divmod(np.asarray(index), grid[1])
  x, y = columns / max(grid[1] - 1, 1), rows / max(grid[0] - 1, 1)
  colors = np.stack([0.15 + 0.8 * x, 0.85 - 0.55 * (x + y) / 2, 0.15 + 0.8 * y], axis=-1)
  return np.round(255 * colors).astype(np.uint8)


def _example(batch: Mapping[str, Any], predictions: Mapping[str, Any], i: int) -> dict[str, Any]:
  """Returns one example's pictures, cropped to what counts."""
  truth = np.asarray(batch["image"][i])
  height, width = batch["size"][i] if "size" in batch else truth.shape[:2]
  cells = slice(0, -(-height // 4)), slice(0, -(-width // 4))
  pixels = slice(0, height), slice(0, width)
  reference = np.asarray(batch["ref_image"][i])
  return {
    "small": np.asarray(batch["low_res_image"][i])[cells],
    "bicubic": np.asarray(batch["upsampled_image"][i])[pixels],
    "ours": np.asarray(predictions["image"][i])[pixels],
    "truth": truth[pixels],
    "reference": reference,
    "index": np.asarray(predictions["hard_attention"][i])[cells],
    "trust": np.asarray(predictions["soft_attention"][i])[cells],
    "grid": (reference.shape[0] // 4, reference.shape[1] // 4),
  }


def _draw_row(axes: list[Axes], example: Mapping[str, Any]) -> None:
  small, bicubic, ours, truth, reference, taken, trust = axes
  _show(small, example["small"], "nearest")
  _show(bicubic, example["bicubic"])
  _show(ours, example["ours"])
  _show(truth, example["truth"])
  bicubic.set_xlabel(f"{psnr_y(example['bicubic'], example['truth']):.2f} dB", fontsize=9)
  ours.set_xlabel(f"{psnr_y(example['ours'], example['truth']):.2f} dB", fontsize=9, weight="bold")
  grid = example["grid"]
  key = position_colors(np.arange(grid[0] * grid[1]).reshape(grid), grid)
  _show(reference, _tinted(example["reference"], key))
  _show(taken, position_colors(example["index"], grid), "nearest")
  trust.imshow(example["trust"], cmap="cividis", interpolation="nearest")
  used = len(np.unique(example["index"])) / example["index"].size
  taken.set_xlabel(f"{used:.0%} different places", fontsize=9)
  trust.set_xlabel(f"{np.min(example['trust']):.3f} to {np.max(example['trust']):.3f}", fontsize=9)


def _tinted(
  image: Num[np.ndarray, "y x 3"], colors: UInt8[np.ndarray, "i j 3"]
) -> Float[np.ndarray, "y x 3"]:
  """Lays colours of cells of 4x4 pixels over a picture, whose own brightness stays."""
  large = np.repeat(np.repeat(colors, 4, axis=0), 4, axis=1).astype(np.float32)
  image = np.asarray(image, np.float32)[: large.shape[0], : large.shape[1]]
  gray = image.mean(axis=-1, keepdims=True)
  return 0.25 * image + 0.75 * large * (0.35 + 0.65 * gray / 255)


def _show(ax: Axes, image: Num[np.ndarray, "h w 3"], interpolation: str = "auto") -> None:
  pixels = np.clip(np.round(np.asarray(image, np.float32)), 0, 255).astype(np.uint8)
  small = max(pixels.shape[:2]) < 64
  ax.imshow(pixels, interpolation="nearest" if small else interpolation)


def _aspect(images: Num[np.ndarray, "b h w 3"]) -> float:
  return float(np.clip(images.shape[1] / images.shape[2], 0.4, 1.6))


def _grid(rows: int, aspect: float) -> tuple[Figure, list[list[Axes]]]:
  """Lays out rows of cells, `aspect` times as high as wide."""
  size = (len(COLUMNS) * CELL, rows * (CELL * aspect + 0.35) + 0.7)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  axes = figure.subplots(rows, len(COLUMNS), squeeze=False)
  for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.xaxis.label.set_color(QUIET)
    for spine in ax.spines.values():
      spine.set_visible(False)
  return figure, [list(row) for row in axes]
