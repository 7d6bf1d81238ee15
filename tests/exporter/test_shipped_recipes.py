"""The recipes that are shipped: each says what it is for, and fits every family in the format that it is for."""

import json

import pytest

from exporter import export
from exporter.checkpoint import open_checkpoint
from exporter.plan import make_plan
from exporter.quantization.recipe import find_recipe, purpose, recipe_text, shipped_recipes

# What each is for: a format, and what computes there.
FOR = {
    "portable-int4": ("onnx", "executorch", "gpu", "coreai"),
    "portable-int4-gptq": ("onnx", "executorch", "gpu", "coreai"),
    "int4-g128": ("onnx", "executorch", "gpu", "coreai"),
    "int4-g128-gptq": ("onnx", "executorch", "gpu", "coreai"),
    "int8": ("onnx", "executorch", "gpu", "ane", "coreai"),
    "fp16": ("onnx", "gpu", "ane", "coreai", "hexagon"),
    "ane-palettized4": ("ane",),
    "ane-int8-channel": ("ane",),
    "hexagon-w4a16": ("hexagon",),
    "hexagon-w4a16-gptq": ("hexagon",),
    "hexagon-w8a16": ("hexagon",),
}
OPTIONS = {
    "onnx": {"format": "onnx"},
    "executorch": {"format": "executorch"},
    "coreai": {"format": "coreai"},
    "gpu": {"format": "coreml", "delegate": "gpu"},
    "ane": {"format": "coreml", "delegate": "ane"},
    "hexagon": {"format": "onnx", "delegate": "hexagon", "device": "Galaxy S24 Ultra"},
}
FAMILIES = ("qwen2", "llama-llama3-rope", "phi3-partial-rotary", "gemma2")  # one for each small export


def test_all_are_listed_with_what_they_are_for(gochu):
    assert set(shipped_recipes()) == set(FOR)
    code, out, err = gochu("recipes", "--json")
    assert (code, err) == (0, "")
    found = {recipe["name"]: recipe for recipe in json.loads(out)}
    assert list(found) == shipped_recipes()
    assert all(len(recipe["purpose"]) > 60 for recipe in found.values())
    assert found["hexagon-w4a16"]["schemes"] == ["w8a16", "w4a16"]
    assert found["int4-g128-gptq"]["algorithms"] == ["rtn", "gptq-act-order"]
    code, out, err = gochu("recipes")
    assert (code, out) == (0, "")
    assert all(name in err for name in FOR)


@pytest.mark.parametrize("name", FOR)
def test_a_recipe_is_the_start_of_ones_own(name, gochu, tmp_path):
    code, out, err = gochu("recipes", "show", name)
    assert (code, out, err) == (0, recipe_text(name), "")
    assert out.startswith(f"# {purpose(out)[:20]}")
    mine = tmp_path / "내 레시피.toml"
    mine.write_text(out, encoding="utf-8")
    assert find_recipe(str(mine)) == find_recipe(name)
    assert find_recipe(name).name == name
    reasons = [rule.reason for rule in find_recipe(name).rules]
    assert all(reasons[:-1])


@pytest.mark.parametrize("words", [["show"], ["list"], ["show", "a", "b"], ["portable-int4"]])
def test_other_words_are_wrong_use(words, gochu):
    code, out, err = gochu("recipes", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "gochu recipes show NAME" in err


def test_there_is_no_such_recipe(gochu):
    code, out, err = gochu("recipes", "show", "magic")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "no recipe 'magic' among those that are shipped: use one of ane-int8-channel, " in err


@pytest.mark.parametrize("name", FOR)
def test_it_fits_every_family_where_it_is_for(name, family, checkpoints):
    with open_checkpoint(checkpoints.folder(family)) as source:
        arch = source.architecture
    recipe = find_recipe(name)
    for where in FOR[name]:
        if where == "onnx" and arch.head_dim % 16:
            continue
        plan = make_plan(arch, recipe=recipe, context=64, **OPTIONS[where])
        assert plan.scheme == name
        assert {made.algorithm for made in plan.decisions.values()} >= {recipe.rules[-1].algorithm} - {"rtn"}
        tables = {n for n, made in plan.decisions.items() if made.scheme.table}
        assert tables == ({n for n in plan.decisions if "." in n} if name == "ane-palettized4" else set())


@pytest.mark.parametrize("name", [name for name, where in FOR.items() if where != ("hexagon",)])
def test_it_exports(name, checkpoints, tmp_path):
    """Hexagon's are compiled in test_hexagon.py."""
    where = FOR[name][0]
    pytest.importorskip({"onnx": "onnx", "ane": "coremltools"}[where])
    folder, text = checkpoints.folder(FAMILIES[list(FOR).index(name) % len(FAMILIES)]), tmp_path / "text.txt"
    text.write_text("\n\n".join(f"작은 고추가 맵다. {i} plus {i}." for i in range(20)), encoding="utf-8")
    recipe = find_recipe(name)
    calibration = text if any(rule.algorithm.startswith("gptq") for rule in recipe.rules) else None
    bundle = export(
        folder,
        tmp_path / "out",
        recipe=recipe,
        context=64,
        verify=where == "onnx",
        calibration=calibration,
        **OPTIONS[where],
    )
    assert bundle.manifest.gate.status == ("passed" if where == "onnx" else "unverified")
    assert bundle.manifest.recipe == recipe.model_dump(mode="json")
    schemes = {tensor.name: tensor.scheme for tensor in bundle.manifest.tensors}
    assert schemes["layers.1.mlp.up"] == recipe.rules[-1].scheme
    assert schemes["embedding"] == recipe.rules[0].scheme
