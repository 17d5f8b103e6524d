"""Figures of attention, position embeddings, lambdas and first-layer filters, without `pyplot`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from vit_jax_zoo.errors import shorten
from vit_jax_zoo.figures.canvas import MARGIN, write_title

COLUMNS = 7  # of the ViT paper's figure 7, which has 28 components


def principal_filters(
  kernel: Float[np.ndarray, "kh kw c n"], count: int = 28
) -> tuple[Float[np.ndarray, "m kh kw c"], Float[np.ndarray, " m"]]:
  """Returns the principal components of filters, figure 7, left, of the ViT paper.

  The n filters are points in the space of patches. A component's largest entry is positive.

  Args:
    kernel: of the first layer.
    count: maximum number of components.

  Returns:
    The components, unit vectors in the order of their variance; and their fractions of it.
  """
  points = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T
  _, singular, directions = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
  variance = singular**2
  kept = directions[:count]
  largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1)
  kept = kept * np.where(largest < 0, -1.0, 1.0)
  shares = variance[:count] / max(float(variance.sum()), 1e-300)
  return kept.reshape(-1, *kernel.shape[:3]).astype(np.float32), shares.astype(np.float32)


def draw_filters(
  kernel: Float[np.ndarray, "kh kw c n"], *, principal: bool = False, max_filters: int = 63
) -> Figure:
  """Draws the filters of a first layer: gray is zero, each tile is scaled to its largest entry.

  Args:
    kernel: filters with 3 channels are drawn in colour, others as the mean of their channels.
    principal: draws the first 28 principal components, as in the paper, in place of the filters.
    max_filters: maximum number of filters.
  """
  side = f"{kernel.shape[0]} × {kernel.shape[1]}"
  if principal:
    filters, shares = principal_filters(kernel)
    title = "Components of the patch embedding"
    said = f"the first {len(filters)}, {side} pixels, {shares.sum():.0%} of the filters' variance"
  else:
    filters = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)[:max_filters]
    title, said = (
      "Filters of the first layer",
      f"{len(filters)} of {kernel.shape[-1]}, {side} pixels",
    )
  if filters.shape[-1] != 3:
    filters = filters.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
  largest = np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), 1e-12)
  tiles = 0.5 + 0.5 * filters / largest
  columns = min(COLUMNS if principal or len(tiles) <= 28 else 9, len(tiles))
  rows = -(-len(tiles) // columns)
  blank = np.ones((rows * columns - len(tiles), *tiles.shape[1:]), np.float32)
  tiles = np.concatenate([tiles, blank]).reshape(rows, columns, *tiles.shape[1:])
  width, height = max(0.62 * columns + 0.6, 4.6), 0.62 * rows + 0.95
  figure = Figure(figsize=(width, height), dpi=110)
  ax = figure.add_axes((0.3 / width, 0.2 / height, 0.62 * columns / width, 0.62 * rows / height))
  draw_mosaic(ax, tiles)
  write_title(figure, title, said)
  return figure


SMALL = 64  # pixels; smaller images are drawn without interpolation


def draw_attention(
  images: Num[np.ndarray, "b h w c"],
  maps: Float[np.ndarray, "b gh gw"],
  captions: Sequence[str] = (),
  *,
  title: str = "Attention",
  subtitle: str = "",
  max_images: int = 8,
) -> Figure:
  """Draws each image, and below it the image weighted by its attention (figure 6 of the ViT paper).

  Args:
    images: uint8, or floats in [0, 255]; 1 or 3 channels.
    maps: attention to each patch; each map is scaled to its maximum.
    captions: below the images, shortened to their width.
    title: of the figure.
    subtitle: below it.
    max_images: maximum number of images.
  """
  shown = min(len(images), max_images)
  if not shown:
    raise ValueError("images: none; expected at least one")
  across = 1.45 * shown  # inches
  width = max(across + 2 * MARGIN, 4.5)  # room for the subtitle above a single image
  figure = Figure(figsize=(width, 4.2), dpi=110)
  axes = figure.subplots(2, shown, squeeze=False)
  figure.subplots_adjust(
    left=MARGIN / width, right=(MARGIN + across) / width, top=0.8, bottom=0.09, wspace=0.08,
    hspace=0.08,
  )  # fmt: skip
  write_title(figure, title, subtitle)
  for i in range(shown):
    image = _to_rgb(images[i])
    light = _enlarge(maps[i] / max(float(maps[i].max()), 1e-12), image.shape[:2])
    for ax, picture in zip(axes[:, i], (image, image * light[..., None]), strict=True):
      _show(ax, np.rint(picture).astype(np.uint8))
    if i < len(captions):
      words = shorten(captions[i], 19 if shown > 1 else 60)
      axes[1, i].set_xlabel(words, fontsize=9, labelpad=4)
  return figure


def draw_lambdas(
  image: Num[np.ndarray, "h w c"],
  lambdas: Mapping[str, Float[np.ndarray, "h2 w2"]],
  *,
  title: str = "Position lambdas",
  max_layers: int = 6,
) -> Figure:
  """Draws the Frobenius norm of each position's lambda, a linear map [k v], for each layer.

  Args:
    image: uint8, or floats in [0, 255]; 1 or 3 channels.
    lambdas: norms by layer name ("c4_block10"), drawn in the order of the numbers.
    title: of the figure.
    max_layers: maximum number of layers; the last are drawn.
  """
  shown = sorted(lambdas.items(), key=lambda item: _numbers(item[0]))[-max_layers:]
  figure = Figure(figsize=(max(1.75 * (len(shown) + 1) + 0.5, 4.5), 2.75), dpi=110)
  axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
  figure.subplots_adjust(left=0.03, right=0.97, top=0.66, bottom=0.1, wspace=0.1)
  write_title(figure, title, "norm of each position's lambda, scaled to each layer's range")
  picture = _to_rgb(image)
  _show(axes[0], np.rint(picture).astype(np.uint8))
  for ax, (name, norms) in zip(axes[1:], shown, strict=True):
    ax.imshow(norms, cmap="viridis", interpolation="nearest")
    _frame(ax)
    label = f"{name.replace('_', ' ')}, {norms.shape[0]} × {norms.shape[1]}"
    ax.set_xlabel(label, fontsize=8, labelpad=4)
  return figure


def _numbers(name: str) -> list[int]:
  """Returns the numbers in a layer's name, for sorting."""
  return [int(digits) for digits in re.findall(r"\d+", name)]


