"""Writes docs/PLANS.md: memory, FLOPs and a lower bound on the time of every recipe.

    python docs/make_plans.py
    python docs/make_plans.py --only='configs/vit.py:*v5e*' --optimization_level=O1
    python docs/make_plans.py --only=nothing          only the page, from docs/plans.json

Each recipe is compiled in its own process by `vit_jax_zoo.plan`, for the slices in
`docs/slices.toml`; `docs/plans.json` stores the results, one row per line, from which an
interrupted run resumes. Rows of another optimization level than the default are compiled again when
none is given.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax_zoo.config import load
from vit_jax_zoo.planning.plan import ASSUMPTIONS, gib, seconds
from vit_jax_zoo.training import disk

PAGE, PLANS, SLICES, LOCK = (
  pathlib.Path("docs") / name for name in ("PLANS.md", "plans.json", "slices.toml", ".plans.lock")
)


class Row(NamedTuple):
  """A recipe on a slice."""

  config: str  # such as `configs/vit.py:b16_imagenet`
  topology: str  # TPU slice, such as `v5e:4x4`
  overrides: tuple[str, ...] = ()  # config flags that this slice needs

  @property
  def key(self) -> str:
    """Key of the row in `docs/plans.json`."""
    return f"{self.config} {self.topology}"


def recipes() -> list[str]:
  """Returns the variants of configs/ without demos: `configs/vit.py:b16_imagenet`."""
  files = sorted(pathlib.Path("configs").glob("*.py"))
  modules = {path: importlib.import_module(f"configs.{path.stem}") for path in files}
  variants = [f"{p}:{name}" for p, m in modules.items() for name in getattr(m, "VARIANTS", ())]
  return [variant for variant in variants if ":demo" not in variant]


def rows() -> tuple[list[Row], dict[str, str]]:
  """Returns the rows of the page, and the recipes without a row with the reason."""
  sections = tomllib.loads(SLICES.read_text(encoding="utf-8"))["slice"]
  found, without = [], {}
  for recipe in recipes():
    name = recipe.removeprefix("configs/")
    matching = [s for s in sections if fnmatch.fnmatchcase(name, s["recipes"])]
    if not matching:
      raise ValueError(f"{SLICES}: no section for {name}; add one with topology or not_planned")
    reasons = [s["not_planned"] for s in matching if "not_planned" in s]
    if reasons:
      without[recipe] = reasons[0]
    else:
      found += [Row(recipe, s["topology"], tuple(s.get("overrides", ()))) for s in matching]
  return found, without


def compile_all(pattern: str, time_limit: int, level: str | None = None) -> int:
  """Compiles the rows whose key matches, and that are missing or out of date; writes the page.

  The time limit is in seconds per row. At XLA's default `level`, None, rows of another level are
  compiled again. Returns the exit status: 1 if a row does not fit or failed to compile, else 0.
  """
  failed = False
  for row in rows()[0]:
    if not fnmatch.fnmatchcase(row.key, f"*{pattern}*") or _is_current(row, _stored(), level):
      continue
    print(f"compiling {row.key}", flush=True)  # noqa: T201
    result = {**_compile(row, time_limit, level), "digest": digest(row)}
    failed |= not result.get("fits")
    write_page({row.key: result})
  write_page()
  return int(failed)


def write_page(found: Mapping[str, Any] | None = None) -> None:
  """Writes the page from the stored results, after storing new ones, by row key."""
  with LOCK.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # closing the file, or the end of the process, unlocks it
    if found:
      results = {**_stored(), **found}  # read again: other processes may have stored other rows
      keys = {row.key for row in rows()[0]}
      lines = [f"{json.dumps(k)}: {json.dumps(results[k])}" for k in sorted(results) if k in keys]
      disk.write(PLANS, "{\n" + ",\n".join(lines) + "\n}\n")
    disk.write(PAGE, page())


def _compile(row: Row, time_limit: int, level: str | None) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "plan.json"
    arguments = (f"--config={row.config}", f"--topology={row.topology}", f"--output={output}")
    arguments += (f"--optimization_level={level}",) if level else ()
    command = [sys.executable, "-m", "vit_jax_zoo.plan", *arguments, *row.overrides]
    try:
      run = subprocess.run(command, capture_output=True, text=True, timeout=time_limit, check=False)
    except subprocess.TimeoutExpired:
      return {"error": f"stopped after {time_limit} s"}
    if not output.exists():
      lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
      return {"error": lines[-1].removeprefix("error: ")[:300]}
    return compact(json.loads(output.read_text()))


def compact(plan: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a plan that the page shows, as one flat dict of rounded figures."""
  sizes = {name: plan["memory"][name] for name in MEMORY}
  fields = {
    "fits": plan["fits"],
    "mesh": {axis: size for axis, size in plan["mesh"].items() if size > 1},
    "remat": plan["remat"],
    **{name: None if size is None else round(size) for name, size in sizes.items()},
    "tflop": _rounded(plan["flops"] / 1e12),
    "step_seconds": _rounded(plan["step_seconds"]),
    "bound": (plan["roofline"] or {}).get("bound"),
    "days": _rounded(plan["days"]),
    "compile_seconds": _rounded(plan["compile_seconds"]),
    "compile_cpu_seconds": _rounded(plan["compile_cpu_seconds"]),
    "optimization_level": plan.get("optimization_level"),
    "date": plan["date"],
    "jax_version": plan["jax_version"],
  }
  return {name: value for name, value in fields.items() if value is not None}


