"""Shared by the claims: settings, resumable runs, results files, and the page with its plots.

A claim is a module with `SETTINGS` (what is trained, by name) and `PARTS` (tables of their scores);
its texts are in `texts.toml`. Finished pairs of setting and seed are in
`benchmarks/results/claims/*.json`, from which `docs/evidence/claims.md` is generated.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import timing
from vit_jax_zoo import builder, trainer
from vit_jax_zoo import config as config_lib
from vit_jax_zoo.data.sources import demo
from vit_jax_zoo.data.sources import tfds as tfds_source
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.training.metric_writer import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ("vit", "igpt", "lambda_resnet", "detr", "ttsr", "fpt")
SEEDS = (0, 1, 2)
Scores = dict[str, float]
Cell = tuple[str, str]  # names of a setting and of one of its scores
# `change(batch, None)` returns another batch, `change(batch, found)` other predictions.
Change = Callable[[dict[str, Any], dict[str, Any] | None], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
  """A training run, which is repeated for each seed, or with `train=False` only a measurement."""

  config: str  # of `--config`
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config, by path
  scores: Sequence[str] = ()  # of the last evaluation
  curves: Sequence[str] = ()  # scores of all evaluations, as "<score> at 25 %"
  init_from: str = ""  # a setting whose run with the same seed is the start
  prepare: Callable[[pathlib.Path, bool], Mapping[str, Any]] | None = None  # more fields
  patch: Callable[[], None] | None = None  # changes a model's code in the process of the run
  measure: Callable[[ConfigDict, Any], Scores] | None = None  # more scores, of config and variables
  train: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
  """A table of scores of settings."""

  key: str  # of its texts
  columns: Mapping[str, Mapping[str, Cell]]  # by column and row
  rows: str  # header of the rows
  axis: str  # label of the plotted scores
  plotted: Sequence[str] = ()  # columns; default: the first
  ordered: bool = True  # whether a line joins the rows' medians
  # What is checked: the first score is higher than the second.
  compared: Mapping[str, tuple[Cell, Cell]] = dataclasses.field(default_factory=dict)


def table_of(rows: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, dict[str, Cell]]:
  """Returns columns of the same scores of several settings, from the settings by row."""
  return {
    column: {row: (setting, score) for row, setting in rows.items()}
    for column, score in columns.items()
  }


@functools.cache
def texts() -> dict[str, Any]:
  """Returns the texts of the page, by claim and part."""
  return tomllib.loads((pathlib.Path(__file__).parent / "texts.toml").read_text())


def load_claim(name: str) -> Any:
  """Returns the module of a claim."""
  return importlib.import_module(f"benchmarks.claims.{name}")


# Runs


def configure(setting: Setting, seed: int, folder: pathlib.Path, *, toy: bool) -> ConfigDict:
  """Returns the config of a run; `toy` shortens it to a few steps on a few images."""
  config = config_lib.load(setting.config)
  fields = dict(setting.fields) | {"seed": seed, "explain": False}
  if setting.init_from:
    fields["init_from"] = str(folder / f"{setting.init_from}_{seed}")
  if setting.prepare:
    fields |= setting.prepare(folder, toy)
  with config.unlocked(), config.ignore_type():
    for path, value in fields.items():
      *parents, last = path.split(".")
      section = config
      for parent in parents:
        section = section[parent]
      section[last] = ConfigDict(value) if isinstance(value, dict) else value
    if toy:
      _shorten(config)
  return config


def labelled_shapes(count: int) -> Callable[[pathlib.Path, bool], Mapping[str, Any]]:
  """Returns the preparation of `count` training scenes of `demo:shapes`, drawn at the first use.

  They have images and labels only, since reading boxes and masks would take most of a step's time.
  """

  def draw(folder: pathlib.Path, toy: bool) -> Mapping[str, Any]:  # noqa: FBT001
    place = folder / "shapes" / "1.0.0"
    if not place.is_dir():
      features = {name: demo.DEMOS["shapes"].features[name] for name in ("image", "label")}
      scenes = demo.shapes("train", 600 if toy else count)
      records = ({name: scene[name] for name in features} for scene in scenes)
      written = tfds_source.write_dataset(
        "shapes", features, {"train": records}, folder / "drawing", shuffle=True
      )
      place.parent.mkdir(parents=True, exist_ok=True)
      written.rename(place)
    return {"data.train.source": f"tfds:{place}"}

  return draw


def _shorten(config: ConfigDict) -> None:
  config.num_steps, config.batch_size, config.eval_batch_size, config.eval_every = 2, 8, 8, 0
  config.checkpoint.every = 0
  for spec in config.data.eval.values():
    spec.split = f"{spec.split.partition('[')[0]}[:8]"
    if "fit_split" in spec:
      spec.fit_split = "train[:200]"


def run(claim: str, name: str, seed: int, folder: pathlib.Path, toy: bool) -> Scores:  # noqa: FBT001
  """Trains and evaluates one setting with one seed; returns its scores."""
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # for the next seeds
  setting = load_claim(claim).SETTINGS[name]
  if setting.patch:
    setting.patch()
  config = configure(setting, seed, folder, toy=toy)
  if not setting.train:
    return setting.measure(config, None)
  workdir = epath.Path(folder / f"{name}_{seed}")
  outcome = trainer.run(config, workdir)
  if not outcome.finished:
    raise SystemExit(f"{claim}: {name}, seed {seed}: interrupted; run the same command to resume")
  scores = {score: outcome.scores[score] for score in setting.scores}
  for row, score in itertools.product(read_metrics(workdir), setting.curves):
    if score in row:
      scores[f"{score} at {row['step'] / int(outcome.state.step):.0%}"] = row[score]
  scores["parameters"] = float(sum(x.size for x in jax.tree.leaves(outcome.state.params)))
  return scores | (setting.measure(config, outcome.state.variables) if setting.measure else {})


def evaluate(
  config: ConfigDict, variables: Any, changes: Mapping[str, Change]
) -> dict[str, Scores]:
  """Returns the scores of the test split by name of a change of its batches or predictions.

  The scores are computed from the unchanged batches.
  """
  experiment = builder.build(config)
  evaluators = {name: experiment.task.evaluator() for name in changes}
  with jax.set_mesh(experiment.mesh):
    step = experiment.evaluation_program().predict_step
    for batch in experiment.eval_batches("test"):
      for name, change in changes.items():
        found = jax.device_get(step(variables, change(batch, None)))
        evaluators[name].add(batch, change(batch, found))
  return {name: evaluator.result() for name, evaluator in evaluators.items()}


def flops(config: ConfigDict, variables: Any) -> Scores:
  """Returns the FLOPs of a prediction for one image."""
  experiment = builder.build(config)
  batch = experiment.eval_batches("test").one_example()
  with jax.set_mesh(experiment.mesh):
    step = experiment.evaluation_program().predict_step
    return {"flops": count_flops(step, variables, batch) / len(batch["image"])}


def main(claim: str) -> None:
  """Runs the missing pairs of setting and seed of a claim, and writes results, plot and page."""
  parser = argparse.ArgumentParser(description=load_claim(claim).__doc__)
  parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
  parser.add_argument("--settings", help="default: all")
  parser.add_argument("--workdir", help="folder of the runs; default: runs/claims/<claim>")
  parser.add_argument("--output", default=str(ROOT), help="root of results and page")
  parser.add_argument("--toy", action="store_true", help="two steps each, below runs/claims_toy")
  flags = parser.parse_args()
  settings, root = load_claim(claim).SETTINGS, pathlib.Path(flags.output)
  names = flags.settings.split(",") if flags.settings else list(settings)
  if unknown := set(names) - set(settings):
    sys.exit(f"--settings: unknown {', '.join(sorted(unknown))}; expected {', '.join(settings)}")
  default = f"runs/claims_toy/{claim}" if flags.toy else f"runs/claims/{claim}"
  folder = pathlib.Path(flags.workdir or default).absolute()
  root = folder if flags.toy else root
  folder.mkdir(parents=True, exist_ok=True)
  seeds = [0] if flags.toy else [int(seed) for seed in flags.seeds.split(",")]
  file, start = results_file(root, claim), time.time()
  file.parent.mkdir(parents=True, exist_ok=True)
  runs = read_runs(root, claim)
  done = {(r["setting"], r["seed"]) for r in runs}
  missing = [pair for pair in itertools.product(names, seeds) if pair not in done]
  missing.sort(key=lambda pair: pair[1])  # all settings with the first seed, then the next
  for i, (name, seed) in enumerate(missing):
    eta = f", ETA {(time.time() - start) / i / 60 * (len(missing) - i):.0f} min" if i else ""
    print(f"{claim} {i + 1}/{len(missing)}: {name}, seed {seed}{eta}", file=sys.stderr, flush=True)
    begin, date = _cpu_minutes(), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    scores = timing.in_new_process(run, claim, name, seed, folder, flags.toy)
    about = {"date": date, "machine": timing.machine("optax"), "scores": scores}
    runs.append({"setting": name, "seed": seed, "minutes": _cpu_minutes() - begin, **about})
    file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    write_page(root, [claim])
  write_page(root, [claim])
  print("\n".join(section(claim, read_runs(root, claim))))


def _cpu_minutes() -> float:
  """Returns the CPU time of the finished runs, which other programs' load hardly changes."""
  times = os.times()
  return (times.children_user + times.children_system) / 60


