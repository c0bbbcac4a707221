#!/bin/sh
# Checks the tools that `make` needs before it installs anything: Python 3.11 with venv, git, a C++ compiler. sh scripts/dev/check_tools.sh
missing=0
need() { # message
    printf 'missing: %s\n' "$1" >&2
    missing=1
}
version=$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
case "$version" in
3.11) "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv module (Debian and Ubuntu: apt-get install python$version-venv)" ;;
*) need "Python 3.11, found '${version:-none}' (Debian and Ubuntu: apt-get install python3.11 python3.11-venv; then make PYTHON=python3.11 ...)" ;;
esac
command -v git >/dev/null || need "git (apt-get install git)"
command -v make >/dev/null || need "make (apt-get install make)"
printf 'int main() { return 0; }\n' >"${TMPDIR:-/tmp}/check_tools_$$.cpp"
"${CXX:-c++}" -o "${TMPDIR:-/tmp}/check_tools_$$" "${TMPDIR:-/tmp}/check_tools_$$.cpp" 2>/dev/null ||
    need "a C++ compiler: DeepSpeed builds one small CPU operator (apt-get install g++)"
rm -f "${TMPDIR:-/tmp}/check_tools_$$" "${TMPDIR:-/tmp}/check_tools_$$.cpp"
exit $missing
