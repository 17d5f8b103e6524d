r"""The paper's comparison on the demo: three pyramids, the same seed, data and number of steps.

  python benchmarks/fpt_comparison.py
  python benchmarks/fpt_comparison.py --seeds=0,1,2 --variant=demo_mask --num_steps=900

"bfp" is the plain bottom-up pyramid that arXiv:2007.09451 compares with, "fpn" the one with a way
back, "fpt" the transformer; in segmentation (`--variant=demo_segmentation`) "ufp" is the unscathed
pyramid alone. One table, a row for each pyramid; with several seeds, means and the largest distance
from them.
"""

import tempfile
import time

import numpy as np
from absl import app, flags, logging
from etils import epath

from vit_jax_zoo import config as schema
from vit_jax_zoo import trainer as experiment

_VARIANT = flags.DEFINE_enum(
  "variant", "demo", ["demo", "demo_mask", "demo_segmentation"], "Of configs/fpt.py."
)
_NECKS = flags.DEFINE_list("necks", None, "Pyramids to train; by default all that there are.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Each is a run.")
_STEPS = flags.DEFINE_integer("num_steps", 400, "Of each run.")
_SCORES = (
  "box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "miou", "pixel_accuracy"
)  # fmt: skip


def run(neck: str, seed: int) -> tuple[dict[str, float], float]:
  """Trains one detector; returns its scores on the test scenes and the seconds that it took."""
  argument = f"configs/fpt.py:{_VARIANT.value},neck={neck},num_steps={_STEPS.value}"
  config = schema.load(argument)
  config.seed = seed
  config.explain = False  # pictures that fpt alone has, and that take time
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    outcome = experiment.run(config, epath.Path(folder))
  scores = {name.rpartition("/")[2]: value for name, value in outcome.scores.items()}
  return scores, time.perf_counter() - start


def _cell(values: list[float], digits: int) -> str:
  middle = float(np.mean(values))
  spread = max(abs(value - middle) for value in values)
  return f"{middle:.{digits}f}" + (f" +-{spread:.{digits}f}" if len(values) > 1 else "")


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  print(f"{_VARIANT.value}, {_STEPS.value} steps, seeds {', '.join(_SEEDS.value)}")
  every = ["ufp", "fpt"] if _VARIANT.value == "demo_segmentation" else ["bfp", "fpn", "fpt"]
  for place, neck in enumerate(_NECKS.value or every):
    runs = [run(neck, int(seed)) for seed in _SEEDS.value]
    names = [name for name in _SCORES if name in runs[0][0]]
    if not place:
      print("| pyramid | " + " | ".join(names) + " | seconds |")
      print("|---" * (len(names) + 2) + "|")
    cells = [_cell([scores[name] for scores, _ in runs], 3) for name in names]
    cells.append(_cell([seconds for _, seconds in runs], 0))
    print(f"| {neck} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  app.run(main)
