"""Published names, URLs and hubs: a local server, an unreachable hub."""

import hashlib
import http.server
import pathlib
import sys
import threading
import types

import jax
import numpy as np
import pytest

from tests.conftest import GOLDENS, golden_folder
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.registry import list_models
from vit_jax_zoo.weights import WeightsError, hub

SOURCE = golden_folder("vit_a") / "weights.npz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="module")
def server():
  """Serves the goldens; records request paths; truncates files under `/cut/`."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      requests.append(self.path)
      path = GOLDENS / self.path.removeprefix("/cut").lstrip("/")
      if not path.is_file():
        self.send_error(404, "File not found")
        return
      content = path.read_bytes()
      self.send_response(200)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content[:1000] if self.path.startswith("/cut") else content)

    def log_message(self, *args):
      pass

  requests = []
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", requests
    running.shutdown()
    thread.join()


def test_url_downloaded_once(server, cache):
  url, requests = server
  loaded = load_pretrained(f"{url}/vit_a/weights.npz")
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables, load_pretrained(str(SOURCE)).variables
  )
  load_pretrained(f"{url}/vit_a/weights.npz")
  assert requests.count("/vit_a/weights.npz") == 1
  assert [path.name for path in cache.rglob("*") if path.is_file()] == ["weights.npz"]


def test_published_name_verifies_checksum(server, cache, monkeypatch):
  url, _ = server
  digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
  right = hub.Entry("vit_b16", (f"{url}/vit_a/weights.npz",), sha256=digest[:8])
  monkeypatch.setitem(hub.entries(), "vit_right", right)
  assert pathlib.Path(hub.resolve("vit_right")).read_bytes() == SOURCE.read_bytes()
  wrong = hub.Entry("vit_b16", (f"{url}/vit_gap_a/weights.npz",), sha256="0" * 8)
  monkeypatch.setitem(hub.entries(), "vit_wrong", wrong)
  with pytest.raises(WeightsError, match="sha256"):
    hub.resolve("vit_wrong")
  several = (f"{url}/vit_a/config.json", f"{url}/vit_a/weights.npz")
  monkeypatch.setitem(hub.entries(), "vit_both", hub.Entry("vit_b16", several))
  assert hub.resolve("vit_both") == str(cache / "vit_both" / "config.json")
  assert (cache / "vit_both" / "weights.npz").exists()


@pytest.mark.parametrize("path", ["vit_a/none.npz", "cut/vit_a/weights.npz"])
def test_failed_download_leaves_no_file(server, cache, path):
  with pytest.raises(OSError, match=r"cannot download http://"):
    load_pretrained(f"{server[0]}/{path}")
  assert not [found for found in cache.rglob("*") if found.is_file()]


def test_offline_raises(cache):
  with pytest.raises(OSError, match=r"127\.0\.0\.1:9/x\.npz") as error:
    load_pretrained("http://127.0.0.1:9/x.npz")
  assert "\n" not in str(error.value)


def fake_hub(monkeypatch, answer):
  module = types.ModuleType("huggingface_hub")
  module.snapshot_download = answer
  monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hugging_face_hub_name(monkeypatch):
  requests = []

  def answer(name, allow_patterns):
    requests.append((name, allow_patterns))
    return str(golden_folder("vit_hf_a"))

  fake_hub(monkeypatch, answer)
  loaded = load_pretrained("google/vit-base-patch16-224")
  expected = load_pretrained(str(golden_folder("vit_hf_a")))
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)
  assert requests[0][0] == "google/vit-base-patch16-224"
  assert "model.safetensors" in requests[0][1]
  assert "pytorch_model.bin" not in requests[0][1]  # a pickle only if there is no safetensors file


def test_hub_errors(monkeypatch, tmp_path):
  def fail(*args, **kwargs):
    raise RuntimeError("no route to host\nand much more")

  fake_hub(monkeypatch, fail)
  with pytest.raises(OSError, match=r"a/b: .*no route to host") as error:
    load_pretrained("a/b")
  assert "\n" not in str(error.value)
  fake_hub(monkeypatch, lambda *args, **kwargs: str(tmp_path))
  with pytest.raises(WeightsError, match=r"neither model\.safetensors"):
    load_pretrained("a/b")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[hub\]'"):
    load_pretrained("a/b")


def test_model_index_consistent():
  models = list_models()
  for name, entry in hub.entries().items():
    assert bool(entry.hub) != bool(entry.urls), name
    assert all(url.startswith("https://") for url in entry.urls)
    if entry.model:  # otherwise a part of a model, without a score
      assert entry.model in models, name
      assert name.startswith(entry.model), name
      assert (entry.score == "–") == (entry.source == "–"), name
  with pytest.raises(WeightsError, match="vit_b16_imagenet21k"):
    load_pretrained("vit_b16_imagenet_21k")
  with pytest.raises(WeightsError, match=r"x/ViT-L_16\.npz: .*vit_l16"):
    load_pretrained("x/ViT-L_16.npz")
