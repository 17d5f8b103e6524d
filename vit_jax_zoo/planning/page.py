"""docs/PLANS.md: what every recipe needs, compiled recipe by recipe, each in a process of its own.

`docs/slices.toml` says for which slices each recipe is planned; what the compiler said is kept in
`docs/plans.json`, and the page is written from both. A recipe that was not compiled yet, took too
long, or has changed since is named so.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from vit_jax_zoo.config import load_with_overrides
from vit_jax_zoo.planning.report import gib, seconds
from vit_jax_zoo.planning.roofline import ASSUMPTIONS
from vit_jax_zoo.training import atomic_write as whole_file

PAGE, PLANS, SLICES, LOCK = (
  pathlib.Path("docs") / name for name in ("PLANS.md", "plans.json", "slices.toml", ".plans.lock")
)


class Row(NamedTuple):
  """A recipe on a slice.

  Attributes:
    config: what stands behind `--config=`.
    topology: the slice.
    overrides: flags that this slice needs besides.
  """

  config: str
  topology: str
  overrides: tuple[str, ...] = ()

  @property
  def key(self) -> str:
    """By which its plan is kept."""
    return f"{self.config} {self.topology}"


def recipes() -> list[str]:
  """Returns every variant of every file in configs/ but the demos: `configs/vit.py:b16_imagenet`.

  Files that are a part of another one are left out.
  """
  files = sorted(pathlib.Path("configs").glob("*.py"))
  modules = {path: importlib.import_module(f"configs.{path.stem}") for path in files}
  variants = {p: dict(m.VARIANTS) for p, m in modules.items() if hasattr(m, "VARIANTS")}
  whole = [
    path
    for path, own in variants.items()
    if not any(_is_part(own, others) for p, others in variants.items() if p != path)
  ]
  return [f"{p}:{name}" for p in whole for name in variants[p] if not name.startswith("demo")]


def _is_part(own: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
  return all(any(page is other for other in others.values()) for page in own.values())


def rows() -> tuple[list[Row], dict[str, str]]:
  """Returns the rows of the page, and the recipes that have none, with the reason.

  Raises:
    ValueError: a recipe is not in `docs/slices.toml`.
  """
  sections = tomllib.loads(SLICES.read_text(encoding="utf-8"))["slice"]
  found, without = [], {}
  for recipe in recipes():
    name = recipe.removeprefix("configs/")
    matching = [s for s in sections if fnmatch.fnmatchcase(name, s["recipes"])]
    if not matching:
      raise ValueError(f"{SLICES} names no slice for {name}; add one, or say why there is none")
    reasons = [s["not_planned"] for s in matching if "not_planned" in s]
    if reasons:
      without[recipe] = reasons[0]
    else:
      found += [Row(recipe, s["topology"], tuple(s.get("overrides", ()))) for s in matching]
  return found, without


def compile_all(pattern: str, time_limit: int, level: str | None = None) -> int:
  """Compiles the rows that match and are missing or out of date, and writes the page after each.

  Args:
    pattern: of the rows' keys, as a shell has them.
    time_limit: seconds for each.
    level: XLA's optimization level; None is its own choice, and compiles anew what has another.

  Returns:
    How many of them have no plan that fits.
  """
  failed = 0
  for row in rows()[0]:
    if not fnmatch.fnmatchcase(row.key, f"*{pattern}*") or _is_current(row, _stored(), level):
      continue
    logging.info("compiling %s", row.key)
    plan = {**_compile(row, time_limit, level), "digest": digest(row)}
    failed += not plan.get("fits")
    write_page({row.key: plan})
  write_page()
  return min(failed, 1)


def write_page(found: Mapping[str, Any] | None = None) -> None:
  """Writes the page from what is stored.

  Args:
    found: plans by their rows' keys, which are stored first, among those that other processes have
      stored meanwhile.
  """
  with _alone():
    if found:
      _store(found)
    whole_file.write(PAGE, page())


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  """Lets other processes wait that would read or write what is stored."""
  with LOCK.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # closing the file, or the end of the process, unlocks it
    yield


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
    return json.loads(output.read_text())


def _stored() -> dict[str, Any]:
  return json.loads(PLANS.read_text(encoding="utf-8")) if PLANS.exists() else {}


def _store(found: Mapping[str, Any]) -> None:
  plans = {**_stored(), **found}  # read again: others may be at work on other rows
  known = {row.key for row in rows()[0]}
  whole_file.write_json(PLANS, {key: plans[key] for key in sorted(plans) if key in known})


def _is_current(row: Row, plans: Mapping[str, Any], level: str | None) -> bool:
  plan = plans.get(row.key, {})
  enough = plan.get("optimization_level") in (None, level)
  return enough and plan.get("digest") == digest(row) and "error" not in plan


def digest(row: Row) -> str:
  """Returns a short text that changes with what a row's plan depends on, in its config."""
  config = load_with_overrides(row.config, row.overrides)
  known = json.loads(config.to_json_best_effort())
  fields = {field: known[field] for field in DECISIVE}
  fields["optimizer"] = _without_rates(fields["optimizer"])
  fields["data"] = known["data"]["train"], known["data"]["loader"].get("buckets")
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _without_rates(tree: Any) -> Any:
  """Leaves out what changes how far a step goes, and not what it computes."""
  if isinstance(tree, dict):
    kept = {k: v for k, v in tree.items() if k not in ("learning_rate", "schedule")}
    return {k: _without_rates(v) for k, v in kept.items()}
  return [_without_rates(v) for v in tree] if isinstance(tree, list) else tree


