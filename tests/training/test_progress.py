"""Rates and fractions with a simulated clock."""

import logging
import types

import pytest

from vit_jax_zoo.training.progress import Progress, peak_flops


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def h100s(count):
  return [types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * count


def test_rates_exclude_other_phases(clock):
  progress = Progress(100, 64, flops_per_step=989e12, devices=h100s(4), bar=False, clock=clock)
  with progress.exclude("compile"):
    clock.now += 30.0
  for _ in range(10):
    with progress.time_as("input_wait"):
      clock.now += 0.1
    clock.now += 0.4
  with progress.time_as("logging"):
    clock.now += 0.0
  with progress.exclude("evaluate"):
    clock.now += 20.0
    with progress.time_as("input_wait"):
      clock.now += 5.0  # evaluation's input wait is not counted
  rates = progress.report(10)
  assert rates == pytest.approx(
    {"step_time": 0.5, "images_per_second": 128, "input_wait": 0.2, "logging": 0.0, "mfu": 0.5}
  )
  assert progress.eta_seconds() == pytest.approx(90 * (0.5 + 25.0 / 10))
  assert progress.report(10) == {}, "no step since"
  clock.now += 2.0
  assert progress.report(11) == pytest.approx(
    {"step_time": 2.0, "images_per_second": 32.0, "mfu": 0.125}
  )


def test_resumed_run_counts_own_steps(clock):
  progress = Progress(100, 8, start_step=90, bar=False, clock=clock)
  assert progress.eta_seconds() is None
  clock.now += 4.0
  assert progress.report(92)["step_time"] == 2.0
  assert progress.eta_seconds() == 16.0
  assert "mfu" not in progress.report(93)


def test_log_line(clock, caplog):
  progress = Progress(1200, 64, bar=False, clock=clock)
  clock.now += 300 * 64 / 1840
  progress.report(300)
  line = "step 300/1200 (25 %) loss 0.412 learning_rate 0.00098 1840 images/s ETA 0:00:31"
  metrics = {"loss": 0.412, "learning_rate": 0.00098}
  assert progress.line(300, metrics) == line
  logger = logging.getLogger("absl")
  logger.propagate, before = True, logger.propagate
  with caplog.at_level(logging.INFO, logger="absl"):
    progress.log(300, metrics)
  logger.propagate = before
  assert [record.getMessage() for record in caplog.records] == [line]


def test_epochs_beside_steps(clock):
  progress = Progress(1000, 128, num_examples=1437, bar=False, clock=clock)
  assert progress.line(950, {}) == "step 950/1000 (95 %) epoch 84.6/89.1"


def test_progress_bar_shows_line(capsys, clock):
  progress = Progress(10, 64, bar=True, clock=clock)
  progress.log(5, {"loss": 0.5})
  progress.close()
  progress.close()
  assert "step 5/10 (50 %) loss 0.5" in capsys.readouterr().err


def test_nested_exclude_raises(clock):
  progress = Progress(10, 64, bar=False, clock=clock)
  with (
    progress.exclude("evaluate"),
    pytest.raises(RuntimeError, match="within another"),
    progress.exclude("checkpoint"),
  ):
    pass


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12), ("TPU7x", 1153.5e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
    ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA GB200", 2500e12), ("cpu", None),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA H200 NVL", 835e12), ("NVIDIA B200", 2250e12), ("NVIDIA L40", 181e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12),
    ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A1000", None), ("NVIDIA H20", 148e12),
    ("TPU v6", None),
  ],
)  # fmt: skip
def test_peak_flops(kind, peak):
  assert peak_flops(kind) == peak
