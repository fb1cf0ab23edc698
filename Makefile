# The interface of the project: `make` lists every target with the variables it takes.

# Without PYTHON the project lives in .venv and sets it up by itself; PYTHON=python uses the active environment.
ifeq ($(PYTHON),)
PY := .venv/bin/python
SETUP := python3 -m tools.setup_environment --venv .venv
else
PY := $(PYTHON)
SETUP := $(PYTHON) -m tools.setup_environment
endif

RECIPE ?= best
PRETRAINED ?= 1
export NGPU NNODES NODE_RANK DIST_URL DEBUG DETECTRON2

# Options that are given only when their variable is.
data = $(if $(DATA),--data "$(DATA)")
weights = $(if $(WEIGHTS),--weights "$(WEIGHTS)")
out = $(if $(OUT),--out "$(OUT)")
resume = $(if $(filter 1,$(RESUME)),--resume)
train = $(PY) -m tools.launch detection.train_net --recipe $(RECIPE) $(data) $(weights)

.DEFAULT_GOAL := help
.PHONY: help
help: ## Lists the targets
	@awk -F ':.*## ' ' \
		/^##@/ { printf "\n\033[1m%s\033[0m\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { \
			split($$2, text, " \\["); printf "  \033[36m%-20s\033[0m %s\n", $$1, text[1]; \
			if (text[2]) printf "  %-20s   %s\n", "", substr(text[2], 1, length(text[2]) - 1) }' Makefile

##@ Set-up

.PHONY: setup
setup: ## Installs everything into .venv, or with PYTHON=python into the active environment [PYTHON DETECTRON2]
	@$(SETUP)

.PHONY: clean
clean: ## Removes .venv and caches; keeps datasets/ and output/
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Data

.PHONY: sample-data
sample-data: setup ## Draws the small sample of VOC and CUB into datasets/sample/, in seconds [SEED]
	@$(PY) -m tools.sample_data $(if $(SEED),--seed $(SEED))

.PHONY: datasets
datasets: setup ## Fetches Pascal VOC 2007 and 2012 and CUB-200-2011 into datasets/ [DATA MIRROR]
	@$(PY) -m tools.download_datasets $(if $(DATA),--root "$(DATA)") $(if $(MIRROR),--mirror "$(MIRROR)")

.PHONY: check-datasets
check-datasets: setup ## Tells which data is complete, broken or missing, and what mends it [DATA]
	@$(PY) -m tools.check_datasets $(if $(DATA),--root "$(DATA)")

##@ Detection

.PHONY: train-frcnn
train-frcnn: setup ## Trains Faster R-CNN R50-FPN on VOC07+12 [RECIPE=best|study DATA WEIGHTS PRETRAINED=1|0 NGPU NNODES NODE_RANK DIST_URL RESUME=1 OPTS="KEY VALUE ..."]
	@$(train) --model faster_rcnn --pretrained $(PRETRAINED) $(resume) $(OPTS)

.PHONY: eval-frcnn
eval-frcnn: setup ## Evaluates Faster R-CNN: class | gts | dets | recall | ap, PR curves [WEIGHTS RECIPE DATA NGPU OPTS]
	@$(train) --model faster_rcnn --eval-only $(OPTS)

.PHONY: eval-detections
eval-detections: setup ## Scores any detector's boxes with the same evaluator [DETECTIONS=file.json SPLIT DATA OUT]
	@$(PY) -m tools.eval_detections "$(DETECTIONS)" $(if $(SPLIT),--split $(SPLIT)) $(data) $(out)

.PHONY: visualize-proposals
visualize-proposals: setup ## Shows RPN proposals beside the final detections [WEIGHTS RECIPE DATA IMAGES="a.jpg dir/" TOPK SCORE]
	@$(PY) -m tools.visualize_proposals --recipe $(RECIPE) $(data) $(weights) $(if $(TOPK),--topk $(TOPK)) $(if $(SCORE),--score $(SCORE)) $(IMAGES)

##@ Development

.PHONY: test
test: setup ## Runs the tests [TESTS=tests/detection]
	@$(PY) -m pytest $(TESTS)

.PHONY: lint
lint: setup ## Checks format and rules
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

.PHONY: format
format: setup ## Formats the code and mends what ruff can
	@$(PY) -m ruff check --fix --quiet .
	@$(PY) -m ruff format .
