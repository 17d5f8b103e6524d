r"""What a training step would need on a TPU slice that is not here: memory, FLOPs, compile time.

Compiles the package's own train step (AdamW, FSDP over every chip) with libtpu, on any machine:

  pip install -e '.[plan]'
  python benchmarks/compile_for_tpu.py
  python benchmarks/compile_for_tpu.py --models=vit_l16 --remats=dots,full --images_per_device=32
  python benchmarks/compile_for_tpu.py --models='vit_*' --topology=v5e:4x4

Memory is what the compiler's `memory_analysis` states for one device; FLOPs are counted from the
jaxpr, loops whole, and stand for one device too (the compiler's own FLOPs and seconds are no use).
On a busy machine, "CPU s" is the steadier time of the two.
"""

import fnmatch
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud metadata server to wait for

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from vit_jax_zoo.models.registry import create_model, list_models, sharding_rules
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.tasks.classification import Classification
from vit_jax_zoo.train.program import Recipe, build_program
from vit_jax_zoo.train.sharding import create_mesh

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "The slice, as libtpu names it.")
_MODELS = flags.DEFINE_list("models", ["vit_b16", "vit_l16"], "Model names or patterns.")
_REMATS = flags.DEFINE_list("remats", ["none", "dots", "attention", "full"], "Rungs to try.")
_SCANS = flags.DEFINE_list("scans", ["true"], "Scanned layers: true, false or both.")
_IMAGES = flags.DEFINE_list(
  "images_per_device", ["64", "32"], "One for each model, or one for all."
)
_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the images, in pixels.")

HEADER = (
  "model             remat      scan   images/dev  peak GB  temp GB  compile s  CPU s  TFLOP/dev"
)


def train_program(name: str, remat: str, scan: bool, batch_size: int, devices: np.ndarray):  # noqa: ANN201, FBT001
  """Returns the package's program of an ImageNet training step."""
  size = _SIZE.value
  model = create_model(name, num_classes=1000, dtype="bfloat16", remat=remat, scan_layers=scan)
  return build_program(
    Classification(model, num_classes=1000),
    {
      "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
      "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    },
    Recipe(
      optimizer={"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
      num_steps=1000,
    ),
    mesh=create_mesh({"fsdp": -1}, devices),
    rules=sharding_rules(name),
  )


def measure(name: str, remat: str, scan: bool, images: int, devices: np.ndarray) -> str:  # noqa: FBT001
  """Compiles one step; returns its row of the table."""
  program = train_program(name, remat, scan, images * len(devices), devices)
  row = f"{name:<17} {remat:<10} {scan!s:<5}  {images:>10}"
  arguments = program.abstract_state, program.abstract_batch
  with jax.set_mesh(program.mesh):
    flops = count_flops(program.train_step, *arguments) / len(devices)
    lowered = program.train_step.lower(*arguments)
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
      memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # out of memory: says how much it would take
      return f"{row}  does not fit: {str(error).splitlines()[0][:120]}"
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  peak, temporary = memory.peak_memory_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
  return (
    f"{row}  {peak:>7.2f}  {temporary:>7.2f}  {seconds:>9.1f}  {cpu:>5.0f}  {flops / 1e12:>9.2f}"
  )


def main(argv: list[str]) -> None:
  """Prints one row for each combination of the flags."""
  del argv
  topology = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value)
  devices = np.array(topology.devices)
  names = [n for pattern in _MODELS.value for n in fnmatch.filter(list_models(), pattern)]
  images = [int(n) for n in _IMAGES.value]
  images = images if len(images) == len(names) else images[-1:] * len(names)
  print(f"{_TOPOLOGY.value}: {len(devices)} x {devices.flat[0].device_kind}")
  print(HEADER)
  for name, per_device in zip(names, images, strict=True):
    for scan in _SCANS.value:
      for remat in _REMATS.value:
        print(measure(name, remat, scan == "true", per_device, devices), flush=True)


if __name__ == "__main__":
  app.run(main)
