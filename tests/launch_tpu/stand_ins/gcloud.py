"""Fake gcloud: the slice is a set of files in a folder, each worker a folder in it."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

STATE = pathlib.Path(os.environ["STAND_IN"])
args = sys.argv[1:]
with (STATE / "calls.jsonl").open("a") as calls:
  calls.write(json.dumps(args) + "\n")
options = dict(a.removeprefix("--").partition("=")[::2] for a in args if a.startswith("--"))
kind, verb = [a for a in args if a != "alpha"][2:4]


def read(name):
  path = STATE / name
  return path.read_text() if path.exists() else ""


def write(name, text):
  """Atomic: workers write the slice's state while the script reads it."""
  new = STATE / f"{name}.{os.getpid()}"
  new.write_text(text)
  new.replace(STATE / name)


def fail(message):
  sys.exit(f"ERROR: (gcloud.compute.tpus) {message}")


def decrement(name):
  """Decrements the number in the file; returns whether it was positive."""
  left = int(read(name) or 0)
  if left:
    write(name, str(left - 1))
  return bool(left)


def create():
  if decrement("faster_others"):
    write("request", "ACTIVE")
  if read("request"):
    fail("ALREADY_EXISTS")
  write("request", read("next_states") or "ACTIVE")


def show():
  states = read("request").split()
  if decrement("broken_lists"):
    fail("Reauthentication failed.\nPlease run: gcloud auth login")
  if not states or (kind == "tpu-vm" and (states[0] != "ACTIVE" or read("node") == "missing")):
    print("Listed 0 items.", file=sys.stderr)
    return
  print(read("node") or "READY" if kind == "tpu-vm" else states[0])
  if states[0] == "SUSPENDED" and read("broken_after_preemption"):
    (STATE / "broken_after_preemption").rename(STATE / "broken_lists")
  if kind == "queued-resources" and len(states) > 1:
    write("request", " ".join(states[1:]))


def delete():
  if not read("request"):
    fail("NOT_FOUND")
  for name in ("request", "node"):
    (STATE / name).unlink(missing_ok=True)
  for home in STATE.glob("worker*"):
    pid = home / "vit_jax_zoo/run.pid"
    if pid.exists():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    home.rename(STATE / f"gone{len(list(STATE.glob('gone*')))}")


def homes():
  if read("request") != "ACTIVE" or read("node") not in ("", "READY"):
    fail("the node is not READY")
  selected = options.get("worker", "0")
  for worker in (0, 1):
    home = STATE / f"worker{worker}"
    home.mkdir(exist_ok=True)
    if selected in ("all", str(worker)):
      yield home


def ssh():
  if decrement("dropped_connections" if "worker_follow" in options["command"] else "refused"):
    sys.exit(255)
  codes = []
  for home in homes():
    env = dict(os.environ, HOME=str(home))
    codes.append(subprocess.run(["bash", "-c", options["command"]], env=env).returncode)
  sys.exit(max(codes))


def scp():
  source, target = args[4:6]
  for home in homes():
    (home / target.partition(":")[2]).write_bytes(pathlib.Path(source).read_bytes())


{"create": create, "list": show, "delete": delete, "ssh": ssh, "scp": scp}[verb]()
