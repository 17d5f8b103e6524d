#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, installs the package on every worker, runs
# vit_jax_zoo.main there, follows the log, deletes the slice. `launch_tpu.sh --help` says how.
#
# The slice is a queued resource with one node of the same name. Every step looks first at what is
# already there, so a step that was interrupted is simply given again. The run itself is detached
# from ssh; this machine may go away while it trains.
#
# Runs on bash 3.2 and later (macOS), hence ${array[@]+"${array[@]}"} for arrays that may be empty.
# A bare `return` inside a trap repeats the status from before the trap; every one here has a value.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT
readonly COMMANDS="all create setup run follow status delete"
readonly OPTIONS="--name --zone --type --topology --version --project --spot --repo --ref \
--retries --poll --keep --delete --dry-run --help"

NAME="" ZONE="" TYPE="" TOPOLOGY="" VERSION="" PROJECT="" SPOT="" REPO="" REF=""
RETRIES=20 POLL=15 KEEP="" DELETE="" DRY_RUN=""
MAIN_ARGS=()
ARCHIVE=""
# Whether `create` found a slice, and whether it asked for one: `all` deletes its own alone.
FOUND="" CREATED=""

# What slice_state answers where Cloud TPU knows no such slice.
readonly ABSENT=ABSENT
# What a step returns when the slice was taken away under it, or the run was told to stop
# (EX_TEMPFAIL: trying again helps).
readonly LOST=75
# main's exit status after SIGTERM, when it has saved its state and is not finished.
readonly STOPPED=143
# How often in a row a step looks in vain at workers of a slice that is up.
readonly MISSES=40

usage() {
  cat <<'USAGE'
Usage: ./launch_tpu.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of vit_jax_zoo.main]

Commands
  all      create, setup, run, follow, delete; a slice that is lost on the way is created anew and
           the same command resumes from the last checkpoint; deletes also after a failure, but no
           slice that was there before; a run that is under way there is only followed
  create   ask for the slice and wait until it is there; one that exists already is used as it is
  setup    copy this folder's package to every worker and install it with the [tpu] extra
  run      start vit_jax_zoo.main on every worker, detached from ssh
  follow   print worker 0's log until the run ends; its exit status becomes this command's
  status   say what the slice and the run on each worker are doing
  delete   delete the slice; one that is not there is no error

Options
  --name=NAME          of the slice
  --zone=ZONE          for example us-central2-b
  --type=TYPE          accelerator and size, for example v5litepod-16, v5p-128, v6e-8;
                       with --topology the generation alone: v5p
  --topology=AxBxC     of the chips, for example 4x4x4
  --version=VERSION    software image; the default is Google's choice for the type
  --project=PROJECT    the default is gcloud's
  --spot               cheaper, and may be taken away at any time
  --repo=URL           setup: clone this git repository in place of copying this folder
  --ref=REF            setup: the branch, tag or commit of --repo
  --retries=20         all: how often a run that was cut short is resumed
  --poll=15            seconds between two looks at the slice
  --keep               all: leave the slice there in the end, at your cost
  --delete             all: delete it in the end, even if it was there before
  --dry-run            print every command, one to a line, and run none

Example
  ./launch_tpu.sh all --name=vit --zone=us-central1-a --type=v5litepod-16 --spot -- \
    --config=configs/vit.py:b16_imagenet --workdir=gs://my-bucket/vit_b16

Ctrl-C during `all` deletes the slice that it created, unless --keep is given. Closing the terminal
does not: the run goes on. The same command takes it up again; with --delete, to the end.
USAGE
}

note() { printf '[launch_tpu] %s\n' "$*" >&2; }

die() {
  printf 'launch_tpu.sh: %s\n' "$*" >&2
  exit 2
}

# --- quoting and running -------------------------------------------------------------------------

# Prints one argument so that a shell reads it back unchanged, on one line.
quote_one() {
  case $1 in
    *[[:cntrl:]]*) printf '%q' "$1" ;;
    "" | *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
    *) printf '%s' "$1" ;;
  esac
}

