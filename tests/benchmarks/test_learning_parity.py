"""`benchmarks/learning_parity.py`: table, resumption, and two steps beside each reference."""

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import learning_parity


def call(monkeypatch, folder, *flags):
  """Runs the script; returns its results by side."""
  places = (f"--workdir={folder}", f"--output={folder}")
  monkeypatch.setattr(sys, "argv", ["learning_parity.py", *places, *flags])
  learning_parity.main()
  file = pathlib.Path(folder) / "benchmarks" / "results" / "learning_parity.json"
  return json.loads(file.read_text())["runs"]


def test_only_missing_runs_executed_and_compared_by_seed(tmp_path, monkeypatch, capsys):
  made = []

  def run(name, side, seed, folder, *, toy):
    made.append((name, side, seed))
    score = 0.9 + 0.01 * seed + {"here": 0.0, "reference": 0.004, "bfloat16": -0.01}[side]
    return {"losses": [2.0, 1.0], "score": score, "machine": "2 cores"}

  monkeypatch.setattr(learning_parity, "run", run)
  call(monkeypatch, tmp_path, "--systems=vit", "--seeds=0")
  call(monkeypatch, tmp_path, "--systems=vit", "--seeds=0,1")
  assert made == [("vit", side, seed) for seed in (0, 1) for side in learning_parity.SIDES]
  row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vit")][-1]
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[1] == "0.905 (0.9-0.91)"
  assert cells[4:] == ["0.004, at most 0.004", "0.01"]
  assert (tmp_path / "docs" / "evidence" / "learning_parity.png").stat().st_size > 1000
  with pytest.raises(SystemExit, match="--systems: unknown vitt"):
    call(monkeypatch, tmp_path, "--systems=vitt")


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", learning_parity.SYSTEMS)
def test_two_steps_equal_reference(name, tmp_path, monkeypatch):
  runs = call(monkeypatch, tmp_path, "--toy", f"--systems={name}", "--seeds=0")
  here, reference, half = (
    next(r["losses"] for r in runs if r["side"] == side) for side in learning_parity.SIDES
  )
  np.testing.assert_allclose(here, reference, rtol=1e-4)
  np.testing.assert_allclose(half, here, rtol=0.05)
