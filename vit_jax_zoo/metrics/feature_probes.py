"""Frozen-feature evaluations: linear probes, few-shot ridge regression, k nearest neighbours.

The linear probes are iGPT's (Chen et al., 2020, section 3.5), without augmentation, fitted to all
images after selection of a hyperparameter on held-out ones. The layer is selected on these, too.
"""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.errors import check_fields, check_names


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Features, by name, and labels of the same images."""

  features: Mapping[str, Float[np.ndarray, "b *_"]]  # [b d]; [b v d] of v views of test images
  labels: Int[np.ndarray, " b"]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Features of one kind [n d], or [n v d], and their labels, int [n]."""

  features: np.ndarray
  labels: np.ndarray

  def __getitem__(self, rows: np.ndarray | slice) -> "Rows":
    return Rows(self.features[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class FeatureScore:
  """Scores of one kind of feature on the test images; "accuracy" is the main one."""

  scores: Mapping[str, float]
  validation: float | None = None  # accuracy on held-out images, if they were used for selection


@dataclasses.dataclass(frozen=True)
class FeatureProbe(abc.ABC):
  """Base of all probes; see `PROBES` for their names."""

  title: ClassVar[str]
  majority_vote: ClassVar[bool] = False  # over several views of a test image; else the first one

  # Number of layers around the selected one, evaluated as "concatenated": odd, or 0 (iGPT-XL: 5)
  concatenate: int = 0

  def __post_init__(self) -> None:
    if self.concatenate and (self.concatenate < 0 or self.concatenate % 2 == 0):
      raise ValueError(f"concatenate: {self.concatenate}; expected an odd number of layers, or 0")

  def __call__(
    self, fit: Labelled, test: Labelled, held_out: Bool[np.ndarray, " b"] | None = None
  ) -> dict[str, FeatureScore]:
    """Scores each kind of feature; `held_out` images of `fit` (default: a tenth) select."""

    def score(names: Sequence[str]) -> FeatureScore:
      train_rows, test_rows = (
        Rows(np.concatenate([data.features[n] for n in names], axis=-1), data.labels)
        for data in (fit, test)
      )
      if not self.majority_vote and test_rows.features.ndim == 3:
        test_rows = Rows(test_rows.features[:, 0], test_rows.labels)
      if len(fit.features) == 1 and not self.majority_vote:
        return FeatureScore(self.score(train_rows, test_rows))
      rows = hold_out(fit.labels) if held_out is None else held_out
      return self.select_and_score(train_rows, test_rows, rows)

    found = {name: score([name]) for name in fit.features}
    if self.concatenate:
      layers = [name for name in found if name.startswith("layer_")]
      found["concatenated"] = score(around(layers, choose_features(found), self.concatenate))
    return found

  def select_and_score(self, fit: Rows, test: Rows, held_out: np.ndarray) -> FeatureScore:
    """Returns the scores, with the accuracy on held-out images, for the selection of a layer."""
    validation = self.score(fit[~held_out], fit[held_out])["accuracy"]
    return FeatureScore(self.score(fit, test), validation)

  def score(self, fit: Rows, test: Rows) -> dict[str, float]:
    """Fits to `fit`, and returns the scores on `test` by name."""
    raise NotImplementedError


class _LinearProbe(FeatureProbe):
  majority_vote = True
  candidates: ClassVar[str]  # field with the values to choose from; without "s", the score's name

  def select_and_score(self, fit: Rows, test: Rows, held_out: np.ndarray) -> FeatureScore:
    values = getattr(self, self.candidates)
    validation = self.accuracies(fit[~held_out], fit[held_out], values)
    best = int(np.argmax(validation))
    (accuracy,) = self.accuracies(fit, test, values[best : best + 1])
    scores = {"accuracy": accuracy, self.candidates[:-1]: values[best]}
    return FeatureScore(scores, validation[best])

  @abc.abstractmethod
  def accuracies(self, fit: Rows, test: Rows, values: Sequence[float]) -> list[float]:
    """Returns the test accuracy for each value; with several views, by majority vote."""


@dataclasses.dataclass(frozen=True)
class Linear(_LinearProbe):
  """Logistic regression by L-BFGS: iGPT's for CIFAR and STL-10. Scores: "accuracy", "strength"."""

  title = "Linear probe"
  candidates = "strengths"

  strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)

  def accuracies(self, fit: Rows, test: Rows, values: Sequence[float]) -> list[float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    accuracies = []
    for strength in values:
      classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # scored as it is after `max_iter`
        classifier.fit(fit.features, fit.labels)
      predicted = classifier.predict(test.features.reshape(-1, test.features.shape[-1]))
      predicted = _vote(np.asarray(predicted).reshape(test.features.shape[:-1]))
      accuracies.append(float(np.mean(predicted == test.labels)))
    return accuracies


@dataclasses.dataclass(frozen=True)
class LinearSgd(_LinearProbe):
  """Softmax regression by SGD (not in scikit-learn): iGPT's for ImageNet. Score: also "rate"."""

  title = "Linear probe (SGD)"
  candidates = "rates"

  rates: tuple[float, ...] = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # decay to 0 with a cosine
  num_epochs: int = 100  # the paper: a million steps
  batch_size: int = 1024  # limited to the number of images

  def accuracies(self, fit: Rows, test: Rows, values: Sequence[float]) -> list[float]:
    num_classes = int(max(fit.labels.max(), test.labels.max())) + 1
    parameters, standardise = self.fit(fit, values, num_classes)
    hits = np.zeros(len(values))
    for start in range(0, len(test.labels), 4096):
      part = test[start : start + 4096]
      x = standardise(part.features)
      flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
      labels = np.asarray(_logits(parameters, flat)).argmax(axis=-1)
      predicted = np.stack([_vote(row.reshape(x.shape[:-1])) for row in labels])
      hits += (predicted == part.labels).sum(axis=1)
    return list((hits / len(test.labels)).tolist())

  def fit(self, data: Rows, rates: Sequence[float], num_classes: int) -> tuple[Any, Any]:
    """Returns weights [r d k] and bias [r k] for each rate, and the standardisation before."""
    mean, std = data.features.mean(axis=0), data.features.std(axis=0)
    std = np.where(std > 0, std, 1)
    standardise = lambda x: ((x - mean) / std).astype(np.float32)  # noqa: E731
    count, width = data.features.shape
    batch_size = min(self.batch_size, count)
    steps_per_epoch = count // batch_size
    parameters = jnp.zeros((len(rates), width, num_classes)), jnp.zeros((len(rates), num_classes))
    momenta = jax.tree.map(jnp.zeros_like, parameters)
    base, rng, step = np.asarray(rates, np.float32), np.random.default_rng(0), 0
    for _ in range(self.num_epochs):
      order = rng.permutation(count)
      for start in range(0, steps_per_epoch * batch_size, batch_size):
        batch = data[order[start : start + batch_size]]
        decay = (1 + np.cos(np.pi * step / (self.num_epochs * steps_per_epoch))) / 2
        x, labels = jnp.asarray(standardise(batch.features)), jnp.asarray(batch.labels, jnp.int32)
        rate = jnp.asarray(base * np.float32(decay))
        parameters, momenta = _sgd_step(parameters, momenta, x, labels, rate)
        step += 1
    return parameters, standardise


def _logits(parameters: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, "r n k"]:
  weights, bias = parameters
  return jnp.einsum("nd,rdk->rnk", x, weights) + bias[:, None]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _sgd_step(parameters: Any, momenta: Any, x: Array, labels: Array, rates: Array) -> Any:
  def loss(parameters: Any) -> Float[Array, ""]:
    logits = _logits(parameters, x)
    targets = jnp.broadcast_to(labels, logits.shape[:2])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.mean(losses, axis=1))  # each rate has its own parameters

  gradients = jax.grad(loss)(parameters)
  momenta = jax.tree.map(lambda m, g: jnp.float32(0.9) * m + g, momenta, gradients)
  move = lambda p, m: p - rates.reshape(-1, *(1,) * (p.ndim - 1)) * m  # noqa: E731
  return jax.tree.map(move, parameters, momenta), momenta


def majority_vote(labels: Int[Array, "v b"], rng: jax.Array) -> Int[Array, " b"]:
  """Returns the most frequent label of v views of each image; ties are broken at random."""
  agreeing = jnp.sum(labels[:, None] == labels[None], axis=1)
  # Tied labels have equally many views, so a random one of these views is a fair tie-break.
  chosen = jnp.argmax(agreeing + jax.random.uniform(rng, labels.shape), axis=0)
  return jnp.take_along_axis(labels, chosen[None], axis=0)[0]


def _vote(labels: Int[np.ndarray, "n *v"]) -> Int[np.ndarray, " n"]:
  if labels.ndim == 1:
    return labels
  return np.asarray(majority_vote(jnp.asarray(labels.T), jax.random.key(0)))


BIAS = 100.0  # the constant feature of few-shot regression, which is regularised like any other


@dataclasses.dataclass(frozen=True)
class FewShot(FeatureProbe):
  """Ridge regression on a few images per class, to targets of 1 and -1, as in the ViT paper (4.1).

  big_vision's constants. In float64, as the constant feature dominates the spectrum: float32 would
  lose at least three digits of the weights. Scores: mean "<n>_shot" and standard deviation
  "<n>_shot_std" over the seeds; "accuracy" is "5_shot" as in the paper, else that of most shots.
  """

  title = "Few-shot"

  shots: tuple[int, ...] = (1, 5, 10, 25)  # images per class
  seeds: tuple[int, ...] = (0, 1, 2)  # of the choice of images
  l2: float = 2.0**10

  def score(self, fit: Rows, test: Rows) -> dict[str, float]:
    num_classes = int(max(fit.labels.max(), test.labels.max())) + 1
    scores = {}
    for shots in self.shots:
      accuracies = []
      for seed in self.seeds:
        chosen = fit[choose_shots(fit.labels, shots, seed)]
        found = ridge_scores(chosen, test.features, num_classes, self.l2).argmax(axis=1)
        accuracies.append((found == test.labels).mean())
      scores[f"{shots}_shot"] = float(np.mean(accuracies))
      scores[f"{shots}_shot_std"] = float(np.std(accuracies))
    headline = 5 if 5 in self.shots else max(self.shots)
    return {"accuracy": scores[f"{headline}_shot"], **scores}


def choose_shots(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int[np.ndarray, " m"]:
  """Returns at most `shots` random rows per class, a subset of those of more shots."""
  rng = np.random.default_rng(seed)
  rows = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
  return np.concatenate([row[:shots] for row in rows])


def ridge_scores(
  fit: Rows, features: Float[np.ndarray, "m d"], num_classes: int, l2: float
) -> Float[np.ndarray, "m k"]:
  """Fits ridge regression to standardised features; returns the scores of other features."""
  from sklearn.linear_model import Ridge

  x = np.asarray(fit.features, np.float64)
  mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5

  def prepare(x: np.ndarray) -> np.ndarray:
    return np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)

  targets = np.where(fit.labels[:, None] == np.arange(num_classes), 1.0, -1.0)
  ridge = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(prepare(x), targets)
  return ridge.predict(prepare(np.asarray(features, np.float64))).reshape(-1, num_classes)


@dataclasses.dataclass(frozen=True)
class NearestNeighbours(FeatureProbe):
  """k nearest neighbours by cosine similarity; each votes with `exp(similarity / temperature)`.

  Wu et al., arXiv:1805.01978, section 3.4; `k` and temperature are DINO's. Ties go to the lowest
  class. Scores: "<k>_nn" for each number; "accuracy" is that of 20, else of the most.
  """

  title = "Nearest neighbours"

  neighbours: tuple[int, ...] = (1, 5, 10, 20)  # limited to the number of training images
  temperature: float | None = 0.07  # None: equal weights

  def score(self, fit: Rows, test: Rows) -> dict[str, float]:
    accuracies = {k: float((found == test.labels).mean()) for k, found in self.classify(fit, test)}
    headline = 20 if 20 in accuracies else max(accuracies)
    by_count = {f"{k}_nn": accuracy for k, accuracy in accuracies.items()}
    return {"accuracy": accuracies[headline]} | by_count

  def classify(self, fit: Rows, test: Rows) -> list[tuple[int, Int[np.ndarray, " m"]]]:
    """Returns the numbers of neighbours, each with the predicted labels of the test images."""
    from sklearn.neighbors import NearestNeighbors

    most = min(max(self.neighbours), len(fit.labels))
    search = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute")
    distances, nearest = search.fit(fit.features).kneighbors(test.features)
    weights = np.exp(-distances / self.temperature) if self.temperature else np.ones_like(distances)
    labels, rows, found = fit.labels[nearest], np.arange(len(nearest))[:, None], []
    for count in self.neighbours:
      votes = np.zeros((len(nearest), int(fit.labels.max()) + 1))
      np.add.at(votes, (rows, labels[:, :count]), weights[:, :count])
      found.append((count, votes.argmax(axis=1)))
    return found


PROBES: dict[str, type[FeatureProbe]] = {
  "linear": Linear,
  "linear_sgd": LinearSgd,
  "few_shot": FewShot,
  "knn": NearestNeighbours,
}


def create_probe(name: str, **fields: Any) -> FeatureProbe:
  """Returns a probe from its config section; ValueError for an unknown or empty field."""
  check_names("probe", [name], PROBES)
  check_fields(f"the probe {name!r}", PROBES[name], fields)
  for field, value in fields.items():
    if isinstance(value, list | tuple) and not value:
      raise ValueError(f"probe {name!r}: {field} is empty; expected at least one value")
  plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  return PROBES[name](**plain)


def create_probes(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, FeatureProbe]:
  """Returns the probes of a config's evaluations, those with `fit_split`, by name."""
  probes = {}
  for name, spec in evaluations.items():
    if "fit_split" in spec:
      probes[name] = create_probe(**{"name": "linear"} | dict(spec.get("probe") or {}))
    elif "probe" in spec:
      raise ValueError(f"data.eval.{name}.fit_split: not set; expected the probe's training split")
  return probes


def hold_out(labels: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
  """Returns a random tenth of the images for selection; ValueError if there are too few."""
  held_out = np.random.default_rng(0).permutation(len(labels)) < round(0.1 * len(labels))
  if not held_out.any() or len(np.unique(labels[~held_out])) < 2:
    given = f"{len(labels)} of {len(np.unique(labels))} classes"
    raise ValueError(f"probe: too few images, {given}; use a larger split")
  return held_out


def choose_features(found: Mapping[str, FeatureScore]) -> str:
  """Returns the kind of feature to report: the best layer on held-out images, or "features"."""
  if not (layers := [name for name in found if name.startswith("layer_")]):
    return "features" if "features" in found else next(iter(found))
  return max(layers, key=lambda name: found[name].validation or 0.0)


def around(layers: Sequence[str], best: str, count: int) -> list[str]:
  """Returns consecutive layers centred on the best one, as far as the ends allow.

  >>> around(["a", "b", "c", "d", "e", "f"], "e", 3), around(["a", "b", "c", "d"], "a", 3)
  (['d', 'e', 'f'], ['a', 'b', 'c'])
  """
  if len(layers) < count:
    raise ValueError(f"concatenate: {count}; expected at most the {len(layers)} layers")
  first = min(max(list(layers).index(best) - count // 2, 0), len(layers) - count)
  return list(layers[first : first + count])


def by_layer(found: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "b _"]]:
  """Splits `layers` of `Task.features` into "layer_0", "layer_1", ..."""
  arrays = {name: np.asarray(array, np.float32) for name, array in found.items()}
  layers = arrays.pop("layers", np.zeros((0, 0, 0), np.float32))
  digits = len(str(max(layers.shape[1] - 1, 0)))
  return {f"layer_{i:0{digits}d}": layers[:, i] for i in range(layers.shape[1])} | arrays