def _rounded(value: float | None) -> float | None:
  return None if value is None else float(f"{value:.6g}")


def _stored() -> dict[str, Any]:
  return json.loads(PLANS.read_text(encoding="utf-8")) if PLANS.exists() else {}


def _is_current(row: Row, results: Mapping[str, Any], level: str | None) -> bool:
  result = results.get(row.key, {})
  has_level = result.get("optimization_level") in (None, level)
  return has_level and result.get("digest") == digest(row) and "error" not in result


def digest(row: Row) -> str:
  """Returns a hash of the config fields on which a row's plan depends."""
  config = json.loads(load(row.config, row.overrides).to_json_best_effort())
  fields = {field: config[field] for field in DECISIVE}
  fields["optimizer"] = _without_rates(fields["optimizer"])
  fields["data"] = config["data"]["train"], config["data"]["loader"].get("buckets")
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _without_rates(tree: Any) -> Any:
  """Drops learning rates and schedules, which do not change the compiled step."""
  if isinstance(tree, dict):
    return {k: _without_rates(v) for k, v in tree.items() if k not in ("learning_rate", "schedule")}
  return [_without_rates(v) for v in tree] if isinstance(tree, list) else tree


DECISIVE = (
  "model", "task", "optimizer", "batch_size", "accumulation_steps", "num_steps", "num_epochs",
  "ema_decay", "sharding",
)  # fmt: skip
"""Config fields on which a plan depends, besides the training data."""

MEMORY = ("peak", "limit", "params", "optimizer", "temporary")  # bytes per device, of `Memory`

HEAD = """# Resources of the recipes

Written by `python docs/make_plans.py`; do not edit. For each row, libtpu compiled the
recipe's training step for a TPU slice, without a TPU and without the data; nothing on this page was
run on a TPU. All figures are per device. "Peak" is the memory that the compiler reports for one
step, "limit" the memory of the device. Rows marked "O1" were compiled with
`--optimization_level=O1`, in a third of the time: the program moves more bytes than at XLA's
default level, so the time bounds are omitted, and needs somewhat more or less memory; that it fits
is certain only with `JAX_OPTIMIZATION_LEVEL=O1`. "Step" and "days" are lower bounds, not forecasts,
under these assumptions:

{assumptions};
* rows compiled before 2026-11-30 do not count prefetches of slices to on-chip memory; rows compiled
  before 2026-12-01 count some slices of scanned layers' stacked arrays as whole arrays: the bound
  of memory may be too high, 2.5 times for ViT-L/16.

`python -m vit_jax_zoo.plan --config=configs/vit.py:b16_imagenet --topology=v5e:4x4` prints such a
plan, in more detail, for any config and slice; `--search` chooses a mesh. `docs/slices.toml` lists
the slices of this page.
"""

