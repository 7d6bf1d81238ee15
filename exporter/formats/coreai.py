"""Core AI: the decoder as an .aimodel for iOS and macOS 27, with the entry points that Apple's runner of LLMs calls.

It was never run on an Apple device. What is known of it is its structure, and what coreai's own runtime for Linux,
on the CPU in float16, computes from it (tests/exporter/test_coreai_format.py).

The contract (apple/coreai-models, python/src/coreai_models/export/ios.py and swift/Sources/CoreAILanguageModels/
InferenceEngines/CoreAIStaticShapeEngine.swift): `load_embeddings` gives the embedding's table, once;
`gather_embeddings_<length>` looks tokens up in it; `extend_<context>_<length>` gives logits of each token, and
`prompt_opt_<context>_<length>` only fills the KV cache, two states that both share. The runner gives blocks of
`length` tokens that start at a multiple of it, and computes a block anew as its tokens come. Apple's exporter makes
these graphs for a ladder of contexts and lengths; here there is one context, a step's length and a prompt's.

Left out: Apple's exporter also pins how the table and the caches lie in memory (IOSurface, 8 channels
interleaved). With that, coreai's runtime for Linux gives NaN, so nothing here could tell whether it is right.
"""

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter import decoder
from exporter.architecture import Architecture
from exporter.errors import RecipeError, UsageError
from exporter.formats import FORMATS
from exporter.formats.coreai_ops import OPERATORS, CoreAiOps
from exporter.quantization.weights import Weights
from runtimes import extras
from runtimes.bundle import EntryPoint, TensorSpec
from runtimes.errors import BundleError
from runtimes.quiet import quiet

ASSET = "model.aimodel"
STEP, CHUNK = 8, 64  # tokens of a block: Apple's shortest, for steps, and its longest, for prompts
LONGEST = 1 << 16  # tokens: the runner's positions are uint16
STATES = ("key_cache", "value_cache")
_PROGRAM, _HASH, _METADATA = "main.mlirb", "main.hash", "metadata.json"


class Graph(nn.Module):
    """One entry point, whose one output is called `output`.

    Its buffers are made in a first run, on fake tensors; entry points share them.
    """

    output: str

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        context: int,
        shared: dict[str, Tensor],
        length: int,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.arch, self.length = arch, length
        self.ops = CoreAiOps(arch, weights, context, self, shared, dtype)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # it computes nothing
            self(**self.inputs())

    def inputs(self) -> dict[str, Tensor]:
        """Zeros of the shapes and dtypes that it takes, in its order."""
        raise NotImplementedError

    def table(self) -> Tensor:
        return torch.zeros(self.arch.vocab, 1, self.arch.hidden, dtype=self.ops.dtype)


class Load(Graph):
    """() -> embedding_table [vocab, 1, hidden]: the embedding's integers, dequantized where it runs."""

    output = "embedding_table"

    def inputs(self) -> dict[str, Tensor]:
        return {}

    def forward(self) -> Tensor:
        return self.ops.matrix("embedding")[:, None, :, 0, 0]


class Gather(Graph):
    """Token ids int32 [1, length] and the table -> hidden states [1, length, 1, hidden]."""

    output = "gathered_embeddings"

    def inputs(self) -> dict[str, Tensor]:
        return {
            "in_new_token_ids": torch.zeros(1, self.length, dtype=torch.int32),
            "embedding_table": self.table(),
        }

    def forward(self, in_new_token_ids: Tensor, embedding_table: Tensor) -> Tensor:
        self.ops.begin(embedding_table)
        return decoder.embedding(self.ops, self.arch, in_new_token_ids)[:, :, None]


