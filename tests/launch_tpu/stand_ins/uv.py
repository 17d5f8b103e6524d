"""Fake uv: installs nothing; the virtual environment's Python is the fake training run."""

import os
import pathlib
import sys

if sys.argv[1] == "venv":
  python = pathlib.Path(sys.argv[-1]) / "bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(pathlib.Path(os.environ["STAND_IN"], "main.py").read_text())
  python.chmod(0o755)
else:
  assert sys.argv[1:] == ["pip", "install", "-e", ".[tpu]"], sys.argv
  assert pathlib.Path("setup.cfg").exists()
  assert pathlib.Path("vit_jax_zoo/main.py").exists()
