"""Transfer suites: datasets, probes and reported scores.

VTAB: Zhai et al., arXiv:1910.04867, with the splits of google-research/task_adaptation; few-shot:
big_vision's; variants of ImageNet: ReaL (arXiv:2006.07159), V2 (arXiv:1902.10811), -A
(arXiv:1907.07174), -R (arXiv:2006.16241).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Int
from matplotlib.figure import Figure

from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources import KINDS, load_source
from vit_jax_zoo.data.sources.base import Example, SlicedSource, Source
from vit_jax_zoo.data.transforms import Transform, pixels
from vit_jax_zoo.data.transforms.image import MultiHot
from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.inference.base import Trained
from vit_jax_zoo.metrics import feature_probes as probing
from vit_jax_zoo.metrics.classification import score_rankings
from vit_jax_zoo.metrics.feature_probes import Labelled
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.evaluate import collect_features, predict_batches, report
from vit_jax_zoo.training.train_step import compile_predict_step

NATURAL, SPECIALIZED, STRUCTURED = "natural", "specialized", "structured"

VTAB_TRAIN, VTAB_VALIDATION = 800, 200
"""VTAB-1k trains on the first 800 images of a task's training split, selects hyperparameters on the
first 200 of its validation split, and retrains on both for the test."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset of a suite: its source and the splits that the suite uses, in order."""

  source: str  # as in `data/sources`
  splits: tuple[str, ...] = ("train", "test")  # VTAB: train, validation, test; ImageNet's: scored
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the source
  group: str = ""  # of VTAB's tasks
  only_its_classes: bool = False  # ranks only the classes that occur in the dataset
  num_its_classes: int | None = None  # number of these classes in the published dataset


def _task(group: str, name: str, splits: tuple[str, str, str], **options: Any) -> Dataset:
  return Dataset(f"tfds:{name}", splits, options, group)


_OWN = ("train", "validation", "test")
_CLEVR = ("train[:90%]", "train[90%:]", "validation")  # test images have no annotations
_NORB = {"splits": ("train", "test[:50%]", "test[50%:]"), "image_key": "image"}


def _held_out(percent: int) -> tuple[str, str, str]:
  return f"train[:{percent}%]", f"train[{percent}%:]", "test"


def _cut(end: int, test: int) -> tuple[str, str, str]:
  return f"train[:{end}%]", f"train[{end}%:{test}%]", f"train[{test}%:]"


_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300"

VTAB = {
  "caltech101": _task(NATURAL, "caltech101", _held_out(90)),
  "cifar100": _task(NATURAL, "cifar100", _held_out(90)),
  "dtd": _task(NATURAL, "dtd", _OWN),
  "oxford_flowers102": _task(NATURAL, "oxford_flowers102", _OWN),
  "oxford_iiit_pet": _task(NATURAL, "oxford_iiit_pet", _held_out(80)),
  "sun397": _task(NATURAL, "sun397/tfds", _OWN),
  "svhn": _task(NATURAL, "svhn_cropped", _held_out(90)),
  "patch_camelyon": _task(SPECIALIZED, "patch_camelyon", _OWN),
  "eurosat": _task(SPECIALIZED, "eurosat/rgb", _cut(60, 80)),
  "resisc45": _task(SPECIALIZED, "resisc45", _cut(60, 80)),
  "diabetic_retinopathy": _task(SPECIALIZED, _RETINOPATHY, _OWN),
  "clevr_count": _task(STRUCTURED, "clevr", _CLEVR, derived_labels="clevr_count"),
  "clevr_distance": _task(STRUCTURED, "clevr", _CLEVR, derived_labels="clevr_distance"),
  "dmlab": _task(STRUCTURED, "dmlab", _OWN),
  **{
    f"dsprites_{rule}": _task(
      STRUCTURED, "dsprites", _cut(80, 90), derived_labels=f"dsprites_{rule}"
    )
    for rule in ("x_position", "orientation")
  },
  "kitti_distance": _task(STRUCTURED, "kitti", _OWN, derived_labels="kitti_distance"),
  "smallnorb_azimuth": _task(STRUCTURED, "smallnorb", **_NORB, label_key="label_azimuth"),
  "smallnorb_elevation": _task(STRUCTURED, "smallnorb", **_NORB, label_key="label_elevation"),
}

FEW_SHOT = {
  "caltech101": Dataset("tfds:caltech101"),
  "cars196": Dataset("tfds:cars196"),
  "cifar100": Dataset("tfds:cifar100"),
  "dtd": Dataset("tfds:dtd"),
  "oxford_iiit_pet": Dataset("tfds:oxford_iiit_pet"),
  "uc_merced": Dataset("tfds:uc_merced", ("train[:1000]", "train[1000:]")),
  "imagenet2012": Dataset("tfds:imagenet2012", ("train[:65000]", "validation")),
}
"""Datasets of big_vision's few-shot evaluation; of ImageNet the first 65,000 training images."""

