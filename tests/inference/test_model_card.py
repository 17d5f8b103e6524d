"""Model cards of exports, and their upload to a local stand-in of the hub's API."""

import base64
import http.server
import json
import re
import subprocess
import sys
import threading

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
from absl import flags
from etils import epath

from tests import command
from tests.conftest import golden_folder, system_module
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.export import write_card
from vit_jax_zoo.weights import hub

system_module("vit")

TOKEN = "hf_secret"


def run(*arguments):
  """Runs the command in this process."""
  values = flags.FlagValues()
  for flag in ("model", "format", "output", "push_to_hub"):
    flags.DEFINE_string(flag, None, "", flag_values=values)
  flags.DEFINE_string("license", "unknown", "", flag_values=values)
  flags.DEFINE_bool("with_preprocessing", False, "", flag_values=values)
  flags.DEFINE_integer("image_size", None, "", flag_values=values)
  values(["export", *arguments])
  original, export.FLAGS = export.FLAGS, values
  try:
    assert export.main(["export"]) == 0
  finally:
    export.FLAGS = original


def code_of(card):
  return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_card_of_run(vit_run, tmp_path, monkeypatch):
  out = tmp_path / "digits"
  run(f"--model={vit_run}", "--format=orbax", f"--output={out}", "--license=apache-2.0")
  card = huggingface_hub.ModelCard.load(out / "README.md")
  assert card.data.license == "apache-2.0"
  assert card.data.library_name == "vit_jax_zoo"
  assert card.data.pipeline_tag == "image-classification"
  assert set(card.data.tags) == {"vit_jax_zoo", "vit"}
  rows = [json.loads(line) for line in (vit_run / "metrics.jsonl").read_text().splitlines()]
  found = {row["step"]: row["test/accuracy"] for row in rows if "test/accuracy" in row}
  step = max(found, key=found.__getitem__)  # of equal ones the first, as the best checkpoint
  expected = found[step]
  results = {r.metric_type: r for r in card.data.eval_results}
  assert results["accuracy"].metric_value == expected
  assert results["accuracy"].dataset_name == "demo:digits test[:20]"
  for text in (
    "demo:digits train, 1437 examples",
    "on test (demo:digits test[:20])",
    "| width | 16 |",
    "Classes:\n\n- 0\n- 1",
  ):
    assert text in card.text
  assert f"weights, those of step {step}, the run's best checkpoint" in card.text
  assert re.search(r"## Preprocessing\n\n1\. resize to 8 x 8.*\n2\. .*mean", card.text)
  assert "images" not in results
  PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpg")
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(code_of(card.text), names)
  assert names["outputs"]["logits"].shape == (1, 10)


def test_card_of_published_file(tmp_path, monkeypatch):
  """No scores; beside a file, not README.md; without huggingface_hub, no metadata."""
  source = golden_folder("vit_a") / "weights.npz"
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  run(f"--model={source}", "--format=npz", f"--output={tmp_path / 'x.npz'}")
  text = (tmp_path / "x.md").read_text()
  assert text.startswith("# x.npz\n\nLicence: unknown")
  assert "Training data: unknown" in text
  assert "Not measured" in text
  assert not (tmp_path / "README.md").exists()


def test_card_of_checkpoint_has_its_score(vit_run, tmp_path):
  """Scores are those of the exported weights: of the last step where it is exported."""
  (checkpoint,) = (vit_run / "checkpoints").iterdir()
  step = int(checkpoint.name)
  path = vit_run / "checkpoints" / str(step)
  run(f"--model={path}", "--format=orbax", f"--output={tmp_path / 'out'}")
  card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
  rows = [json.loads(line) for line in (vit_run / "metrics.jsonl").read_text().splitlines()]
  (expected,) = [row["test/loss"] for row in rows if row["step"] == step and "test/loss" in row]
  results = {r.metric_type: r.metric_value for r in card.data.eval_results}
  assert results["loss"] == expected
  assert f"those of step {step}, on test" in card.text


def test_card_says_that_the_program_resizes(tmp_path):
  source = golden_folder("vit_hf_a")
  for option in ("--nowith_preprocessing", "--with_preprocessing"):
    out = tmp_path / option
    run(f"--model={source}", "--format=stablehlo", f"--output={out}", option)
    is_said = "The program does all steps; its input is uint8" in (out / "README.md").read_text()
    assert is_said == (option == "--with_preprocessing")


def test_usage_has_inputs_of_program(tmp_path):
  loaded = load_pretrained(str(golden_folder("vit_hf_a")))
  (tmp_path / "model.json").write_text('{"images": [], "image_size": []}')
  for form, call in (
    ("stablehlo", "program.call(images, image_size)"),
    ("onnx", 'session.run(None, {"images": images, "image_size": image_size})'),
  ):
    card = write_card(epath.Path(tmp_path), form, "vit_hf_a", loaded, "mit", "")
    assert call in code_of(card.read_text())
    assert "zoo.load_pretrained" in code_of(card.read_text())


