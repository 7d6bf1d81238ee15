"""A phone without a phone: the device's side of adb's transport protocol (an adbd over TCP), with a folder as its disk.

A real adb server connects to it by `adb connect 127.0.0.1:PORT`. Of adbd's services there are shell (v1 and v2), exec
and sync. A shell command is run by this machine's /bin/sh, with /data/local/tmp read as a folder of the test's, and
with programs of the phone's own, getprop and dumpsys, which say what the test has written for them.

The protocol: packages/modules/adb/protocol.txt, SYNC.TXT and shell_protocol.h of the Android Open Source Project.
"""

import contextlib
import os
import queue
import re
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

DATA = "/data/local/tmp"
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir"
VERSION, MOST = 0x01000001, 256 * 1024
_SHELL = re.compile(r"(?P<kind>shell|exec)(?P<options>(?:,[^:]*)?):(?P<command>.*)", re.DOTALL)
_TOKEN, _SIGNATURE, _PUBLIC_KEY = 1, 2, 3

GETPROP = """#!/bin/sh
[ -n "$1" ] && exec cat "$GOCHU_PHONE/props/$1" 2>/dev/null
cd "$GOCHU_PHONE/props" && for name in *; do echo "[$name]: [$(cat "$name")]"; done
"""
DUMPSYS = """#!/bin/sh
[ -f "$GOCHU_PHONE/dumpsys/$1" ] || { echo "Can't find service: $1"; exit 0; }
cat "$GOCHU_PHONE/dumpsys/$1"
"""
DF = """#!/bin/sh
echo 'Filesystem     1K-blocks      Used Available Use% Mounted on'
echo "/dev/block/dm-8 113252752 100000000 $(cat "$GOCHU_PHONE/free") 90% /data/user/0"
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 83
  scale: 100
  voltage: 4201
  temperature: 291
  technology: Li-ion
"""


def thermal(status: int = 0, celsius: float = 36.5) -> str:
    """What `dumpsys thermalservice` prints: what was cached, then what is; voltages among the temperatures."""
    return f"""IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 2
Thermal Status: {status}
Cached temperatures:
\tTemperature{{mValue=91.0, mType=0, mName=CPU0, mStatus=0}}
HAL Ready: true
HAL connection:
\tThermalHAL AIDL 1  connected: yes
Current temperatures from HAL:
\tTemperature{{mValue={celsius}, mType=3, mName=SKIN, mStatus={status}}}
\tTemperature{{mValue=33.1, mType=2, mName=BAT, mStatus=0}}
\tTemperature{{mValue=NaN, mType=9, mName=NPU, mStatus=0}}
\tTemperature{{mValue=4201.0, mType=6, mName=vbat, mStatus=0}}
Current cooling devices from HAL:
\tCoolingDevice{{mValue=0, mType=2, mName=thermal-cpufreq-0}}
Temperature static thresholds from HAL:
\tTemperatureThreshold{{mType=3, mName=SKIN, mHotThrottlingThresholds=[NaN, 39.0, 41.0, 43.0, 45.0, 50.0, 95.0]}}
"""


