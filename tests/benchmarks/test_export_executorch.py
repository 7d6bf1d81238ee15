import json

import pytest
from executorch_exporter import convert
from export_executorch import OURS, PEER, SEARCH, bounds


def test_the_converted_checkpoint_is_the_same_model_to_executorchs_exporter(tiny_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("executorch")
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    base = convert(tiny_checkpoint, tmp_path)
    with open(base["params"], encoding="utf-8") as file:
        model = construct_transformer(ModelArgs(**json.load(file), max_seq_len=32, generate_full_logits=True))
    model.load_state_dict(torch.load(base["checkpoint"]))
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokens = torch.arange(20)[None] * 17 % 500
    with torch.no_grad():
        theirs, expected = model.eval()(tokens), original(tokens).logits
    assert torch.allclose(theirs, expected, atol=1e-5)
    assert json.loads(base["metadata"]) == {"get_bos_id": 500, "get_eos_ids": [501]}


def figures(**changes):
    ours = {"wall_s": 19, "peak_anon_bytes": 0.32e9, "program_bytes": 0.3e9}
    theirs = {"wall_s": 100, "peak_anon_bytes": 1e9, "program_bytes": 0.4e9}
    return {PEER: theirs, OURS: ours | changes, SEARCH: ours}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"wall_s": 21}, ["wall time over the exporter's"]),
        ({"peak_anon_bytes": 0.34e9}, ["peak memory over the exporter's"]),
        ({"program_bytes": 0.12e9}, [f"{OURS}: peak memory over the program's size"]),
    ],
)
def test_each_bound_is_of_what_it_says(changes, missed):
    assert [bound.name for bound in bounds(figures(**changes)) if not bound.kept] == missed
