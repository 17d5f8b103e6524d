"""Atomic writes; disk-full errors: one line for every kind of output, no deadlock."""

import errno
import json
import os
import re

import pytest
from etils import epath
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from tests.training.disk import small_files
from vit_jax_zoo import cli
from vit_jax_zoo import run_metadata as run_config
from vit_jax_zoo.training import disk
from vit_jax_zoo.training.metric_writer import EventFile, MetricWriter, read_metrics, save_figures


def one_line(message):
  return pytest.raises(
    OSError, match=rf"^{message}: File too large; (make room|free disk space)[^\n]*$"
  )


def test_log_disk_full_raises_and_resumes(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {"loss": 1.0})
  message = f"the log .*{tmp_path}"
  with small_files(1000), one_line(message), MetricWriter(tmp_path, resume_step=1) as writer:
    for step in range(2, 100):
      writer.write_scalars(step, {"loss": 1.0})
  with MetricWriter(tmp_path, resume_step=1) as writer:
    writer.write_scalars(2, {"loss": 0.5})
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("size", [0, 4096])
def test_figures_and_texts_disk_full_raises(tmp_path, size):
  message = f"the log .*{tmp_path}"
  with small_files(size), one_line(message), MetricWriter(tmp_path) as writer:
    for step in range(20):
      writer.write_figures(step, {"batch": Figure()})
      writer.write_config({"seeds": "0" * 9000})


def test_run_files_disk_full_raises(tmp_path):
  with small_files(1), one_line(f"{tmp_path}/figures/a_00000003.png cannot be written"):
    save_figures(tmp_path, 3, {"a": Figure()})
  with small_files(1), one_line(f"{tmp_path}/data.json cannot be written"):
    run_config.save_data(run_config.RunData().info("digits"), {}, epath.Path(tmp_path))


def test_cli_error_suggests_free_space(tmp_path, capsys):
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.json")
  with pytest.raises(SystemExit), cli.one_line_errors(show_traceback=False):
    raise full
  assert re.search(r"'a\.json'; [^\n]* disk space [^\n]*\n$", capsys.readouterr().err)


def test_flush_writes_all_events(tmp_path):
  file = EventFile(tmp_path, number=0, purge_step=0)
  for step in range(100):
    value = Summary.Value(tag="loss", simple_value=step / 4)
    file.write(summary=Summary(value=[value]), step=step)
  file.flush()  # no close: simulates an interruption
  events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
  assert [(event.step, event.value) for event in events] == [(i, i / 4) for i in range(100)]
  file.close()


def test_failed_write_keeps_old_file(tmp_path):
  path = tmp_path / "notes.txt"
  disk.write(path, "old")
  with pytest.raises(TypeError):
    disk.write_json(path, {"a": object()})
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_open_reader_keeps_old_file(tmp_path):
  path = tmp_path / "notes.txt"
  disk.write(path, b"old " * 1000)
  with path.open() as reader:
    assert reader.read(4) == "old "
    disk.write(path, "new")
    assert reader.read() == "old " * 999
  assert path.read_text() == "new"


def test_json_not_ascii_escaped(tmp_path):
  disk.write_json(str(tmp_path / "a.json"), {"names": ["Käfer"]})
  text = (tmp_path / "a.json").read_text(encoding="utf-8")
  assert "Käfer" in text
  assert json.loads(text) == {"names": ["Käfer"]}


def test_json_surrogates_round_trip(tmp_path):
  disk.write_json(tmp_path / "a.json", ["b\udce9.png"])
  assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["b\udce9.png"]
