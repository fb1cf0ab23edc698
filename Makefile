# The interface of the project: `make` lists every target with the variables it takes.

# Without PYTHON the project lives in .venv and sets it up by itself; PYTHON=python uses the active environment.
# Set-up runs with BASE_PYTHON if it is given, else with .venv's Python, whatever python3 has become, else with python3.
ifeq ($(PYTHON),)
PY := .venv/bin/python
SETUP = for python in $(if $(BASE_PYTHON),"$(BASE_PYTHON)",$(PY) python3); do \
	if "$$python" -c "" 2>/dev/null; then exec "$$python" -m tools.setup_environment --venv .venv $(extra); fi; done; \
	echo "error: $(or $(BASE_PYTHON),python3): does not run; name a Python of 3.11 to 3.13: BASE_PYTHON=path/to/python make setup" >&2; exit 2
else
PY := $(PYTHON)
SETUP = $(PYTHON) -m tools.setup_environment $(extra)
endif

export NGPU NNODES NODE_RANK DIST_URL DEBUG DETECTRON2

# Some shells export these with another meaning.
$(foreach name,HOST PORT,$(if $(filter environment,$(origin $(name))),$(eval $(name) :=)))

# The text of a variable, with the home folder for a ~ at its beginning: behind a NAME= not every shell puts it there.
text = $(if $(filter ~/%,$(firstword $(value $1))),$(HOME)$(subst @~/,/,@$(value $1)),$(value $1))
# The same as one shell word, whatever it holds: make expands no $ in it, the shell sees no blank or &.
quoted = $(if $(value $1),'$(subst ','\'',$(call text,$1))')
# Options that are given only when their variable is.
option = $(if $(value $2),$1 $(call quoted,$2))
setting = $(if $(value $2),$1=$(call quoted,$2))
# Of a variable that is 1 or 0: the second argument where it is 1, the third where it is 0.
switch = $(if $(filter-out 0 1,$(value $1)),$(error $1=$(value $1): expected 1 or 0))$(if $(filter 1,$(value \
	$1)),$2)$(if $(filter 0,$(value $1)),$3)
data = $(call option,--data,DATA)
weights = $(call option,--weights,WEIGHTS)
# For detectors START and WEIGHTS are two names of one variable.
start = $(if $(and $(value START),$(value WEIGHTS)),$(error START and WEIGHTS are two names of one variable: give one))$(call \
	option,--start,$(if $(value START),START,WEIGHTS))
out = $(call option,--out,OUT)
run = $(call option,--name,RUN) $(call switch,RESUME,--resume)
recipe = $(call option,--recipe,RECIPE) $(call option,--config,CONFIG)
pretrained = $(call option,--pretrained,PRETRAINED)
exif = $(call option,INPUT.EXIF,EXIF)
detect = $(PY) -m tools.launch detection.train_net $(recipe) $(call option,--backbone,BACKBONE) $(data) $(start)
# Recipe and settings of the classifier: a name, then KEY=VALUE.
bird = $(call quoted,RECIPE) $(call setting,model,MODEL) $(call setting,lr,LR) $(call setting,pretrained,PRETRAINED) \
	$(call setting,weights,WEIGHTS) $(call setting,data,DATA) $(OPTS)

# A target takes the variables in the [brackets] of its help, and those of libraries, by their well-known prefixes.
define not_taken
/^[a-z0-9-]+:.*## / {
	target = substr($$1, 1, index($$1, ":") - 1); text = $$0; listed[target] = 1
	sub(/.*## [^[]*/, "", text); gsub(/"[^"]*"/, "", text)
	while (match(text, /[A-Z][A-Z0-9_]+/)) {
		name = substr(text, RSTART, RLENGTH); takes[target, name] = known[name] = 1; text = substr(text, RSTART + RLENGTH)
	}
}
END {
	split(given, names, " "); split(goals " setup", targets, " ")
	for (n in names) {
		is_odd = names[n] in known || names[n] !~ /^(OMP|GOMP|KMP|MKL|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|HF|PIP|XDG|OPENCV|SLURM)_/
		for (t in targets) if ((targets[t], names[n]) in takes || !(targets[t] in listed)) is_odd = 0
		if (is_odd) { print goals " takes no " names[n]; exit }
	}
}
endef
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
ifneq ($(and $(given),$(MAKECMDGOALS)),)
wrong := $(shell awk -v given='$(given)' -v goals='$(MAKECMDGOALS)' '$(not_taken)' Makefile)
$(if $(wrong),$(error $(wrong); make lists what each target takes, OPTS among it for the settings of a recipe))
endif

