"""Classification of images: the most probable classes, with explanations."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from scipy.special import expit, softmax

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures.classification import draw_ranking
from vit_jax_zoo.inference.base import Image, Options, Picture, Predictor, Result, Trained
from vit_jax_zoo.ops.images import normalize_images


class ClassificationPredictor(Predictor):
  """The `top_k` most probable classes; with `explain`, the figures of `Classification.explain`."""

  reads: ClassVar[frozenset[str]] = frozenset({"top_k", "explain"})
  listed: ClassVar[int] = 5  # classes if `top_k` is None
  batch_size = 8

  def __init__(self, trained: Trained, options: Options) -> None:
    """Raises ValueError for a wrong `top_k`, or `explain` of a model without explanation."""
    if options.top_k is not None and options.top_k < 1:
      raise ValueError(f"--top_k: {options.top_k}; expected at least 1")
    super().__init__(trained, options)
    self._logits = jax.jit(self._compute_logits)
    self._explain = jax.jit(self._task.explain)
    if options.explain and not hasattr(trained.model, "explain"):
      raise ValueError(f"--explain: {type(trained.model).__name__} has no explanation to draw")

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns `top`, best first: `label`, `name` if known, `probability`."""
    logits = np.asarray(self._logits(self._trained.variables, batch["image"]), np.float64)
    is_sigmoid = self._task.objective == "sigmoid"
    probabilities = expit(logits) if is_sigmoid else softmax(logits, axis=-1)
    return list(map(self._result, images, batch["image"], probabilities))

  def _result(self, image: Image, prepared: np.ndarray, probabilities: np.ndarray) -> Result:
    count = self.listed if self._options.top_k is None else self._options.top_k
    best = np.argsort(-probabilities, kind="stable")[:count]
    names, scores = self._task.class_names, probabilities[best].tolist()
    top = [
      {"label": label, **self.named(label), "probability": score}
      for label, score in zip(best.tolist(), scores, strict=True)
    ]
    labels = [name_of(label, names) for label in best]
    summary = ", ".join(f"{n} {100 * p:.1f} %" for n, p in zip(labels, scores, strict=True))
    explained = prepared[None] if self._options.explain else None

    def draw() -> dict[str, Picture]:
      shown = labels if names else [f"class {label}" for label in labels]
      pictures: dict[str, Picture] = {"": draw_ranking(image, shown, scores)}
      if explained is None:
        return pictures
      found = jax.device_get(self._explain(self._trained.variables, {"image": explained}))
      drawn = self._task.draw_explanation({**found, "image": self._seen(image)[None]})
      of_model = {f"model_{name}": picture for name, picture in drawn.model.items()}
      return {**pictures, **drawn.images, **of_model}

    return Result({"top": top}, draw, summary, labels, scores)

  def _seen(self, image: Image) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns the part of an image that `prepare` keeps, which may crop, at its own size."""
    height, width = image.shape[:2]
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)  # prepared, they tell the part
    ramps = np.stack(np.broadcast_arrays(x[None], y[:, None], 0.0), axis=-1)
    prepared = np.asarray(self.prepare(np.rint(ramps).astype(np.uint8))["image"], np.float64) / 255
    rows = _part(prepared[..., 1].mean(axis=1), height)
    return image[rows, _part(prepared[..., 0].mean(axis=0), width)]

  def _compute_logits(self, variables: Any, image: Any) -> Any:
    images = normalize_images(jnp.asarray(image), self._task.image_mean, self._task.image_std)
    return self._task.model.apply(variables, images, train=False)["logits"]


def _part(positions: np.ndarray, length: int) -> slice:
  """Returns the pixels of a side whose centres were resized to `positions`, in [0, 1]."""
  first, last = positions[0] * (length - 1), positions[-1] * (length - 1)
  half = (last - first) / max(len(positions) - 1, 1) / 2
  start = min(max(round(first - half + 0.5), 0), length - 1)
  return slice(start, max(round(last + half + 0.5), start + 1))
