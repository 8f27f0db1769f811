#!/usr/bin/env bash
# A CI job: quantize a model and, where that is worse than the gates allow (3), train it and look again. The reports are
# kept whatever happens; interrupted, the next run goes on where this one stopped.
set -u
model=${1:?usage: ci-distill.sh MODEL OUT [TEXT HELD_OUT]}
out=${2:?usage: ci-distill.sh MODEL OUT [TEXT HELD_OUT]}
recipes=$(dirname "$0")/../recipes
measured=(--data "${3:-python-docs}" --eval "${4:-python-docs}" --max-ppl-increase 50% --max-kl 0.5)

made=$out/rounded
qtool quantize "$model" -o "$made" --recipe "$recipes/w2a16-gptaq.yaml" "${measured[@]}" --json --log-format json \
  > quantize-report.json
code=$?
if [ $code = 3 ]; then
  echo "$made is worse than the gates allow: see quantize-report.json. Training"
  made=$out/trained
  qtool distill "$model" -o "$made" --recipe "$recipes/distill-w2.yaml" "${measured[@]}" --json --log-format json \
    > distill-report.json
  code=$?
fi
case $code in
  0) echo "$made is within the gates" ;;
  3) echo "$made is still worse than the gates allow: see distill-report.json" ;;
  2) echo "a recipe or the command line is wrong" ;;
  130) echo "interrupted: the next run goes on where this one stopped" ;;
  *) echo "failed" ;;
esac
exit $code
