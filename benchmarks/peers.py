r"""Speed of every system compared with timm, transformers and PyTorch.

    python benchmarks/peers.py                                # all pairs, at sizes for a CPU
    python benchmarks/peers.py --pairs=vit,detr --rounds=7
    python benchmarks/peers.py --pairs=vit --model=vit_b16 --batch_size=256 --dtype=bfloat16
    python benchmarks/peers.py --compile                      # torch.compile on a CPU
    python benchmarks/peers.py --unroll                       # scan_layers=False
    python benchmarks/peers.py --gpu                          # sizes and precision for a GPU

| pair          | this package                      | peer                                    |
|---------------|-----------------------------------|-----------------------------------------|
| vit           | train and prediction steps        | timm                                    |
| lambda_resnet | train and prediction steps        | timm, also channels last                |
| igpt          | train step, sampling              | transformers, also with fused attention |
| detr          | train and prediction steps        | transformers                            |
| ttsr          | texture search, its gradients     | the official algorithm in PyTorch       |
| fpt           | feature pyramid, its gradients    | the official modules in PyTorch         |

Both sides use the same number of threads, each in its own process, and run alternately; the order
is reversed in every other round. This package exports its weights in a published format and the
peer loads them. "difference" is the largest difference between their outputs (logits, boxes, the
first training loss, ...) relative to the largest output. Every mode of the peer is measured: eager,
compiled, channels last, fused attention. With `--gpu`, both use bfloat16 (the peer by autocast) and
the peer uses torch.compile, TF32, cuDNN's autotuner and fused attention.

A ratio is the peer's time divided by ours, round by round: above 1, ours is faster. `--output`
writes the results as JSON, with every measured time, and Markdown.
Requires `pip install -e '.[parity]'`.
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
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory, too

import numpy as np
import timing
from implementations.base import Implementation, Setting, job_of


class Size(NamedTuple):
  """Default sizes for one kind of machine."""

  model: str
  batch_size: int
  image_size: int
  pixels: int = 32


class Pair(NamedTuple):
  """A comparison: a function of `implementations/ours.py` and a module of `implementations`."""

  ours: str
  peer: str
  cpu: Size
  gpu: Size
  packages: tuple[str, ...] = ()


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
  "ttsr": Pair("texture_search", "torch_ttsr", Size("search", 1, 40), Size("search", 9, 40)),
  "fpt": Pair("pyramid", "torch_fpt", Size("fpt_64", 2, 256), Size("fpt_256", 2, 512)),
}


@dataclasses.dataclass
class Worker:
  """One implementation in its own process."""

  process: Any
  pipe: Connection

  def request(self, *command: Any) -> Any:
    """Returns a command's result; RuntimeError if it fails, with the traceback on stderr."""
    self.pipe.send(command)
    try:
      succeeded, result = self.pipe.recv()
    except EOFError:
      succeeded, result = False, "the process died, possibly out of memory"
    if not succeeded:
      raise RuntimeError(result)
    return result

  def close(self) -> None:
    """Ends the process."""
    self.pipe.close()
    self.process.join(timeout=10)
    self.process.terminate()


def start(function: tuple[str, str], setting: Setting, cores: Sequence[int]) -> Worker:
  """Starts a worker on some CPU cores (empty: all).

  `function` is module and name of the function from the setting to the implementation.
  """
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  process = context.Process(target=serve, args=(there, function, setting, cores), daemon=True)
  process.start()
  there.close()
  return Worker(process, here)


