"""Figures of FPT: label maps of semantic segmentation, attention maps of pyramid levels."""

import colorsys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures.canvas import add_color_bar, heat_map
from vit_jax_zoo.figures.detection import COLORS, grid, image_of, real_rows, show
from vit_jax_zoo.ops.images import pad_images
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import image_size

IGNORE = 255  # label of ignored pixels
MAX_ROWS = 4  # maximum number of images with label maps
MAX_NAMES = 24  # maximum number of classes in the legend, those with the most pixels first
MAX_IMAGES = 3  # maximum number of images with attention maps
MAX_POSITIONS = 64**2  # of the finest level, whose full attention map is computed

Sides: TypeAlias = tuple[int, int]


def draw_label_maps(
  batch: Mapping[str, Any],
  class_names: Sequence[str] = (),
  predicted: Num[np.ndarray, "b h w"] | None = None,
) -> Figure:
  """Draws one row for each of the first images: image, truth and, if given, prediction and errors.

  Batches are those of `SemanticSegmentation`. Labels without class name are shown as numbers.
  """
  rows = real_rows(batch)[:MAX_ROWS]
  heads = ("image", "truth") if predicted is None else ("image", "truth", "predicted", "errors")
  title = "Training batch" if predicted is None else "Truth and predictions"
  figure, axes = grid(len(rows), len(heads), title, batch["image"])
  for ax, head in zip(axes[0], heads, strict=True):
    ax.set_title(head, fontsize=9)
  labels = [np.zeros(0, np.int64)]
  for line, row in zip(axes, rows, strict=False):
    image = image_of(batch, row)
    part = (row, slice(image.shape[0]), slice(image.shape[1]))
    truth = np.asarray(batch["label_map"])[part].astype(np.int64)
    labelled = truth != IGNORE
    show(line[0], image)
    show(line[1], color_labels(truth))
    labels.append(truth[labelled])
    if predicted is not None:
      prediction = np.asarray(predicted)[part].astype(np.int64)
      wrong = (truth != prediction) & labelled
      gray = (0.6 * image.mean(axis=-1, keepdims=True) + 90).clip(0, 255)
      show(line[2], color_labels(prediction))
      show(line[3], np.where(wrong[..., None], (220, 30, 30), gray).astype(np.uint8))
      correct = 1 - wrong.sum() / max(int(labelled.sum()), 1)
      line[3].set_title(f"errors: {correct:.1%} correct", fontsize=9)
      labels.append(prediction.ravel())
  _legend(figure, np.concatenate(labels), class_names)
  return figure


def color_labels(labels: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """Returns an image with the color of each label; ignored pixels have gray stripes."""
  y, x = np.indices(labels.shape)
  image = np.where(((x + y) // 3 % 2 == 0)[..., None], np.uint8(215), np.uint8(190))
  image = np.repeat(image, 3, axis=2)
  for label in np.unique(labels[labels != IGNORE]):
    image[labels == label] = label_color(int(label))
  return image


def label_color(label: int) -> tuple[int, ...]:
  """Returns a label's RGB color: a color-blind safe palette first, then spread hues."""
  if label < len(COLORS):
    return tuple(bytes.fromhex(COLORS[label][1:]))
  hue = (label * 0.61803398875) % 1.0  # golden ratio: new hues are between old ones
  # Darker and lighter than the palette, so that neither is confused with it.
  lightness, saturation = (0.26, 0.82)[label % 2], (0.9, 0.6)[label // 2 % 2]
  return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, saturation))


def _legend(figure: Figure, labels: Int[np.ndarray, " n"], class_names: Sequence[str]) -> None:
  present, counts = np.unique(labels, return_counts=True)
  shown = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_NAMES]]).tolist()
  colors = {label: "#{:02x}{:02x}{:02x}".format(*label_color(label)) for label in shown}
  patches = [Patch(color=colors[label], label=name_of(label, class_names)) for label in shown]
  if patches:
    layout: dict[str, Any] = {"loc": "outside lower left", "ncols": 6, "fontsize": 8}
    figure.legend(handles=patches, frameon=False, handlelength=1.2, **layout)


def explain_attention(
  run: Callable[[base.Batch], Mapping[str, Any]], batch: base.Batch, size_multiple: int = 1
) -> dict[str, Any]:
  """Returns the attention maps of one query position, for the first images of a batch.

  `run` returns the transformer's intermediates of a batch; its model pads images to
  `size_multiple`. The position is the batch's `query_position` float [b 2], relative to the images'
  sides, or `target_centers`. Returns `image`; `positions` [b 2]; `sizes` int32 [l 2] and `levels`,
  see `attention_rows`.
  """
  first = {key: jnp.asarray(value)[:MAX_IMAGES] for key, value in batch.items()}
  batch = pad_batch(first, size_multiple)
  positions = jnp.asarray(batch.get("query_position", target_centers(batch)), jnp.float32)
  sown = run(batch)
  levels, sizes = attention_rows(sown, positions), jnp.asarray(_level_sizes(sown), jnp.int32)
  return {"image": batch["image"], "positions": positions, "sizes": sizes, "levels": levels}


