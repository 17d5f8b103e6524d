"""`docs/make_plans.py`: docs/PLANS.md matches docs/plans.json and the recipes; compiles nothing."""

import concurrent.futures
import importlib.util
import json
import time

import pytest

from tests.conftest import GOLDENS

ROOT = GOLDENS.parents[1]
_spec = importlib.util.spec_from_file_location("make_plans", ROOT / "docs/make_plans.py")
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_page_up_to_date():
  """Updated without compilation by: python docs/make_plans.py --only=nothing. The note
  about recipes changed since compilation is added at the next update."""
  written, now = page.PAGE.read_text(encoding="utf-8"), page.page()
  changed = "; the recipe has changed since"
  assert written.replace(changed, "") == now.replace(changed, "")


def test_all_recipes_on_page():
  rows, without = page.rows()
  planned = {row.config for row in rows} | without.keys()
  assert planned == set(page.recipes())
  text = page.PAGE.read_text(encoding="utf-8")
  missing = [r for r in page.recipes() if f"`{r.partition(':')[2]}`" not in text and r not in text]
  assert missing == []
  assert not any(":demo" in recipe for recipe in page.recipes())
  assert "configs/fpt.py:segmentation_voc" in page.recipes()


def test_compiled_recipes_fit_a_slice():
  plans, fits = page._stored(), {}
  for row in page.rows()[0]:
    if "fits" in plans.get(row.key, {}):
      fits[row.config] = fits.get(row.config, False) or plans[row.key]["fits"]
  assert len(fits) > 100
  assert [config for config, fit in fits.items() if not fit] == []


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_igpt_has_both_slices(size, topology):
  found = [
    row
    for row in page.rows()[0]
    if row.config.startswith(f"configs/igpt.py:{size}_imagenet") and row.topology == topology
  ]
  assert found


def test_cells_of_uncompiled_recipe():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  assert "not compiled yet" in page._cells(row, None)
  assert "not compiled: stopped after 9 s" in page._cells(row, {"error": "stopped after 9 s"})


def test_progress_line():
  done = [{"compile_cpu_seconds": 17.2}, {"compile_cpu_seconds": 775.9}, {}]
  text = page._progress(done, 112)
  assert "3 of 112" in text
  assert "17 to 776 s" in text
  assert "unknown" in text
  assert "unknown" not in page._progress(done, 3)


def test_digest_depends_on_compiled_program():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  other = row._replace(overrides=("--config.sharding.mesh.fsdp=4",))
  logs = row._replace(overrides=("--config.log_every=7",))
  rates = row._replace(
    overrides=("--config.optimizer.learning_rate=7", "--config.optimizer.schedule.warmup_steps=7")
  )
  clipped = row._replace(overrides=("--config.optimizer.clip_norm=7",))
  assert page.digest(row) != page.digest(other)
  assert page.digest(row) != page.digest(clipped)
  assert page.digest(row) == page.digest(logs)  # changes only what is logged
  assert page.digest(row) == page.digest(rates)  # changes only the step size


def test_recipe_without_slice_raises(tmp_path, monkeypatch):
  slices = tmp_path / "slices.toml"
  slices.write_text('[[slice]]\nrecipes = "vit.py:*"\ntopology = "v5e:2x2"\n')
  monkeypatch.setattr(page, "SLICES", slices)
  with pytest.raises(ValueError, match=r"slices\.toml: .*detr\.py:r50"):
    page.rows()


def test_concurrent_writes_all_kept(tmp_path, monkeypatch):
  """Threads in place of processes: a lock of a file that each opens excludes threads, too."""
  rows, stored = [page.Row(f"vit.py:{n}", "v5e:2x2") for n in range(4)], page._stored

  def slow_stored():
    found = stored()
    time.sleep(0.02)
    return found

  for name in ("PAGE", "PLANS", "LOCK"):
    monkeypatch.setattr(page, name, tmp_path / name)
  monkeypatch.setattr(page, "_stored", slow_stored)
  monkeypatch.setattr(page, "rows", lambda: (rows, {}))
  monkeypatch.setattr(page, "page", lambda: " ".join(stored()))
  with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
    list(pool.map(page.write_page, [{row.key: {"error": "none"}} for row in rows]))
  assert list(json.loads(page.PLANS.read_text())) == [row.key for row in rows]
  assert page.PAGE.read_text() == " ".join(row.key for row in rows)


def test_o1_plan_not_current_for_full_optimization():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  quick = {row.key: {"digest": page.digest(row), "optimization_level": "O1"}}
  best = {row.key: {"digest": page.digest(row), "optimization_level": None}}
  assert page._is_current(row, quick, "O1")
  assert not page._is_current(row, quick, None)
  assert page._is_current(row, best, "O1")
  assert page._is_current(row, best, None)


def test_compact_plan_fills_all_cells():
  memory = {"params": 1.0, "optimizer": 2.0, "temporary": 3.4, "peak": 2.0**30, "limit": 2.0**34}
  plan = {
    "fits": True,
    "mesh": {"data": 4, "fsdp": 1, "model": 2},
    "remat": None,
    "memory": {**memory, "code": 9.0},
    "flops": 1.5e12,
    "roofline": {"step": 0.25, "bound": "memory"},
    "step_seconds": 0.2500000001,
    "days": 1.25,
    "compile_seconds": 17.2,
    "compile_cpu_seconds": 30.5,
    "date": "2026-01-01",
    "jax_version": "0.10.2",
    "notes": ["long"],
  }
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x4")
  stored = json.loads(json.dumps({**page.compact(plan), "digest": page.digest(row)}))
  assert dict(zip(page.COLUMNS, page._cells(row, stored), strict=True)) == {
    "recipe": "`b16_imagenet`",
    "slice": "v5e:2x4",
    "mesh": "data 4, model 2",
    "remat": "",
    "peak": "1.00 GiB",
    "limit": "16.00 GiB",
    "parameters": "0.0 MiB",
    "optimizer": "0.0 MiB",
    "temporaries": "0.0 MiB",
    "TFLOP": "1.5",
    "step, at least": "250.0 ms",
    "bound by": "memory",
    "days, at least": "1.25",
    "compile time": "17 s",
    "compiled on": "2026-01-01, jax 0.10.2",
  }
  failed = page.compact(
    {
      **plan,
      "fits": False,
      "roofline": None,
      "step_seconds": None,
      "days": None,
      "compile_seconds": None,
      "compile_cpu_seconds": None,
    }
  )
  cells = page._cells(row, {**failed, "digest": ""})
  assert "**does not fit**: 1.00 GiB" in cells
  assert cells[-1].endswith("the recipe has changed since")


def test_o1_plan_has_no_time_bound():
  row = page.rows()[0][0]
  plan = page._stored()[row.key]
  cells = dict(zip(page.COLUMNS, page._cells(row, plan), strict=True))
  quick = page._cells(row, plan | {"optimization_level": "O1"})
  different = {
    name: value for name, value in zip(page.COLUMNS, quick, strict=True) if value != cells[name]
  }
  blank = dict.fromkeys(("step, at least", "bound by", "days, at least"), "")
  assert different == {**blank, "compile time": f"{cells['compile time']}, O1"}
