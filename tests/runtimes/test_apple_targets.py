"""Measuring on a Mac and on an iPhone, without either.

On the iPhone's side coremltools' own code runs, down to the commands devicectl and xcodebuild: those, and the phone
behind them, are apple_standin.py. What is left to a stand-in here besides is native to macOS: Core ML itself, its
compiler, and the class that its plans come in.
"""

import asyncio
import gc
import importlib
import inspect
import json
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import coremltools as ct

from runtimes import apple, measuring
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, EngineError, TargetError, UsageError
from runtimes.measurement import Measurement
from runtimes.mil.evaluator import Evaluator
from runtimes.mil.package import Name, open_package
from runtimes.quiet import quiet
from runtimes.targets import iphone, mac
from runtimes.workload import Case

EXPERIMENTAL = "coremltools.models.ml_program.experimental"
remote = importlib.import_module(f"{EXPERIMENTAL}.remote_device")
perf = importlib.import_module(f"{EXPERIMENTAL}.perf_utils")
wrappers = importlib.import_module(f"{EXPERIMENTAL}.async_wrapper")
paths = importlib.import_module(f"{EXPERIMENTAL}.model_structure_path")
plans = importlib.import_module("coremltools.models.compute_plan")
devices = importlib.import_module("coremltools.models.compute_device")

TEAM = "ABCDE12345"
LEFT = "gather"  # operations that the stand-ins leave to the CPU


@pytest.fixture(scope="module")
def pepper(bundles) -> Bundle:
    return bundles("pepper", "int8", format="coreml")


@pytest.fixture(scope="module")
def package(pepper: Bundle) -> Path:
    return pepper.path / pepper.manifest.variants[0].entry_points[0].file


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr("runtimes.cpu._sysctl", lambda key: "")
    monkeypatch.setattr("coremltools.models.model._macos_version", lambda: (15, 1))


def placed(operation: Any) -> str | None:
    """The processor that the stand-ins give an operation of a package; constants have none."""
    if operation.type == "const" or operation.type.startswith("constexpr"):
        return None
    return "CPU" if operation.type == LEFT else "GPU"


def counted(package: Path, function: str) -> dict[str, int]:
    """Operations by processor. Those without results are on no path of coremltools'."""
    found: dict[str, int] = {}
    for operation in open_package(package).functions[function].operations:
        if (where := placed(operation)) and operation.outputs:
            found[where] = found.get(where, 0) + 1
    return found


# an iPhone


def described(name: str = "Test iPhone", udid: str = "00008130-1", **changes: Any) -> dict[str, Any]:
    """A device as devicectl describes it."""
    values = {"kind": "iPhone", "state": "connected", "os": "18.1", "developer": "enabled"} | changes
    return {
        "identifier": f"ID-{udid}",
        "hardwareProperties": {"deviceType": values["kind"], "udid": udid},
        "deviceProperties": {
            "name": name,
            "osVersionNumber": values["os"],
            "osBuildUpdate": "22B83",
            "developerModeStatus": values["developer"],
        },
        "connectionProperties": {"tunnelState": values["state"]},
    }


def infos(package: Path) -> list[dict[str, Any]]:
    """A plan of a package as ModelRunner sends it."""
    found = []
    for function in open_package(package).functions.values():
        for operation in function.operations:
            if (where := placed(operation)) and operation.outputs:
                device = {where.lower(): {}}
                parts = [
                    {"program": {}},
                    {"programFunction": {"data": {"name": function.name}}},
                    {"programBlock": {"data": {"index": -1}}},
                    {"programOperation": {"data": {"outputName": operation.outputs[0][0]}}},
                ]
                found.append(
                    {
                        "deviceUsage": {"supported": [device], "preferred": device},
                        "estimatedCost": 0.001,
                        "path": {"components": parts},
                    }
                )
    return found


def structure(package: Path) -> Any:
    """A package's operations in coremltools' classes."""

    def operation(each: Any) -> Any:
        outputs = [SimpleNamespace(name=name) for name, _ in each.outputs]
        return plans.MLModelStructureProgramOperation({}, each.type, outputs, [], None)

    functions = {
        name: SimpleNamespace(block=SimpleNamespace(operations=[*map(operation, function.operations)]))
        for name, function in open_package(package).functions.items()
    }
    program = plans.MLModelStructureProgram(functions)
    return plans.MLModelStructure(neuralnetwork=None, program=program, pipeline=None)


