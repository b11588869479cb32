#!/bin/sh
# Stream an answer with nothing but curl: server-sent events, one "data: {...}" line for each piece of text.
# Usage: examples/stream_http.sh [prompt] [host:port]
# Needs a prompt without quotes and backslashes, since it is put into JSON as it is.
set -eu
prompt=${1:-Once upon a time}
server=${2:-localhost:8000}

echo "All at once:"
curl -sS "http://$server/v2/models/llm/generate" \
  -d "{\"text_input\": \"$prompt\", \"max_tokens\": 32, \"temperature\": 0}"

printf '\n\nAs it is written:\n'
curl -sSN "http://$server/v2/models/llm/generate_stream" \
  -d "{\"text_input\": \"$prompt\", \"stream\": true, \"sampling_parameters\": \"{\\\"max_tokens\\\": 32, \\\"temperature\\\": 0}\"}"