COLUMNS = (
  "recipe", "slice", "mesh", "remat", "peak", "limit", "parameters", "optimizer", "temporaries",
  "TFLOP", "step, at least", "bound by", "days, at least", "compile time", "compiled on",
)  # fmt: skip


def page() -> str:
  """Returns the text of docs/PLANS.md."""
  planned, without = rows()
  results = _stored()
  lines = [HEAD.format(assumptions=";\n".join(f"* {text}" for text in ASSUMPTIONS))]
  done = [row for row in planned if "peak" in results.get(row.key, {})]
  lines += [_progress([results[row.key] for row in done], len(planned)), ""]
  for system in dict.fromkeys(row.config.partition(":")[0] for row in planned):
    of_system = [row for row in planned if row.config.startswith(f"{system}:")]
    lines += [f"## {system}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_cells(row, results.get(row.key))) for row in of_system]
    flagged = [row for row in of_system if row.overrides]
    flags = [f"* {_name(row)} on {row.topology}: `{' '.join(row.overrides)}`" for row in flagged]
    lines += ["", *(["Flags:", "", *flags, ""] if flags else [])]
  lines += ["## Not planned", ""]
  lines += [f"* `{recipe}`: {reason}" for recipe, reason in without.items()]
  return "\n".join(lines) + "\n"


def _progress(done: Sequence[Mapping[str, Any]], planned: int) -> str:
  text = f"{len(done)} of {planned} rows compiled"
  text += "; whether the others fit is unknown." if len(done) < planned else "."
  costs = [result["compile_cpu_seconds"] for result in done if "compile_cpu_seconds" in result]
  if costs:
    text += f" CPU time to compile a row: {min(costs):.0f} to {max(costs):.0f} s."
  return text


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
  return f"`{row.config.partition(':')[2]}`"


def _cells(row: Row, result: Mapping[str, Any] | None) -> list[str]:
  name = _name(row)
  if result is None or "error" in result:
    state = "not compiled yet" if result is None else f"not compiled: {result['error']}"
    return [name, row.topology, state, *[""] * (len(COLUMNS) - 3)]
  level = result.get("optimization_level")
  bounded = level is None and "bound" in result
  changed = "" if result["digest"] == digest(row) else "; the recipe has changed since"
  took = f"{result['compile_seconds']:.0f} s" if "compile_seconds" in result else ""
  peak, *sizes = (gib(float(result[name]) if name in result else None) for name in MEMORY)
  return [
    name,
    row.topology,
    ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device",
    result.get("remat", ""),
    peak if result["fits"] else f"**does not fit**: {peak}",
    *sizes,
    f"{result['tflop']:.3g}",
    seconds(result["step_seconds"]) if bounded else "",
    result["bound"] if bounded else "",
    f"{result['days']:.3g}" if bounded else "",
    f"{took}, {level}" if took and level else took,
    f"{result['date']}, jax {result['jax_version']}{changed}",
  ]


def main() -> int:
  """Parses the command line, compiles the rows and writes the page, in the repository's root."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="pattern of the rows to compile; default: all")
  parser.add_argument("--optimization_level", choices=("O0", "O1", "O2", "O3"), help="of XLA")
  parser.add_argument("--time_limit", type=int, default=3600, help="seconds for each row")
  given = parser.parse_args()
  root = pathlib.Path(__file__).resolve().parents[1]
  os.chdir(root)
  sys.path.insert(0, str(root))  # for configs/
  return compile_all(given.only, given.time_limit, given.optimization_level)


if __name__ == "__main__":
  sys.exit(main())
