#!/usr/bin/env bash
# Train the nano models on one GPU: tokenizer, latents of the emoji, text generator.
#
#   scripts/launch/gpu_nano.sh CORPUS
#
# CORPUS is the folder that `cat-fast data corpus` wrote. The same command resumes where it was interrupted.
# Writes runs/gpu_nano, runs/gpu_nano_latents and runs/gpu_nano_generator. PYTHON= selects the interpreter.
set -euo pipefail

if [[ $# -ne 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# == 1 ? 0 : 2))
fi
corpus=$1
python=${PYTHON:-python}
launch=$(dirname "$0")/one_node.sh
export RANKS=1
cat_fast() { "$python" -c 'from cat_fast.cli.main import main; main()' "$@"; }

"$launch" configs/tokenizer/nano_corpus_gpu.yaml data.index="$corpus/train.jsonl" data.held_out="$corpus/held_out.jsonl"
cat_fast data select "$corpus/train.jsonl" --out runs/gpu_nano_emoji.jsonl --keep 'emoji/*' \
  --drop '*1f3f[b-f]*' --drop 'emoji/1f1??-1f1??' --ratios 8,16,16,16,32,32 --optional-ending ', emoji' --no-classes
cat_fast encode-shards runs/gpu_nano_emoji.jsonl -c runs/gpu_nano/model \
  --out runs/gpu_nano_latents --size 128 --batch-size 64
"$launch" configs/generator/nano_corpus_gpu.yaml
