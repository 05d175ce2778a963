#!/usr/bin/env bash
# Make the environment of lmms-eval: launch/suites/install.sh VENV [PYTHON]
# It lies over the environment of genrecal, whose interpreter is PYTHON (by default .venv beside launch/): torch,
# transformers and genrecal itself are found there, so that a student runs on what it was trained with. What lmms-eval
# needs besides, also where it needs other versions, goes to VENV alone; the environment of genrecal is not written to.
set -euo pipefail
venv=${1:?"usage: $0 VENV [PYTHON]"}
here=$(cd "$(dirname "$0")" && pwd)
python=${2:-$here/../../.venv/bin/python}
"$python" -c 'from importlib import metadata; metadata.version("genrecal")' 2>/dev/null || {
    echo "$python has no genrecal: install it there (launch/install.sh), or name its interpreter: $0 $venv PYTHON" >&2
    exit 1
}
layer=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
index=$venv/genrecal-suites.json
stamp=$venv/.genrecal-installed
wanted=$({ cat "$here"/constraints.txt "$here"/install.sh "$here"/task_index.py "$here"/plugin.py && echo "$layer"; } | sha256sum | cut -d' ' -f1)
finds_model() {
    "$venv/bin/python" -c 'import json, sys; sys.exit("genrecal" not in json.load(open(sys.argv[1]))["models"])' "$index" 2>/dev/null
}
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && finds_model; then
    exit 0
fi
# everything in VENV is about to be deleted
if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ] && ! compgen -G "$venv/lib/python*/site-packages/genrecal_layer.pth" >/dev/null; then
    echo "$venv holds something else than an environment of lmms-eval: name another folder, or remove it first" >&2
    exit 1
fi

echo "Installing lmms-eval 0.7.3 into $venv, over $layer (0.5 GB, some minutes)"
rm -f "$stamp"
"$python" -m venv --clear --without-pip "$venv"
own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# after the packages of VENV, so that those come first
echo "import site; site.addsitedir('$layer')" >"$own/genrecal_layer.pth"
"$venv/bin/python" -m pip --disable-pip-version-check -qq install --no-build-isolation --no-compile --no-warn-conflicts \
    -c "$here/constraints.txt" lmms-eval
# -P: a folder `launch` where the user stands is not the package
"$venv/bin/python" -P -W ignore -m launch.suites.task_index >"$index.tmp" 2>"$venv/task_index.log" || {
    tail -n 20 "$venv/task_index.log" >&2
    exit 1
}
mv "$index.tmp" "$index"
finds_model || {
    echo "lmms-eval does not find genrecal's model: install genrecal anew for $python, then run this again" >&2
    exit 1
}
echo "$wanted" >"$stamp"
echo "Installed into $venv"
