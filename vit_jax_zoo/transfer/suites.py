"""Transfer suites: datasets, probes and reported scores."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from matplotlib.figure import Figure

from vit_jax_zoo.data.sources import KINDS, load_source
from vit_jax_zoo.data.sources.base import SlicedSource, Source
from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.metrics import feature_probes as probing
from vit_jax_zoo.metrics.classification import score_rankings
from vit_jax_zoo.training.evaluate import report
from vit_jax_zoo.transfer import vtab as benchmarks
from vit_jax_zoo.transfer.extract import Extractor
from vit_jax_zoo.transfer.vtab import ImageNetVariant, ProbeData, VtabTask

SUITES = (*probing.PROBES, "vtab", *benchmarks.IMAGENET)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a suite on one dataset."""

  suite: str  # its name
  data: str  # name of the dataset
  # fractions in [0, 1] and selected hyperparameters by name, "accuracy" first; {}: missing dataset
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  features: str | None = None  # kind of feature: "features", or the selected layer
  group: str | None = None  # of VTAB's tasks
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

  def open(self, source: str, split: str, options: Mapping[str, Any]) -> Source:
    """Opens a split."""
    folder = {"data_dir": self.data_dir} if self.data_dir and source.startswith("tfds:") else {}
    return load_source(source, split, **options, **folder)

  def choose(self, suite: str, table: Mapping[str, Any], make: Callable[[str], Any]) -> dict:
    """Returns the datasets of a suite by name: from its table, or made by `make` from sources."""
    datasets = {}
    for name in self.data or table:
      if name.partition(":")[0] in KINDS and ":" in name:
        datasets[name] = make(name)
      elif name in table:
        datasets[name] = table[name]
      else:
        names = (*table, "folder:/path", "tfds:name", "demo:digits")
        raise ValueError(unknown_name(f"data for {suite}", name, names))
    return datasets


def run_suites(request: Request, extractor: Extractor) -> Iterator[Outcome]:
  """Yields the outcomes; those of missing datasets have the command that prepares them."""
  run = _Run(request, extractor, {})
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
  cache: dict[Any, probing.Labelled]

  def jobs(self, suite: str) -> Iterator[tuple[Outcome, Callable[[], dict[str, Any]]]]:
    """Yields, for each dataset, its outcome without scores, and the function that adds these."""
    request = self.request
    table: Mapping[str, Any]
    if suite in probing.PROBES:
      probe = probing.create_probe(suite, **request.probes.get(suite, {}))
      table = benchmarks.FEW_SHOT if suite == "few_shot" else benchmarks.PROBED
      make = functools.partial(ProbeData, fit=request.fit_split, test=request.test_split)
      evaluate = functools.partial(self.probe, probe)
    elif suite == "vtab":
      table, make, evaluate = benchmarks.VTAB, _no_task, self.vtab
    else:
      table, evaluate = {suite: benchmarks.IMAGENET[suite]}, self.variant
      replaced = {"split": request.test_split, "options": {}, "num_its_classes": None}
      make = lambda source: dataclasses.replace(table[suite], source=source, **replaced)  # noqa: E731
    for name, data in request.choose(suite, table, make).items():
      group = data.group if suite == "vtab" else None
      yield Outcome(suite, name, group=group), functools.partial(evaluate, data, name)

  def probe(self, probe: probing.FeatureProbe, data: ProbeData, name: str) -> dict[str, Any]:
    splits = (data.fit, data.test)
    fit, test = (self.request.open(data.source, split, data.options) for split in splits)
    for source, to_score in ((fit, False), (test, True)):
      key = source.info.name, to_score
      if key not in self.cache:
        self.cache[key] = self.extractor.features(source, to_score=to_score)
    found = probe(self.cache[fit.info.name, False], self.cache[test.info.name, True])
    result = report(found, f"{probe.title}, {name}")
    features = probing.choose_features(found)
    return {"scores": result.scores, "features": features, "figures": result.figures}

  def vtab(self, task: VtabTask, name: str) -> dict[str, Any]:
    splits, source = (task.train, task.validation, task.test), task.source
    train, validation, test = (self.request.open(source, s, task.options) for s in splits)
    sizes = ((train, benchmarks.VTAB_TRAIN), (validation, benchmarks.VTAB_VALIDATION))
    parts = [(source, range(min(size, len(source)))) for source, size in sizes]
    both = SlicedSource(f"{train.info.name} and {validation.info.name}", parts)
    fit = self.extractor.features(both)
    held_out = np.arange(len(fit.labels)) >= len(parts[0][1])
    found = probing.Linear()(fit, self.extractor.features(test, to_score=True), held_out)
    return {"scores": report(found, name).scores, "features": probing.choose_features(found)}

  def variant(self, data: ImageNetVariant, name: str) -> dict[str, Any]:
    source = self.request.open(data.source, data.split, data.options)
    ranked, labels = self.extractor.rankings(source, None if data.only_its_classes else 5)
    scores = score_rankings(ranked, labels, only_its_classes=data.only_its_classes)
    expected = data.num_its_classes
    if expected not in (None, scores["classes"]):
      logging.warning("%s: %d classes occur, expected %d", name, scores["classes"], expected)
    return {"scores": scores}


def _no_task(source: str) -> VtabTask:
  raise ValueError(f"--data={source}: not one of vtab's 19 tasks; expected these, or no --data")


def summarize_vtab(outcomes: Sequence[Outcome]) -> dict[str, float]:
  """Returns VTAB's means: of each complete group, and of all 19 tasks if complete."""
  scores = {outcome.data: outcome.scores["accuracy"] for outcome in outcomes if outcome.scores}
  groups = {"mean": list(benchmarks.VTAB)}
  for name, task in benchmarks.VTAB.items():
    groups.setdefault(task.group, []).append(name)
  complete = {group: names for group, names in groups.items() if scores.keys() >= set(names)}
  return {k: float(np.mean([scores[name] for name in names])) for k, names in complete.items()}
