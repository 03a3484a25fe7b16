#!/usr/bin/env bash
# Makes halka a service of this machine, or takes it away again. Safe to run twice: a second run is
# an upgrade in place, and finishes what an interrupted one left half done.
#
# Everything is inside functions, and the last line calls the first: a half-copied script does
# nothing. Written for bash 3.2, which is what macOS has. What it makes, it remembers in a small
# file beside the virtual environment, so that --uninstall removes exactly that.
#
# HALKA_INSTALL_PYTHON names the Python to use, HALKA_INSTALL_EXTRAS the extras ("" for none),
# HALKA_INSTALL_PIP more arguments for pip. For the tests, HALKA_INSTALL_ROOT puts a system
# installation under another root.
set -eu

usage() {
    cat <<'END'
Usage: install/install.sh [--system | --user] [--no-service] [--dry-run]
       install/install.sh [--system | --user] --uninstall [--purge] [--dry-run]

  --system      for the whole machine; needs root; starts at boot (default when run as root)
  --user        for this account only; needs no root (default otherwise)
  --no-service  the `halka` command only, nothing that starts by itself
  --uninstall   undo all of it; models, keys and settings stay
  --purge       with --uninstall: models, keys and settings go, too
  --dry-run     say what would be done, change nothing
END
}

main() {
    action=install mode='' service=yes purge=no dry=no explained=no
    while [ $# -gt 0 ]; do
        case "$1" in
            --system | --user) mode="${1#--}" ;;
            --uninstall) action=uninstall ;;
            --purge) purge=yes ;;
            --no-service) service=no ;;
            --dry-run) dry=yes ;;
            -h | --help) usage && exit 0 ;;
            *) usage >&2 && fail 2 "there is no option $1" ;;
        esac
        shift
    done
    [ "$purge" = no ] || [ "$action" = uninstall ] || fail 2 "--purge goes with --uninstall"
    checkout="$(cd "$(dirname "$0")/.." && pwd)"
    root="${HALKA_INSTALL_ROOT:-}"
    system="$(uname -s)"
    unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
    choose_mode
    choose_paths
    umask 022
    trap 'last_words $?' EXIT
    "$action"
}

# Words and small tools ---------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

fail() { # CODE SENTENCE: 1 something failed, 2 wrong usage
    code="$1"
    shift
    explained=yes
    printf 'halka: %s\n' "$*" >&2
    exit "$code"
}

last_words() { # CODE
    if [ "$1" != 0 ] && [ "$explained" = no ]; then
        say "halka: stopped half way. Mend what the lines above name, then run the same command" \
            "again: it goes on from here." >&2
    fi
}

run() { # COMMAND…: run it, or only show it
    if [ "$dry" = yes ]; then
        printf '  would run:'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

remember() { # LINE: for --uninstall; lines from before the folder exists wait in `unwritten`
    [ "$dry" = no ] || return 0
    unwritten="${unwritten:-}$*"$'\n'
    if [ -d "$lib" ]; then
        printf '%s' "$unwritten" >>"$record"
        unwritten=''
    fi
}

make_folder() { # PATH: with its missing parents, each of them remembered
    [ ! -d "$1" ] || return 0
    make_folder "$(dirname "$1")"
    run mkdir "$1"
    remember "folder $1"
}

# Where things go ---------------------------------------------------------------------------------

choose_mode() {
    case "$system" in
        Linux | Darwin) ;;
        *) fail 2 "halka runs on Linux and macOS, and this is $system" ;;
    esac
    is_root=no
    [ "$(id -u)" != 0 ] || is_root=yes
    if [ -z "$mode" ] && [ "$is_root" = yes ]; then
        mode=system
    elif [ -z "$mode" ] && [ "$system" = Darwin ] && [ "$service" = yes ]; then
        fail 2 "macOS keeps programs of a login away from the local network, but not services of" \
            "the machine. Run: sudo $0 --system   (or, knowing this: $0 --user)"
    elif [ -z "$mode" ]; then
        mode=user
    fi
    if [ "$mode" = system ] && [ "$is_root" = no ] && [ -z "$root" ] && [ "$dry" = no ]; then
        fail 2 "installing for the whole machine needs root. Run: sudo $0 --system   (or: $0 --user)"
    fi
}

