#!/usr/bin/env bash
# On a machine with an accelerator: is all of it right there, and how fast is it beside its peers?
#
#   benchmarks/on_device.sh [--quick] [PAGE]
#
# Writes one page, benchmarks/results/on_device.md or PAGE, in less than 8 minutes. It needs what the
# package needs, and pytest for the calls; of peers it takes those that are there. --quick shows that
# everything runs, on a processor too. The page is written line by line: what stops a part, or takes
# too long, costs only the rest of that part.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=()
page=${OUT:-benchmarks/results}/on_device.md
for argument in "$@"; do
  case $argument in
    --quick) quick=(--quick) ;;
    -*) echo "usage: $0 [--quick] [PAGE]" >&2; exit 2 ;;
    *) page=$argument ;;
  esac
done
mkdir -p "$(dirname "$page")"
rm -f "$page"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch takes memory of the same device
python=${PYTHON:-python3}

part() { # name, seconds
  timeout --kill-after=5 "$(($2 + 15))" \
    "$python" -m benchmarks.on_device "$1" "$page" --seconds "$2" "${quick[@]}"
  local status=$?
  [ $status = 0 ] || printf '\n`%s` was stopped, with status %d.\n' "$1" $status >> "$page"
  return $status
}

status=0
part checks 150 || status=1
part kernels 110 || status=1
part times 180 || status=1
echo "$page"
exit $status
