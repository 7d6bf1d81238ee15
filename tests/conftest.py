"""What all tests share: a header with versions, and tiny random checkpoints of every family.

The checkpoints are written by `transformers`, which shares no code with Gochu; they are made once per session,
when a test first asks for one.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("gochu", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("gochu")

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: xdist's workers share the cores
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_SHOWN = (
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxruntime-qnn",
    "executorch",
    "coremltools",
    "transformers",
    "tokenizers",
)

VOCAB = 512
BOS, EOS, PAD, END = "<s>", "</s>", "<pad>", "<end>"
_SENTENCES = (
    "작은 고추가 맵다. 삼백이십을 숫자로 쓰면 320이다.",
    "안녕하세요! 한국의 수도는 어디인가요? 서울입니다.",
    "오늘 날씨가 어때요? 화요일 다음 날은 수요일이에요.",
    "The quick brown fox jumps over 13 lazy dogs.",
    "Once upon a time, in a small village by the sea, there was a small pepper.",
    "for i in range(10): print(i, i ** 2)",
)
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # spreads the logits: a wrong number anywhere is seen in them
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# What each stands for is in its name. Sizes that groups of 32 do not divide: 272 = 17·16, 200 = 25·8.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "intermediate_size": 272, "head_dim": 16},
    ),
    "llama-linear-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            "intermediate_size": 200,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "hidden_size": 64, "num_key_value_heads": 1}),
    "qwen2-window-yarn": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            },
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64, "sliding_window": 12},
    ),
    "phi3-partial-rotary": (
        "Phi3Config",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.5,
            "num_key_value_heads": 4,
        },
    ),
}


def pytest_report_header() -> str:
    """The versions that a result depends on."""
    shown = [f"gochu {_version('gochu')}", f"python {platform.python_version()}"]
    return ", ".join([*shown, *(f"{name} {_version(name)}" for name in _SHOWN)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `family` runs for every tiny checkpoint."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(TINY))


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs goes here, not into the home of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("user-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


class TinyCheckpoints:
    """`folder(name)`: a checkpoint folder; `model(name)`: the same as a transformers model; `write(...)`: a new one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Any] = {}

    def folder(self, name: str) -> Path:
        """Shared by many tests: one that changes something copies it first."""
        self.model(name)
        return self._root / name

    def model(self, name: str) -> Any:
        """The transformers model in float32 that `folder(name)` was saved from."""
        if name not in self._models:
            self._models[name] = self.write(self._root / name, name)
        return self._models[name]

    def write(
        self, folder: Path, name: str, dtype: str = "float32", shard: str = "50GB", **changes: Any
    ) -> Any:
        """Save a tiny checkpoint with its tokenizer, config values changed as told; returns the model."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind, values = TINY[name]
        config = getattr(transformers, kind)(
            **{**_SIZES, "attn_implementation": "eager", **values, **changes}
        )
        torch.manual_seed(sum(map(ord, name)))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.data += torch.randn_like(parameter) * 0.2
            if name == "gemma2" and "layernorm" in parameter_name and ".post_" in parameter_name:
                parameter.data += 8  # its scaled, tied embedding would otherwise only repeat the last token
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard)
        _tokenizer().save_pretrained(folder)
        return model


def _tokenizer() -> Any:
    """Byte-level BPE over a few Korean and English sentences: every text has ids, and they give it back."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = [BOS, EOS, PAD, END, "<user>", "<assistant>", "<system>"]
    # Qwen 2.5's pattern: onnxruntime-genai has no regular expressions, it knows the published ones by name
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _SENTENCES * 2,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[AddedToken(token, special=True) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _TEMPLATE
    return fast


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    """Tiny random checkpoints by name; see `TinyCheckpoints`."""
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def tiny_names() -> tuple[str, ...]:
    """Names of the tiny checkpoints."""
    return tuple(TINY)


@pytest.fixture(scope="session")
def bundles(checkpoints: TinyCheckpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`bundles(name, scheme, context, format)`: a tiny checkpoint (or "pepper") exported, without the gate, once a
    session."""
    from exporter import export

    made: dict[tuple[str, str, int, str], Any] = {}
    root = tmp_path_factory.mktemp("bundles")

    def bundle(name: str, scheme: str = "int4", context: int = 128, format: str = "onnx") -> Any:
        key = (name, scheme, context, format)
        if key not in made:
            source = checkpoints.folder(name) if name in TINY else name
            made[key] = export(
                source,
                root / "-".join(map(str, key)),
                scheme=scheme,
                context=context,
                format=format,
                verify=False,
            )
        return made[key]

    return bundle


@pytest.fixture
def gochu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`gochu("export", ...)`: the command line in this process; returns (exit code, stdout, stderr)."""
    from exporter.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gochu", *map(str, arguments)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run