quote() {
  local separator="" word
  for word in "$@"; do
    printf '%s' "$separator"
    quote_one "$word"
    separator=" "
  done
}

show() {
  quote "$@"
  printf '\n'
}

# Runs a command, or prints it.
execute() {
  if [[ -n $DRY_RUN ]]; then show "$@"; else "$@"; fi
}

# gcloud's options that say where the slice lives.
place() {
  WHERE=(--quiet "--zone=$ZONE")
  if [[ -n $PROJECT ]]; then WHERE+=("--project=$PROJECT"); fi
}

# on_workers WORKER COMMAND: runs a shell command line on worker 0, 1, ... or all of them.
on_workers() {
  execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$2" \
    </dev/null
}

# --- the slice -----------------------------------------------------------------------------------

# ask KIND FIELD: prints one field of what Cloud TPU knows, or ABSENT; fails if it cannot tell.
ask() {
  local answer error
  local describe=(gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)")
  if [[ -n $DRY_RUN ]]; then
    show "${describe[@]}"
    return 0
  fi
  error=$(mktemp)
  if answer=$("${describe[@]}" 2>"$error"); then
    rm -f "$error"
    printf '%s\n' "$answer"
    return 0
  fi
  answer=$(tr '\n' ' ' <"$error")
  rm -f "$error"
  case $answer in
    *NOT_FOUND* | *"not found"* | *"does not exist"*) printf '%s\n' "$ABSENT" ;;
    *) note "gcloud cannot describe $NAME in $ZONE: $answer" && return 1 ;;
  esac
}

# Prints ABSENT, or Cloud TPU's word for the request (WAITING_FOR_RESOURCES, SUSPENDED, ...) or,
# once that is ACTIVE, for the node (CREATING, READY, PREEMPTED, ...): a node can be gone for
# minutes before its request is suspended.
slice_state() {
  local state
  if [[ -n $DRY_RUN ]]; then
    ask queued-resources state.state
    ask tpu-vm state
    return 0
  fi
  state=$(ask queued-resources state.state) || return $?
  if [[ $state == ACTIVE ]]; then
    state=$(ask tpu-vm state) || return $?
    # The request is there and its node is not: the node has been taken away.
    if [[ $state == "$ABSENT" ]]; then state=PREEMPTED; fi
  fi
  printf '%s\n' "$state"
}

# is_lost STATE: whether the slice has been taken away. (One that is ABSENT or DELETING was deleted
# by somebody, who will not want it back.)
is_lost() {
  case $1 in
    SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | FAILED) return 0 ;;
    *) return 1 ;;
  esac
}

slice_is_lost() {
  local state
  state=$(slice_state) && is_lost "$state"
}

request_slice() {
  local gcloud=(gcloud) shape=("--accelerator-type=$TYPE") spot=()
  if [[ -n $TOPOLOGY ]]; then
    shape=("--type=$TYPE" "--topology=$TOPOLOGY")
    # Where it takes a topology, the released track knows generations up to v4 only (gcloud 528).
    case $TYPE in v2 | v3 | v4) ;; *) gcloud=(gcloud alpha) ;; esac
  fi
  if [[ -n $SPOT ]]; then spot=(--spot); fi
  execute "${gcloud[@]}" compute tpus queued-resources create "$NAME" "--node-id=$NAME" \
    "${WHERE[@]}" "${shape[@]}" "--runtime-version=$VERSION" ${spot[@]+"${spot[@]}"}
}

remove_slice() {
  execute gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force
}

wait_until_ready() {
  local state last="" misses=0
  if [[ -n $DRY_RUN ]]; then
    slice_state
    return 0
  fi
  while true; do
    state=$(slice_state) || state=UNKNOWN
    case $state in
      READY) return 0 ;;
      FAILED | "$ABSENT" | DELETING)
        note "$NAME is $state: Cloud TPU did not give it, or somebody deleted it"
        return 1
        ;;
      UNKNOWN) misses=$((misses + 1)) ;;
      *) misses=0 ;;
    esac
    if is_lost "$state"; then return "$LOST"; fi
    if ((misses > MISSES)); then return 1; fi
    if [[ $state != "$last" ]]; then note "waiting for $NAME: $state"; fi
    last=$state
    sleep "$POLL"
  done
}

