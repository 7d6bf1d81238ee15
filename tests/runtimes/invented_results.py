"""Measurements that nobody made, of phones that somebody has: for the tests of reports and comparisons."""

import math
import random
from typing import Any

from runtimes.measurement import (
    Answer,
    Backend,
    Condition,
    Figure,
    Measurement,
    Method,
    Place,
    Subject,
    sampled,
)

MB = 1e6
SPEEDS = {"Galaxy S24 Ultra": 31.0, "갤럭시 S23": 22.5, "iPhone 16 Pro": 38.0}
CHIPS = {"Galaxy S24 Ultra": "sm8650", "갤럭시 S23": "sm8550", "iPhone 16 Pro": "a18-pro"}


def measurement(*figures: Figure, seed: int = 0, **changes: Any) -> Measurement:
    """A measurement with these figures; `changes`: fields of any of its parts, by name."""
    fields: dict[str, Any] = {
        "model": "Example-0.5B",
        "bundle": f"{seed:064x}",
        "variant": "cpu",
        "format": "onnx",
        "scheme": "int4",
        "bytes": 398_000_000,
        "toolchain": {"gochu": "0.1.0"},
        "target": "adb",
        "device": "Galaxy S24 Ultra",
        "os": "Android 15",
        "engine": "onnxruntime 1.24",
        "threads": 4,
        "workload": "standard",
        "prompt_tokens": 64,
        "new_tokens": 128,
        "context": 2048,
        "warmup": 1,
        "repeats": 5,
        "command": "gochu bench out --on adb --workload standard",
        "time": "2026-11-20T09:30:00+00:00",
    } | changes
    parts = {
        name: kind(**{key: value for key, value in fields.items() if key in kind.model_fields})
        for name, kind in (("what", Subject), ("where", Place), ("how", Method))
    }
    rest = {key: value for key, value in fields.items() if key in Measurement.model_fields}
    return Measurement(**parts, figures=figures, **rest)


def speeds(value: float, count: int = 5, seed: int = 0, scatter: float = 0.02) -> list[float]:
    """Samples around a value."""
    drawn = random.Random(seed)
    return [value * math.exp(drawn.gauss(0, scatter)) for _ in range(count)]


def phone(device: str, workload: str = "standard") -> dict[str, Any]:
    """Its fields of a measurement."""
    apple = {"target": "iphone", "os": "iOS 18.1", "engine": "Core ML 8", "format": "coreml", "threads": None}
    fields = {"device": device, "chip": CHIPS[device]} | (apple if device.startswith("iPhone") else {})
    target = fields.get("target", "adb")
    return fields | {"command": f"gochu bench out --on {target} --device '{device}' --workload {workload}"}


def case(device: str, prompt: int, factor: float = 1.0, /, **changes: Any) -> Measurement:
    """One case on a phone; `factor`: how many times as slow."""
    speed = SPEEDS[device] / (1 + prompt / 6000) / factor
    prefill = 14 * speed / (1 + prompt / 4000)
    size = {"Galaxy S24 Ultra": 612, "갤럭시 S23": 604, "iPhone 16 Pro": 571}[device] + prompt / 40
    return measurement(
        sampled("load_time", "s", [1.21 * factor]),
        sampled("ttft", "s", [prompt / each for each in speeds(prefill, seed=prompt)]),
        sampled("prefill_speed", "tokens/s", speeds(prefill, seed=prompt)),
        sampled("decode_speed", "tokens/s", speeds(speed, seed=prompt + 1)),
        sampled("peak_memory", "bytes", [size * MB]),
        sampled("peak_anonymous_memory", "bytes", [0.31 * size * MB]),
        **phone(device) | {"prompt_tokens": prompt} | changes,
    )


def sustained(device: str, minutes: float = 10, throttles: bool = True) -> Measurement:
    """Minutes of decoding; a phone that throttles loses a third after the fourth."""
    times = [7.5 * i for i in range(int(60 * minutes / 7.5))]
    drawn = random.Random(device)
    values = [
        SPEEDS[device]
        * (1 - throttles * 0.34 / (1 + math.exp(-(t - 260) / 45)))
        * math.exp(drawn.gauss(0, 0.025))
        for t in times
    ]
    return measurement(
        sampled("decode_speed", "tokens/s", values, times=times),
        sampled("peak_memory", "bytes", [640 * MB]),
        **phone(device, "sustained"),
        workload="sustained",
        prompt_tokens=256,
        sustained_minutes=minutes,
        cool_down=60,
        marks=("throttled",) if throttles else (),
        before=Condition(thermal="none", celsius=31.5, battery=84, charging=False),
        after=Condition(thermal="moderate" if throttles else "none", celsius=44.0, battery=79),
    )


def predicted(device: str, prompt: int = 64) -> Measurement:
    """What a formula says of a case."""
    return measurement(
        Figure(name="decode_speed", unit="tokens/s", kind="predicted", value=1.13 * SPEEDS[device]),
        Figure(name="peak_memory", unit="bytes", kind="predicted", value=590 * MB),
        **phone(device) | {"prompt_tokens": prompt, "command": f"gochu plan out --device '{device}'"},
    )


def emulated() -> Measurement:
    """An arm64 emulator's: instructions, and no seconds."""
    return measurement(
        Figure(name="decode_instructions", unit="instructions", kind="emulated", value=812_400_000),
        Figure(name="peak_memory", unit="bytes", kind="emulated", value=598 * MB),
        target="arm64_emulator",
        device="QEMU arm64",
        os="Linux 6.12 aarch64",
        command="gochu bench out --on arm64_emulator",
    )


def everything(factor: float = 1.0) -> list[Measurement]:
    """Rows of each sort that a report knows."""
    rows = [case(device, prompt, factor) for device in SPEEDS for prompt in (64, 256, 1024)]
    rows[0] = rows[0].model_copy(
        update={"answers": (Answer(prompt="23 더하기 45는?", text="68입니다.", tokens=(5, 6)),)}
    )
    rows[2] = rows[2].model_copy(
        update={"how": rows[2].how.model_copy(update={"notes": ("prompt cut to fit the context of 1152",)})}
    )
    backend = Backend(
        requested="NPU and CPU", effective={"decode": {"NPU": 341, "CPU": 3}, "prefill": {"NPU": 344}}
    )
    hexagon = case(
        "Galaxy S24 Ultra",
        64,
        0.55 * factor,
        variant="hexagon",
        engine="QNN 2.40",
        backend=backend,
        threads=None,
    )
    fallback = case("갤럭시 S23", 64, 1.6 * factor, variant="hexagon", marks=("cpu_fallback",))
    stopped = case("iPhone 16 Pro", 256, factor, marks=("interrupted",), repeats=20)
    return [
        *rows,
        hexagon,
        fallback,
        stopped,
        *(sustained(device, throttles=device != "iPhone 16 Pro") for device in SPEEDS),
        *(predicted(device) for device in SPEEDS),
        emulated(),
    ]
