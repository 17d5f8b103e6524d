"""The notebooks in colabs/: badge and clone cell have the address of setup.cfg; exercises.

The address is `project_urls` of setup.cfg, Source. After it is set:
`pytest -n 0 --update-goldens tests/test_notebooks.py` writes it into all seven.
"""

import base64
import configparser
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
COLAB = "https://colab.research.google.com"

NO_ADDRESS = """Open in Colab: this repository has no public address yet. Once `project_urls` in \
`setup.cfg` has it, `pytest -n 0 --update-goldens tests/test_notebooks.py` writes a badge here and \
the address into the first code cell. Until then: on Colab, *File*, *Upload notebook*; then set \
`REPOSITORY` in that cell."""

CLONE = """import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "{address}"  # cloned if there is no checkout around this notebook, as on Colab

here = pathlib.Path.cwd()
ROOT = next((p for p in (here, here.parent) if (p / "configs/vit.py").exists()), None)
if ROOT is None:
  ROOT = here / "vit_jax_zoo"
  if not (REPOSITORY or ROOT.exists()):
    raise ValueError("REPOSITORY: empty; expected the repository's address. Set it in this cell")
  if not ROOT.exists():
    subprocess.run(["git", "clone", "-q", REPOSITORY, ROOT], check=True)
sys.path.insert(0, str(ROOT))
needed = ("vit_jax_zoo", "clu", "faster_coco_eval", "flax", "grain", "pandas")
if not all(importlib.util.find_spec(name) for name in needed):
  pip = [sys.executable, "-m", "pip", "install", "-q"]
  subprocess.run([*pip, "-e", f"{{ROOT}}[notebooks]"], check=True)"""


def read_address(path=ROOT / "setup.cfg"):
  """Returns the address `Source` in `project_urls`, or ""."""
  setup = configparser.ConfigParser()
  setup.read(path)
  urls = (line.partition("=") for line in setup["metadata"].get("project_urls", "").splitlines())
  named = {name.strip(): url.strip() for name, _, url in urls}
  return named.get("Source", "").rstrip("/").removesuffix(".git")


def badge(address, name):
  """Returns the first cell of a notebook."""
  if not address:
    return NO_ADDRESS
  repository = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
  if not repository:
    raise ValueError(f"setup.cfg, project_urls: {address}; expected https://github.com/user/name")
  link = f"{COLAB}/github/{repository[1]}/blob/main/colabs/{name}"
  return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def source(cell):
  return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_address_is_that_of_setup(path, golden_text):
  notebook, address = json.loads(path.read_text()), read_address()
  first = {"markdown": badge(address, path.name), "code": CLONE.format(address=address)}
  for cell, (kind, text) in zip(notebook["cells"], first.items(), strict=False):
    assert cell["cell_type"] == kind
    cell["source"] = text.splitlines(keepends=True)
  golden_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(
  "address", ["https://github.com/user/zoo", "https://github.com/user/zoo.git/"]
)
def test_address_in_badge_and_clone_cell(address, tmp_path):
  (tmp_path / "setup.cfg").write_text(f"[metadata]\nproject_urls =\n    Source = {address}\n")
  found = read_address(tmp_path / "setup.cfg")
  assert badge(found, "vit.ipynb").endswith(f"({COLAB}/github/user/zoo/blob/main/colabs/vit.ipynb)")
  assert 'REPOSITORY = "https://github.com/user/zoo"' in CLONE.format(address=found)


def test_no_address(tmp_path):
  (tmp_path / "setup.cfg").write_text("[metadata]\nproject_urls =\n")
  assert badge(read_address(tmp_path / "setup.cfg"), "vit.ipynb") == NO_ADDRESS


def test_address_elsewhere():
  with pytest.raises(ValueError, match="project_urls"):
    badge("https://example.com/zoo", "vit.ipynb")


