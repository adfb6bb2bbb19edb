#!/usr/bin/env bash
# Train on several machines that this one reaches by ssh without a password.
#
#   scripts/launch/several_nodes.sh HOSTFILE CONFIG [key=value …]
#   scripts/launch/several_nodes.sh hosts configs/tokenizer/cat_c16_64xA100.yaml data.shards='/data/shards/*.tar'
#
# HOSTFILE has a line a machine, and says how many of its GPUs to use:
#
#   node1 slots=8
#   node2 slots=8
#
# Every machine needs this folder and its environment under the same path, output_dir on storage that all of
# them share (each rank writes its part of a checkpoint there), and the data. MASTER_PORT= is another port than
# 29500, PYTHON= another interpreter than python.
set -euo pipefail

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# < 2 ? 2 : 0))
fi
hostfile=$1
shift
python=${PYTHON:-python}

if [[ ! -r $hostfile ]]; then
  echo "error: hostfile $hostfile: no such file; it needs a line like 'node1 slots=8' a machine" >&2
  exit 2
fi
mapfile -t hosts < <(sed -e 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
if [[ ${#hosts[@]} -eq 0 ]]; then
  echo "error: hostfile $hostfile names no machine; it needs a line like 'node1 slots=8' a machine" >&2
  exit 2
fi
if ! command -v pdsh > /dev/null; then
  echo "error: DeepSpeed starts its processes on other machines with pdsh, which is not installed here" >&2
  exit 2
fi

# Better told here, by name, than by half a run that waits for the other half.
for host in "${hosts[@]}"; do
  if ! ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" test -d "$PWD"; then
    echo "error: $host: cannot be reached by ssh without a password, or has no folder $PWD" >&2
    exit 2
  fi
done

# Other machines do not see this shell's environment. DeepSpeed passes on what begins with NCCL, PYTHON or UCX,
# and the lines NAME=VALUE of a file .deepspeed_env here; on machines with several networks that is the place
# for NCCL_SOCKET_IFNAME.
trap '' USR1 # ends the launcher otherwise; the ranks hear it, save and end
exec "$python" -m deepspeed.launcher.runner \
  --hostfile "$hostfile" \
  --master_addr "${hosts[0]}" \
  --master_port "${MASTER_PORT:-29500}" \
  --module cat_fast.train "$@"
