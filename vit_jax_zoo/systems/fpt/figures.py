"""Pictures of semantic segmentation: label maps beside their images, found beside true, a legend.

Colours are spread over hue and lightness so that neighbours in the list of classes differ in both;
the legend names those that can be seen. Pixels that do not count are hatched grey.
"""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vit_jax_zoo.figures.canvas import QUIET
from vit_jax_zoo.figures.detection import COLORS

MOST_NAMES = 24
"""So many classes the legend names at most, those with the most pixels first."""

_CELL = 2.6  # inches


def draw_label_maps(
  batch: Mapping[str, Any],
  class_names: Sequence[str] = (),
  found: Num[np.ndarray, "b h w"] | None = None,
  *,
  ignore_label: int = 255,
  title: str = "",
  max_images: int = 4,
) -> Figure:
  """Draws a row for each image: the image, its true classes and, if given, those found and wrong.

  Args:
    batch: `image` [b h w 3] in [0, 255], `label_map` [b h w]; `image_size` [b 2] and `mask` [b],
      both optional.
    class_names: by label; labels by default.
    found: the predicted label maps.
    ignore_label: of pixels that do not count.
    title: of the figure.
    max_images: draws the first so many.
  """
  real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
  rows = np.flatnonzero(real).tolist()[:max_images]
  heads = ("image", "truth") if found is None else ("image", "truth", "found", "wrong")
  figure, axes = _grid(max(len(rows), 1), heads, _aspect(batch["image"]))
  figure.suptitle(title or _title(found), x=0.01, ha="left", fontsize=12, weight="bold")
  seen: list[np.ndarray] = []
  for line, row in zip(axes, rows, strict=False):
    size = batch["image_size"][row] if "image_size" in batch else batch["image"].shape[1:3]
    part = (row, slice(int(size[0])), slice(int(size[1])))
    image = np.clip(np.asarray(batch["image"])[part], 0, 255).astype(np.uint8)
    truth = np.asarray(batch["label_map"])[part].astype(np.int64)
    _show(line[0], image)
    _show(line[1], color_labels(truth, ignore_label))
    seen.append(truth[truth != ignore_label])
    if found is not None:
      guess = np.asarray(found)[part].astype(np.int64)
      wrong = (truth != guess) & (truth != ignore_label)
      _show(line[2], color_labels(guess, ignore_label))
      _show(line[3], _marked(image, wrong))
      counted = max(int((truth != ignore_label).sum()), 1)
      line[3].set_xlabel(f"{1 - wrong.sum() / counted:.1%} right", fontsize=9, color=QUIET)
      seen.append(guess.ravel())
  _legend(figure, np.concatenate(seen) if seen else np.zeros(0, np.int64), class_names)
  return figure


def color_labels(
  labels: Int[np.ndarray, "h w"], ignore_label: int = 255
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the colour of each label; stripes of grey where a pixel does not count."""
  y, x = np.indices(labels.shape)
  picture = np.where(((x + y) // 3 % 2 == 0)[..., None], np.uint8(215), np.uint8(190))
  picture = np.repeat(picture, 3, axis=2)
  for label in np.unique(labels[labels != ignore_label]):
    picture[labels == label] = label_color(int(label))
  return picture


def label_color(label: int) -> tuple[int, int, int]:
  """Returns a label's colour, RGB: first those that everybody can tell apart, then many more."""
  if label < len(COLORS):
    red, green, blue = (int(COLORS[label][i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
  hue = (label * 0.61803398875) % 1.0  # the golden ratio: new hues fall between old ones
  # Darker and lighter than those first ones, so that none is taken for one of them.
  lightness, saturation = (0.26, 0.82)[label % 2], (0.9, 0.6)[label // 2 % 2]
  red, green, blue = (round(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, saturation))
  return red, green, blue


def _marked(
  image: UInt8[np.ndarray, "h w 3"], wrong: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image in grey, with the wrong pixels in red."""
  gray = 0.6 * image.mean(axis=-1, keepdims=True) + 90
  return np.where(wrong[..., None], (220, 30, 30), gray).clip(0, 255).astype(np.uint8)


def _legend(figure: Figure, seen: Int[np.ndarray, " n"], class_names: Sequence[str]) -> None:
  labels, counts = np.unique(seen, return_counts=True)
  shown = np.sort(labels[np.argsort(-counts, kind="stable")[:MOST_NAMES]]).tolist()
  patches = [
    Patch(
      color="#{:02x}{:02x}{:02x}".format(*label_color(label)),
      label=class_names[label] if 0 <= label < len(class_names) else str(label),
    )
    for label in shown
  ]
  if patches:
    figure.legend(
      handles=patches,
      loc="outside lower left",
      ncols=6,
      fontsize=8,
      frameon=False,
      handlelength=1.2,
    )


def _title(found: np.ndarray | None) -> str:
  return "Training batch" if found is None else "Truth and predictions"


def _aspect(images: Any) -> float:
  return float(np.clip(images.shape[1] / images.shape[2], 0.4, 1.6))


def _show(ax: Axes, image: UInt8[np.ndarray, "h w 3"]) -> None:
  ax.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 100 else "antialiased")


def _grid(rows: int, heads: Sequence[str], aspect: float) -> tuple[Figure, list[list[Axes]]]:
  size = (_CELL * len(heads), rows * (_CELL * aspect + 0.3) + 1.1)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  axes = figure.subplots(rows, len(heads), squeeze=False)
  for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
      spine.set_visible(False)
  for name, ax in zip(heads, axes[0], strict=True):
    ax.set_title(name, fontsize=10, loc="left")
  return figure, [list(line) for line in axes]
