r"""Learning parity: this package and a reference in PyTorch, trained on the same batches.

    python benchmarks/learning_parity.py
    python benchmarks/learning_parity.py --systems=vit,igpt --seeds=0,1,2
    python benchmarks/learning_parity.py --toy           # two steps each, below runs/

| system        | reference                              | data                             |
|---------------|----------------------------------------|----------------------------------|
| vit           | timm                                   | digits, 8 px                     |
| lambda_resnet | timm's lambda_resnet26t                | photographs, 64 px               |
| igpt          | transformers' ImageGPT                 | digits, 16 gray levels           |
| detr          | transformers' DETR with its own losses | scenes of digits, 64 px          |

For each seed this package draws initial weights and batches, and trains. The reference loads the
exported weights, and trains to the end on the same batches with torch's optimizer and the same
learning rates. Its weights are loaded here, and both are evaluated on the same test images. A third
run, in bfloat16, begins with the same weights and has the same batches. DETR learns little in a run
of this length: its initial weights are those of a run here with the demo's auxiliary losses.

Finished pairs are not run again. Writes benchmarks/results/learning_parity.json, and page and plot
in docs/evidence. Requires `pip install -e '.[parity]'`.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import timing
from matplotlib.figure import Figure

from vit_jax_zoo import builder, export
from vit_jax_zoo import config as config_lib
from vit_jax_zoo.training import sharding
from vit_jax_zoo.weights import Preprocess, Pretrained
from vit_jax_zoo.weights.load import load_pretrained

ROOT = pathlib.Path(__file__).parents[1]


class System(NamedTuple):
  """A training run that both sides can do."""

  config: str  # of `--config`
  fields: Mapping[str, Any]  # of the config, by path
  form: str  # published format of the weights
  task: str
  score: str  # of the test images
  start: Mapping[str, Any] | None = None  # other fields of a run here that makes initial weights


NO_AUGMENTATION = [{"name": "decode"}]
# transformers' ResNet has a stride of 32 only: 6x6 tokens.
ENLARGED = {
  "name": "random_scale_crop", "shorter": (192,), "longest": None, "crop_probability": 0.0,
}  # fmt: skip
PADDED = {"name": "pad_objects", "num": 8}
PHOTOS = {"source": "demo:photos", "transforms": NO_AUGMENTATION}
SYSTEMS = {
  "vit": System(
    "vit:demo",
    {
      "num_steps": 600, "ema_decay": None, "model.pool": "cls",
      "model.position_embedding": "learned_1d", "optimizer.learning_rate": 1e-3,
    },
    "safetensors-timm",
    "classification",
    "accuracy",
  ),
  "lambda_resnet": System(
    "lambda_resnet:demo",
    {
      "num_steps": 100, "batch_size": 16, "eval_batch_size": 20, "optimizer.learning_rate": 0.02,
      "optimizer.schedule.warmup_steps": 10,
      "model": {"name": "lambda_resnet26t", "num_classes": 10},
      "data.train": {**PHOTOS, "split": "train"},
      "data.eval": {"test": {**PHOTOS, "split": "test"}},
    },
    "safetensors-timm",
    "classification",
    "accuracy",
  ),
  "igpt": System(
    "igpt:demo",
    {"num_steps": 400, "model.depth": 4},
    "hf",
    "pixel_modelling",
    "nats",
  ),
  "detr": System(
    "detr:demo",
    {
      "num_steps": 600, "batch_size": 16, "task.dense_weight": 0.0, "task.no_object_weight": 0.1,
      "task.class_weight": 1.0,
      "task.auxiliary_losses": False, "model.dense_predictions": False, "model.num_classes": 10,
      "model.backbone.norm": "frozen_batch_norm", "model.backbone.output_stride": 32,
      "optimizer.clip_norm": 0.1, "optimizer.learning_rate": 5e-4,
      "optimizer.rules": ((".*", {"weight_decay": 1.0}),),
      "data.train.transforms": [{"name": "load_objects"}, ENLARGED, PADDED],
      "data.eval.test.transforms": [
        {"name": "load_objects", "as_annotated": True}, ENLARGED, PADDED,
      ],
    },
    "hf",
    "detection",
    "box_ap50",
    start={
      "num_steps": 1200, "task.dense_weight": 1.0, "task.dense_steps": 900,
      "task.class_weight": 3.0, "task.no_object_weight": 0.3, "task.auxiliary_losses": True,
      "model.dense_predictions": True, "optimizer.clip_norm": 5.0,
      "optimizer.learning_rate": 2e-3,
    },
  ),
}  # fmt: skip


def configure(name: str, seed: int, *, toy: bool, start: bool = False) -> Any:
  """Returns the config of a run, or of the one before it; `toy` shortens it to two steps."""
  config = config_lib.load(SYSTEMS[name].config)
  fields = {**SYSTEMS[name].fields, "seed": seed}
  fields |= (SYSTEMS[name].start or {}) if start else {}
  fields |= {"num_steps": 2} if toy else {}
  with config.unlocked(), config.ignore_type():
    for path, value in fields.items():
      *parents, last = path.split(".")
      section = config
      for parent in parents:
        section = section[parent]
      section[last] = value
  return config


def build(name: str, seed: int, dtype: str, *, toy: bool, start: bool = False) -> Any:
  """Returns the experiment, computed in `dtype`."""
  config = configure(name, seed, toy=toy, start=start)
  config.model.update(dtype=dtype)
  return builder.build(config)


def train(name: str, seed: int, folder: pathlib.Path, dtype: str, toy: bool) -> dict[str, Any]:  # noqa: FBT001
  """Trains here; in float32 also writes what the other runs begin with, and their batches."""
  first, begin = dtype == "float32", {}
  if SYSTEMS[name].start and first:
    experiment = build(name, seed, dtype, toy=toy, start=True)
    state, _ = fit(experiment, seed, draw_batches(experiment), {})
    begin = state.variables
  elif SYSTEMS[name].start:
    begin = load_pretrained(str(folder / "start")).variables
  experiment = build(name, seed, dtype, toy=toy)
  batches = draw_batches(experiment)
  begin = {**begin, **experiment.task.init_from_data(batches)}  # iGPT's palette
  if first:
    with jax.set_mesh(experiment.mesh):
      program = experiment.program(batches[0])
      fresh = program.initial_state(seed, pretrain=lambda fresh: {**fresh, **begin})
    _write(name, experiment, jax.device_get(fresh.variables), batches, folder)
    (schedule,) = program.schedules.values()
    rates = [float(schedule(step)) for step in range(experiment.num_steps)]
    np.save(folder / "learning_rates.npy", rates)
  state, losses = fit(experiment, seed, batches, begin)
  with jax.set_mesh(experiment.mesh):
    return {"losses": losses, "score": evaluate(experiment, name, state.variables)}


def draw_batches(experiment: Any) -> list[Any]:
  """Returns the batches of a whole run."""
  with jax.set_mesh(experiment.mesh):
    loader = experiment.train_batches()
    return [next(loader) for _ in range(experiment.num_steps)]


def fit(
  experiment: Any, seed: int, batches: Sequence[Any], begin: Mapping[str, Any]
) -> tuple[Any, list[float]]:
  """Trains on the batches, from initial weights with those of `begin`; returns state and losses."""
  with jax.set_mesh(experiment.mesh):
    program = experiment.program(batches[0])
    state = program.initial_state(seed, pretrain=lambda fresh: {**fresh, **begin})
    losses = []
    for batch in batches:
      state, metrics = program.train_step(state, sharding.to_global(batch, program.mesh))
      losses.append(float(metrics["loss"].compute()))
    return state, losses


def _write(
  name: str, experiment: Any, variables: Any, batches: Sequence[Any], folder: pathlib.Path
) -> None:
  """Writes the initial weights in a published format, and the batches; for iGPT as tokens."""
  size, task = batches[0]["image"].shape[1:3], SYSTEMS[name].task
  start = Pretrained(experiment.model, variables, Preprocess(size), {"image_size": size}, task=task)
  export.write(start, SYSTEMS[name].form, str(folder / "start"))
  arrays = {f"{key}_{i}": x for i, batch in enumerate(batches) for key, x in batch.items()}
  if task == "pixel_modelling":
    clusters = variables["palette"]["clusters"]
    arrays = {f"tokens_{i}": _tokens(batch["image"], clusters) for i, batch in enumerate(batches)}
  np.savez(folder / "batches.npz", **arrays)


def _tokens(images: np.ndarray, clusters: np.ndarray) -> np.ndarray:
  """Returns the index of the nearest color of each pixel, [b n]."""
  pixels = images.reshape(len(images), -1, 1, 3) / 127.5 - 1
  return np.argmin(np.sum((pixels - clusters) ** 2, axis=-1), axis=-1)


def train_reference(name: str, seed: int, folder: pathlib.Path, toy: bool) -> dict[str, Any]:  # noqa: FBT001
  """Trains the reference on the same batches, and evaluates its weights here."""
  import references

  experiment = build(name, seed, "float32", toy=toy)
  optimizer = experiment.config.optimizer.to_dict()
  losses = references.train(SYSTEMS[name].task, folder, experiment.task, optimizer)
  trained = load_pretrained(str(folder / "end"))
  with jax.set_mesh(experiment.mesh):
    fresh = experiment.evaluation_program().initial_variables(seed)  # with iGPT's bigram model
    variables = {**fresh, **trained.variables}
    return {"losses": losses, "score": evaluate(experiment, name, variables)}


def evaluate(experiment: Any, name: str, variables: Any) -> float:
  """Returns the score of the test images."""
  evaluator = experiment.task.evaluator()
  step = experiment.evaluation_program().predict_step
  for batch in experiment.eval_batches("test"):
    evaluator.add(batch, jax.device_get(step(variables, batch)))
  return float(evaluator.result()[SYSTEMS[name].score])


# Results

SIDES = {"here": "this package", "reference": "the reference", "bfloat16": "this package, bfloat16"}
INTRODUCTION = """# Learning parity

