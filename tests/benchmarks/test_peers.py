"""`benchmarks/peers.py`: arithmetic and processes; with `-m parity`, all pairs."""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.command import environment

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

SLEEPERS = """
import time
import numpy as np
from implementations.base import Implementation


def ours(setting):
  setting.write_inputs(x=np.arange(setting.batch_size))
  return Implementation({"train": lambda n: time.sleep(0.01 * n)}, {"loss": np.float32(2)}, "cpu")


def create(setting):
  x = setting.inputs()["x"]
  if setting.model == "broken":
    raise ValueError("no such model\\nsecond line")
  runs = {"train, eager": lambda n: time.sleep(0.03 * n)}
  outputs = {"loss": np.float32(x.sum())}
  return Implementation(runs, outputs, "cpu", {"train, compiled": "no compiler"})
"""


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
  """The benchmark with two implementations that only sleep."""
  folder = tmp_path_factory.mktemp("sleepers")
  (folder / "sleepers.py").write_text(SLEEPERS)
  sys.path[:0] = [str(BENCHMARKS), str(folder)]
  try:
    import peers

    yield peers
  finally:
    sys.path.remove(str(BENCHMARKS))
    sys.path.remove(str(folder))


def test_ratios_within_round(peers):
  seconds = {
    "ours: train": [(1.0, 2.0), (2.0, 2.0)],
    "peer: train, eager": [(3.0, 8.0), (4.0, 8.0)],
    "peer: train, compiled, fused": [(1.0, 1.0), (1.0, 1.0)],
  }
  eager, compiled = peers.ratios(seconds)
  assert (eager["job"], eager["mode"]) == ("train", "eager")
  assert eager["ratio"] == [3.0, 2.0]
  assert eager["cpu_ratio"] == [4.0, 4.0]
  assert compiled["mode"] == "compiled, fused"
  assert compiled["ratio"] == [1.0, 0.5]


def test_differences_relative_shapes_checked(peers):
  ours = {"logits": np.array([1.0, 4.0]), "index": np.array([0, 1, 2, 3])}
  theirs = {"logits": np.array([1.0, 5.0]), "index": np.array([0, 1, 2, 9])}
  assert peers.differences(ours, theirs) == {"logits": 0.2, "index": 0.25}
  with pytest.raises(RuntimeError, match=r"logits: .*\(2,\).*\(1,\)"):
    peers.differences(ours, {**theirs, "logits": np.array([1.0])})


def sleeping(peers, monkeypatch, tmp_path, model):
  pair = peers.Pair("ours", "peer", peers.Size(model, 4, 8), peers.Size(model, 4, 8))
  monkeypatch.setitem(peers.PAIRS, "sleep", pair)
  start = peers.start
  monkeypatch.setattr(
    peers, "start", lambda function, *rest: start(("sleepers", function[1]), *rest)
  )
  setting = peers.Setting(str(tmp_path), model, 4, 8)
  return peers.compare("sleep", setting, argparse.Namespace(threads=1, rounds=3, seconds=0.02))


def test_two_processes_alternate(peers, monkeypatch, tmp_path):
  result = sleeping(peers, monkeypatch, tmp_path, "any")
  (row,) = peers.ratios(result["seconds"])
  assert len(row["ratio"]) == 3
  assert statistics.median(row["ratio"]) > 1.2  # 30 ms / 10 ms, on a shared machine
  assert result["differences"] == {"loss": pytest.approx(2 / 3)}  # 2 and 0 + 1 + 2 + 3
  assert result["seconds"].keys() == {"ours: train", "peer: train, eager"}
  report = {"command": "c", "date": "d", "machine": "m", "versions": "v", "failed": {}}
  report["results"] = [result]
  assert json.loads(peers.to_json(report)) == json.loads(json.dumps(report))
  page = peers.page(report)
  assert "| any, train | eager |" in page
  assert "not measured: train, compiled: no compiler" in page


def test_results_page_matches_json(peers):
  for file in (BENCHMARKS / "results").glob("peers*.json"):
    assert file.with_suffix(".md").read_text() == peers.page(json.loads(file.read_text()))


def test_failed_implementation_one_line_error(peers, monkeypatch, tmp_path, capfd):
  with pytest.raises(RuntimeError, match=r"^ValueError: no such model$"):
    sleeping(peers, monkeypatch, tmp_path, "broken")
  assert "second line" in capfd.readouterr().err  # the traceback


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(
  ("name", "published"),
  [
    ("efficientnet_b0", 5_288_548),
    pytest.param("efficientnet_b6", 43_040_704, marks=pytest.mark.long),
  ],
)
def test_efficientnet_parameter_counts(name, published):
  from implementations import efficientnet

  model = efficientnet.create(name)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


TINY = {
  "vit": ("vit_ti16", 2, 32),
  "lambda_resnet": ("lambda_resnet26t", 2, 64),
  "igpt": ("igpt_s", 1, 4),
  "detr": ("detr_r50", 1, 64),
  "ttsr": ("search", 1, 8),
  "fpt": ("fpt_16", 2, 64),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TINY)
def test_pairs_compute_equal_results(name, tmp_path):
  model, batch, side = TINY[name]
  command = [
    sys.executable, str(BENCHMARKS / "peers.py"), f"--pairs={name}", f"--model={model}",
    f"--batch_size={batch}", f"--image_size={side}", "--rounds=1", "--seconds=0.01", "--pixels=2",
    "--threads=1", f"--output={tmp_path}",
  ]  # fmt: skip
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=1200, check=False, env=environment()
  )
  assert done.returncode == 0, done.stderr[-2000:]
  (result,) = json.loads((tmp_path / "peers.json").read_text())["results"]
  assert result["skipped"] == {}
  assert any(run.startswith("peer: ") for run in result["seconds"])
  assert max(result["differences"].values()) < 1e-4
