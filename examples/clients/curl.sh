#!/usr/bin/env bash
# Two calls of one workflow with plain curl: curl.sh http://127.0.0.1:30000/v1 MODEL
set -euo pipefail
base_url=${1:?a base URL with /v1 is missing} model=${2:?a model is missing}
workflow="shell-$$-$RANDOM"
deadline_ms=$(($(date +%s%3N) + 30000))

ask() { # stage, prompt, more headers
  local stage=$1 prompt=$2 left_ms=$((deadline_ms - $(date +%s%3N)))
  shift 2
  curl --silent --show-error --fail-with-body "$base_url/chat/completions" \
    --header "Content-Type: application/json" \
    --header "x-hexgen-workflow-id: $workflow" \
    --header "x-hexgen-workflow-type: headlines" \
    --header "x-hexgen-workflow-deadline-ms: $((left_ms > 1 ? left_ms : 1))" \
    --header "x-hexgen-stage: $stage" "$@" \
    --data "{\"model\": \"$model\", \"max_tokens\": 16,
             \"messages\": [{\"role\": \"user\", \"content\": \"$prompt\"}]}"
  echo
}

ask draft "Write a headline."
ask shorten "Make it shorter." --header "x-hexgen-workflow-final: 1"
