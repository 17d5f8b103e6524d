"""launch_tpu.sh against a stand-in gcloud, whose workers are folders on this machine.

The stand-in keeps the slice's state in files and runs each `--command` in a real shell with the
worker's folder as its home, so quoting, detaching, log and exit status are those of a worker.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PLACE = ["--name=vit", "--zone=us-central2-b", "--type=v5litepod-16", "--poll=0"]
MAIN = ["--config=configs/vit.py:b16", "--workdir=gs://bucket/vit"]
TRICKY = [
  "--config=configs/vit.py:b16,image_size=384",
  "--workdir=gs://bucket/a run",
  """--config.name=it's "one", two; $HOME `id` \\ & *""",
  "--config.empty=",
]

GCLOUD = r'''
import json, os, pathlib, signal, subprocess, sys

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
  """In one step: workers write the slice's state while the script asks for it."""
  new = STATE / f"{name}.{os.getpid()}"
  new.write_text(text)
  new.replace(STATE / name)


def fail(message):
  sys.exit(f"ERROR: (gcloud.compute.tpus) {message}")


def use_up(name):
  """True as often as the number in the file says."""
  left = int(read(name) or 0)
  if left:
    write(name, str(left - 1))
  return bool(left)


def create():
  if use_up("faster_others"):
    write("request", "ACTIVE")
  if read("request"):
    fail("ALREADY_EXISTS")
  write("request", read("next_states") or "ACTIVE")


def describe():
  states = read("request").split()
  if use_up("broken_describes"):
    fail("Reauthentication failed.\nPlease run: gcloud auth login")
  if not states or (kind == "tpu-vm" and states[0] != "ACTIVE"):
    fail("NOT_FOUND: Resource was not found")
  print(read("node") or "READY" if kind == "tpu-vm" else states[0])
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
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
    home.rename(STATE / f"gone{len(list(STATE.glob('gone*')))}")


def homes():
  if read("request") != "ACTIVE" or read("node") not in ("", "READY"):
    fail("the node is not READY")
  wanted = options.get("worker", "0")
  for worker in (0, 1):
    home = STATE / f"worker{worker}"
    home.mkdir(exist_ok=True)
    if wanted in ("all", str(worker)):
      yield home


def ssh():
  if use_up("dropped_connections" if "tail -n 100" in options["command"] else "refused"):
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


globals()[verb]()
'''

UV = r"""
import os, pathlib, sys

if sys.argv[1] == "venv":
  python = pathlib.Path(sys.argv[-1]) / "bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(pathlib.Path(os.environ["STAND_IN"], "main.py").read_text())
  python.chmod(0o755)
else:
  assert sys.argv[1:] == ["pip", "install", "-e", ".[tpu]"], sys.argv
  assert pathlib.Path("setup.cfg").exists() and pathlib.Path("vit_jax_zoo/main.py").exists()
"""

MAIN_PROGRAM = r"""
import json, os, pathlib, sys, time

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
"""


class Slice:
  """A checkout, a PATH with the stand-ins, and what they have seen."""

  def __init__(self, folder):
    self.state = folder / "state"
    self.root = folder / "it's a checkout"
    self.bin = folder / "bin"
    for path in (self.state, self.bin, self.root / "configs", self.root / "vit_jax_zoo"):
      path.mkdir(parents=True)
    shutil.copy(ROOT / "launch_tpu.sh", self.root)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vit_jax_zoo/main.py"):
      (self.root / name).write_text("content\n")
    self.program(self.bin / "gcloud", GCLOUD)
    self.program(self.bin / "uv", UV)
    self.program(self.state / "main.py", MAIN_PROGRAM)
    self.set(behaviours="ok")

  def program(self, path, text):
    path.write_text(f"#!{sys.executable} -IS\n{text}")
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
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, verb=None):
    """All calls of gcloud as lists of arguments, or those of one verb."""
    return [c for c in self.lines("calls.jsonl") if verb is None or verb in c]

  def runs(self):
    return self.lines("runs.jsonl")

  @property
  def exists(self):
    return (self.state / "request").exists()

  def wait_for_run(self):
    self.wait_until(lambda: len(self.runs()) >= 2)

  def followers(self):
    return sum("tail -n 100" in argument for call in self.calls() for argument in call)

  def wait_until(self, holds):
    deadline = time.time() + 30
    while not holds():
      assert time.time() < deadline, "it did not come to that"
      time.sleep(0.05)


@pytest.fixture
def tpu(tmp_path):
  made = Slice(tmp_path)
  yield made
  made.set(release="")


