"""The training loop on a toy task: order of events, exact resume, non-finite losses."""

import dataclasses
import errno
import functools
import itertools
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath
from matplotlib.figure import Figure

from tests.training import toy
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.checkpoint import Checkpointer, restore_variables
from vit_jax_zoo.training.evaluate import score_predictions
from vit_jax_zoo.training.loop import (
  EvaluationError,
  Loop,
  LoopSettings,
  format_scores,
  prefetch,
  read_pending,
  score_table,
)
from vit_jax_zoo.training.metric_writer import MetricWriter, read_metrics
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program

SETTINGS = LoopSettings(
  num_steps=12, log_every=3, eval_every=4, checkpoint_every=5, best="held_out/score"
)


@functools.cache
def make_program():
  batch = toy.batches(1)[0]
  return build_program(
    toy.Regression(),
    abstract_batch_of(batch, len(batch["x"])),
    TrainingOptions({"name": "adamw", "learning_rate": 1e-2}, num_steps=12),
    mesh=sharding.create_mesh({"data": 1}, jax.devices()[:1]),
    rules=toy.RULES,
  )


def train(
  workdir, *, settings=SETTINGS, data=None, on_step=None, train_step=None, on_evaluation=None
):
  """Runs the loop from the last checkpoint in `workdir`, like `trainer.run`."""
  made = make_program()
  data = data or toy.batches(settings.num_steps)

  def step(state, batch):
    if on_step is not None:
      on_step(int(state.step) + 1)
    return (train_step or made.train_step)(state, batch)

  def evaluation(variables):
    if on_evaluation is not None:
      on_evaluation()
    held_out = lambda: toy.batches(2, seed=9)  # noqa: E731
    return score_predictions(variables, program=made, batches=held_out, name="held_out")

  with jax.set_mesh(made.mesh), Checkpointer(workdir, keep=3) as checkpointer:
    state = checkpointer.restore(made.abstract_state) or made.initial_state(seed=0)
    start = int(state.step)
    with MetricWriter(workdir, resume_step=start or None) as writer:
      loop = Loop(
        program=dataclasses.replace(made, train_step=step),
        evaluations={"held_out": evaluation},
        settings=settings,
        checkpointer=checkpointer,
        writer=writer,
        progress=Progress(settings.num_steps, 16, start_step=start, bar=False),
      )
      put = functools.partial(sharding.to_global, mesh=made.mesh)
      outcome = loop.run(state, prefetch(iter(data[start:]), put))
      return dataclasses.replace(outcome, state=toy.host(outcome.state))


def rows(workdir):
  """Returns the log without timings."""
  return [
    {key: value for key, value in row.items() if not key.startswith("speed/")}
    for row in read_metrics(workdir)
  ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  return train(workdir), workdir


def test_log_eval_checkpoint_steps(uninterrupted):
  outcome, workdir = uninterrupted
  assert outcome.finished
  assert int(outcome.state.step) == 12
  training = [row for row in rows(workdir) if "train/loss" in row]
  scoring = [row for row in rows(workdir) if "held_out/score" in row]
  # Metrics are also written before every evaluation and checkpoint.
  assert [row["step"] for row in training] == [3, 4, 5, 6, 8, 9, 10, 12]
  assert [row["step"] for row in scoring] == [4, 8, 12]
  # The state is saved every 5 steps and before each evaluation; three checkpoints are kept.
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "12", "8"]
  assert outcome.scores["held_out/error"] == scoring[-1]["held_out/error"]
  assert training[0]["train/learning_rate"] == pytest.approx(1e-2)
  assert "speed/images_per_second" in read_metrics(workdir)[0]


def test_logged_loss_mean_since_last_log(uninterrupted):
  made, losses = make_program(), []
  with jax.set_mesh(made.mesh):
    state = made.initial_state(seed=0)
    for batch in toy.batches(12):
      state, metrics = made.train_step(state, sharding.to_global(batch, made.mesh))
      losses.append(float(metrics["loss"].compute()))
  logged = {row["step"]: row["train/loss"] for row in rows(uninterrupted[1]) if "train/loss" in row}
  assert logged[3] == pytest.approx(np.mean(losses[:3]), rel=1e-6)
  assert logged[12] == pytest.approx(np.mean(losses[10:]), rel=1e-6)


