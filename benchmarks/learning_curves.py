"""Learning curves of four classifiers on the digits demo: accuracy against training examples.

    python benchmarks/learning_curves.py                     # one seed
    python benchmarks/learning_curves.py --seeds=3 --examples=64000

ViT, LambdaResNet, a ResNet (LambdaResNet's blocks with their 3x3 convolutions) and iGPT are trained
on the same digits with the same batch size, augmentation and number of examples, and evaluated on
the same test digits. Each has the optimizer and learning rate of its demo, with the schedule scaled
to the budget. The first three are trained with labels. iGPT is trained without labels and evaluated
by a linear probe, which is fitted to all labels.

The budget is the same number of examples, not of FLOPs; parameters and FLOPs per example are in the
table. On 1,437 images of 8x8 pixels the results do not rank the architectures on larger images.
"""

import argparse
import functools
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

from vit_jax_zoo import builder, trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.training.metric_writer import read_metrics

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
BATCH = 64
COLORS = {
  "ViT": "#0072B2", "LambdaResNet": "#D55E00", "ResNet": "#E69F00", "iGPT, probed": "#009E73",
}  # fmt: skip


def resnet_config() -> ConfigDict:
  """Returns LambdaResNet's demo with convolutions instead of lambda layers."""
  config = load(f"{CONFIGS}/lambda_resnet.py:demo")
  config.model.lambda_blocks = ("none", "none", "none", "none")
  return config


def igpt_config() -> ConfigDict:
  """Returns the config of iGPT's demo, evaluated by its linear probe."""
  config = load(f"{CONFIGS}/igpt.py:demo")
  config.data.eval = {"probe": config.data.eval.probe.to_dict()}
  config.checkpoint.best = "probe/accuracy"  # the task's default is the likelihood
  return config


SYSTEMS: Mapping[str, tuple[Callable[[], ConfigDict], str]] = {
  "ViT": (functools.partial(load, f"{CONFIGS}/vit.py:demo"), "test/accuracy"),
  "LambdaResNet": (functools.partial(load, f"{CONFIGS}/lambda_resnet.py:demo"), "test/accuracy"),
  "ResNet": (resnet_config, "test/accuracy"),
  "iGPT, probed": (igpt_config, "probe/accuracy"),
}
"""Config and compared metric by name."""


