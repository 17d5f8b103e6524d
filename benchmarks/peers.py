r"""Ours beside the peer: one machine, the same weights and batch, in turns; ratios with spread.

    python benchmarks/peers.py                                # all that is here, at sizes for a CPU
    python benchmarks/peers.py --pairs=vit,detr --rounds=7
    python benchmarks/peers.py --pairs=vit --model=vit_b16 --batch_size=256 --dtype=bfloat16
    python benchmarks/peers.py --compile                      # on a CPU; a GPU always has it
    python benchmarks/peers.py --unroll                       # ours with scan_layers off

| pair          | ours                              | peer                                     |
|---------------|-----------------------------------|------------------------------------------|
| vit           | train and prediction step         | timm                                     |
| lambda_resnet | the same                          | timm, also with channels last            |
| igpt          | train step; last pixels drawn     | transformers, also with fused attention  |
| detr          | train and prediction step         | transformers                             |
| ttsr          | search for patches, and gradients | the official algorithm, written in torch |
| fpt           | pyramid, and gradients            | the released modules, written in torch   |

Both sides compute with as many threads, each in a process of its own, so that thread pools do not
meet; one waits while the other works, and who begins changes from round to round. Ours writes the
weights as they are published, the peer reads that file: "differs" is how far the answers are apart
(logits, boxes, the loss of the first training step ...), relative to the largest. Every form of the
peer is measured: eager, compiled, whatever else a careful user would try. On a GPU both have
bfloat16 (the peer by autocast), the peer torch.compile, TF32, cuDNN's search and fused attention.

A ratio is the peer's time by ours, round by round: above 1, ours is faster. The results go to
`--output` as JSON (every single time) and Markdown. Needs `pip install -e '.[parity]'`.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory, too

import numpy as np
from implementations.base import Setting, Side, job_of


class Size(NamedTuple):
  """What is compared by default on one kind of machine."""

  model: str
  batch_size: int
  image_size: int
  pixels: int = 32


class Pair(NamedTuple):
  """Who is compared: a function of `implementations/ours.py`, and a module of `implementations`."""

  ours: str
  peer: str
  cpu: Size
  gpu: Size
  packages: tuple[str, ...]


PAIRS = {
  "vit": Pair(
    "classification", "timm_models", Size("vit_s16", 4, 224), Size("vit_b16", 256, 224), ("timm",)
  ),
  "lambda_resnet": Pair(
    "classification",
    "timm_models",
    Size("lambda_resnet26t", 4, 128),
    Size("lambda_resnet26t", 256, 256),
    ("timm",),
  ),
  "igpt": Pair(
    "pixels",
    "hf_imagegpt",
    Size("igpt_s", 1, 16),
    Size("igpt_s", 64, 32, 1023),
    ("transformers",),
  ),
  "detr": Pair(
    "detection",
    "hf_detr",
    Size("detr_r50", 1, 320),
    Size("detr_r50", 16, 800),
    ("transformers", "scipy"),
  ),
  "ttsr": Pair("relevance", "torch_ttsr", Size("search", 1, 40), Size("search", 9, 40), ()),
  "fpt": Pair("pyramid", "torch_fpt", Size("fpt_64", 2, 256), Size("fpt_256", 2, 512), ()),
}


@dataclasses.dataclass
class Worker:
  """One side in a process of its own."""

  process: Any
  pipe: Connection

  def ask(self, *question: Any) -> Any:
    """Sends a question and returns the answer.

    Raises:
      RuntimeError: the other process failed; its traceback stands on stderr.
    """
    self.pipe.send(question)
    try:
      good, answer = self.pipe.recv()
    except EOFError:
      good, answer = False, "the process ended, perhaps for want of memory"
    if not good:
      raise RuntimeError(answer)
    return answer

  def close(self) -> None:
    """Ends the process."""
    self.pipe.close()
    self.process.join(timeout=10)
    self.process.terminate()


def start(function: Any, setting: Setting, cores: Sequence[int]) -> Worker:
  """Starts a side; `function` names its module and the function there."""
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  process = context.Process(target=serve, args=(there, function, setting, cores), daemon=True)
  process.start()
  there.close()
  return Worker(process, here)


def serve(pipe: Connection, function: Any, setting: Setting, cores: Sequence[int]) -> None:
  """Answers the driver's questions until it hangs up: the life of a worker."""
  if cores:  # before the libraries count them
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
  timing = importlib.import_module("timing")
  side: Side | None = None
  while True:
    try:
      name, *args = pipe.recv()
    except EOFError:
      return
    try:
      if name == "prepare":
        module, maker = function
        side = getattr(importlib.import_module(module), maker)(setting)
        answer = {**dataclasses.asdict(dataclasses.replace(side, runs={})), "runs": [*side.runs]}
      elif name == "count":
        answer = timing.steps_for(side.runs[args[0]], args[1])
      else:
        answer = tuple(timing.time_steps(side.runs[args[0]], args[1]))
      pipe.send((True, answer))
    except Exception as error:
      traceback.print_exc()
      pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def available_cores() -> list[int]:
  """Returns the cores that this process may use; none where the system does not tell."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns how far answers are apart, relative to the largest (indices: how many differ)."""
  found = {}
  for name, mine in ours.items():
    other = theirs[name]
    if mine.shape != other.shape:
      raise RuntimeError(f"{name}: ours is {mine.shape}, the peer's {other.shape}")
    if name == "index":
      found[name] = float(np.mean(mine != other))
    else:
      found[name] = float(np.max(np.abs(mine - other)) / max(1e-30, np.max(np.abs(other))))
  return found


