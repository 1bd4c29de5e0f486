#!/usr/bin/env bash
# build.sh [FOLDER] - compile verify_bundle and classify into FOLDER (default: here).
#
# CC, CFLAGS: compiler and flags. ORT_INCLUDE: the folder of onnxruntime_c_api.h.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
to=${1:-$here}
mkdir -p "$to"
include=$("$here/find_header.sh" onnxruntime_c_api.h)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

# -isystem: warnings of onnxruntime's header are not ours
# shellcheck disable=SC2206 # CFLAGS are several words
flags=(-std=c11 -Wall -Wextra -Werror -O2 ${CFLAGS:-} -isystem "$include")
common=()
for name in error json npz manifest goldens bundle; do
    ${CC:-cc} "${flags[@]}" -c "$here/$name.c" -o "$objects/$name.o"
    common+=("$objects/$name.o")
done
for program in verify_bundle classify; do
    ${CC:-cc} "${flags[@]}" "$here/$program.c" "${common[@]}" -o "$to/$program" -ldl -lm
done
echo "built $to/verify_bundle and $to/classify"

library=$(python3 - 2>/dev/null <<'PY' || true
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi"
print(min(map(str, folder.glob("libonnxruntime.so.*"))))
PY
)
[ -z "$library" ] || echo "run: ORT_LIB=$library $to/verify_bundle BUNDLE"
