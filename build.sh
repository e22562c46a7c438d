#!/usr/bin/env bash
# Generates the client libraries from openapi/ez_diffusion_api.yaml.
#
#   ./build.sh                      generate, then install the Python client editable
#   ./build.sh generate             generate only
#   ./build.sh check                exit 1 and show a diff where the generated code is stale; writes and installs nothing
#   ./build.sh install_openapi_lib  generate, build the Python client's wheel and install that
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

spec=openapi/ez_diffusion_api.yaml
client=openapi/client_libs/python
models=$client/ez_diffusion_client/models.py

generate_models() {  # further arguments go to the generator
    python -m datamodel_code_generator --input "$spec" --output "$models" \
        --input-file-type openapi --output-model-type pydantic_v2.BaseModel --target-python-version 3.11 \
        --disable-timestamp --use-annotated --enum-field-as-literal one --use-default-kwarg --formatters builtin \
        --deserialize-default-values enum --strict-nullable --strict-types int float bool str \
        --collapse-root-models --output-datetime-class datetime --type-mappings uri=string \
        --use-schema-description --use-double-quotes "$@"
}

needs_generator() {
    python -c "import datamodel_code_generator" 2>/dev/null && return
    echo 'build.sh: this Python has no datamodel-code-generator: run pip install -e ./openapi/client_libs/python -e ".[dev]"' >&2
    exit 2
}

check_models() {
    if generate_models --check; then
        echo "$models is in step with $spec"
    else
        echo "$models is not in step with $spec: run ./build.sh generate" >&2
        return 1
    fi
}

install_wheel() {
    local wheels
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' RETURN
    python -m pip wheel --no-deps --wheel-dir "$wheels" "./$client"
    python -m pip install --force-reinstall --no-deps "$wheels"/ez_diffusion_client-*.whl
    python -m pip install "$wheels"/ez_diffusion_client-*.whl  # brings what it needs, if that is missing
}

needs_generator
case "${1:-}" in
    "") generate_models; python -m pip install -e "./$client" ;;
    generate) generate_models ;;
    check | --check) check_models ;;
    install_openapi_lib) generate_models; install_wheel ;;
    *) echo "build.sh: unknown mode '$1'; use no mode, generate, check or install_openapi_lib" >&2; exit 2 ;;
esac