choose_paths() {
    case "$mode-$system" in
        system-Linux)
            unit="$root/etc/systemd/system/halka.service" state="$root/var/lib/halka" logs=''
            account=halka
            ;;
        user-Linux)
            unit="$HOME/.config/systemd/user/halka.service" state="$HOME/.local/state/halka" logs=''
            ;;
        system-Darwin)
            unit="$root/Library/LaunchDaemons/dev.halka.agent.plist"
            state="$root/Library/Application Support/halka" logs="$root/Library/Logs/halka"
            account=_halka domain=system
            ;;
        user-Darwin)
            unit="$HOME/Library/LaunchAgents/dev.halka.agent.plist"
            state="$HOME/Library/Application Support/halka" logs="$HOME/Library/Logs/halka"
            domain="gui/$(id -u)"
            ;;
    esac
    if [ "$mode" = system ]; then
        lib="$root/opt/halka" bin="$root/usr/local/bin"
    else
        lib="$HOME/.local/share/halka" bin="$HOME/.local/bin"
    fi
    venv="$lib/venv" link="$bin/halka" record="$lib/installed.txt"
}

# Install -----------------------------------------------------------------------------------------

install() {
    if [ -e "$link" ] || [ -L "$link" ]; then
        [ "$(readlink "$link" || true)" = "$venv/bin/halka" ] ||
            fail 1 "$link exists and is not this halka. Move it away, then run this again."
    fi
    find_python
    check_compiler
    make_venv
    make_folder "$bin"
    run ln -sfn "$venv/bin/halka" "$link"
    started=no
    if [ "$service" = yes ]; then
        [ "$mode" = user ] || "make_account_$system"
        "make_service_$system"
    fi
    [ "$dry" = yes ] || report
}

find_python() {
    python='' seen=''
    for candidate in ${HALKA_INSTALL_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        command -v "$candidate" >/dev/null || continue
        why="$("$candidate" "$checkout/install/check_python.py" "$mode" 2>/dev/null)" ||
            why="$candidate does not run"
        if [ -z "$why" ] || [ "$candidate" = "${HALKA_INSTALL_PYTHON:-}" ]; then
            python="$(command -v "$candidate")"
            return 0
        fi
        seen="$seen $why."
    done
    fail 1 "halka needs Python 3.11 or newer, with venv.${seen:- There is none here.}" \
        "$(tools_command)"
}

usual_extras() { # MLX has wheels for Apple silicon from macOS 14 on; llama.cpp runs everywhere
    if [ "$system" = Darwin ] && [ "$(uname -m)" = arm64 ] &&
        [ "$(sw_vers -productVersion 2>/dev/null | cut -d . -f 1)" -ge 14 ] 2>/dev/null; then
        printf 'llama,mlx'
    else
        printf 'llama'
    fi
}

check_compiler() {
    case " ${HALKA_INSTALL_EXTRAS-llama} " in *llama*) ;; *) return 0 ;; esac
    if [ "$system" = Darwin ]; then
        ! xcode-select -p >/dev/null 2>&1 || return 0
    else
        for candidate in c++ g++ clang++; do
            ! command -v "$candidate" >/dev/null || return 0
        done
    fi
    fail 1 "llama.cpp is compiled for this machine, and there is no C++ compiler. $(tools_command)"
}

tools_command() { # the sentence with this system's own command
    kind=Darwin
    if [ "$system" = Linux ]; then
        # shellcheck disable=SC1091
        kind="$(. "$root/etc/os-release" 2>/dev/null && echo " ${ID:-} ${ID_LIKE:-} ")" || kind=''
    fi
    case "$kind" in
        Darwin) say "Run: xcode-select --install; brew install python@3.13" ;;
        *' arch '*) say "Run: sudo pacman -S --needed python base-devel" ;;
        *' debian '* | *' ubuntu '*)
            say "Run: sudo apt install python3 python3-venv build-essential   (where python3 is older" \
                "than 3.11: python3.11 python3.11-venv build-essential)"
            ;;
        *' fedora '* | *' rhel '*) say "Run: sudo dnf install python3 gcc-c++" ;;
        *) say "Install Python 3.11 or newer and a C++ compiler with this system's package manager." ;;
    esac
}

