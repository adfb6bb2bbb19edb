#!/usr/bin/env bash
# Train on one machine: a process on each GPU or, without one, two processes on the CPU.
#
#   scripts/launch/one_node.sh CONFIG [key=value …]
#   scripts/launch/one_node.sh configs/tokenizer/nano.yaml schedule.total_steps=100
#
# CUDA_VISIBLE_DEVICES=2,3 chooses GPUs, RANKS=4 says how many processes, PYTHON= which interpreter.
# The same command again goes on from the newest whole checkpoint in output_dir.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# == 0 ? 2 : 0))
fi
python=${PYTHON:-python}

# As many processes as there are GPUs, and a port that nobody listens on: DeepSpeed's own, 29500, is the same
# for every run, so that a second one on this machine would fail to start.
read -r gpus ranks port < <("$python" -c '
import torch
from cat_fast.training import launch
from cat_fast.training.runtime import ranks
print(torch.cuda.device_count(), launch.default_ranks(), ranks.free_port())')
ranks=${RANKS:-$ranks}

if [[ $gpus -eq 0 ]]; then
  export DS_ACCELERATOR=cpu
  count=(--num_gpus "$ranks")                            # what DeepSpeed calls GPUs here are processes
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} && -z ${RANKS:-} ]]; then
  count=() # with --num_gpus DeepSpeed would ignore that choice
else
  count=(--num_gpus "$ranks")
fi

# A job of its own group, to which a signal to this script is passed on: the ranks hear USR1 or Ctrl-C, save and
# end with 0. The launchers would die of them and take the ranks along, or not tell them.
set -m
trap '' USR1
"$python" -m deepspeed.launcher.runner "${count[@]}" --master_port "$port" --module cat_fast.train "$@" < /dev/null &
job=$!
trap 'kill -s USR1 -- "-$job"' TERM USR1 HUP
trap 'kill -s INT -- "-$job"' INT

status=0
wait "$job" || status=$?
while kill -s 0 "$job" 2> /dev/null; do # a signal ends `wait`, not the job
  status=0
  wait "$job" || status=$?
done
exit "$status"
