"""Autoregressive and masked pixel modelling, with a classification loss for fine-tuning.

Chen et al., "Generative Pretraining from Pixels", ICML 2020, sections 2.1 to 2.3.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Float32, Int, Int64, Integer
from matplotlib.figure import Figure

from vit_jax_zoo.metrics.base import MeanEvaluator
from vit_jax_zoo.metrics.majority_vote import majority_vote
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.igpt import figures as draw
from vit_jax_zoo.systems.igpt import palette as palettes
from vit_jax_zoo.systems.igpt.palette import cluster_colors
from vit_jax_zoo.systems.igpt.sampling import complete
from vit_jax_zoo.tasks import base


@dataclasses.dataclass(frozen=True)
class PixelModelling(base.Task):
  """Models images as sequences of colours.

  A causal model predicts each pixel from those before; its loss is the mean over pixels (Eq. 2). A
  model with `causal=False` predicts masked pixels from visible ones; its loss is the mean over an
  image's masked pixels, then over images (Eq. 3). `class_weight` adds the label's cross-entropy.

  Batches: `image` [b h w 3], uint8 or floats in [0, 255]; `label` int [b], needed with
  `class_weight`; `mask` [b], True for real rows. With `prefix_length` int [b], predictions contain
  completions of the images from that number of pixels on.

  Attributes:
    model: an `ImageGPT`.
    class_weight: weight of the label's loss; 0 for pre-training, 1 for fine-tuning (section 3.4).
    mask_probability: probability of masking a pixel, with `causal=False` (section 2.2: 0.15).
    maskings: number of random masks per image for classification with `causal=False`, in
      predictions and by probes; the majority is the label (section 4, BERT).
    palette: file of the colours, see `palette.read_palette`; None: fitted to the training images
      before the first step.
    palette_images: number of training images for that, and for the bigram baseline.
    temperature: of completions.
    top_k: number of most likely colours that completions sample from; None: all.
    completions: number of completions per image.
    seed: of masks in evaluations, of completions, and of the palette.
  """

  name: ClassVar[str] = "pixel_modelling"

  model: Any
  class_weight: float = 0.0
  mask_probability: float = 0.15
  maskings: int = 5
  palette: str | None = None
  palette_images: int = 2048
  temperature: float = 1.0
  top_k: int | None = None
  completions: int = 4
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.mask_probability < 1:
      raise ValueError(f"mask_probability: {self.mask_probability}; expected a number in (0, 1)")
    check_not_negative(self, "class_weight", "temperature")
    check_positive(self, "maskings", "palette_images", "completions", "top_k")
    if self.class_weight and self.model.num_classes is None:
      raise ValueError(f"class_weight: {self.class_weight}, but the model's num_classes is None")

  @property
  def best_metric(self) -> str:
    """Accuracy with `class_weight`, else the mean log-likelihood of a pixel."""
    return "accuracy" if self.class_weight else "log_likelihood"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's initial variables, and a uniform bigram baseline."""
    variables, colors = self.model.init(rng, self._images(batch)), self.model.num_colors
    blank = jnp.full((colors + 1, colors), -jnp.log(float(colors)), jnp.float32)
    return {**variables, "baseline": {"bigram": blank}}

  def init_from_data(self, batches: Iterable[Mapping[str, np.ndarray]]) -> base.Variables:
    """Returns the palette, read or fitted, and the bigram baseline, from the first images."""
    images = _take(batches, self.palette_images)
    colors = self.model.num_colors
    if self.palette is None:
      clusters = palettes.fit_palette(images, colors, seed=self.seed)
      logging.info("fitted a palette of %d colours to %d images", colors, len(images))
    else:
      clusters = palettes.read_palette(self.palette)
      if len(clusters) != colors:
        raise ValueError(
          f"{self.palette}: {len(clusters)} colours; expected the model's num_colors={colors}. Set "
          f"num_colors={len(clusters)}"
        )
    tokens = palettes.encode(images, clusters).reshape(len(images), -1)
    return {
      "palette": {"clusters": clusters},
      "baseline": {"bigram": log_bigrams(count_bigrams(tokens, colors))},
    }

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the sum of the examples' losses over the number of examples of the whole step.

    Metrics: "nats" per pixel, "loss", and with labels "class_loss" and "accuracy".
    """
    outputs, nats = self._model(variables, batch, context.rng, train=True)
    real = base.example_mask(batch)
    losses, metrics = nats, {"nats": base.Mean.of(nats, real)}
    if self.class_weight:
      class_losses, correct = self._classify(outputs, batch)
      losses = nats + self.class_weight * class_losses
      metrics["class_loss"] = base.Mean.of(class_losses, real)
      metrics["accuracy"] = base.Mean.of(correct.astype(jnp.float32), real)
    losses = jnp.where(real, losses, 0.0)
    return base.LossOutput(
      loss=jnp.sum(losses) / context.normalizers["examples"],
      metrics={"loss": base.Mean.of(losses, real), **metrics},
      model_state={name: tree for name, tree in variables.items() if name != "params"},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns each image's likelihood, label and completions.

    Returns:
      `nats` float32 [b], the mean over an image's pixels, or over masked pixels, with the same
      masks in every evaluation; of a causal model `bigram_nats` [b], of the baseline; of a model
      with a head `labels` int32 [b], and with labels in the batch `class_loss` [b] and `correct`
      [b]; with `prefix_length`, `completions` uint8 [b completions h w 3] and `quantized` uint8
      [b h w 3], the image in the palette's colours. Losses are means over `maskings`.
    """
    if not self.model.causal and self.model.num_classes is not None:
      return self._vote(variables, batch)
    outputs, nats = self._model(variables, batch, self._view(0), train=False)
    predictions = {"nats": nats}
    if self.model.causal:
      bigram = variables["baseline"]["bigram"]
      predictions["bigram_nats"] = score_bigrams(outputs["tokens"], bigram)
    if self.model.num_classes is not None:
      predictions["labels"] = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
      if "label" in batch:
        predictions["class_loss"], predictions["correct"] = self._classify(outputs, batch)
    if "prefix_length" in batch:
      rng = jax.random.key(self.seed)
      predictions |= self._complete(variables, batch, outputs["tokens"], rng)
    return predictions

  def _vote(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Predicts labels by the majority of `maskings` views; losses are means over them."""

    def predict_view(view: Array) -> dict[str, Array]:
      outputs, nats = self._model(variables, batch, self._view(view), train=False)
      seen = {"nats": nats, "labels": jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)}
      return seen | ({"class_loss": self._classify(outputs, batch)[0]} if "label" in batch else {})

    seen = jax.lax.map(predict_view, jnp.arange(self.maskings))
    labels = majority_vote(seen.pop("labels"), jax.random.key(self.seed))
    predictions = {name: jnp.mean(losses, axis=0) for name, losses in seen.items()}
    if "label" in batch:
      predictions["correct"] = labels == jnp.asarray(batch["label"])
    return predictions | {"labels": labels}

  @property
  def feature_views(self) -> int:
    """`maskings` with `causal=False`, else 1."""
    return 1 if self.model.causal else self.maskings

  def features(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns `layers` [b depth+1 d], see `ImageGPT.from_tokens`, and `pixels` [b h*w*3].

    With `causal=False`, images are masked as in training; `view` is the number of the mask.
    """
    view = jnp.asarray(batch["view"])[0] if "view" in batch else 0
    outputs, _ = self._model(variables, batch, self._view(view), train=False)
    images = self._images(batch)
    pixels = images.reshape(images.shape[0], -1)
    return {"layers": outputs["layer_features"], "pixels": pixels}

  def evaluator(self) -> base.Evaluator:
    """Returns an empty evaluator."""
    return PixelEvaluator()

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images."""
    return {"batch": draw.draw_images(batch["image"], title="Training batch")}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws completions beside the given pixels and the originals, if there are any."""
    real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
    if "completions" not in predictions or not real.any():
      return {}
    figure = draw.draw_completions(
      np.asarray(predictions["quantized"])[real],
      np.asarray(batch["prefix_length"])[real],
      np.asarray(predictions["completions"])[real],
    )
    return {"completions": figure}

  def _view(self, view: int | Array) -> jax.Array:
    """Returns the key of an evaluation's masks, which is constant."""
    return jax.random.fold_in(jax.random.key(self.seed), view)

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]))

  def _model(
    self, variables: base.Variables, batch: base.Batch, rng: jax.Array, *, train: bool
  ) -> tuple[dict[str, Array], Float[Array, " b"]]:
    """Returns the model's outputs, and each image's loss in nats per pixel."""
    images = self._images(batch)
    visible = None
    if not self.model.causal:
      shape = (images.shape[0], images.shape[1] * images.shape[2])
      visible = jax.random.uniform(rng, shape) > self.mask_probability
    model_variables = {name: tree for name, tree in variables.items() if name != "baseline"}
    outputs = self.model.apply(model_variables, images, visible=visible, train=train)
    return outputs, pixel_nats(outputs["pixel_logits"], outputs["tokens"], visible)

  def _classify(
    self, outputs: Mapping[str, Array], batch: base.Batch
  ) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    labels = jnp.asarray(batch["label"])
    logits = outputs["logits"]
    # A label that is no class gives NaN, which stops a run, except in rows of padding.
    known = (labels >= 0) & (labels < logits.shape[-1])
    inside = jnp.where(known, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, inside)
    losses = jnp.where(known | ~base.example_mask(batch), losses, jnp.nan)
    return losses, jnp.argmax(logits, axis=-1) == labels

  def _complete(
    self, variables: base.Variables, batch: base.Batch, tokens: Int[Array, "b n"], rng: jax.Array
  ) -> dict[str, Array]:
    count, shape = self.completions, batch["image"].shape[:3]
    repeated = jnp.repeat(tokens, count, axis=0)
    lengths = jnp.repeat(jnp.asarray(batch["prefix_length"], jnp.int32), count)
    options = {"temperature": self.temperature, "top_k": self.top_k}
    drawn = complete(self.model, variables, repeated, lengths, rng, **options)
    clusters = variables["palette"]["clusters"]
    return {
      "completions": cluster_colors(drawn, clusters).reshape(shape[0], count, *shape[1:], 3),
      "quantized": cluster_colors(tokens, clusters).reshape(*shape, 3),
    }


