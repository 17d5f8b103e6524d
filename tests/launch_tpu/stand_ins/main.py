"""Fake training run: finishes, waits, fails or is preempted, according to the file `behaviours`."""

import os
import sys
import time

STATE = os.environ["STAND_IN"]
worker = os.path.basename(os.environ["HOME"])


def read(name):
  with open(f"{STATE}/{name}") as file:
    return file.read()


def write(name, text):
  with open(f"{STATE}/{name}.{worker}", "w") as file:
    file.write(text)
  os.replace(file.name, f"{STATE}/{name}")


with open(f"{STATE}/runs", "a") as runs:
  runs.write(ascii({"worker": worker, "args": sys.argv[1:]}) + "\n")
number = read("runs").count(worker)
behaviours = read("behaviours").split()
behaviour = behaviours[min(number, len(behaviours)) - 1]
print(f"{worker}, run {number}: step 1", flush=True)
if behaviour == "hold":
  deadline = time.time() + 30
  while not os.path.exists(f"{STATE}/release") and time.time() < deadline:
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
