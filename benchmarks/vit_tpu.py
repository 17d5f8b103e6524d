r"""What ViT's training step would need on a TPU slice that is not here, rung by rung of remat.

The planner's figures (`python -m vit_jax_zoo.plan`), as a table over models, rungs and scanned or
unrolled layers, with so many images on each device and parameters over all of them (FSDP):

  pip install -e '.[plan]'
  python benchmarks/compile_for_tpu.py
  python benchmarks/compile_for_tpu.py --models=vit_l16 --remats=dots,full --images_per_device=32
  python benchmarks/compile_for_tpu.py --models='vit_*' --topology=v5e:4x4

On a busy machine, "CPU s" is the steadier time of the two.
"""

import fnmatch
import itertools
import os
import sys

from absl import app, flags

sys.path.insert(0, os.getcwd())  # the recipe whose model is replaced

from vit_jax_zoo.config import load_with_overrides
from vit_jax_zoo.planning.hardware import find_machine
from vit_jax_zoo.planning.plan import make_plan
from vit_jax_zoo.registry import list_models

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "The slice, as libtpu names it.")
_MODELS = flags.DEFINE_list("models", ["vit_b16", "vit_l16"], "Model names or patterns.")
_REMATS = flags.DEFINE_list("remats", ["none", "dots", "attention", "full"], "Rungs to try.")
_SCANS = flags.DEFINE_list("scans", ["True"], "Scanned layers: True, False or both.")
_IMAGES = flags.DEFINE_list(
  "images_per_device", ["64", "32"], "One for each model, or one for all."
)
_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the images, in pixels.")

HEADER = (
  "model             remat      scan   images/dev  peak GB  temp GB  compile s  CPU s  TFLOP/dev"
)


def measure(name: str, remat: str, scan: str, images: int) -> str:
  """Compiles one step; returns its row of the table."""
  machine = find_machine("tpu", _TOPOLOGY.value)
  fields = {
    "model.name": name, "model.remat": remat, "model.scan_layers": scan, "model.dropout_rate": 0.0,
    "model.representation_size": None, "sharding.mesh.data": 1, "sharding.mesh.fsdp": -1,
  }  # fmt: skip
  config = load_with_overrides(
    f"configs/vit.py:b16_imagenet,image_size={_SIZE.value},"
    f"batch_size={images * len(machine.devices)}",
    [f"--config.{field}={value}" for field, value in fields.items()],
  )
  plan = make_plan(config, machine, name=name)
  row = f"{name:<17} {remat:<10} {scan:<5}  {images:>10}  {(plan.memory.peak or 0) / 1e9:>7.2f}"
  if plan.memory.temporary is None:
    return f"{row}  does not fit"
  return (
    f"{row}  {plan.memory.temporary / 1e9:>7.2f}  {plan.compile_seconds:>9.1f}"
    f"  {plan.compile_cpu_seconds:>5.0f}  {plan.flops / 1e12:>9.2f}"
  )


def main(argv: list[str]) -> None:
  """Prints one row for each combination of the flags."""
  del argv
  names = [n for pattern in _MODELS.value for n in fnmatch.filter(list_models(), pattern)]
  images = [int(n) for n in _IMAGES.value]
  images = images if len(images) == len(names) else images[-1:] * len(names)
  print(f"{_TOPOLOGY.value}\n{HEADER}")
  for name, per_device in zip(names, images, strict=True):
    for scan, remat in itertools.product(_SCANS.value, _REMATS.value):
      print(measure(name, remat, scan, per_device), flush=True)


if __name__ == "__main__":
  app.run(main)
