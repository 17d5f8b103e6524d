#!/usr/bin/env bash
# Trains on a Cloud TPU slice: a queued resource with one node of the same name.
#   ./launch_tpu.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of vit_jax_zoo.main]
#
# Commands
#   create   request the slice and wait for it; replaces a preempted slice of the same name
#   setup    copy this folder's package to every worker and install it with the [tpu] extra
#   run      start vit_jax_zoo.main on every worker, detached from ssh
#   follow   print worker 0's log until the run ends; exit status 0 if all workers succeeded
#   status   print the state of the slice, and status and last log lines of every worker
#   delete   delete the slice
#   all      create, setup, run, follow, delete. After a preemption: create again, and resume from
#            the last checkpoint. Deletes after a failure or Ctrl-C too, but never a slice that
#            existed before, or whose state gcloud cannot tell. Only follows a run under way.
#
# Options
#   --name=NAME        name of the slice
#   --zone=ZONE        Google Cloud zone
#   --project=PROJECT  Google Cloud project (default: gcloud's)
#   --type=TYPE        accelerator type, such as v5litepod-16, v5p-128, v6e-8 (all, create)
#   --version=VERSION  software image (default: Google's choice for the type)
#   --spot             lower price, but the slice may be preempted at any time
#   --keep             all: do not delete the slice, which continues to cost money
#   --retries=N        all: resume an interrupted run at most N times (default 20)
#   --dry-run          print the commands and run none; all: check config, variant, slice first
#
# Example
#   ./launch_tpu.sh all --name=vit-b16 --zone=us-west4-a --type=v5litepod-16 --spot -- \
#     --config=configs/vit.py:b16_imagenet --workdir=gs://my-bucket/vit_b16

set -euo pipefail # and nothing newer than bash 3.2, for macOS

note() { printf '[launch_tpu] %s\n' "$*" >&2; }
die() { note "error: $*" && exit 2; }

# --- on the workers: ssh sends the text of these functions; they use no variable of this file -----

worker_install() {
  mkdir -p ~/vit_jax_zoo && cd ~/vit_jax_zoo && exec 9>setup.lock && flock 9 # one at a time
  tar -xzf ~/vit_jax_zoo.tar.gz
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
  if [[ ! -x .venv/bin/python ]]; then uv venv --python '>=3.11,<3.14' .venv; fi # images have 3.10
  uv pip install -e '.[tpu]'
}

# Prints status=, and none, running, other (running with other flags) or the exit status of main.
worker_status() {
  local state=running
  cd ~/vit_jax_zoo 2>/dev/null || true
  if (($#)) && [[ $(printf '%q ' "$@") != "$(cat run.args 2>/dev/null)" ]]; then state=other; fi
  kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null || state=none
  if [[ -s run.status ]]; then state=$(cat run.status); fi
  echo "status=$state"
}

worker_start() {
  cd ~/vit_jax_zoo
  case $(worker_status "$@") in
    status=running) echo "already running" && return ;;
    status=other) echo "already running, with other flags: $(cat run.args)" && return 1 ;;
  esac
  rm -f run.status
  printf '%q ' "$@" >run.args
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid bash -c '.venv/bin/python -m vit_jax_zoo.main "$@"; echo $? >run.status' main "$@" \
    >>run.log 2>&1 </dev/null &
  echo $! >run.pid
}

worker_follow() { cd ~/vit_jax_zoo && tail -n 100 -s 0.2 --pid="$(cat run.pid)" -f run.log; }
worker_report() { hostname && worker_status && tail -n 30 ~/vit_jax_zoo/run.log; }

# on_workers WORKER FUNCTION [ARGUMENTS]: calls one of these functions on worker 0, 1, ... or all.
on_workers() {
  local call
  call=$(echo "set -euo pipefail" && declare -f "$2" worker_status && printf '%q ' "${@:2}")
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$call" </dev/null
}

# Sets STATES to the states of the run on all workers, without repetition: "running", "0", "0 1".
read_states() {
  STATES=$(on_workers all worker_status ${MAIN_ARGS[@]+"${MAIN_ARGS[@]}"} |
    sed -n 's/^status=//p' | sort -u | xargs)
}

