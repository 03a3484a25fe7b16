# shellcheck shell=bash
# Makes the checkout's .venv for try.sh and test.sh, which source this file. Safe to run again and
# again: a stamp with the checksum of pyproject.toml says that nothing is to be done.
# Works with bash 3.2 (macOS).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
ticker=

note() { printf '%s\n' "$*" >&2; }

die() {
  note "halka: $1"
  shift
  for line in ${1+"$@"}; do note "  $line"; done
  exit 1
}

stop_ticker() {
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    ticker=
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
  fi
}

# A line that shows that time passes while something long runs: every second on a terminal, every
# 30 s elsewhere.
start_ticker() {
  (
    pause_pid=
    trap 'if [ -n "$pause_pid" ]; then kill "$pause_pid" 2>/dev/null; fi; exit 0' TERM INT
    seconds=0
    pause=30
    if [ -t 2 ]; then pause=1; fi
    while true; do
      if [ -t 2 ]; then
        printf '\r\033[K  %s, %d s' "$1" "$seconds" >&2
      else
        printf '  %s, %d s\n' "$1" "$seconds" >&2
      fi
      sleep "$pause" &
      pause_pid=$!
      wait "$pause_pid"
      seconds=$((seconds + pause))
    done
  ) &
  ticker=$!
  trap stop_ticker EXIT
}

python_fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if python_fits "$candidate"; then
      command -v "$candidate"
      return 0
    fi
  done
  die "there is no Python 3.11 or newer here; install one:" \
    "Debian, Ubuntu: sudo apt install python3 python3-venv" \
    "Arch:           sudo pacman -S python" \
    "macOS:          brew install python" \
    "or name one:    PYTHON=/path/to/python3 $0"
}

explain_pip() {
  tail -n 25 "$venv/install.log" >&2 || true
  if ! command -v "${CXX:-c++}" >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1 &&
    ! command -v clang++ >/dev/null 2>&1; then
    die "llama.cpp could not be built: there is no C++ compiler here; install one:" \
      "Debian, Ubuntu: sudo apt install build-essential" \
      "Arch:           sudo pacman -S base-devel" \
      "macOS:          xcode-select --install"
  fi
  die "the installation failed; the whole story: $venv/install.log" \
    "run the same command again when the cause is gone; what is built is kept"
}

# The tap in C of this checkout: built by pip, and again here when its source is a newer one.
make_tap() { "$venv/bin/python" -IS "$root/backends/llama_cpp/tap_library.py"; }

# holds A,B,C X,Y: whether all of the second list are in the first.
holds() {
  old_ifs=$IFS
  IFS=,
  for each in $2; do
    case ",$1," in *",$each,"*) ;; *)
      IFS=$old_ifs
      return 1
      ;;
    esac
  done
  IFS=$old_ifs
}

# mlx_runs: whether this is a Mac that MLX has wheels for (Apple silicon, macOS 14 or newer).
mlx_runs() {
  [ "$(uname -s)" = Darwin ] && [ "$(uname -m)" = arm64 ] &&
    [ "$(sw_vers -productVersion 2>/dev/null | cut -d . -f 1)" -ge 14 ] 2>/dev/null
}

# make_venv EXTRAS: .venv with the project in it (editable), and its extras, such as llama,test.
make_venv() {
  extras=$1
  stamp=$venv/halka-$extras
  mark="$(cksum <"$root/pyproject.toml") $root"
  if [ -x "$venv/bin/halka" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    for done in "$venv"/halka-*; do
      if [ "$(cat "$done" 2>/dev/null)" = "$mark" ] && holds "${done##*/halka-}" "$extras"; then
        make_tap
        return 0
      fi
    done
  fi
  if ! python_fits "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    note "making .venv with $python"
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 ||
      die "$python cannot make a virtual environment; install what it lacks:" \
        "Debian, Ubuntu: sudo apt install python3-venv"
  fi
  what="installing halka and what it needs"
  if ! "$venv/bin/python" -c 'import llama_cpp' >/dev/null 2>&1; then
    what="building llama.cpp: about 3 minutes, once"
  fi
  start_ticker "$what"
  # CMAKE_ARGS of the caller reaches llama.cpp's build, for GPUs and the like.
  (cd "$root" && "$venv/bin/python" -m pip install --progress-bar off \
    --disable-pip-version-check -e ".[$extras]") >"$venv/install.log" 2>&1 || {
    stop_ticker
    explain_pip
  }
  stop_ticker
  make_tap
  printf '%s' "$mark" >"$stamp"
}
