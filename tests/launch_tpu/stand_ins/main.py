"""Fake training run: finishes, waits, fails or is preempted, according to the file `behaviours`."""

import json
import os
import pathlib
import sys
import time

STATE = pathlib.Path(os.environ["STAND_IN"])
worker = pathlib.Path(os.environ["HOME"]).name


def write(name, text):
  new = STATE / f"{name}.{worker}"
  new.write_text(text)
  new.replace(STATE / name)


with (STATE / "runs.jsonl").open("a") as runs:
  runs.write(json.dumps({"worker": worker, "args": sys.argv[1:]}) + "\n")
number = (STATE / "runs.jsonl").read_text().count(worker)
behaviours = (STATE / "behaviours").read_text().split()
behaviour = behaviours[min(number, len(behaviours)) - 1]
print(f"{worker}, run {number}: step 1", flush=True)
if behaviour == "hold":
  deadline = time.time() + 30
  while not (STATE / "release").exists() and time.time() < deadline:
    time.sleep(0.05)
elif behaviour == "suspended":
  write("request", "SUSPENDED")
  sys.exit(143)
elif behaviour == "preempted":
  write("node", "PREEMPTED")
  sys.exit(143)
elif behaviour == "terminated":
  sys.exit(143 if worker == "worker1" else 1)
elif behaviour == "fail" and worker == "worker1":
  sys.exit("ValueError: the batch does not fit")
print(f"{worker}: done", flush=True)