def compare(name: str, setting: Setting, flags: argparse.Namespace) -> dict[str, Any]:
  """Measures one pair; returns everything that is to be known about it."""
  pair = PAIRS[name]
  cores = (
    sorted(os.sched_getaffinity(0))[: flags.threads] if hasattr(os, "sched_getaffinity") else []
  )
  sides = {
    "ours": ("implementations.ours", pair.ours),
    "peer": (f"implementations.{pair.peer}", "side"),
  }
  workers: dict[str, Worker] = {}
  try:
    facts = {}
    for who, function in sides.items():  # one after the other: the peer reads what ours writes
      workers[who] = start(function, setting, cores)
      facts[who] = workers[who].ask("prepare")
    runs = [(who, run) for who in sides for run in facts[who]["runs"]]
    counts = {key: workers[key[0]].ask("count", key[1], flags.seconds) for key in runs}
    load, times = os.getloadavg(), {key: [] for key in runs}
    for turn in range(flags.rounds):
      for key in runs[:: -1 if turn % 2 else 1]:
        times[key].append(workers[key[0]].ask("time", key[1], counts[key]))
  finally:
    for worker in workers.values():
      worker.close()
  fields = dataclasses.asdict(setting)
  del fields["folder"]
  return {
    "pair": name,
    "setting": fields,
    "threads": len(cores),
    "devices": {who: facts[who]["device"] for who in sides},
    "load_average": {"before": load, "after": os.getloadavg()},
    "differs": differences(facts["ours"]["answers"], facts["peer"]["answers"]),
    "skipped": facts["peer"]["skipped"],
    "steps": {f"{who}: {run}": count for (who, run), count in counts.items()},
    "seconds": {f"{who}: {run}": value for (who, run), value in times.items()},
    "ratios": ratios(times),
  }


def ratios(times: dict[tuple[str, str], list[Any]]) -> list[dict[str, Any]]:
  """Returns the peer's time by ours for every form of the peer, round by round."""
  return [
    {
      "job": job_of(run),
      "form": run.partition(", ")[2],
      "ours_ms": [1e3 * wall for wall, _ in times["ours", job_of(run)]],
      "peer_ms": [1e3 * wall for wall, _ in values],
      "ratio": [a[0] / b[0] for a, b in zip(values, times["ours", job_of(run)], strict=True)],
      "cpu_ratio": [
        a[1] / max(b[1], 1e-9) for a, b in zip(values, times["ours", job_of(run)], strict=True)
      ],
    }
    for (who, run), values in times.items()
    if who == "peer"
  ]


def table(results: Sequence[dict[str, Any]]) -> str:
  """Returns the results as Markdown; the peer's fastest form of each job is marked."""
  timing = importlib.import_module("timing")
  header = ("pair, job", "peer", "ours, ms", "peer, ms", "peer / ours", "by CPU time", "differs")
  rows = []
  for result in results:
    fastest: dict[str, float] = {}
    for row in result["ratios"]:
      middle = statistics.median(row["peer_ms"])
      fastest[row["job"]] = min(middle, fastest.get(row["job"], middle))
    for row in result["ratios"]:
      best = statistics.median(row["peer_ms"]) == fastest[row["job"]]
      ratio = timing.spread(row["ratio"], ".2f")
      rows.append(
        [
          f"{result['setting']['model']}, {row['job']}",
          row["form"],
          timing.spread(row["ours_ms"]),
          timing.spread(row["peer_ms"]),
          f"**{ratio}**" if best else ratio,
          timing.spread(row["cpu_ratio"], ".2f") if "cpu" in _kind(result) else "-",
          f"{max(result['differs'].values()):.0e}",
        ]
      )
  return timing.markdown(header, rows)