# --- the commands; with `|| return`, as bash ignores `set -e` in what an `if` calls ---------------

# Prints ABSENT, PREEMPTED or the state of the request; once that is ACTIVE, the state of the node.
slice_state() {
  local state list=(list "${WHERE[@]}" "--filter=name~/$NAME\$")
  state=$(gcloud compute tpus queued-resources "${list[@]}" "--format=value(state.state)") || return
  if [[ $state == ACTIVE ]]; then
    state=$(gcloud compute tpus tpu-vm "${list[@]}" "--format=value(state)") || return
    state=${state:-NODE_MISSING} # for minutes after a preemption, until the request is suspended
  fi
  if [[ $state == SUSPEND* || $state == TERMINATED ]]; then state=PREEMPTED; fi
  echo "${state:-ABSENT}"
}

create() {
  local state last="" misses=0
  state=$(slice_state) || return
  if [[ $state == PREEMPTED ]]; then delete && state=ABSENT; fi
  if [[ $state == ABSENT ]]; then
    CREATED=1 # before the request, so that Ctrl-C during it deletes the slice
    gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${WHERE[@]}" \
      "--accelerator-type=$TYPE" "--runtime-version=$VERSION" ${SPOT:+--spot} ||
      { CREATED="" && return 1; } # not ours: another process may have created it
  fi
  while ((misses < 20)); do
    state=$(slice_state) || state=UNKNOWN
    if [[ $state != "$last" ]]; then note "$NAME: $state" && last=$state; fi
    case $state in
      ABSENT | DELETING | FAILED | PREEMPTED) return 1 ;;
      READY) if read_states; then return; else misses=$((misses + 1)); fi ;; # ssh may need a minute
    esac
    sleep 15
  done
  return 1
}

setup() {
  tar -czf "$ARCHIVE" --exclude=__pycache__ \
    setup.cfg setup.py pyproject.toml README.md LICENSE configs vit_jax_zoo || return
  gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:vit_jax_zoo.tar.gz" "${WHERE[@]}" \
    --worker=all && on_workers all worker_install
}

run() { on_workers all worker_start "${MAIN_ARGS[@]}"; }

follow() {
  local state misses
  for ((misses = 0; misses < 240; misses++)); do # an hour without an answer
    on_workers 0 worker_follow || note "no connection to worker 0's log"
    state=$(slice_state) || state=UNKNOWN
    if [[ $state == ABSENT || $state == PREEMPTED ]]; then break; fi
    if [[ $state == READY ]] && read_states; then
      if [[ $STATES != *running* ]]; then break; fi
      misses=0
    fi
    sleep 15
  done
  note "the run has ended: slice $state, exit status by worker ${STATES:-unknown}"
  if [[ $state != READY || $STATES != 0 ]]; then on_workers all worker_report && return 1; fi
}

status() { note "$NAME: $(slice_state)" && on_workers all worker_report; }

delete() {
  if [[ $(slice_state) == ABSENT ]]; then note "there is no $NAME in $ZONE" && return; fi
  gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force
}

start() {
  case $STATES in
    *other*) note "a run with other flags is under way on $NAME" && return 1 ;;
    *running*) note "the run is under way already" ;;
    *) STATES="" && setup && run ;;
  esac
}

all() {
  local state
  until create && start && follow; do
    for _ in 1 2 3 4 5; do # gcloud may fail
      sleep 15 # a worker may stop before Cloud TPU reports the preemption; 143: main got a SIGTERM
      if state=$(slice_state); then break; else state=UNKNOWN; fi
    done
    if [[ $state == UNKNOWN ]]; then note "$NAME: its state is unknown" && KEEP=1 && return 1; fi
    if [[ $STATES != *143* && $state != PREEMPTED ]] || ((RETRIES == 0)); then return 1; fi
    RETRIES=$((RETRIES - 1)) STATES=""
    note "the run was interrupted: resuming it (and at most $RETRIES times more)"
  done
}