The same batches in the same order, the same initial weights, the same optimizer and learning
rates: trained here and by a reference in PyTorch, and here in bfloat16. Scores are of the last
weights on the test images, evaluated here; a seed draws the initial weights and the batches.
Rounding grows in training, so losses of single steps drift apart; scores should differ by less
than those of two seeds. Sizes are for two CPU cores. Written by `python
benchmarks/learning_parity.py`."""


def run(name: str, side: str, seed: int, folder: pathlib.Path, *, toy: bool) -> dict[str, Any]:
  """Returns losses, score and machine of one side, trained in a new process."""
  versions = {"machine": timing.machine("optax", "torch", "timm", "transformers")}
  if side == "reference":
    return timing.in_new_process(train_reference, name, seed, folder, toy) | versions
  dtype = "float32" if side == "here" else side
  return timing.in_new_process(train, name, seed, folder, dtype, toy) | versions


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the scores, and how far the references' are from ours beside the seeds' range."""
  rows = []
  for name, system in SYSTEMS.items():
    scores = {side: scores_by_seed(runs, name, side) for side in SIDES}
    cells = [
      timing.spread(list(s.values()), ".4g") if s else "not yet run" for s in scores.values()
    ]
    here, there = scores["here"], scores["reference"]
    gaps = [abs(here[seed] - there[seed]) for seed in here if seed in there]
    seeds = f"{max(here.values()) - min(here.values()):.3g}" if len(here) > 1 else "-"
    gap = f"{statistics.mean(gaps):.3g}, at most {max(gaps):.3g}" if gaps else "-"
    rows.append([f"{name}, {system.score}", *cells, gap, seeds])
  heads = ["system, score", *SIDES.values(), "difference of a seed", "range of the seeds"]
  return timing.markdown(heads, rows)


