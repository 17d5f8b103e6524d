"""Learning-rate schedules: reference values and edge cases."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax_zoo.training.optim import create_schedule


def values(num_steps, steps, *, learning_rate=1.0, **schedule):
  config = {"learning_rate": learning_rate, "schedule": schedule}
  rate = create_schedule(config, num_steps)
  return [float(rate(step)) for step in steps]


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_equals_vit_reference(load_golden, case):
  config, _, outputs = load_golden("vit_schedule_a")
  fields = config[case]
  schedule = {"name": fields["decay_type"], "warmup_steps": fields["warmup_steps"]}
  if schedule["name"] == "linear":
    schedule["end_value"] = fields["linear_end"]
  rate = create_schedule(
    {"learning_rate": fields["base"], "schedule": schedule}, fields["total_steps"]
  )
  for step, expected in zip(outputs[f"{case}/steps"], outputs[f"{case}/lr"], strict=True):
    np.testing.assert_allclose(rate(int(step)), expected, rtol=3e-7, atol=1e-12)


def test_traced_step_equals_concrete():
  config = ConfigDict({"learning_rate": 0.1, "schedule": {"name": "cosine", "warmup_steps": 3}})
  rate = create_schedule(config, 10)
  jitted = jax.jit(rate)
  for step in range(12):
    np.testing.assert_allclose(jitted(step), rate(step), rtol=1e-5, atol=1e-8)


def test_warmup_from_zero_default_constant():
  assert values(10, [0, 1, 2, 4, 9], warmup_steps=4) == [0.0, 0.25, 0.5, 1.0, 1.0]
  assert float(create_schedule({"learning_rate": 0.5}, 10)(0)) == 0.5


def test_warmup_start_fraction():
  """Detectron's warmup from a third: f (1 - t / w) + t / w, times the rate."""
  found = values(
    10, [0, 1, 3, 4, 8], learning_rate=0.6, name="step", boundaries=(8,),
    warmup_steps=4, warmup_start=1 / 3,
  )  # fmt: skip
  assert found == pytest.approx([0.2, 0.3, 0.5, 0.6, 0.06])


def test_end_values():
  assert values(10, [0, 5, 10, 99], name="cosine", end_value=0.2) == pytest.approx(
    [1.0, 0.6, 0.2, 0.2]
  )
  assert values(10, [0, 5, 10, 99], name="linear", end_value=0.2) == pytest.approx(
    [1.0, 0.6, 0.2, 0.2]
  )


def test_rsqrt_warmup_and_cooldown():
  found = values(
    100, [0, 5, 10, 40, 90, 95, 100, 120],
    name="rsqrt", timescale=10, warmup_steps=10, cooldown_steps=10, end_value=0.01,
  )  # fmt: skip
  after_95 = 0.01 + (np.sqrt(10 / 95) - 0.01) / 2
  assert found == pytest.approx(
    [0.0, 0.5, 1.0, 0.5, np.sqrt(10 / 90), after_95, 0.01, 0.01], rel=1e-6
  )


def test_step_boundaries_and_factors():
  steps = [0, 9, 10, 19, 20, 99]
  assert values(100, steps, name="step", boundaries=[10, 20]) == pytest.approx(
    [1, 1, 0.1, 0.1, 0.01, 0.01]
  )
  assert values(100, steps, name="step", boundaries=[0.1, 0.2], factors=[0.5, 0.1]) == (
    pytest.approx([1, 1, 0.5, 0.5, 0.05, 0.05])
  )


def test_warmup_fraction_of_run():
  assert values(200, [5, 10], warmup_steps=0.05) == [0.5, 1.0]


@pytest.mark.parametrize(
  ("schedule", "message"),
  [
    ({"name": "cosin"}, "'cosin'.*'cosine'"),
    ({"name": "cosine", "warm_steps": 1}, "'warm_steps'.*'warmup_steps'"),
    ({"name": "linear", "warmup_steps": -1}, "warmup_steps: -1"),
    ({"name": "linear", "warmup_steps": 2.5}, "warmup_steps: 2.5"),
    (
      {"name": "linear", "warmup_start": 1.5},
      "warmup_start: 1.5",
    ),
    ({"name": "step"}, "boundaries: missing"),
    ({"name": "step", "boundaries": [5, 3]}, "boundaries: .5, 3"),
    ({"name": "step", "boundaries": [5], "factors": [1, 2]}, "boundaries: .5., with 2 factors"),
    ({"name": "rsqrt", "timescale": 0}, "timescale: 0"),
    ({"name": "rsqrt", "end_value": 0.1}, "cooldown_steps"),
  ],
)
def test_invalid_schedule_raises(schedule, message):
  with pytest.raises(ValueError, match=message) as error:
    create_schedule({"learning_rate": 1.0, "schedule": schedule}, 100)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "fast"])
def test_invalid_learning_rate_raises(rate):
  with pytest.raises(ValueError, match="learning_rate: "):
    create_schedule({"learning_rate": rate}, 100)


@pytest.mark.parametrize(("warmup_steps", "warns"), [(99, False), (100, True)])
def test_warmup_longer_than_run_warns(caplog, warmup_steps, warns):
  schedule = {"name": "cosine", "warmup_steps": warmup_steps}
  with caplog.at_level("WARNING", logger="absl"):
    create_schedule({"learning_rate": 0.5, "schedule": schedule}, 100)
  assert ("in a run of 100: the learning rate does not reach 0.5" in caplog.text) == warns


def test_poly_decay():
  found = values(12, [0, 1, 2, 7, 12, 20], name="poly", warmup_steps=2, end_value=0.1)
  expected = [0.0, 0.5, 1.0, 0.1 + 0.9 * 0.5**0.9, 0.1, 0.1]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  with pytest.raises(ValueError, match="power: 0"):
    values(12, [0], name="poly", power=0)