def draw_heads(
  image: Num[np.ndarray, "h w c"],
  maps: Float[np.ndarray, "l heads gh gw"],
  *,
  title: str = "Attention by layer and head",
  subtitle: str = "each map scaled to its own maximum",
  max_layers: int = 12,
) -> Figure:
  """Draws an image, and beside it the attention map of each layer (row) and head (column).

  Args:
    image: uint8, or floats in [0, 255]; 1 or 3 channels.
    maps: of one token, over the patches.
    title: of the figure.
    subtitle: below it.
    max_layers: maximum number of layers, evenly spaced.
  """
  depth, heads = maps.shape[:2]
  chosen = np.unique(np.linspace(0, depth - 1, min(depth, max_layers)).round().astype(int))
  cell = 0.75 if heads > 6 else 0.95
  sides = (cell * heads, cell * len(chosen))
  width, height = max(1.4 + 0.65 + sides[0] + 0.25, 4.8), max(sides[1], 1.2) + 1.15
  figure = Figure(figsize=(width, height), dpi=110)
  write_title(figure, title, subtitle)
  top = height - 0.95
  left = figure.add_axes((0.3 / width, (top - 1.1) / height, 1.1 / width, 1.1 / height))
  _show(left, _to_rgb(image).astype(np.uint8))
  place = (2.05 / width, (top - sides[1]) / height, sides[0] / width, sides[1] / height)
  ax = figure.add_axes(place)
  scaled = maps[chosen] / np.maximum(maps[chosen].max(axis=(2, 3), keepdims=True), 1e-12)
  draw_mosaic(ax, scaled, cmap="viridis", vmin=0, vmax=1)
  ax.set_yticklabels([f"layer {layer + 1}" for layer in chosen], fontsize=8.5)
  ax.xaxis.tick_top()
  ax.set_xticklabels(
    [f"head {head + 1}" for head in range(heads)], fontsize=8.5 if heads < 7 else 7
  )
  ax.tick_params(length=0, pad=3)
  return figure