class PhonesPlan:
    """What coremltools' _MLComputePlanRemoteProxy, which there is on macOS alone, makes of the phone's answer."""

    def __init__(self, plan: Any, model_structure: Any) -> None:
        self._infos, self.model_structure = plan.infos, model_structure
        self._paths = {id(op): path for op, path in paths.map_model_structure_to_path(model_structure)}

    def _info(self, operation: Any) -> Any:
        return self._infos.get(self._paths[id(operation)])

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if (info := self._info(operation)) is None:
            return None
        kind = {"CPUDevice": devices.MLCPUComputeDevice, "GPUDevice": devices.MLGPUComputeDevice}
        device = object.__new__(kind[type(info.device_usage.preferred).__name__])
        return plans.MLComputePlanDeviceUsage(device, [device])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        info = self._info(operation)
        return info and plans.MLComputePlanCost(info.estimated_cost)


class Phone:
    """`orders(key=value)`: how the phone behaves from now on; `log(key)`: what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "files").mkdir(parents=True)
        self._orders: dict[str, Any] = {}

    def orders(self, **changes: Any) -> None:
        self._orders |= changes
        (self.folder / "orders.json").write_text(json.dumps(self._orders), encoding="utf-8")

    def log(self, key: str) -> list[Any]:
        file = self.folder / "log.jsonl"
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else []
        return [line[key] for line in lines if key in line]

    def stopped(self) -> bool:
        """Whether the app that was launched, if any, has been stopped; that takes a moment."""
        for _ in range(100):
            if len(self.log("stopped")) == len(self.log("launched")):
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def phone(
    package: Path,
    macos: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Phone:
    """A connected iPhone, Xcode's tools on the path, and a team."""
    found = Phone(tmp_path / "phone")
    found.orders(devices=[described(), described("A Mac", "M1", kind="Mac")], plan=infos(package))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("xcrun", "devicectl", "xcodebuild"):
        words = [sys.executable, "-S", "-E", str(request.path.parent / "apple_standin.py"), name]
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("STANDIN", str(found.folder))
    monkeypatch.setenv(iphone.TEAM, TEAM)
    workspace = tmp_path / "modelrunner"
    (workspace / "ModelRunner.xcworkspace").mkdir(parents=True)  # in coremltools' wheel for macOS alone
    monkeypatch.setattr(remote._ModelRunnerAppBuilder, "_get_project_path", staticmethod(lambda: workspace))
    monkeypatch.setattr(remote._DeviceCtl, "_validation_done", False)
    monkeypatch.setattr(remote._DeviceCtlRemoteService.__init__, "__defaults__", (0.01, 2))  # wait less
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.01)))

    def compile_model(model: str, destination_path: str | None = None) -> str:
        return str(shutil.copytree(model, destination_path))

    async def retrieve_compute_plan(self: Any) -> PhonesPlan:
        return PhonesPlan(await self._remote_service.retrieve_compute_plan(), structure(package))

    monkeypatch.setattr(wrappers, "compile_model", compile_model)
    monkeypatch.setattr(wrappers.RemoteMLModelAsyncWrapper, "retrieve_compute_plan", retrieve_compute_plan)
    return found


def test_an_iphone_is_measured(pepper: Bundle, package: Path, phone: Phone) -> None:
    (found,) = iphone.measure(pepper.path, "smoke")
    assert (found.where.target, found.where.device, found.where.os) == (
        "iphone",
        "Test iPhone",
        "iOS 18.1 (22B83)",
    )
    assert (found.where.threads, found.where.backend.requested) == (None, "CPU and GPU")
    assert found.where.backend.effective == {name: counted(package, name) for name in ("prefill", "decode")}
    chunk = pepper.manifest.variants[0].entry_points[0].inputs[0].shape[1]
    assert (found.how.prompt_tokens, found.how.new_tokens) == (chunk, 2)
    assert (found.how.warmup, found.how.repeats, found.how.context) == (1, 2, 128)
    assert {figure.name: figure.samples for figure in found.figures} == {
        "load_time": (0.01,),
        "prefill_speed": (chunk / 8e-3,) * 2,
        "decode_speed": (500.0,) * 2,
    }
    assert {figure.kind for figure in found.figures} == {"measured"}
    assert "no text was generated" in found.how.notes[0]
    assert "TTFT and memory are not told" in found.how.notes[-1]
    assert found.command.endswith("--workload smoke --on iphone")