.DEFAULT_GOAL := help
.PHONY: help
help: ## Lists the targets
	@awk -F ':.*## ' ' \
		/^##@/ { printf "\n\033[1m%s\033[0m\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { \
			split($$2, text, " \\["); printf "  \033[36m%-20s\033[0m %s\n", $$1, text[1]; \
			if (text[2]) printf "  %-20s   %s\n", "", substr(text[2], 1, length(text[2]) - 1) }' Makefile

##@ Everything at once

.PHONY: demo
demo: setup ## Every experiment but AlexNet on drawn data, and the report of them: a quarter of an hour or more; called again, it goes on [NGPU]
	@$(PY) -m tools.demo

.PHONY: study
study: setup ## Every experiment of the study on real data, or the runs of your own list, and the report of them; called again, it goes on [DATA RECIPE=study|best START SEEDS="0 1 2" IMAGES="a.jpg dir/" NGPU PLAN=1 STUDY=file.yaml]
	@$(PY) -m tools.study $(call option,--study,STUDY) $(data) $(call option,--recipe,RECIPE) $(call option,--start,START) $(call option,--seeds,SEEDS) $(call switch,PLAN,--plan) $(call quoted,IMAGES)

##@ Set-up

.PHONY: setup
setup: ## Installs everything into .venv, or with PYTHON=python into the active environment [BASE_PYTHON=python3 PYTHON DETECTRON2; all targets: DEBUG=1 for tracebacks]
	@$(SETUP)

.PHONY: setup-export
setup-export: extra = --extra requirements-export.txt
setup-export: setup ## Adds the runtimes of exported models; make export does it by itself
	@$(SETUP)

# Set up without a lock, so that new pins in requirements.txt may bring other versions along; the old one stays until then.
.PHONY: lock
lock: extra = --requirements .lock/requirements.txt --extra .lock/requirements-export.txt
lock: ## Locks in constraints.txt the versions that both requirements files pull in; installed ones that fit are kept [PYTHON]
	@mkdir -p .lock && cp requirements.txt requirements-export.txt .lock && : > .lock/constraints.txt
	@$(SETUP)
	@echo "# Everything that requirements.txt and requirements-export.txt pull in, as installed by pip; written by make lock." \
		> .lock/constraints.txt
	@$(PY) -m pip list --format freeze --exclude pip --exclude detectron2 >> .lock/constraints.txt
	@mv .lock/constraints.txt . && rm -r .lock

.PHONY: clean
clean: ## Removes .venv and caches; keeps datasets/ and output/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Data

.PHONY: sample-data
sample-data: setup ## Draws the small sample of VOC and CUB into datasets/sample/, in seconds [SEED]
	@$(PY) -m tools.sample_data $(call option,--seed,SEED)

.PHONY: datasets
datasets: setup ## Fetches Pascal VOC 2007 and 2012 and CUB-200-2011 into datasets/ [DATA MIRROR]
	@$(PY) -m tools.download_datasets $(data) $(call option,--mirror,MIRROR)

.PHONY: import-dataset
import-dataset: setup ## Converts COCO JSON or a folder in YOLO format to a folder in VOC layout [FROM="train.json val.json" or folder, IMAGES=folder of COCO's pictures, OUT=new folder]
	@$(PY) -m tools.import_dataset $(call quoted,FROM) $(call option,--images,IMAGES) $(out)

.PHONY: check-datasets
check-datasets: setup ## Tells which data is complete, broken or missing, and what mends it; draws some images of a folder of your own [DATA DEEP=1]
	@$(PY) -m tools.check_datasets $(data) $(call switch,DEEP,--deep)

##@ Classification

.PHONY: finetune
finetune: setup ## Fine-tunes ResNet-18, or another network, on CUB-200-2011 [RECIPE=best|study|floor|alexnet|sample|own.yaml MODEL LR EPOCHS PRETRAINED=1|0 WEIGHTS DATA NGPU RUN=name RESUME=1 OPTS="key=value ..."]
	@$(PY) -m tools.launch classification.train $(bird) $(call setting,epochs,EPOCHS) $(run)