def pixel_nats(
  logits: Float[Array, "b n k"], tokens: Int[Array, "b n"], visible: Bool[Array, "b n"] | None
) -> Float[Array, " b"]:
  """Returns each image's mean cross-entropy over its pixels, or over its masked pixels.

  An image without a masked pixel has the loss 0; OpenAI's code divides 0 by 0.
  """
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  if visible is None:
    return jnp.mean(nats, axis=-1)
  masked = jnp.sum(~visible, axis=-1)
  return jnp.sum(jnp.where(visible, 0.0, nats), axis=-1) / jnp.maximum(masked, 1)


def _take(batches: Iterable[Mapping[str, np.ndarray]], count: int) -> np.ndarray:
  """Returns the first `count` images, or all if there are fewer, as uint8."""
  images, found = [], 0
  for batch in batches:
    images.append(np.asarray(batch["image"]))
    found += len(images[-1])
    if found >= count:
      break
  if not images:
    raise ValueError("data.train: no images; expected some to fit the palette to")
  whole = np.concatenate(images)[:count]
  return np.clip(np.rint(whole), 0, 255).astype(np.uint8)


class PixelEvaluator(MeanEvaluator):
  """Means over images.

  Scores: "nats" and "bits" per pixel, "log_likelihood" (minus nats; higher is better), "images";
  where the predictions have them "bigram_nats" of the baseline, "class_loss" and "accuracy".
  """

  scores = (
    "nats", "bits", "log_likelihood", "images", "bigram_nats", "class_loss", "accuracy",
  )  # fmt: skip

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch.

    Args:
      batch: `mask` [b], True for real rows, optional.
      predictions: of `PixelModelling.predict`.
    """
    real = np.asarray(batch.get("mask", np.ones(len(predictions["nats"]))), bool)
    names = [n for n in ("nats", "bigram_nats", "class_loss", "correct") if n in predictions]
    sums = {n: float(np.asarray(predictions[n], np.float64)[real].sum()) for n in names}
    self.count(int(real.sum()), sums)

  def result(self) -> dict[str, float]:
    """Returns the scores by name."""
    means = self.means()
    if "correct" in means:
      means["accuracy"] = means.pop("correct")
    nats = means["nats"]
    scores = {"bits": nats / math.log(2), "log_likelihood": -nats, "images": float(self.images)}
    return {**means, **scores}


def count_bigrams(tokens: Integer[np.ndarray, "b n"], num_tokens: int) -> Int64[np.ndarray, "m k"]:
  """Returns how often token j (column) follows token i (row); the last row is for first tokens.

  Args:
    tokens: sequences of numbers in [0, num_tokens).
    num_tokens: k; the result has k + 1 rows.
  """
  previous = np.full_like(tokens, num_tokens)
  previous[:, 1:] = tokens[:, :-1]
  pairs = previous.astype(np.int64) * num_tokens + tokens
  counts = np.bincount(pairs.ravel(), minlength=(num_tokens + 1) * num_tokens)
  return counts.reshape(num_tokens + 1, num_tokens).astype(np.int64)


def log_bigrams(counts: Int64[np.ndarray, "m k"]) -> Float32[np.ndarray, "m k"]:
  """Returns the log-probabilities of each row of counts.

  Each row is smoothed by one observation distributed as all tokens are, with add-one smoothing.
  """
  overall = counts.sum(axis=0) + 1.0
  smoothed = counts + overall / overall.sum()
  return np.log(smoothed / smoothed.sum(axis=1, keepdims=True)).astype(np.float32)


def score_bigrams(
  tokens: Int[Array, "b n"], log_probabilities: Float[Array, "m k"]
) -> Float[Array, " b"]:
  """Returns the mean negative log-likelihood of each sequence's tokens, in nats."""
  first = jnp.full_like(tokens[:, :1], log_probabilities.shape[1])
  previous = jnp.concatenate([first, tokens[:, :-1]], axis=1)
  return -jnp.mean(log_probabilities[previous, tokens], axis=1)
