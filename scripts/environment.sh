# Sourced by the other scripts: makes .venv beside pyproject.toml, installs the package with the extras named, pinned.
#
#   activate_environment EXTRAS        (for example: activate_environment demo)

activate_environment() {
    local root extras stamp python
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    extras="$1"
    stamp="$root/.venv/installed-$extras"
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Error: $python is missing or older than 3.10" >&2
        echo >&2
        echo "hint: name another one: PYTHON=python3.11 $0" >&2
        return 1
    fi
    # A half-made environment (interrupted, or moved with the folder) is made again from nothing.
    if [ -e "$root/.venv" ] && ! { grep -q "$root/.venv" "$root/.venv/bin/activate" \
        && "$root/.venv/bin/python" -c 'import pip'; } 2>/dev/null; then
        if ! compgen -G "$root/.venv/installed-*" > /dev/null && [ ! -e "$root/.venv/made-by-scripts" ]; then
            echo "Error: .venv holds no environment with pip, and was not made by these scripts" >&2
            echo >&2
            echo "hint: move it away: mv .venv .venv-mine" >&2
            return 1
        fi
        rm -rf "$root/.venv"
    fi
    if [ ! -e "$root/.venv" ]; then
        mkdir "$root/.venv"
        touch "$root/.venv/made-by-scripts"
        "$python" -m venv "$root/.venv" || return 1
    fi
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
    if [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ] || [ "$root/scripts/constraints.txt" -nt "$stamp" ]; then
        echo "installing into .venv (a minute or two the first time)" >&2
        python -m pip install --quiet --disable-pip-version-check \
            -c "$root/scripts/constraints.txt" -e "$root[$extras]" || return 1
        touch "$stamp"
    fi
}