.PHONY: sweep
sweep: setup ## Trains every pair of a learning rate and a number of epochs [LRS="0.005 0.01 0.02" EPOCHS="20" RECIPE MODEL WEIGHTS DATA OPTS]
	@$(PY) -m classification.sweep grid $(bird) $(call option,--lrs,LRS) $(call option,--epochs,EPOCHS)

.PHONY: compare-pretraining
compare-pretraining: setup ## Trains with pretrained and with random weights, and compares [RECIPE MODEL LR EPOCHS WEIGHTS DATA OPTS]
	@$(PY) -m classification.sweep pretraining $(bird) $(call setting,epochs,EPOCHS)

.PHONY: eval-classifier
eval-classifier: setup ## Top-1, top-5, confusions, calibration of a trained classifier [WEIGHTS DATA TTA=1 OUT]
	@$(PY) -m classification.evaluate $(call quoted,WEIGHTS) $(data) $(call switch,TTA,--tta) $(out)

.PHONY: predict-bird
predict-bird: setup ## The five likeliest species on each photograph [IMAGES="a.jpg dir/" WEIGHTS SALIENCY=1 OUT]
	@$(PY) -m tools.predict_bird $(call quoted,IMAGES) $(weights) $(call switch,SALIENCY,--saliency) $(out)

##@ Detection

.PHONY: train-frcnn
train-frcnn: setup ## Trains Faster R-CNN R50-FPN on VOC07+12 [START (or WEIGHTS)=coco|imagenet|random (or PRETRAINED=0)|file|run|hub name BACKBONE=timm name RECIPE=best|sgd|study|small|coco or CONFIG=own.yaml DATA NGPU NNODES NODE_RANK DIST_URL RUN=name RESUME=1 EXIF=stored OPTS="KEY VALUE ..."]
	@$(detect) --model faster_rcnn $(pretrained) $(run) $(exif) $(OPTS)

.PHONY: eval-frcnn
eval-frcnn: setup ## Evaluates Faster R-CNN: class | gts | dets | recall | ap, PR and F1 curves, confusions [START (or WEIGHTS)=run|file|coco|hub name RECIPE CONFIG BACKBONE DATA NGPU TTA=1 EXIF=stored OPTS]
	@$(detect) --model faster_rcnn --eval-only $(call switch,TTA,TEST.AUG.ENABLED True) $(exif) $(OPTS)

.PHONY: train-yolov3
train-yolov3: setup ## Trains YOLOv3 Darknet-53 on VOC07+12 [START (or WEIGHTS)=coco|imagenet|random (or PRETRAINED=0)|file|run|hub name BACKBONE=timm name RECIPE=best|study|small|coco or CONFIG=own.yaml DATA NGPU NNODES NODE_RANK DIST_URL RUN=name RESUME=1 EXIF=stored OPTS="KEY VALUE ..."]
	@$(detect) --model yolov3 $(pretrained) $(run) $(exif) $(OPTS)

.PHONY: eval-yolov3
eval-yolov3: setup ## Evaluates YOLOv3: class | gts | dets | recall | ap, PR and F1 curves, confusions [START (or WEIGHTS)=run|file|coco|hub name RECIPE CONFIG BACKBONE DATA NGPU TTA=1 EXIF=stored OPTS]
	@$(detect) --model yolov3 --eval-only $(call switch,TTA,TEST.AUG.ENABLED True) $(exif) $(OPTS)

.PHONY: anchors
anchors: setup ## Finds YOLOv3 anchors for a data set by k-means, with the mean best IoU of old and new [DATA SIZE=416]
	@$(PY) -m tools.anchors $(data) $(call option,--size,SIZE)

.PHONY: visualize-batches
visualize-batches: setup ## Shows training batches as the model sees them, boxes drawn [MODEL=yolov3|faster_rcnn RECIPE CONFIG DATA BATCHES EXIF=stored OPTS]
	@$(PY) -m tools.visualize_batches $(call option,--model,MODEL) $(recipe) $(data) $(call option,--batches,BATCHES) $(exif) $(OPTS)

