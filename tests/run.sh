#!/usr/bin/env bash
# Every test that needs no GPU. Options: tests/run.sh --help
exec python3 "$(dirname "$0")/run.py" "$@"
