#!/bin/sh
# Passwords for deploy/compose.yaml, made once and readable by their owner alone.
set -eu
file="$(dirname "$0")/.env"
test -e "$file" && exit 0
umask 077
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
{
  echo "POSTGRES_PASSWORD=$(secret)"
  echo "MINIO_ROOT_USER=raytrust"
  echo "MINIO_ROOT_PASSWORD=$(secret)"
} > "$file"
