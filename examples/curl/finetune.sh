#!/usr/bin/env bash
# Fine-tunes a classifier from a CSV file, follows it to its end, and asks it, with curl, jq and perl:
#
#   ./finetune.sh MODEL reviews.csv 'a good film'
#
# MODEL is `projects/…/models/…`, or the path of a model folder on the server. Which service, and who calls:
#
#   SHARDYARD_URL         where it answers HTTP [http://127.0.0.1:7480]
#   SHARDYARD_CA          TLS: the service's authority, a PEM file, or `system` for those that curl knows
#   SHARDYARD_TOKEN       who calls; without TLS it is sent to this machine only
#   SHARDYARD_TOKEN_FILE  a file with the token, read again for every call, if SHARDYARD_TOKEN is not set
#   SHARDYARD_PROJECT     the project [default]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
url=${SHARDYARD_URL:-http://127.0.0.1:7480}
ca=${SHARDYARD_CA:-}
token=${SHARDYARD_TOKEN:-}
token_file=${SHARDYARD_TOKEN_FILE:-}
parent=projects/${SHARDYARD_PROJECT:-default}

main() {
  (($# >= 2)) || fail "give a model, a CSV file with the columns text and label, and texts"
  check
  local model=$1 file=$2 dataset job texts
  shift 2
  dataset=$(upload "$file")
  job=$(request "$model" "$dataset" | call JobService/CreateJob | jq -r .name)
  echo "submitted $job"
  watch "$job"
  job=$(jq -nc --arg name "$job" '{$name}' | call JobService/GetJob)
  [[ $(jq -r .state <<<"$job") == STATE_SUCCEEDED ]] || fail "$(jq -r '"\(.name) ended as \(.state)"' <<<"$job")"
  (($#)) || return 0
  texts=$(jq -nc '$ARGS.positional' --args "$@")
  jq -c --argjson texts "$texts" '{model, instances: [$texts[] | {text: .}]}' <<<"$job" | call ModelService/Predict |
    jq -r --argjson texts "$texts" '[.predictions, $texts] | transpose[] | .[1] as $text | .[0].classification |
      "\(.label) \([.scores[].score] | max * 1000 | round / 1000) \($text)"'
}

request() { # MODEL DATASET: sent again with the same requestId, the job is accepted once.
  jq -nc --arg parent "$parent" --arg model "$1" --arg dataset "$2" --arg id "$(uuid)" '{
    $parent, requestId: $id,
    job: {spec: {
      fineTuning: {textClassification: {}},
      model: (if $model | startswith("projects/") then {$model} else {uri: $model} end),
      trainData: {$dataset},
      optimization: {epochs: 2}
    }}
  }'
}

upload() { # FILE: the name of its data set. The same content has the same name, and is sent once.
  local id said
  [[ -r $1 ]] || fail "$1 cannot be read"
  id=d-$(digest "$1")
  said=$(perl "$here/frames.pl" upload "$parent" "$id" "$1" | stream DatasetService/CreateDataset | tail -n 1)
  [[ -n $said ]] || exit 1 # Why is said.
  case $(code "$said") in
    '' | already_exists) echo "$parent/datasets/$id" ;;
    *) fail "$(message "$said")" ;;
  esac
}

# Every event once and in order: a stream that breaks is opened again behind the last event that came.
watch() { # JOB
  local after=0 line end
  while :; do
    end=
    while IFS= read -r line; do
      if [[ $line == '{"end":'* ]]; then
        end=$line
      else
        jq -r --argjson after "$after" "$lines" <<<"$line"
        after=$(jq -r --argjson after "$after" '[$after, (.lastSequence // 0 | tonumber)] | max' <<<"$line")
      fi
    done < <(jq -nc --arg name "$1" --arg after "$after" '{$name, afterSequence: $after}' |
      perl "$here/frames.pl" send | stream JobService/WatchJob)
    case $(code "$end") in
      '') [[ -z $end ]] || return 0 ;; # A stream ends well only after the last event.
      unavailable) ;;
      *) fail "$(message "$end")" ;;
    esac
    sleep 1
  done
}

# shellcheck disable=SC2016 # It is jq's.
lines='
  def short: . // "UNSPECIFIED" | ltrimstr("STATE_");
  if (.afterSequence // 0 | tonumber) > $after then "events are missing" | halt_error else . end |
  .events[]? | select((.sequence | tonumber) > $after) | "\(.sequence) " +
    if .state then "\(.state.from | short) → \(.state.to | short)"
    elif .progress then "step \(.progress.step): loss \(.progress.loss)"
    elif .evaluation then "evaluation: \(.evaluation.metrics)"
    else keys - ["attempt", "id", "sequence", "time"] | .[0] end'

call() { # METHOD: a request from the standard input, its answer to the standard output.
  local said request tries
  request=$(cat)
  for tries in {1..20}; do # While the service is busy; the requestId stays the same.
    ((tries == 1)) || sleep 3
    said=$(ask -H 'content-type: application/json' --data-binary @- --write-out '\n%{http_code}' \
      "$url/shardyard.v1.$1" <<<"$request") || fail "$(unreached $?)"
    [[ ${said##*$'\n'} =~ ^(429|503|504)$ ]] || break
  done
  [[ ${said##*$'\n'} == 200 ]] || fail "$(jq -r '"\(.code): \(.message)"' <<<"${said%$'\n'*}")"
  printf '%s\n' "${said%$'\n'*}"
}

stream() { # METHOD: framed requests from the standard input, the messages of the answer to the standard output.
  { ask -H 'content-type: application/connect+json' --no-buffer -X POST -T - "$url/shardyard.v1.$1" ||
    unreached $? >&2; } | perl "$here/frames.pl" receive
}

ask() { # No --location: a token does not follow to another server. It is not an argument, which others could read.
  local options=(--silent --show-error)
  [[ -z $ca || $ca == system ]] || options+=(--cacert "$ca")
  ! is_here || options+=(--noproxy '*')
  curl "${options[@]}" --header @<(authorization) "$@"
}

authorization() {
  local found=$token
  [[ -n $found || -z $token_file ]] || found=$(<"$token_file")
  [[ -z $found ]] || printf 'authorization: Bearer %s\n' "$found"
}

check() {
  [[ $url =~ ^https?://[^/]+$ ]] || fail "SHARDYARD_URL is $url; give https://HOST:PORT alone"
  [[ -z $token_file || -r $token_file ]] || fail "SHARDYARD_TOKEN_FILE: $token_file cannot be read"
  [[ -z $ca || $ca == system || -r $ca ]] || fail "SHARDYARD_CA: $ca cannot be read"
  [[ -z $token$token_file || $url == https://* ]] || is_here || fail "$url is not on this machine and the" \
    "connection is not encrypted: the token would be readable on the way; use https://"
}

is_here() { [[ $url =~ ^https?://(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?$ ]]; }

unreached() { # CODE of curl, which has said what happened.
  case $1 in
    35 | 51 | 58 | 60 | 77) echo "no TLS with $url; is SHARDYARD_CA its authority, and the name right?" ;;
    *) echo "no answer from $url; is the address right? It begins with https:// if the service has TLS." ;;
  esac
}

code() { jq -r '.end.error.code // empty' <<<"$1"; }
message() { jq -r '.end.error | "\(.code): \(.message)"' <<<"$1"; }
digest() { { sha256sum "$1" 2>/dev/null || shasum -a 256 "$1"; } | cut -c1-32; }
uuid() { uuidgen 2>/dev/null | tr A-F a-f || cat /proc/sys/kernel/random/uuid; }
fail() { echo "$*" >&2 && exit 1; }

main "$@"
