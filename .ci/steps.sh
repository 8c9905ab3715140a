# What the scripts here share; sourced at the root of the tree.
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes would compile the same sources
# need PACKAGE PROGRAM: installs Debian's package where the program is missing.
need() {
  command -v "$2" > /dev/null || { apt-get update -qq && apt-get install -y -qq "$1"; }
}
# Says how long each step took.
step() {
  local start=$SECONDS
  "$@"
  echo "==> $*: $((SECONDS - start)) s"
}
