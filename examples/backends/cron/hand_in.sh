#!/usr/bin/env bash
# Hand in every *.jsonl file of $OUTBOX as a batch and move it to $OUTBOX/done, under the batch's id; one that is empty or
# refused goes to $OUTBOX/failed, and the others go on. Ends with 1 if one failed.
#
# Safe to repeat and to be killed: the same content is the same batch, so a file that was handed in and not moved is not
# handed in twice. The same questions on another day are another batch: a file with the content of one in done/ gets blank
# lines at its end, which are no lines of the batch. So done/ is the memory: when you clear it, keep the names.
set -euo pipefail
shopt -s nullglob
mkdir -p "$OUTBOX/done" "$OUTBOX/failed"
exec 9> "$OUTBOX/.lock"
flock -n 9 || exit 0 # the one before is still at it
agentq=${AGENTQ:-agentq}
"$agentq" batch list --limit 1 > /dev/null # nobody answers: all files stay for the next time

submit() { # sets batch and code
  code=0
  batch=$("$agentq" batch submit --workflow "${WORKFLOW:-default}" "$1") || code=$?
}

failed=0
for file in "$OUTBOX"/*.jsonl; do
  submit "$file"
  while ((code == 0)) && compgen -G "$OUTBOX/done/*.$batch.jsonl" > /dev/null; do
    { cat "$file" && find "$OUTBOX/done" -type f -printf '\n'; } > "$OUTBOX/.longer"
    mv -f "$OUTBOX/.longer" "$file"
    submit "$file"
  done
  if ((code == 0)); then
    mv "$file" "$OUTBOX/done/$(basename "$file" .jsonl).$batch.jsonl"
    echo "$batch"
  elif ((code == 2)) || [[ -n $batch ]]; then # refused, or a batch that failed at once
    mv --backup=numbered "$file" "$OUTBOX/failed/"
    echo "hand_in: $file was not handed in, it is in $OUTBOX/failed now" >&2
    failed=1
  else # nobody answers any more
    exit "$code"
  fi
done
exit "$failed"
