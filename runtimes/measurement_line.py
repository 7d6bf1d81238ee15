"""Measurements in a log: what an app on a phone prints, and a farm's log gives back.

    GOCHU-MEASUREMENT 1/2 3f9a1c07 {"schema_version":2,"what":...
    GOCHU-MEASUREMENT 2/2 3f9a1c07 ...}

One measurement is one JSON object, in ASCII, cut into as many lines as it needs: Android's log cuts a message off at
some 4000 bytes. The number after the count is the first 8 digits of the whole text's SHA-256. What stands before the
word, as logcat's date and tag, does not matter, nor do lines in between.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtimes.errors import GochuError, TargetError
from runtimes.measurement import Measurement, parse

WORD = "GOCHU-MEASUREMENT"
MOST = 3000  # characters of JSON in a line
_LINE = re.compile(rf"{WORD} (?P<part>\d{{1,4}})/(?P<of>\d{{1,4}}) (?P<id>[0-9a-f]{{8}}) (?P<text>[ -~]*)")


def encode(measurement: Measurement) -> Iterator[str]:
    """The lines of a measurement, without their ends."""
    text = json.dumps(measurement.model_dump(mode="json"), ensure_ascii=True, separators=(",", ":"))
    parts = [text[i : i + MOST] for i in range(0, len(text), MOST)]
    for number, part in enumerate(parts, 1):
        yield f"{WORD} {number}/{len(parts)} {_id(text)} {part}"


@dataclass(frozen=True)
class Reading:
    """The whole measurements of a log, in the order in which they begin, and what is wrong with the others."""

    found: tuple[Measurement, ...]
    faults: tuple[str, ...]


def read(log: str) -> Reading:
    """All that a log says; several logs of the same run can be one text, in which each measurement counts once.

    A line that stands there twice counts as the longer one: the other was cut off.
    """
    texts: dict[tuple[str, int], dict[int, str]] = {}
    for match in _LINE.finditer(log):
        parts = texts.setdefault((match["id"], int(match["of"])), {})
        parts[int(match["part"])] = max(parts.get(int(match["part"]), ""), match["text"], key=len)
    found, faults = [], []
    for (id, count), parts in texts.items():
        try:
            found.append(_measurement(id, count, parts))
        except GochuError as error:
            faults.append(str(error))
    return Reading(tuple(found), tuple(faults))


def decode(log: str) -> list[Measurement]:
    """The measurements in a log, each once, in the order in which they begin.

    TargetError if one is incomplete or damaged: what the log does not hold was not measured.
    """
    reading = read(log)
    if reading.faults:
        raise TargetError(reading.faults[0])
    return list(reading.found)


def _measurement(id: str, count: int, parts: Mapping[int, str]) -> Measurement:
    missing = [number for number in range(1, count + 1) if number not in parts]
    if missing:
        raise TargetError(
            f"measurement {id} in the log lacks line {missing[0]} of {count}: the log was cut off; measure again"
        )
    text = "".join(parts[number] for number in range(1, count + 1))
    if _id(text) != id:
        raise TargetError(f"measurement {id} in the log is damaged: its checksum is another; measure again")
    return parse(text, f"measurement {id} in the log")


def _id(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:8]
