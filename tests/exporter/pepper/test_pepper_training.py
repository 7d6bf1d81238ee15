from dataclasses import replace
from itertools import islice

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pepper cannot be trained")
pytest.importorskip("transformers", reason="transformers is not installed: pepper cannot be trained")

from exporter.pepper import train as training  # noqa: E402
from exporter.pepper.tokenizer import ASSISTANT, END, PAD, SPECIAL, USER  # noqa: E402

TINY = training.Training(steps=2, batch=4, rounded_from=0.3, rounded_share=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return training.learn_tokenizer(0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_is_reproducible(tokenizer) -> None:
    first, second = (training.train(tokenizer, 0, TINY).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = training.train(tokenizer, 1, TINY).state_dict()
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])


def test_what_is_cut_off_goes_on_to_the_same_weights(tokenizer, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(training, "REPORTS", 1)
    monkeypatch.setattr(training, "model_score", lambda *_: pytest.fail("nothing is asked before step 5"))
    how, kept = training.Training(steps=3, batch=4, rounded_from=0.3), tmp_path / "kept"
    wanted = training.train(tokenizer, 0, how, lambda line: None).state_dict()

    def cut_off(line: str) -> None:
        if "step 3/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(tokenizer, 0, how, cut_off, kept=kept)
    lines: list[str] = []
    found = training.train(tokenizer, 0, how, lines.append, kept=kept).state_dict()
    assert lines[0] == "goes on after step 2"
    assert len(lines) == 2
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        training.train(tokenizer, 0, how, cut_off, kept=kept)
    lines.clear()
    training.train(tokenizer, 1, how, lines.append, kept=kept)  # another seed: what is kept is not for it
    assert len(lines) == 3


def test_whole_texts_are_learned_where_a_course_says_so(tokenizer) -> None:
    whole = replace(training.PEPPER, answers_alone=False)
    for tokens, targets in islice(training.batches(tokenizer, 0, 16, whole), 8):
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            expected = [-100 if following == SPECIAL.index(PAD) else following for following in row[1:]]
            assert wanted[:-1] == expected
            assert wanted[-1] in (-100, SPECIAL.index(END))


def test_the_loss_is_taken_on_the_answers_alone(tokenizer) -> None:
    marks = {SPECIAL.index(token) for token in (USER, ASSISTANT, PAD)}
    for tokens, targets in islice(training.batches(tokenizer, 0, 16), 8):
        assert tokens.shape == targets.shape
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            expected, answering = [], False
            for now, following in zip(row, [*row[1:], None], strict=True):
                answering = now == SPECIAL.index(ASSISTANT) or (answering and now != SPECIAL.index(END))
                expected.append(following if answering else -100)
            if expected[-1] is None:
                expected[-1] = wanted[-1]
                assert wanted[-1] == SPECIAL.index(END)
            assert wanted == expected
            assert marks.isdisjoint(wanted)


def test_rounding_lies_on_the_grid_and_ends_with_its_block(tokenizer) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**training.architecture(tokenizer.get_vocab_size())))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with training.rounded(model, 4):
        for name, p in model.named_parameters():
            if p.dim() == 2:
                groups = p.detach().reshape(-1, 32)
                levels = groups / (groups.abs().amax(1, keepdim=True).clamp_min(1e-9) / 7)
                assert torch.allclose(levels, levels.round(), atol=1e-4)
                assert not torch.equal(p, before[name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_matrices_suit_what_the_formats_ask_for(tokenizer) -> None:
    config = training.architecture(tokenizer.get_vocab_size())
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["vocab_size"] % 32 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
