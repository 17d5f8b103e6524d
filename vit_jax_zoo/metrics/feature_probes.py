"""Frozen-feature evaluations, by name.

    linear      logistic regression by L-BFGS; regularisation selected on held-out images
    linear_sgd  the same by SGD; learning rate selected on held-out images
    few_shot    ridge regression on a few images per class, see `few_shot.py`
    knn         k nearest neighbours, see `knn.py`

With features of several layers, the layer is selected on images held out from the training images;
the test images select nothing. `concatenate` also evaluates the concatenation of the layers around
it, as iGPT-XL's 15360 features are five layers'. With several views of the test images (masks of a
BERT model), linear probes use a majority vote, the others the first view.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from vit_jax_zoo.errors import check_names, field_names, unknown_name
from vit_jax_zoo.metrics import few_shot, knn
from vit_jax_zoo.metrics.linear_probe import (
  RATES,
  STRENGTHS,
  Labelled,
  SgdRecipe,
  fit_by_sgd,
  hold_out,
  probe,
)


@dataclasses.dataclass(frozen=True)
class FeatureScore:
  """Scores of one kind of feature.

  Attributes:
    scores: on the test images, by name; "accuracy" is the main one.
    validation: accuracy on held-out images; None if nothing was selected.
  """

  scores: Mapping[str, float]
  validation: float | None = None


Arrays: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Features of one kind [n d], and their labels, int [n]."""


@dataclasses.dataclass(frozen=True)
class FeatureProbe(abc.ABC):
  """Base of all probes; see `PROBES` for their names.

  Attributes:
    concatenate: also evaluate the concatenation of this many consecutive layers around the selected
      one, as "concatenated"; an odd number, or 0.
  """

  title: ClassVar[str]
  votes: ClassVar[bool] = False

  concatenate: int = 0

  def __post_init__(self) -> None:
    if self.concatenate and (self.concatenate < 0 or self.concatenate % 2 == 0):
      raise ValueError(
        f"concatenate is {self.concatenate}; expected an odd number of layers, or 0 for none"
      )

  def __call__(
    self, fit: Labelled, test: Labelled, held_out: Bool[np.ndarray, " b"] | None = None
  ) -> dict[str, FeatureScore]:
    """Scores each kind of feature.

    Args:
      fit: training images.
      test: test images.
      held_out: which of `fit` select hyperparameters; a tenth by default.

    Raises:
      ValueError: there are too few images or classes.
    """
    choose = len(fit.features) > 1
    found = {name: self._ask([name], fit, test, held_out, choose=choose) for name in fit.features}
    if self.concatenate:
      layers = around([n for n in found if _is_layer(n)], choose_features(found), self.concatenate)
      found["concatenated"] = self._ask(layers, fit, test, held_out, choose=choose)
    return found

  def _ask(
    self,
    names: Sequence[str],
    fit: Labelled,
    test: Labelled,
    held_out: np.ndarray | None,
    *,
    choose: bool,
  ) -> FeatureScore:
    """Scores features of these names, side by side."""
    known = np.concatenate([fit.features[name] for name in names], axis=-1)
    asked = np.concatenate([test.features[name] for name in names], axis=-1)
    asked = asked if self.votes or asked.ndim == 2 else asked[:, 0]
    return self._score_one((known, fit.labels), (asked, test.labels), held_out, choose=choose)

  def _score_one(
    self, fit: Arrays, test: Arrays, held_out: np.ndarray | None, *, choose: bool
  ) -> FeatureScore:
    if not choose:
      return FeatureScore(self.score(fit, test))
    held_out = hold_out(fit[1]) if held_out is None else held_out
    chosen = self.score(
      (fit[0][~held_out], fit[1][~held_out]), (fit[0][held_out], fit[1][held_out])
    )
    return FeatureScore(self.score(fit, test), chosen["accuracy"])

  @abc.abstractmethod
  def score(self, fit: Arrays, test: Arrays) -> dict[str, float]:
    """Fits to `fit`, and returns the scores on `test` by name."""


