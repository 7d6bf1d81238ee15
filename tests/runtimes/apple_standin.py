"""A stand-in for Xcode's command line tools and for the iPhones behind them; test_apple_targets.py puts it on the path.

Called as xcrun, xcodebuild or devicectl. The phone is the folder $STANDIN: `files`, what the app's container holds;
`log.jsonl`, what was asked of it; `orders.json`, how it behaves. The app answers as coremltools' ModelRunner does
(modelrunner/ModelRunner/ModelService.swift): it makes a state for each model that it loads.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

PHONE = Path(os.environ["STANDIN"])
FILES = PHONE / "files"
ORDERS = json.loads((PHONE / "orders.json").read_text(encoding="utf-8"))
SIZES = {"Float16": 2, "Float32": 4, "Int32": 4}


def log(**what: Any) -> None:
    with open(PHONE / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def fail(message: str, code: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def xcodebuild(arguments: list[str]) -> None:
    settings = dict(each.split("=", 1) for each in arguments if "=" in each and not each.startswith("-"))
    log(build=settings, scheme=arguments[arguments.index("-scheme") + 1])
    if said := ORDERS.get("build"):
        print(said)
        sys.exit(65)
    (Path(settings["SYMROOT"]) / "Release-iphoneos/modelrunner.app").mkdir(parents=True)
    (PHONE / "bundle").write_text(settings["PRODUCT_BUNDLE_IDENTIFIER"], encoding="utf-8")


def devicectl(arguments: list[str]) -> None:
    if "-j" in arguments:
        place = arguments.index("-j")
        answer = Path(arguments[place + 1])
        arguments = arguments[:place]
    options = {a: b for a, b in itertools.pairwise(arguments) if a.startswith("-")}
    if arguments[:2] == ["list", "devices"]:
        result: dict[str, Any] = {"devices": ORDERS["devices"]}
    elif arguments[:3] == ["device", "install", "app"]:
        if said := ORDERS.get("install"):
            fail(said)
        result = {
            "installedApplications": [{"bundleID": (PHONE / "bundle").read_text(), "databaseUUID": "DB"}]
        }
    elif arguments[:3] == ["device", "process", "launch"]:
        log(launched=arguments[-1], device=options["-d"])
        attend()
        return
    else:
        result = copy(arguments[2], options)
    answer.write_text(json.dumps({"result": result}), encoding="utf-8")


def attend() -> None:
    """Until it is told to end, or the shell that started it is: not every shell hands its place to its last command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(log(stopped=True)))
    parent, end = os.getppid(), time.monotonic() + 60
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.05)
    log(stopped=True)


def copy(direction: str, options: dict[str, str]) -> dict[str, str]:
    if (FILES / "unplugged").exists():
        fail("ERROR: The device was disconnected.\n  (com.apple.dt.CoreDeviceError error 4000)")
    source, destination = options["--source"], options["--destination"]
    if direction == "from":
        if not (FILES / source).exists():
            fail(f"ERROR: there is no file {source}")
        shutil.copyfile(FILES / source, destination)
    else:
        place = FILES / destination
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, place)
        if place.name == "message.json":
            app(json.loads(place.read_text(encoding="utf-8")), place.parents[3])
    return {"source": source, "destination": destination}


def app(request: dict[str, Any], root: Path) -> None:
    """Answer a request. `root`: the app's folder for requests and responses."""
    params, method = request["params"], request["method"].removeprefix("MLModelService.")
    folder = root / "responses" / request["id"]
    folder.mkdir(parents=True)
    resource = root / "requests/resources" / request["id"] / request.get("resource", "")
    answer: dict[str, Any] = {"id": request["id"], "jsonrpc": "2.0"}
    models = json.loads((PHONE / "models.json").read_text()) if (PHONE / "models.json").exists() else {}
    result: dict[str, Any] = {"modelID": params["modelID"]}
    if method == "Load":
        assert (resource / "Data/com.apple.CoreML/model.mlmodel").is_file()
        models[params["modelID"]] = params["functionName"]
        (PHONE / "models.json").write_text(json.dumps(models))
        result |= {"duration": 5_000_000, "isCached": False}
        log(load=params["functionName"], units=params["computeUnits"])
    elif method == "ComputePlan":
        result["infos"] = ORDERS["plan"]
    elif method == "Prediction":
        function = models[params["modelID"]]
        log(predict=function, inputs={name: each["shape"] for name, each in params["inputs"].items()})
        for each in params["inputs"].values():
            size = SIZES[each["dataType"]]
            for length in each["shape"]:
                size *= length
            assert each["storage"]["size"] == size
        if ORDERS.get("unplug") == function:
            (FILES / "unplugged").touch()
        (folder / "out.bin").write_bytes(bytes(8))
        tensor = {
            "shape": [1, 1, 4],
            "strides": [4, 4, 1],
            "dataType": "Float16",
            "storage": {"offset": 0, "size": 8},
        }
        milliseconds = {"prefill": 8, "decode": 2}[function]
        result |= {"outputs": {"logits": tensor}, "duration": milliseconds * 1_000_000, "resource": "out.bin"}
        answer["resource"] = "out.bin"
    answer["result"] = result
    if said := ORDERS.get(method):
        answer["error"] = {"code": -32001, "message": said}
    (folder / "message.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    called, *rest = sys.argv[1:]
    if called == "xcrun":
        called, *rest = rest
    {"devicectl": devicectl, "xcodebuild": xcodebuild}[called](rest)
