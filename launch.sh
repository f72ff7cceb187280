#!/bin/sh
# Starts LowVRAM Tuner on Linux; the first start installs it. Everything else happens in lowvram_tuner/bootstrap.py.

cd "$(dirname "$(readlink -f "$0")")" || exit 1

works() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# A terminal that a file manager opened closes with its program, so an error waits there for Enter.
own_window() {
    [ -t 0 ] && [ -t 1 ] || return 1
    case "$(ps -o comm= -p "$PPID" 2>/dev/null)" in
        *term* | konsole* | kitty* | alacritty* | foot* | tilix* | ptyxis* | kgx*) return 0 ;;
        *) return 1 ;;
    esac
}

start() {
    for python in python3 python3.12 python3.13 python3.11 python3.14 python3.10 python; do
        if works "$python"; then
            set -- "$python" -s -E -X utf8 -m lowvram_tuner.bootstrap "$@"
            own_window || exec "$@"
            "$@"
            return
        fi
    done
    echo "error: no Python from 3.10 to 3.14 found; on Debian and Ubuntu run 'sudo apt install python3 python3-venv', on Fedora 'sudo dnf install python3', and start again." >&2
    return 1
}

start "$@"
code=$?
if [ "$code" -ne 0 ] && own_window; then
    printf 'Press Enter to close this window. '
    read -r _
fi
exit "$code"
