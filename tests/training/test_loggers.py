"""Logging services: a stand-in by default, and the real libraries in their offline modes."""

import json
import sqlite3
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
from absl import logging
from matplotlib.figure import Figure

from vit_jax_zoo.training import loggers
from vit_jax_zoo.training.loggers import RUN_IDS, Service, check_loggers
from vit_jax_zoo.training.metric_writer import MetricWriter, read_metrics


@pytest.fixture
def calls(monkeypatch):
  """Replaces W&B by a stand-in; returns its calls. Scalars of step 3 fail."""
  made = []

  def open_run(module, folder, name, run_id):
    def add(kind):
      def call(*values):
        made.append((kind, *values))
        if kind == "scalars" and values[0] == 3:
          raise ConnectionError("no network")

      return call

    made.append(("open", folder, name, run_id))
    return Service(run_id or "id1", *map(add, ("scalars", "image", "hparams", "close")))

  monkeypatch.setitem(loggers.SERVICES, "wandb", ("json", open_run))
  return made


def write(workdir, steps, **options):
  with MetricWriter(workdir, loggers=("wandb",), **options) as writer:
    writer.write_config({"model": {"width": 8}})
    for step in steps:
      writer.write_scalars(step, {"train/loss": step / 10})
    writer.write_figures(steps[-1], {"batch": Figure()})


def test_service_gets_everything(calls, tmp_path):
  write(tmp_path, [1, 2])
  (image,) = [call for call in calls if call[0] == "image"]
  assert image[1:3] == (2, "batch")
  assert image[3].dtype == np.uint8
  assert [call for call in calls if call[0] != "image"] == [
    ("open", str(tmp_path), tmp_path.name, None),
    ("hparams", {"model.width": 8}),
    ("scalars", 1, {"train/loss": 0.1}),
    ("scalars", 2, {"train/loss": 0.2}),
    ("close", 0),
  ]
  assert not list(tmp_path.glob("events.out.tfevents.*"))  # no "tensorboard" in loggers
  assert len(read_metrics(tmp_path)) == 2


def test_service_is_told_of_failed_run(calls, tmp_path):
  with pytest.raises(RuntimeError), MetricWriter(tmp_path, loggers=("wandb",)):
    raise RuntimeError("loss is NaN")
  assert calls[-1] == ("close", 1)


@pytest.mark.parametrize(("resume_step", "run_id"), [(1, "id1"), (None, None)])
def test_resumed_run_continues_at_service(calls, tmp_path, resume_step, run_id):
  write(tmp_path, [1])
  calls.clear()
  write(tmp_path, [2], resume_step=resume_step)
  assert calls[0] == ("open", str(tmp_path), tmp_path.name, run_id)


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": '])
def test_damaged_run_ids_name_their_file(calls, tmp_path, content):
  (tmp_path / RUN_IDS).write_text(content)
  with pytest.raises(ValueError, match=rf"^{tmp_path / RUN_IDS} is not JSON .*; remove it"):
    write(tmp_path, [2], resume_step=1)


def test_failing_service_is_dropped(calls, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
  write(tmp_path, [1, 2, 3, 4])
  assert [call[1] for call in calls if call[0] == "scalars"] == [1, 2, 3]
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
  (message,) = caplog.messages
  assert "wandb: no network" in message


def test_service_that_refuses_names_field(tmp_path, monkeypatch):
  def refuse(*_):
    raise RuntimeError("no API key;\nlog in")

  monkeypatch.setitem(loggers.SERVICES, "comet", ("json", refuse))
  with pytest.raises(ValueError, match=r"^config.logging: comet: no API key; log in$"):
    MetricWriter(tmp_path, loggers=("comet",))


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("wnadb",), "config.logging 'wnadb'; did you mean 'wandb'"),
    (("mlflow",), r"config.logging: mlflow .* pip install -e '.\[mlflow\]'"),
  ],
)
def test_invalid_loggers(names, message, monkeypatch):
  monkeypatch.setitem(loggers.SERVICES, "mlflow", ("no_such_package", None))
  with pytest.raises((ValueError, ModuleNotFoundError), match=message):
    check_loggers(names)


def run_twice(workdir, name):
  """Writes a run of 2 steps, and resumes it at the first of them."""
  for steps, resume_step in (([1, 2], None), ([2, 3], 1)):
    with MetricWriter(workdir, loggers=("tensorboard", name), resume_step=resume_step) as writer:
      if resume_step is None:
        writer.write_config({"model": {"width": 8}})
      for step in steps:
        writer.write_scalars(step, {"train/loss": step / 10, "test/accuracy/a cat's": 0.5})
      figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
      axes.plot([0, 1])
      writer.write_figures(steps[-1], {"test_batch": figure})
  return json.loads((workdir / RUN_IDS).read_text())[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  run_id = run_twice(tmp_path, "wandb")
  folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert 1 <= len(folders) <= 2  # names have the second
  for folder in folders:
    assert (folder / f"run-{run_id}.wandb").stat().st_size > 1000
    assert list(folder.rglob("test_batch*.png"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_in_sqlite(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow")
  monkeypatch.chdir(tmp_path)
  mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
  run_id = run_twice(tmp_path / "run", "mlflow")
  writer = MetricWriter(tmp_path / "failed", loggers=("mlflow",))
  writer.write_config({"model": {f"field_{i}": i for i in range(150)}})
  writer.close(failed=True)
  client = mlflow.MlflowClient()
  run = client.get_run(run_id)
  assert run.data.params == {"model.width": "8"}
  assert run.info.status == "FINISHED"
  history = client.get_metric_history(run_id, "train/loss")
  assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3)]
  assert "test/accuracy/a cat_s" in run.data.metrics
  assert client.list_artifacts(run_id, "images")
  with sqlite3.connect(tmp_path / "mlflow.db") as database:
    assert database.execute("select count(*) from runs").fetchone() == (2,)
  failed = client.get_run(json.loads((tmp_path / "failed" / RUN_IDS).read_text())["mlflow"])
  assert failed.info.status == "FAILED"
  assert failed.data.params == {f"model.field_{i}": str(i) for i in range(150)}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_comet_offline(tmp_path, monkeypatch):
  pytest.importorskip("comet_ml")
  monkeypatch.setenv("COMET_START_ONLINE", "False")
  run_id = run_twice(tmp_path, "comet")
  archives = sorted(tmp_path.glob("*.zip"))
  assert len(archives) == 2
  assert all(run_id in path.name for path in archives)
  lines, names = "", []
  for path in archives:  # the first run has the config; names do not tell which it is
    with zipfile.ZipFile(path) as archive:
      lines += archive.read("messages.json").decode()
      names += archive.namelist()
  assert "train/loss" in lines
  assert "model.width" in lines
  assert any("test_batch" in name or name.endswith(".png") for name in [*names, lines])
