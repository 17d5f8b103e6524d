"""Fake local Python: records the planner's arguments; its exit status is in `plan_status`."""

import json
import os
import pathlib
import sys

STATE = pathlib.Path(os.environ["STAND_IN"])
if sys.argv[1] == "-c":
  sys.exit((STATE / "no_jax").exists())
with (STATE / "plans.jsonl").open("a") as plans:
  plans.write(json.dumps(sys.argv[1:]) + "\n")
status = STATE / "plan_status"
if status.exists():
  print("error: --topology: unknown", file=sys.stderr)
  sys.exit(int(status.read_text()))
