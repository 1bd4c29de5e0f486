#!/usr/bin/env bash
# find_header.sh HEADER - print the folder of onnxruntime's HEADER on this machine.
#
# Looked at: $ORT_INCLUDE, pkg-config, and where distributions put it.
set -euo pipefail

for folder in "${ORT_INCLUDE:-}" "$(pkg-config --variable=includedir libonnxruntime 2>/dev/null || true)" \
    /usr/include/onnxruntime /usr/local/include/onnxruntime /usr/local/include; do
    if [ -n "$folder" ] && [ -e "$folder/$1" ]; then
        printf '%s\n' "$folder"
        exit 0
    fi
done
echo "no $1 found; set ORT_INCLUDE to its folder, or fetch it: export ORT_INCLUDE=\$($(dirname "$0")/get_header.sh)" >&2
exit 2
