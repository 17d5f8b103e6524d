"""Image classification with single labels, multiple labels, or mixup's label weights."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped
from matplotlib.figure import Figure

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.figures import classification as draw
from vit_jax_zoo.metrics.base import real_rows
from vit_jax_zoo.metrics.classification import ClassificationEvaluator
from vit_jax_zoo.ops.checks import check_fractions, check_not_negative, check_positive, check_rates
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.tasks import base

Weights: TypeAlias = tuple[Float[Array, " n"], Float[Array, "n h w"]]  # of labels and of pixels

_MIXING = 0x6D6978  # folded into a step's key for mixup and CutMix: independent of dropout
_DRAWN = 24  # number of mixed examples in the figure of a training batch
_EXPLAINED, _MAX_BYTES = 8, 2**30  # maximum examples to explain, and bytes of intermediates


@dataclasses.dataclass(frozen=True)
class Classification(base.Task):
  """Softmax or sigmoid classification of images.

  Batches: `image` [b h w c], uint8 or floats in [0, 255]; `label`, int [b], or weights [b k];
  `mask` [b], True for real rows of a padded batch.

  mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) mix images and label weights: an example
  keeps the fraction `lam` ~ Beta(alpha, alpha) of itself and takes the rest from its neighbour in
  the batch, the example before it, cyclically, as in big_vision (timm pairs the first with the
  last).
  """

  name: ClassVar[str] = "classification"
  hub_task: ClassVar[str | None] = "image-classification"

  model: base.Model  # `model(images, train=...)` returns a dict with "logits" [b k]
  num_classes: int
  # "softmax": cross-entropy. "sigmoid": binary cross-entropy, summed over the classes, as in ViT's
  # ImageNet-21k and JFT pre-training.
  objective: str = "softmax"
  label_smoothing: float = 0.0  # of training labels, after they are mixed
  mixup_alpha: float | int | None = None  # of mixup's Beta distribution; None or 0: no mixup
  cutmix_alpha: float | int | None = None  # of CutMix's Beta distribution; None or 0: no CutMix
  mix_probability: float | int = 1.0  # of mixing (timm's `mixup_prob`)
  cutmix_fraction: float | int = 0.5  # of CutMix if both are on (timm's `mixup_switch_prob`)
  image_mean: float | tuple[float, ...] = 0.5  # see `normalize_images`; 0.5 and 0.5: [-1, 1]
  image_std: float | tuple[float, ...] = 0.5
  class_names: tuple[str, ...] = ()  # for figures and per-class scores
  top_k: int = 5  # number of classes of a prediction, and the k of the top-k accuracy
  per_class: bool = False  # also score each class, and draw the confusion matrix

  def __post_init__(self) -> None:
    check_names("objective", [self.objective], ("softmax", "sigmoid"))
    check_rates(self, "label_smoothing")
    check_not_negative(self, "mixup_alpha", "cutmix_alpha")
    check_fractions(self, "mix_probability", "cutmix_fraction")
    check_positive(self, "num_classes", "top_k")
    if (count := len(self.class_names)) not in (0, self.num_classes):
      raise ValueError(f"class_names: {count} names; expected num_classes={self.num_classes}")

  @property
  def best_metric(self) -> str:
    return "accuracy"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    return self.model.init(rng, self._images(batch), train=False)

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the sum of the examples' losses / the number of examples of the whole step.

    "accuracy" and "top5_accuracy" (with `top_k`) use the largest label of a mixed example. A label
    out of range makes the loss NaN, which stops a run.
    """
    mask = base.example_mask(batch)
    targets = self._targets(jnp.asarray(batch["label"]), mask)
    images = self._images(batch)
    if self.mixes:
      rng = jax.random.fold_in(context.rng, _MIXING)
      images, targets = mix_examples(images, targets, mask, rng, self)
    state = {name: tree for name, tree in variables.items() if name != "params"}
    outputs, changed = self.model.apply(
      variables, images, train=True, rngs={"dropout": context.rng}, mutable=list(state)
    )
    logits = self._logits(outputs)
    smoothed = optax.smooth_labels(targets, self.label_smoothing)  # arXiv:1512.00567, section 7
    losses = jnp.where(mask, self._losses(logits, smoothed), 0.0)
    return base.LossOutput(
      loss=jnp.sum(losses) / context.normalizers["examples"],
      metrics={"loss": base.Mean.of(losses, mask)} | self._accuracies(logits, targets, mask),
      model_state={**state, **changed},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns the most likely classes of each image.

    `labels` int32 [b top_k], best first; `probabilities` float32 [b top_k]; and, if the batch has
    labels, `loss` float32 [b] and `correct` bool [b top_k], 0 and False in masked rows.
    """
    logits = self._logits(self.model.apply(variables, self._images(batch), train=False))
    to_probabilities = jax.nn.softmax if self.objective == "softmax" else jax.nn.sigmoid
    best, labels = jax.lax.top_k(to_probabilities(logits), self._ranks)
    predictions = {"labels": labels.astype(jnp.int32), "probabilities": best}
    if "label" not in batch:
      return predictions
    mask = base.example_mask(batch)
    targets = self._targets(jnp.asarray(batch["label"]), mask)
    losses = jnp.where(mask, self._losses(logits, targets), 0.0)
    return predictions | {"loss": losses, "correct": is_correct(targets, labels)}

  def explain(self, variables: base.Variables, batch: base.Batch) -> dict[str, Any]:
    """Returns `image`, the most likely `label`, and the model's `explanation` of first examples.

    A model may have `explain(variables, intermediates, image_size)`, which is traced and reduces
    the sown arrays to small ones, and `draw_explanation(images, captions, explanation)`, which
    returns figures of these images and of the model, by name. ValueError without them.
    """
    if not hasattr(self.model, "explain"):
      raise ValueError(f"{type(self.model).__name__} has no method explain")
    images = self._images(batch)
    apply = functools.partial(self.model.apply, variables, train=False, mutable=["intermediates"])
    sown = jax.eval_shape(apply, images[:1])[1]
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sown))
    images = images[: max(1, min(_EXPLAINED, _MAX_BYTES // each))]
    outputs, state = apply(images)
    return {
      "image": batch["image"][: len(images)],
      "label": jnp.argmax(outputs["logits"], axis=-1),
      "explanation": self.model.explain(variables, state["intermediates"], images.shape[1:3]),
    }

  def draw_explanation(self, explanation: Mapping[str, Any]) -> base.Explained:
    names = self.class_names
    captions = [names[label] if names else f"class {label}" for label in explanation["label"]]
    images = np.clip(explanation["image"], 0, 255)
    drawn = self.model.draw_explanation(images, captions, explanation["explanation"])
    return base.Explained(*drawn)

  def features(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns `features` float32 [b d], the input of the model's head; ValueError without one."""
    outputs = self.model.apply(variables, self._images(batch), train=False)
    if "features" not in outputs:
      raise ValueError(f"{type(self.model).__name__}: no output 'features' to probe")
    return {"features": outputs["features"].astype(jnp.float32)}

  def evaluator(self) -> ClassificationEvaluator:
    return ClassificationEvaluator(self.num_classes, self.per_class, self.class_names)

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    images, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
    if self.mixes:
      images, labels = jnp.asarray(images[:_DRAWN], jnp.float32), jnp.asarray(labels[:_DRAWN])
      mask, rng = jnp.ones(len(images), bool), jax.random.key(0)
      mixed = mix_examples(images, self._targets(labels, mask), mask, rng, self, len(images))
      images, labels = map(np.asarray, mixed)
    return {"batch": draw.draw_batch(images, labels, self.class_names)}

  def figures(self, batch: base.Batch, predictions: base.Predictions) -> dict[str, Figure]:
    real = real_rows(batch, len(batch["image"]))
    images, labels = np.asarray(batch["image"])[real], np.asarray(batch["label"])[real]
    found = {name: np.asarray(value)[real] for name, value in predictions.items()}
    return {"predictions": draw.draw_predictions(images, labels, found, self.class_names)}

  def score_figures(self, evaluator: base.Evaluator) -> dict[str, Figure]:
    if not (self.per_class and isinstance(evaluator, ClassificationEvaluator)):
      return {}
    return {"confusion": draw.draw_confusion(evaluator.confusion(), self.class_names)}

  @property
  def mixes(self) -> bool:
    """Whether mixup or CutMix is on."""
    return bool(self.mixup_alpha or self.cutmix_alpha) and self.mix_probability > 0

  @property
  def _ranks(self) -> int:
    return min(self.top_k, self.num_classes)

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _logits(self, outputs: Mapping[str, Any]) -> Float[Array, "b k"]:
    logits = outputs["logits"]
    if logits.shape[-1] != self.num_classes:
      raise ValueError(f"num_classes: {logits.shape[-1]} in the model; expected {self.num_classes}")
    return logits.astype(jnp.float32)

  def _targets(self, labels: Shaped[Array, "b ..."], mask: Bool[Array, " b"]) -> Array:
    """Returns label weights [b k]; NaN for a label that is no class, 0 for padding."""
    if labels.ndim == 2:
      if (k := labels.shape[1]) != self.num_classes:
        raise ValueError(f"label: {k} columns; expected num_classes={self.num_classes}")
      targets = labels.astype(jnp.float32)
    else:
      is_class = (labels >= 0) & (labels < self.num_classes)
      targets = jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32)
      targets = jnp.where(is_class[:, None], targets, jnp.nan)
    # Padding is cleared here, not in the loss: the gradient of a masked NaN would be NaN.
    return jnp.where(mask[:, None], targets, 0.0)

  def _losses(self, logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Array:
    if self.objective == "softmax":
      return optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)

  def _accuracies(
    self, logits: Float[Array, "b k"], targets: Float[Array, "b k"], mask: Bool[Array, " b"]
  ) -> dict[str, base.Mean]:
    ranks = self._ranks
    correct = is_correct(targets, jax.lax.top_k(logits, ranks)[1]).astype(jnp.float32)
    labelled = mask & (jnp.max(targets, axis=1) > 0)
    accuracies = {"accuracy": base.Mean.of(correct[:, 0], labelled)}
    if 1 < ranks < self.num_classes:
      accuracies[f"top{ranks}_accuracy"] = base.Mean.of(jnp.max(correct, axis=1), labelled)
    return accuracies


def is_correct(targets: Float[Array, "b k"], predictions: Int[Array, "b r"]) -> Bool[Array, "b r"]:
  """Returns which predictions are correct: those with the largest weight of their row, above 0."""
  weights = jnp.take_along_axis(targets, predictions, axis=1)
  return (weights > 0) & (weights == jnp.max(targets, axis=1, keepdims=True))


def mix_examples(
  images: Float[Array, "b h w c"],
  targets: Float[Array, "b k"],
  mask: Bool[Array, " b"],
  rng: jax.Array,
  task: Classification,
  draws: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Returns images and targets (label weights), mixed alike; padding and its successor are not.

  One draw serves the whole batch (big_vision, timm's default), or each of `b` draws an example.
  """
  fractions, from_self = _draw(rng, draws, (images.shape[1], images.shape[2]), task)
  whole = ~(mask & jnp.roll(mask, 1))
  fractions = jnp.where(whole, 1.0, fractions)
  from_self = jnp.where(whole[:, None, None], 1.0, from_self)[..., None]
  # Padding may contain NaN: it is replaced, not multiplied by 0.
  other_images = jnp.where(whole[:, None, None, None], images, jnp.roll(images, 1, axis=0))
  other_targets = jnp.where(whole[:, None], targets, jnp.roll(targets, 1, axis=0))
  mixed = images * from_self + other_images * (1 - from_self)
  return mixed, targets * fractions[:, None] + other_targets * (1 - fractions[:, None])


def _draw(rng: jax.Array, draws: int, size: tuple[int, int], task: Classification) -> Weights:
  """Samples weights of an example in its label and in each of its pixels."""
  kind_rng, mix_rng, mixup_rng, cutmix_rng = jax.random.split(rng, 4)
  ones = jnp.ones((draws, *size), jnp.float32)
  fractions, pixels = jnp.ones(draws, jnp.float32), ones
  if task.mixup_alpha:
    drawn = jax.random.beta(mixup_rng, task.mixup_alpha, task.mixup_alpha, (draws,))
    # The larger fraction is the example's own, so that its label stays the mixture's largest.
    fractions = jnp.maximum(drawn, 1 - drawn)
    pixels = jnp.broadcast_to(fractions[:, None, None], ones.shape)
  if task.cutmix_alpha:
    cut_fractions, cut_pixels = _cut(cutmix_rng, task.cutmix_alpha, draws, size)
    always = not task.mixup_alpha
    cut = jax.random.uniform(kind_rng, (draws,)) < (1.0 if always else task.cutmix_fraction)
    fractions = jnp.where(cut, cut_fractions, fractions)
    pixels = jnp.where(cut[:, None, None], cut_pixels, pixels)
  mixed = jax.random.uniform(mix_rng, (draws,)) < task.mix_probability
  return jnp.where(mixed, fractions, 1.0), jnp.where(mixed[:, None, None], pixels, 1.0)


def _cut(rng: jax.Array, alpha: float | int, draws: int, size: tuple[int, int]) -> Weights:
  """Samples boxes for the neighbour: the fraction outside each, and a mask of the outside."""
  area_rng, row_rng, column_rng = jax.random.split(rng, 3)
  side = jnp.sqrt(1 - jax.random.beta(area_rng, alpha, alpha, (draws,)))
  rows, columns = _covered(row_rng, side, size[0]), _covered(column_rng, side, size[1])
  outside = 1.0 - (rows[:, :, None] & columns[:, None, :])
  # A box is cut off at the edge: the labels follow the pixels.
  return jnp.mean(outside, axis=(1, 2)), outside


def _covered(rng: jax.Array, side: Float[Array, " n"], length: int) -> Bool[Array, "n length"]:
  """Returns the pixels of `length` in an interval with a random centre."""
  extent = jnp.floor(side * length).astype(jnp.int32)
  center = jax.random.randint(rng, side.shape, 0, length, jnp.int32)
  begin, end = center - extent // 2, center + (extent + 1) // 2
  at: Int[Array, "1 length"] = jnp.arange(length, dtype=jnp.int32)[None, :]
  return (at >= begin[:, None]) & (at < end[:, None])
