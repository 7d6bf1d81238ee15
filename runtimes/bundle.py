"""The bundle: a folder that says all about one exported model, and is all that a runtime reads.

`manifest.json` in the folder is a `Manifest`; every other file is listed in it with size and SHA-256.
Whatever makes a bundle writes these models; whatever runs or measures one reads them; nothing else passes
between the two sides.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtimes.errors import BundleError, ChecksumError, UnsafePath

SCHEMA_VERSION: Literal[1] = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


def _inside(path: str) -> str:
    """Refuse a path that is not plainly below the bundle's folder (the same verdict on every system)."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in path or "\0" in path or ".." in parts:
        raise ValueError(f"path {path!r} leaves the bundle's folder")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TokenId = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Immutable, and no key that the schema does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Strict):
    """One file of the bundle."""

    path: RelativePath
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Sha256


class Alternative(Strict):
    """What was not chosen, why not, and the id of the rule that says so."""

    value: str
    reason: str
    rule: str


class Choice(Strict):
    """A decision with its reason; `topic` is what was decided (format, scheme, context, ...).

    `rules`: the ids of the rules that made it, in the planner's table; `source`: who says what they say.
    """

    topic: str
    value: str
    reason: str
    rules: tuple[str, ...] = ()
    source: str = ""
    alternatives: tuple[Alternative, ...] = ()


class ModelInfo(Strict):
    """What was exported. `source` is a folder's name or a repository id, `revision` its pinned commit."""

    name: str
    source: str
    revision: str | None = None
    family: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    trained_context: int  # tokens


class Tokens(Strict):
    """Special token ids; generation stops on any of `eos`."""

    bos: TokenId | None = None
    eos: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    pad: TokenId | None = None


class Probe(Strict):
    """A text and the ids it must become; `chat`: as a user's message, through the template.

    A runtime on a phone checks its own tokenizer and template against these.
    """

    text: str
    chat: bool
    ids: tuple[TokenId, ...]


class TensorSpec(Strict):
    """One input or output of an entry point; a dimension that varies is given by its name.

    An integer that stands for a real number is (integer - `zero_point`) * `scale`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    scale: float | None = None
    zero_point: int | None = None


class EntryPoint(Strict):
    """A graph that can be run: `prefill`, `decode`, or one graph that does both. `file` may be a folder of files."""

    name: str
    file: RelativePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class KVCache(Strict):
    """The key/value cache: per layer two buffers of `dtype`.

    `held_by`: the "caller", who gives [1, kv_heads, context, head_dim] as inputs and takes them as outputs, or
    the "program", which keeps them to itself. `shared_buffer`: past and present may be the same memory.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    shared_buffer: bool
    held_by: Literal["caller", "program"] = "caller"


class Residency(Strict):
    """Which share of the model ran on `accelerator`; `elsewhere` lists the op types that did not.

    `elsewhere_ops`: how many of each; `reasons`: why not, in the words of the accelerator's compiler. `macs`:
    multiply-adds for one token; `weight_bytes`: weights as stored.
    """

    accelerator: str
    ops: int
    ops_on: int
    elsewhere: tuple[str, ...] = ()
    elsewhere_ops: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()
    macs: int = 0
    macs_on: int = 0
    weight_bytes: int = 0
    weight_bytes_on: int = 0


class Compiled(Strict):
    """What a vendor's compiler made of a variant's graphs.

    `chip`: its number in the vendor's SDK, of generation `arch`; `sdk`: the version that compiled, and
    `minimum_sdk` the first that knows the chip, if that is known. `sources`: the graphs that were compiled, which the
    vendor's simulator runs.
    """

    chip: int
    arch: str
    sdk: str
    minimum_sdk: str | None = None
    sources: tuple[EntryPoint, ...]


class Variant(Strict):
    """One way to run the model. `chips` are the chip ids it was made for; empty means any.

    `delegate`: what computes for the engine, where it hands that on (xnnpack, vulkan, coreml, ...).
    `allows_cpu_ops`: whoever exported it accepted operations outside of the accelerator.
    """

    name: str
    format: str
    engine: str
    delegate: str = ""
    chips: tuple[str, ...] = ()
    scheme: str
    context: int  # tokens that the graph can hold
    last_logits_only: bool  # logits are [1, 1, vocab] whatever the number of tokens given
    entry_points: Annotated[tuple[EntryPoint, ...], Field(min_length=1)]
    kv_cache: KVCache
    files: tuple[RelativePath, ...]
    residency: Residency | None = None
    allows_cpu_ops: bool = False
    compiled: Compiled | None = None
    toolchain: dict[str, str]  # package -> version


class TensorReport(Strict):
    """How one weight was quantized. `error` is ||w - q||² / ||w||² (0 = exact)."""

    name: str
    scheme: str
    algorithm: str
    shape: tuple[int, ...]
    bytes: int
    error: float
    max_error: float  # max |w - q|, in the weight's own unit
    digest: Sha256  # of the integers and scales, the same in every format
    note: str = ""


class Check(Strict):
    """One check of the gate."""

    name: str
    passed: bool
    detail: str
    figures: dict[str, float] = {}


class Gate(Strict):
    """The proof that the export says what the original says, or the plain word that nobody looked."""

    status: Literal["passed", "unverified"]
    checks: tuple[Check, ...] = ()


class Manifest(Strict):
    """`manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    gochu: str  # version that wrote it
    model: ModelInfo
    device: str | None = None  # the profile it was planned for
    plan: tuple[Choice, ...]
    prediction: dict[str, float] = {}  # figure -> value, units in the key
    recipe: dict[str, Any]
    tensors: tuple[TensorReport, ...]
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    tokens: Tokens
    chat_template: str | None = None
    probes: tuple[Probe, ...] = ()
    files: tuple[FileEntry, ...]
    gate: Gate
    measurements: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _every_file_is_listed(self) -> "Manifest":
        listed = [entry.path for entry in self.files]
        if len(set(listed)) != len(listed):
            raise ValueError("a file is listed twice")
        folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
        sources = [e.file for v in self.variants if v.compiled for e in v.compiled.sources]
        needed = {path for v in self.variants for path in (*v.files, *(e.file for e in v.entry_points))}
        needed.update(sources)
        if missing := sorted(needed - set(listed) - folders):
            raise ValueError(f"variants use files that are not listed: {', '.join(missing)}")
        return self

    def to_json(self) -> str:
        """The manifest as it stands in the file; the same manifest gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=2) + "\n"


class Bundle:
    """An opened bundle: its manifest, and its files by safe paths.

    >>> bundle = Bundle.open("out/")            # doctest: +SKIP
    >>> bundle.manifest.tokens.eos              # doctest: +SKIP
    (2,)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Read and check the manifest, and that each file is there with its size.

        Not yet its bytes: `verify_checksums` looks at all, `runtimes.checksums` at those that are loaded.
        Raises BundleError (not a bundle, malformed, a file missing or of another size) or UnsafePath.
        """
        folder = Path(path)
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}; make one with `gochu export`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{folder / MANIFEST} cannot be read: {error}") from None
        bundle = cls(folder, parse_manifest(text, str(folder / MANIFEST)))
        for entry in bundle.manifest.files:
            found = bundle.file(entry.path)
            if not found.is_file():
                raise BundleError(f"{found} is missing from the bundle; export it again")
            if found.stat().st_size != entry.size:
                raise ChecksumError(
                    f"{found} has {found.stat().st_size} bytes where the manifest says {entry.size}: "
                    "it was changed or cut off; export it again"
                )
        return bundle

    def file(self, path: str) -> Path:
        """The place of a file of the bundle; UnsafePath if a link leads it out of the folder."""
        found = self.path / path
        if not found.resolve().is_relative_to(self.path.resolve()):
            raise UnsafePath(f"{path!r} leads out of the bundle {self.path}; it is not read")
        return found

    def verify_checksums(self) -> None:
        """Read every file and compare its SHA-256; ChecksumError names the first that differs."""
        for entry in self.manifest.files:
            self.check(entry)

    def check(self, entry: FileEntry) -> None:
        """Read one file and compare its SHA-256; ChecksumError if it differs, BundleError if it cannot be read."""
        place = self.file(entry.path)
        try:
            found = file_sha256(place)
        except OSError as error:
            raise BundleError(f"{place} cannot be read: {error}; export the bundle again") from None
        if found != entry.sha256:
            raise ChecksumError(f"{place} is not what was exported (its SHA-256 differs); export it again")

    def size(self) -> int:
        """Bytes of all files together, the manifest not counted."""
        return sum(entry.size for entry in self.manifest.files)


def parse_manifest(text: str, where: str = MANIFEST) -> Manifest:
    """Check a manifest's text; BundleError names the first thing that is wrong with it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON ({error}); export the bundle again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r} where this Gochu reads {SCHEMA_VERSION}: "
            "update Gochu or export the bundle again"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        message = f"{where}: {'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}"
        if "leaves the bundle's folder" in first["msg"]:
            raise UnsafePath(message) from None
        raise BundleError(f"{message}; export the bundle again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
