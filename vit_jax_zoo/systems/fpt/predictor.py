"""Naming what every pixel of a picture shows: a label map, its colours over the picture, shares."""

import functools
from typing import Any, ClassVar

import cv2
import jax
import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.systems.fpt.figures import color_labels

STRENGTH = 0.55
"""How much of the overlay is the classes' colour."""


class SegmentationPredictor:
  """The likeliest class of each pixel, of the picture's own size.

  With `explain` also where the levels of the pyramid look from the picture's middle.
  """

  reads: ClassVar[frozenset[str]] = frozenset({"explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Takes the model."""
    if options.explain and getattr(trained.model, "neck", None) != "fpt":
      raise ValueError("--explain draws where a pyramid's levels look, and this model has no FPT")
    self._trained, self._explain = trained, options.explain
    self._task: Any = trained.task
    self._predict = jax.jit(functools.partial(self._task.predict))

  def __call__(self, image: Image) -> Prediction:
    """Segments a picture.

    Returns:
      In the record `classes`, the largest first: `label`, `name` where it is known, `share` of the
      pixels, and `confidence`, the mean probability over them. Pictures: "" is the overlay,
      "labels" the label map in the classes' colours, "ids" the label map itself, as data sets have
      theirs, "levels" what `explain` asks for.

    Raises:
      ValueError: the picture is too large to be explained.
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
  """Brings what was found to the picture's own size."""
  kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
  if values.shape == image.shape[:2]:
    return values.astype(kind)
  # Label maps go as bytes: there are at most 255 classes, and OpenCV resizes no 32-bit integers.
  passed = np.ascontiguousarray(values.astype(np.uint8 if kind is np.int32 else np.float32))
  return cv2.resize(passed, image.shape[1::-1], interpolation=method).astype(kind)


def _overlay(image: Image, colors: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
  return np.rint((1 - STRENGTH) * gray + STRENGTH * colors).astype(np.uint8)
