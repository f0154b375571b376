#!/bin/sh
# Usage: sid.sh TESTS...
# Runs tests in a Debian sid system of its own (2 GB in /var/tmp, removed afterwards), whose Mesa and validation layers are years
# newer than those of Debian 12: its lavapipe has cooperative matrices. Needs root and a Debian mirror; exits with 77 without them.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
cannot() {
    echo "sid.sh: $*" >&2
    exit 77
}

[ "$(id -u)" = 0 ] || cannot "needs root, for debootstrap and chroot"
command -v apt-get >/dev/null || cannot "needs a Debian system"
unshare --mount mount -t proc proc /proc 2>/dev/null || cannot "may not mount here"
[ "$(df -Pk /var/tmp | awk 'NR == 2 { print $4 }')" -gt 4000000 ] || cannot "needs 4 GB in /var/tmp"
command -v debootstrap >/dev/null || apt-get install -y -qq --no-install-recommends debootstrap >/dev/null || cannot "no debootstrap"
mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN)' 'Created-By: Packages' | sed -n 's/ Debian$//p' | head -n 1)
root=$(mktemp -d /var/tmp/vkllm-sid.XXXXXX)
trap 'rm -rf "$root"' EXIT

debootstrap --variant=minbase \
    --include=ca-certificates,g++,glslang-tools,libfmt-dev,libvulkan-dev,make,mesa-vulkan-drivers,python3-dev,python3-venv,spirv-tools,vulkan-validationlayers \
    sid "$root" "${mirror:-http://deb.debian.org/debian}" >"$root.log" 2>&1 || {
    tail -n 3 "$root.log" >&2
    rm -f "$root.log"
    cannot "debootstrap failed"
}
rm -f "$root.log"
for file in /etc/resolv.conf /etc/pip.conf; do [ ! -f "$file" ] || cp -f "$file" "$root$file"; done
cp -rf /etc/ssl/certs/. "$root/etc/ssl/certs/"
mkdir "$root/src"
tar -C "$here" --exclude=./.venv --exclude=./build --exclude=./dist --exclude=__pycache__ -cf - . | tar -C "$root/src" -xf -

# The mounts live in a namespace of their own, and end with it.
unshare --mount sh -c '
    root=$1; shift
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} \
        sh -c "cd /src && make -s .venv/run.stamp && .venv/bin/python -m pip -qq install pytest pytest-timeout hypothesis &&
               exec .venv/bin/python -m pytest -rs \"\$@\"" - "$@"
' - "$root" "$@"