def prepare(config: ConfigDict, *, examples: int, evaluations: int, seed: int) -> ConfigDict:
  """Sets the common budget, batch size and augmentation."""
  config.seed, config.batch_size, config.eval_batch_size = seed, BATCH, 120
  config.num_steps = examples // BATCH
  config.optimizer.schedule.warmup_steps = max(1, config.num_steps // 10)
  config.data.train.transforms = [{"name": "random_translate", "pixels": 1}]
  config.eval_every = max(1, config.num_steps // evaluations)
  config.log_every = config.num_steps
  config.checkpoint.every = 0
  config.ema_decay = None  # lags behind in so short a run
  config.explain = False
  return config


def run(name: str, workdir: pathlib.Path, **budget: Any) -> dict[str, Any]:
  """Trains one system; returns its size, FLOPs, learning curve and time."""
  make, score = SYSTEMS[name]
  config = prepare(make(), **budget)
  parts = builder.build(config)
  with parts.train_batches() as batches:
    program = parts.program(next(batches))
  params = program.abstract_state.params
  flops = count_flops(program.train_step, program.abstract_state, program.abstract_batch)
  wall, cpu = time.perf_counter(), time.process_time()
  if not trainer.run(config, epath.Path(workdir)).finished:
    raise SystemExit(f"{name}, seed {budget['seed']}: interrupted; not included")
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


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Returns the rows of the table."""
  rows = []
  for name in dict.fromkeys(run["system"] for run in results):
    runs = [run for run in results if run["system"] == name]
    curves = np.array([[y for _, y in run["curve"]] for run in runs])
    first, last = curves[:, 0], curves[:, -1]
    rows.append(
      {
        "system": name,
        "parameters": f"{runs[0]['parameters']:,}",
        "MFLOP per example": f"{runs[0]['flops'] / 1e6:.1f}",
        f"after {runs[0]['curve'][0][0]:,}": _spread(first),
        "at the end": _spread(last),
        "CPU s per run": f"{np.median([run['cpu'] for run in runs]):.0f}",
      }
    )
  return rows


def _spread(values: np.ndarray) -> str:
  middle = f"{np.median(values):.1%}"
  return middle if len(values) == 1 else f"{middle} ({values.min():.1%}-{values.max():.1%})"


def draw(results: Sequence[Mapping[str, Any]], seeds: int) -> Figure:
  """Draws test accuracy against training examples, with the range over seeds shaded."""
  figure = Figure(figsize=(7.2, 4.4), dpi=110)
  ax = figure.add_axes((0.1, 0.13, 0.66, 0.68))
  ends = []
  for name, color in COLORS.items():
    runs = [run["curve"] for run in results if run["system"] == name]
    if not runs:
      continue
    examples = [x for x, _ in runs[0]]
    values = np.array([[y for _, y in curve] for curve in runs])
    middle = np.median(values, axis=0)
    ax.fill_between(examples, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, lw=0)
    ax.plot(examples, middle, color=color, lw=1.8, marker="o", markersize=3.2)
    ends.append((float(middle[-1]), name, color))
  _label_ends(ax, ends, examples[-1], results)
  ax.set_xlabel("training examples", fontsize=9.5)
  ax.set_ylabel("accuracy on 360 test digits", fontsize=9.5)
  ax.set_ylim(top=1.005)
  ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
  ax.grid(axis="y", color="#dddddd", lw=0.6)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=8.5)
  over = "one seed" if seeds == 1 else f"median and range of {seeds} seeds"
  title = "Learning handwritten digits, 8×8 pixels"
  figure.text(0.1, 0.955, title, fontsize=13, weight="bold", va="top")
  note = f"same number of examples, different FLOPs; {over}"
  figure.text(0.1, 0.885, note, fontsize=9.5, color="#555555", va="top")
  return figure


def _label_ends(ax: Any, ends: list[Any], x: float, results: Sequence[Mapping[str, Any]]) -> None:
  """Labels each curve at its end with its name and size, without overlaps."""
  low, high = ax.get_ylim()
  step, above = 0.115 * (high - low), np.inf
  for y, name, color in sorted(ends, reverse=True):
    height = min(y, above - step)
    above = height
    one = next(run for run in results if run["system"] == name)
    size = f"{one['parameters'] / 1e3:.0f}k, {one['flops'] / 1e6:.1f} MFLOP"
    ax.annotate(
      f"{name}  {y:.1%}", (x, height), (8, 4), textcoords="offset points", color=color,
      fontsize=9, weight="bold", va="center", annotation_clip=False,
    )  # fmt: skip
    ax.annotate(
      size, (x, height), (8, -8), textcoords="offset points", color="#555555", fontsize=8,
      va="center", annotation_clip=False,
    )  # fmt: skip


def main() -> None:
  """Trains all systems with all seeds, prints the table and draws the figure."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--examples", type=int, default=32_000, help="training examples per run")
  parser.add_argument("--evaluations", type=int, default=8, help="evaluations per run")
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--systems", default=",".join(SYSTEMS).replace("iGPT, probed", "iGPT"))
  parser.add_argument("--output", default="docs/learning_curves.png")
  parser.add_argument("--results", help="JSON file of finished runs, from which to resume")
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  file = pathlib.Path(flags.results) if flags.results else None
  results = json.loads(file.read_text()) if file and file.exists() else []
  done = {(run["system"], run["seed"]) for run in results}
  names = [name for name in SYSTEMS if name.partition(",")[0] in flags.systems.split(",")]
  for seed in range(flags.seeds):
    for name in names:
      if (name, seed) in done:
        continue
      budget = {"examples": flags.examples, "evaluations": flags.evaluations, "seed": seed}
      with tempfile.TemporaryDirectory() as workdir:
        results.append(run(name, pathlib.Path(workdir), **budget))
      print(f"{name}, seed {seed}: {results[-1]['curve'][-1][1]:.3f}", file=sys.stderr, flush=True)
      if file:
        file.write_text(json.dumps(results))
  rows = summarize(results)
  print(timing.machine("scikit-learn"))
  print(timing.markdown(list(rows[0]), [list(row.values()) for row in rows]))
  draw(results, flags.seeds).savefig(flags.output)


if __name__ == "__main__":
  main()
