r"""Difficulty of `demo:shapes`: a linear model of the pixels beside a small network.

    python benchmarks/shapes.py
    python benchmarks/shapes.py --num_steps=4000 --output=benchmarks/results

The linear model is a ridge classifier of all 64x64x3 pixels; of several strengths, the best one on
the test images is reported, in its favour. The network is a ResNet of the LambdaResNet demo's
blocks, trained for some minutes; the same command resumes it. Writes shapes.json and shapes.md.
"""

import argparse
import datetime
import json
import pathlib
import time
from typing import Any

import numpy as np
import timing
from absl import logging
from etils import epath
from sklearn.linear_model import RidgeClassifier

from vit_jax_zoo import config as config_lib
from vit_jax_zoo import trainer
from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources import load_source

SOURCE = {"source": "demo:shapes", "label_key": "label"}
STRENGTHS = (1e2, 1e3, 1e4, 1e5)


def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images of a split, [n 12288] in [-0.5, 0.5], and their labels."""
  source = load_source("demo:shapes", split, label_key="label")
  examples = [source[i] for i in range(len(source))]
  images = np.stack([decode_image(e["image"]).ravel() for e in examples]).astype(np.float32)
  return images / 255 - 0.5, np.array([e["label"] for e in examples])


def linear() -> dict[str, Any]:
  """Returns the test accuracy of ridge classifiers of the pixels, the best of several strengths."""
  start, fit, test = time.time(), pixels("train"), pixels("test")
  found = {a: RidgeClassifier(alpha=a, solver="cholesky").fit(*fit).score(*test) for a in STRENGTHS}
  best = max(found, key=lambda strength: found[strength])
  return {"model": f"ridge, strength {best:g}", "accuracy": found[best], **_minutes(start)}


def network(num_steps: int, seed: int, folder: epath.Path) -> dict[str, Any]:
  """Returns the test accuracy of a small ResNet."""
  config = config_lib.load("lambda_resnet:demo")
  transforms = [{"name": "decode"}, {"name": "random_translate", "pixels": 4}]
  with config.ignore_type():
    config.update(num_steps=num_steps, batch_size=64, eval_batch_size=100, seed=seed)
    config.update(eval_every=0, explain=False)
    config.model.update(lambda_blocks=("none",) * 4, stem="conv7", blocks=(2, 2, 2, 2))
    config.model.widths = (16, 32, 64, 128)
    config.data.train = {**SOURCE, "split": "train", "transforms": transforms}
    config.data.eval = {"test": {**SOURCE, "split": "test", "transforms": transforms[:1]}}
  start = time.time()
  outcome = trainer.run(config, folder / f"{num_steps}_{seed}")
  if not outcome.finished:
    raise SystemExit("interrupted; run the same command to resume")
  model = f"ResNet, {num_steps:,} steps, seed {seed}"
  return {"model": model, "accuracy": outcome.scores["test/accuracy"], **_minutes(start)}


def _minutes(start: float) -> dict[str, float]:
  return {"minutes": (time.time() - start) / 60}


def main() -> None:
  """Fits both, and writes the results."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--num_steps", type=int, default=3000, help="of the network")
  parser.add_argument("--seeds", default="0", help="of the network")
  parser.add_argument("--workdir", default="runs/shapes", help="folder of the network's runs")
  parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  folder, seeds = epath.Path(flags.workdir).absolute(), map(int, flags.seeds.split(","))
  rows = [network(flags.num_steps, seed, folder) for seed in seeds] + [linear()]
  date, machine = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), timing.machine("optax")
  output = pathlib.Path(flags.output)
  result = {"date": date, "machine": machine, "rows": rows}
  (output / "shapes.json").write_text(json.dumps(result, indent=1) + "\n")
  cells = [[r["model"], f"{r['accuracy']:.1%}", f"{r['minutes']:.1f}"] for r in rows]
  table = timing.markdown(["model", "accuracy on 1,000 test scenes", "minutes"], cells)
  text = f"# Difficulty of demo:shapes\n\n`python benchmarks/shapes.py`\n\n{table}\n\n"
  (output / "shapes.md").write_text(f"{text}* {date}: {machine.partition(', load')[0]}\n")
  print((output / "shapes.md").read_text())


if __name__ == "__main__":
  main()