def draw_position_similarity(
  table: Float[np.ndarray, "n d"],
  grid: tuple[int, int],
  *,
  title: str = "Similarity of position embeddings",
  max_side: int = 14,
) -> Figure:
  """Draws the cosine similarity of each patch's position embedding to all others.

  Figure 7, middle, of the ViT paper: the tile in row i, column j is of the patch there.

  Args:
    table: one embedding per token; the last height * width are those of patches.
    grid: height and width, in patches.
    title: of the figure.
    max_side: maximum number of tiles per side; of a larger grid, every n-th patch has one.
  """
  similarity = position_similarity(table, grid)
  stride = -(-max(grid) // max_side)
  rows, columns = range(0, grid[0], stride), range(0, grid[1], stride)
  tile, left, below = (0.55 if len(columns) > 6 else 0.8), 0.55, 0.5
  width = max(left + tile * len(columns) + 1.1, 4.4)
  height = below + tile * len(rows) + 0.8
  figure = Figure(figsize=(width, height), dpi=110)
  sides = (tile * len(columns) / width, tile * len(rows) / height)
  ax = figure.add_axes((left / width, below / height, *sides))
  write_title(figure, title, f"a tile for each of {grid[0]} × {grid[1]} patches")
  shown = draw_mosaic(ax, similarity[::stride, ::stride], cmap="RdBu_r", vmin=-1, vmax=1)
  ax.set_yticklabels([str(row + 1) for row in rows], fontsize=8)
  ax.set_xticklabels([str(column + 1) for column in columns], fontsize=8)
  ax.tick_params(length=0)
  right = left + tile * len(columns)
  beside = figure.add_axes(((right + 0.25) / width, below / height, 0.12 / width, sides[1]))
  bar = figure.colorbar(shown, cax=beside)
  bar.set_label("cosine", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  return figure


def draw_mosaic(
  ax: Axes, tiles: Num[np.ndarray, "r c h w *channels"], **shown_with: Any
) -> AxesImage:
  """Draws tiles in rows and columns as one image: a hundred axes would take seconds.

  Ticks are at the middle of each row and column.

  Args:
    ax: axes to draw into.
    tiles: all of one size.
    **shown_with: arguments of `imshow`.
  """
  rows, columns, height, width = tiles.shape[:4]
  gap = max(1, round(0.08 * max(height, width))) if max(height, width) > 8 else 1
  grow = max(1, 24 // max(height, width))  # pixels of a tile are larger than the gap
  blank = 1.0 if tiles.ndim == 5 else np.nan
  tiles = np.asarray(tiles, np.float32).repeat(grow, axis=2).repeat(grow, axis=3)
  edges = [(0, 0), (0, 0), (0, gap), (0, gap), *[(0, 0)] * (tiles.ndim - 4)]
  padded = np.pad(tiles, edges, constant_values=blank).swapaxes(1, 2)
  step = (padded.shape[1], padded.shape[3])
  whole = padded.reshape(rows * step[0], columns * step[1], *tiles.shape[4:])[:-gap, :-gap]
  image = ax.imshow(whole, interpolation="nearest", **shown_with)
  ax.set_yticks([(i + 0.5) * step[0] - gap / 2 - 0.5 for i in range(rows)])
  ax.set_xticks([(j + 0.5) * step[1] - gap / 2 - 0.5 for j in range(columns)])
  ax.set_yticklabels([])
  ax.set_xticklabels([])
  ax.tick_params(length=0)
  for spine in ax.spines.values():
    spine.set_visible(False)
  return image


def position_similarity(
  table: Float[np.ndarray, "n d"], grid: tuple[int, int]
) -> Float[np.ndarray, "gh gw gh gw"]:
  """Returns the cosine similarity of the position embeddings of all pairs of patches."""
  count = grid[0] * grid[1]
  if len(table) < count:
    raise ValueError(f"position table: {len(table)} rows; expected {count} or more for {grid}")
  patches = np.asarray(table, np.float32)[-count:]
  unit = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
  return (unit @ unit.T).reshape(*grid, *grid)


def draw_attention_distances(
  distances: Float[np.ndarray, "l heads"],
  *,
  title: str = "Attention distance",
  unit: str = "pixels",
) -> Figure:
  """Draws the mean attention distance of each head by layer (figure 7, right, of the ViT paper).

  Args:
    distances: mean distance of each layer and head.
    title: of the figure.
    unit: of the distances.
  """
  figure = Figure(figsize=(5.2, 3.6), dpi=110, layout="constrained")
  ax = figure.subplots()
  layers = np.repeat(np.arange(1, len(distances) + 1), distances.shape[1])
  ax.scatter(layers, distances.ravel(), s=26, color="#0072B2", alpha=0.8, linewidths=0)
  ax.set_xlabel("layer", fontsize=10)
  ax.set_ylabel(f"mean distance, {unit}", fontsize=10)
  ax.set_xlim(0.5, len(distances) + 0.5)
  ax.set_ylim(0, 1.1 * max(float(distances.max()), 1e-6))
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=8)
  ax.set_title(title, loc="left", weight="bold", pad=10)
  return figure


def _enlarge(array: Float[np.ndarray, "gh gw"], size: tuple[int, int]) -> np.ndarray:
  small = max(size) < SMALL
  method = cv2.INTER_NEAREST if small else cv2.INTER_LINEAR
  return cv2.resize(np.asarray(array, np.float32), (size[1], size[0]), interpolation=method)


def _to_rgb(image: Num[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w 3"]:
  pixels = np.clip(np.asarray(image, np.float32), 0, 255)
  return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _show(ax: Axes, image: Num[np.ndarray, "h w 3"]) -> None:
  ax.imshow(image, interpolation="nearest" if max(image.shape[:2]) < SMALL else "auto")
  _frame(ax)


def _frame(ax: Axes) -> None:
  ax.set(xticks=[], yticks=[])
  for spine in ax.spines.values():
    spine.set_visible(False)