def serve(
  pipe: Connection, function: tuple[str, str], setting: Setting, cores: Sequence[int]
) -> None:
  """Executes commands until the pipe closes: the main function of a worker."""
  if cores:  # before the libraries create their thread pools
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
  side: Implementation | None = None
  while True:
    try:
      name, *args = pipe.recv()
    except EOFError:
      return
    try:
      if name == "create":
        module, create = function
        side = getattr(importlib.import_module(module), create)(setting)
        fields = dataclasses.replace(side, runs={})
        result = {**dataclasses.asdict(fields), "runs": [*side.runs]}
      elif name == "steps_for":
        result = timing.steps_for(side.runs[args[0]], args[1])
      else:
        result = tuple(timing.time_steps(side.runs[args[0]], args[1]))
      pipe.send((True, result))
    except Exception as error:
      traceback.print_exc()
      pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def differences(ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns the largest differences relative to the largest output; for "index", the fraction."""
  result = {}
  for name, x in ours.items():
    y = peer[name]
    if x.shape != y.shape:
      raise RuntimeError(f"{name}: shape {x.shape}, but the peer's is {y.shape}")
    if name == "index":
      result[name] = float(np.mean(x != y))
    else:
      result[name] = float(np.max(np.abs(x - y)) / max(1e-30, np.max(np.abs(y))))
  return result


def compare(name: str, setting: Setting, flags: argparse.Namespace) -> dict[str, Any]:
  """Measures one pair; returns the setting, differences and all times."""
  pair = PAIRS[name]
  cores = timing.available_cores()[: flags.threads]
  modules = {
    "ours": ("implementations.ours", pair.ours),
    "peer": (f"implementations.{pair.peer}", "create"),
  }
  workers: dict[str, Worker] = {}
  try:
    sides = {}
    for who, function in modules.items():  # ours first: the peer reads its weights
      workers[who] = start(function, setting, cores)
      sides[who] = workers[who].request("create")
    runs = [(who, run) for who in modules for run in sides[who]["runs"]]
    counts = {key: workers[key[0]].request("steps_for", key[1], flags.seconds) for key in runs}
    load, times = os.getloadavg(), {key: [] for key in runs}
    for turn in range(flags.rounds):
      for key in runs[:: -1 if turn % 2 else 1]:
        wall, cpu = workers[key[0]].request("time", key[1], counts[key])
        times[key].append([float(f"{wall:.5g}"), float(f"{cpu:.5g}")])
  finally:
    for worker in workers.values():
      worker.close()
  fields = dataclasses.asdict(setting)
  del fields["folder"]
  return {
    "pair": name,
    "setting": fields,
    "threads": len(cores),
    "devices": {who: sides[who]["device"] for who in modules},
    "load_average": [round(load[0], 1), round(os.getloadavg()[0], 1)],
    "differences": differences(sides["ours"]["outputs"], sides["peer"]["outputs"]),
    "skipped": sides["peer"]["skipped"],
    "seconds": {f"{who}: {run}": value for (who, run), value in times.items()},
  }


def ratios(seconds: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
  """Returns the peer's time divided by ours for every mode of the peer, round by round.

  `seconds` are wall and CPU time per step in each round, by "ours: job" and "peer: job, mode".
  """
  rows = []
  for name, peer in seconds.items():
    who, _, run = name.partition(": ")
    if who != "peer":
      continue
    ours = seconds[f"ours: {job_of(run)}"]
    pairs = list(zip(peer, ours, strict=True))
    rows.append({
      "job": job_of(run),
      "mode": run.partition(", ")[2],
      "ours_ms": [1e3 * wall for wall, _ in ours],
      "peer_ms": [1e3 * wall for wall, _ in peer],
      "ratio": [a[0] / b[0] for a, b in pairs],
      "cpu_ratio": [a[1] / max(b[1], 1e-9) for a, b in pairs],
    })  # fmt: skip
  return rows


def table(results: Sequence[dict[str, Any]]) -> str:
  """Returns the results as Markdown; the peer's fastest mode of each job is bold."""
  header = ("model, job", "peer", "ours, ms", "peer, ms", "peer / ours", "CPU time", "difference")
  rows = []
  for result in results:
    modes = ratios(result["seconds"])
    fastest: dict[str, float] = {}
    for row in modes:
      middle = statistics.median(row["peer_ms"])
      fastest[row["job"]] = min(middle, fastest.get(row["job"], middle))
    for row in modes:
      best = statistics.median(row["peer_ms"]) == fastest[row["job"]]
      ratio = timing.spread(row["ratio"], ".2f")
      rows.append([
        f"{result['setting']['model']}, {row['job']}",
        row["mode"],
        timing.spread(row["ours_ms"]),
        timing.spread(row["peer_ms"]),
        f"**{ratio}**" if best else ratio,
        timing.spread(row["cpu_ratio"], ".2f") if _on_cpu(result) else "-",
        f"{max(result['differences'].values()):.0e}",
      ])  # fmt: skip
  return timing.markdown(header, rows)


def _on_cpu(result: dict[str, Any]) -> bool:
  return "cpu" in result["devices"]["ours"].lower()


def page(report: dict[str, Any]) -> str:
  """Returns the report as a Markdown page."""
  lines = [
    "# Comparison with peers",
    "",
    f"`{report['command']}`, {report['date']}, {report['machine']}; {report['versions']}.",
    "",
    table(report["results"]),
    "",
    "Median (range) of the rounds; above 1, ours is faster. Bold: the peer's fastest mode.",
    "",
  ]
  for result in report["results"]:
    s, (before, after) = result["setting"], result["load_average"]
    unrolled = ", layers unrolled" if s["unroll"] else ""
    lines.append(
      f"* {result['pair']}: {s['model']}, batch {s['batch_size']}, image size {s['image_size']}, "
      f"{s['dtype']}, {result['threads']} threads{unrolled}; load average {before:.1f} before, "
      f"{after:.1f} after"
    )
    lines += [f"  * not measured: {job}: {reason}" for job, reason in result["skipped"].items()]
  lines += [f"* {name}: not measured: {reason}" for name, reason in report["failed"].items()]
  return "\n".join(lines) + "\n"


def to_json(report: dict[str, Any]) -> str:
  """Returns the report as JSON with one line per pair."""
  fields = [f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in report.items() if k != "results"]
  results = ",\n".join(f"  {json.dumps(result)}" for result in report["results"])
  return f'{{\n{"".join(fields)} "results": [\n{results}\n ]\n}}\n'


def settings(flags: argparse.Namespace, folder: str) -> dict[str, Setting]:
  """Returns the setting of each pair."""
  result = {}
  for name in flags.pairs.split(","):
    if name not in PAIRS:
      sys.exit(f"--pairs: unknown pair {name!r}; expected {', '.join(PAIRS)}")
    size = PAIRS[name].gpu if flags.gpu else PAIRS[name].cpu
    own = pathlib.Path(folder) / name
    own.mkdir()
    result[name] = Setting(
      str(own),
      flags.model or size.model,
      flags.batch_size or size.batch_size,
      flags.image_size or size.image_size,
      flags.dtype or ("bfloat16" if flags.gpu else "float32"),
      flags.pixels or size.pixels,
      ("eager", "compiled") if flags.compile or flags.gpu else ("eager",),
      flags.unroll,
    )
  return result


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--pairs", default=",".join(PAIRS), help="separated by commas")
  parser.add_argument("--model", help="for a single pair; fpt_<width> for fpt")
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--image_size", type=int, help="ttsr: side of the feature maps")
  parser.add_argument("--pixels", type=int, help="igpt: number of pixels to sample")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"))
  parser.add_argument("--compile", action="store_true", help="torch.compile also on a CPU")
  parser.add_argument("--unroll", action="store_true", help="unroll our layers, default: scan")
  parser.add_argument("--gpu", action="store_true", help="sizes and precision for a GPU")
  parser.add_argument("--threads", type=int, help="threads per side, default: all cores")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=1.0, help="approximate length of a turn")
  parser.add_argument("--output", help="folder for <name>.json and <name>.md")
  parser.add_argument("--name", default="peers", help="name of the results files")
  return parser.parse_args()


def main() -> None:
  """Measures all pairs, prints the page and writes the files."""
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
    "failed": failed,
    "results": results,
  }
  text = page(report)
  print(text)
  if flags.output:
    output = pathlib.Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{flags.name}.json").write_text(to_json(report))
    (output / f"{flags.name}.md").write_text(text)
  sys.exit(1 if failed else 0)


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "missing"


def _machine(results: Sequence[dict[str, Any]]) -> str:
  cores = len(timing.available_cores()) or os.cpu_count()
  gpus = {result["devices"]["ours"] for result in results if not _on_cpu(result)}
  return ", ".join([*gpus, f"{cores} cores of {timing.cpu_name()}"])


def _commit() -> str:
  command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.strip() or "unknown"


if __name__ == "__main__":
  main()