def test_readme_of_others_is_kept(tmp_path):
  (tmp_path / "README.md").write_text("mine")
  loaded = load_pretrained(str(golden_folder("vit_hf_a")))
  export.write(loaded, "hf", str(tmp_path))
  write_card(epath.Path(tmp_path), "hf", "vit_hf_a", loaded, "mit", "")
  assert (tmp_path / "README.md").read_text() == "mine"


def hub_answer(url, path, body, files):
  """Returns the hub's answer to a request; keeps the files of a commit."""
  if path == "/api/repos/create":
    return {"url": f"{url}/user/name"}
  if "/preupload/" in path:
    modes = {"uploadMode": "regular", "shouldIgnore": False}
    return {"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]}
  if "/commit/" in path:
    added = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
    files.update({file["path"]: base64.b64decode(file["content"]) for file in added})
    return {"commitUrl": f"{url}/user/name/commit/1", "commitOid": "1" * 40, "success": True}
  return {"errors": [], "warnings": []}  # of the card's metadata


@pytest.fixture
def hub_server(monkeypatch):
  """A stand-in of the hub's API: yields its address, and the requests and files that it got."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers["Content-Length"])).decode()
      requests.append(self.path)
      is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
      wrong = {"error": "Invalid username or password."}
      answer = hub_answer(url, self.path, body, files) if is_known else wrong
      status = 200 if is_known else 401
      content = json.dumps(answer).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *args):
      pass

  requests, files = [], {}
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield url, requests, files
    server.shutdown()
    thread.join()


def test_push_folder_and_file(hub_server, tmp_path, capfd):
  _, requests, files = hub_server
  source = golden_folder("vit_hf_a")
  push = "--push_to_hub=user/name"
  run(f"--model={source}", "--format=hf", f"--output={tmp_path / 'hf'}", push, "--license=mit")
  assert requests[0] == "/api/repos/create"
  for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md"):
    assert files[name] == (tmp_path / "hf" / name).read_bytes(), name
  card = files["README.md"].decode()
  assert "license: mit" in card
  assert 'transformers.ViTForImageClassification.from_pretrained("user/name")' in card
  files.clear()
  source = golden_folder("vit_a") / "weights.npz"
  run(f"--model={source}", "--format=npz", f"--output={tmp_path / 'x.npz'}", push)
  assert files.keys() == {"x.npz", "README.md"}
  assert 'hf_hub_download("user/name", "x.npz")' in files["README.md"].decode()
  assert TOKEN not in "".join(capfd.readouterr())


def test_push_errors(hub_server, tmp_path, monkeypatch):
  source = golden_folder("vit_hf_a")
  arguments = (f"--model={source}", "--format=hf", f"--output={tmp_path / 'out'}")
  with pytest.raises(ValueError, match=r"--with_preprocessing: .*--format=hf"):
    run(*arguments, "--with_preprocessing")
  with pytest.raises(ValueError, match="--push_to_hub: 'name'; expected user/name"):
    run(*arguments, "--push_to_hub=name")
  monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
  with pytest.raises(OSError, match=r"--push_to_hub=user/name: .*401") as error:
    run(*arguments, "--push_to_hub=user/name")
  assert "\n" not in str(error.value)
  assert "hf_of_somebody_else" not in str(error.value)
  with pytest.raises(ValueError, match=r"--output: .* has files"):
    run(*arguments, "--push_to_hub=user/name")


def test_token_masked_in_errors(monkeypatch, tmp_path):
  monkeypatch.setenv("HF_TOKEN", TOKEN)

  def fail(*args, **kwargs):
    raise ValueError(f"Illegal header value b'Bearer {TOKEN}'\n and more")

  monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
  with pytest.raises(OSError, match="Bearer <token>' and more"):
    hub.push("user/name", epath.Path(tmp_path), epath.Path(tmp_path))


@pytest.mark.slow
def test_push_by_command(hub_server, tmp_path):
  url, _, files = hub_server
  source = golden_folder("vit_timm_a") / "weights.safetensors"
  arguments = [f"--model={source}", "--format=safetensors-timm", f"--output={tmp_path / 'out'}"]
  done = subprocess.run(
    [sys.executable, "-m", "vit_jax_zoo.export", *arguments, "--push_to_hub=user/name"],
    env=command.environment(HF_ENDPOINT=url, HF_TOKEN=TOKEN),
    cwd=command.ROOT,
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  assert files.keys() == {"README.md", "config.json", "model.safetensors"}
  assert 'timm.create_model("hf-hub:user/name", pretrained=True)' in files["README.md"].decode()
  assert "user/name/commit" in done.stderr
  assert TOKEN not in done.stdout + done.stderr
