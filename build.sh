#!/usr/bin/env bash
# Generates the client libraries from openapi/ez_diffusion_api.yaml, and builds the page of the server with them.
#
#   ./build.sh                      generate both clients, build the page, then install the Python client editable
#   ./build.sh generate [PART]      generate only; PART is python, typescript or page, all three when it is absent
#   ./build.sh check [PART]         exit 1 and show what differs where something generated is stale; changes and installs nothing in Python
#   ./build.sh packages PART        fetch the npm packages of typescript or page, where they are not those of the lock already
#   ./build.sh docs [FOLDER]        build the documentation site, without running a notebook; default: _docs/site
#   ./build.sh install_openapi_lib  generate the Python client, build its wheel and install that
#
# python needs datamodel-code-generator; typescript and page need Node (20.19 or newer) and fetch their packages with `npm ci`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

spec=openapi/ez_diffusion_api.yaml
client=openapi/client_libs/python
models=$client/ez_diffusion_client/models.py
typescript=openapi/client_libs/typescript
page=web_gen_client
web=diffusion_workers/web


# Responses have methods; they are written in the client's display.py.
base_classes='{
    "OpResult": "ez_diffusion_client.display.ResultMethods",
    "GenerationPlan": "ez_diffusion_client.display.PlanMethods",
    "MemoryReport": "ez_diffusion_client.display.MemoryReportMethods",
    "ModelList": "ez_diffusion_client.display.ModelListMethods"
}'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# --- Python ------------------------------------------------------------------

generate_models() {  # further arguments go to the generator
    needs_generator
    python -m datamodel_code_generator --input "$spec" --output "$models" \
        --input-file-type openapi --output-model-type pydantic_v2.BaseModel --target-python-version 3.11 \
        --disable-timestamp --use-annotated --enum-field-as-literal one --use-default-kwarg --formatters builtin \
        --deserialize-default-values enum --strict-nullable --strict-types int float bool str \
        --collapse-root-models --output-datetime-class datetime --type-mappings uri=string \
        --use-schema-description --use-double-quotes --base-class ez_diffusion_client.display.CompactModel \
        --base-class-map "$base_classes" "$@"
}

needs_generator() {
    python -c "import datamodel_code_generator" 2>/dev/null && return
    echo 'build.sh: this Python has no datamodel-code-generator: run pip install -e ./openapi/client_libs/python -e ".[dev]"' >&2
    exit 2
}

install_wheel() {
    python -m pip wheel --no-deps --wheel-dir "$scratch/wheels" "./$client"
    python -m pip install --force-reinstall --no-deps "$scratch"/wheels/ez_diffusion_client-*.whl
    python -m pip install "$scratch"/wheels/ez_diffusion_client-*.whl  # brings what it needs, if that is missing
}

# --- TypeScript --------------------------------------------------------------

needs_packages() {  # $1: a folder with a package-lock.json; its node_modules afterwards are those of the lock
    if ! command -v npm >/dev/null || ! node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)'; then
        echo "build.sh: $1 needs Node 20.19 or newer with npm (https://nodejs.org); for the Python part alone run ./build.sh generate python" >&2
        exit 2
    fi
    cmp -s "$1/package-lock.json" "$1/node_modules/.of-lock" && return
    (cd "$1" && npm ci --ignore-scripts --loglevel=error >&2) || { echo "build.sh: npm ci failed in $1" >&2; exit 2; }
    cp "$1/package-lock.json" "$1/node_modules/.of-lock"
}

generate_typescript() {  # $1: where to, absolute
    needs_packages "$typescript"
    (cd "$typescript" && OPENAPI_TS_OUTPUT=$1 ./node_modules/.bin/openapi-ts >"$scratch/log" 2>&1) || { cat "$scratch/log" >&2; exit 1; }
}

build_page() {  # $1: where to, absolute
    needs_packages "$page"
    (cd "$page" && ./node_modules/.bin/tsc --noEmit && WEB_OUTPUT=$1 ./node_modules/.bin/vite build --logLevel warn)
}

# --- documentation -----------------------------------------------------------

build_docs() {  # $1: where to
    if ! python -c "import mkdocs" 2>/dev/null; then
        echo 'build.sh: this Python has no mkdocs: run pip install -e ./openapi/client_libs/python -e ".[dev]"' >&2
        exit 2
    fi
    python .ci/docs_site.py "$1"
}

# --- both --------------------------------------------------------------------

generate() {
    case "$1" in
        python) generate_models && python .ci/request_fields.py ;;
        typescript) generate_typescript "$PWD/$typescript/src/generated" ;;
        page) build_page "$PWD/$web" ;;
    esac
}

differs() {  # $1: what is here, $2: what was made now
    diff -r "$1" "$2" | cut -c1-300 >&2
    return "${PIPESTATUS[0]}"
}

check() {
    local stale=0
    case "$1" in
        python) { generate_models --check && python .ci/request_fields.py --check; } || stale=1 ;;
        typescript) generate_typescript "$scratch/generated" && differs "$typescript/src/generated" "$scratch/generated" || stale=1 ;;
        page) build_page "$scratch/web" && differs "$web" "$scratch/web" || stale=1 ;;
    esac
    [ $stale = 0 ] && { echo "$1 is in step with its sources"; return; }
    echo "$1 is not in step with its sources: run ./build.sh generate $1" >&2
    return 1
}

each() {  # $1: generate or check, $2: a part, or nothing for all
    local failed=0 part
    case "${2:-}" in
        "" | python | typescript | page) ;;
        *) echo "build.sh: unknown part '$2'; use python, typescript or page" >&2; exit 2 ;;
    esac
    for part in ${2:-python typescript page}; do "$1" "$part" || failed=1; done
    return $failed
}

case "${1:-}" in
    "") generate python; python -m pip install -e "./$client"; generate typescript; generate page ;;
    generate) each generate "${2:-}" ;;
    check | --check) each check "${2:-}" ;;
    packages) case "${2:-}" in typescript) needs_packages "$typescript" ;; *) needs_packages "$page" ;; esac ;;
    docs) build_docs "${2:-_docs/site}" ;;
    install_openapi_lib) generate python; install_wheel ;;
    *) echo "build.sh: unknown mode '$1'; use no mode, generate, check, packages, docs or install_openapi_lib" >&2; exit 2 ;;
esac
