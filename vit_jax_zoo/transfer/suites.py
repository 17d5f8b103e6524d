"""Transfer suites: datasets, probes and reported scores.

A dataset that is not prepared is reported with the command that prepares it; the others continue.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from matplotlib.figure import Figure

from vit_jax_zoo.data.sources import KINDS, load_source
from vit_jax_zoo.data.sources.base import SlicedSource, Source
from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.metrics.feature_probes import (
  PROBES,
  FeatureProbe,
  Labelled,
  Linear,
  choose_features,
  create_probe,
)
from vit_jax_zoo.metrics.imagenet_variants import score_rankings
from vit_jax_zoo.training.feature_evaluation import report
from vit_jax_zoo.transfer import vtab as benchmarks
from vit_jax_zoo.transfer.extract import Extractor
from vit_jax_zoo.transfer.vtab import ImageNetVariant, ProbeData, VtabTask

SUITES = (*PROBES, "vtab", *benchmarks.IMAGENET)
"""All names of suites."""

PROBE_DATA: Mapping[str, Mapping[str, ProbeData]] = {
  name: benchmarks.FEW_SHOT if name == "few_shot" else benchmarks.PROBED for name in PROBES
}
"""Default datasets of each probe."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a suite on one dataset.

  Attributes:
    suite: its name.
    data: name of the dataset.
    scores: by name, fractions in [0, 1] and selected hyperparameters; "accuracy" is the main one.
      Empty if the dataset is missing.
    features: kind of feature: "features", or the selected layer.
    group: of VTAB's tasks.
    missing: how to get a missing dataset.
    figures: by name.
  """

  suite: str
  data: str
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  features: str | None = None
  group: str | None = None
  missing: str | None = None
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)

  @property
  def title(self) -> str:
    """Suite and dataset; one name if they are equal."""
    return _title(self.suite, self.data)


@dataclasses.dataclass(frozen=True)
class Request:
  """Suites and datasets to evaluate.

  Attributes:
    suites: keys of `SUITES`.
    data: sources (`folder:/path`), or names in the suites' tables; () for all of these.
    data_dir: TFDS data folder; None: its default.
    fit_split: training split of the sources in `data`.
    test_split: test split of these.
    probes: fields of the probes, by name.
  """

  suites: Sequence[str]
  data: Sequence[str] = ()
  data_dir: str | None = None
  fit_split: str = "train"
  test_split: str = "test"
  probes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    for suite in self.suites:
      if suite not in SUITES:
        raise ValueError(unknown_name("suite", suite, SUITES))
    if not self.suites:
      raise ValueError(f"no suite is given; choose from {', '.join(SUITES)}")

  def open(self, source: str, split: str, options: Mapping[str, Any]) -> Source:
    """Opens a split."""
    folder = {"data_dir": self.data_dir} if self.data_dir and source.startswith("tfds:") else {}
    return load_source(source, split, **options, **folder)

  def choose(self, suite: str, table: Mapping[str, Any], make: Callable[[str], Any]) -> dict:
    """Returns the datasets of a suite by name: from its table, or made by `make` from sources.

    Raises:
      ValueError: a name is neither in the table nor a source.
    """
    chosen = {}
    for name in self.data or table:
      if name.partition(":")[0] in KINDS and ":" in name:
        chosen[name] = make(name)
      elif name in table:
        chosen[name] = table[name]
      else:
        known = (*table, "folder:/path", "tfds:name", "demo:digits")
        raise ValueError(unknown_name(f"data for {suite}", name, known))
    return chosen


def run_suites(request: Request, extractor: Extractor) -> Iterator[Outcome]:
  """Yields the outcomes one by one.

  Raises:
    ValueError: one line, about an unknown name, or a model that a suite cannot evaluate.
  """
  jobs = [job for suite in request.suites for job in _jobs(suite, request)]
  cache: dict[Any, Labelled] = {}
  for number, (suite, name, job) in enumerate(jobs, start=1):
    logging.info("%s (%d of %d)", _title(suite, name), number, len(jobs))
    try:
      yield job(request, extractor, cache)
    except FileNotFoundError as error:
      yield Outcome(suite, name, missing=" ".join(str(error).split()))


Job = Callable[[Request, Extractor, dict[Any, Labelled]], Outcome]


def _jobs(suite: str, request: Request) -> Iterator[tuple[str, str, Job]]:
  if suite in PROBES:
    probe = create_probe(suite, **request.probes.get(suite, {}))
    make = lambda source: ProbeData(source, request.fit_split, request.test_split)  # noqa: E731
    for name, data in request.choose(suite, PROBE_DATA[suite], make).items():
      yield suite, name, _ProbeJob(suite, name, data, probe)
  elif suite == "vtab":
    for name, task in request.choose(suite, benchmarks.VTAB, _no_task).items():
      yield suite, name, _VtabJob(name, task)
  else:
    table = {suite: benchmarks.IMAGENET[suite]}
    make = lambda source: dataclasses.replace(  # noqa: E731
      table[suite], source=source, split=request.test_split, options={}, num_its_classes=None
    )
    for name, variant in request.choose(suite, table, make).items():
      yield suite, name, _VariantJob(suite, name, variant)


def _title(suite: str, data: str) -> str:
  return suite if suite == data else f"{suite} on {data}"


def _no_task(source: str) -> VtabTask:
  raise ValueError(f"--data={source}: not one of vtab's 19 tasks; give some of these, or no --data")


@dataclasses.dataclass(frozen=True)
class _ProbeJob:
  suite: str
  name: str
  data: ProbeData
  probe: FeatureProbe

  def __call__(self, request: Request, extractor: Extractor, cache: dict) -> Outcome:
    parts = [request.open(self.data.source, split, self.data.options)
             for split in (self.data.fit, self.data.test)]  # fmt: skip
    fit = _features(extractor, parts[0], cache, to_score=False)
    test = _features(extractor, parts[1], cache, to_score=True)
    return _outcome(self.suite, self.name, self.probe.title, self.probe(fit, test))


@dataclasses.dataclass(frozen=True)
class _VtabJob:
  name: str
  task: VtabTask

  def __call__(self, request: Request, extractor: Extractor, cache: dict) -> Outcome:
    del cache  # no other task uses the same images
    train, validation, test = (
      request.open(self.task.source, split, self.task.options)
      for split in (self.task.train, self.task.validation, self.task.test)
    )
    sizes = benchmarks.VTAB_TRAIN, benchmarks.VTAB_VALIDATION
    parts = [(source, range(min(size, len(source))))
             for source, size in zip((train, validation), sizes, strict=True)]  # fmt: skip
    fit = extractor.features(SlicedSource(f"{train.info.name} and {validation.info.name}", parts))
    held_out = np.arange(len(fit.labels)) >= len(parts[0][1])
    probe = Linear()
    found = probe(fit, extractor.features(test, to_score=True), held_out)
    return dataclasses.replace(
      _outcome("vtab", self.name, probe.title, found), group=self.task.group, figures={}
    )


@dataclasses.dataclass(frozen=True)
class _VariantJob:
  suite: str
  name: str
  data: ImageNetVariant

  def __call__(self, request: Request, extractor: Extractor, cache: dict) -> Outcome:
    del cache
    source = request.open(self.data.source, self.data.split, self.data.options)
    few = None if self.data.only_its_classes else 5
    ranked, labels = extractor.rankings(source, few)
    scores = score_rankings(ranked, labels, only_its_classes=self.data.only_its_classes)
    wanted = self.data.num_its_classes
    if wanted is not None and scores["classes"] != wanted:
      logging.warning("%s: %d classes occur, expected %d", self.name, scores["classes"], wanted)
    return Outcome(self.suite, self.name, scores)


def _features(
  extractor: Extractor, source: Source, cache: dict[Any, Labelled], *, to_score: bool
) -> Labelled:
  key = source.info.name, to_score
  if key not in cache:
    cache[key] = extractor.features(source, to_score=to_score)
  return cache[key]


def _outcome(suite: str, name: str, title: str, found: Mapping[str, Any]) -> Outcome:
  result = report(dict(found), f"{title}, {name}")
  return Outcome(suite, name, result.scores, choose_features(found), figures=result.figures)


def summarize_vtab(outcomes: Sequence[Outcome]) -> dict[str, float]:
  """Returns VTAB's means: of each complete group, and of all 19 tasks if complete."""
  scores = {outcome.data: outcome.scores["accuracy"] for outcome in outcomes if outcome.scores}
  means = {}
  for group in benchmarks.GROUPS:
    names = [name for name, task in benchmarks.VTAB.items() if task.group == group]
    if names and all(name in scores for name in names):
      means[group] = float(np.mean([scores[name] for name in names]))
  if all(name in scores for name in benchmarks.VTAB):
    means["mean"] = float(np.mean([scores[name] for name in benchmarks.VTAB]))
  return means
