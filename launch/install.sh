#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $MEGATRAIN_VENV) and installs megatrain with the exact
# versions of requirements.lock. Does nothing where that is already done.
#
#   bash launch/install.sh       installs
#   source launch/install.sh     installs, and puts the environment first on the script's PATH

set -euo pipefail

# The interpreter that PYTHON names; else the first on PATH that setup.py's python_requires allows.
find_python() {
    local python version found="" candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        version="$(version_of "$python")" || continue
        case "$version" in
        3.11 | 3.12 | 3.13)
            echo "$python"
            return
            ;;
        esac
        found+="; $python is Python $version"
    done
    if [[ -n "${PYTHON:-}" ]]; then
        found="PYTHON=$PYTHON can't be taken: ${found#*is }"
        [[ "$found" != *": " ]] || found+="no such program runs here"
        found+=". "
    else
        found="found none on PATH$found. "
    fi
    echo "megatrain needs Python 3.11, 3.12 or 3.13: ${found}PYTHON=/path/to/python names one" \
        "(for 3.14, megatron-core has no wheel yet)" >&2
    return 2
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Changes whenever the environment must be installed anew.
fingerprint() {
    local root="$1" python="$2"
    (cd "$root" && { echo "$root"; "$python" --version; cat requirements.lock setup.py; }) |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

install_megatrain() {
    local root="$1" venv="$2" python stamp wanted
    python="$(find_python)"
    stamp="$venv/megatrain-install.sha256"
    wanted="$(fingerprint "$root" "$python")"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    if [[ -x "$venv/bin/python" && "$(version_of "$venv/bin/python")" != "$(version_of "$python")" ]]; then
        echo "$venv is an environment of Python $(version_of "$venv/bin/python"), and $python is" \
            "$(version_of "$python"): delete that folder, or name another by MEGATRAIN_VENV" >&2
        return 2
    fi
    echo "Installing megatrain into $venv ..."
    rm -f "$stamp"
    if ! "$python" -m venv "$venv"; then
        echo "$python cannot make virtual environments; on Debian and Ubuntu, install the package python3-venv" >&2
        return 1
    fi
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
    # torch alone first: its index or build is the one thing that machines choose differently
    "${pip[@]}" "$(grep '^torch==' "$root/requirements.lock")"
    "${pip[@]}" -r "$root/requirements.lock"
    "${pip[@]}" --no-deps --no-build-isolation -e "$root" # builds with the locked setuptools
    echo "$wanted" >"$stamp"
}

# -P: a folder of links to this one (tests make one) uses this one's environment
megatrain_root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && cd .. && pwd)"
megatrain_venv="${MEGATRAIN_VENV:-$megatrain_root/.venv}"
install_megatrain "$megatrain_root" "$megatrain_venv"
megatrain_venv="$(cd "$megatrain_venv" && pwd)"
export PATH="$megatrain_venv/bin:$PATH"
