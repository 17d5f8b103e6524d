"""The command line without a slice: dry runs, errors, usage."""

import shlex
import shutil
import subprocess

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, ROOT, SLICE, TRICKY, remote_call

BASH = shutil.which("bash")


def printed(result):
  """Returns the commands that a dry run prints, as lists of words."""
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def as_printed(call):
  """Formats a recorded gcloud call like a dry run: for ssh, only worker and function."""
  if "ssh" not in call:
    return ["gcloud", *call]
  worker = next(argument for argument in call if argument.startswith("--worker="))
  return ["ssh", worker, *shlex.split(" ".join(remote_call(call)))]


def test_dry_run_prints_all_commands_runs_none(tpu):
  flags = ["--config=configs/vit.py:b16", "--workdir=gs://bucket/a run", "--config.name=it's $HOME"]
  dry = printed(tpu.launch("all", *SLICE, "--spot", "--project=p", "--dry-run", "--", *flags))
  assert not tpu.calls()
  assert not list(tpu.state.glob("*.tar.gz"))
  assert [words[0] for words in dry] == ["gcloud", "tar", "gcloud", "ssh", "ssh", "ssh", "gcloud"]
  assert tpu.launch("all", *SLICE, "--spot", "--project=p", "--", *flags).returncode == 0
  ran = [as_printed(call) for call in tpu.changes()]
  for words in (dry[2], ran[1]):
    assert words.pop(words.index("scp") + 1).endswith(".tar.gz")  # the name contains the process id
  assert [words for words in dry if words[0] != "tar"] == ran


def test_dry_run_checks_config_and_slice(tpu):
  place = [*PLACE, "--type=v5e-16", "--dry-run"]
  result = tpu.launch("all", *place, "--", *TRICKY)
  assert "--accelerator-type=v5litepod-16" in printed(result)[0]
  config = [word for word in TRICKY if word.startswith("--config")]
  plan = ["-m", "vit_jax_zoo.plan", *config, "--topology=v5litepod-16", "--nocompile"]
  assert tpu.lines("plans.jsonl") == [plan]
  tpu.set(plan_status=2)
  result = tpu.launch("all", *place, "--", *TRICKY)
  assert (result.returncode, result.stdout) == (2, "")
  assert "error: --type: unknown" in result.stderr


def test_dry_run_without_package_raises(tpu):
  tpu.set(no_jax="")
  result = tpu.launch("all", *SLICE, "--dry-run", "--", *MAIN)
  assert (result.returncode, result.stdout) == (2, "")
  assert len(result.stderr.splitlines()) == 1
  assert "pip install" in result.stderr


def test_dry_run_of_single_step(tpu):
  assert [words[2:5] for words in printed(tpu.launch("delete", *PLACE, "--dry-run"))] == [
    ["tpus", "queued-resources", "delete"]
  ]
  assert printed(tpu.launch("run", *PLACE, "--dry-run", "--", *MAIN)) == [
    ["ssh", "--worker=all", "worker_start", *MAIN]
  ]
  assert not tpu.calls()


def test_copied_files_exist(tpu):
  words = printed(tpu.launch("setup", *PLACE, "--dry-run"))[0]
  names = words[words.index("--exclude=__pycache__") + 1 :]
  assert len(names) == 7
  assert [n for n in names if not (ROOT / n).exists()] == []


@pytest.mark.parametrize(
  ("args", "named"),
  [
    ([], "unknown command ''"),
    (["launch"], "unknown command 'launch'"),
    (["all", "--nmae=x"], "--nmae=x"),
    (["all", "x"], "'x'"),
    (["all", "--name"], "'--name'"),
    (["all", "--keep=1"], "--keep=1"),
    (["all"], "--name=''"),
    (["delete", "--name=-vit", "--zone=z"], "--name='-vit'"),
    (["delete", "--name=--all", "--zone=z"], "--name='--all'"),
    (["delete", "--name=vit.*", "--zone=z"], "--name='vit.*'"),
    (["delete", "--name=a b", "--zone=z"], "--name='a b'"),
    (["all", "--name=x"], "--zone=''"),
    (["all", "--name=x", "--zone=-z"], "--zone='-z'"),
    (["all", "--name=x", "--zone=z"], "--type=''"),
    (["create", "--name=x", "--zone=z", "--type=v5p"], "--type='v5p'"),
    (["create", "--name=x", "--zone=z", "--type=v9-8"], "--type='v9-8'"),
    (["run", *PLACE], "--config="),
    (["run", *PLACE, "--", "--config=c.py"], "--workdir=gs://"),
    (["run", *PLACE, "--", "--config=c.py", "--workdir=/data"], "--workdir=gs://"),
    (["all", *SLICE, "--retries=many", "--", *MAIN], "--retries='many'"),
  ],
)
def test_invalid_arguments_one_line_error(tpu, args, named):
  result = tpu.launch(*args)
  assert result.returncode == 2
  assert result.stdout == ""
  assert len(result.stderr.splitlines()) == 1
  assert named in result.stderr
  assert not tpu.calls()


def test_missing_gcloud_one_line_error(tpu, tmp_path):
  only = tmp_path / "only"
  only.mkdir()
  result = subprocess.run(
    [BASH, *tpu.command("create", *SLICE)[1:]],
    env={"PATH": str(only)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert "gcloud not found" in result.stderr


def test_usage_lists_all_options(tpu):
  result = tpu.launch("--help")
  assert result.returncode == 0
  assert result.stderr == ""
  options = {w.partition("=")[0] for w in result.stdout.split() if w.startswith("--")}
  script = (ROOT / "launch_tpu.sh").read_text()
  known = [w.strip().rstrip(")").rstrip("=*") for w in script.split("while (($#))")[1].split("\n")]
  parsed = {line.split(")")[0].rstrip("=*") for line in known if line.startswith("--")} - {"--"}
  assert len(parsed) == 9
  assert parsed <= options


def test_script_length():
  assert len((ROOT / "launch_tpu.sh").read_text().splitlines()) <= 250


@pytest.mark.parametrize("script", ["launch_tpu.sh", ".ci/run"])
def test_shellcheck(script):
  result = subprocess.run(
    ["shellcheck", str(ROOT / script)], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout
