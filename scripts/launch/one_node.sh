#!/usr/bin/env bash
# Train on one machine: one process per GPU or, without GPUs, two processes on the CPU.
#
#   scripts/launch/one_node.sh CONFIG [key=value …]
#   scripts/launch/one_node.sh configs/tokenizer/nano.yaml schedule.total_steps=100
#
# CUDA_VISIBLE_DEVICES=2,3 selects GPUs, RANKS=4 the number of processes, PYTHON= the interpreter.
# The same command resumes from the newest valid checkpoint in output_dir.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# == 0 ? 2 : 0))
fi
python=${PYTHON:-python}

# One process per GPU, and a free port: DeepSpeed's default, 29500, is the same for every run, so a second run
# on this machine would fail to start.
read -r gpus ranks port < <("$python" -c '
import torch
from cat_fast.hardware import run_device_type
from cat_fast.training import launch
from cat_fast.training.runtime import ranks
print(torch.cuda.device_count() if run_device_type() == "cuda" else 0, launch.default_ranks(), ranks.free_port())')
ranks=${RANKS:-$ranks}

if [[ $gpus -eq 0 ]]; then
  export DS_ACCELERATOR=cpu
  count=(--num_gpus "$ranks") # on a CPU this is the number of processes
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} && -z ${RANKS:-} ]]; then
  count=() # with --num_gpus DeepSpeed would ignore this selection
else
  count=(--num_gpus "$ranks")
fi

# The job gets a process group of its own: on a signal, or if this process is killed, the ranks save and exit.
exec "$python" -m cat_fast.processes.group \
  "$python" -m deepspeed.launcher.runner "${count[@]}" --master_port "$port" --module cat_fast.train "$@"