def _kind(result: dict[str, Any]) -> str:
  return result["devices"]["ours"].lower()


def document(report: dict[str, Any]) -> str:
  """Returns the report as a page."""
  lines = [
    "# Ours beside the peers",
    "",
    f"`{report['command']}`, {report['date']}, {report['machine']}; {report['versions']}.",
    "",
    table(report["results"]),
    "",
    "Median (range) of the rounds; above 1, ours is faster. Bold: beside the peer's fastest form.",
    "",
  ]
  for result in report["results"]:
    s, load = result["setting"], result["load_average"]
    form = ", ours unrolled" if s["unroll"] else ""
    lines.append(
      f"* {result['pair']}: {s['model']}, batch {s['batch_size']}, side {s['image_size']}, "
      f"{s['dtype']}, {result['threads']} threads{form}; load average {load['before'][0]:.1f}, "
      f"afterwards {load['after'][0]:.1f}"
    )
    lines += [f"  * not measured: {job}: {why}" for job, why in result["skipped"].items()]
  lines += [f"* {name}: not measured: {why}" for name, why in report["failed"].items()]
  return "\n".join(lines) + "\n"


def settings(flags: argparse.Namespace, folder: str) -> dict[str, Setting]:
  """Returns what is compared, by pair."""
  found = {}
  for name in flags.pairs.split(","):
    if name not in PAIRS:
      sys.exit(f"there is no pair {name!r}; there are {', '.join(PAIRS)}")
    size = PAIRS[name].gpu if flags.gpu else PAIRS[name].cpu
    place = pathlib.Path(folder) / name
    place.mkdir()
    found[name] = Setting(
      str(place),
      flags.model or size.model,
      flags.batch_size or size.batch_size,
      flags.image_size or size.image_size,
      flags.dtype or ("bfloat16" if flags.gpu else "float32"),
      flags.pixels or size.pixels,
      ("eager", "compiled") if flags.compile or flags.gpu else ("eager",),
      flags.unroll,
    )
  return found


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--pairs", default=",".join(PAIRS), help="separated by commas")
  parser.add_argument("--model", help="with one pair; fpt_<width> for fpt")
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--image_size", type=int, help="ttsr: side of the maps that are searched")
  parser.add_argument("--pixels", type=int, help="igpt: how many of an image are drawn")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"))
  parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU, too")
  parser.add_argument("--unroll", action="store_true", help="layers that we would scan")
  parser.add_argument("--gpu", action="store_true", help="sizes and precision for a GPU")
  parser.add_argument("--threads", type=int, help="of each side; by default as many as cores")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
  parser.add_argument("--output", help="folder of <name>.json and .md; else they are printed")
  parser.add_argument("--name", default="peers", help="of the results")
  return parser.parse_args()


def main() -> None:
  """Measures pair after pair, prints the page, writes the files."""
  flags = parse()
  packages = ["jax", "flax", "torch"]
  results, failed = [], {}
  with tempfile.TemporaryDirectory() as folder:
    for name, setting in settings(flags, folder).items():
      packages += [p for p in PAIRS[name].packages if p not in packages]
      print(f"{name}: {setting.model} ...", file=sys.stderr, flush=True)
      try:
        results.append(compare(name, setting, flags))
      except RuntimeError as error:
        failed[name] = str(error)
  versions = [f"{name} {_version(name)}" for name in packages]
  report = {
    "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "machine": _machine(results),
    "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    "commit": _commit(),
    "results": results,
    "failed": failed,
  }
  page = document(report)
  print(page)
  if flags.output:
    place = pathlib.Path(flags.output)
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{flags.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (place / f"{flags.name}.md").write_text(page)
  sys.exit(1 if failed else 0)


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "missing"


def _machine(results: Sequence[dict[str, Any]]) -> str:
  cores = len(available_cores()) or os.cpu_count()
  cpu = importlib.import_module("timing").cpu_name()
  gpus = {r["devices"]["ours"] for r in results if "cpu" not in _kind(r)}
  return ", ".join([*gpus, f"{cores} cores of {cpu}"])


def _commit() -> str:
  command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.strip() or "unknown"


if __name__ == "__main__":
  main()
