"""Four classifiers learn handwritten digits side by side: the article's comparison in miniature.

    python benchmarks/learning_curves.py                     # one seed
    python benchmarks/learning_curves.py --seeds=3 --examples=64000

ViT, LambdaResNet, a plain ResNet (LambdaResNet's own blocks with their 3x3 convolutions left in
place) and iGPT see the same training digits, as often, in batches of the same size, shifted about
alike, and are asked the same test digits at the same times. Each has the optimizer and the rate of
its demo, with the schedule stretched to the budget. The first three learn from the labels. iGPT
learns without them to guess the next pixel; what is scored is a linear probe of its layers, which
then has seen all labels.

The budget is one of examples, not of arithmetic: parameters and FLOPs of a training step stand
beside the scores, and they differ. On 8x8 pixels of 1437 images none of this says which
architecture is better on ImageNet; it says that all of them learn, in one loop, and how fast here.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import timing

from configs import igpt, lambda_resnet, vit
from vit_jax_zoo import trainer as experiment
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.training.metric_writer import read_metrics

BATCH = 64
COLORS = {
  "ViT": "#0072B2", "LambdaResNet": "#D55E00", "ResNet": "#E69F00", "iGPT, probed": "#009E73",
}  # fmt: skip


def vit_config() -> ConfigDict:
  """The demo's ViT."""
  return vit.get_config("demo")


def lambda_config() -> ConfigDict:
  """The demo's LambdaResNet."""
  return lambda_resnet.get_config("demo")


def resnet_config() -> ConfigDict:
  """The same network with convolutions in the place of lambda layers."""
  config = lambda_resnet.get_config("demo")
  config.model.lambda_blocks = ("none", "none", "none", "none")
  return config


def igpt_config() -> ConfigDict:
  """The demo's iGPT, scored by its probe."""
  config = igpt.get_config("demo")
  config.data.eval = {"probe": config.data.eval.probe.to_dict()}
  config.checkpoint.best = "probe/accuracy"  # the task's own choice is a likelihood
  return config


SYSTEMS: Mapping[str, tuple[Callable[[], ConfigDict], str]] = {
  "ViT": (vit_config, "test/accuracy"),
  "LambdaResNet": (lambda_config, "test/accuracy"),
  "ResNet": (resnet_config, "test/accuracy"),
  "iGPT, probed": (igpt_config, "probe/accuracy"),
}
"""Name -> config, and the score that is compared."""