def test_what_is_asked_of_the_iphone(pepper: Bundle, phone: Phone) -> None:
    """An app signed for the team, one load of each function, the manifest's inputs, and an end."""
    iphone.measure(pepper.path, "smoke")
    (build,) = phone.log("build")
    assert build["DEVELOPMENT_TEAM"] == TEAM
    identifier = build["PRODUCT_BUNDLE_IDENTIFIER"]
    assert identifier.startswith("io.gochu.modelrunner.")
    assert TEAM.lower() not in identifier.lower()
    assert phone.log("launched") == [identifier]
    assert phone.log("load") == ["prefill", "decode"]
    assert set(phone.log("units")) == {"CPU_AND_GPU"}
    assert phone.log("predict") == ["prefill"] * 4 + ["decode"] * 4  # warmup, repeats, and once for the plan
    shapes = {
        name: {spec.name: list(spec.shape) for spec in entry.inputs}
        for entry in pepper.manifest.variants[0].entry_points
        for name in [entry.name]
    }
    for function, inputs in zip(phone.log("predict"), phone.log("inputs"), strict=True):
        assert inputs == shapes[function]
    assert phone.stopped()


def test_compute_units_can_be_asked_for(pepper: Bundle, phone: Phone) -> None:
    (found,) = iphone.measure(pepper.path, "smoke", compute_units="cpu", device="test iphone")
    assert set(phone.log("units")) == {"CPU_ONLY"}
    assert found.where.backend.requested == "CPU"
    assert found.command.endswith("--on iphone --device 'test iphone' --option compute_units=cpu")


def test_the_command_line_prints_json_alone(gochu, pepper: Bundle, phone: Phone) -> None:
    code, out, err = gochu("bench", pepper.path, "--on", "iphone", "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert Measurement.model_validate(found).where.target == "iphone"
    assert TEAM not in out


def test_one_of_several_iphones_is_asked_for(gochu, pepper: Bundle, phone: Phone) -> None:
    phone.orders(devices=[described("Red", "U1"), described("Blue", "U2"), described("Blue", "U3")])
    run = ["bench", pepper.path, "--on", "iphone"]
    code, out, err = gochu(*run)
    assert (code, out) == (2, "")
    assert err == (
        "gochu: 3 iPhones are connected: say which with --device: Red (U1), Blue (U2), Blue (U3)\n"
    )
    code, _, err = gochu(*run, "--device", "blue")
    assert (code, err.startswith("gochu: 2 iPhones are called blue: give a UDID")) == (2, True)
    code, _, err = gochu(*run, "--device", "Green")
    assert (code, err.startswith("gochu: no connected iPhone is called 'Green'; there are Red (U1), ")) == (
        2,
        True,
    )
    code, out, _ = gochu(*run, "--device", "u3", "--json")
    assert (code, json.loads(out)[0]["where"]["device"]) == (0, "Blue")
    assert phone.log("device") == ["ID-U3"]


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ({"devices": []}, r"^no iPhone is connected \(Xcode knows of none\): connect one"),
        (
            {"devices": [described("Away", state="disconnected"), described("Pad", "P", kind="iPad")]},
            r"^no iPhone is connected \(Away is disconnected\): ",
        ),
        (
            {"devices": [described(os="17.6.1")]},
            "Test iPhone has iOS 17.6.1, and Core ML keeps .* from iOS 18 on",
        ),
        ({"devices": [described(developer="disabled")]}, "Test iPhone is not in Developer Mode: turn it on"),
        (
            {"install": "ERROR: The device is locked."},
            r"app for Test iPhone failed \(ERROR: The device is locked\.\)",
        ),
        (
            {
                "build": f'note: building\nModelRunner: error: No Account for Team "{TEAM}". Add one.\n** FAILED **'
            },
            r'app for Test iPhone failed \(ModelRunner: error: No Account for Team "\*\*\*"\. Add one\.\); is GOCHU',
        ),
        (
            {"Load": "Failed to build the model execution plan:\n  ANECCompile() FAILED"},
            r"^loading prefill of model\.mlpackage on Test iPhone failed \(Failed to build .* ANECCompile\(\) FAILED\)",
        ),
        (
            {"Prediction": "The input feature for k must be an MLState, but it was not."},
            r"^running prefill of .* failed \(The input feature for k must be an MLState",
        ),
        (
            {"ComputePlan": "not supported on this platform"},
            "^asking for the plan of prefill of .* failed .not supported on",
        ),
        (
            {"unplug": "decode"},
            r"^running decode of .* failed \(ERROR: The device was disconnected\.\); keep the iPhone connected",
        ),
    ],
)
def test_what_an_iphone_or_apples_tools_refuse_is_one_sentence(
    pepper: Bundle, phone: Phone, orders, words
) -> None:
    phone.orders(**orders)
    with pytest.raises(TargetError, match=words) as caught:
        iphone.measure(pepper.path, "smoke")
    assert "\n" not in str(caught.value)
    assert TEAM not in str(caught.value)
    assert caught.value.exit_code == 6
    assert phone.stopped()


