"""Settings of a process: libtpu without a TPU, XLA flags filtered, memory kept by malloc."""

import os
import subprocess
import sys

import pytest

from vit_jax_zoo.training import host


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine without TPU variables; returns a function that adds a PCI device of a vendor."""
  for name in [name for name in os.environ if "TPU" in name]:
    monkeypatch.delenv(name)
  for name in host.QUIET:
    monkeypatch.setenv(name, "")  # registers the variable for restoration after the test
    monkeypatch.delenv(name)
  monkeypatch.setattr(host, "_PCI", tmp_path)

  def add_device(vendor):
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0" / "vendor").write_text(f"{vendor}\n")

  return add_device


def test_no_tpu_sets_quiet_variables(machine):
  machine("0x10de")  # a GPU
  host.silence_libtpu()
  assert os.environ.items() >= host.QUIET.items()


def test_tpu_device_no_variables_set(machine):
  machine("0x1ae0")
  host.silence_libtpu()
  assert not os.environ.keys() & host.QUIET.keys()


def test_tpu_environment_no_variables_set(machine, monkeypatch):
  machine("0x10de")
  monkeypatch.setenv("TPU_WORKER_ID", "0")
  host.silence_libtpu()
  assert not os.environ.keys() & host.QUIET.keys()


@pytest.mark.parametrize(
  ("flags", "left"),
  [
    ("--xla_cpu_use_fusion_emitters=false", ""),
    ("--xla_dump_to=d --xla_gpu_autotune_level=0 --xla_cpu_x", "--xla_dump_to=d"),
    ("--xla_force_host_platform_device_count=8", "--xla_force_host_platform_device_count=8"),
  ],
)
def test_unknown_xla_flags_removed(monkeypatch, flags, left):
  monkeypatch.setenv("XLA_FLAGS", flags)
  host.hide_flags_of_others()
  assert os.environ["XLA_FLAGS"].split() == left.split()


COUNT_FAULTS = """
import resource
import jax, jax.numpy as jnp
from vit_jax_zoo.training.host import keep_freed_memory
{call}
f = jax.jit(lambda x: x + 1)
x = jnp.ones(2**24)  # glibc maps allocations of more than 32 MB
faults = []
for _ in range(60):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  f(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[-11:])[5])  # the heap has grown to its size; once in a while it still does
"""

HAS_GLIBC = sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


@pytest.mark.skipif(not HAS_GLIBC, reason="settings of glibc")
def test_freed_memory_reused_without_page_faults():
  def faults_of(call):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COUNT_FAULTS.format(call=call)]
    return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

  assert 10 * faults_of("assert keep_freed_memory()") < faults_of("")


def test_accelerators_not_configured(monkeypatch):
  monkeypatch.setattr(host.ctypes, "CDLL", lambda _: pytest.fail("mallopt is called"))
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  assert not host.keep_freed_memory()
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("TPU_NAME", "slice")
  assert host.has_tpu()
  assert not host.keep_freed_memory()