def test_best_checkpoint_has_best_score(uninterrupted):
  _, workdir = uninterrupted
  scores = {r["step"]: r["held_out/score"] for r in rows(workdir) if "held_out/score" in r}
  best = max(scores, key=scores.get)
  assert (workdir / "best" / str(best)).exists()
  kept = restore_variables(workdir / "best")
  assert kept["params"]["head"]["kernel"].shape == (32, 1)


def with_settings(**fields):
  return dataclasses.replace(SETTINGS, **fields)


def test_eval_best_at_end(tmp_path):
  outcome = train(tmp_path, settings=with_settings(eval_best_at_end=True))
  scores = {row["step"]: row for row in read_metrics(tmp_path) if "held_out/score" in row}
  best = max((4, 8, 12), key=lambda step: scores[step]["held_out/score"])
  assert best != 12  # holds for this toy and its few steps
  expected = pytest.approx(scores[best]["held_out/score"], rel=1e-6)
  assert outcome.scores["best/held_out/score"] == expected
  found = [r for r in read_metrics(tmp_path) if "best/held_out/score" in r]
  assert [(row["step"], row["best/held_out/score"]) for row in found] == [(12, expected)]
  assert outcome.scores["held_out/score"] == scores[12]["held_out/score"]


def test_eval_best_at_end_last_is_best(tmp_path):
  """best_mode is max, so the highest error counts as best: the last one."""
  outcome = train(tmp_path, settings=with_settings(best="held_out/error", eval_best_at_end=True))
  assert outcome.scores["best/held_out/error"] == outcome.scores["held_out/error"]


def test_is_due_fraction_of_run():
  settings = with_settings(eval_every=0.25)
  assert [step for step in range(1, 13) if settings.is_due(0.25, step)] == [3, 6, 9, 12]
  assert [step for step in range(1, 13) if settings.is_due(0.01, step)] == list(range(1, 13))
  assert [step for step in range(1, 13) if settings.is_due(0, step)] == [12]
  assert [step for step in range(1, 13) if settings.is_due(4.0, step)] == [4, 8, 12]


def test_is_due_at_least_min_interval():
  settings = with_settings(eval_every=0.25, min_interval=5)
  assert [step for step in range(1, 13) if settings.is_due(0.25, step)] == [5, 10, 12]
  assert [step for step in range(1, 13) if settings.is_due(2, step)] == [2, 4, 6, 8, 10, 12]


def test_figures_of_newest_and_best_step_kept(tmp_path, monkeypatch):
  """Evaluations after steps 4, 8 and 12; the scores are best after step 4."""
  monkeypatch.setattr(toy.Regression, "figures", lambda *_: {"first": Figure()})
  scores = iter((3.0, 2.0, 1.0))
  monkeypatch.setattr(toy.SquaredError, "result", lambda _: {"score": next(scores)})
  train(tmp_path)
  found = sorted(path.name for path in (tmp_path / "figures").iterdir())
  assert found == ["held_out_first_00000004.png", "held_out_first_00000012.png"]


def test_score_table_in_per_cent():
  scores = {"val/accuracy": 0.5, "val/accuracy/cat": 1.0, "test/psnr": 25.26, "val/box_ap50": 0.421}
  assert [line.split() for line in score_table(scores)] == [
    ["val", "test"], ["accuracy", "50.00", "%"], ["psnr", "25.26"], ["box_ap50", "42.10", "%"],
  ]  # fmt: skip
  assert len({len(line) for line in score_table(scores)}) == 1


def test_format_scores_omits_classes():
  scores = {"val/accuracy": 0.5, "val/accuracy/cat": 1.0, "best/val/loss": 2.0, "best/val/a/b": 1.0}
  assert format_scores(scores) == "val/accuracy 0.5  best/val/loss 2"