@dataclasses.dataclass(frozen=True)
class Linear(FeatureProbe):
  """Logistic regression by L-BFGS: iGPT's probe for CIFAR and STL-10.

  Scores: "accuracy", and the selected inverse regularisation "strength".

  Attributes:
    strengths: candidates.
  """

  title = "Linear probe"
  votes = True

  strengths: tuple[float, ...] = STRENGTHS

  def _score_one(
    self, fit: Arrays, test: Arrays, held_out: np.ndarray | None, *, choose: bool
  ) -> FeatureScore:
    del choose  # there always is something to choose
    parts = Labelled({"": fit[0]}, fit[1]), Labelled({"": test[0]}, test[1])
    found = probe(*parts, strengths=self.strengths, held_out=held_out)[""]
    return FeatureScore({"accuracy": found.test, "strength": found.strength}, found.validation)

  def score(self, fit: Arrays, test: Arrays) -> dict[str, float]:
    """Selects the strength on a tenth of `fit`, fits to all of it, and scores."""
    return dict(self._score_one(fit, test, None, choose=True).scores)


@dataclasses.dataclass(frozen=True)
class LinearSgd(FeatureProbe):
  """Softmax regression by SGD: iGPT's probe for ImageNet.

  Scores: "accuracy", and the selected learning "rate".

  Attributes:
    rates: candidates.
    num_epochs: see `SgdRecipe`.
    batch_size: see `SgdRecipe`.
  """

  title = "Linear probe (SGD)"
  votes = True

  rates: tuple[float, ...] = RATES
  num_epochs: int = SgdRecipe.num_epochs
  batch_size: int = SgdRecipe.batch_size

  def _score_one(
    self, fit: Arrays, test: Arrays, held_out: np.ndarray | None, *, choose: bool
  ) -> FeatureScore:
    del choose
    held_out = hold_out(fit[1]) if held_out is None else held_out
    num_classes = int(max(fit[1].max(), test[1].max())) + 1
    recipe = SgdRecipe(self.rates, num_epochs=self.num_epochs, batch_size=self.batch_size)
    searched = fit_by_sgd(fit[0][~held_out], fit[1][~held_out], num_classes, recipe)
    reached = searched.accuracies(fit[0][held_out], fit[1][held_out])
    best = int(np.argmax(reached))
    recipe = dataclasses.replace(recipe, rates=(self.rates[best],))
    (accuracy,) = fit_by_sgd(*fit, num_classes, recipe).accuracies(*test)
    return FeatureScore({"accuracy": accuracy, "rate": self.rates[best]}, reached[best])

  def score(self, fit: Arrays, test: Arrays) -> dict[str, float]:
    """Selects the rate on a tenth of `fit`, fits to all of it, and scores."""
    return dict(self._score_one(fit, test, None, choose=True).scores)


@dataclasses.dataclass(frozen=True)
class FewShot(FeatureProbe):
  """Ridge regression on a few images per class, see `few_shot.py`.

  Scores: "<n>_shot", the mean over the seeds, and "<n>_shot_std", their standard deviation; and
  "accuracy", which is "5_shot" as in the ViT paper, else that of most shots.

  Attributes:
    shots: images per class.
    seeds: of the choice of images.
    l2: regularisation.
  """

  title = "Few-shot"

  shots: tuple[int, ...] = few_shot.SHOTS
  seeds: tuple[int, ...] = few_shot.SEEDS
  l2: float = few_shot.L2

  def score(self, fit: Arrays, test: Arrays) -> dict[str, float]:
    """Returns mean and standard deviation for each number of shots."""
    found = few_shot.few_shot_accuracies(
      *fit, *test, shots=self.shots, seeds=self.seeds, l2=self.l2
    )
    headline = 5 if 5 in found else max(found)
    scores = {"accuracy": float(np.mean(found[headline]))}
    for count, accuracies in found.items():
      scores[f"{count}_shot"] = float(np.mean(accuracies))
      scores[f"{count}_shot_std"] = float(np.std(accuracies))
    return scores


@dataclasses.dataclass(frozen=True)
class NearestNeighbours(FeatureProbe):
  """k nearest neighbours, see `knn.py`.

  Scores: "<k>_nn" for each number of neighbours; "accuracy" is that of 20, else of the most.

  Attributes:
    neighbours: numbers of neighbours.
    temperature: of the vote weights; None: equal weights.
  """

  title = "Nearest neighbours"

  neighbours: tuple[int, ...] = knn.NEIGHBOURS
  temperature: float | None = knn.TEMPERATURE

  def score(self, fit: Arrays, test: Arrays) -> dict[str, float]:
    """Returns the accuracy for each number of neighbours."""
    found = knn.classify_by_neighbours(
      *fit, test[0], neighbours=self.neighbours, temperature=self.temperature
    )
    shares = {count: float((labels == test[1]).mean()) for count, labels in found.items()}
    headline = knn.HEADLINE if knn.HEADLINE in shares else max(shares)
    return {"accuracy": shares[headline]} | {f"{k}_nn": share for k, share in shares.items()}


PROBES: dict[str, type[FeatureProbe]] = {
  "linear": Linear,
  "linear_sgd": LinearSgd,
  "few_shot": FewShot,
  "knn": NearestNeighbours,
}


def create_probe(name: str, **fields: Any) -> FeatureProbe:
  """Returns a probe from its config section.

  Raises:
    ValueError: one line, about an unknown name or field, or an empty one.
  """
  if name not in PROBES:
    raise ValueError(unknown_name("probe", name, PROBES))
  check_names(f"field of the probe {name!r}", fields, field_names(PROBES[name]))
  for field, value in fields.items():
    if isinstance(value, list | tuple) and not value:
      raise ValueError(f"{field} of the probe {name!r} is empty; name at least one value")
  plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  return PROBES[name](**plain)


def create_probes(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, FeatureProbe]:
  """Returns the probes of a config's evaluations by name; linear ones by default.

  Args:
    evaluations: those with a `fit_split` are probes; `probe` has the name and fields.

  Raises:
    ValueError: one line, about an invalid field of a probe.
  """
  probes = {}
  for name, spec in evaluations.items():
    if "fit_split" in spec:
      probes[name] = create_probe(**{"name": "linear"} | dict(spec.get("probe") or {}))
    elif "probe" in spec:
      raise ValueError(f"the evaluation {name!r} is a probe; set the fit_split that it learns from")
  return probes


def choose_features(found: Mapping[str, FeatureScore]) -> str:
  """Returns the kind of feature to report: the best layer on held-out images, or "features"."""
  layers = [name for name in found if _is_layer(name)]
  if not layers:
    return "features" if "features" in found else next(iter(found))
  return max(layers, key=lambda name: found[name].validation or 0.0)


def around(layers: Sequence[str], best: str, count: int) -> list[str]:
  """Returns consecutive layers centred on the best one, as far as the ends allow.

  >>> around(["a", "b", "c", "d", "e", "f"], "e", 3), around(["a", "b", "c", "d"], "a", 3)
  (['d', 'e', 'f'], ['a', 'b', 'c'])

  Raises:
    ValueError: there are fewer layers.
  """
  if len(layers) < count:
    raise ValueError(f"the probe shall concatenate {count} layers, but there are {len(layers)}")
  first = min(max(list(layers).index(best) - count // 2, 0), len(layers) - count)
  return list(layers[first : first + count])


def _is_layer(name: str) -> bool:
  return name.startswith("layer_")


def by_layer(found: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "b _"]]:
  """Splits `layers` of `Task.features` into "layer_0", "layer_1", ..."""
  arrays = {name: np.asarray(array, np.float32) for name, array in found.items()}
  layers = arrays.pop("layers", np.zeros((0, 0, 0), np.float32))
  digits = len(str(max(layers.shape[1] - 1, 0)))
  return {f"layer_{i:0{digits}d}": layers[:, i] for i in range(layers.shape[1])} | arrays