make_venv() {
    make_folder "$lib"
    # A new Python of the system leaves the old environment without its packages: make it anew.
    if [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        run rm -rf "$venv"
    fi
    [ -e "$venv" ] || run "$python" -m venv "$venv"
    extras="${HALKA_INSTALL_EXTRAS-$(usual_extras)}"
    say "Installing halka into $venv. The first time llama.cpp is compiled: a few minutes."
    # shellcheck disable=SC2086
    run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        ${HALKA_INSTALL_PIP:-} "$checkout${extras:+[$extras]}"
}

make_account_Linux() {
    if ! id -u "$account" >/dev/null 2>&1; then
        remember "account $account"
        run useradd --system --user-group --no-create-home --home-dir /var/lib/halka \
            --shell /usr/sbin/nologin --comment "halka" "$account"
    fi
    for group in render video; do # these open the GPU; not every machine has them
        ! getent group "$group" >/dev/null || run usermod --append --groups "$group" "$account"
    done
}

make_account_Darwin() {
    if ! id -u "$account" >/dev/null 2>&1; then
        remember "account $account"
        number=300 # below 500: a role account, hidden from the login window
        taken=" $(dscl . -list /Users UniqueID | awk '{print $2}' | tr '\n' ' ')$(
            dscl . -list /Groups PrimaryGroupID | awk '{print $2}' | tr '\n' ' ')"
        while case "$taken" in *" $number "*) true ;; *) false ;; esac do
            number=$((number + 1))
        done
        run dscl . -create "/Groups/$account" PrimaryGroupID "$number"
        run dscl . -create "/Users/$account" UniqueID "$number"
        run dscl . -create "/Users/$account" PrimaryGroupID "$number"
        run dscl . -create "/Users/$account" NFSHomeDirectory "/Library/Application Support/halka"
        run dscl . -create "/Users/$account" UserShell /usr/bin/false
        run dscl . -create "/Users/$account" RealName halka
        run dscl . -create "/Users/$account" IsHidden 1
    fi
}

make_service_Linux() {
    make_folder "$(dirname "$unit")"
    if [ "$mode" = system ]; then
        write_unit "$checkout/systemd/halka.service"
        if [ ! -d "$root/run/systemd/system" ]; then
            start_by_hand="sudo systemctl enable --now halka"
            return 0
        fi
    else
        write_unit "$checkout/systemd/user/halka.service"
        if ! systemctl --user show-environment >/dev/null 2>&1; then
            start_by_hand="systemctl --user enable --now halka"
            return 0
        fi
        start_at_boot
    fi
    control daemon-reload
    control enable --quiet halka.service
    if ! control restart halka.service; then
        fail 1 "halka is installed, but its service did not start. See why:" \
            "journalctl $([ "$mode" = system ] || echo --user) --unit halka --lines 30"
    fi
    started=yes
}

control() { # systemctl for the chosen mode
    if [ "$mode" = system ]; then run systemctl "$@"; else run systemctl --user "$@"; fi
}

write_unit() { # FILE: as it is, unless the tests' root is in its paths
    if [ "$dry" = yes ]; then
        say "  would write: $unit"
        return 0
    fi
    sed "s|/opt/halka|$root/opt/halka|; s|=/var/lib/halka|=$root/var/lib/halka|" "$1" >"$unit.new"
    chmod 644 "$unit.new"
    mv -f "$unit.new" "$unit"
}

start_at_boot() { # an account's services run without a login only where lingering is on
    [ "$(loginctl show-user "$(id -un)" --property=Linger --value 2>/dev/null)" != yes ] || return 0
    remember linger
    run loginctl enable-linger "$(id -un)" ||
        say "halka will run while you are logged in. For a start at boot:" \
            "sudo loginctl enable-linger $(id -un)"
}

make_service_Darwin() {
    for folder in "$(dirname "$unit")" "$logs" "$(dirname "$state")"; do make_folder "$folder"; done
    if [ ! -d "$state" ]; then run mkdir "$state"; fi # not remembered: it outlives --uninstall
    run chmod 700 "$state" "$logs"
    [ "$mode" = user ] || run chown -R "$account:$account" "$state" "$logs"
    if [ "$dry" = yes ]; then
        say "  would write: $unit"
    else
        "$venv/bin/python" "$checkout/install/agent_plist.py" "$mode" \
            "$checkout/launchd/dev.halka.agent.plist" "$venv" "$state" "$logs" >"$unit.new"
        chmod 644 "$unit.new"
        mv -f "$unit.new" "$unit"
    fi
    run launchctl enable "$domain/dev.halka.agent"
    launchd_forget
    if run launchctl bootstrap "$domain" "$unit"; then
        started=yes
    elif [ "$mode" = user ] && run launchctl bootstrap "user/$(id -u)" "$unit"; then
        started=yes # over SSH there is no gui domain
    else
        fail 1 "halka is installed, but its service did not start. See why: launchctl print" \
            "$domain/dev.halka.agent; tail $logs/agent.log"
    fi
}

