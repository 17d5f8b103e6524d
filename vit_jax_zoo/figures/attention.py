"""Figures of attention, position embeddings and first-layer filters; images are in [0, 255]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vit_jax_zoo.errors import shorten
from vit_jax_zoo.figures import canvas
from vit_jax_zoo.figures.canvas import MARGIN, Image, Images, add_axes, show_image, write_title

MAX_LAYERS = 12
COLUMNS = 7  # of the ViT paper's figure 7, which has 28 components

Kernel = Float[np.ndarray, "kh kw c n"]


def principal_filters(
  kernel: Kernel, count: int = 28
) -> tuple[Float[np.ndarray, "m kh kw c"], Float[np.ndarray, " m"]]:
  """Returns filters' principal components (ViT, figure 7) and their fractions of the variance."""
  from sklearn.decomposition import PCA  # slow to import

  points = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T
  pca = PCA(min(count, *points.shape), svd_solver="full").fit(points)
  filters = pca.components_.reshape(-1, *kernel.shape[:3])
  return filters.astype(np.float32), pca.explained_variance_ratio_.astype(np.float32)


def draw_filters(kernel: Kernel, *, principal: bool = False) -> Figure:
  """Draws filters of a layer, or `principal` components, scaled to the largest entry; gray is 0."""
  side = f"{kernel.shape[0]} × {kernel.shape[1]} pixels"
  if principal:
    filters, fractions = principal_filters(kernel)
    title = "Components of the patch embedding"
    subtitle = f"the first {len(filters)}, {side}, {fractions.sum():.0%} of the filters' variance"
  else:
    filters = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)[:63]
    title, subtitle = "Filters of the first layer", f"{len(filters)} of {kernel.shape[-1]}, {side}"
  if filters.shape[-1] != 3:
    filters = filters.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
  largest = np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), 1e-12)
  tiles = 0.5 + 0.5 * filters / largest
  columns = min(COLUMNS if principal or len(tiles) <= 28 else 9, len(tiles))
  rows = -(-len(tiles) // columns)
  blank = np.ones((rows * columns - len(tiles), *tiles.shape[1:]), np.float32)
  tiles = np.concatenate([tiles, blank]).reshape(rows, columns, *tiles.shape[1:])
  figure = Figure(figsize=(max(0.62 * columns + 0.6, 4.6), 0.62 * rows + 0.95), dpi=110)
  draw_mosaic(add_axes(figure, 0.3, 0.2, 0.62 * columns, 0.62 * rows), tiles)
  write_title(figure, title, subtitle)
  return figure


def draw_attention(
  images: Images, maps: Float[np.ndarray, "b i j"], captions: Sequence[str] = (), subtitle: str = ""
) -> Figure:
  """Draws up to 8 images, with attention as a heat map over each (as ViT paper, figure 6)."""
  if not (shown := min(len(images), 8)):
    raise ValueError("images: none; expected at least one")
  height, width = images.shape[1:3]
  is_single = shown == 1  # drawn at its own size, beside its map; several images above theirs
  cell = float(np.clip(width / 110, 2.4, 5.5)) if is_single else 1.6
  sides = (cell, cell * float(np.clip(height / width, 0.4, 1.6)))
  rows, columns, gap, below = (1, 2, 0.1, 0.35) if is_single else (2, shown, 0.1, 0.35)
  across, down = columns * (cell + gap), rows * (sides[1] + gap)
  figure = Figure(figsize=(max(across + 2 * MARGIN + 0.75, 5.4), down + 0.75 + below), dpi=110)
  write_title(figure, "Attention", subtitle)
  for i in range(shown):
    left, top = MARGIN + i * (cell + gap), below + down - sides[1] - gap
    image_ax = add_axes(figure, left, top, *sides)
    map_ax = add_axes(figure, *((left + cell + gap, top) if is_single else (left, below)), *sides)
    show_image(image_ax, images[i])
    show_image(map_ax, canvas.heat_map(images[i], maps[i] / max(float(maps[i].max()), 1e-12)))
    if i < len(captions):
      lowest, length = (image_ax, 40) if is_single else (map_ax, 19)
      lowest.set_xlabel(shorten(captions[i], length), fontsize=9, labelpad=4)
  bar = add_axes(figure, MARGIN + across, below, 0.12, sides[1])
  canvas.add_color_bar(figure, "attention", ("0", "largest"), cax=bar)
  return figure


def draw_heads(
  image: Image,
  maps: Float[np.ndarray, "l heads gh gw"],
  subtitle: str = "each map scaled to its own maximum",
) -> Figure:
  """Draws an image, and the attention map of each layer (row, evenly spaced) and head (column)."""
  depth, heads = maps.shape[:2]
  chosen = np.unique(np.linspace(0, depth - 1, min(depth, MAX_LAYERS)).round().astype(int))
  cell = 0.75 if heads > 6 else 0.95
  sides = (cell * heads, cell * len(chosen))
  height = max(sides[1], 1.2) + 1.15
  top = height - 0.95
  figure = Figure(figsize=(max(1.4 + 0.65 + sides[0] + 0.25, 4.8), height), dpi=110)
  write_title(figure, "Attention by layer and head", subtitle)
  show_image(add_axes(figure, 0.3, top - 1.1, 1.1, 1.1), image)
  ax = add_axes(figure, 2.05, top - sides[1], *sides)
  scaled = maps[chosen] / np.maximum(maps[chosen].max(axis=(2, 3), keepdims=True), 1e-12)
  draw_mosaic(ax, scaled, cmap="viridis", vmin=0, vmax=1)
  ax.set_yticklabels([f"layer {layer + 1}" for layer in chosen], fontsize=8.5)
  ax.xaxis.tick_top()
  ax.set_xticklabels([f"head {i + 1}" for i in range(heads)], fontsize=8.5 if heads < 7 else 7)
  ax.tick_params(length=0, pad=3)
  return figure


def draw_position_similarity(table: Float[np.ndarray, "n d"], grid: tuple[int, int]) -> Figure:
  """Draws cosine similarities of position embeddings (ViT, figure 7), at most 14 x 14 patches."""
  unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
  similarity = (unit @ unit.T).reshape(*grid, *grid)
  stride = -(-max(grid) // 14)
  rows, columns = (range(0, side, stride) for side in grid)
  tile, left, below = (0.55 if len(columns) > 6 else 0.8), 0.55, 0.5
  width, height = tile * len(columns), tile * len(rows)
  figure = Figure(figsize=(max(left + width + 1.1, 4.4), below + height + 0.8), dpi=110)
  ax = add_axes(figure, left, below, width, height)
  subtitle = f"a tile for each of {grid[0]} × {grid[1]} patches"
  write_title(figure, "Similarity of position embeddings", subtitle)
  shown = draw_mosaic(ax, similarity[::stride, ::stride], cmap="RdBu_r", vmin=-1, vmax=1)
  ax.set_yticklabels([str(row + 1) for row in rows], fontsize=8)
  ax.set_xticklabels([str(column + 1) for column in columns], fontsize=8)
  bar = figure.colorbar(shown, cax=add_axes(figure, left + width + 0.25, below, 0.12, height))
  bar.set_label("cosine", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  return figure


def draw_mosaic(ax: Axes, tiles: Num[np.ndarray, "r c h w *channels"], **style: Any) -> AxesImage:
  """Draws tiles as one image (a hundred axes would take seconds), with ticks at their middles."""
  rows, columns, height, width = tiles.shape[:4]
  gap = max(1, round(0.08 * max(height, width))) if max(height, width) > 8 else 1
  grow = max(1, 24 // max(height, width))  # pixels of a tile are larger than the gap
  tiles = np.asarray(tiles, np.float32).repeat(grow, axis=2).repeat(grow, axis=3)
  edges = [(0, 0), (0, 0), (0, gap), (0, gap), *[(0, 0)] * (tiles.ndim - 4)]
  padded = np.pad(tiles, edges, constant_values=1.0 if tiles.ndim == 5 else np.nan).swapaxes(1, 2)
  step = (padded.shape[1], padded.shape[3])
  whole = padded.reshape(rows * step[0], columns * step[1], *tiles.shape[4:])[:-gap, :-gap]
  image = ax.imshow(whole, interpolation="nearest", **style)
  ax.set_yticks([(i + 0.5) * step[0] - gap / 2 - 0.5 for i in range(rows)], [""] * rows)
  ax.set_xticks([(j + 0.5) * step[1] - gap / 2 - 0.5 for j in range(columns)], [""] * columns)
  ax.tick_params(length=0)
  ax.spines[:].set_visible(False)
  return image


def draw_attention_distances(distances: Float[np.ndarray, "l heads"]) -> Figure:
  """Draws each head's mean attention distance in pixels by layer (ViT paper, figure 7, right)."""
  figure, ax = canvas.chart((5.2, 3.6), "Attention distance", "layer", "mean distance, pixels")
  layers = np.repeat(np.arange(1, len(distances) + 1), distances.shape[1])
  ax.scatter(layers, distances.ravel(), s=26, color="#0072B2", alpha=0.8, linewidths=0)
  ax.set(xlim=(0.5, len(distances) + 0.5), ylim=(0, 1.1 * max(float(distances.max()), 1e-6)))
  ax.locator_params(axis="x", integer=True)
  ax.tick_params(labelsize=8)
  return figure
