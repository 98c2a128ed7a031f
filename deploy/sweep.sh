#!/bin/sh
# Begins a sweep in DIR, or goes on with the one that is there: sh deploy/sweep.sh DIR TRACKING_URI [options of the sweep]
set -eu
directory=$1 uri=$2
shift 2
if test -e "$directory/sweep.json"; then set -- --resume "$directory"; else set -- --output "$directory" "$@"; fi
exec python "$(dirname "$0")/../sweeps/privacy_frontier.py" --address auto --tracking-uri "$uri" "$@"
