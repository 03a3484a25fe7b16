#!/bin/bash
# Every command of the system that the installer calls, in one file with many names: what each was
# asked goes to $FAKES/log, what it would have changed to files in $FAKES. (See test_installer.py.)
name="${0##*/}"
line="$name${*:+ $*}"
[ "$name" = id ] || [ "$name" = uname ] || echo "${line//$'\n'/ }" >>"$FAKES/log"

has() { grep -qxF -- "$2" "$FAKES/$1" 2>/dev/null; }
add() { has "$1" "$2" || echo "$2" >>"$FAKES/$1"; }
drop() {
    has "$1" "$2" || return 6
    grep -vxF -- "$2" "$FAKES/$1" >"$FAKES/$1.new"
    mv "$FAKES/$1.new" "$FAKES/$1"
}

act() {
    case "$name $*" in
        'uname -s') echo "$FAKE_SYSTEM" ;;
        'uname -m') echo "${FAKE_MACHINE:-arm64}" ;;
        'sw_vers -productVersion') echo "${FAKE_MACOS:-15.6.1}" ;;
        'id -u') echo "$FAKE_UID" ;;
        'id -un') echo tester ;;
        'id -u '*) has accounts "$2" ;;
        'getent group '*) has groups "$2" ;;
        'useradd '*) add accounts "${!#}" ;;
        'userdel '*) drop accounts "$1" ;;
        'usermod '*) has accounts "${!#}" ;;
        'dscl . -list '*) printf 'root 0\n_some 300\n_other 301\n' ;;
        'dscl . -create /Users/'*) add accounts "${3#/Users/}" ;;
        'dscl . -create '*) ;;
        'dscl . -delete /Users/'*) drop accounts "${3#/Users/}" ;;
        'dscl . -delete '*) ;;
        'loginctl show-user '*) ! has linger tester || echo yes ;;
        'loginctl enable-linger tester') add linger tester ;;
        'loginctl disable-linger tester') drop linger tester ;;
        'systemctl --user show-environment') [ -z "${FAKE_NO_SYSTEMD:-}" ] ;;
        'systemctl '*' restart halka.service' | 'systemctl restart halka.service')
            [ -z "${FAKE_BROKEN_SERVICE:-}" ] && add running halka.service
            ;;
        'systemctl '*'disable '*) drop running halka.service ;;
        'systemctl '*) ;;
        'launchctl print '*) has running "$2" ;;
        'launchctl bootout '*) drop running "$2" ;;
        'launchctl bootstrap gui/'*) [ -z "${FAKE_SSH:-}" ] && add running "$2/dev.halka.agent" ;;
        'launchctl bootstrap '*) ! has running "$2/dev.halka.agent" && add running "$2/dev.halka.agent" ;;
        'launchctl enable '*) ;;
        'chown '*) ;;
        'xcode-select -p' | c++*) [ -z "${FAKE_NO_COMPILER:-}" ] ;;
        'python3.13 -m venv '*) mkdir "$3" && mkdir "$3/bin" && ln -s "$FAKES/bin/python3.13" "$3/bin/python" ;;
        'python -m pip --version') [ -x "${0%/*}/python" ] ;;
        'python -m pip install '*) echo '#!/bin/sh' >"${0%/*}/halka" && chmod 755 "${0%/*}/halka" ;;
        python*check_python.py*) ;;
        python*) exec "$REAL_PYTHON" "$@" ;;
        *) echo "the installer calls $name $*, which no test expects" >&2 && return 99 ;;
    esac
}

act "$@"
code=$?
# The plug is pulled: the installer dies, just after the command that $FAKE_KILL_AFTER names.
if [ -n "${FAKE_KILL_AFTER:-}" ] && [ "$(wc -l <"$FAKES/log")" -eq "$FAKE_KILL_AFTER" ]; then
    kill -9 "$PPID"
fi
exit $code