.PHONY: eval-detections
eval-detections: setup ## Scores any detector's boxes with the same evaluator: COCO results, VOC's or YOLO's text files [DETECTIONS=file.json|folder/ SPLIT DATA ANNOTATIONS=coco.json INTERVAL=1 SUBMISSION=1 OUT]
	@$(PY) -m tools.eval_detections $(call quoted,DETECTIONS) $(call option,--split,SPLIT) $(data) $(call option,--annotations,ANNOTATIONS) \
		$(call switch,INTERVAL,--interval) $(call switch,SUBMISSION,--submission) $(out)

.PHONY: visualize-proposals
visualize-proposals: setup ## Shows RPN proposals beside the final detections [START (or WEIGHTS)=run|file|coco RECIPE CONFIG DATA IMAGES="a.jpg dir/" TOPK SCORE OUT]
	@$(PY) -m tools.visualize_proposals $(recipe) $(data) $(start) $(call option,--topk,TOPK) $(call option,--score,SCORE) $(out) $(call quoted,IMAGES)

.PHONY: compare-detectors
compare-detectors: setup ## Faster R-CNN and YOLOv3 side by side on photographs, or on a test split with their kinds of errors and which is ahead [IMAGES="a.jpg dir/" FRCNN=weights YOLOV3=weights START (or WEIGHTS)=coco|file|run RECIPE SCORE DATA SPLIT LIMIT=100 OUT]
	@$(PY) -m tools.compare_detectors $(recipe) $(start) $(call option,--frcnn,FRCNN) $(call option,--yolov3,YOLOV3) $(data) \
		$(call option,--split,SPLIT) $(call option,--limit,LIMIT) $(call option,--score,SCORE) $(out) $(call quoted,IMAGES)

##@ Use a trained model

.PHONY: predict
predict: setup ## Runs any trained model: annotated pictures or videos, COCO results, VOC XML [START (or WEIGHTS)=run|file|exported file|coco|hub name IMAGES="a.jpg dir/ clip.mp4" OUT SCORE=0.5|best VOC_XML=1 DRAW=0 MODEL=yolov3]
	@$(PY) -m tools.predict $(start) $(call option,--model,MODEL) $(call option,--score,SCORE) $(call switch,VOC_XML,--voc-xml) $(call switch,DRAW,,--no-pictures) $(out) $(call quoted,IMAGES)

.PHONY: export
export: setup-export ## Writes a trained model for OpenVINO or ONNX Runtime; the file is WEIGHTS elsewhere [START (or WEIGHTS)=run|file|coco FORMAT=openvino|onnx PRECISION=float32|bfloat16|int8 SIZE=416 DATA OUT MODEL=yolov3]
	@$(PY) -m tools.export $(start) $(call option,--model,MODEL) $(call option,--format,FORMAT) $(call option,--precision,PRECISION) \
		$(call option,--size,SIZE) $(data) $(out)

.PHONY: app
app: setup ## Serves a page: drop a photograph, see both detectors, the proposals, the likeliest birds [START (or WEIGHTS)=coco|file|run FRCNN=run YOLOV3=run BIRD=run SCORE=0.5 HOST=127.0.0.1 PORT=7860]
	@$(PY) -m tools.app $(start) $(call option,--frcnn,FRCNN) $(call option,--yolov3,YOLOV3) $(call option,--bird,BIRD) \
		$(call option,--score,SCORE) $(call option,--host,HOST) $(call option,--port,PORT)

##@ Report

.PHONY: report
report: setup ## Every table and figure of the study, from the runs there are; on paper too where a browser is installed [RUNS=output/ OUT=report/]
	@$(PY) -m tools.report --pdf $(call option,--runs,RUNS) $(out)

##@ Development

# One process per core, with one thread each: in networks as small as the tests', several threads mostly wait for one
# another. The tests of a file stay together, since they share what is trained once.
.PHONY: test
test: setup ## Runs the tests [TESTS=tests/detection]
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --dist loadfile $(TESTS)

.PHONY: bench
bench: setup ## Measures speed and accuracy against what people use otherwise [BENCH="faster_rcnn voc_loader ..." DATA FETCH=1]
	@$(PY) -m tools.bench $(BENCH) $(data) $(call switch,FETCH,--fetch)

.PHONY: lint
lint: setup ## Checks format, rules and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy .

.PHONY: format
format: setup ## Formats the code and mends what ruff can
	@$(PY) -m ruff check --fix --quiet .
	@$(PY) -m ruff format .
