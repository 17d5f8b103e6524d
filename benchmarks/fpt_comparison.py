r"""FPT, FPN and a plain bottom-up pyramid trained on the demo: same seed, data and steps.

  python benchmarks/fpt_comparison.py
  python benchmarks/fpt_comparison.py --seeds=0,1,2 --variant=demo_mask --num_steps=900

"bfp" is the plain bottom-up pyramid of arXiv:2007.09451, "fpn" the feature pyramid network, "fpt"
the feature pyramid transformer; for `--variant=demo_segmentation`, "ufp" is the unscathed pyramid.
With several seeds: the mean and the largest deviation from it.
"""

import argparse
import tempfile
import time

import numpy as np
import timing
from absl import logging
from etils import epath

from vit_jax_zoo import config as config_lib
from vit_jax_zoo import trainer

METRICS = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "miou", "pixel_accuracy")


def run(variant: str, neck: str, num_steps: int, seed: int) -> dict[str, float]:
  """Trains one model; returns its metrics on the test scenes and the seconds of the run."""
  config = config_lib.load(f"configs/fpt.py:{variant},neck={neck},num_steps={num_steps}")
  config.seed = seed
  config.explain = False
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    outcome = trainer.run(config, epath.Path(folder))
  scores = {name.rpartition("/")[2]: value for name, value in outcome.scores.items()}
  return {**scores, "seconds": time.perf_counter() - start}


def mean_deviation(values: list[float], digits: int) -> str:
  """Returns the mean, and the largest deviation from it if there are several values."""
  mean = float(np.mean(values))
  deviation = max(abs(value - mean) for value in values)
  return f"{mean:.{digits}f}" + (f" ±{deviation:.{digits}f}" if len(values) > 1 else "")


def main() -> None:
  """Trains every pyramid with every seed and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--variant", default="demo", choices=("demo", "demo_mask", "demo_segmentation")
  )
  parser.add_argument("--necks", help="pyramids to train, by default all of the variant")
  parser.add_argument("--seeds", default="0", help="one run each")
  parser.add_argument("--num_steps", type=int, default=400, help="steps per run")
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  every = "ufp,fpt" if flags.variant == "demo_segmentation" else "bfp,fpn,fpt"
  seeds = [int(seed) for seed in flags.seeds.split(",")]
  rows = []
  for neck in (flags.necks or every).split(","):
    runs = [run(flags.variant, neck, flags.num_steps, seed) for seed in seeds]
    names = [name for name in METRICS if name in runs[0]]
    cells = [mean_deviation([scores[name] for scores in runs], 3) for name in names]
    rows.append([neck, *cells, mean_deviation([scores["seconds"] for scores in runs], 0)])
  print(f"{flags.variant}, {flags.num_steps} steps, seeds {flags.seeds}; {timing.machine()}\n")
  print(timing.markdown(["pyramid", *names, "seconds"], rows))


if __name__ == "__main__":
  main()
