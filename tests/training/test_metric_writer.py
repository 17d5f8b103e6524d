"""MetricWriter: round trip, and the log of a resumed run."""

import json

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax_zoo.training import metric_writer
from vit_jax_zoo.training.metric_writer import METRICS_FILE, MetricWriter, read_metrics


def tensorboard_of(workdir):
  accumulator = EventAccumulator(str(workdir))
  accumulator.Reload()
  return accumulator


def scalars_of(workdir, name):
  return [(event.step, event.value) for event in tensorboard_of(workdir).Scalars(name)]


def test_all_kinds_written(tmp_path):
  figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
  axes.plot([0, 1])
  with MetricWriter(tmp_path / "new") as writer:
    writer.write_scalars(3, {"train/loss": jnp.asarray(0.5), "rate": np.float32(0.25), "n": 2})
    writer.write_figures(3, {"train/batch": figure})
    writer.write_config({"optimizer": {"learning_rate": 0.1}, "sizes": (1, 2), "seed": 0})
  workdir = tmp_path / "new"
  assert read_metrics(workdir) == [{"step": 3, "train/loss": 0.5, "rate": 0.25, "n": 2.0}]
  assert scalars_of(workdir, "train/loss") == [(3, 0.5)]
  events = tensorboard_of(workdir)
  (image,) = events.Images("train/batch")
  assert (image.step, image.width, image.height) == (3, 100, 50)
  (text,) = events.Tensors("config/text_summary")[0].tensor_proto.string_val
  assert b'"seed": 0' in text
  hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
  assert b"optimizer.learning_rate" in hparams
  image = np.asarray(Image.open(workdir / "figures" / "train" / "batch_00000003.png"))
  assert image.shape == (50, 100, 3)
  assert image.min() < 128 < image.max(), "something is drawn"
  assert not plt.get_fignums(), "figures are closed"


def test_nonfinite_numbers_round_trip(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {"a": np.nan, "b": np.inf, "c": -np.inf})
  row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)
  assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  (found,) = read_metrics(tmp_path)
  assert np.isnan(found["a"])
  assert (found["b"], found["c"]) == (np.inf, -np.inf)


def write_steps(workdir, steps, resume_step=None):
  with MetricWriter(workdir, resume_step=resume_step) as writer:
    for step in steps:
      writer.write_scalars(step, {"loss": step / 10})


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 3, "loss": 0.3}'])
def test_resumed_log_equals_uninterrupted(tmp_path, torn):
  write_steps(tmp_path / "whole", range(1, 7))
  write_steps(tmp_path / "killed", range(1, 6))
  with (tmp_path / "killed" / METRICS_FILE).open("a") as file:
    file.write(torn)  # a partial line, as after SIGKILL
  write_steps(tmp_path / "killed", range(4, 7), resume_step=3)
  contents = [(tmp_path / run / METRICS_FILE).read_text() for run in ("whole", "killed")]
  assert contents[0] == contents[1]
  assert scalars_of(tmp_path / "killed", "loss") == scalars_of(tmp_path / "whole", "loss")


def test_new_run_truncates_old_log(tmp_path):
  write_steps(tmp_path, range(0, 6))
  write_steps(tmp_path, range(0, 2))
  assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
  assert [step for step, _ in scalars_of(tmp_path, "loss")] == [0, 1]


def test_secondary_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_writer, "is_primary", lambda: False)
  figure = plt.figure()
  with MetricWriter(tmp_path / "other") as writer:
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_figures(1, {"figure": figure})
    writer.write_config({"a": 1})
    writer.flush()
  assert not (tmp_path / "other").exists()
  assert not plt.get_fignums()


def test_background_error_raised_on_flush(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write_scalars(1, {"loss": np.zeros(3)})
  with pytest.raises(ValueError, match=r"metric 'loss': shape \(3,\)"):
    writer.flush()
  writer.write_scalars(2, {"loss": 1.0})
  writer.close()
  writer.close()  # a second close is a no-op
  assert [row["step"] for row in read_metrics(tmp_path)] == [2]


def test_remote_workdir_gets_copies(tmp_path, monkeypatch):
  bucket, real = tmp_path / "bucket", metric_writer.epath.Path
  monkeypatch.setattr(
    metric_writer.epath, "Path", lambda path: real(str(path).replace("gs://bucket", str(bucket)))
  )
  with MetricWriter("gs://bucket/run") as writer:
    writer.write_scalars(1, {"loss": 2.0})
    writer.flush()
    assert [row["loss"] for row in metric_writer.read_metrics("gs://bucket/run")] == [2.0]
    writer.write_scalars(2, {"loss": 1.0})
    writer.write_figures(2, {"a/picture": Figure()})
  with MetricWriter("gs://bucket/run", resume_step=1) as writer:
    writer.write_scalars(2, {"loss": 0.5})
  rows = metric_writer.read_metrics("gs://bucket/run")
  assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 0.5)]
  assert (bucket / "run" / "figures" / "a" / "picture_00000002.png").exists()
  assert len(list((bucket / "run").glob("events.out.tfevents.*"))) == 2


def test_partial_rows_skipped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1, "a": 2}\n{"step": 2, "a')
  assert read_metrics(tmp_path) == [{"step": 1, "a": 2.0}]


def test_null_read_as_nan(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": null}\n')
  (row,) = read_metrics(tmp_path)
  assert row["step"] == 1
  assert np.isnan(row["a"])


@pytest.mark.parametrize(
  "damage", [b'\xff"step": 2}\n', b'{"step": 2, "a\0\0\n', b'{"step": 2, "a": []}\n']
)
def test_damaged_row_dropped_and_named(tmp_path, caplog, damage):
  with MetricWriter(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write_scalars(step, {"train/loss": float(step)})
  path = tmp_path / "metrics.jsonl"
  first, _, third = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + damage + third)
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
  with MetricWriter(tmp_path, resume_step=3):
    pass
  assert path.read_bytes() == first + third
  assert all(f"{path}: damaged rows dropped: lines 2" in text for text in caplog.messages)
  assert len(caplog.messages) == 2


def test_surrogates_escaped_for_tensorboard(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write_config({"data": {"source": "folder:/b\udce9"}})
  (text,) = tensorboard_of(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val
  assert rb"folder:/b\udce9" in text