create() {
  local state=$ABSENT
  if [[ -n $DRY_RUN ]]; then
    ask queued-resources state.state
  else
    state=$(slice_state) || return $?
  fi
  if is_lost "$state"; then
    note "$NAME is $state; deleting what is left of it"
    remove_slice || return $?
    state=$ABSENT
  fi
  if [[ $state == "$ABSENT" ]]; then
    create_slice || return $?
  else
    FOUND=1
    note "$NAME exists already ($state)"
  fi
  wait_until_ready
}

# Asks for the slice, which is ours from then on: also if an interrupt comes before the answer. Not
# if somebody else was faster.
create_slice() {
  local error result=0
  CREATED=1 FOUND=""
  if [[ -n $DRY_RUN ]]; then
    request_slice
    return 0
  fi
  error=$(mktemp)
  request_slice 2>"$error" || result=$?
  if [[ $result != 0 ]] && grep -q ALREADY_EXISTS "$error"; then CREATED=""; fi
  cat "$error" >&2
  rm -f "$error"
  return "$result"
}

delete() {
  local state=""
  if [[ -n $DRY_RUN ]]; then
    ask queued-resources state.state
  else
    state=$(ask queued-resources state.state) || return $?
  fi
  if [[ $state == "$ABSENT" ]]; then
    note "there is no $NAME in $ZONE: nothing to delete"
  else
    remove_slice
  fi
}

# --- the package on the workers ------------------------------------------------------------------

# The images carry Python 3.10 or so; uv brings one that the package runs on.
# shellcheck disable=SC2016 # $HOME and $PATH are the worker's
readonly INSTALL='export PATH="$HOME/.local/bin:$PATH" && cd ~/vit_jax_zoo && '\
'{ command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; } && '\
'{ [ -x .venv/bin/python ] || uv venv --python ">=3.11,<3.14" .venv; } && '\
'uv pip install -e ".[tpu]"'

pack_folder() {
  # One's own: of two `all`s at once, each removes its archive when it is done with it.
  ARCHIVE=${TMPDIR:-/tmp}/vit_jax_zoo_${NAME}_$$.tar.gz
  execute tar -czf "$ARCHIVE" --exclude=__pycache__ --exclude='*.egg-info' -C "$ROOT" \
    setup.cfg pyproject.toml README.md LICENSE configs vit_jax_zoo
}

install_folder() {
  local unpack="mkdir -p ~/vit_jax_zoo && tar -xzf ~/vit_jax_zoo.tar.gz -C ~/vit_jax_zoo"
  execute gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:vit_jax_zoo.tar.gz" "${WHERE[@]}" \
    --worker=all || return $?
  on_workers all "$unpack && $INSTALL"
}

install_repo() {
  local clone checkout="git -C ~/vit_jax_zoo fetch --tags origin"
  clone="{ [ -d ~/vit_jax_zoo/.git ] || git clone $(quote "$REPO") ~/vit_jax_zoo; }"
  if [[ -n $REF ]]; then checkout="$checkout && git -C ~/vit_jax_zoo checkout $(quote "$REF")"; fi
  on_workers all "$clone && $checkout && $INSTALL"
}

setup() {
  local try install=install_repo
  if [[ -z $REPO ]]; then
    install=install_folder
    pack_folder || return $?
  fi
  # A slice that has just come up may refuse ssh for a minute.
  for try in 1 2 3; do
    if "$install"; then
      if [[ -n $ARCHIVE ]]; then execute rm -f "$ARCHIVE"; fi
      return 0
    fi
    if slice_is_lost; then return "$LOST"; fi
    note "setup failed on $NAME (attempt $try of 3)"
    sleep "$POLL"
  done
  return 1
}

# --- the run -------------------------------------------------------------------------------------