def scores_by_seed(runs: Sequence[Mapping[str, Any]], name: str, side: str) -> dict[int, float]:
  """Returns the scores of one side."""
  return {r["seed"]: r["score"] for r in runs if (r["system"], r["side"]) == (name, side)}


def draw(runs: Sequence[Mapping[str, Any]]) -> Figure:
  """Draws the training losses, smoothed over a twentieth of the run, a panel for each system."""
  names = [name for name in SYSTEMS if any(r["system"] == name for r in runs)]
  figure = Figure(figsize=(4.4 * len(names), 3.4), dpi=100, layout="constrained")
  styles = {"here": ("#0072B2", "-"), "reference": ("#D55E00", "--"), "bfloat16": ("#009E73", ":")}
  for name, ax in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
    for side, (color, style) in styles.items():
      for i, r in enumerate(r for r in runs if (r["system"], r["side"]) == (name, side)):
        width = max(1, len(r["losses"]) // 20)
        smooth = np.convolve(r["losses"], np.ones(width) / width, "valid")
        label = SIDES[side] if i == 0 else None
        ax.plot(np.arange(len(smooth)) + width, smooth, style, color=color, lw=1.1, label=label)
    ax.set(title=name, xlabel="step", ylabel="training loss")
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
  return figure


def page(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the page: table, plot, date and machine of the runs."""
  made = sorted({f"* {r['date']}: {r['machine'].partition(', load')[0]}" for r in runs})
  picture = ["![Training losses](learning_parity.png)"] if runs else []
  return "\n\n".join([INTRODUCTION, table(runs), *picture, "\n".join(made)]).strip() + "\n"


def main() -> None:
  """Trains what is missing, and writes results, page and plot after each run."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--systems", default=",".join(SYSTEMS), help="default: all")
  parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
  parser.add_argument("--workdir", default="runs/learning_parity", help="folder of the runs")
  parser.add_argument("--output", default=str(ROOT), help="root of results and page")
  parser.add_argument("--toy", action="store_true", help="two steps each; output in the workdir")
  flags = parser.parse_args()
  names = flags.systems.split(",")
  if unknown := set(names) - set(SYSTEMS):
    sys.exit(f"--systems: unknown {', '.join(sorted(unknown))}; expected {', '.join(SYSTEMS)}")
  work = pathlib.Path(flags.workdir).absolute()
  root = work if flags.toy else pathlib.Path(flags.output)
  file = root / "benchmarks" / "results" / "learning_parity.json"
  evidence = root / "docs" / "evidence"
  for folder in (file.parent, evidence):
    folder.mkdir(parents=True, exist_ok=True)
  runs = json.loads(file.read_text())["runs"] if file.exists() else []
  done = {(r["system"], r["seed"], r["side"]) for r in runs}
  triples = itertools.product(names, map(int, flags.seeds.split(",")), SIDES)
  missing = [triple for triple in triples if triple not in done]
  start = time.time()
  for i, (name, seed, side) in enumerate(missing):
    eta = f", ETA {(time.time() - start) / i / 60 * (len(missing) - i):.0f} min" if i else ""
    print(f"{i + 1}/{len(missing)} {name} seed {seed}: {side}{eta}", file=sys.stderr, flush=True)
    folder = work / f"{name}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = run(name, side, seed, folder, toy=flags.toy)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    about = {"date": date, "machine": found.pop("machine")}
    found["losses"] = [float(f"{loss:.5g}") for loss in found["losses"]]
    runs.append({"system": name, "seed": seed, "side": side, **about, **found})
    lines = ",\n".join(json.dumps(r) for r in runs)
    file.write_text(f'{{"runs": [\n{lines}\n]}}\n')
    draw(runs).savefig(evidence / "learning_parity.png")
    (evidence / "learning_parity.md").write_text(page(runs))
  print(page(runs))


if __name__ == "__main__":
  main()
