#!/bin/sh
# Install Dreamscale into a container image. The Dockerfile and the Apptainer definition run the same steps in this order:
#
#     install.sh system                system packages (needs root, and Debian or Ubuntu)
#     install.sh torch                 a Python environment with the torch of constraints.txt
#     install.sh packages              all other packages, in the versions of constraints.txt
#     install.sh dreamscale            Dreamscale itself
#     install.sh check                 check that the packages fit together
#
# PREFIX is the folder of the Python environment, and SOURCE the folder with Dreamscale's code. TORCH_INDEX is the package
# index of torch, such as https://download.pytorch.org/whl/cpu for a build without CUDA; by default pip's own index.
set -eu

PREFIX=${PREFIX:-/opt/dreamscale}
SOURCE=${SOURCE:-/source}
TORCH_INDEX=${TORCH_INDEX:-}
EXTRAS='[s3,neo,mef]'

pip() {
  "$PREFIX/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"
}

install_system() {
  # A compiler is needed for the kernels that DeepSpeed and torch build when they are first used.
  set -- bash ca-certificates g++ git openssh-client procps tini
  command -v python3 >/dev/null || set -- "$@" python3 python3-dev python3-venv
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  apt-get install -y --no-install-recommends "$@"
  rm -rf /var/lib/apt/lists/*
}

install_torch() {
  python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "install.sh: $(python3 --version) is not supported; use a base image with Python 3.11, 3.12 or 3.13" >&2
    exit 2
  }
  python3 -m venv "$PREFIX"
  torch=$(sed -n 's/^torch==/torch==/p' "$SOURCE/constraints.txt")
  # Install torch first: otherwise another package would install the torch of pip's own index.
  if [ -n "$TORCH_INDEX" ]; then
    pip install --index-url "$TORCH_INDEX" "$torch"
  else
    pip install "$torch"
  fi
}

install_packages() {
  # A package without code, so that a change of the code does not install all packages again.
  empty=$(mktemp -d)
  cp "$SOURCE/pyproject.toml" "$SOURCE/README.md" "$SOURCE/LICENSE" "$empty"
  pip install --constraint "$SOURCE/constraints.txt" "$empty$EXTRAS"
  pip uninstall --yes dreamscale
  rm -rf "$empty"
}

install_dreamscale() {
  pip install --constraint "$SOURCE/constraints.txt" "$SOURCE$EXTRAS"
}

check() {
  pip check
  "$PREFIX/bin/dreamscale" --version
}

case ${1:-} in
  system | torch | packages | dreamscale) "install_$1" ;;
  check) check ;;
  *)
    echo "usage: install.sh system|torch|packages|dreamscale|check" >&2
    exit 2
    ;;
esac
