#!/usr/bin/env bash
# Hand in every *.jsonl file of $OUTBOX as a batch and move it to $OUTBOX/done. Safe to repeat and to be killed: the same
# file is the same batch, so one that was handed in and not moved is not handed in twice.
set -euo pipefail
shopt -s nullglob
mkdir -p "$OUTBOX/done"
exec 9> "$OUTBOX/.lock"
flock -n 9 || exit 0 # the one before is still at it
for file in "$OUTBOX"/*.jsonl; do
  # a file without a good line ends with code 1, but is a batch with an id: it must not keep the files after it waiting
  batch=$("${AGENTQ:-agentq}" batch submit --workflow "${WORKFLOW:-default}" "$file" | head -n 1) || [ -n "$batch" ]
  mv "$file" "$OUTBOX/done/$(basename "$file" .jsonl).$batch.jsonl"
  echo "$batch"
done