@pytest.mark.parametrize("team", ["", "abcde12345", "ABCDE1234; rm -rf /", "ABCDE123456"])
def test_a_team_is_needed_and_never_printed(gochu, pepper, phone, monkeypatch, team) -> None:
    monkeypatch.setenv(iphone.TEAM, team)
    code, out, err = gochu("bench", pepper.path, "--on", "iphone")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "GOCHU_APPLE_TEAM" in err
    assert not team or team not in err
    assert phone.log("build") == []


def test_a_missing_xcode_is_said(gochu, pepper, phone, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = gochu("bench", pepper.path, "--on", "iphone")
    assert (code, err[:57]) == (5, "gochu: xcrun is not on the path; install Xcode 15 or newe")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_iphone_that_goes_away_is_one_sentence_and_no_figures(gochu, pepper: Bundle, phone: Phone) -> None:
    """Nor a word of coremltools' models, which are not unloaded any more."""
    phone.orders(unplug="decode")
    code, out, err = gochu("bench", pepper.path, "--on", "iphone", "--json")
    gc.collect()
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert err.startswith(
        "gochu: running decode of model.mlpackage on Test iPhone failed (ERROR: The device was"
    )


def test_a_chain_of_packages_is_measured_as_one(pepper: Bundle, phone: Phone, package: Path) -> None:
    """Times add up, run by run; so do operations."""
    engine = importlib.import_module("runtimes.engines.coreml")
    (link,) = engine.links(pepper.manifest.variants[0])
    session = iphone._Session("gpu", TEAM, 2)
    with quiet():
        runs = asyncio.run(session.measure(session.choose(None), [(package, link)] * 2, 512))
    assert runs["decode"].load == pytest.approx(0.010)
    assert runs["decode"].seconds == pytest.approx((4e-3, 4e-3))
    once = counted(package, "decode")
    assert dict(runs["decode"].processors) == {where: 2 * count for where, count in once.items()}


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (remote.Device.get_connected_devices, ["device_type"]),
        (remote.Device.get_devices, []),
        (remote.Device.prepare_for_model_debugging, ["self", "credentials", "working_directory", "clean"]),
        (perf.MLModelBenchmarker.__init__, ["self", "model", "device"]),
        (perf.MLModelBenchmarker.benchmark_load, ["self", "iterations"]),
        (perf.MLModelBenchmarker.benchmark_predict, ["self", "inputs", "iterations", "warmup"]),
        (perf.MLModelBenchmarker.benchmark_operation_execution, ["self", "inputs", "iterations", "warmup"]),
        (plans.MLComputePlan.load_from_path, ["path", "compute_units"]),
    ],
)
def test_coremltools_experimental_interface_is_the_one_that_was_written_for(function, parameters) -> None:
    """A release that changes it fails here, not on somebody's Mac."""
    assert list(inspect.signature(function).parameters) == parameters