def prepare(config: ConfigDict, *, examples: int, evaluations: int, seed: int) -> ConfigDict:
  """Gives a config the common budget and the common training images."""
  config.seed, config.batch_size, config.eval_batch_size = seed, BATCH, 120
  config.num_steps = examples // BATCH
  config.optimizer.schedule.warmup_steps = max(1, config.num_steps // 10)
  config.data.train.transforms = [{"name": "random_translate", "pixels": 1}]
  config.eval_every = max(1, config.num_steps // evaluations)
  config.log_every = config.num_steps
  config.checkpoint.every = 0
  config.ema_decay = None  # an average of so short a run lags behind
  config.explain = False
  return config


def run(name: str, workdir: pathlib.Path, **budget: Any) -> dict[str, Any]:
  """Trains one system once; returns its sizes, its curve, and how long it took."""
  make, score = SYSTEMS[name]
  config = prepare(make(), **budget)
  parts = experiment.create(config)
  with parts.train_batches() as batches:
    program = parts.program(next(batches))
  params = program.abstract_state.params
  flops = count_flops(program.train_step, program.abstract_state, program.abstract_batch)
  wall, cpu = time.perf_counter(), time.process_time()
  if not experiment.run(config, epath.Path(workdir)).finished:
    raise SystemExit(f"{name}, seed {budget['seed']}, was told to stop; it is not counted")
  curve = [(row["step"] * BATCH, row[score]) for row in read_metrics(workdir) if score in row]
  return {
    "system": name,
    "seed": budget["seed"],
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "flops": flops / BATCH,
    "curve": curve,
    "wall": time.perf_counter() - wall,
    "cpu": time.process_time() - cpu,
  }


def summarize(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Returns the table's rows."""
  rows = []
  for name in dict.fromkeys(run["system"] for run in found):
    runs = [run for run in found if run["system"] == name]
    curves = np.array([[y for _, y in run["curve"]] for run in runs])
    first, last = curves[:, 0], curves[:, -1]
    rows.append(
      {
        "system": name,
        "parameters": f"{runs[0]['parameters']:,}",
        "MFLOP an example": f"{runs[0]['flops'] / 1e6:.1f}",
        f"after {runs[0]['curve'][0][0]:,}": _spread(first),
        "at the end": _spread(last),
        "CPU s a run": f"{np.median([run['cpu'] for run in runs]):.0f}",
      }
    )
  return rows


def _spread(values: np.ndarray) -> str:
  middle = f"{np.median(values):.1%}"
  return middle if len(values) == 1 else f"{middle} ({values.min():.1%}-{values.max():.1%})"


def draw(found: Sequence[Mapping[str, Any]], seeds: int) -> Figure:
  """Draws test accuracy against examples seen; the range over seeds is shaded."""
  figure = Figure(figsize=(7.2, 4.4), dpi=110)
  ax = figure.add_axes((0.1, 0.13, 0.66, 0.68))
  ends = []
  for name, color in COLORS.items():
    runs = [run["curve"] for run in found if run["system"] == name]
    if not runs:
      continue
    examples = [x for x, _ in runs[0]]
    values = np.array([[y for _, y in curve] for curve in runs])
    middle = np.median(values, axis=0)
    ax.fill_between(examples, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, lw=0)
    ax.plot(examples, middle, color=color, lw=1.8, marker="o", markersize=3.2)
    ends.append((float(middle[-1]), name, color))
  _label_ends(ax, ends, examples[-1], found)
  ax.set_xlabel("training examples seen", fontsize=9.5)
  ax.set_ylabel("accuracy on 360 test digits", fontsize=9.5)
  ax.set_ylim(top=1.005)
  ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
  ax.grid(axis="y", color="#dddddd", lw=0.6)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=8.5)
  said = "one seed" if seeds == 1 else f"median of {seeds} seeds, their range shaded"
  title = "Learning handwritten digits, 8×8 pixels"
  figure.text(0.1, 0.955, title, fontsize=13, weight="bold", va="top")
  note = f"the same examples for all, not the same arithmetic; {said}"
  figure.text(0.1, 0.885, note, fontsize=9.5, color="#555555", va="top")
  return figure


def _label_ends(ax: Any, ends: list[Any], x: float, found: Sequence[Mapping[str, Any]]) -> None:
  """Names each curve at its end, with its size; names that would overlap are moved apart."""
  low, high = ax.get_ylim()
  step, above = 0.115 * (high - low), np.inf
  for y, name, color in sorted(ends, reverse=True):
    place = min(y, above - step)
    above = place
    one = next(run for run in found if run["system"] == name)
    size = f"{one['parameters'] / 1e3:.0f}k, {one['flops'] / 1e6:.1f} MFLOP"
    ax.annotate(
      f"{name}  {y:.1%}", (x, place), (8, 4), textcoords="offset points", color=color,
      fontsize=9, weight="bold", va="center", annotation_clip=False,
    )  # fmt: skip
    ax.annotate(
      size, (x, place), (8, -8), textcoords="offset points", color="#555555", fontsize=8,
      va="center", annotation_clip=False,
    )  # fmt: skip


def main() -> None:
  """Reads the command line, trains in turns, prints the table, and draws."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--examples", type=int, default=32_000, help="training examples of a run")
  parser.add_argument("--evaluations", type=int, default=8, help="how often each run is scored")
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--systems", default=",".join(SYSTEMS).replace("iGPT, probed", "iGPT"))
  parser.add_argument("--output", default="docs/learning_curves.png")
  parser.add_argument("--results", help="a JSON file that keeps finished runs, and is gone on from")
  given = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  results = pathlib.Path(given.results) if given.results else None
  found = json.loads(results.read_text()) if results and results.exists() else []
  done = {(run["system"], run["seed"]) for run in found}
  wanted = [name for name in SYSTEMS if name.partition(",")[0] in given.systems.split(",")]
  for seed in range(given.seeds):
    for name in wanted:
      if (name, seed) in done:
        continue
      budget = {"examples": given.examples, "evaluations": given.evaluations, "seed": seed}
      with tempfile.TemporaryDirectory() as workdir:
        found.append(run(name, pathlib.Path(workdir), **budget))
      print(f"{name}, seed {seed}: {found[-1]['curve'][-1][1]:.3f}", file=sys.stderr, flush=True)
      if results:
        results.write_text(json.dumps(found))
  rows = summarize(found)
  print(timing.machine("scikit-learn"))
  print(timing.markdown(list(rows[0]), [list(row.values()) for row in rows]))
  draw(found, given.seeds).savefig(given.output)


if __name__ == "__main__":
  main()
