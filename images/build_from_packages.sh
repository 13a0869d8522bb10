#!/bin/bash
# Build the image on a Debian machine that reaches a Debian mirror and a Python package index, but no image registry:
#
#     images/build_from_packages.sh [OPTIONS OF buildah build ...]
#
# mmdebstrap makes the base image from Debian packages, and buildah runs images/Dockerfile on it. Needs root, and the
# Debian packages buildah, mmdebstrap and crun. TAG is the name of the image, and SUITE the release of Debian.
set -euo pipefail
cd "$(dirname "$0")/.."
TAG=${TAG:-dreamscale:latest}
SUITE=${SUITE:-bookworm}
base=localhost/dreamscale-base:$SUITE
# The storage driver vfs works inside containers as well.
export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}

files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
mmdebstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-venv "$SUITE" "$files/base.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$files/base.tar" /
buildah commit --quiet --rm "$container" "$base"
rm "$files/base.tar"
buildah build --file images/Dockerfile --ignorefile images/Dockerfile.dockerignore --build-arg "BASE=$base" \
  --pull-never --tag "$TAG" "$@" .
buildah images "$TAG"
