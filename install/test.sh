#!/usr/bin/env bash
# The whole test suite, or the part that the arguments (pytest's own) name.
#
#   install/test.sh [pytest arguments]
#
# Three passes: what needs only a processor, two at once; whole agents, which mostly wait for each
# other, two files at once; network namespaces and what measures this machine's speed, alone.
set -euo pipefail

# shellcheck source=install/venv.sh
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# HALKA_TEST_EXTRAS=llama,test where MLX has no wheel (Linux: glibc 2.35): its tests are skipped.
make_venv "${HALKA_TEST_EXTRAS:-llama,mlx,test}"
cd "$root"
python=$venv/bin/python

if [ $# -gt 0 ]; then
  exec "$python" -m pytest -rs "$@"
fi

for tool in ip systemd-analyze; do
  command -v "$tool" >/dev/null 2>&1 ||
    note "halka: without \`$tool\` some tests are skipped (Debian: sudo apt install iproute2 systemd)"
done

results=$(mktemp -d)
trap 'stop_ticker; rm -rf "$results"' EXIT
failed=0

# pass NAME FOLDERS AND FILES… -- PYTEST ARGUMENTS…
pass() {
  name=$1
  shift
  folders=
  while [ "$1" != -- ]; do
    if [ -e "$1" ]; then folders="$folders $1"; fi
    shift
  done
  shift
  if [ -z "$folders" ]; then return 0; fi
  code=0
  # shellcheck disable=SC2086  # a list of our own folder names
  "$python" -m pytest -rs --junitxml="$results/$name.xml" "$@" $folders || code=$?
  # 5: none collected, as in a checkout without these tests
  if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then failed=$code; fi
}

alone="tests/e2e/test_measured_speed.py tests/e2e/test_streaming.py tests/e2e/test_try.py"
besides=
for file in $alone; do besides="$besides --ignore $file"; done

pass quick tests/tidy tests/unit tests/simulated -- -n 2 --dist loadscope
# shellcheck disable=SC2086  # lists of our own file names
pass whole tests/e2e -- -n 2 --dist loadfile $besides
# shellcheck disable=SC2086
pass alone tests/netns $alone --

"$python" - "$results" <<'PYTHON'
import pathlib, sys
from xml.etree import ElementTree

total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
seconds = 0.0
for file in pathlib.Path(sys.argv[1]).glob("*.xml"):
    for suite in ElementTree.parse(file).getroot().iter("testsuite"):
        seconds += float(suite.get("time", 0))
        for key in total:
            total[key] += int(suite.get(key, 0))
print(
    f"\nhalka: {total['tests']} tests, {total['failures'] + total['errors']} failed, "
    f"{total['skipped']} skipped, {seconds:.0f} s"
)
PYTHON
exit "$failed"
