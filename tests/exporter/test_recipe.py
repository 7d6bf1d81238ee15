"""Recipes: the first rule that matches wins, and nothing is left over."""

import pytest

from exporter.architecture import read_architecture
from exporter.errors import RecipeError
from exporter.quantization.recipe import Recipe, Rule, read_recipe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 200,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
TIED = read_architecture(CONFIG | {"tie_word_embeddings": True})
UNTIED = read_architecture(CONFIG | {"tie_word_embeddings": False})


def recipe(*rules: tuple[str, str]) -> Recipe:
    return Recipe(name="test", rules=tuple(Rule(match=match, scheme=scheme) for match, scheme in rules))


def test_the_first_rule_that_matches_wins():
    decisions = recipe(
        ("layers.0.*", "int8"), ("*.attention.[qk]", "fp16"), ("head", "fp32"), ("*", "int4")
    ).resolve(UNTIED)
    assert decisions["layers.0.attention.q"].scheme.name == "int8"
    assert decisions["layers.1.attention.q"].scheme.name == "fp16"
    assert decisions["layers.1.attention.v"].scheme.name == "int4"
    assert decisions["head"].scheme.name == "fp32"
    assert decisions["embedding"].scheme.name == "int4"
    assert list(decisions) == [name for name, _ in UNTIED.matrices()]


def test_a_rule_for_a_head_that_is_the_embedding_is_not_missed():
    decisions = recipe(("head", "int8"), ("*", "int4")).resolve(TIED)
    assert "head" not in decisions


def test_every_matrix_needs_a_rule():
    with pytest.raises(RecipeError, match="no rule matches embedding"):
        recipe(("layers.*", "int4")).resolve(TIED)


def test_a_rule_that_decides_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"'layers.7.\*' decides nothing"):
        recipe(("layers.7.*", "int8"), ("*", "int4")).resolve(TIED)
    with pytest.raises(RecipeError, match="'embedding' decides nothing"):
        recipe(("*", "int4"), ("embedding", "int8")).resolve(TIED)


def test_norms_and_biases_are_no_rules_business():
    assert not [name for name in Recipe.uniform("int4").resolve(UNTIED) if name.endswith(("norm", "bias"))]


def test_what_does_not_divide_is_said():
    decisions = Recipe.uniform("int4").resolve(UNTIED)
    assert decisions["layers.0.mlp.down"].scheme.name == "int8-channel"
    assert "200 inputs" in decisions["layers.0.mlp.down"].note
    assert decisions["layers.0.mlp.up"].note == ""


@pytest.mark.parametrize(("scheme", "algorithm"), [("int5", "rtn"), ("int4", "magic")])
def test_unknown_schemes_and_algorithms(scheme, algorithm):
    with pytest.raises(RecipeError, match=f"there is no .* '{scheme if algorithm == 'rtn' else algorithm}'"):
        Recipe.uniform(scheme, algorithm).resolve(TIED)


def test_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        name = "처음은 8비트"
        [[rules]]
        match = "layers.0.*"
        scheme = "int8"
        reason = "첫 층은 민감하다"
        [[rules]]
        match = "*"
        scheme = "int4"
        algorithm = "rtn-absmax"
        """,
        encoding="utf-8",
    )
    read = read_recipe(path)
    assert read.name == "처음은 8비트"
    decisions = read.resolve(TIED)
    assert decisions["layers.0.attention.q"].note == "첫 층은 민감하다"
    assert decisions["layers.1.attention.q"].algorithm == "rtn-absmax"


RULE = '[[rules]]\nmatch = "*"\nscheme = "int4"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "not TOML"),
        ('name = "a"', "rules"),
        ('name = "a"\nrules = []', "rules"),
        (RULE, "name"),
        (f'name = "a"\ncolour = 3\n{RULE}', "colour"),
        (f'name = "a"\n{RULE}bits = 4\n', "rules.0.bits"),
        ('name = "a"\n[[rules]]\nmatch = "*"\n', "rules.0.scheme"),
        ('name = "a"\n[[rules]]\nmatch = 3\nscheme = "int4"\n', "rules.0.match"),
    ],
)
def test_bad_toml_names_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=says) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match="not TOML"):
        read_recipe(tmp_path / "latin.toml")