# What a worker does. The arguments of main follow as "$@", so they are quoted once and for all.
# main's exit status goes into a file, for whoever asks later.
# shellcheck disable=SC2016 # expanded on the worker
readonly JOB='echo $$ > run.pid; .venv/bin/python -m vit_jax_zoo.main "$@"; echo $? > run.status'
# shellcheck disable=SC2016
readonly ALIVE='[ -s run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null'
# shellcheck disable=SC2016
readonly STARTED='for _ in $(seq 50); do [ -s run.pid ] && break; sleep 0.2; done; [ -s run.pid ]'
# shellcheck disable=SC2016
readonly TAIL='cd ~/vit_jax_zoo && tail -n 100 -s 0.2 --pid="$(cat run.pid)" -f run.log'
# The status is looked for once more at the end: the run may have ended since the first look.
readonly REPORT="cd ~/vit_jax_zoo 2>/dev/null; \
if [ ! -s run.status ] && $ALIVE; then echo status=running; \
elif [ -s run.status ]; then echo \"status=\$(cat run.status)\"; else echo status=none; fi"
# shellcheck disable=SC2016
readonly LAST_LINES='echo "--- $(hostname)"; tail -n 30 ~/vit_jax_zoo/run.log'

run() {
  local job arguments
  job="nohup setsid bash -c $(quote "$JOB") main $(quote "${MAIN_ARGS[@]}")"
  arguments="printf %s $(quote "$(quote "${MAIN_ARGS[@]}")") > run.args"
  # A process that has written its status is over, even if it is still to be seen.
  on_workers all "cd ~/vit_jax_zoo && if [ ! -s run.status ] && $ALIVE; then echo 'already running'; else \
rm -f run.pid run.status; $arguments; $job >>run.log 2>&1 </dev/null & $STARTED; fi"
}

# Prints the workers' states without repetition: `0`, `running`, `0 1`, ...
worker_states() {
  local lines
  lines=$(on_workers all "$REPORT") || return $?
  printf '%s\n' "$lines" | sed -n 's/^status=//p' | sort -u | tr '\n' ' ' | sed 's/ $//'
}

# Waits for the end of the run; returns 0, 1 or LOST. Neither a broken connection nor a gcloud that
# cannot answer is the end of the run.
follow_run() {
  local state states misses=0
  if [[ -n $DRY_RUN ]]; then
    on_workers 0 "$TAIL"
    slice_state
    on_workers all "$REPORT"
    return 0
  fi
  while true; do
    on_workers 0 "$TAIL" || note "no connection to worker 0's log; looking at the run"
    state=$(slice_state) || state=UNKNOWN
    if is_lost "$state"; then return "$LOST"; fi
    case $state in
      "$ABSENT" | DELETING) note "$NAME was deleted during the run" && return 1 ;;
      READY)
        states=$(worker_states) || states=""
        case " $states " in
          "  ") misses=$((misses + 1)) ;;
          *" running "*) misses=0 ;;
          *) break ;;
        esac
        ;;
    esac
    if ((misses > MISSES)); then
      note "no worker of $NAME can be reached, though the slice is up"
      return 1
    fi
    sleep "$POLL"
  done
  judge "$states"
}

# judge STATES: says how the run ended. One that was told to stop, by a preemption or by maintenance
# of the machine, or that fails on a slice that is just being taken away, will resume.
judge() {
  if [[ $1 == 0 ]]; then
    note "the run has ended well on every worker"
    return 0
  fi
  sleep "$POLL"
  case " $1 " in *" $STOPPED "*) return "$LOST" ;; esac
  if slice_is_lost; then return "$LOST"; fi
  if [[ $1 == none ]]; then
    note "no run has been started on $NAME, or it was killed: start it with 'run'"
    return 1
  fi
  note "the run has failed (exit status by worker: $1); the end of every worker's log:"
  on_workers all "$LAST_LINES" || true
  return 1
}

follow() {
  local result=0
  follow_run || result=$?
  if [[ $result == "$LOST" ]]; then
    note "the run on $NAME was cut short; the command 'all', with the same arguments, resumes it"
  fi
  return "$result"
}

