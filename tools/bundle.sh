#!/bin/sh
# Usage: tools/bundle.sh OUT
#
# Collects in OUT what a machine with a GPU and no network needs to run vkllm, its device tests and its benchmark:
#   wheels/    dependencies for CPython 3.12 on x86-64; vkllm itself too when a python3.12 is here to build it
#   sdist/     vkllm's source with tests, and Kompute's sdist, for a build over there
#   debs/      Vulkan loader and headers, fmt headers, validation layer, glslang and spirv-tools (Debian, unpacked, never installed)
#   run_bundle.sh
# Over there: sh OUT/run_bundle.sh [FOLDER [MODEL.gguf]]. Under 60 MB, or this fails.
set -eu
[ $# = 1 ] || { sed -n 2,3p "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
make --no-print-directory vkllm/kernels.zip
python=$root/.venv/bin/python
rm -rf "$out/wheels" "$out/sdist" "$out/debs"
mkdir -p "$out/wheels" "$out/sdist" "$out/debs"
fetch="$python -m pip -qq --disable-pip-version-check download"

echo "wheels"
dependencies=$("$python" - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
build = [d for d in project["optional-dependencies"]["build"] if not d.startswith("cmake")]  # 30 MB; a compiler's machine has one
test = [d for d in project["optional-dependencies"]["test"] if not d.startswith("selenium")]  # 12 MB; no browser there
print("\n".join(project["dependencies"] + test + build))
PY
)
platforms="--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
           --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64"
printf '%s\n' "$dependencies" >"$out/requirements.txt"
$fetch --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none $platforms \
    --dest "$out/wheels" --requirement "$out/requirements.txt"

echo "sources"
$fetch --no-deps --no-binary :all: --dest "$out/sdist" kp==0.9.0
"$python" -c 'from scikit_build_core.build import build_sdist; import sys; build_sdist(sys.argv[1])' "$out/sdist" >/dev/null

# A machine with the same Python saves the target its compiler. Debian 12's glibc 2.36 is old enough for what runs there.
builder=$(mktemp -d)
trap 'rm -rf "$builder"' EXIT
for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
    "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || continue
    echo "vkllm for $("$candidate" -V)"
    "$candidate" -m venv "$builder/venv"
    mkdir "$builder/kp" && tar -xzf "$out/sdist/kp-0.9.0.tar.gz" -C "$builder/kp"
    KOMPUTE_SOURCE_DIR=$builder/kp/kp-0.9.0 "$builder/venv/bin/python" -m pip -qq --disable-pip-version-check wheel --no-deps \
        --wheel-dir "$out/wheels" "$out"/sdist/vkllm-*.tar.gz
    break
done

echo "Debian packages"
(cd "$out/debs" && apt-get -qq -o APT::Sandbox::User=root download libvulkan1 libvulkan-dev libfmt-dev vulkan-validationlayers glslang-tools spirv-tools)

cp tools/run_bundle.sh "$out/run_bundle.sh"
size=$(du -sm "$out" | cut -f1)
echo "$out: $size MB"
[ "$size" -lt 60 ] || { echo "that is 60 MB or more" >&2; exit 1; }
