#!/usr/bin/env bash
# Starts the local server on http://127.0.0.1:8000 with the built-in model.
#
#   ./run_server.sh [--host ADDRESS] [--port N] [--model NAME] [--device DEVICE] [--models FOLDER]
#
# Token, limits, origins and more are environment variables: nbs/00_settings/06_table.ipynb lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python}
if ! "$python" -c "import diffusion_workers, fastapi, uvicorn" 2>/dev/null; then
    echo "run_server.sh: this Python has no diffusion_workers: run pip install ./openapi/client_libs/python ." >&2
    exit 2
fi
start='import sys; from diffusion_workers.cli.main import main; sys.exit(main(["serve", *sys.argv[1:]]))'
exec "$python" -c "$start" "$@"  # in place of this shell, so that signals reach the server