class Phone:
    """One phone. `plug` and `unplug` are its cable; `served` lists the services that were asked of it."""

    def __init__(self, folder: Path, *, authorized: bool = True, **properties: str) -> None:
        self.folder = folder
        self.authorized = authorized
        self.served: list[str] = []
        self.pushed: list[str] = []  # the paths, in order
        self.room = 1 << 40  # bytes that can still be written
        self.before: Callable[[str], None] = lambda service: None  # called as each service begins
        for name in ("props", "dumpsys", "bin", "disk"):
            (folder / name).mkdir(parents=True)
        for name, text in (("getprop", GETPROP), ("dumpsys", DUMPSYS), ("df", DF)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "free").write_text("50000000\n")
        self.set(
            **{
                "ro.product.model": "SM-S928N",
                "ro.product.manufacturer": "samsung",
                "ro.soc.model": "SM8650",
                "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a,armeabi",
                "ro.build.version.release": "15",
                "ro.build.id": "AP3A.240905.015",
            }
            | properties
        )
        self.says("battery", BATTERY)
        self.says("thermalservice", thermal())
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self.port = 0

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def set(self, **properties: str) -> None:
        for name, value in properties.items():
            (self.folder / "props" / name).write_text(value + "\n")

    def says(self, service: str, text: str) -> None:
        """What `dumpsys service` prints from now on; the change is seen whole."""
        place = self.folder / "dumpsys" / service
        part = place.with_name(f".{service}.part")
        part.write_text(text)
        part.replace(place)

    def path(self, device_path: str) -> Path:
        """Where a path of the phone is on this machine."""
        assert device_path == DATA or device_path.startswith(f"{DATA}/"), device_path
        assert ".." not in device_path.split("/"), device_path
        return self.folder / "disk" / device_path.removeprefix(DATA).lstrip("/")

    def plug(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def unplug(self) -> None:
        """As if the cable was pulled: what was open is gone, and what runs on the phone runs on."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            self._listener.close()
            self._listener = None
        while self._connections:
            self._connections.pop().close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            connection = _Connection(self, link)
            self._connections.append(connection)
            threading.Thread(target=connection.run, daemon=True).start()

    # What the services do.

    def serve(self, service: str, stream: "_Stream") -> None:
        self.served.append(service)
        self.before(service)
        if service == "sync:":
            self._sync(stream)
        elif match := _SHELL.fullmatch(service):
            self._shell(match["command"], "v2" in match["options"], stream)

    def knows(self, service: str) -> bool:
        return service == "sync:" or _SHELL.fullmatch(service) is not None

    def _shell(self, command: str, v2: bool, stream: "_Stream") -> None:
        disk = self.folder / "disk"
        done = subprocess.run(
            ["/bin/sh", "-c", command.replace(DATA, str(disk))],
            cwd=disk,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if v2 else subprocess.STDOUT,
            env={
                "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                "GOCHU_PHONE": str(self.folder),
                "LANG": "C.UTF-8",
            },
            check=False,
        )
        if not v2:
            stream.write(done.stdout)
            return
        for kind, text in ((1, done.stdout), (2, done.stderr or b"")):
            for i in range(0, len(text), 65536):
                piece = text[i : i + 65536]
                stream.write(struct.pack("<BI", kind, len(piece)) + piece)
        stream.write(struct.pack("<BIB", 3, 1, done.returncode & 255))

    def _sync(self, stream: "_Stream") -> None:
        while True:
            kind, length = struct.unpack("<4sI", stream.read(8))
            if kind == b"QUIT":
                return
            path = stream.read(length).decode()
            if kind in (b"STAT", b"LST2", b"STA2"):
                stream.write(self._stat(kind, path))
            elif kind == b"SEND":
                self._receive(path, stream)
            elif kind == b"RECV":
                self._give(path, stream)
            else:
                stream.write(_failed(f"unknown command {kind!r}"))
                return

    def _stat(self, kind: bytes, path: str) -> bytes:
        try:
            found = self.path(path).stat()
        except OSError as error:
            return kind + (bytes(12) if kind == b"STAT" else struct.pack("<I64x", error.errno or 2))
        if kind == b"STAT":
            return kind + struct.pack("<III", found.st_mode, found.st_size, int(found.st_mtime))
        numbers = (0, 0, 0, found.st_mode, 1, 0, 0, found.st_size, *[int(found.st_mtime)] * 3)
        return kind + struct.pack("<IQQIIIIQqqq", *numbers)

    def _receive(self, path: str, stream: "_Stream") -> None:
        path, _, mode = path.rpartition(",")
        place = self.path(path)
        self.pushed.append(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        full = False
        with place.open("wb") as file:
            while True:
                kind, length = struct.unpack("<4sI", stream.read(8))
                if kind == b"DONE":
                    break
                data = stream.read(length)
                self.room -= len(data)
                full = full or self.room < 0
                if not full:
                    file.write(data)
        if full:
            place.unlink()
            stream.write(_failed("couldn't write: No space left on device"))
            return
        place.chmod(stat.S_IMODE(int(mode)))
        stream.write(b"OKAY" + bytes(4))

    def _give(self, path: str, stream: "_Stream") -> None:
        try:
            data = self.path(path).read_bytes()
        except OSError as error:
            stream.write(_failed(f"open failed: {error.strerror}"))
            return
        for i in range(0, len(data), 65536):
            piece = data[i : i + 65536]
            stream.write(b"DATA" + struct.pack("<I", len(piece)) + piece)
        stream.write(b"DONE" + bytes(4))

    def kill_all(self) -> None:
        """End what still runs on the phone: its processes have its folder in their environment."""
        mark = f"GOCHU_PHONE={self.folder}".encode()
        for process in self.processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self, mark: bytes | None = None) -> Iterator[int]:
        mark = mark or f"GOCHU_PHONE={self.folder}".encode()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in place.read_bytes().split(b"\0"):
                    yield int(place.parent.name)


def _failed(why: str) -> bytes:
    return b"FAIL" + struct.pack("<I", len(why)) + why.encode()


class _Connection:
    """What one adb server says to the phone, and hears."""

    def __init__(self, phone: Phone, link: socket.socket) -> None:
        self._phone, self._link = phone, link
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writing = threading.Lock()
        self._streams: dict[int, _Stream] = {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()
        for stream in list(self._streams.values()):
            stream.end()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        magic = struct.unpack("<I", command)[0] ^ 0xFFFFFFFF
        header = struct.pack("<4sIIIII", command, first, second, len(data), sum(data) & 0xFFFFFFFF, magic)
        with self._writing, contextlib.suppress(OSError):
            self._link.sendall(header + data)

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                command, first, second, length, _, _ = struct.unpack("<4sIIIII", self._exactly(24))
                self._hear(command, first, second, self._exactly(length))
        self.close()

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._link.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _hear(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command == b"CNXN":
            if self._phone.authorized:
                banner = (
                    f"device::ro.product.name=p;ro.product.model=M;ro.product.device=d;features={FEATURES}"
                )
                self.send(b"CNXN", VERSION, MOST, banner.encode())
            else:
                self.send(b"AUTH", _TOKEN, 0, os.urandom(20))
        elif command == b"AUTH" and first == _SIGNATURE:  # of a key that the phone does not know
            self.send(b"AUTH", _TOKEN, 0, os.urandom(20))
        elif command == b"OPEN":
            service = data.rstrip(b"\0").decode()
            if not self._phone.knows(service):
                self.send(b"CLSE", 0, first)
                return
            stream = _Stream(self, len(self._phone.served) + len(self._streams) + 1 + first * 1000, first)
            self._streams[stream.local] = stream
            self.send(b"OKAY", stream.local, stream.remote)
            threading.Thread(target=self._serve, args=(service, stream), daemon=True).start()
        elif (stream := self._streams.get(second)) is not None:
            if command == b"WRTE":
                stream.heard.put(data)
                self.send(b"OKAY", stream.local, stream.remote)
            elif command == b"OKAY":
                stream.ready.release()
            elif command == b"CLSE":
                del self._streams[second]
                stream.end()

    def _serve(self, service: str, stream: "_Stream") -> None:
        with contextlib.suppress(EOFError):
            self._phone.serve(service, stream)
            stream.flush()
        self.send(b"CLSE", stream.local, stream.remote)


class _Stream:
    """One service in use. One message is under way at a time, as the protocol has it."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.local, self.remote = local, remote
        self.heard: queue.Queue[bytes] = queue.Queue()
        self.ready = threading.Semaphore(1)
        self._connection, self._rest, self._ended = connection, b"", False

    def end(self) -> None:
        self._ended = True
        self.heard.put(b"")
        self.ready.release()

    def read(self, length: int) -> bytes:
        while len(self._rest) < length:
            piece = self.heard.get()
            if not piece and self._ended:
                raise EOFError
            self._rest += piece
        data, self._rest = self._rest[:length], self._rest[length:]
        return data

    def flush(self) -> None:
        """Until the other side has all that was written."""
        self.ready.acquire()
        self.ready.release()

    def write(self, data: bytes) -> None:
        for i in range(0, len(data), MOST):
            self.ready.acquire()
            if self._ended:
                raise EOFError
            self._connection.send(b"WRTE", self.local, self.remote, data[i : i + MOST])