status() {
  local state
  if [[ -n $DRY_RUN ]]; then
    slice_state
  else
    state=$(slice_state) || return $?
    printf 'slice: %s\n' "$state"
    if [[ $state != READY ]]; then return 0; fi
  fi
  on_workers all "$REPORT; tail -n 3 run.log"
}

# --- the whole life ------------------------------------------------------------------------------

# Looks for a run that is under way on a slice that was there. Returns 0 if it is the one that is
# asked for, LOST if the slice is lost, 3 if there is none, 1 if it is another or cannot be told.
find_run() {
  local try answer="" ours same
  ours=$(quote "$(quote "${MAIN_ARGS[@]}")")
  same="[ \"\$(cat run.args 2>/dev/null)\" = $ours ] || echo run=other"
  # A slice that has just come up may refuse ssh for a minute.
  for try in 1 2 3 4 5 6; do
    if answer=$(on_workers all "$REPORT; $same"); then break; fi
    if slice_is_lost; then return "$LOST"; fi
    note "no answer from the workers of $NAME (attempt $try of 6)"
    answer=""
    sleep "$POLL"
  done
  case $answer in
    "") note "whether a run is under way on $NAME cannot be told; nothing was changed there" ;;
    *status=running*run=other* | *run=other*status=running*)
      note "a run with other arguments is under way on $NAME: 'follow' it, or 'delete' the slice"
      ;;
    *status=running*) note "the run is under way on $NAME already" && return 0 ;;
    *) return 3 ;;
  esac
  return 1
}

attempt() {
  local found=3
  create || return $?
  if [[ -n $FOUND ]]; then
    found=0
    find_run || found=$?
  fi
  case $found in
    0) ;;
    3) start_run || return $? ;;
    *) return "$found" ;;
  esac
  follow_run
}

start_run() {
  setup || return $?
  if ! run; then
    if slice_is_lost; then return "$LOST"; else return 1; fi
  fi
}

# The EXIT trap of `all`: the slice costs money until it is gone.
clean_up() {
  local result=$?
  trap - EXIT INT TERM HUP
  if [[ -n $ARCHIVE && -z $DRY_RUN ]]; then rm -f "$ARCHIVE"; fi
  if [[ -n $KEEP || (-n $FOUND && -z $CREATED && -z $DELETE) ]]; then
    note "$NAME stays; delete it with: $(quote "$0" delete "--name=$NAME" "${WHERE[@]:1}")"
  elif [[ -n $CREATED || -n $DELETE ]] && ! delete; then
    note "$NAME could not be deleted and may cost money; look at what is there:" \
      "gcloud compute tpus queued-resources list $(quote "${WHERE[@]:1}")"
    if [[ $result == 0 ]]; then result=1; fi
  fi
  exit "$result"
}

all() {
  local result lost=0
  trap clean_up EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'KEEP=1; exit 129' HUP
  while true; do
    result=0
    attempt || result=$?
    if [[ $result != "$LOST" ]]; then exit "$result"; fi
    if ((lost >= RETRIES)); then
      note "the run was cut short $((lost + 1)) times; --retries=$RETRIES allows no more"
      exit 1
    fi
    lost=$((lost + 1))
    note "the run was cut short; resuming it, on a new slice if need be ($lost of $RETRIES)"
  done
}

# --- the command line ----------------------------------------------------------------------------

set_option() {
  case $1 in
    --name) NAME=$2 ;;
    --zone) ZONE=$2 ;;
    --type) TYPE=$2 ;;
    --topology) TOPOLOGY=$2 ;;
    --version) VERSION=$2 ;;
    --project) PROJECT=$2 ;;
    --repo) REPO=$2 ;;
    --ref) REF=$2 ;;
    --retries) RETRIES=$2 ;;
    --poll) POLL=$2 ;;
    --spot | --keep | --delete | --dry-run | --help) die "$1 takes no value" ;;
    *) die "unknown option $1; known options: $OPTIONS (arguments of main come after --)" ;;
  esac
}

