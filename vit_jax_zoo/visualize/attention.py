"""Pictures of a Transformer's inside: where it looks, how far, and what its positions have learned.

Figures are made without `pyplot`, so that nothing is kept alive and no window opens. Attention maps
come as `MultiHeadAttention` sows them, with the layers stacked in front: [l b heads n n], the class
token first if there is one. A scanned encoder hands them out like that; of an unrolled one, stack
those of the blocks.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

QUIET = "#555555"
SMALL = 64  # pixels; below, single pixels are shown


def attention_rollout(
  weights: Float[np.ndarray, "l b heads n n"], *, residual: float = 0.5
) -> Float[np.ndarray, "b n n"]:
  """Follows attention through all layers, down to the input tokens.

  Abnar and Zuidema, arXiv:2005.00928, section 3: the maps, averaged over heads and mixed with the
  identity for the residual connection, are multiplied. It is what figure 6 of the ViT paper shows
  (appendix D.8).

  Args:
    weights: attention maps, rows summing to 1.
    residual: share of the identity.

  Returns:
    For each output token (row), how much of it comes from each input token; rows sum to 1.
  """
  mixed = (1 - residual) * weights.mean(axis=2) + residual * np.eye(weights.shape[-1])
  total = mixed[0]
  for layer in mixed[1:]:
    total = layer @ total
  return total.astype(np.float32)


def attention_distances(
  weights: Float[np.ndarray, "l b heads n n"],
  grid: tuple[int, int],
  *,
  patch_size: float = 1.0,
) -> Float[np.ndarray, "l heads"]:
  """Returns how far each head looks: the mean distance between a patch and those it attends to.

  Figure 7, right, of the ViT paper. Attention to and from tokens that are no patch is left out, and
  the rest of each row brought to sum to 1.

  Args:
    weights: attention maps.
    grid: height and width, in patches; tokens before the last height * width are no patches.
    patch_size: side of a patch, in the unit of the answer (pixels).
  """
  patches = _patch_attention(weights, grid)
  patches = patches / np.maximum(patches.sum(axis=-1, keepdims=True), 1e-12)
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2)
  distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
  return (np.einsum("lbhnm,nm->lbhn", patches, distances).mean(axis=(1, 3)) * patch_size).astype(
    np.float32
  )


def draw_attention(
  images: Num[np.ndarray, "b h w c"],
  maps: Float[np.ndarray, "b gh gw"],
  captions: Sequence[str] = (),
  *,
  title: str = "Attention",
  subtitle: str = "",
  max_images: int = 8,
) -> Figure:
  """Draws each image, and below it the image where it is attended to, as in the ViT's figure 6.

  Args:
    images: uint8, or floats in [0, 255]; 1 or 3 channels.
    maps: how much the model looks at each patch; each is scaled to its own maximum.
    captions: below the images.
    title: of the figure.
    subtitle: below it.
    max_images: draws the first so many.
  """
  shown = min(len(images), max_images)
  if not shown:
    raise ValueError("there is no image to draw")
  figure = Figure(figsize=(max(1.45 * shown + 0.6, 4.5), 4.2), dpi=110)
  axes = figure.subplots(2, shown, squeeze=False)
  figure.subplots_adjust(left=0.03, right=0.97, top=0.8, bottom=0.09, wspace=0.08, hspace=0.08)
  _write_title(figure, title, subtitle)
  for i in range(shown):
    image = _to_rgb(images[i])
    light = _enlarge(maps[i] / max(float(maps[i].max()), 1e-12), image.shape[:2])
    for ax, picture in zip(axes[:, i], (image, image * light[..., None]), strict=True):
      _show(ax, np.rint(picture).astype(np.uint8))
    if i < len(captions):
      axes[1, i].set_xlabel(captions[i], fontsize=9, labelpad=4)
  return figure


def draw_lambdas(
  image: Num[np.ndarray, "h w c"],
  lambdas: Mapping[str, Float[np.ndarray, "h2 w2 k v"]],
  *,
  title: str = "Position lambdas",
  max_layers: int = 6,
) -> Figure:
  """Draws, for each lambda layer, how strongly the lambda of each position acts there.

  Lambdas are linear maps [k v]; what is drawn is their Frobenius norm, bright where the context
  changes what a query of that position is answered (LambdaNetworks, section 3).

  Args:
    image: uint8, or floats in [0, 255]; 1 or 3 channels.
    lambdas: of each layer, by its name, in order.
    title: of the figure.
    max_layers: draws the last so many.
  """
  shown = list(lambdas.items())[-max_layers:]
  figure = Figure(figsize=(max(1.75 * (len(shown) + 1) + 0.5, 4.5), 2.75), dpi=110)
  axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
  figure.subplots_adjust(left=0.03, right=0.97, top=0.66, bottom=0.1, wspace=0.1)
  _write_title(figure, title, "norm of each position's lambda, from its least (dark) to its most")
  picture = _to_rgb(image)
  _show(axes[0], np.rint(picture).astype(np.uint8))
  for ax, (name, layer) in zip(axes[1:], shown, strict=True):
    norms = np.sqrt(np.square(np.asarray(layer, np.float32)).sum(axis=(2, 3)))
    spread = max(float(norms.max() - norms.min()), 1e-12)
    light = _enlarge((norms - norms.min()) / spread, picture.shape[:2])
    _show(ax, np.rint(picture * light[..., None]).astype(np.uint8))
    label = name.removesuffix("/lambda_layer").replace("_", " ")
    ax.set_xlabel(f"{label}, {layer.shape[0]} × {layer.shape[1]}", fontsize=8, labelpad=4)
  return figure


def draw_heads(
  image: Num[np.ndarray, "h w c"],
  weights: Float[np.ndarray, "l heads n n"],
  grid: tuple[int, int],
  *,
  query: int = 0,
  title: str = "Attention by layer and head",
  max_layers: int = 12,
) -> Figure:
  """Draws, for each layer (row) and head (column), where one token of an image looks.

  Args:
    image: uint8, or floats in [0, 255]; 1 or 3 channels.
    weights: the image's attention maps.
    grid: height and width, in patches.
    query: the token that looks; 0 is the class token, if there is one.
    title: of the figure.
    max_layers: draws so many of the layers, evenly from first to last.
  """
  depth, heads = weights.shape[:2]
  chosen = np.unique(np.linspace(0, depth - 1, min(depth, max_layers)).round().astype(int))
  size = (1.05 * (heads + 1) + 0.9, 1.05 * len(chosen) + 1.1)
  figure = Figure(figsize=(max(size[0], 4.5), size[1]), dpi=110)
  axes = figure.subplots(len(chosen), heads + 1, squeeze=False)
  top = 1 - 0.8 / size[1]
  figure.subplots_adjust(left=0.12, right=0.97, top=top, bottom=0.3 / size[1], wspace=0.08)
  _write_title(figure, title, f"token {query}; each map scaled to its own maximum")
  maps = weights[:, :, query, -grid[0] * grid[1] :].reshape(depth, heads, *grid)
  picture = _to_rgb(image).astype(np.uint8)
  for row, layer in zip(axes, chosen, strict=True):
    _show(row[0], picture)
    row[0].set_ylabel(f"layer {layer + 1}", fontsize=8.5)
    for head, ax in enumerate(row[1:]):
      ax.imshow(maps[layer, head], cmap="viridis", interpolation="nearest", vmin=0)
      _frame(ax)
      if layer == chosen[0]:
        ax.set_title(f"head {head + 1}", fontsize=8.5, pad=3)
  return figure


def draw_position_similarity(
  table: Float[np.ndarray, "n d"],
  grid: tuple[int, int],
  *,
  title: str = "Similarity of position embeddings",
  max_side: int = 14,
) -> Figure:
  """Draws, for each patch, how similar its position's embedding is to all others.

  Figure 7, middle, of the ViT paper: the tile in row i, column j belongs to the patch there, and
  shows the cosine between its embedding and those of all patches.

  Args:
    table: one embedding a token; those before the last height * width are no patches.
    grid: height and width, in patches.
    title: of the figure.
    max_side: of a larger grid, every second (third ...) row and column gets a tile.
  """
  similarity = position_similarity(table, grid)
  stride = -(-max(grid) // max_side)
  rows, columns = range(0, grid[0], stride), range(0, grid[1], stride)
  tile, left, below = 0.55, 0.5, 0.5
  width = max(left + tile * len(columns) + 1.1, 4.4)
  height = below + tile * len(rows) + 0.75
  figure = Figure(figsize=(width, height), dpi=110)
  axes = figure.subplots(len(rows), len(columns), squeeze=False)
  right, top = left + tile * len(columns), below + tile * len(rows)
  figure.subplots_adjust(
    left=left / width, right=right / width, top=top / height, bottom=below / height,
    wspace=0.06, hspace=0.06,
  )  # fmt: skip
  _write_title(figure, title, f"a tile for each of {grid[0]} × {grid[1]} patches")
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      ax = axes[i, j]
      ax.imshow(similarity[row, column], cmap="RdBu_r", vmin=-1, vmax=1)
      _frame(ax)
      if j == 0:
        ax.set_ylabel(str(row + 1), fontsize=8, rotation=0, ha="right", va="center")
      if i == len(rows) - 1:
        ax.set_xlabel(str(column + 1), fontsize=8)
  beside = figure.add_axes(((right + 0.25) / width, 0.25, 0.12 / width, 0.45))
  bar = figure.colorbar(axes[0, 0].images[0], cax=beside)
  bar.set_label("cosine", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  return figure


def position_similarity(
  table: Float[np.ndarray, "n d"], grid: tuple[int, int]
) -> Float[np.ndarray, "gh gw gh gw"]:
  """Returns the cosines between the position embeddings of all pairs of patches."""
  count = grid[0] * grid[1]
  if len(table) < count:
    raise ValueError(f"the table has {len(table)} positions, but the grid {grid} has {count}")
  patches = np.asarray(table, np.float32)[-count:]
  unit = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
  return (unit @ unit.T).reshape(*grid, *grid)


def draw_attention_distances(
  distances: Float[np.ndarray, "l heads"],
  *,
  title: str = "Attention distance",
  unit: str = "pixels",
) -> Figure:
  """Draws how far each head of each layer looks, as in figure 7, right, of the ViT paper.

  Args:
    distances: as `attention_distances` returns them.
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


def _patch_attention(
  weights: Float[np.ndarray, "l b heads n n"], grid: tuple[int, int]
) -> Float[np.ndarray, "l b heads p p"]:
  count = grid[0] * grid[1]
  if weights.shape[-1] < count:
    raise ValueError(f"the maps have {weights.shape[-1]} tokens, but the grid {grid} has {count}")
  return weights[..., -count:, -count:]


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


def _write_title(figure: Figure, title: str, subtitle: str) -> None:
  width, height = figure.get_size_inches()
  left = 0.3 / width
  figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13, weight="bold")
  figure.text(left, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET)
