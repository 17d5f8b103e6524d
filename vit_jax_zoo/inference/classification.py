"""Classification of images: the most probable classes, with explanations."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, softmax

from vit_jax_zoo.figures.classification import draw_ranking
from vit_jax_zoo.inference.base import Image, Options, Prediction, Trained
from vit_jax_zoo.ops.images import normalize_images


class ClassificationPredictor:
  """The `top_k` most probable classes; with `explain`, the figures of `Classification.explain`."""

  reads: ClassVar[frozenset[str]] = frozenset({"top_k", "explain"})
  listed: ClassVar[int] = 5  # classes if `top_k` is None

  def __init__(self, trained: Trained, options: Options) -> None:
    """Raises ValueError if `explain` is set and the model has no explanation."""
    self._trained, self._options = trained, options
    self._task: Any = trained.task
    self._logits = jax.jit(self._compute_logits)
    self._explain = jax.jit(self._task.explain)
    if options.explain and not hasattr(trained.model, "explain"):
      raise ValueError(f"--explain: {type(trained.model).__name__} has no explanation to draw")

  def __call__(self, image: Image) -> Prediction:
    """Returns `top`, best first: `label`, `name` if known, `probability`."""
    prepared = np.asarray(self._trained.prepare(image)["image"])
    logits = np.asarray(self._logits(self._trained.variables, prepared[None]))[0]
    activation = expit if self._task.objective == "sigmoid" else softmax
    probabilities = activation(logits.astype(np.float64))
    count = self.listed if self._options.top_k is None else self._options.top_k
    best = np.argsort(-probabilities, kind="stable")[: max(1, count)]
    names = self._task.class_names
    scores = probabilities[best].tolist()
    named = [{"name": names[label]} if names else {} for label in best]
    rows = zip(best.tolist(), named, scores, strict=True)
    top = [{"label": label, **name, "probability": score} for label, name, score in rows]
    shown = [names[label] if names else f"class {label}" for label in best]
    pictures: dict[str, Figure] = {"": draw_ranking(image, shown, scores)}
    if not self._options.explain:
      return Prediction({"top": top}, pictures)
    explanation = self._explain(self._trained.variables, {"image": prepared[None]})
    explained = self._task.draw_explanation(jax.device_get(explanation))
    pictures |= dict(explained.images)
    return Prediction({"top": top}, pictures, model_pictures=explained.model)

  def _compute_logits(self, variables: Any, image: Any) -> Any:
    images = normalize_images(jnp.asarray(image), self._task.image_mean, self._task.image_std)
    return self._task.model.apply(variables, images, train=False)["logits"]
