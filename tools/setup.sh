#!/bin/sh
# Usage: setup.sh build|test PYTHON
# Checks that the machine has what the build (or also the tests) need. What is missing is installed as Debian packages when we are
# root and apt-get is there; otherwise the exact line is printed and the set-up stops.
set -eu
stage=$1
python=${2:-}

missing() {
    includes() { printf '#include <%s>\n' "$1" | c++ -E -x c++ - >/dev/null 2>&1; }
    layer() { ls /usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json /etc/vulkan/explicit_layer.d/VkLayer_khronos_validation.json 2>/dev/null | grep -q .; }
    driver() {
        [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] ||
            ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json 2>/dev/null | grep -q .
    }
    if [ -z "$python" ]; then echo python3 python3-venv python3-dev; else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
        "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
    fi
    command -v c++ >/dev/null || echo g++
    if command -v c++ >/dev/null; then
        includes vulkan/vulkan.hpp || echo libvulkan-dev
        includes fmt/core.h || echo libfmt-dev
    else
        echo libvulkan-dev libfmt-dev
    fi
    driver || echo mesa-vulkan-drivers
    if [ "$stage" = test ]; then
        layer || echo vulkan-validationlayers
        command -v spirv-val >/dev/null || echo spirv-tools
        command -v glslangValidator >/dev/null || echo glslang-tools
    fi
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
install() {
    echo "installing $*"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null
}
export DEBIAN_FRONTEND=noninteractive

# The browser for tests/serve/test_page.py, which skips without it: nothing stops for its sake.
if [ "$stage" = test ] && ! command -v chromedriver >/dev/null && may_install; then
    install chromium chromium-driver 2>/dev/null || echo "no Chromium: the test of the web page will skip"
fi

packages=$(missing | xargs)
[ -n "$packages" ] || exit 0
if may_install && install $packages; then
    packages=$(missing | xargs)
    [ -n "$packages" ] || exit 0
fi
if [ -z "$python" ]; then
    echo "vkllm needs Python 3.11 or newer." >&2
fi
echo "Missing on this machine. On Debian or Ubuntu:" >&2
echo "    sudo apt-get install --no-install-recommends $packages" >&2
echo "then run make again." >&2
exit 1