@pytest.mark.parametrize("stop_at", [1, 4, 5])  # any; evaluated; saved
def test_stopped_run_resumes_bit_exact(uninterrupted, tmp_path, stop_at):
  def send_sigterm(step):
    if step == stop_at:
      os.kill(os.getpid(), signal.SIGTERM)

  stopped = train(tmp_path, on_step=send_sigterm)
  assert not stopped.finished
  assert int(stopped.state.step) == stop_at
  resumed = train(tmp_path)
  assert resumed.finished
  jax.tree.map(np.testing.assert_array_equal, resumed.state, uninterrupted[0].state)
  assert rows(tmp_path) == rows(uninterrupted[1])


@pytest.mark.parametrize(
  "content",
  [b"\xff", b"[1]", b'{"step": 7, "sums": {"loss": [1]}}', b"[" * 100_000],
  ids=["not text", "a list", "no count", "nested"],
)
def test_damaged_pending_metrics_are_ignored_with_warning(tmp_path, caplog, content):
  file = epath.Path(tmp_path / "pending.json")
  file.write_bytes(content)
  assert read_pending(file, 7) == {}
  assert f"{file} is damaged" in caplog.text


class Interrupted(BaseException):
  pass


@pytest.mark.parametrize(
  "error", [Interrupted(), ValueError("damaged image")], ids=["interruption", "error"]
)
def test_interrupted_evaluation_repeated_on_resume(uninterrupted, tmp_path, error):
  def interrupt():
    raise error

  with pytest.raises((Interrupted, EvaluationError)) as raised:
    train(tmp_path, on_evaluation=interrupt)
  if isinstance(error, ValueError):
    assert str(raised.value) == "evaluation 'held_out': damaged image"
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
  steps = []
  resumed = train(tmp_path, on_step=steps.append)
  assert steps == list(range(5, 13))
  jax.tree.map(np.testing.assert_array_equal, resumed.state, uninterrupted[0].state)
  assert rows(tmp_path) == rows(uninterrupted[1])
  best = [path.name for path in (uninterrupted[1] / "best").iterdir()]
  assert [path.name for path in (tmp_path / "best").iterdir()] == best


def test_removed_last_checkpoint_saved_again(uninterrupted, tmp_path):
  evaluations = iter(range(3))

  def remove():
    if next(evaluations) == 2:  # the last
      while not (tmp_path / "checkpoints" / "12").exists():  # written in the background
        time.sleep(0.01)
      while (tmp_path / "checkpoints").exists():  # Orbax removes older ones concurrently
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)

  train(tmp_path, on_evaluation=remove)
  expected = toy.host(uninterrupted[0].state).params
  jax.tree.map(
    np.testing.assert_array_equal, restore_variables(tmp_path / "checkpoints")["params"], expected
  )


def test_data_error_saves_state(uninterrupted, tmp_path):
  class Damaged(list):
    def __getitem__(self, index):
      return itertools.chain(super().__getitem__(slice(6)), map(self.fail, [0]))

    def fail(self, _):
      raise ValueError("a.jpg: truncated")

  with pytest.raises(ValueError, match=r"a\.jpg"):
    train(tmp_path, data=Damaged(toy.batches(12)))
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
  resumed = train(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, resumed.state, uninterrupted[0].state)
  assert rows(tmp_path) == rows(uninterrupted[1])