# Runs when the script ends, for whatever reason. Only `all` deletes, and only what it has created.
clean_up() {
  local result=$?
  trap '' INT TERM HUP
  rm -f "$ARCHIVE"
  if [[ $COMMAND == all && -n $CREATED && -z $KEEP ]]; then
    delete || result=1
  elif [[ $COMMAND == all ]]; then
    note "not deleted, and may cost money; to delete it: $0 delete --name=$NAME ${WHERE[*]:1}"
  fi
  exit "$result"
}

# --- the command line -----------------------------------------------------------------------------
COMMAND=${1:-}
case $COMMAND in
  all | create | setup | run | follow | status | delete) shift ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  *) die "unknown command '$COMMAND'; expected all, create, setup, run, follow, status or delete" ;;
esac
NAME="" ZONE="" PROJECT="" TYPE="" VERSION="" SPOT="" KEEP="" RETRIES=20 DRY_RUN=""
while (($#)); do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --version=*) VERSION=${1#*=} ;;
    --retries=*) RETRIES=${1#*=} ;;
    --spot) SPOT=1 ;;
    --keep) KEEP=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --) shift && break ;;
    *) die "unknown option '$1'; see --help (values follow '=', and flags of main '--')" ;;
  esac
  shift
done
MAIN_ARGS=("$@") CREATED="" STATES="" ARCHIVE=${TMPDIR:-/tmp}/vit_jax_zoo_${NAME}_$$.tar.gz
WHERE=(--quiet "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
[[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || die "--name='$NAME': expected a name such as --name=vit-b16"
[[ $ZONE =~ ^[a-z][a-z0-9-]*$ ]] || die "--zone='$ZONE': expected a zone such as --zone=us-west4-a"
[[ $RETRIES =~ ^[0-9]+$ ]] || die "--retries='$RETRIES': expected a whole number"
if [[ $COMMAND == all || $COMMAND == create ]]; then
  TYPE=${TYPE/#v5e-/v5litepod-}
  case $TYPE in
    v[234]-[0-9]*) VERSION=${VERSION:-tpu-ubuntu2204-base} ;;
    v5litepod-[0-9]*) VERSION=${VERSION:-v2-alpha-tpuv5-lite} ;;
    v5p-[0-9]*) VERSION=${VERSION:-v2-alpha-tpuv5} ;;
    v6e-[0-9]*) VERSION=${VERSION:-v2-alpha-tpuv6e} ;;
    *) die "--type='$TYPE': expected generation and size, such as --type=v5litepod-16" ;;
  esac
fi
[[ ! $COMMAND =~ ^(all|run)$ || " $* " == *" --config="* && " $* " == *" --workdir=gs://"* ]] ||
  die "flags of main: expected -- --config=configs/vit.py:VARIANT --workdir=gs://BUCKET/FOLDER"
[[ -n $DRY_RUN ]] || command -v gcloud >/dev/null ||
  die "gcloud not found; install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -n $DRY_RUN && $COMMAND == all ]]; then
  python3 -c "import jax" 2>&- || die "--dry-run: needs the package here, too: pip install -e ."
  plan=() && for arg in "$@"; do if [[ $arg == --config* ]]; then plan+=("$arg"); fi; done
  python3 -m vit_jax_zoo.plan "${plan[@]}" "--topology=$TYPE" --nocompile 2>&1 | sed 's/--topology/--type/' >&2
fi
if [[ -n $DRY_RUN ]]; then
  note() { :; }
  gcloud() { printf '%q ' gcloud "$@" && echo; }
  tar() { printf '%q ' tar "$@" && echo; }
  on_workers() { printf '%q ' ssh "--worker=$1" "${@:2}" && echo; }
  read_states() { STATES=0; }
  slice_state() { [[ $COMMAND != delete && -z $CREATED ]] && echo ABSENT || echo READY; }
fi
trap clean_up EXIT
trap 'exit 130' INT
trap 'KEEP=1; exit 129' HUP # the terminal was closed
"$COMMAND"