PROBED = {
  "cifar10": Dataset("tfds:cifar10"),
  "cifar100": Dataset("tfds:cifar100"),
  "stl10": Dataset("tfds:stl10"),
  "imagenet2012": Dataset("tfds:imagenet2012", ("train", "validation")),
}
"""Datasets of linear probes (iGPT's table 1), and of k nearest neighbours."""

IMAGENET = {
  "imagenet": Dataset("tfds:imagenet2012", ("validation",)),
  "real": Dataset("tfds:imagenet2012_real", ("validation",), {"label_key": "real_label"}),
  "v2": Dataset("tfds:imagenet_v2/matched-frequency", ("test",)),
  "a": Dataset("tfds:imagenet_a", ("test",), only_its_classes=True, num_its_classes=200),
  "r": Dataset("tfds:imagenet_r", ("test",), only_its_classes=True, num_its_classes=200),
}
"""Images for a classifier of ImageNet's 1000 classes."""

SUITES = (*probing.PROBES, "vtab", *IMAGENET)


@dataclasses.dataclass(frozen=True)
class Prepare(Transform):
  """`image`: encoded bytes or pixels -> preprocessed by `Trained.prepare`; keeps a `label`."""

  name = "prepare"

  prepare: Callable[[np.ndarray], Mapping[str, Any]]

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the preprocessed example."""
    del rng
    image = self.prepare(pixels(example["image"]))["image"]
    return {"image": image} | ({"label": example["label"]} if "label" in example else {})


class Extractor:
  """Applies a model to datasets, on all local devices; ValueError without the needed output."""

  def __init__(self, trained: Trained, *, batch_size: int = 128, **reading: Any) -> None:
    """Copies the model to all devices; rounds `batch_size` up to a multiple of their number."""
    if batch_size < 1:
      raise ValueError(f"batch_size: {batch_size}; expected an integer, at least 1")
    self._trained = trained
    self._mesh = sharding.create_mesh({"data": -1, "fsdp": 1, "model": 1})
    ways = sharding.batch_ways(self._mesh)
    self._reading: dict[str, Any] = {**reading, "batch_size": -(-batch_size // ways) * ways}
    self._whole = sharding.replicated(self._mesh)
    self._variables = jax.device_put(trained.variables, self._whole)
    self._features_step = compile_predict_step(trained.task.features, self._whole, self._mesh)

  def features(self, source: Source, *, to_score: bool = False) -> Labelled:
    """Returns features by kind, [b d], or with `to_score` of all views, [b v d], and labels."""
    task = self._trained.task
    if type(task).features is Task.features:
      raise ValueError(f"{self._trained.source}: no features; its task is {type(task).__name__}")
    batches, views = self._batches(source), task.feature_views if to_score else 1
    return collect_features(
      self._features_step, self._variables, batches, self._mesh, name=source.info.name, views=views
    )

  def rankings(
    self, source: Source, keep: int | None = None
  ) -> tuple[Int[np.ndarray, "n r"], Bool[np.ndarray, "n k"]]:
    """Returns the model's classes from most to least probable, and the correct ones."""
    task: Any = self._trained.task
    count, expected = getattr(task, "num_classes", None), source.info.num_classes
    if count is None:
      raise ValueError(f"{self._trained.source}: not a classifier; this suite scores its classes")
    if expected not in (None, count):
      problem = f"{self._trained.source}: {count} classes; expected the {expected} of"
      raise ValueError(f"{problem} {source.info.name}, in order")
    task = dataclasses.replace(task, top_k=min(keep or count, count))
    step = compile_predict_step(task.predict, self._whole, self._mesh)
    batches, ranked, labels = self._batches(source, MultiHot(count)), [], []
    progress = (source.info.name, len(batches))
    for batch, found in predict_batches(step, self._variables, batches, self._mesh, *progress):
      real = np.asarray(batch["mask"], bool)
      ranked.append(np.asarray(found["labels"], np.int32)[real])
      labels.append(np.asarray(batch["label"])[real] > 0)
    return np.concatenate(ranked), np.concatenate(labels)

  def _batches(self, source: Source, *transforms: Transform) -> pipeline.EvalBatches:
    steps = (Prepare(self._trained.prepare), *transforms)
    return pipeline.eval_batches(source, steps, **self._reading)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a suite on one dataset."""

  suite: str  # its name
  data: str  # name of the dataset
  # fractions in [0, 1] and selected hyperparameters by name, "accuracy" first; {}: missing dataset
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  features: str | None = None  # kind of feature: "features", or the selected layer
  group: str = ""  # of VTAB's tasks
  missing: str | None = None  # how to get a missing dataset
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)  # by name

  @property
  def title(self) -> str:
    """Suite and dataset; one name if they are equal."""
    return self.suite if self.suite == self.data else f"{self.suite} on {self.data}"


@dataclasses.dataclass(frozen=True)
class Request:
  """Suites and datasets to evaluate."""

  suites: Sequence[str]  # keys of `SUITES`
  data: Sequence[str] = ()  # sources (`folder:/path`), or names in suites' tables; (): all of these
  data_dir: str | None = None  # TFDS data folder; None: its default
  fit_split: str = "train"  # training split of the sources in `data`
  test_split: str = "test"  # test split of these
  probes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # their fields

  def __post_init__(self) -> None:
    check_names("suite", self.suites, SUITES)
    if not self.suites:
      raise ValueError(f"--suite: missing; expected some of {', '.join(SUITES)}")

  def open(self, data: Dataset) -> list[Source]:
    """Opens the splits of a dataset."""
    is_tfds = data.source.startswith("tfds:")
    folder = {"data_dir": self.data_dir} if self.data_dir and is_tfds else {}
    return [load_source(data.source, split, **data.options, **folder) for split in data.splits]


def run_suites(request: Request, extractor: Extractor) -> Iterator[Outcome]:
  """Yields the outcomes; those of missing datasets have the command that prepares them."""
  run = _Run(request, extractor)
  jobs = [job for suite in request.suites for job in run.jobs(suite)]
  for number, (empty, evaluate) in enumerate(jobs, start=1):
    logging.info("%s (%d of %d)", empty.title, number, len(jobs))
    try:
      yield dataclasses.replace(empty, **evaluate())
    except FileNotFoundError as error:
      yield dataclasses.replace(empty, missing=" ".join(str(error).split()))


@dataclasses.dataclass(frozen=True)
class _Run:
  request: Request
  extractor: Extractor
  cache: dict[Any, Labelled] = dataclasses.field(default_factory=dict)

  def jobs(self, suite: str) -> Iterator[tuple[Outcome, Callable[[], dict[str, Any]]]]:
    """Yields, for each dataset, its outcome without scores, and the function that adds these."""
    splits = (self.request.fit_split, self.request.test_split)
    evaluate: Callable[..., dict[str, Any]]
    if suite in probing.PROBES:
      probe = probing.create_probe(suite, **self.request.probes.get(suite, {}))
      table = FEW_SHOT if suite == "few_shot" else PROBED
      given, evaluate = Dataset("", splits), functools.partial(self.probe, probe)
    elif suite == "vtab":
      table, given, evaluate = VTAB, None, self.vtab
    else:
      published = IMAGENET[suite]
      given = Dataset("", splits[1:], only_its_classes=published.only_its_classes)
      table, evaluate = {suite: published}, self.variant
    for name in dict.fromkeys(self.request.data or table):
      if name.partition(":")[0] in KINDS and ":" in name:
        if given is None:
          wrong = f"--data={name}: not one of {suite}'s {len(table)} tasks"
          raise ValueError(f"{wrong}; expected these, or no --data")
        data = dataclasses.replace(given, source=name)
      elif name in table:
        data = table[name]
      else:
        names = (*table, "folder:/path", "tfds:name", "demo:digits")
        raise ValueError(unknown_name(f"data for {suite}", name, names))
      yield Outcome(suite, name, group=data.group), functools.partial(evaluate, data, name)

  def probe(self, probe: probing.FeatureProbe, data: Dataset, name: str) -> dict[str, Any]:
    fit, test = self.request.open(data)
    for source, to_score in ((fit, False), (test, True)):
      key = source.info.name, to_score
      if key not in self.cache:
        self.cache[key] = self.extractor.features(source, to_score=to_score)
    found = probe(self.cache[fit.info.name, False], self.cache[test.info.name, True])
    result = report(found, f"{probe.title}, {name}")
    chosen = probing.choose_features(found)
    return {"scores": result.scores, "features": chosen, "figures": result.figures}

  def vtab(self, task: Dataset, name: str) -> dict[str, Any]:
    train, validation, test = self.request.open(task)
    sizes = ((train, VTAB_TRAIN), (validation, VTAB_VALIDATION))
    parts = [(source, range(min(size, len(source)))) for source, size in sizes]
    both = SlicedSource(f"{train.info.name} and {validation.info.name}", parts)
    fit = self.extractor.features(both)
    held_out = np.arange(len(fit.labels)) >= len(parts[0][1])
    found = probing.Linear()(fit, self.extractor.features(test, to_score=True), held_out)
    return {"scores": report(found, name).scores, "features": probing.choose_features(found)}

  def variant(self, data: Dataset, name: str) -> dict[str, Any]:
    (source,) = self.request.open(data)
    ranked, labels = self.extractor.rankings(source, None if data.only_its_classes else 5)
    scores = score_rankings(ranked, labels, only_its_classes=data.only_its_classes)
    expected = data.num_its_classes
    if expected not in (None, scores["classes"]):
      logging.warning("%s: %d classes occur, expected %d", name, scores["classes"], expected)
    return {"scores": scores}


def vtab_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
  """Returns VTAB's means: of each complete group, and of all 19 tasks if complete."""
  scores = {outcome.data: outcome.scores["accuracy"] for outcome in outcomes if outcome.scores}
  groups = {"mean": list(VTAB)}
  for name, task in VTAB.items():
    groups.setdefault(task.group, []).append(name)
  complete = {group: names for group, names in groups.items() if scores.keys() >= set(names)}
  return {k: float(np.mean([scores[name] for name in names])) for k, names in complete.items()}
