"""docs/PLANS.md is what docs/plans.json and the recipes say; nothing is compiled here."""

import concurrent.futures
import json
import pathlib
import time

import pytest

from vit_jax_zoo.planning import page

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_the_page_is_current():
  """Where it is not: python -m vit_jax_zoo.plan --all --only=nothing, which compiles nothing.

  That a recipe has changed since it was compiled is said when the page is next written.
  """
  written, now = page.PAGE.read_text(encoding="utf-8"), page.page()
  changed = "; the recipe has changed since"
  assert written.replace(changed, "") == now.replace(changed, "")


def test_no_recipe_is_missing():
  rows, without = page.rows()
  planned = {row.config for row in rows} | without.keys()
  assert planned == set(page.recipes())
  text = page.PAGE.read_text(encoding="utf-8")
  missing = [r for r in page.recipes() if f"`{r.partition(':')[2]}`" not in text and r not in text]
  assert missing == []
  assert not any(":demo" in recipe for recipe in page.recipes())
  assert "configs/fpt.py:segmentation_voc" in page.recipes()
  assert not any("fpt_segmentation.py" in recipe for recipe in page.recipes())


def test_each_recipe_that_was_compiled_fits_one_of_its_slices():
  plans, fits = page._stored(), {}
  for row in page.rows()[0]:
    if "fits" in plans.get(row.key, {}):
      fits[row.config] = fits.get(row.config, False) or plans[row.key]["fits"]
  assert len(fits) > 100
  assert [config for config, fit in fits.items() if not fit] == []


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_igpt_is_planned_for_both_slices(size, topology):
  found = [
    row
    for row in page.rows()[0]
    if row.config.startswith(f"configs/igpt.py:{size}_imagenet") and row.topology == topology
  ]
  assert found


def test_what_is_not_compiled_says_so():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  assert "not compiled yet" in page._cells(row, None)
  assert "not compiled: stopped after 9 s" in page._cells(row, {"error": "stopped after 9 s"})


def test_the_page_says_what_is_not_known_and_what_it_costs():
  done = [{"compile_cpu_seconds": seconds} for seconds in (17.2, 775.9, None)]
  text = page._progress(done, 112)
  assert text.startswith("3 of 112 rows were compiled. Of the others nothing is known yet")
  assert "17 to 776 seconds of CPU time" in text
  assert "Of the others" not in page._progress(done, 3)


def test_a_recipe_that_has_changed_has_another_digest():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  other = row._replace(overrides=("--config.sharding.mesh.fsdp=4",))
  logs = row._replace(overrides=("--config.log_every=7",))
  rates = row._replace(
    overrides=("--config.optimizer.learning_rate=7", "--config.optimizer.schedule.warmup_steps=7")
  )
  clipped = row._replace(overrides=("--config.optimizer.clip_norm=7",))
  assert page.digest(row) != page.digest(other)
  assert page.digest(row) != page.digest(clipped)
  assert page.digest(row) == page.digest(logs)  # what only changes what is written
  assert page.digest(row) == page.digest(rates)  # or how far a step goes


def test_a_recipe_without_a_slice_is_named(tmp_path, monkeypatch):
  slices = tmp_path / "slices.toml"
  slices.write_text('[[slice]]\nrecipes = "vit.py:*"\ntopology = "v5e:2x2"\n')
  monkeypatch.setattr(page, "SLICES", slices)
  with pytest.raises(ValueError, match=r"names no slice for detr\.py:r50; add one"):
    page.rows()


def test_plans_of_processes_at_work_together_are_all_kept(tmp_path, monkeypatch):
  """Threads stand for the processes: a lock of a file that each opens keeps them apart as well."""
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


def test_a_quick_plan_stands_until_a_better_one_is_asked_for():
  row = page.Row("configs/vit.py:b16_imagenet", "v5e:2x2")
  quick = {row.key: {"digest": page.digest(row), "optimization_level": "O1"}}
  best = {row.key: {"digest": page.digest(row), "optimization_level": None}}
  assert page._is_current(row, quick, "O1")
  assert not page._is_current(row, quick, None)
  assert page._is_current(row, best, "O1")
  assert page._is_current(row, best, None)


def test_a_quick_plan_bounds_no_run():
  row = page.rows()[0][0]
  plan = page._stored()[row.key]
  cells = dict(zip(page.COLUMNS, page._cells(row, plan), strict=True))
  quick = page._cells(row, plan | {"optimization_level": "O1"})
  different = {
    name: value for name, value in zip(page.COLUMNS, quick, strict=True) if value != cells[name]
  }
  blank = dict.fromkeys(("step, at least", "bound by", "days, at least"), "")
  assert different == {**blank, "compiled in": f"{cells['compiled in']} at O1"}