launchd_forget() { # stops the service where it runs, and waits until launchd has let go of it
    for place in "$domain" "user/$(id -u)"; do
        if launchctl print "$place/dev.halka.agent" >/dev/null 2>&1; then
            run launchctl bootout "$place/dev.halka.agent" || true
            tries=0
            while [ "$dry" = no ] && [ "$tries" -lt 30 ] &&
                launchctl print "$place/dev.halka.agent" >/dev/null 2>&1; do
                sleep 1
                tries=$((tries + 1))
            done
        fi
    done
}

report() {
    say ""
    if [ "$started" = yes ]; then
        say "halka is installed and runs as a service, now and after every start of this machine."
    elif [ "$service" = no ]; then
        say "halka is installed, without a service. Start it by hand: $link run"
    else
        say "halka is installed, but its service could not be started: systemd is not running here."
        say "Where it runs: $start_by_hand"
        say "By hand: $link run"
    fi
    say "  command   $link"
    say "  program   $venv"
    [ "$service" = no ] || say "  service   $unit"
    say "  data      $state (keys, settings in config.toml, models)"
    say "  API       http://127.0.0.1:42552/v1 on this machine"
    say "  how it is halka status"
    say "  undo      $0 --$mode --uninstall"
    case ":$PATH:" in
        *":$bin:"*) ;;
        *) say "$bin is not in your PATH. Add it: export PATH=\"$bin:\$PATH\"" ;;
    esac
    if [ "$mode-$system-$service" = user-Darwin-yes ]; then
        say "macOS may keep halka away from the local network (other machines then stay unseen)." \
            "If so: sudo $0 --system"
    fi
}

# Uninstall ---------------------------------------------------------------------------------------

uninstall() {
    if [ ! -e "$lib" ] && [ ! -e "$unit" ] && [ ! -L "$link" ] && [ "$purge" = no ]; then
        say "There is no halka here (--$mode)."
        return 0
    fi
    "forget_service_$system"
    run rm -f "$unit" "$unit.new"
    [ "$system" != Linux ] || ! systemd_is_there || control daemon-reload
    [ "$(readlink "$link" || true)" != "$venv/bin/halka" ] || run rm -f "$link"
    remembered=''
    [ ! -f "$record" ] || remembered="$(cat "$record")"
    [ -z "$logs" ] || run rm -rf "$logs"
    if [ "$purge" = yes ]; then
        run rm -rf "$state"
    elif [ "$mode" = system ] && [ -d "$state" ]; then
        # The account goes, its number may be given to another: nobody but root reads the keys.
        run chown -R 0:0 "$state"
        run chmod 700 "$state"
    fi
    printf '%s\n' "$remembered" | forget_remembered
    run rm -rf "$lib"
    printf '%s\n' "$remembered" | forget_folders
    [ "$dry" = yes ] || say "halka is gone from here."
    [ "$purge" = yes ] || [ ! -d "$state" ] ||
        say "Models, keys and settings stay in $state; --uninstall --purge removes them, too."
}

systemd_is_there() {
    if [ "$mode" = system ]; then
        [ -d "$root/run/systemd/system" ]
    else
        systemctl --user show-environment >/dev/null 2>&1
    fi
}

forget_service_Linux() {
    [ -e "$unit" ] || return 0
    if systemd_is_there; then
        control disable --quiet --now halka.service || say "The service was not running."
        control reset-failed halka.service 2>/dev/null || true
    fi
    for wanted in multi-user.target.wants default.target.wants; do
        run rm -f "$(dirname "$unit")/$wanted/halka.service"
    done
}

forget_service_Darwin() {
    launchd_forget
}

forget_remembered() { # lines of the record → accounts and lingering undone
    while read -r kind what; do
        case "$kind" in
            account)
                id -u "$what" >/dev/null 2>&1 || continue
                if [ "$system" = Darwin ]; then
                    run dscl . -delete "/Users/$what"
                    run dscl . -delete "/Groups/$what"
                else
                    run userdel "$what"
                fi
                ;;
            linger) run loginctl disable-linger "$(id -un)" || true ;;
        esac
    done
}

forget_folders() { # lines of the record → folders that it made and nobody else uses are removed
    awk '{ line[NR] = $0 } END { for (i = NR; i > 0; i--) print line[i] }' |
        while read -r kind what; do
            [ "$kind" = folder ] || continue
            if [ "$dry" = yes ]; then
                run rmdir "$what"
            else
                rmdir "$what" 2>/dev/null || true
            fi
        done
}

main "$@"
