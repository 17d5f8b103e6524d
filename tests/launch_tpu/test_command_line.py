"""What the command says without a slice: dry runs, errors, its usage."""

import shlex
import shutil
import subprocess

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, ROOT, TRICKY


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
