#!/usr/bin/env bash
# get_header.sh [FOLDER] - fetch onnxruntime's C and C++ headers and print the folder they are in.
#
# They are those of Debian's package libonnxruntime-dev. apt downloads it with this machine's own
# settings (archive, proxy) and checks its signature; nothing is installed and no root is needed.
# A second call finds them in FOLDER (default: edgetune/onnxruntime-headers in the user's cache).
set -euo pipefail

suite=trixie # the first Debian release that has the package
package=libonnxruntime-dev
to=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/edgetune/onnxruntime-headers}

die() { printf 'get_header.sh: %s\n' "$*" >&2; exit 2; }

found() { # the folder with the header, if it has been fetched
    [ -d "$to" ] || return 1
    local header
    header=$(find "$to" -name onnxruntime_c_api.h -print -quit)
    [ -n "$header" ] && dirname "$header"
}

found && exit 0
for tool in apt-get apt-config dpkg-deb; do
    command -v "$tool" >/dev/null || die "needs $tool; set ORT_INCLUDE to a folder with onnxruntime_c_api.h instead"
done
mkdir -p "$to"
to=$(cd "$to" && pwd)
work=$(mktemp -d "$to/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# a private apt tree that reads the one suite from the archive that this machine uses
private_tree() {
    local archive key='' file
    archive=$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null |
        grep -v security | sort -u | head -n 1)
    [ -n "$archive" ] || die "this machine's apt names no archive"
    for file in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
        [ -r "$file" ] && key=$file && break
    done
    [ -n "$key" ] || die "no Debian archive keyring (package debian-archive-keyring)"
    mkdir -p "$work"/{none,state/lists/partial,cache/archives/partial}
    : >"$work/status"
    printf 'deb [signed-by=%s] %s %s main\n' "$key" "$archive" "$suite" >"$work/sources.list"
    {
        printf 'Dir::State "%s/state";\nDir::State::status "%s/status";\n' "$work" "$work"
        printf 'Dir::Cache "%s/cache";\nDir::Etc::SourceList "%s/sources.list";\n' "$work" "$work"
        printf 'Dir::Etc::SourceParts "%s/none";\nDir::Etc::PreferencesParts "%s/none";\n' "$work" "$work"
        printf 'Dir::Etc::Parts "%s/none";\nDir::Etc::Preferences "/dev/null";\n' "$work"
        printf 'APT::Sandbox::User "";\nAcquire::Languages "none";\nAcquire::Retries "3";\n'
        apt-config dump | grep -E '^Acquire::https?::Proxy' || true
    } >"$work/apt.conf"
    export APT_CONFIG=$work/apt.conf
    apt-get -q update >"$work/log" 2>&1 || die "apt-get update: $(tail -n 1 "$work/log")"
}

fetch() { (cd "$work" && apt-get -q download "$package" >"$work/log" 2>&1); }

fetch || { private_tree && fetch; } || die "apt-get download $package: $(tail -n 1 "$work/log")"
mkdir "$work/tree"
dpkg-deb --fsys-tarfile "$work/$package"_*.deb | tar -x -C "$work/tree" --wildcards '*/include/*'
mv -T "$work/tree/usr/include" "$to/include" 2>/dev/null || true # another call may have been first
found || die "$package holds no onnxruntime_c_api.h"
