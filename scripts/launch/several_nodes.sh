#!/usr/bin/env bash
# Train on several machines that are reachable from this one by ssh without a password.
#
#   scripts/launch/several_nodes.sh HOSTFILE CONFIG [key=value …]
#   scripts/launch/several_nodes.sh hosts configs/tokenizer/cat_c16_64xA100.yaml data.shards='/data/shards/*.tar'
#
# HOSTFILE has one line per machine, with the number of its GPUs to use:
#
#   node1 slots=8
#   node2 slots=8
#
# Every machine needs this folder and its environment under the same path, the data, and output_dir on storage
# that all of them share, as each rank writes its part of a checkpoint there. MASTER_PORT= sets the port (29500)
# and PYTHON= the interpreter (python).
set -euo pipefail

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# < 2 ? 2 : 0))
fi
hostfile=$1
shift
python=${PYTHON:-python}

if [[ ! -r $hostfile ]]; then
  echo "error: hostfile $hostfile: no such file; expected one line per machine, such as 'node1 slots=8'" >&2
  exit 2
fi
mapfile -t hosts < <(sed -e 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
if [[ ${#hosts[@]} -eq 0 ]]; then
  echo "error: hostfile $hostfile: no machine found; expected one line per machine, such as 'node1 slots=8'" >&2
  exit 2
fi
if ! command -v pdsh > /dev/null; then
  echo "error: DeepSpeed starts processes on other machines with pdsh, which is not installed" >&2
  exit 2
fi

# Check every machine first: otherwise the reachable ranks would start and wait for the others.
for host in "${hosts[@]}"; do
  if ! ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" test -d "$PWD"; then
    echo "error: $host: cannot be reached by ssh without a password, or folder $PWD is missing there" >&2
    exit 2
  fi
done

# Other machines do not get this shell's environment. DeepSpeed forwards variables that start with NCCL, PYTHON
# or UCX, and the lines NAME=VALUE of a file .deepspeed_env in this folder. On machines with several networks,
# set NCCL_SOCKET_IFNAME there.
trap '' USR1 # would kill the launcher; the ranks handle it, save and exit
exec "$python" -m deepspeed.launcher.runner \
  --hostfile "$hostfile" \
  --master_addr "${hosts[0]}" \
  --master_port "${MASTER_PORT:-29500}" \
  --module cat_fast.train "$@"