def attention_rows(sown: Mapping[str, Any], positions: Float[Array, "b 2"]) -> dict[str, Array]:
  """Returns the attention weights of the query at a relative position, as maps [b _ _] of keys.

  "0", "1", ...: the self-transformer of each level; "0 1", ...: the grounding transformer from the
  finest level to level 1, unless it has a window or no softmax.
  """
  sizes = _level_sizes(sown)
  height, width = max(sizes)
  if height * width > MAX_POSITIONS:
    raise ValueError(f"attention maps of {height}x{width}: too large; use smaller images")
  found = {}
  for level, size in enumerate(sizes):
    found[str(level)] = _rows(sown[f"self_{level}"]["weights"][0], size, size, positions)
  for level in range(1, len(sizes)):
    weights = sown.get(f"ground_0_{level}", {}).get("weights")
    if weights is not None and weights[0].ndim == 3:
      found[f"0 {level}"] = _rows(weights[0], sizes[0], sizes[level], positions)
  return found


def _level_sizes(sown: Mapping[str, Any]) -> list[Sides]:
  sizes = []
  while (name := f"self_{len(sizes)}_output") in sown:
    sizes.append((sown[name][0].shape[1], sown[name][0].shape[2]))
  return sizes


def _rows(
  weights: Float[Array, "b n m"], queries: Sides, keys: Sides, positions: Float[Array, "b 2"]
) -> Float[Array, "b _ _"]:
  size = jnp.asarray(queries, jnp.int32)[None]
  at = jnp.minimum((positions * size.astype(jnp.float32)).astype(jnp.int32), size - 1)
  index = at[:, 0] * queries[1] + at[:, 1]
  rows = jnp.take_along_axis(weights, index[:, None, None], axis=1)[:, 0]
  if rows.shape[-1] != keys[0] * keys[1]:  # keys pooled with stride 2
    keys = ((keys[0] + 1) // 2, (keys[1] + 1) // 2)
  return rows.reshape(len(rows), *keys).astype(jnp.float32)


def pad_batch(batch: base.Batch, multiple: int) -> base.Batch:
  """Pads images to multiples of a number, as the model does: its maps then cover the image."""
  images = jnp.asarray(batch["image"])
  larger = pad_images(images, multiple)
  padded = {**batch, "image": larger, "image_size": image_size(batch)}
  if "query_position" in batch:
    before, after = (jnp.asarray([x.shape[1:3]], jnp.float32) for x in (images, larger))
    padded["query_position"] = jnp.asarray(batch["query_position"]) * (before / after)
  return padded


def target_centers(batch: base.Batch) -> Float[Array, "b 2"]:
  """Returns the centre of each image's first target, else of the image; relative, with padding."""
  sides = jnp.asarray([batch["image"].shape[1:3]], jnp.float32)
  relative = image_size(batch).astype(jnp.float32) / sides
  if "boxes_cxcywh" not in batch or not batch["boxes_cxcywh"].shape[1]:
    return 0.5 * relative
  first = jnp.asarray(batch["boxes_cxcywh"])[:, 0, 1::-1]
  return jnp.where(jnp.asarray(batch["is_target"])[:, :1], first, 0.5) * relative


def draw_attention(explanation: Mapping[str, Any], level_names: Sequence[str]) -> Figure:
  """Draws the result of `explain_attention`, numpy arrays: images with the query, and heat maps."""
  sizes = zip(level_names, explanation["sizes"], strict=True)
  levels = [f"{name}: {height}x{width}" for name, (height, width) in sizes]
  keys = sorted(explanation["levels"], key=lambda key: (len(key.split()), key))
  titles = [" at ".join(levels[int(level)] for level in key.split()) for key in keys]
  images = explanation["image"]
  figure, axes = grid(len(images), 1 + len(keys), "Attention at the ring", images)
  for ax, title in zip(axes[0], ("query: ring", *titles), strict=True):
    ax.set_title(title, fontsize=9)
  for row, image in enumerate(images):
    axes[row, 0].imshow(np.clip(image, 0, 255).astype(np.uint8), interpolation="nearest")
    y, x = explanation["positions"][row] * images.shape[1:3] - 0.5
    axes[row, 0].plot(x, y, "o", mfc="none", mec="k", mew=3, ms=10)
    axes[row, 0].plot(x, y, "o", mfc="none", mec="w", ms=10)
    for ax, key in zip(axes[row, 1:], keys, strict=True):
      weights = explanation["levels"][key][row]
      show(ax, heat_map(image, weights / max(float(weights.max()), 1e-12)))
  add_color_bar(figure, "attention", ("0", "largest"), ax=axes, shrink=0.7, aspect=30)
  return figure