def test_clone_cell(tmp_path, monkeypatch):
  """Clones the address once if the notebook is outside of a checkout."""
  remote, outside = tmp_path / "remote", tmp_path / "outside"
  (remote / "configs").mkdir(parents=True)
  (remote / "configs/vit.py").write_text("")
  git = ["git", "-C", str(remote), "-c", "user.name=a", "-c", "user.email=a@b.c"]
  for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
    subprocess.run([*git, *arguments], check=True)
  outside.mkdir()
  monkeypatch.chdir(outside)
  monkeypatch.setattr(sys, "path", [*sys.path])
  for _ in range(2):  # run again, it takes the clone
    scope = {}
    exec(CLONE.format(address=remote), scope)
    assert scope["ROOT"] == outside / "vit_jax_zoo"
    assert sys.path[0] == str(scope["ROOT"])
    assert (scope["ROOT"] / "configs/vit.py").exists()


def test_clone_cell_in_checkout(monkeypatch):
  monkeypatch.chdir(ROOT / "colabs")
  monkeypatch.setattr(sys, "path", [*sys.path])
  scope = {}
  exec(CLONE.format(address=""), scope)
  assert scope["ROOT"] == ROOT


def test_clone_cell_without_address(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="REPOSITORY"):
    exec(CLONE.format(address=""), {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_and_outputs(path):
  cells = json.loads(path.read_text())["cells"]
  last = source(cells[-1])
  assert last.startswith("## Exercises\n")
  assert re.findall(r"^(\d)\. ", last, re.MULTILINE) == ["1", "2", "3"]
  assert last.count("*Hint*: ") == 3
  kinds = [output["output_type"] for cell in cells for output in cell.get("outputs", ())]
  assert "error" not in kinds


@pytest.fixture(scope="module")
def notebook_pictures():
  path = ROOT / "docs/notebook_pictures.py"
  spec = importlib.util.spec_from_file_location("notebook_pictures", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_cells_of_pictures_exist(notebook_pictures):
  for name, (notebook, code, *_) in notebook_pictures.PICTURES.items():
    assert code in source(notebook_pictures.find_cell(notebook, code))
    assert (ROOT / f"docs/systems/{name}.png").is_file()


def test_picture_of_cell_is_written(notebook_pictures, tmp_path, monkeypatch):
  pixels = np.random.default_rng(0).integers(0, 255, (2, 5, 7, 3), np.uint8)
  streams = [io.BytesIO(), io.BytesIO()]
  for stream, image in zip(streams, pixels, strict=True):
    Image.fromarray(image).save(stream, "PNG")
  saved = [{"data": {"image/png": base64.b64encode(s.getvalue()).decode()}} for s in streams]
  outputs = [{"text": ["a log"]}, {"data": {"text/plain": ["a table"]}}, *saved]
  cells = [
    {"cell_type": "markdown", "source": ["about draw(1)"]},
    {"cell_type": "code", "source": ["x = 1\n", "draw(1)"], "outputs": outputs},
    {"cell_type": "code", "source": ["draw(2)"], "outputs": []},
  ]
  for folder in ("colabs", "docs/systems"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "colabs/a.ipynb").write_text(json.dumps({"cells": cells}))
  monkeypatch.setattr(notebook_pictures, "ROOT", tmp_path)
  pictures = {"first": ("a", "draw(1)"), "second": ("a", "draw(1)", 1)}
  monkeypatch.setattr(notebook_pictures, "PICTURES", pictures)
  notebook_pictures.main()
  for name, expected in zip(pictures, pixels, strict=True):
    with Image.open(tmp_path / f"docs/systems/{name}.png") as written:
      np.testing.assert_array_equal(np.asarray(written), expected)
  for cell in (("draw(2)",), ("draw(",), ("draw(1)", 2)):  # no picture; two cells; two pictures
    monkeypatch.setattr(notebook_pictures, "PICTURES", {"none": ("a", *cell)})
    with pytest.raises(ValueError, match=r"a\.ipynb"):
      notebook_pictures.main()