DECISIVE = (
  "model", "task", "optimizer", "batch_size", "accumulation_steps", "num_steps", "num_epochs",
  "ema_decay", "sharding",
)  # fmt: skip
"""Fields of a config that its plan depends on, beside the training data."""

HEAD = """# What the recipes need

Written by `python -m vit_jax_zoo.plan --all`; do not edit. Where a row has figures, the recipe's
own training step was compiled for a TPU slice by libtpu, without a TPU and without the data;
nothing on this page was run on one. All figures are of one device. "Needs" is what the compiler
says must be there at once. Rows "at O1" were compiled with `--optimization_level=O1`, in a third of
the time: such a program moves more bytes than XLA's own choice, so bounds are left out, and needs
somewhat more or less memory; that it fits is sure with `JAX_OPTIMIZATION_LEVEL=O1` alone. "Step"
and "days" are bounds that no run can beat, not forecasts:

{assumptions}

`python -m vit_jax_zoo.plan --config=configs/vit.py:b16_imagenet --topology=v5e:4x4` makes such a
plan of any config for any slice, in more detail, and `--search` chooses a mesh. Slices are those of
`docs/slices.toml`.
"""

COLUMNS = (
  "recipe", "slice", "mesh", "remat", "needs", "of", "parameters", "optimizer", "temporaries",
  "TFLOP", "step, at least", "bound by", "days, at least", "compiled in", "on",
)  # fmt: skip


def page() -> str:
  """Returns the page."""
  planned, without = rows()
  plans = _stored()
  assumptions = "\n".join(f"* {text};" for text in ASSUMPTIONS)[:-1] + "."
  lines = [HEAD.format(assumptions=assumptions)]
  done = [row for row in planned if "memory" in plans.get(row.key, {})]
  lines += [_progress([plans[row.key] for row in done], len(planned)), ""]
  for system in dict.fromkeys(row.config.partition(":")[0] for row in planned):
    of_system = [row for row in planned if row.config.startswith(f"{system}:")]
    lines += [f"## {system}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_cells(row, plans.get(row.key))) for row in of_system]
    lines += ["", *_flags(of_system)]
  lines += ["## Not planned", ""]
  lines += [f"* `{recipe}`: {reason}" for recipe, reason in without.items()]
  return "\n".join(lines) + "\n"


def _progress(done: Sequence[Mapping[str, Any]], planned: int) -> str:
  """Returns how many rows have figures, and at what cost: convolutions take XLA longest."""
  text = f"{len(done)} of {planned} rows were compiled."
  if len(done) < planned:
    text += " Of the others nothing is known yet, nor whether they fit."
  costs = [plan["compile_cpu_seconds"] for plan in done if plan["compile_cpu_seconds"]]
  if costs:
    text += f" Each took XLA {min(costs):.0f} to {max(costs):.0f} seconds of CPU time."
  return text


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _flags(of_system: Sequence[Row]) -> list[str]:
  """Returns what a slice needs on the command line, where it needs anything."""
  found = {row: row.overrides for row in of_system if row.overrides}
  lines = [
    f"* `{r.config.partition(':')[2]}` on {r.topology}: `{' '.join(o)}`" for r, o in found.items()
  ]
  return ["With, on the command line:", "", *lines, ""] if lines else []


def _cells(row: Row, plan: Mapping[str, Any] | None) -> list[str]:
  name = f"`{row.config.partition(':')[2]}`"
  empty = [""] * (len(COLUMNS) - 3)
  if plan is None:
    return [name, row.topology, "not compiled yet", *empty]
  if "error" in plan:
    return [name, row.topology, f"not compiled: {plan['error']}", *empty]
  memory, level = plan["memory"], plan.get("optimization_level")
  least = {} if level else plan["roofline"] or {}
  old = "" if plan["digest"] == digest(row) else "; the recipe has changed since"
  axes = [f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1]
  return [
    name,
    row.topology,
    ", ".join(axes) or "one device",
    plan["remat"] or "",
    gib(memory["peak"]) if plan["fits"] else f"**does not fit**: {gib(memory['peak'])}",
    gib(memory["limit"]),
    gib(memory["params"]),
    gib(memory["optimizer"]),
    gib(memory["temporary"]),
    f"{plan['flops'] / 1e12:.3g}",
    seconds(plan["step_seconds"]) if least else "",
    least.get("bound", ""),
    f"{plan['days']:.3g}" if least else "",
    ""
    if plan["compile_seconds"] is None
    else f"{plan['compile_seconds']:.0f} s{f' at {level}' if level else ''}",
    f"{plan['date']}, jax {plan['jax_version']}{old}",
  ]
