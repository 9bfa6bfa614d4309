# Sourced by test.sh and demo.sh: makes virtual environments; needs bash.

# find_python "3.11 3.12": prints the first Python of one of these versions; $PYTHON comes first.
find_python() {
  local candidate version
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
      continue
    if [[ " $1 " == *" $version "* ]]; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python of these versions is here: ${1// /, }; install one, or name it in \$PYTHON." >&2
  return 1
}

# install FOLDER VERSIONS CONSTRAINTS REQUIREMENT…: makes the environment in FOLDER, unless
# setup.cfg, the constraints and the requirements are those of the last time.
install() {
  local folder=$1 versions=$2 constraints=$3 python stamp sum
  shift 3
  stamp=$folder/installed-$(echo "$*" | cksum | cut -d' ' -f1)
  sum=$(cat setup.cfg setup.py "$constraints" | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$sum" ]]; then
    return
  fi
  if [[ ! -x $folder/bin/python ]]; then
    python=$(find_python "$versions")
    "$python" -m venv "$folder"
  fi
  echo "Installing into $folder; the first time this takes minutes."
  "$folder/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint="$constraints" "$@"
  echo "$sum" >"$stamp"
}
