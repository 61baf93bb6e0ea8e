#!/usr/bin/env bash
# Start a vLLM server that decodes with a bundle, ask it something, show what was read, and stop it.
#
#     examples/serve_with_vllm.sh MODEL BUNDLE [vLLM's own options]
#
# In vLLM's environment, with `pip install ./serving` beside it (docs/serving.md). MODEL is the checkpoint whose traces
# trained the bundle. On a GPU add --attention-backend CUSTOM; on a CPU build, --dtype float32.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 MODEL BUNDLE [vLLM's own options]" >&2; exit 2; }
model=$1 bundle=$2
shift 2
[ -f "$bundle/bundle.json" ] || { echo "$0: $bundle: no bundle there; run \`lookahead export\` first" >&2; exit 2; }
port=${PORT:-8000}
python=${PYTHON:-python}
block=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["spec"]["chunking"]["tokens"])' "$bundle/bundle.json")

LOOKAHEAD_BUNDLE=$bundle VLLM_USE_V2_MODEL_RUNNER=0 "$python" -m vllm.entrypoints.openai.api_server \
  --model "$model" --block-size "$block" --port "$port" "$@" &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
until curl -sf "localhost:$port/health" >/dev/null; do
  kill -0 $server 2>/dev/null || { echo "$0: the server stopped; its last lines say why" >&2; exit 1; }
  sleep 1
done

long=$(printf 'The bicycle is kept behind the shed. %.0s' {1..40})
curl -s "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"$long Where is the bicycle? It is\", \"max_tokens\": 100}"
echo
curl -s "localhost:$port/metrics" | grep '^lookahead'
