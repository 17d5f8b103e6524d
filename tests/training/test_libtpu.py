"""libtpu, installed to plan with, does not complain where there is no TPU."""

import os

import pytest

from vit_jax_zoo.training import libtpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine with one device of this vendor, and an environment that says nothing of TPUs."""
  for name in [name for name in os.environ if "TPU" in name]:
    monkeypatch.delenv(name)
  for name in libtpu.QUIET:
    monkeypatch.setenv(name, "")  # so that it is put back after the test
    monkeypatch.delenv(name)
  monkeypatch.setattr(libtpu, "_PCI", tmp_path)

  def plug_in(vendor):
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0" / "vendor").write_text(f"{vendor}\n")

  return plug_in


def test_without_a_tpu_it_asks_for_nothing(machine):
  machine("0x10de")  # a GPU
  libtpu.silence_if_idle()
  assert os.environ.items() >= libtpu.QUIET.items()


def test_a_tpu_that_is_plugged_in_is_left_alone(machine):
  machine("0x1ae0")
  libtpu.silence_if_idle()
  assert not os.environ.keys() & libtpu.QUIET.keys()


def test_an_environment_that_speaks_of_tpus_is_left_alone(machine, monkeypatch):
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
def test_flags_that_it_does_not_know_end_no_plan(monkeypatch, flags, left):
  monkeypatch.setenv("XLA_FLAGS", flags)
  libtpu.hide_flags_of_others()
  assert os.environ["XLA_FLAGS"].split() == left.split()
