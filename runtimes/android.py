"""What an Android phone says of itself, read from its own tools' text: properties, heat, battery, memory.

Pure functions over text, so that whatever brings the text (adb, a farm's log) can use them. Formats: the sources of the
Android Open Source Project, ThermalManagerService.java, BatteryService.java, ActivityManagerService.java.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import profiles
from runtimes.errors import TargetError
from runtimes.measurement import Condition

PROPERTIES = (
    "ro.product.model",
    "ro.product.manufacturer",
    "ro.soc.model",
    "ro.product.cpu.abilist",
    "ro.build.version.release",
    "ro.build.id",
)
# PowerManager.THERMAL_STATUS_*; from severe on the system takes speed away
# (https://developer.android.com/reference/android/os/PowerManager).
STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
SEVERE = STATUSES.index("severe")
_NOT_CELSIUS = {6, 7, 8}  # android.os.Temperature: battery voltage, current and percentage
_STATUS = re.compile(r"^\s*Thermal Status: (\d+)", re.MULTILINE)
_NOW = re.compile(r"^Current temperatures from HAL:\n((?:[ \t]+.*\n?)*)", re.MULTILINE)
_TEMPERATURE = re.compile(r"Temperature\{mValue=(?P<value>-?[\d.]+), mType=(?P<type>-?\d+),")
# Rows of `dumpsys meminfo`: the driver's own account of buffers (memtrack), kB of them first.
_BUFFERS = re.compile(r"^\s*(?:Gfx dev|EGL mtrack|GL mtrack|Other mtrack)\s+(\d+)", re.MULTILINE)
_PROCESS = re.compile(r"\*\* MEMINFO in pid (\d+)")
_MACHINES = {3: "x86", 40: "armeabi-v7a", 62: "x86_64", 183: "arm64-v8a", 243: "riscv64"}  # ELF's e_machine


def severity(thermalservice: str) -> int | None:
    """The highest thermal status (an index into STATUSES) in what `dumpsys thermalservice` printed, once or more
    often; None if it tells none."""
    return max((int(number) for number in _STATUS.findall(thermalservice)), default=None)


def condition(thermalservice: str, battery: str) -> Condition:
    """A phone's state from `dumpsys thermalservice` and `dumpsys battery`, as far as they tell it.

    Only what the sensors say now counts, not the temperatures that the service has kept.
    """
    status = severity(thermalservice)
    now = _NOW.search(thermalservice)
    degrees = [
        float(match["value"])
        for match in _TEMPERATURE.finditer(now[1] if now else "")
        if int(match["type"]) >= 0 and int(match["type"]) not in _NOT_CELSIUS
    ]
    fields = dict(re.findall(r"^  ([A-Za-z ]+): (\S+)$", battery, re.MULTILINE))
    level, scale = fields.get("level", ""), fields.get("scale", "")
    plugged = [value for name, value in fields.items() if name.endswith(" powered")]
    return Condition(
        thermal="" if status is None else STATUSES[min(status, len(STATUSES) - 1)],
        celsius=max(degrees, default=None),
        battery=100 * int(level) / int(scale) if level.isdigit() and scale.isdigit() and int(scale) else None,
        charging="true" in plugged if plugged else None,
    )


def memory_peaks(statuses: str) -> dict[str, int]:
    """The largest of each kind of memory, in bytes, in lines of /proc/PID/status that were read again and again.

    Names as in `runtimes.measurement.Figure`; only those that were seen. The kernel itself keeps VmHWM, the peak of
    all; it keeps none of the other two, so theirs lie between two looks at the least.
    """
    looks: dict[str, list[int]] = {}
    for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", statuses, re.MULTILINE):
        looks.setdefault(name, []).append(1024 * int(kilobytes))
    shared = looks.get("RssShmem", [])
    anonymous = looks.get("RssAnon", [])
    if len(shared) == len(anonymous):
        anonymous = [a + b for a, b in zip(anonymous, shared, strict=True)]
    found = {
        "peak_memory": looks.get("VmHWM", []),
        "peak_anonymous_memory": anonymous,
        "peak_mapped_memory": looks.get("RssFile", []),
    }
    return {name: max(sizes) for name, sizes in found.items() if sizes}


def accelerator_memory(meminfo: str, fdinfo: str = "") -> int | None:
    """The most bytes in buffers of a GPU or an NPU that were seen, once or more often; None if none were.

    `meminfo`: what `dumpsys meminfo PID` printed, in which a GPU's driver accounts for its own. `fdinfo`: the lines of
    /proc/PID/fdinfo/*, each after its file's path, in which the kernel tells the size of each DMA buffer, as an NPU
    takes (docs.kernel.org/filesystems/proc.html, DMA Buffer files); a line `look` before each look. A buffer may be in
    both, so the larger sum counts: there is at least that much.
    """
    dumps = _PROCESS.split(meminfo)[2::2]
    sums = [1024 * sum(map(int, _BUFFERS.findall(dump.partition("App Summary")[0]))) for dump in dumps]
    sums += [_dma_buffers(look) for look in re.split(r"^look$", fdinfo, flags=re.MULTILINE)]
    return max(sums) or None


def _dma_buffers(look: str) -> int:
    """Bytes of all DMA buffers of a process, each once, however many descriptors it has."""
    files: dict[str, dict[str, str]] = {}
    for path, name, value in re.findall(r"^(/proc/\S+?):(\w+):\s*(\S+)", look, re.MULTILINE):
        files.setdefault(path, {})[name] = value
    buffers = {
        each.get("ino", path): each["size"]
        for path, each in files.items()
        if "exp_name" in each and "size" in each
    }
    return sum(map(int, buffers.values()))


def device(properties: Mapping[str, str]) -> "profiles.Device | None":
    """The profile of the phone with these properties, by its model code; None if there is none, or several."""
    try:
        found = profiles.find(properties.get("ro.product.model", ""))
    except (profiles.UnknownDevice, profiles.AmbiguousDevice):
        return None
    return found if found.os == "android" else None


def chip(properties: Mapping[str, str]) -> str | None:
    """The chip's id in the profiles, by what the system calls it, else by the phone's model; None if unknown."""
    name = properties.get("ro.soc.model", "").casefold()
    for each in profiles.chips():
        if name and each.ro_soc_model and name in map(str.casefold, each.ro_soc_model.names):
            return each.id
    known = device(properties)
    return known.soc.id if known else None


def called(properties: Mapping[str, str]) -> str:
    """What the phone is called: by its profile's name, else its maker's, with its model code.

    >>> called({"ro.product.manufacturer": "Acme", "ro.product.model": "Phone 9"})
    'Acme Phone 9'
    """
    model = properties.get("ro.product.model", "")
    if known := device(properties):
        return f"{known.name} ({model})"
    return f"{properties.get('ro.product.manufacturer', '')} {model}".strip() or "unknown phone"


def system(properties: Mapping[str, str]) -> str:
    """The operating system with its version and build."""
    build = properties.get("ro.build.id", "")
    return f"Android {properties.get('ro.build.version.release', '?')}" + (f" ({build})" if build else "")


def check_abi(program: Path, properties: Mapping[str, str], phone: str) -> None:
    """TargetError if the phone cannot execute this program: it was built for another processor.

    A script is for any; so is what has no ELF header, of which the phone's own error will tell.
    """
    with program.open("rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF" or len(header) < 20:
        return
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    built = _MACHINES.get(machine, f"ELF machine {machine}")
    takes = properties.get("ro.product.cpu.abilist", "")
    if takes and built not in takes.split(","):
        raise TargetError(
            f"{program.name} is built for {built}, and {phone} executes {takes.replace(',', ', ')}: build it for one "
            "of those with the Android NDK"
        )
