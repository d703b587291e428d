#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $MEGATRAIN_VENV) and installs megatrain with the exact
# versions of requirements.lock. Does nothing where that is already done.
#
#   bash launch/install.sh       installs
#   source launch/install.sh     installs, and puts the environment first on the script's PATH

set -euo pipefail

# The first Python on PATH that setup.py's python_requires allows.
find_python() {
    local python
    for python in "${PYTHON:-python3}" python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "megatrain needs Python 3.11 or 3.12, and found none on PATH (PYTHON=/path/to/python names one)" >&2
    return 1
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
