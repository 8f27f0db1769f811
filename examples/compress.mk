# Quantize when the recipe or the model changed, and only then: `make -f examples/compress.mk MODEL=./llama`.
# A rule names the manifest, which is written last; a folder as target would be rebuilt for ever.
MODEL ?= examples/tiny-llama
OUT ?= build/compressed
RECIPE ?= recipes/ci-gated.yaml
QTOOL ?= .venv/bin/qtool

.DELETE_ON_ERROR:  # a missed gate (exit 3) must not leave a target that looks made

$(OUT)/manifest.json: $(RECIPE) $(MODEL)/config.json
	$(QTOOL) quantize $(MODEL) -o $(OUT) --recipe $(RECIPE) --force
