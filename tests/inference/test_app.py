"""The web page: its answers, and all systems in a browser (extra `app`; -m slow)."""

import gc
import os
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests import command
from vit_jax_zoo import app

SYSTEMS = {  # name: config with fields
  "vit": "vit.py:demo,num_steps=2,batch_size=8",
  "igpt": "igpt.py:demo,num_steps=2,batch_size=8",
  "lambda_resnet": "lambda_resnet.py:demo,num_steps=2,batch_size=8",
  "detr": "detr.py:demo,num_steps=2,batch_size=8",
  "fpt": "fpt.py:demo,num_steps=2,batch_size=4",
  "ttsr": "ttsr.py:demo,num_steps=2,batch_size=1",
}


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


def test_answer_has_explanation(vit_run, photo):
  model = app.Model(str(vit_run))
  result = model.predict(photo)
  assert "attention" in result.pictures
  assert result.to_dict()["top"][0]["name"] in result.summary


def test_missing_image_is_named(vit_run):
  with pytest.raises(ValueError, match=r"^image: missing"):
    app.Model(str(vit_run)).predict(None)


def test_broken_image_is_named(vit_run, tmp_path):
  path = tmp_path / "broken.jpg"
  path.write_bytes(b"no picture")
  with pytest.raises(ValueError, match=r"broken\.jpg"):
    app.Model(str(vit_run)).predict(str(path))


def test_examples_are_test_images(vit_run):
  examples = app.Model(str(vit_run)).examples()
  assert 1 < len(examples) <= 4
  assert all(example["image"].shape == (8, 8, 3) for example in examples)


def test_files_are_removed_at_the_end(monkeypatch):
  """Examples, and uploads, which Gradio keeps in the folder of a variable."""

  class Page:
    def launch(self, **options):
      assert os.environ["GRADIO_TEMP_DIR"] in folders
      assert options["server_name"] == "127.0.0.1"

  folders = []
  environment = {k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"}
  monkeypatch.setattr(os, "environ", environment)
  monkeypatch.setattr(app, "Model", str)
  monkeypatch.setattr(app, "build", lambda models, folder: folders.append(folder) or Page())
  flags = {"model": ["runs/x"], "host": "127.0.0.1", "port": 1, "share": False}
  monkeypatch.setattr(app, "FLAGS", types.SimpleNamespace(**flags))
  assert app.main(["app"]) == 0
  assert not os.path.exists(folders[0])


def test_page_without_gradio_names_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[app\]'"):
    app.build([], "")


@pytest.fixture
def collected():
  """Gradio leaves event loops and sockets to the garbage collector."""
  yield
  gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_page_has_tab_of_model(vit_run, tmp_path, collected):
  page = app.build([app.Model(str(vit_run))], str(tmp_path))
  labels = [part["props"].get("label") for part in page.config["components"]]
  assert {vit_run.name, "image", "answer"} <= set(labels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SYSTEMS)
def test_system_in_browser(name, vit_run, tmp_path, photo, collected):
  """A page with two tabs: the photo is dropped into the second."""
  from playwright import sync_api as playwright

  few = "--config.data.eval.test.split=test[:4]"
  config = f"--config=configs/{SYSTEMS[name]}"
  command.run(tmp_path / name, config, few, "--config.explain=False")
  models = [app.Model(str(folder)) for folder in (vit_run, tmp_path / name)]
  page = app.build(models, str(tmp_path))
  _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
  try:
    with playwright.sync_playwright() as driver:
      options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
      browser = driver.chromium.launch(**options)
      tab = browser.new_page(viewport={"width": 1200, "height": 1400})
      tab.goto(url)
      assert upload(tab, models[1], photo)
      tab.screenshot(path=tmp_path / f"{name}.png", full_page=True)
      browser.close()
  finally:
    page.close()


def upload(tab, model, photo):
  """Drops the photo into each field of a model's tab, and returns the answer's text."""
  tab.get_by_role("tab", name=os.path.basename(model.name), exact=True).click()
  shown = tab.get_by_role("tabpanel").filter(visible=True)
  fields = shown.locator("input[type=file]")
  count = len(model.inputs)
  for i in range(count):  # a field may go when it has an image
    fields.nth(i if fields.count() == count else 0).set_input_files(photo)
    tab.wait_for_timeout(1000)
  answer = shown.get_by_label("answer")
  shown.get_by_role("button", name="Predict").click()
  for _ in range(240):
    if text := answer.input_value():
      picture = shown.get_by_test_id("detailed-image").or_(shown.locator("img")).last
      picture.wait_for()
      assert picture.evaluate("image => image.naturalWidth") > 0
      return text
    tab.wait_for_timeout(500)
  return ""