def test_log_write_error_saves_state(tmp_path, monkeypatch):
  def full(self, *_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(MetricWriter, "_write_scalars", full)
  with pytest.raises(OSError, match="the log cannot be written"):
    train(tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_crash_resumes_from_last_checkpoint(uninterrupted, tmp_path):
  def crash(step):
    if step == 9:
      raise Interrupted

  with pytest.raises(Interrupted):
    train(tmp_path, on_step=crash)
  resumed = train(tmp_path)  # from step 8
  jax.tree.map(np.testing.assert_array_equal, resumed.state, uninterrupted[0].state)
  assert rows(tmp_path) == rows(uninterrupted[1])


def test_nan_loss_raises_and_is_not_saved(tmp_path):
  data = toy.batches(12)
  data[6] = {**data[6], "y": data[6]["y"] * np.nan}
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 7.* step 5"):
    train(tmp_path, data=data)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
  assert all(np.isfinite(row["train/loss"]) for row in rows(tmp_path) if "train/loss" in row)


def test_nonfinite_parameters_raise_before_evaluation(tmp_path):
  """A step's loss is computed before its update, so it does not show the update's effect."""
  made = make_program()

  def make_infinite(state, batch):
    state, metrics = made.train_step(state, batch)
    if int(state.step) == 4:
      infinite = jax.tree.map(lambda p: p * jnp.inf, state.params)
      state = dataclasses.replace(state, params=infinite)
    return state, metrics

  with pytest.raises(FloatingPointError, match="not finite after step 4"):
    train(tmp_path, train_step=make_infinite)
  assert not (tmp_path / "checkpoints").exists()


def test_unknown_best_score_raises(tmp_path):
  settings = dataclasses.replace(SETTINGS, best="held_out/scor")
  with pytest.raises(ValueError, match="'held_out/score'"):
    train(tmp_path, settings=settings)


def test_nan_loss_without_checkpoint_raises(tmp_path):
  data = toy.batches(12)
  data[0] = {**data[0], "x": data[0]["x"] * np.inf}
  with pytest.raises(FloatingPointError, match="at step 1; no checkpoint"):
    train(tmp_path, data=data)


@pytest.mark.parametrize("window", [(2, 4), (3, 9)], ids=["inside", "beyond the end"])
def test_profile_window(tmp_path, window):
  settings = dataclasses.replace(SETTINGS, num_steps=4, profile=window)
  train(tmp_path, settings=settings)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_prefetch_order_and_depth():
  requested = []

  def source():
    for i in range(5):
      requested.append(i)
      yield i

  batches = prefetch(source(), lambda x: x * 10, depth=2)
  assert next(batches) == 0
  assert requested == [0, 1]
  assert list(batches) == [10, 20, 30, 40]


def evaluate(data, variables):
  return score_predictions(variables, program=make_program(), batches=lambda: data, name="x")


def test_evaluation_merges_batches_without_padding():
  made = make_program()
  data = toy.batches(3, seed=4)
  data[2]["mask"] = np.arange(16) < 5
  scores = functools.partial(evaluate, data)
  with jax.set_mesh(made.mesh):
    variables = made.initial_state(seed=0).variables
    report = scores(variables)
    predicted = [
      np.asarray(made.task.predict(variables, {"x": jnp.asarray(b["x"])})["y"]) for b in data
    ]
  errors = np.concatenate([(p - b["y"]) ** 2 for p, b in zip(predicted, data, strict=True)])[:37]
  assert report.scores["error"] == pytest.approx(errors.mean(), rel=1e-5)
  assert "skipped_images" not in report.scores


@pytest.mark.parametrize("real", [True, False])
def test_figures_of_first_batch_with_real_rows(monkeypatch, real):
  made = make_program()
  monkeypatch.setattr(type(made.task), "figures", lambda *_: {"first": Figure()})
  data = toy.batches(2)
  data[0]["mask"] = np.full(16, real)
  with jax.set_mesh(made.mesh):
    report = evaluate(data, made.initial_state(seed=0).variables)
  assert set(report.figures) == ({"first"} if real else set())


def test_failing_figures_keep_scores(tmp_path, monkeypatch, caplog):
  """A figure that cannot be made, or cannot be rendered, costs neither scores nor the best."""

  def figures(*_):
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    monkeypatch.setattr(figure, "draw", None)
    return {"unrendered": figure}

  task = type(make_program().task)
  monkeypatch.setattr(task, "figures", lambda *_: 1 / 0)
  monkeypatch.setattr(task, "score_figures", figures)
  assert train(tmp_path).finished
  assert [row["step"] for row in rows(tmp_path) if "held_out/score" in row] == [4, 8, 12]
  assert list((tmp_path / "best").iterdir())
  assert "evaluation 'held_out': no figures: ZeroDivisionError" in caplog.text
  assert "figure held_out_unrendered cannot be drawn" in caplog.text


def test_evaluation_reports_skipped_images():
  class Lossy(list):
    num_skipped = 3

  made = make_program()
  data = Lossy(toy.batches(1))
  scores = functools.partial(evaluate, data)
  with jax.set_mesh(made.mesh):
    report = scores(made.initial_state(seed=0).variables)
  assert report.scores["skipped_images"] == 3


@pytest.fixture(autouse=True)
def quiet():
  logging.set_verbosity(logging.WARNING)
