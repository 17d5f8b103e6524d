"""Fake gcloud: the slice is a set of files in a folder, each worker a folder in it.

The tests call it a thousand times, so it imports only modules that Python itself has loaded.
"""

import os
import sys

STATE = os.environ["STAND_IN"]
args = sys.argv[1:]
options = dict(a.removeprefix("--").partition("=")[::2] for a in args if a.startswith("--"))
kind, verb = [a for a in args if a != "alpha"][2:4]


def read(name):
  try:
    with open(f"{STATE}/{name}") as file:
      return file.read()
  except FileNotFoundError:
    return ""


def write(name, text):
  """Atomic: workers write the slice's state while the script reads it."""
  new = f"{STATE}/{name}.{os.getpid()}"
  with open(new, "w") as file:
    file.write(text)
  os.replace(new, f"{STATE}/{name}")


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
    os.rename(f"{STATE}/broken_after_preemption", f"{STATE}/broken_lists")
  if kind == "queued-resources" and len(states) > 1:
    write("request", " ".join(states[1:]))


def delete():
  if not read("request"):
    fail("NOT_FOUND")
  files = os.listdir(STATE)
  for name in {"request", "node"} & set(files):
    os.remove(f"{STATE}/{name}")
  gone = sum(name.startswith("gone") for name in files)
  for home in [name for name in files if name.startswith("worker")]:
    pid = read(f"{home}/vit_jax_zoo/run.pid")
    os.rename(f"{STATE}/{home}", f"{STATE}/gone{gone}")
    gone += 1
    try:
      if pid:
        os.killpg(int(pid), 9)
    except ProcessLookupError:
      continue


def homes():
  if read("request") != "ACTIVE" or read("node") not in ("", "READY"):
    fail("the node is not READY")
  selected = options.get("worker", "0")
  for worker in ("0", "1"):
    home = f"{STATE}/worker{worker}"
    os.makedirs(home, exist_ok=True)
    if selected in ("all", worker):
      yield home


def ssh():
  if decrement("dropped_connections" if "worker_follow" in options["command"] else "refused"):
    sys.exit(255)
  codes = []
  for home in homes():
    env = dict(os.environ, HOME=home)
    codes.append(os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", options["command"]], env))
  sys.exit(max(codes))


def scp():
  source, target = args[4:6]
  with open(source, "rb") as file:
    archive = file.read()
  for home in homes():
    with open(f"{home}/{target.partition(':')[2]}", "wb") as file:
      file.write(archive)


with open(f"{STATE}/calls", "a") as calls:
  calls.write(ascii(args) + "\n")
{"create": create, "list": show, "delete": delete, "ssh": ssh, "scp": scp}[verb]()
