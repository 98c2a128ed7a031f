#!/bin/sh
# Begins a sweep in DIR, or goes on with the one there: sh deploy/sweep.sh DIR TRACKING_URI TRIALS_AT_ONCE [options]
set -eu
directory=$1 uri=$2 parallel=$3
shift 3
if test -e "$directory/sweep.json"; then set -- --resume "$directory"; else set -- --output "$directory" "$@"; fi
set -- --address auto --tracking-uri "$uri" --parallel "$parallel" "$@"
exec python "$(dirname "$0")/../sweeps/privacy_frontier.py" "$@"
