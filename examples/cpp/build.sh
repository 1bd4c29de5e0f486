#!/usr/bin/env bash
# build.sh [FOLDER] - compile verify_bundle into FOLDER (default: here).
#
# CC, CXX, CFLAGS: compilers and flags. ORT_INCLUDE: the folder of onnxruntime_cxx_api.h.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
c=$here/../c
to=${1:-$here}
mkdir -p "$to"
include=$("$c/find_header.sh" onnxruntime_cxx_api.h)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

warnings="-Wall -Wextra -Werror"
for name in error json npz manifest goldens; do
    # shellcheck disable=SC2086 # CFLAGS are several words
    ${CC:-cc} -std=c11 $warnings -O2 ${CFLAGS:-} -c "$c/$name.c" -o "$objects/$name.o"
done
# shellcheck disable=SC2086
${CXX:-c++} -std=c++17 $warnings -O2 ${CFLAGS:-} -isystem "$include" -I "$c" \
    "$here/verify_bundle.cpp" "$objects"/*.o -o "$to/verify_bundle" -ldl
echo "built $to/verify_bundle"
