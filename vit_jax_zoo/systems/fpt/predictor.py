"""Prediction of label maps: overlay, label map, class fractions."""

import functools
from typing import Any, ClassVar

import cv2
import jax
import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.systems.fpt.figures import color_labels

OPACITY = 0.55
"""Opacity of the class colors in the overlay."""


class SegmentationPredictor:
  """Most likely class of each pixel; with `explain` also attention maps of the image's centre."""

  reads: ClassVar[frozenset[str]] = frozenset({"explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles the prediction."""
    if options.explain and getattr(trained.model, "neck", None) != "fpt":
      raise ValueError("--explain: a model without transformer has no attention maps")
    self._trained, self._explain = trained, options.explain
    self._task: Any = trained.task
    self._predict = jax.jit(functools.partial(self._task.predict))

  def __call__(self, image: Image) -> Prediction:
    """Segments an image.

    Returns:
      Record: `classes`, largest first, with `label`, `name` if known, `share` (fraction of the
      pixels) and `confidence` (mean probability over them). Images, in the input's size: "" the
      overlay, "labels" the colored label map, "ids" the label map as class ids; with `explain`
      "levels", the attention maps.

    Raises:
      ValueError: the image is too large for `explain`.
    """
    prepared = self._trained.prepare(image)
    example = {"image": np.asarray(prepared["image"])}
    if "image_size" in prepared:
      example["image_size"] = np.asarray(prepared["image_size"])
    batch = {key: value[None] for key, value in example.items()}
    found = jax.device_get(self._predict(self._trained.variables, batch))
    height, width = example.get("image_size", example["image"].shape[:2])
    labels = _resized(found["label_map"][0][:height, :width], image, cv2.INTER_NEAREST_EXACT)
    confidence = _resized(found["confidence"][0][:height, :width], image, cv2.INTER_LINEAR)
    colors = color_labels(labels)
    ids = labels.astype(np.uint8)  # there are at most 255 classes
    pictures: dict[str, Picture] = {"": _overlay(image, colors), "labels": colors, "ids": ids}
    if self._explain:
      pictures["levels"] = self._draw_levels(example["image"][:height, :width])
    return Prediction({"classes": self._classes(labels, confidence)}, pictures)

  def _draw_levels(self, image: np.ndarray) -> Figure:
    found = jax.jit(self._task.explain)(self._trained.variables, {"image": image[None]})
    return self._task.draw_explanation(jax.device_get(found)).images["levels"]

  def _classes(
    self, labels: Int[np.ndarray, "h w"], confidence: np.ndarray
  ) -> list[dict[str, Any]]:
    names = self._task.class_names
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
      {
        "label": int(label),
        **({"name": names[label]} if label < len(names) else {}),
        "share": float(count / labels.size),
        "confidence": float(confidence[labels == label].mean()),
      }
      for label, count in zip(found[order], counts[order], strict=True)
    ]


def _resized(values: np.ndarray, image: Image, method: int) -> np.ndarray:
  """Resizes a prediction to the image's size."""
  kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
  if values.shape == image.shape[:2]:
    return values.astype(kind)
  # OpenCV does not resize 32-bit integers; there are at most 255 classes.
  passed = np.ascontiguousarray(values.astype(np.uint8 if kind is np.int32 else np.float32))
  return cv2.resize(passed, image.shape[1::-1], interpolation=method).astype(kind)


def _overlay(image: Image, colors: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
  return np.rint((1 - OPACITY) * gray + OPACITY * colors).astype(np.uint8)
