#!/usr/bin/env bash
# See halka work, on this machine alone: a throwaway cluster of several peers answers a question.
#
#   install/try.sh [--peers N] ["question"]
#
# Leaves behind nothing but .venv and .cache in this checkout.
set -euo pipefail

# shellcheck source=install/venv.sh
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

extras=llama
if mlx_runs; then extras=llama,mlx; fi
make_venv "$extras"
exec "$venv/bin/python" "$root/install/trial.py" ${1+"$@"}
