"""The examples of docs/serving with an exported model."""

import io
import json
import pathlib
import runpy
import sys
import threading
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

from tests.inference.random_models import random_model
from vit_jax_zoo import export

SERVING = pathlib.Path(__file__).parents[2] / "docs" / "serving"


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def made():
  return random_model("vit")


@pytest.fixture(scope="module")
def expected(made, image):
  logits = jax.jit(made.model.apply)(made.variables, made.preprocess([image]))["logits"]
  return f"class {int(np.argmax(logits))}"


@pytest.fixture(scope="module")
def program(made, tmp_path_factory):
  folder = tmp_path_factory.mktemp("program")
  export.write(made, "stablehlo", str(folder), with_preprocessing=True)
  notes = json.loads((folder / "model.json").read_text())
  assert notes["images"] == ["b", "h", "w", "3", "uint8, RGB"]
  return folder


def run(monkeypatch, script, *arguments):
  monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
  return runpy.run_path(str(SERVING / script), run_name="example")


def test_with_jax(program, image, expected, tmp_path, monkeypatch, capsys):
  Image.fromarray(image).save(tmp_path / "a.png")
  run(monkeypatch, "with_jax.py", program, tmp_path / "a.png")
  assert capsys.readouterr().out == f"a.png {expected}\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
def test_onnx_runtime(made, image, expected, tmp_path, monkeypatch, capsys):
  for extra in ("jax2onnx", "onnxruntime"):
    pytest.importorskip(extra, reason="needs the extra onnx")
  Image.fromarray(image).save(tmp_path / "a.png")
  export.write(made, "onnx", str(tmp_path / "onnx"), with_preprocessing=True)
  run(monkeypatch, "onnx_runtime.py", tmp_path / "onnx", tmp_path / "a.png")
  assert capsys.readouterr().out == f"a.png {expected}\n"


def test_http_server(program, image, expected, monkeypatch, capfd):
  with run(monkeypatch, "http_server.py", program, 0)["server"] as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      data = io.BytesIO()
      Image.fromarray(image).save(data, "png")
      url = f"http://127.0.0.1:{server.server_port}"
      with urllib.request.urlopen(url, data.getvalue()) as answer:
        assert json.load(answer) == {"class": expected}
      with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(url, b"no image")
      assert error.value.code == 400
      error.value.close()
    finally:
      server.shutdown()
      thread.join()