def test_whole_life(tpu):
  result = tpu.launch("all", *PLACE, "--spot", "--project=p", "--", *TRICKY)
  assert result.returncode == 0, result.stderr
  verbs = [" ".join(c[2:4]) for c in tpu.calls()]
  steps = [v for i, v in enumerate(verbs) if i == 0 or v != verbs[i - 1]]
  assert steps == [
    "queued-resources describe",
    "queued-resources create",
    "queued-resources describe",
    "tpu-vm describe",
    "tpu-vm scp",
    "tpu-vm ssh",
    "queued-resources describe",
    "tpu-vm describe",
    "tpu-vm ssh",
    "queued-resources describe",
    "queued-resources delete",
  ]
  assert " ".join(tpu.calls("create")[0]) == (
    "compute tpus queued-resources create vit --node-id=vit --quiet --zone=us-central2-b "
    "--project=p --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
  )
  assert all("--zone=us-central2-b" in c and "--project=p" in c for c in tpu.calls())
  assert "--force" in tpu.calls("delete")[0]
  assert not tpu.exists
  assert not list(tpu.state.glob("*.tar.gz"))


def test_main_gets_its_arguments_unchanged_on_every_worker(tpu):
  result = tpu.launch("all", *PLACE, "--", *TRICKY)
  assert sorted(r["worker"] for r in tpu.runs()) == ["worker0", "worker1"]
  assert [r["args"] for r in tpu.runs()] == [["-m", "vit_jax_zoo.main", *TRICKY]] * 2
  assert "worker0, run 1: step 1\nworker0: done\n" in result.stdout
  assert "worker1" not in result.stdout  # one log is enough to read


def test_steps_one_by_one(tpu):
  for step in (["create"], ["setup"], ["run", "--", *MAIN], ["follow"]):
    result = tpu.launch(step[0], *PLACE, *step[1:])
    assert result.returncode == 0, (step, result.stderr)
  result = tpu.launch("status", *PLACE)
  assert result.stdout.startswith("slice: READY\nstatus=0\n")
  assert tpu.exists
  assert tpu.launch("delete", *PLACE).returncode == 0
  assert not tpu.exists


def test_existing_slice_is_used(tpu):
  tpu.set(request="ACTIVE")
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 0
  assert "exists already (READY)" in result.stderr
  assert not tpu.calls("create")


