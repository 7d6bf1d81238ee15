"""What a phone's own tools print, as text."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from adb_phone import BATTERY, thermal

from runtimes import android
from runtimes.errors import TargetError
from runtimes.measurement import Condition

STATUS = """VmHWM:\t   {hwm} kB
RssAnon:\t   {anon} kB
RssFile:\t   {file} kB
RssShmem:\t   {shmem} kB
"""


def test_a_condition_is_what_the_sensors_say_now() -> None:
    """Not the cached 91 °C, nor a voltage, nor a sensor without a value."""
    found = android.condition(thermal(2, 40.25), BATTERY)
    assert found == Condition(thermal="moderate", celsius=40.25, battery=83.0, charging=True)
    unplugged = BATTERY.replace("USB powered: true", "USB powered: false")
    assert android.condition("", unplugged.replace("scale: 100", "scale: 200")) == Condition(
        thermal="", celsius=None, battery=41.5, charging=False
    )
    assert android.condition("Can't find service: thermalservice", "") == Condition()


def test_the_worst_of_several_looks_counts() -> None:
    assert android.severity(thermal(0) + thermal(3) + thermal(1)) == 3
    assert android.severity("") is None


def test_memory_peaks_are_of_all_looks() -> None:
    looks = STATUS.format(hwm=900, anon=500, file=300, shmem=20) + STATUS.format(
        hwm=1000, anon=400, file=350, shmem=10
    )
    assert android.memory_peaks(looks) == {
        "peak_memory": 1000 * 1024,
        "peak_anonymous_memory": 520 * 1024,
        "peak_mapped_memory": 350 * 1024,
    }
    assert android.memory_peaks("") == {}


def test_buffers_of_an_accelerator_are_what_its_driver_accounts_for() -> None:
    rows = (
        "  Native Heap  900  900\n      Gfx dev   {}  1\n    GL mtrack   7  7\n App Summary\n  Graphics:  9\n"
    )
    dump = "** MEMINFO in pid {} [x] **\n" + rows
    assert (
        android.accelerator_memory(dump.format(1, 10) + dump.format(1, 30) + dump.format(1, 20)) == 37 * 1024
    )
    assert android.accelerator_memory("No process found for: 4711\n") is None
    assert (
        android.accelerator_memory("** MEMINFO in pid 1 [x] **\n  Native Heap  900  900\n   GL mtrack  0 0\n")
        is None
    )


def test_dma_buffers_are_counted_once_each() -> None:
    """As the kernel's documentation shows them; two descriptors of one buffer, and a file that is none."""
    buffer = (
        "/proc/7/fdinfo/{fd}:pos:\t0\n/proc/7/fdinfo/{fd}:flags:\t04002\n/proc/7/fdinfo/{fd}:ino:\t{ino}\n"
    )
    buffer += "/proc/7/fdinfo/{fd}:size:   {size}\n/proc/7/fdinfo/{fd}:count:  2\n"
    buffer += "/proc/7/fdinfo/{fd}:exp_name:  system\n"
    other = "/proc/7/fdinfo/1:pos:\t0\n/proc/7/fdinfo/1:ino:\t5\n/proc/7/fdinfo/1:size:\t77\n"
    first = (
        "look\n"
        + buffer.format(fd=3, ino=63107, size=32768)
        + buffer.format(fd=4, ino=63107, size=32768)
        + other
    )
    second = "look\n" + buffer.format(fd=3, ino=1, size=32768) + buffer.format(fd=4, ino=2, size=4096)
    assert android.accelerator_memory("", first) == 32768
    assert android.accelerator_memory("", second + first) == 36864
    assert android.accelerator_memory("", "look\n" + other) is None
    meminfo = "** MEMINFO in pid 7 [x] **\n    GL mtrack   64   64\n"
    assert android.accelerator_memory(meminfo, first) == 64 * 1024


def test_a_phone_is_found_in_the_profiles() -> None:
    s24 = {"ro.product.model": "SM-S928N", "ro.product.manufacturer": "samsung", "ro.soc.model": "SM8650"}
    assert android.called(s24) == "Galaxy S24 Ultra (SM-S928N)"
    assert android.chip(s24) == "sm8650"
    assert android.chip(s24 | {"ro.soc.model": ""}) == "sm8650"
    assert android.chip({"ro.soc.model": "sm8550"}) == "sm8550"
    assert android.chip({"ro.soc.model": "X1", "ro.product.model": "갤럭시 없음"}) is None
    assert (
        android.called({"ro.product.model": "iPhone17,1", "ro.product.manufacturer": "?"}) == "? iPhone17,1"
    )
    assert android.called({}) == "unknown phone"


@pytest.mark.parametrize(
    ("machine", "built"), [(183, None), (40, None), (62, "x86_64"), (8, "ELF machine 8")]
)
def test_a_program_must_be_for_the_phones_processor(tmp_path: Path, machine: int, built: str | None) -> None:
    program = tmp_path / "runner"
    program.write_bytes(
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + machine.to_bytes(2, "little") + bytes(44)
    )
    phone = {"ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a"}
    if built is None:
        android.check_abi(program, phone, "P")
        return
    with pytest.raises(
        TargetError, match=f"runner is built for {built}, and P executes arm64-v8a, armeabi-v7a"
    ):
        android.check_abi(program, phone, "P")


def test_a_script_is_for_any_processor(tmp_path: Path) -> None:
    program = tmp_path / "runner"
    program.write_text("#!/bin/sh\necho this is long enough for a header\n")
    android.check_abi(program, {"ro.product.cpu.abilist": "arm64-v8a"}, "P")
