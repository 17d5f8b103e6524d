r"""Scores of all demos with several seeds: median and range, for README and docs/RECIPES.md.

    python benchmarks/demos.py
    python benchmarks/demos.py --demos=vit.py,ttsr.py --seeds=0,1,2 --output=benchmarks/results

Finished pairs of demo and seed are not run again: the same command resumes after an interruption.
All nine demos with three seeds take about two hours on two idle CPU cores. Rounding depends on the
number of cores and the versions, and a run of a few hundred steps amplifies it: compare medians.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import timing

ROOT = pathlib.Path(__file__).parent.parent

DEMOS = {
  "vit.py": ("test/accuracy",),
  "igpt.py": ("test/nats", "test/bigram_nats", "probe/pixels"),
  "lambda_resnet.py": ("test/accuracy",),
  "detr.py": ("test/box_ap50", "test/box_ap"),
  "detr.py:demo_panoptic": ("test/pq", "test/pq_things", "test/pq_stuff"),
  "ttsr.py": ("test/psnr", "test/bicubic_psnr", "test/wrong_reference_psnr"),
  "fpt.py": ("test/box_ap50", "test/box_ap"),
  "fpt.py:demo_mask": ("test/mask_ap50", "test/mask_ap", "test/box_ap50"),
  "fpt.py:demo_segmentation": ("test/miou",),
}
"""Reported metrics of each demo, as its metrics.jsonl has them."""


def last_scores(metrics: pathlib.Path, names: Sequence[str]) -> dict[str, float]:
  """Returns the last value of each metric of a run; SystemExit if one is missing."""
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  merged = {name: value for row in rows for name, value in row.items()}
  if missing := [name for name in names if name not in merged]:
    found = ", ".join(sorted(name for name in merged if "/" in name))
    sys.exit(f"{metrics}: no {', '.join(missing)}; found {found}")
  return {name: merged[name] for name in names}


def run(demo: str, seed: int, folder: pathlib.Path, options: Sequence[str]) -> dict[str, Any]:
  """Trains a demo in a new process and returns its scores and minutes; SystemExit if it fails."""
  workdir = folder / f"{demo.replace('.py', '').replace(':', '_')}_{seed}"
  command = [sys.executable, "-m", "vit_jax_zoo.main", f"--config=configs/{demo}"]
  command += [f"--config.seed={seed}", f"--workdir={workdir}", *options]
  start, log = time.time(), workdir.with_suffix(".log")
  with log.open("w") as file:
    done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
  if done.returncode:
    sys.exit(f"{demo} with seed {seed}: exit code {done.returncode}, see {log}")
  scores = last_scores(workdir / "metrics.jsonl", DEMOS[demo])
  return {"demo": demo, "seed": seed, "minutes": (time.time() - start) / 60, "scores": scores}


def table(runs: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table: a row per demo and metric, with the median and range of its seeds."""
  rows = []
  for demo, metrics in DEMOS.items():
    seeds = sorted((r for r in runs if r["demo"] == demo), key=lambda r: r["seed"])
    for metric in metrics if seeds else ():
      values = [r["scores"][metric] for r in seeds]
      rows.append(
        [
          f"`configs/{demo}`",
          metric,
          f"{statistics.median(values):.4g}",
          f"{min(values):.4g} to {max(values):.4g}",
          ", ".join(f"{value:.4g}" for value in values),
          f"{statistics.median(r['minutes'] for r in seeds):.1f}",
        ]
      )
  return timing.markdown(["demo", "metric", "median", "range", "by seed", "minutes"], rows)


def main() -> None:
  """Runs what is missing, and writes demos.json and demos.md after each run."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--demos", default=",".join(DEMOS), help="default: all nine")
  parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
  parser.add_argument("--workdir", default="runs/demos", help="folder of the runs and logs")
  parser.add_argument("--output", default="benchmarks/results", help="folder of the results")
  flags, options = parser.parse_known_args()
  if unknown := set(flags.demos.split(",")) - set(DEMOS):
    sys.exit(f"--demos: unknown {', '.join(sorted(unknown))}; expected {', '.join(DEMOS)}")
  if wrong := [option for option in options if not option.startswith("--config.")]:
    sys.exit(f"{' '.join(wrong)}: unknown; only --config.field=value is passed on to the runs")
  folder, output = pathlib.Path(flags.workdir).absolute(), pathlib.Path(flags.output)
  for path in (folder, output):
    path.mkdir(parents=True, exist_ok=True)
  file = output / "demos.json"
  runs = json.loads(file.read_text())["runs"] if file.exists() else []
  done = {(r["demo"], r["seed"]) for r in runs}
  pairs = [(demo, int(seed)) for demo in flags.demos.split(",") for seed in flags.seeds.split(",")]
  missing = [pair for pair in pairs if pair not in done]
  start = time.time()
  for i, (demo, seed) in enumerate(missing):
    eta = f", ETA {(time.time() - start) / i / 60 * (len(missing) - i):.0f} min" if i else ""
    print(f"{i + 1}/{len(missing)} {demo} seed {seed}{eta}", file=sys.stderr, flush=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found = run(demo, seed, folder, options)
    runs.append(found | {"date": date, "machine": timing.machine("optax"), "options": options})
    file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (output / "demos.md").write_text(page(runs))
  print(page(runs))


def page(runs: Sequence[dict[str, Any]]) -> str:
  """Returns the results page: the table, and date and machine of the runs."""
  made = sorted({f"* {r['date']}: {r['machine'].partition(', load')[0]}" for r in runs})
  head = "# Scores of the demos\n\n`python benchmarks/demos.py`: the last evaluation of each run."
  return "\n\n".join([head, table(runs), "\n".join(made)]) + "\n"


if __name__ == "__main__":
  main()
