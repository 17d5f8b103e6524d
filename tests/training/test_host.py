"""libtpu without a TPU: no warnings, XLA flags filtered."""

import os

import pytest

from vit_jax_zoo.training import libtpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine without TPU variables; returns a function that adds a PCI device of a vendor."""
  for name in [name for name in os.environ if "TPU" in name]:
    monkeypatch.delenv(name)
  for name in libtpu.QUIET:
    monkeypatch.setenv(name, "")  # registers the variable for restoration after the test
    monkeypatch.delenv(name)
  monkeypatch.setattr(libtpu, "_PCI", tmp_path)

  def add_device(vendor):
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0" / "vendor").write_text(f"{vendor}\n")

  return add_device


def test_no_tpu_sets_quiet_variables(machine):
  machine("0x10de")  # a GPU
  libtpu.silence_if_idle()
  assert os.environ.items() >= libtpu.QUIET.items()


def test_tpu_device_no_variables_set(machine):
  machine("0x1ae0")
  libtpu.silence_if_idle()
  assert not os.environ.keys() & libtpu.QUIET.keys()


def test_tpu_environment_no_variables_set(machine, monkeypatch):
  machine("0x10de")
  monkeypatch.setenv("TPU_WORKER_ID", "0")
  libtpu.silence_if_idle()
  assert not os.environ.keys() & libtpu.QUIET.keys()


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
  libtpu.hide_flags_of_others()
  assert os.environ["XLA_FLAGS"].split() == left.split()
