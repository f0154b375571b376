#!/bin/sh
# Usage: run_bundle.sh [FOLDER [MODEL.gguf]]
#
# Beside what tools/bundle.sh collected: installs vkllm from it, without network, into FOLDER (default: a temporary one), runs the
# device tests, then the benchmark on `tiny` and on MODEL. Needs CPython 3.12 on x86-64 and a Vulkan driver; nothing is installed
# outside FOLDER. Exit status: that of the tests, or of the benchmark.
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
model=${2:-}
mkdir -p "$work"
work=$(cd "$work" && pwd)
python=
for candidate in ${PYTHON:-} python3 python3.12; do
    if "$candidate" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then python=$candidate && break; fi
done
[ -n "$python" ] || { echo "run_bundle.sh needs CPython 3.12 with pip; set PYTHON to it" >&2; exit 1; }

# Headers, loader and tools: unpacked, never installed.
for deb in "$bundle"/debs/*.deb; do
    if command -v dpkg-deb >/dev/null; then dpkg-deb -x "$deb" "$work/root"; else
        mkdir -p "$work/root" && ar p "$deb" data.tar.xz | tar -xJ -C "$work/root"
    fi
done
lib=$work/root/usr/lib/x86_64-linux-gnu
export PATH="$work/root/usr/bin:$PATH"
if ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'; then # the machine's loader first; the layer's library from ours
    mkdir -p "$work/lib" && cp -P "$lib"/libVkLayer* "$work/lib/"
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+:}$work/lib"
else
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+:}$lib"
fi
export VK_LAYER_PATH="$work/root/usr/share/vulkan/explicit_layer.d"
if [ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && ! ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json >/dev/null 2>&1; then
    found=$(ls /usr/local/*/share/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json 2>/dev/null | paste -sd: -) || true
    [ -z "$found" ] || export VK_DRIVER_FILES="$found" VK_ICD_FILENAMES="$found"
fi

# vkllm: the wheel, or a build from source where there is none.
pip="$python -m pip -qq --disable-pip-version-check install --no-index --find-links $bundle/wheels --no-compile --upgrade --target $work/site"
$pip --requirement "$bundle/requirements.txt"
export PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1
if ls "$bundle"/wheels/vkllm-*cp312*.whl >/dev/null 2>&1; then
    $pip --no-deps "$bundle"/wheels/vkllm-*cp312*.whl
else
    mkdir -p "$work/kp" && tar -xzf "$bundle/sdist/kp-0.9.0.tar.gz" -C "$work/kp"
    ln -sf libvulkan.so.1 "$lib/libvulkan.so" # the development package's link, in case the loader's package came alone
    KOMPUTE_SOURCE_DIR=$work/kp/kp-0.9.0 CMAKE_PREFIX_PATH="$work/root/usr" VULKAN_SDK="$work/root/usr" PATH="$work/site/bin:$PATH" \
        CXXFLAGS="-I$work/root/usr/include" LIBRARY_PATH="$lib" \
        $pip --no-deps --no-build-isolation "$bundle"/sdist/vkllm-*.tar.gz
fi

# The tests come from the source package, the code that they test from what was installed.
mkdir -p "$work/source" "$work/tests-root"
tar -xzf "$bundle"/sdist/vkllm-*.tar.gz -C "$work/source" --strip-components 1
rm -rf "$work/tests-root/tests" && cp -r "$work/source/tests" "$work/source/pyproject.toml" "$work/tests-root/"
export VKLLM_CACHE_DIR="$work/cache"
cd "$work/tests-root"
vkllm() { "$python" -c 'import sys; sys.argv[0] = "vkllm"; from vkllm.cli import main; main()' "$@"; }
"$python" -c 'from vkllm.vk import choose_device, list_devices
for d in list_devices(): print(f"{d.index}: {d.name} ({d.kind}), {d.driver_name} {d.driver_info}")
print("tests run on:", choose_device(list_devices()).name)'
status=0
tests=$(ls -d tests/vk tests/shaders tests/chain 2>/dev/null || true)
"$python" -m pytest -p no:cacheprovider $tests || status=$?
for m in tiny $model; do vkllm bench "$m" --json || status=$?; done
exit $status
