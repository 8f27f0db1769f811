# Quantize, train back what that lost, and gate: `make -f examples/distill.mk MODEL=./llama TEXT=my-text.jsonl`.
# Interrupted at any moment, the same command goes on; run again, only what has changed is made again.
MODEL ?= examples/tiny-llama
OUT ?= build/distilled
QUANTIZE ?= recipes/w2a16-gptaq.yaml
DISTILL ?= recipes/distill-w2.yaml
TEXT ?= python-docs
HELD_OUT ?= python-docs
GATES ?= --max-ppl-increase 50% --max-kl 0.5
QTOOL ?= .venv/bin/qtool
.DELETE_ON_ERROR:  # a missed gate must not look made

$(OUT)/gate.json: $(OUT)/trained/manifest.json
	$(QTOOL) eval-ppl $(OUT)/trained --baseline $(MODEL) --data $(HELD_OUT) $(GATES) -o $@ --force

# learns from MODEL, in files as small as those of the rounded one
$(OUT)/trained/manifest.json: $(DISTILL) $(OUT)/rounded/manifest.json
	$(QTOOL) distill $(MODEL) -o $(@D) --recipe $(DISTILL) --data $(TEXT) --force

# what rounding alone costs is in its report
$(OUT)/rounded/manifest.json: $(QUANTIZE) $(MODEL)/config.json
	$(QTOOL) quantize $(MODEL) -o $(@D) --recipe $(QUANTIZE) --data $(TEXT) --eval $(HELD_OUT) --force