# this Mac


class StandIn:
    """coremltools' MLModel as macOS has it: the computing is the evaluator's."""

    allowed: set[str] = set()  # noqa: RUF012

    def __init__(self, model: str, compute_units: Any, function_name: str) -> None:
        assert {"model", "compute_units", "function_name"} <= set(inspect.signature(MLMODEL).parameters)
        StandIn.allowed.add(compute_units.name)
        self._path, self._function, self.__proxy__ = Path(model), function_name, object()

    def make_state(self) -> Evaluator:
        return Evaluator(open_package(self._path))

    def predict(self, data: dict[str, np.ndarray], state: Evaluator) -> dict[str, np.ndarray]:
        return state.run(self._function, data)


MLMODEL = ct.models.MLModel


class MacsPlan:
    """coremltools' MLComputePlan, of a package."""

    def __init__(self, package: Path) -> None:
        def planned(operation: Any) -> Any:
            names = {
                key: SimpleNamespace(
                    bindings=[SimpleNamespace(name=b.name if isinstance(b, Name) else None) for b in each]
                )
                for key, each in operation.inputs.items()
            }
            outputs = [SimpleNamespace(name=name) for name, _ in operation.outputs]
            return SimpleNamespace(inputs=names, outputs=outputs, type=operation.type)

        functions = {
            name: SimpleNamespace(block=SimpleNamespace(operations=[*map(planned, function.operations)]))
            for name, function in open_package(package).functions.items()
        }
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if (where := placed(operation)) is None:
            return None
        return SimpleNamespace(
            preferred_compute_device=object.__new__(getattr(devices, f"ML{where}ComputeDevice"))
        )


