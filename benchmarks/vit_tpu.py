r"""ViT's train step compiled for a TPU slice: memory, compile time and FLOPs by remat policy.

A table of plans (`python -m vit_jax_zoo.plan`) over models, remat policies and scanned or unrolled
layers, with FSDP over all devices. Needs no TPU:

  pip install -e '.[plan]'
  python benchmarks/vit_tpu.py
  python benchmarks/vit_tpu.py --models=vit_l16 --remats=dots,full --images_per_device=32
  python benchmarks/vit_tpu.py --models='vit_*' --topology=v5e:4x4
"""

import argparse
import fnmatch
import itertools
import os
import sys

import timing

sys.path.insert(0, os.getcwd())  # for configs/vit.py

from vit_jax_zoo.config import load
from vit_jax_zoo.planning.hardware import Machine, find_machine
from vit_jax_zoo.planning.plan import make_plan
from vit_jax_zoo.registry import list_models

HEADER = (
  "model", "remat", "scan", "images/device", "peak GB", "temp GB", "compile s", "CPU s", "TFLOP",
)  # fmt: skip


def measure(
  machine: Machine, name: str, remat: str, scan: str, per_device: int, image_size: int
) -> list[str]:
  """Compiles one train step and returns its row."""
  fields = {
    "model.name": name, "model.remat": remat, "model.scan_layers": scan, "model.dropout_rate": 0.0,
    "model.representation_size": None, "sharding.mesh.data": 1, "sharding.mesh.fsdp": -1,
  }  # fmt: skip
  batch_size = per_device * len(machine.devices)
  config = load(
    f"configs/vit.py:b16_imagenet,image_size={image_size},batch_size={batch_size}",
    [f"--config.{field}={value}" for field, value in fields.items()],
  )
  print(f"compiling {name}, remat {remat}, scan {scan}", file=sys.stderr, flush=True)
  plan = make_plan(config, machine, name=name)
  row = [name, remat, scan, str(per_device), f"{(plan.memory.peak or 0) / 1e9:.2f}"]
  if plan.memory.temporary is None:
    return [*row, "does not fit", "", "", ""]
  return [
    *row,
    f"{plan.memory.temporary / 1e9:.2f}",
    f"{plan.compile_seconds:.1f}",
    f"{plan.compile_cpu_seconds:.0f}",
    f"{plan.flops / 1e12:.2f}",
  ]


def main() -> None:
  """Compiles every combination and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--topology", default="v5e:4x4", help="TPU slice")
  parser.add_argument("--models", default="vit_b16,vit_l16", help="names or patterns")
  parser.add_argument("--remats", default="none,dots,attention,full", help="remat policies")
  parser.add_argument("--scans", default="True", help="True, False or True,False")
  parser.add_argument("--images_per_device", default="64,32", help="one per model, or one for all")
  parser.add_argument("--image_size", type=int, default=224, help="in pixels")
  flags = parser.parse_args()
  models = flags.models.split(",")
  names = [name for pattern in models for name in fnmatch.filter(list_models(), pattern)]
  images = [int(n) for n in flags.images_per_device.split(",")]
  images = images if len(images) == len(names) else images[-1:] * len(names)
  machine = find_machine("tpu", flags.topology)
  choices = list(itertools.product(flags.scans.split(","), flags.remats.split(",")))
  rows = [
    measure(machine, name, remat, scan, per_device, flags.image_size)
    for name, per_device in zip(names, images, strict=True)
    for scan, remat in choices
  ]
  print(f"{flags.topology}, {flags.image_size} px\n\n{timing.markdown(HEADER, rows)}")


if __name__ == "__main__":
  main()
