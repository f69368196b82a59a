#!/bin/sh
# A statically linked conmon, from conmon's own sources:
#
#   deploy/build-conmon.sh SOURCE PROGRAM      SOURCE: an unpacked release; PROGRAM: the file to write
#
# Then `conmon = "PROGRAM"` in execgate.toml. Distributions link conmon to the libraries of systemd, for a log driver
# that execs do not use; each exec pays for their loading, and each session for their private pages: docs/performance.md
# has the figures. conmon's makers publish such a program with their releases, too.
#
# Needs make, gcc, pkg-config and GLib with its static library (Debian: build-essential pkg-config libglib2.0-dev).
set -eu

[ $# = 2 ] && [ -f "$1/src/conmon.c" ] || {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}
source=$1 program=$2
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -R "$source/." "$build"
mkdir -p "$build/bin"
# The linker's warnings are about users and plug-ins, which GLib can look up and conmon does not.
make -s -C "$build" DISABLE_SYSTEMD=1 PKG_CONFIG='pkg-config --static' CFLAGS='-std=c99 -O2' LDFLAGS='-static -s' \
    git-vars bin/conmon 2>"$build/words" || {
    cat "$build/words" >&2
    exit 1
}
"$build/bin/conmon" --version
install -m 755 "$build/bin/conmon" "$program"
