# make demo    install into .venv, export the embedded model for a phone, prove it, ask it, measure it
# make test    everything that must hold: style, types, all tests
# make check   style and types alone

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEVICE ?= Galaxy S24 Ultra
OUT := build/demo

.PHONY: demo test check format clean

demo: $(VENV)/.demo
	@echo "== What would be done for a $(DEVICE), and why"
	$(BIN)/gochu plan pepper --device "$(DEVICE)"
	@echo "== Export: quantize, write, pass the gate"
	$(BIN)/gochu export pepper --device "$(DEVICE)" -o $(OUT) --force
	@echo "== Ask it"
	$(BIN)/gochu run $(OUT) --prompt "23 더하기 45는?"
	$(BIN)/gochu run $(OUT) --prompt "삼백이십을 숫자로 쓰면?"
	$(BIN)/gochu run $(OUT) --prompt "What day comes after Friday?"
	@echo "== Measure it on this machine"
	$(BIN)/gochu bench $(OUT) --workload smoke
	@echo "== Score it: questions it was never trained on"
	$(BIN)/gochu score $(OUT) --questions 200

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build

# pip, with constraints.txt: it finds the CPU build of torch where one lies
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnx]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
