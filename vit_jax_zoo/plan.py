"""Plans the training of a config for a machine, without that machine and without the data.

    python -m vit_jax_zoo.plan --config=configs/igpt.py:xl_imagenet --topology=v5p:4x4x4
    python -m vit_jax_zoo.plan --config=configs/vit.py:l16_imagenet --topology=v5e:8x8 --search
    python -m vit_jax_zoo.plan --config=configs/vit.py --platform=cpu --output=plan.json
    python -m vit_jax_zoo.plan --config=configs/vit.py --topology=v5litepod-16 --nocompile

It compiles the train step of `main`, and prints whether it fits, a memory breakdown, FLOPs,
traffic, and lower bounds on the time of a step, an epoch and the run. A TPU slice needs
`pip install -e '.[plan]'`, except with `--nocompile`, which only checks that config, slice, mesh
and batch size fit. `python docs/make_plans.py` plans every recipe.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from vit_jax_zoo import cli
from vit_jax_zoo.config import load
from vit_jax_zoo.planning.hardware import Machine, find_machine, simulated_slice
from vit_jax_zoo.planning.plan import Plan, best, make_plan, mesh, report, search, table

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the command's flags: not on import, as other commands have flags of the same names."""
  flags.DEFINE_string("config", None, "as of train; --config.section.field=value sets any field")
  flags.DEFINE_string("topology", None, "a TPU slice, such as v5e:4x4, v5p:4x4x4 or v5litepod-16")
  flags.DEFINE_string("platform", "tpu", "tpu, or this machine's cpu or cuda devices")
  flags.DEFINE_bool("compile", True, "false: only check config, slice, mesh and batch size")
  flags.DEFINE_bool("search", False, "compare several meshes, and select one")
  flags.DEFINE_string("output", None, "a JSON file to write the plan to")
  flags.DEFINE_enum(
    "optimization_level", None, ("O0", "O1", "O2", "O3"),
    "of XLA; O1 compiles convolutions in a third of the time, but the program moves more bytes "
    "and needs other memory than a run's at the default level",
  )  # fmt: skip


def main(argv: Sequence[str]) -> int:
  """Runs the command with overrides of config fields; returns 0 if a plan fits, else 1."""
  if FLAGS.optimization_level:
    jax.config.update("jax_optimization_level", FLAGS.optimization_level)
  if FLAGS.config is None:
    raise ValueError("--config is missing; try --config=configs/vit.py --platform=cpu")
  if FLAGS.output:  # before a compilation, which may take an hour
    pathlib.Path(FLAGS.output).parent.mkdir(parents=True, exist_ok=True)
  config = load(FLAGS.config, argv[1:])
  given: dict[str, Any] = {"name": FLAGS.config, "overrides": list(argv[1:])}
  if not FLAGS.compile:
    machine = simulated_slice(FLAGS.topology)
    plan = make_plan(config, machine, **given, compile_step=False)
    cli.show(
      f"{FLAGS.config} on {machine.name}: {plan.num_devices} devices, mesh {mesh(plan)}, "
      f"batch {plan.batch_size}, {plan.num_steps} steps; memory not checked (leave out --nocompile)"
    )
    return 0
  machine = find_machine(FLAGS.platform, FLAGS.topology)
  tried = _search(config, machine) if FLAGS.search else [make_plan(config, machine, **given)]
  chosen = best(tried) or tried[-1]
  cli.show(report(chosen))
  if FLAGS.output:
    others = {"tried": [dataclasses.asdict(plan) for plan in tried]} if FLAGS.search else {}
    text = json.dumps(dataclasses.asdict(chosen) | others, indent=1) + "\n"
    pathlib.Path(FLAGS.output).write_text(text, encoding="utf-8")
  return 0 if chosen.fits else 1


def _search(config: ConfigDict, machine: Machine) -> list[Plan]:
  plans: list[Plan] = []
  for plan in search(config, machine, name=FLAGS.config):
    plans.append(plan)
    cli.show(table(plans) if len(plans) == 1 else table([plan]).splitlines()[-1])
  if not plans:
    problem = f"batch_size {config.batch_size}: no mesh of {len(machine.devices)} devices splits it"
    raise ValueError(f"{problem}; use a smaller slice than {machine.name}, or another batch size")
  chosen = best(plans)
  result = "none fits" if chosen is None else f"selected: {' '.join(chosen.overrides)}"
  cli.show(f"\n{len(plans)} compared, {result}\n")
  return plans


if __name__ == "__main__":
  cli.run(main, define_flags)
