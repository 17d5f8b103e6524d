"""Prediction of label maps: overlay, label map, class fractions."""

from typing import Any, ClassVar

import cv2
import jax
import numpy as np

from vit_jax_zoo.inference.base import Image, Options, Picture, Prediction, Trained
from vit_jax_zoo.inference.image_sizes import jit_by_image_size
from vit_jax_zoo.systems.fpt.figures import color_labels

OPACITY = 0.55  # of the class colors in the overlay


class SegmentationPredictor:
  """Most likely class of each pixel; with `explain` also attention maps of the image's centre."""

  reads: ClassVar[frozenset[str]] = frozenset({"explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    if options.explain and getattr(trained.model, "neck", None) != "fpt":
      raise ValueError("--explain: a model without transformer has no attention maps")
    self._trained, self._explain = trained, options.explain
    self._task: Any = trained.task
    self._predict = jit_by_image_size(self._task.predict)

  def __call__(self, image: Image) -> Prediction:
    """Returns `classes`, largest first, and images in the input's size.

    Each class has `label`, `name` if known, `fraction` of the pixels, and their mean `confidence`.
    Images: "" the overlay, "labels" the colored label map, "ids" the label map as class ids; with
    `explain` "levels", the attention maps.
    """
    prepared = self._trained.prepare(image)
    example = {key: np.asarray(prepared[key]) for key in {"image", "image_size"} & prepared.keys()}
    batch = {key: value[None] for key, value in example.items()}
    found = jax.device_get(self._predict(self._trained.variables, batch))
    height, width = example.get("image_size", example["image"].shape[:2])
    ids = found["label_map"][0].astype(np.uint8)  # there are at most 255 classes
    labels = _resized(ids[:height, :width], image, cv2.INTER_NEAREST_EXACT)
    confidence = _resized(found["confidence"][0][:height, :width], image, cv2.INTER_LINEAR)
    colors = color_labels(labels.astype(np.int32))
    gray = image.astype(np.float32).mean(axis=-1, keepdims=True)
    overlay = np.rint((1 - OPACITY) * gray + OPACITY * colors).astype(np.uint8)
    pictures: dict[str, Picture] = {"": overlay, "labels": colors, "ids": labels}
    if self._explain:
      shown = {"image": example["image"][None, :height, :width]}
      explanation = jax.jit(self._task.explain)(self._trained.variables, shown)
      pictures["levels"] = self._task.draw_explanation(jax.device_get(explanation)).images["levels"]
    return Prediction({"classes": self._classes(labels, confidence)}, pictures)

  def _classes(self, labels: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
    names = self._task.class_names
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
      {
        "label": int(label),
        **({"name": names[label]} if label < len(names) else {}),
        "fraction": float(count / labels.size),
        "confidence": float(confidence[labels == label].mean()),
      }
      for label, count in zip(found[order], counts[order], strict=True)
    ]


def _resized(values: np.ndarray, image: Image, method: int) -> np.ndarray:
  if values.shape == image.shape[:2]:
    return values
  return cv2.resize(np.ascontiguousarray(values), image.shape[1::-1], interpolation=method)