class Extend(Graph):
    """The layers and the head: logits [1, 1, length, vocab]; the caches, which it changes, are states.

    transformer_input [1, length, 1, hidden]; position_ids uint16 [1, length]; in_step int32 [1], the first of
    them; causal_mask [1, context, 1, length], added to scores; key_cache and value_cache
    [layers, 1, kv_heads * head_dim, 1, context]; embedding_table [vocab, 1, hidden], which a tied head needs.
    """

    output = "out_logits"

    def inputs(self) -> dict[str, Tensor]:
        arch, context, dtype = self.arch, self.ops.context, self.ops.dtype
        cache = (arch.layers, 1, arch.kv_heads * arch.head_dim, 1, context)
        return {
            "transformer_input": torch.zeros(1, self.length, 1, arch.hidden, dtype=dtype),
            "position_ids": torch.zeros(1, self.length, dtype=torch.uint16),
            "in_step": torch.zeros(1, dtype=torch.int32),
            "causal_mask": torch.zeros(1, context, 1, self.length, dtype=dtype),
            "key_cache": torch.zeros(cache, dtype=dtype),
            "value_cache": torch.zeros(cache, dtype=dtype),
            "embedding_table": self.table(),
        }

    def forward(
        self,
        transformer_input: Tensor,
        position_ids: Tensor,
        in_step: Tensor,
        causal_mask: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        embedding_table: Tensor,
    ) -> Tensor:
        self.ops.begin(
            embedding_table,
            position_ids=position_ids,
            in_step=in_step,
            causal_mask=causal_mask,
            key_cache=key_cache,
            value_cache=value_cache,
        )
        x = transformer_input[:, :, 0]
        for i in range(self.arch.layers):
            x = decoder.layer(self.ops, self.arch, i, x)
        key_cache.copy_(self.ops.keys)
        value_cache.copy_(self.ops.values)
        return self.result(x)

    def result(self, x: Tensor) -> Tensor:
        return decoder.head(self.ops, self.arch, x)[:, None]


class Prompt(Extend):
    """As `Extend`, for tokens whose logits nobody wants: one number of the caches stands in their place."""

    def result(self, x: Tensor) -> Tensor:
        return self.ops.keys[0, 0, 0, 0, 0] + self.ops.values[0, 0, 0, 0, 0]


def graphs(arch: Architecture, weights: Weights, context: int, **dtype: torch.dtype) -> dict[str, Graph]:
    """The entry points by their names; MissingExtra if coreai-torch is not installed."""
    extras.require(OPERATORS, "coreai")
    shared: dict[str, Tensor] = {}
    kinds: dict[str, tuple[type[Graph], int]] = {"load_embeddings": (Load, 0)}
    for length in (STEP, CHUNK):
        kinds[f"gather_embeddings_{length}"] = (Gather, length)
    kinds[f"extend_{context}_{STEP}"] = (Extend, STEP)
    kinds[f"prompt_opt_{context}_{CHUNK}"] = (Prompt, CHUNK)
    return {name: kind(arch, weights, context, shared, n, **dtype) for name, (kind, n) in kinds.items()}


def write_coreai(arch: Architecture, weights: Weights, context: int, folder: Path) -> tuple[EntryPoint, ...]:
    """Write model.aimodel into `folder`; returns its entry points.

    Integers of 4 and 8 bits with their scales (float16, which holds them exactly) and tables with their indices are
    stored as they are, floats in float16; what is multiplied is float16. Memory holds a byte for each weight. Raises
    RecipeError for float32 weights and tables of 3 bits, UsageError for a context that the runner's blocks do not
    fill, MissingExtra if coreai-torch is not installed.
    """
    if context % CHUNK or not 0 < context <= LONGEST:
        raise UsageError(
            f"Core AI cannot be written for a context of {context}: its runner gives blocks of {CHUNK} tokens, so "
            f"use a multiple of {CHUNK}, at most {LONGEST}"
        )
    _check_schemes(arch, weights)
    parts = graphs(arch, weights, context)
    with _quietly():
        asset = _convert(parts).save_asset(folder / ASSET)
        asset.update_metadata(functools.partial(_describe, family=arch.family, context=context))
    metadata = folder / ASSET / _METADATA  # coreai's writer gives its keys in an order that changes
    metadata.write_text(json.dumps(json.loads(metadata.read_bytes()), indent=2, sort_keys=True), "utf-8")
    return tuple(_entry_point(name, part) for name, part in parts.items())


@dataclass(frozen=True)
class Asset:
    """What coreai reads in an asset: names and types of each entry point's inputs, states and outputs, how many
    numbers of each type it stores, and how often each operation occurs."""

    inputs: dict[str, dict[str, str]]
    states: dict[str, dict[str, str]]
    outputs: dict[str, dict[str, str]]
    stored: dict[str, int]
    operations: dict[str, int]