def test_create_waits_in_the_queue(tpu):
  tpu.set(next_states="WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 0
  waits = [line.split(": ")[1] for line in result.stderr.splitlines() if "waiting" in line]
  assert waits == ["WAITING_FOR_RESOURCES", "PROVISIONING"]


def test_create_replaces_what_a_preemption_left(tpu):
  tpu.set(request="SUSPENDED")
  assert tpu.launch("create", *PLACE).returncode == 0
  assert len(tpu.calls("delete")) == len(tpu.calls("create")) == 1


@pytest.mark.parametrize("how", ["suspended", "preempted"])
def test_preempted_run_resumes_on_a_new_slice(tpu, how):
  tpu.set(behaviours=f"{how} ok")
  result = tpu.launch("all", *PLACE, "--spot", "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert "cut short; resuming it, on a new slice if need be (1 of 20)" in result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 2
  assert {tuple(r["args"][2:]) for r in tpu.runs()} == {tuple(MAIN)}
  assert "worker0, run 2: step 1\nworker0: done\n" in result.stdout
  assert not tpu.exists


def test_run_that_was_told_to_stop_resumes_on_its_slice(tpu):
  tpu.set(behaviours="terminated ok")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 1
  assert len(tpu.runs()) == 4


def test_preemptions_without_end(tpu):
  tpu.set(behaviours="suspended")
  result = tpu.launch("all", *PLACE, "--retries=2", "--", *MAIN)
  assert result.returncode == 1
  assert "cut short 3 times; --retries=2 allows no more" in result.stderr
  assert len(tpu.calls("create")) == 3
  assert not tpu.exists


def test_follow_reports_a_preemption(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("follow", *PLACE)
  assert result.returncode == 75
  assert "resumes it" in result.stderr


def test_failed_run_shows_the_logs_and_deletes(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "the run has failed (exit status by worker: 0 1)" in result.stderr
  assert "ValueError: the batch does not fit" in result.stdout
  assert not tpu.exists
  assert len(tpu.calls("create")) == 1


def test_keep(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *PLACE, "--keep", "--", *MAIN)
  assert result.returncode == 1
  assert tpu.exists
  assert "delete --name=vit --zone=us-central2-b" in result.stderr


def test_slice_that_cannot_be_had(tpu):
  tpu.set(next_states="FAILED")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "vit is FAILED" in result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_gcloud_that_is_not_logged_in(tpu):
  tpu.set(broken_describes=99)
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 1
  assert "cannot describe vit in us-central2-b: ERROR" in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not tpu.calls("create")


def test_broken_connections_do_not_end_the_run(tpu):
  tpu.set(behaviours="hold", dropped_connections=3)
  process = tpu.start("all", *PLACE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.set(broken_describes=2)
  time.sleep(0.5)
  tpu.set(release="")
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert stderr.count("no connection to worker 0's log") == 3
  assert len(tpu.runs()) == 2


def test_setup_tries_again(tpu):
  tpu.set(request="ACTIVE", refused=2)
  result = tpu.launch("setup", *PLACE)
  assert result.returncode == 0, result.stderr
  assert "attempt 2 of 3" in result.stderr


def test_run_that_is_running_is_left_alone(tpu):
  tpu.set(request="ACTIVE", behaviours="hold")
  assert tpu.launch("setup", *PLACE).returncode == 0
  assert tpu.launch("run", *PLACE, "--", *MAIN).returncode == 0
  tpu.wait_for_run()
  again = tpu.launch("run", *PLACE, "--", *MAIN)
  assert again.stdout.count("already running") == 2
  assert len(tpu.runs()) == 2
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2


@pytest.mark.parametrize(
  ("number", "code", "exists"), [(signal.SIGINT, 130, False), (signal.SIGHUP, 129, True)]
)
def test_interrupt_deletes_and_hang_up_does_not(tpu, number, code, exists):
  tpu.set(behaviours="hold")
  process = tpu.start("all", *PLACE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code, stderr
  assert tpu.exists == exists


@pytest.fixture
def left_alone(tpu):
  """A run on a slice that `all` created, and whose terminal was closed."""
  tpu.set(behaviours="hold")
  process = tpu.start("all", *PLACE, "--", *TRICKY)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, signal.SIGHUP)
  process.communicate(timeout=60)
  return tpu


@pytest.mark.parametrize(("options", "exists"), [([], True), (["--delete"], False)])
def test_all_again_follows_what_is_under_way(left_alone, options, exists):
  tpu, before = left_alone, left_alone.followers()
  process = tpu.start("all", *PLACE, *options, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  tpu.set(release="")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "the run is under way on vit already" in stderr
  assert "worker0: done" in stdout
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == len(tpu.calls("create")) == 1, "nothing is installed over a run"
  assert tpu.exists == exists
  assert ("vit stays; delete it with: " in stderr) == exists


def test_an_interrupt_of_who_only_follows_ends_nothing(left_alone):
  tpu, before = left_alone, left_alone.followers()
  process = tpu.start("all", *PLACE, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  os.killpg(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2


def test_another_run_that_is_under_way_is_left_alone(left_alone):
  tpu = left_alone
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "a run with other arguments is under way on vit: 'follow' it, or" in result.stderr
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == 1
  assert tpu.exists


def test_a_slice_that_was_there_is_used_and_stays(tpu):
  tpu.set(request="ACTIVE", refused=2)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.runs()) == 2
  assert tpu.exists
  assert "vit stays; delete it with: " in result.stderr
  assert tpu.launch("all", *PLACE, "--delete", "--", *MAIN).returncode == 0
  assert len(tpu.runs()) == 4, "a run that has ended is no obstacle"
  assert not tpu.exists


def test_what_a_silent_slice_does_is_not_guessed(tpu):
  tpu.set(request="ACTIVE", refused=99)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "whether a run is under way on vit cannot be told" in result.stderr
  assert not tpu.calls("scp")
  assert tpu.exists


def test_a_slice_in_place_of_a_lost_one_is_ones_own(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_a_slice_of_somebody_who_was_faster_stays(tpu):
  tpu.set(faster_others=1)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "ALREADY_EXISTS" in result.stderr
  assert tpu.exists


def test_deleting_nothing_is_no_error(tpu):
  result = tpu.launch("delete", *PLACE)
  assert result.returncode == 0
  assert "nothing to delete" in result.stderr


def test_dry_run_prints_every_command_and_runs_none(tpu):
  result = tpu.launch("all", *PLACE, "--dry-run", "--", *TRICKY)
  assert result.returncode == 0, result.stderr
  assert not tpu.calls()
  assert not list(tpu.state.glob("*.tar.gz"))
  printed = [shlex.split(line) for line in result.stdout.splitlines()]
  assert [p[0] for p in printed if p[0] != "gcloud"] == ["tar", "rm"]
  assert tpu.launch("all", *PLACE, "--", *TRICKY).returncode == 0
  ran = tpu.calls()
  copied = next(p for p in printed if "scp" in p)
  copied[copied.index("scp") + 1] = tpu.calls("scp")[0][4]  # each process has an archive of its own
  assert [p[1:] for p in printed if p[0] == "gcloud"] == ran


def test_two_setups_at_once_get_in_each_others_way_but_both_succeed(tpu):
  tpu.set(request="ACTIVE")
  setups = [tpu.start("setup", *PLACE) for _ in range(2)]
  errors = [setup.communicate(timeout=60)[1] for setup in setups]
  assert [setup.returncode for setup in setups] == [0, 0], errors
  assert len({call[4] for call in tpu.calls("scp")}) == 2, "the first removes what the other copies"
  assert not list(tpu.state.glob("*.tar.gz"))


def test_dry_run_of_a_topology_and_a_repository(tpu):
  place = ["--name=vit", "--zone=z", "--topology=v5p:2x2x4", "--repo=https://host/a b.git"]
  result = tpu.launch("all", *place, "--ref=v0.1", "--dry-run", "--", *MAIN)
  assert "gcloud alpha compute" in result.stdout
  assert "--type=v5p --topology=2x2x4 --runtime-version=v2-alpha-tpuv5\n" in result.stdout
  assert "scp" not in result.stdout
  command = next(a for a in shlex.split(result.stdout) if "git clone" in a)
  assert "git clone 'https://host/a b.git' ~/vit_jax_zoo" in command
  assert "checkout v0.1" in command


def test_copied_files_exist(tpu):
  result = tpu.launch("setup", *PLACE, "--dry-run")
  words = shlex.split(result.stdout.splitlines()[0])
  assert words[0] == "tar"
  names = words[words.index("-C") + 2 :]
  assert len(names) == 6
  assert [n for n in names if not (ROOT / n).exists()] == []


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["launch"], "unknown command 'launch'; known commands: all create setup"),
    (["all", "--nmae=x"], "unknown option --nmae; known options: --name --zone"),
    (["all", "x"], "unexpected argument 'x'"),
    (["all", "--name"], "--name needs a value"),
    (["all", "--name", "--zone=z"], "--name needs a value"),
    (["all", "--keep=1"], "--keep takes no value"),
    (["all"], "no name: give the slice one with --name=NAME"),
    (["all", "--name=x"], "no zone"),
    (["all", "--name=x", "--zone=z"], "no type"),
    (["create", "--name=x", "--zone=z", "--type=v5p"], "--type=v5p says no size"),
    (["create", "--name=x", "--zone=z", "--type=v5p-8", "--topology=2x2x1"], "a size already"),
    (["create", "--name=x", "--zone=z", "--type=v9-8"], "no software image known"),
    (["run", *PLACE], "the run needs a --config"),
    (["run", *PLACE, "--", "--config=c.py"], "the run needs --workdir=gs://"),
    (["run", *PLACE, "--", "--config=c.py", "--workdir=/data"], "the run needs --workdir=gs://"),
    (["status", *PLACE, "--", "--config=c.py"], "belong to 'run' and 'all'"),
    (["all", *PLACE, "--retries=many", "--", *MAIN], "--retries=many is not a whole number"),
    (["setup", *PLACE, "--ref=main"], "--ref=main goes with --repo"),
  ],
)
def test_errors_are_one_line(tpu, args, message):
  result = tpu.launch(*args)
  assert result.returncode == 2
  assert result.stdout == ""
  assert len(result.stderr.splitlines()) == 1
  assert message in result.stderr
  assert not tpu.calls()


def test_no_gcloud(tpu, tmp_path):
  only = tmp_path / "only"
  only.mkdir()
  for tool in ("bash", "dirname"):
    (only / tool).symlink_to(shutil.which(tool))
  result = subprocess.run(
    tpu.command("create", *PLACE), env={"PATH": str(only)}, capture_output=True, text=True
  )
  assert result.returncode == 2
  assert result.stderr.startswith("launch_tpu.sh: gcloud not found; install")


def test_usage(tpu):
  result = tpu.launch("--help")
  assert result.returncode == 0
  options = {w.partition("=")[0] for w in result.stdout.split() if w.startswith("--")}
  assert {"--name", "--topology", "--spot", "--dry-run", "--keep", "--retries"} <= options
  assert tpu.launch().returncode == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["launch_tpu.sh", ".ci/run"])
def test_shellcheck(script):
  result = subprocess.run(
    ["shellcheck", str(ROOT / script)], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout
