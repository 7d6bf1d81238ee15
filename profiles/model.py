"""What a profile may say. Each TOML table that holds a number also holds the source of that number.

A file is validated against `ChipProfile` or `DeviceProfile`, which know the keys of the file and no others;
`Chip` and `Device` add what the file does not say itself: its identity (the file's name) and what other files
say of it: the number types of the chip's NPU, the device's chip and memory rule.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

GIB = 1 << 30

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Source = Annotated[str, StringConstraints(strip_whitespace=True, min_length=8)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
# A model number as the system reports it; a final * stands for up to three letters or digits (SM-S928U1).
ModelCode = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,.\-]+\*?$")]
Count = Annotated[int, Field(strict=True, gt=0)]
Amount = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]

OperatingSystem = Literal["android", "ios", "macos", "linux", "windows"]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cluster(Frozen):
    """CPU cores of one kind. `performance` marks those that decoding should use."""

    count: Count
    core: Text
    ghz: Amount | None = None
    performance: Annotated[bool, Field(strict=True)]


class Cpu(Frozen):
    clusters: Annotated[tuple[Cluster, ...], Field(min_length=1)]
    source: Source


class Dram(Frozen):
    """Peak bandwidth of the memory that CPU, GPU and NPU share: transfers per second x bus width."""

    gb_per_s: Amount
    source: Source


class Gpu(Frozen):
    """`tops` only where the maker sells the GPU by it (Jetson)."""

    name: Text
    tops: Amount | None = None
    source: Source


class NpuFigures(Frozen):
    """`tops` is what the maker states, in 10^12 operations per second at the precision it chose."""

    kind: str
    name: Text
    tops: Amount | None = None
    source: Source

    @property
    def family(self) -> str:
        """What NPUs that take the same number types have in common."""
        return self.kind


class Hexagon(NpuFigures):
    """Qualcomm's NPU. `soc_model` is QNN's number for the chip; `vtcm_mb` its tightly coupled memory."""

    kind: Literal["hexagon"]
    name: Text = "Hexagon"
    arch: Annotated[str, StringConstraints(pattern=r"^v\d\d$")]
    soc_model: Count | None = None
    vtcm_mb: Count | None = None
    min_qnn_sdk: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")] | None = None

    @property
    def family(self) -> str:
        return f"{self.kind}-{self.arch}"


class NeuralEngine(NpuFigures):
    """Apple's NPU."""

    kind: Literal["ane"]
    name: Text = "Neural Engine"


class ExynosNpu(NpuFigures):
    """Samsung's NPU. `enn_chip` is the name that the ENN compiler takes; None: it cannot compile for it."""

    kind: Literal["exynos"]
    name: Text = "Exynos NPU"
    enn_chip: Text | None = None

    @property
    def family(self) -> str:
        return f"{self.kind}-{self.enn_chip.lower()}" if self.enn_chip else self.kind


class OtherNpu(NpuFigures):
    """An NPU that is known by name only: MediaTek's APU, Google's TPU."""

    kind: Literal["apu", "tpu"]


Npu = Annotated[Hexagon | NeuralEngine | ExynosNpu | OtherNpu, Field(discriminator="kind")]

# A weight type alone has one scale per output channel; -block: one per block of a channel, -lut: a lookup table.
WeightType = Literal["int4", "int4-block", "int8", "uint8", "int16", "uint16", "fp16", "lut"]
ActivationType = Literal["int8", "uint8", "int16", "uint16", "fp16"]


class NumberTypes(Frozen):
    """What the NPUs of some families compute with through the compilers that Gochu can reach."""

    npus: Annotated[tuple[Text, ...], Field(min_length=1)]
    weights: Annotated[tuple[WeightType, ...], Field(min_length=1)]
    activations: Annotated[tuple[ActivationType, ...], Field(min_length=1)]
    note: Text | None = None
    source: Source


class SystemNames(Frozen):
    """What the system calls the chip: the values of Android's property ro.soc.model."""

    names: Annotated[tuple[Text, ...], Field(min_length=1)]
    source: Source


class ChipProfile(Frozen):
    name: Text
    vendor: Text
    ro_soc_model: SystemNames | None = None
    cpu: Cpu | None = None
    dram: Dram | None = None
    npu: Npu | None = None
    gpu: Gpu | None = None
    note: Text | None = None


class Chip(ChipProfile):
    """A system on a chip. What is not known is None, never a guess."""

    id: Identifier
    number_types: NumberTypes | None = None

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """Peak memory bandwidth in bytes per second."""
        return None if self.dram is None else self.dram.gb_per_s * 1e9

    @property
    def performance_cores(self) -> int | None:
        """How many CPU cores are not efficiency cores: the number of threads to decode with."""
        if self.cpu is None:
            return None
        return sum(cluster.count for cluster in self.cpu.clusters if cluster.performance)


class EntitledShare(Frozen):
    """The share of RAM that an entitled app may use on devices with at least `min_ram_gib` of it."""

    min_ram_gib: Annotated[float, Field(strict=True, ge=0)]
    share: Share


class Entitlement(Frozen):
    """What an app gets that asks the system for more, by the size of the RAM."""

    key: Text
    shares: Annotated[tuple[EntitledShare, ...], Field(min_length=1)]
    source: Source


class MemoryRule(Frozen):
    """How much of the RAM an app may plan with: max(min(share x RAM, RAM - reserve), 0)."""

    share: Share
    reserve_bytes: Annotated[int, Field(strict=True, ge=0)]
    source: Source
    entitlement: Entitlement | None = None

    def app_bytes(self, ram_bytes: int) -> int:
        return max(min(int(self.share * ram_bytes), ram_bytes - self.reserve_bytes), 0)

    def entitled_bytes(self, ram_bytes: int) -> int | None:
        if self.entitlement is None:
            return None
        shares = [step.share for step in self.entitlement.shares if ram_bytes >= step.min_ram_gib * GIB]
        return int(max(shares, default=0.0) * ram_bytes)


class Models(Frozen):
    """The model codes that stand for this device, and who says that they have this chip."""

    codes: Annotated[tuple[ModelCode, ...], Field(min_length=1)]
    source: Source


class Ram(Frozen):
    ram_gib: Amount
    source: Source


class MeasuredMemory(Frozen):
    """What an app was seen to get, in 10^9 bytes; it replaces the rule of the operating system."""

    gb: Amount
    entitled_gb: Amount | None = None
    source: Source


class Versions(Frozen):
    """Versions of the operating system: the one it was sold with, and the last that the source knows it to have
    or to be promised.
    """

    first: Version | None = None
    last: Version | None = None
    source: Source


class Farms(Frozen):
    """What the device is called where phones are rented. Left out: not there, or not known to be there."""

    ai_hub: tuple[Text, ...] = ()
    device_farm: tuple[Text, ...] = ()
    firebase: tuple[Text, ...] = ()
    browserstack: tuple[Text, ...] = ()
    source: Source

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.ai_hub, *self.device_farm, *self.firebase, *self.browserstack)


class DeviceProfile(Frozen):
    name: Text
    brand: tuple[Text, ...] = ()
    aliases: tuple[Text, ...] = ()
    os: OperatingSystem
    chip: Identifier
    market: Text | None = None
    models: Models | None = None
    memory: Ram
    app_memory: MeasuredMemory | None = None
    versions: Versions | None = None
    farms: Farms | None = None
    note: Text | None = None


class Device(DeviceProfile):
    """One phone, board or computer with one chip.

    A phone that is sold with two chips is two devices of the same name. Where one model code is sold with
    several sizes of RAM, the profile holds the smallest: what fits there fits in all.
    """

    id: Identifier
    soc: Chip
    memory_rule: MemoryRule

    @property
    def model_codes(self) -> tuple[str, ...]:
        return self.models.codes if self.models else ()

    @property
    def ram_bytes(self) -> int:
        return int(self.memory.ram_gib * GIB)

    @property
    def app_memory_bytes(self) -> int:
        """Bytes that an app without entitlements may plan to use in all: weights, KV cache, code, buffers."""
        if self.app_memory:
            return int(self.app_memory.gb * 1e9)
        return self.memory_rule.app_bytes(self.ram_bytes)

    @property
    def entitled_app_memory_bytes(self) -> int | None:
        """The same for an app with the memory entitlement (iOS); None where the system has no such thing."""
        if self.app_memory and self.app_memory.entitled_gb:
            return int(self.app_memory.entitled_gb * 1e9)
        return self.memory_rule.entitled_bytes(self.ram_bytes)

    @property
    def app_memory_reason(self) -> str:
        """Where `app_memory_bytes` (and the entitled figure) come from, in one sentence."""
        ram, app = f"{self.memory.ram_gib:g} GiB", f"{self.app_memory_bytes / GIB:.1f} GiB"
        rule = self.memory_rule
        if self.app_memory:
            reason = f"{app} of {ram} was measured on this device ({self.app_memory.source})"
        elif rule.share * self.ram_bytes <= self.ram_bytes - rule.reserve_bytes:
            reason = f"{app} is {rule.share:.0%} of {ram} of RAM ({rule.source})"
        else:
            reason = (
                f"{app} is {ram} of RAM less {rule.reserve_bytes / 1e9:.1f} GB for the system ({rule.source})"
            )
        entitled = self.entitled_app_memory_bytes
        if entitled is None or rule.entitlement is None:
            return reason
        source = (
            "measured too" if self.app_memory and self.app_memory.entitled_gb else rule.entitlement.source
        )
        return f"{reason}; {entitled / GIB:.1f} GiB with {rule.entitlement.key} ({source})"