# Results


def results_file(root: pathlib.Path, claim: str) -> pathlib.Path:
  """Returns the file of a claim's runs."""
  return root / "benchmarks" / "results" / "claims" / f"{claim}.json"


def read_runs(root: pathlib.Path, claim: str) -> list[dict[str, Any]]:
  """Returns the finished runs of a claim, [] without a file."""
  file = results_file(root, claim)
  return json.loads(file.read_text())["runs"] if file.exists() else []


def by_seed(runs: Sequence[Mapping[str, Any]], cell: Cell) -> dict[int, float]:
  """Returns the values of a score by seed, of the runs that have it."""
  setting, score = cell
  found = [r for r in runs if r["setting"] == setting and score in r["scores"]]
  return {r["seed"]: r["scores"][score] for r in sorted(found, key=lambda r: r["seed"])}


def shown(values: Sequence[float]) -> str:
  """Returns the median and the range.

  >>> shown([0.5, 0.25, 1])
  '0.5 (0.25 to 1)'
  >>> shown([709827.0])
  '709,827'
  """
  figures = statistics.median(values), min(values), max(values)
  middle, low, high = (f"{x:,.0f}" if abs(x) >= 10_000 else f"{x:.4g}" for x in figures)
  return middle + (f" ({low} to {high})" if low != high else "")


