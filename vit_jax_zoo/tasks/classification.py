"""Image classification: one label an image, several, or mixtures of labels."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped
from matplotlib.figure import Figure

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.figures import classification as draw
from vit_jax_zoo.figures.interpretability import draw_of_images, draw_of_model
from vit_jax_zoo.metrics.classification import ClassificationEvaluator
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.ops.mixup import Mixing, mix_examples
from vit_jax_zoo.tasks import base

OBJECTIVES = ("softmax", "sigmoid")

_MIXING = 0x6D6978
"""Folded into a step's key for what mixes examples, so that dropout's draws stay what they are."""

_DRAWN = 24
"""So many examples of a batch are mixed for a picture."""

_EXPLAINED, _MOST_BYTES = 8, 2**30
"""So many examples of a batch are explained, or as few as keep what the model sows below this."""


@dataclasses.dataclass(frozen=True)
class Classification(base.Task):
  """Learns to name what an image shows.

  Batches: `image` [b h w c], uint8 or floats in [0, 255]; `label`, int [b], or weights [b k] (a 1
  for each label of a multi-label set, mixup's mixtures); `mask` [b], True for real rows, when a
  batch is padded.

  Attributes:
    model: called as `model(images, train=...)`, returns a dict with "logits" [b k].
    num_classes: size of the label set.
    objective: "softmax": cross-entropy of one distribution over the classes. "sigmoid": a yes-no
      cross-entropy for each class, summed over the classes (not averaged), as ViT's ImageNet-21k
      and JFT pre-training have it.
    label_smoothing: this share of each training label is spread evenly over all classes; the
      loss of an evaluation is free of it.
    mixup_alpha: training examples are mixed with their neighbours in the micro-batch, by shares
      from Beta(alpha, alpha); None: not. Labels are mixed alike, before they are smoothed.
    cutmix_alpha: the same for CutMix, which gives the neighbour a box of the image.
    mix_probability: that anything is mixed.
    cutmix_share: where both alphas are set, how often it is CutMix.
    mix_per: what the draws are made for, "batch" (each micro-batch) or "example".
    image_mean: see `normalize_images`; the default maps pixels to [-1, 1].
    image_std: as `image_mean`.
    class_names: in order; for pictures and scores of single classes.
    top_k: how many classes a prediction lists, and the k of the top-k accuracy.
    per_class: evaluations score each class, too, and draw which is taken for which.
  """

  name: ClassVar[str] = "classification"

  model: base.Model
  num_classes: int
  objective: str = "softmax"
  label_smoothing: float = 0.0
  mixup_alpha: float | int | None = None
  cutmix_alpha: float | int | None = None
  mix_probability: float | int = 1.0
  cutmix_share: float | int = 0.5
  mix_per: str = "batch"
  image_mean: float | tuple[float, ...] = 0.5
  image_std: float | tuple[float, ...] = 0.5
  class_names: tuple[str, ...] = ()
  top_k: int = 5
  per_class: bool = False

  def __post_init__(self) -> None:
    if self.objective not in OBJECTIVES:
      raise ValueError(unknown_name("objective", self.objective, OBJECTIVES))
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f"label_smoothing must lie in [0, 1), but is {self.label_smoothing}")
    if self.num_classes < 1 or self.top_k < 1:
      raise ValueError(
        f"num_classes and top_k must be positive, but are {self.num_classes} and {self.top_k}"
      )
    if self.class_names and len(self.class_names) != self.num_classes:
      raise ValueError(
        f"{len(self.class_names)} class_names were given for {self.num_classes} classes"
      )
    _ = self._mixing  # checks its fields

  @property
  def best_metric(self) -> str:
    """Top-1 accuracy."""
    return "accuracy"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's fresh variables for images of this batch's shape."""
    return self.model.init(rng, self._images(batch), train=False)

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the mean cross-entropy of the step's examples, as far as it is these examples'.

    Metrics: "loss", "accuracy" and "top5_accuracy" (for the `top_k` of the task). A label that is
    not one of the classes makes the loss NaN: it stops a run, where a silent 0 would mislead it.
    Of a mixed example the larger part counts as its label in the accuracies.
    """
    mask = base.example_mask(batch)
    targets = self._targets(jnp.asarray(batch["label"]), mask)
    images = self._images(batch)
    if self._mixing.is_on:
      rng = jax.random.fold_in(context.rng, _MIXING)
      images, targets = mix_examples(images, targets, mask, rng, self._mixing)
    state = {name: tree for name, tree in variables.items() if name != "params"}
    outputs, changed = self.model.apply(
      variables,
      images,
      train=True,
      rngs={"dropout": context.rng},
      mutable=list(state),
    )
    logits = self._logits(outputs)
    losses = jnp.where(mask, self._losses(logits, smooth(targets, self.label_smoothing)), 0.0)
    return base.LossOutput(
      loss=jnp.sum(losses) / context.normalizers["examples"],
      metrics={"loss": base.Mean.of(losses, mask)} | self._accuracies(logits, targets, mask),
      model_state={**state, **changed},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns the most likely classes of each image.

    Returns:
      `labels` int32 [b top_k], best first; `probabilities` float32 [b top_k], which are those of a
      softmax or of independent sigmoids as the objective says; and, when the batch has labels,
      `loss` float32 [b] and `correct` bool [b top_k] (with several labels: whether it is any of
      them). In rows that the mask leaves out, `loss` is 0 and `correct` is False.
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
    """Returns the first examples' `image`, the likeliest `label`, and the model's `explanation`.

    Raises:
      ValueError: the model has no method `explain`, see `ops.explanation`.
    """
    if not hasattr(self.model, "explain"):
      raise ValueError(f"{type(self.model).__name__} shows nothing of its inside")
    model: Any = self.model
    images = self._images(batch)
    look = functools.partial(model.apply, variables, train=False, mutable=["intermediates"])
    sown = jax.eval_shape(look, images[:1])[1]
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sown))
    images = images[: max(1, min(_EXPLAINED, _MOST_BYTES // each))]
    outputs, seen = look(images)
    return {
      "image": batch["image"][: len(images)],
      "label": jnp.argmax(outputs["logits"], axis=-1),
      "explanation": model.explain(variables, seen["intermediates"], images.shape[1:3]),
    }

  def draw_explanation(self, explanation: Mapping[str, Any]) -> base.Explained:
    """Draws attention, lambdas, positions, filters: whatever the model has of them."""
    names = self.class_names
    captions = [names[label] if names else f"class {label}" for label in explanation["label"]]
    seen = explanation["explanation"]
    images = np.clip(explanation["image"], 0, 255)
    return base.Explained(draw_of_images(images, captions, seen), draw_of_model(seen))

  def features(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns `features` float32 [b d]: what the model's head sees.

    Raises:
      ValueError: the model gives none.
    """
    outputs = self.model.apply(variables, self._images(batch), train=False)
    if "features" not in outputs:
      raise ValueError(f"the model {type(self.model).__name__} has no features to probe")
    return {"features": outputs["features"].astype(jnp.float32)}

  def evaluator(self) -> ClassificationEvaluator:
    """Returns an empty evaluator: accuracy, top-k accuracy, loss, and classes where asked."""
    return ClassificationEvaluator(
      self.num_classes, per_class=self.per_class, class_names=self.class_names
    )

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images with their labels, mixed ones with their shares."""
    images, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
    if self._mixing.is_on:
      images, labels = self._mixed_pixels(images, labels)
    return {"batch": draw.draw_batch(images, labels, self.class_names)}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws images with what was predicted, right or wrong, and how surely."""
    real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
    if not real.any():
      return {}
    figure = draw.draw_predictions(
      np.asarray(batch["image"])[real],
      np.asarray(batch["label"])[real],
      {name: np.asarray(value)[real] for name, value in predictions.items()},
      self.class_names,
    )
    return {"predictions": figure}

  def score_figures(self, evaluator: base.Evaluator) -> dict[str, Figure]:
    """Draws the confusion matrix, where classes are scored (`per_class`)."""
    if not (self.per_class and isinstance(evaluator, ClassificationEvaluator)):
      return {}
    return {"confusion": draw.draw_confusion(evaluator.confusion(), self.class_names)}

  @property
  def _mixing(self) -> Mixing:
    return Mixing(
      mixup_alpha=self.mixup_alpha,
      cutmix_alpha=self.cutmix_alpha,
      probability=self.mix_probability,
      cutmix_share=self.cutmix_share,
      unit=self.mix_per,
    )

  def _mixed_pixels(
    self, images: Shaped[np.ndarray, "b h w c"], labels: Shaped[np.ndarray, "b ..."]
  ) -> tuple[Shaped[np.ndarray, "b h w c"], Shaped[np.ndarray, "b k"]]:
    """Returns the first examples mixed, to be drawn; each by its own draw, to show the range."""
    images, labels = images[:_DRAWN], labels[:_DRAWN]
    everyone = jnp.ones(len(images), bool)
    mixed, targets = mix_examples(
      jnp.asarray(images, jnp.float32),
      self._targets(jnp.asarray(labels), everyone),
      everyone,
      jax.random.key(0),
      dataclasses.replace(self._mixing, unit="example"),
    )
    return np.asarray(mixed), np.asarray(targets)

  @property
  def _ranks(self) -> int:
    return min(self.top_k, self.num_classes)

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _logits(self, outputs: Mapping[str, Any]) -> Float[Array, "b k"]:
    logits = outputs["logits"]
    if logits.shape[-1] != self.num_classes:
      raise ValueError(
        f"the model has {logits.shape[-1]} classes, but the task has {self.num_classes}; "
        "give both the same num_classes"
      )
    return logits.astype(jnp.float32)

  def _targets(
    self, labels: Shaped[Array, "b ..."], mask: Bool[Array, " b"]
  ) -> Float[Array, "b k"]:
    """Returns label weights; NaN for a label that is no class, 0 for padding, whatever it holds."""
    if labels.ndim == 2:
      if labels.shape[1] != self.num_classes:
        raise ValueError(
          f"labels have {labels.shape[1]} columns, but num_classes is {self.num_classes}"
        )
      targets = labels.astype(jnp.float32)
    else:
      known = (labels >= 0) & (labels < self.num_classes)
      targets = jnp.where(known[:, None], jax.nn.one_hot(labels, self.num_classes), jnp.nan)
    # Padding is emptied here, not in the loss: the gradient of a NaN that is masked away later is
    # still NaN.
    return jnp.where(mask[:, None], targets, 0.0)

  def _losses(
    self, logits: Float[Array, "b k"], targets: Float[Array, "b k"]
  ) -> Float[Array, " b"]:
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


def smooth(targets: Float[Array, "b k"], share: float) -> Float[Array, "b k"]:
  """Spreads `share` of each row's label evenly over all classes (arXiv:1512.00567, section 7)."""
  return optax.smooth_labels(targets, share) if share else targets


def is_correct(targets: Float[Array, "b k"], predictions: Int[Array, "b r"]) -> Bool[Array, "b r"]:
  """Tells which predictions are right: those that have the largest weight of their row.

  With one label that is the label; with several of weight 1, any of them; of a mixture, the larger
  part. In a row without a label nothing is right.
  """
  weights = jnp.take_along_axis(targets, predictions, axis=1)
  return (weights > 0) & (weights == jnp.max(targets, axis=1, keepdims=True))