def check_asset(path: Path) -> Asset:
    """Read an asset's program, hash and metadata with coreai's own reader; BundleError if they do not hold together.

    It checks that the program is the one that was written, and parses; not that a compiler takes it. The hash comes
    first, since coreai's reader ends the process on what is no program.
    """
    extras.check("coreai", "coreai")
    from coreai.authoring import AIModelAsset

    for name in (_PROGRAM, _HASH, _METADATA):
        if not (path / name).is_file():
            raise BundleError(f"{path} is no Core AI asset: {name} is missing; export it again")
    if hashlib.sha256((path / _PROGRAM).read_bytes()).digest() != (path / _HASH).read_bytes():
        raise BundleError(f"{path / _PROGRAM} is damaged: {_HASH} is another's; export it again")
    try:
        with _quietly():
            asset = AIModelAsset.load(path)
            summary, program = asset.summary(), asset.program
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be read by coreai ({error}): export it again") from None
    if summary is None:
        raise BundleError(f"{path} holds no program that coreai finds: export it again")
    names = summary.function_names
    return Asset(
        inputs={name: dict(summary.function_inputs(name)) for name in names},
        states={name: _states(program._get_graph(name)) for name in names},
        outputs={name: dict(summary.function_outputs(name)) for name in names},
        stored=dict(summary.storage_types),
        operations=dict(summary.operation_distribution),
    )


def _states(graph: Any) -> dict[str, str]:
    """Types of a graph's arguments that are handles of states, by name."""
    arguments = zip(graph.arg_attrs, graph.function_type.value.inputs, strict=True)
    return {
        attributes["coreai.name"].value: str(kind)
        for attributes, kind in arguments
        if str(kind).startswith("!coreai.handle")
    }


def _check_schemes(arch: Architecture, weights: Weights) -> None:
    """RecipeError for the first weight that cannot be held exactly."""
    for name, shape in arch.matrices():
        scheme = weights.scheme(name)
        try:
            FORMATS["coreai"].fit(scheme)
        except RecipeError as error:
            raise RecipeError(f"{name} {list(shape)} is {scheme.name}, and {error}") from None


def _convert(parts: dict[str, Graph]) -> Any:
    """A coreai AIProgram of all entry points."""
    import coreai_torch

    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    converter.register_torch_lowering("gochu::write_rows.default")(_lower_write_rows)
    table = coreai_torch.get_decomp_table()
    for name, part in parts.items():
        with torch.no_grad():
            exported = torch.export.export(part, (), part.inputs(), strict=False).run_decompositions(table)
        converter.add_exported_program(
            exported,
            input_names=[each for each in part.inputs() if each not in STATES],
            state_names=[each for each in part.inputs() if each in STATES],
            output_names=[part.output],
            entrypoint_name=name,
        )
    return converter.to_coreai()


def _lower_write_rows(values: dict[str, Any], node: Any, location: Any) -> Any:
    """`coreai_ops.write_rows` as coreai's slice_update, as Apple's exporter lowers its own (export/mlir_ops.py)."""
    import numpy as np
    from coreai._compiler.dialects import coreai

    cache, rows, layer, step = node.args
    cache, rows, step = (values[each.name] for each in (cache, rows, step))
    shape = list(rows.type.shape)
    first = coreai.constant(np.array([layer, 0, 0, 0], np.int32))
    last = coreai.constant(np.array([layer + 1, *shape[:-1]], np.int32))
    begin = coreai.concat(0, [first, step])
    end = coreai.concat(0, [last, coreai.add(step, coreai.constant(np.array(shape[-1:], np.int32)))])
    return coreai.slice_update(cache, begin, end, [1] * 5, coreai.expand_dims(rows, [0]))


def _entry_point(name: str, part: Graph) -> EntryPoint:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = part.inputs()
        output = part(**inputs)
    return EntryPoint(
        name=name,
        file=ASSET,
        inputs=tuple(_spec(each, value) for each, value in inputs.items() if each not in STATES),
        outputs=(_spec(part.output, output),),
    )


def _spec(name: str, value: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape))


def _describe(metadata: Any, family: str, context: int) -> None:
    """What the asset says of itself; no date, so that the same model makes the same file."""
    metadata.creation_date = 0.0
    metadata.set_custom("gochu.family", family)
    metadata.set_custom("gochu.context", context)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """`quiet`, also about what coreai-torch prints."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield
