"""Runs `python -m vit_jax_zoo.main` as a subprocess, on a small demo."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

TINY = (
  "--config=configs/vit.py:demo,num_steps=24,batch_size=16",
  "--config.model.width=16",
  "--config.model.depth=2",
  "--config.model.mlp_dim=16",
  "--config.model.num_heads=2",
  "--config.explain=False",
  "--config.log_every=2",
  "--config.eval_every=12",
  "--config.checkpoint.every=3",
  "--config.data.eval.test.split=test[:40]",
)


# Compiled programs of commands that run one after another. Concurrent processes must not share it
# (`JAX_ENABLE_COMPILATION_CACHE="0"`): entries are not written atomically.
_CACHE = tempfile.TemporaryDirectory(prefix="compiled_by_commands_")
CACHE = {
  "JAX_COMPILATION_CACHE_DIR": _CACHE.name,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


def environment(num_devices=1, **changes):
  """Returns the environment of a command, with its own number of devices."""
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  flags += f" --xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"} | CACHE | changes


def start(workdir, *arguments, num_devices=1, **environment_changes):
  """Starts the command, and returns the process."""
  return subprocess.Popen(
    [sys.executable, "-m", "vit_jax_zoo.main", f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    env=environment(num_devices, **environment_changes),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run(workdir, *arguments, expect=0, timeout=600, **kwargs):
  """Runs the command to its end; returns its output."""
  process = start(workdir, *arguments, **kwargs)
  output, _ = process.communicate(timeout=timeout)
  assert process.returncode == expect, output
  return output


def rows(workdir):
  """Returns the run's metrics without timings, oldest first."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [
    {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
    for line in lines
  ]