parse() {
  while (($#)); do
    case $1 in
      --) shift && MAIN_ARGS=("$@") && return 0 ;;
      --help | -h) usage && exit ;;
      --spot) SPOT=1 ;;
      --keep) KEEP=1 ;;
      --delete) DELETE=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --*=*) set_option "${1%%=*}" "${1#*=}" ;;
      --*)
        set_option "$1" "${2-}"
        if (($# < 2)) || [[ $2 == --* ]]; then die "$1 needs a value: $1=..."; fi
        shift
        ;;
      *) die "unexpected argument '$1'; the command comes first, arguments of main come after --" ;;
    esac
    shift
  done
}

default_version() {
  case $TYPE in
    v6e*) VERSION=v2-alpha-tpuv6e ;;
    v5p*) VERSION=v2-alpha-tpuv5 ;;
    v5litepod* | v5e*) VERSION=v2-alpha-tpuv5-lite ;;
    v2* | v3* | v4*) VERSION=tpu-ubuntu2204-base ;;
    *) die "no software image known for --type=$TYPE; name one with --version=..." ;;
  esac
}

# `--topology=v5p:4x4x4` says the type too, and v5e is what people call v5litepod.
normalize_shape() {
  case $TOPOLOGY in
    *:*)
      TYPE=${TYPE:-${TOPOLOGY%%:*}}
      TOPOLOGY=${TOPOLOGY#*:}
      ;;
  esac
  case $TYPE in v5e | v5e-*) TYPE=v5litepod${TYPE#v5e} ;; esac
}

check_shape() {
  normalize_shape
  if [[ -z $TYPE ]]; then die "no type: give --type=TYPE, for example --type=v5litepod-16"; fi
  if [[ -n $TOPOLOGY && $TYPE == *-* ]]; then
    die "--type=$TYPE says a size already; with --topology give --type=${TYPE%%-*} alone"
  fi
  if [[ -z $TOPOLOGY && $TYPE != *-* ]]; then
    die "--type=$TYPE says no size: give --type=$TYPE-8, say, or --topology as well"
  fi
  if [[ -z $VERSION ]]; then default_version; fi
}

check_main_args() {
  local given=" ${MAIN_ARGS[*]-} "
  case $given in
    *" --config="* | *" --config "*) ;;
    *) die "the run needs a --config: put -- --config=configs/vit.py:VARIANT at the end" ;;
  esac
  case $given in
    *" --workdir=gs://"* | *" --workdir gs://"*) ;;
    *) die "the run needs --workdir=gs://BUCKET/FOLDER after --: a slice's disks go with it" ;;
  esac
}

check() {
  local command=$1
  if [[ -z $NAME ]]; then die "no name: give the slice one with --name=NAME"; fi
  if [[ -z $ZONE ]]; then die "no zone: give --zone=ZONE, for example --zone=us-central2-b"; fi
  if [[ -n $REF && -z $REPO ]]; then die "--ref=$REF goes with --repo=URL"; fi
  case $RETRIES in "" | *[!0-9]*) die "--retries=$RETRIES is not a whole number" ;; esac
  case $POLL in "" | *[!0-9]*) die "--poll=$POLL is not a whole number of seconds" ;; esac
  case $command in all | create) check_shape ;; esac
  case $command in
    all | run) check_main_args ;;
    *) if ((${#MAIN_ARGS[@]})); then die "arguments after -- belong to 'run' and 'all'"; fi ;;
  esac
  if [[ -z $DRY_RUN ]] && ! command -v gcloud >/dev/null; then
    die "gcloud not found; install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
  fi
}

main() {
  case ${1-} in
    "") usage >&2 && exit 2 ;;
    -h | --help | help) usage && exit ;;
    all | create | setup | run | follow | status | delete) ;;
    *) die "unknown command '$1'; known commands: $COMMANDS" ;;
  esac
  local command=$1
  shift
  parse "$@"
  check "$command"
  place
  "$command"
}

main "$@"
