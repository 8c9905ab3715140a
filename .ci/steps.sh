# What the scripts here share; sourced at the root of the tree.
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes would compile the same sources
# need PACKAGE PROGRAM...: installs Debian's package where a program is missing.
need() {
  local package=$1 program
  for program in "${@:2}"; do
    command -v "$program" > /dev/null || { apt-get update -qq && apt-get install -y -qq "$package" && return; }
  done
}
# Says how long each step took.
step() {
  local start=$SECONDS
  "$@"
  echo "==> $*: $((SECONDS - start)) s"
}