def compare(text: str, first: Mapping[int, float], second: Mapping[int, float]) -> str:
  """Returns in how many seeds the first score is higher than the second, with the differences."""
  differences = [first[seed] - second[seed] for seed in first if seed in second]
  if not differences:
    return f"* {text}: not yet run."
  higher = sum(difference > 0 for difference in differences)
  return f"* {text}: in {higher} of {len(differences)} seeds, by {shown(differences)}."


def table(part: Part, runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns a part's Markdown table: median and range over the seeds."""
  rows = []
  for row in dict.fromkeys(itertools.chain(*part.columns.values())):
    cells = [
      by_seed(runs, column[row]) if row in column else {} for column in part.columns.values()
    ]
    rows.append([row, *(shown(list(cell.values())) if cell else "-" for cell in cells)])
  return timing.markdown([part.rows, *part.columns], rows)


def draw(claim: str, parts: Sequence[Part], runs: Sequence[Mapping[str, Any]]) -> Figure:
  """Draws a panel for each part: medians of the rows, and a dot for each seed."""
  width = min(3, len(parts))
  height = math.ceil(len(parts) / width)
  figure = Figure(figsize=(4.8 * width, 3.8 * height), dpi=100, layout="constrained")
  for i, part in enumerate(parts, 1):
    ax = figure.add_subplot(height, width, i)
    rows = list(dict.fromkeys(itertools.chain(*part.columns.values())))
    for name in part.plotted or list(part.columns)[:1]:
      cells = {row: by_seed(runs, cell) for row, cell in part.columns[name].items()}
      cells = {rows.index(row): list(cell.values()) for row, cell in cells.items() if cell}
      style = {} if part.ordered else {"linestyle": "", "marker": "_", "ms": 18, "mew": 2}
      medians = [statistics.median(values) for values in cells.values()]
      (line,) = ax.plot(list(cells), medians, label=name, **style)
      for x, values in cells.items():
        ax.plot([x] * len(values), values, ".", color=line.get_color())
    ax.set_xticks(range(len(rows)), rows, rotation=20, ha="right", fontsize=8)
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.set(xlabel=part.rows, ylabel=part.axis)
    ax.set_title(texts()[claim][part.key]["title"], fontsize=10)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
  return figure


def cells_of(part: Part) -> set[Cell]:
  """Returns all cells of a part's table."""
  return {cell for column in part.columns.values() for cell in column.values()}


def section(claim: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the paragraphs of a claim: its command, cost, parts and runs."""
  module, text = load_claim(claim), texts()[claim]
  total = len(module.SETTINGS) * len(SEEDS)
  minutes = sum(r["minutes"] for r in runs)
  cost = f"{len(runs)} of {total} runs are done; they took {minutes:.0f} minutes of CPU time."
  if not runs:
    estimate = f"about {text['minutes']} minutes of one core, estimated"
    cost = f"none of its {total} runs is done; {estimate}."
  paragraphs = [
    f"## {text['title']}",
    f"{text['paper']}. `python -m benchmarks.claims.{claim}`: {cost}",
  ]
  if runs:
    paragraphs.append(f"![Scores by setting](claims_{claim}.png)")
  for part in module.PARTS:
    own = text[part.key]
    paragraphs += [f"### {own['title']}", f"**Claimed.** {own['claimed'].strip()}"]
    if any(by_seed(runs, cell) for cell in cells_of(part)):
      checks = [compare(k, *(by_seed(runs, c) for c in pair)) for k, pair in part.compared.items()]
      paragraphs += ["**Seen here**, median and range over the seeds:", table(part, runs)]
      paragraphs += ["\n".join(checks)] if checks else []
    else:
      paragraphs.append("**Seen here**: not yet run.")
    paragraphs.append(f"**Why it may differ.** {own['differs'].strip()}")
  made = sorted({f"* {r['date']}: {r['machine'].partition(', load')[0]}" for r in runs})
  return paragraphs + (["\n".join(made)] if made else [])


def page(root: pathlib.Path) -> str:
  """Returns the page, from the results files."""
  paragraphs = [f"# {texts()['title']}", texts()["introduction"]]
  for claim in CLAIMS:
    paragraphs += section(claim, read_runs(root, claim))
  return "\n\n".join(paragraph.strip("\n") for paragraph in paragraphs) + "\n"


def write_page(root: pathlib.Path, claims: Sequence[str] = CLAIMS) -> None:
  """Writes the page, and the plots of these claims."""
  folder = root / "docs" / "evidence"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "claims.md").write_text(page(root))
  for claim in claims:
    runs = read_runs(root, claim)
    parts = [p for p in load_claim(claim).PARTS if any(by_seed(runs, c) for c in cells_of(p))]
    if parts:
      draw(claim, parts, runs).savefig(folder / f"claims_{claim}.png")