@pytest.fixture
def this_mac(macos: None, package: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Mac whose measuring process is this one; returns what is asked of its compiler and plan."""
    asked: list[str] = []

    def load(path: str, compute_units: Any) -> MacsPlan:
        asked.append(compute_units.name)
        return MacsPlan(Path(path))

    def run_apart(module: str, job: measuring.Job) -> str:
        assert module == "runtimes.targets.mac"
        return mac.run(mac.Job.model_validate_json(job.model_dump_json())).model_dump_json()

    monkeypatch.setattr(measuring, "run_apart", run_apart)
    monkeypatch.setattr(ct.models, "MLModel", StandIn)
    monkeypatch.setattr(StandIn, "allowed", set())
    monkeypatch.setattr(ct.models.utils, "compile_model", lambda path: path)
    monkeypatch.setattr(plans, "MLComputePlan", SimpleNamespace(load_from_path=load))
    return asked


def test_a_mac_is_measured(gochu, pepper: Bundle, package: Path, this_mac: list[str]) -> None:
    code, out, err = gochu("bench", pepper.path, "--on", "mac", "--json")
    assert (code, err) == (0, "")
    (found,) = map(Measurement.model_validate, json.loads(out))
    assert (found.where.target, found.where.threads) == ("mac", None)
    assert found.where.engine == f"coremltools {ct.__version__}"
    assert found.where.backend.requested == "CPU and GPU"
    operations = found.where.backend.effective
    for name in ("prefill", "decode"):  # with those that have no result: Core ML's own plan names them too
        assert operations[name]["CPU"] == counted(package, name)["CPU"] > 0
        assert operations[name]["GPU"] > counted(package, name)["GPU"]
    assert {"load_time", "ttft", "prefill_speed", "decode_speed"} <= {f.name for f in found.figures}
    assert StandIn.allowed == {"CPU_AND_GPU"} == set(this_mac)
    assert found.command.endswith("--workload smoke --on mac")


def test_the_measuring_process_of_a_mac(pepper: Bundle) -> None:
    """The process itself; off a Mac its engine is the evaluator."""
    job = mac.Job(
        bundle=str(pepper.path),
        variant=pepper.manifest.variants[0].name,
        case=Case(prompt_tokens=4, new_tokens=2),
        context=128,
        threads=1,
        warmup=1,
        repeats=1,
        compute_units="ane",
    )
    samples = measuring.spawn("runtimes.targets.mac", job)
    assert samples.engine == f"coremltools {ct.__version__}, evaluated in torch"
    assert len(samples.decode) == 1


def test_an_iphone_without_a_plan_is_measured_all_the_same(pepper: Bundle, phone: Phone) -> None:
    phone.orders(plan=[])
    (found,) = iphone.measure(pepper.path, "smoke")
    assert found.where.backend.effective == {}
    assert found.figure("decode_speed").value == 500


def test_a_macs_processors_can_be_asked_for(pepper: Bundle, this_mac: list[str]) -> None:
    (found,) = mac.measure(pepper.path, "smoke", compute_units="ane", context=64)
    assert StandIn.allowed == {"CPU_AND_NE"} == set(this_mac)
    assert found.where.backend.requested == "CPU and Neural Engine"
    assert found.command.endswith("--workload smoke --on mac --context 64 --option compute_units=ane")
    with pytest.raises(UsageError, match="no compute units 'npu'; there are cpu, gpu, ane, all"):
        mac.measure(pepper.path, "smoke", compute_units="npu")


def test_a_mac_without_plans_is_measured_all_the_same(pepper: Bundle, this_mac, monkeypatch) -> None:
    def refuse(path: str, compute_units: Any) -> None:
        raise RuntimeError("MLComputePlan is\nnot there")

    monkeypatch.setattr(plans.MLComputePlan, "load_from_path", refuse)
    (found,) = mac.measure(pepper.path, "smoke")
    assert found.where.backend.effective == {}
    (note,) = found.how.notes
    assert note.startswith(
        "which processor computes what is unknown: asking Core ML for its plan failed (MLCom"
    )
    assert note.endswith("not there); it needs macOS 14.4 or newer")


def test_an_error_of_core_ml_is_one_sentence(pepper, this_mac, monkeypatch) -> None:
    def fail(self: StandIn, data: Any, state: Any) -> None:
        raise RuntimeError("E5RT: the Neural\nEngine is tired")

    monkeypatch.setattr(StandIn, "predict", fail)
    with pytest.raises(
        EngineError, match=r"Core ML failed in prefill of .* \(E5RT: the Neural Engine is tired\)"
    ):
        mac.measure(pepper.path, "smoke")


# both


@pytest.mark.parametrize("target", ["mac", "iphone"])
def test_only_a_mac_can_measure(gochu, pepper: Bundle, target: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    code, out, err = gochu("bench", pepper.path, "--on", target)
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert err.startswith(
        f"gochu: target {target} needs a Mac, since Apple's tools run nowhere else, and this is linux"
    )


@pytest.mark.parametrize("target", [mac, iphone])
def test_only_core_mls_variants_are_measured(toy: Path, pepper: Bundle, macos: None, target: Any) -> None:
    with pytest.raises(
        BundleError, match=r"has no variant for Core ML, and target .* export one with --format coreml"
    ):
        target.measure(toy)
    with pytest.raises(UsageError, match=r"variant cpu runs on onnxruntime, and target .* measures Core ML"):
        target.measure(toy, variant="cpu")
    with pytest.raises(UsageError, match="has no variant 'x'; it has coreml"):
        target.measure(pepper.path, variant="x")


def test_words_of_apples_tools() -> None:
    assert apple.words(RuntimeError()) == "RuntimeError"
    assert apple.words(ValueError("a\n  b")) == "a b"
    assert apple.words(remote._DeviceCtlError(b"\xff is odd", 1)) == "\N{REPLACEMENT CHARACTER} is odd"
    assert apple.words(RuntimeError("x" * 300)) == "x" * 200 + "..."
    assert apple.words(RuntimeError("team T1 and T1"), "T1") == "team *** and ***"


def test_coremltools_looks_for_states_in_the_wrong_place(package: Path) -> None:
    """Why the target mac does not use MLModelBenchmarker: when this fails, it could."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.models.MLModel(str(package), skip_model_load=True, function_name="decode")
    with pytest.raises(AttributeError, match="'list' object has no attribute 'state'"):
        model._is_stateful()
