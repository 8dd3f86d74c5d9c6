#!/usr/bin/env bash
# Constraints for what is added to an image: from stdin, what it has, as `pip freeze` prints it; from FILE, versions for the
# rest. A package that the image has from a file or a repository binds nothing, and gives way to nothing.
#
#   uv pip freeze --system | image_constraints.sh FILE
set -euo pipefail
awk '
    function name(line) { sub(/[ =;@\[].*/, "", line); gsub(/[-_.]+/, "-", line); return tolower(line) }
    /^(#|-|[ \t]*$)/ { next }
    FILENAME == "-" { have[name($0)]; if (/==/) print; next }
    !(name($0) in have)
' - "$1"
