#!/usr/bin/env bash
# A CI job: quantize a model, and tell a worse model (3) from a wrong recipe (2) and from a crash (1).
# The report is kept beside the job's other results whatever happens.
set -u
model=${1:?usage: ci.sh MODEL OUT}
out=${2:?usage: ci.sh MODEL OUT}

qtool quantize "$model" -o "$out" --recipe "$(dirname "$0")/../recipes/ci-gated.yaml" --json --log-format json \
  > quantize-report.json
code=$?
case $code in
  0) echo "quantized within the gates" ;;
  3) echo "the quantized model is worse than the gates allow: see quantize-report.json" ;;
  2) echo "the recipe or the command line is wrong" ;;
  130) echo "interrupted: the next run goes on where this one stopped" ;;
  *) echo "failed" ;;
esac
exit $code
