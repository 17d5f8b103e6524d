"""Fake TPU slice for launch_tpu.sh: stand-ins for gcloud, uv, the planner and the training run.

The fake gcloud keeps the state of the slice in files. It runs each `--command` in a real shell with
the worker's folder as home, so quoting, detaching, log and exit status are those of a worker.
"""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
STAND_INS = pathlib.Path(__file__).parent / "stand_ins"
PLACE = ["--name=vit", "--zone=us-central2-b"]
SLICE = [*PLACE, "--type=v5litepod-16"]
MAIN = ["--config=configs/vit.py:b16", "--workdir=gs://bucket/vit"]
TRICKY = [
  "--config=configs/vit.py:b16,image_size=384",
  "--workdir=gs://bucket/a run",
  """--config.name=it's "one", two; $HOME `id` \\ & *""",
  "--config.text=two\nlines, é",
  "--config.empty=",
]


def remote_call(call):
  """Returns the function and its arguments that a gcloud call runs on workers: the last line."""
  return call[-1].splitlines()[-1].split(" ") if "ssh" in call else []


class Slice:
  """A checkout, a PATH with the stand-ins, and the files in which these record their calls."""

  def __init__(self, folder):
    self.state = folder / "state"
    self.root = folder / "it's a checkout"
    self.bin = folder / "bin"
    for path in (self.state, self.bin, self.root / "configs", self.root / "vit_jax_zoo"):
      path.mkdir(parents=True)
    shutil.copy(ROOT / "launch_tpu.sh", self.root)
    files = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    for name in (*files, "vit_jax_zoo/main.py"):
      (self.root / name).write_text("content\n")
    self.program("gcloud.py", self.bin / "gcloud")
    self.program("uv.py", self.bin / "uv")
    self.program("planner.py", self.bin / "python3")
    self.program("main.py", self.state / "main.py")
    (self.bin / "sleep").symlink_to(shutil.which("true"))  # no delay between two checks
    often = f'#!/bin/sh\nexec {shutil.which("tail")} "$@" -s 0.02\n'
    (self.bin / "tail").write_text(often)
    (self.bin / "tail").chmod(0o755)
    self.set(behaviours="ok")

  def program(self, name, path):
    path.write_text(f"#!{sys.executable} -IS\n{(STAND_INS / name).read_text()}")
    path.chmod(0o755)

  def set(self, **files):
    for name, text in files.items():
      (self.state / name).write_text(str(text))

  @property
  def env(self):
    path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
    return dict(os.environ, PATH=path, STAND_IN=str(self.state), TMPDIR=str(self.state))

  def command(self, *args):
    return ["bash", str(self.root / "launch_tpu.sh"), *args]

  def launch(self, *args, **kwargs):
    return subprocess.run(
      self.command(*args), env=self.env, capture_output=True, text=True, timeout=60, **kwargs
    )

  def start(self, *args):
    return subprocess.Popen(
      self.command(*args),
      env=self.env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def lines(self, name):
    path = self.state / name
    text = path.read_text() if path.exists() else ""
    return [ast.literal_eval(line) for line in text.splitlines()]

  def calls(self, verb=None):
    """Returns all gcloud calls as argument lists, or those with one verb."""
    return [c for c in self.lines("calls") if verb is None or verb in c]

  def changes(self):
    """Returns the gcloud calls that change something or print the log."""
    return [c for c in self.calls() if "list" not in c and remote_call(c)[:1] != ["worker_status"]]

  def runs(self):
    return self.lines("runs")

  @property
  def exists(self):
    return (self.state / "request").exists()

  def wait_for_run(self):
    self.wait_until(lambda: len(self.runs()) >= 2)

  def followers(self):
    return sum(remote_call(call)[:1] == ["worker_follow"] for call in self.calls())

  def wait_until(self, condition):
    deadline = time.time() + 30
    while not condition():
      assert time.time() < deadline, "timeout"
      time.sleep(0.05)
