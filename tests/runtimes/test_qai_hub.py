"""Measuring on Qualcomm AI Hub: the real client, against a stand-in for AI Hub and its phones on this machine."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qai_hub", reason="qai-hub is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

import qai_hub.util.session

from runtimes import ai_hub, farm
from runtimes.ai_hub import Hub as Client
from runtimes.bundle import Bundle
from runtimes.engines import open_engine
from runtimes.errors import BundleError, TargetError, UsageError
from runtimes.hexagon import runs_on_cpu
from runtimes.measurement import Measurement
from runtimes.targets import qai_hub as target

_spec = importlib.util.spec_from_file_location(
    "ai_hub_standin", Path(__file__).with_name("ai_hub_standin.py")
)
standin = sys.modules["ai_hub_standin"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(standin)
TOKEN, Hub, Phone, serving = standin.TOKEN, standin.Hub, standin.Phone, standin.serving

ULTRA = "Samsung Galaxy S24 Ultra"
PREFILL, DECODE = "sm8650-prefill.onnx", "sm8650-decode.onnx"


@pytest.fixture
def hub(hexagon: Bundle) -> Hub:
    sources = {PREFILL: hexagon.file("prefill.onnx"), DECODE: hexagon.file("decode.onnx")}
    return Hub(sources, [Phone(ULTRA), Phone("Samsung Galaxy S25", "15", "qualcomm-snapdragon-8-elite")])


@pytest.fixture(autouse=True)
def reachable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client finds the stand-in and a token in its usual file, and does not pause between tries."""
    monkeypatch.setattr(qai_hub.util.session, "BACKOFF_FACTOR", 0)
    with serving(hub) as url:
        write_config(tmp_path / "client.ini", url, monkeypatch)
        yield


def write_config(path: Path, url: str, monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    path.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\n", encoding="utf-8")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> farm.Clock:
    """Time that passes when somebody sleeps, at once."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    fake = farm.Clock(lambda: now[0], sleep)
    monkeypatch.setattr(farm, "Clock", lambda: fake)
    return fake


@pytest.fixture
def bench(gochu: Callable[..., Any], hexagon: Bundle) -> Callable[..., tuple[int, str, str]]:
    """`bench(device, *rest)` through the command line; no token in anything that is printed."""

    def run(device: str | None, *rest: object) -> tuple[int, str, str]:
        devices = ["--device", device] if device else []
        code, out, err = gochu("bench", hexagon.path, "--on", "qai-hub", "--json", *devices, *rest)
        assert TOKEN not in out + err
        return code, out, " ".join(err.split())

    return run


def parsed(out: str) -> list[Measurement]:
    return [Measurement.model_validate(each) for each in json.loads(out)]


def test_what_an_app_ships_is_measured_on_the_phone(bench, hub: Hub, hexagon: Bundle) -> None:
    code, out, err = bench("갤럭시 S24 울트라")
    assert code == 0, err
    (found,) = parsed(out)
    assert (found.where.device, found.where.os, found.where.chip) == (ULTRA, "Android 14", "sm8650")
    assert found.where.engine == f"AI Hub 2026.11, qai-hub {qai_hub.__version__}"
    assert found.where.backend.requested == "NPU"
    assert found.where.backend.effective == {"prefill": {"NPU": 3}, "decode": {"NPU": 3}}
    assert found.where.run == "j0+j1"
    assert found.what.variant == hexagon.manifest.variants[0].name
    assert found.marks == ()
    assert found.command == f"gochu bench out --workload smoke --on qai-hub --device '{ULTRA}'"
    figures = {each.name: each for each in found.figures}
    assert {each.kind for each in found.figures} == {"measured"}
    assert figures["decode_speed"].samples == pytest.approx([250.0, 1 / 4.1e-3, 1 / 4.2e-3, 1 / 9e-3])
    assert figures["prefill_speed"].value == pytest.approx(16 / 4.15e-3, rel=0.01)
    assert figures["load_time"].value == pytest.approx(0.18)
    assert figures["warm_load_time"].value == pytest.approx(0.06)
    assert figures["peak_memory"].value == 123_000_000
    assert figures["logits_correlation"].value == pytest.approx(1, abs=1e-6)
    assert {"ttft", "compile_time"} & set(figures) == set()
    prefill, decode = hub.posted("inference_job")
    assert prefill.is_profiling_on
    assert decode.options == "--compute_unit npu --qairt_version 2.51"
    sent = [[Path(name).name for name in each.names] for each in hub.archives.values()]
    assert sorted(map(sorted, sent)) == [
        [DECODE, "sm8650-hexagon.bin"],
        ["sm8650-hexagon.bin", PREFILL],
    ]


def test_a_model_is_uploaded_once_for_all_phones(bench, hub: Hub) -> None:
    hub.phones.append(Phone("Samsung Galaxy S24"))
    code, out, err = bench(f"{ULTRA}, Samsung Galaxy S24", "--variant", "onnx-hexagon-int4-sm8650")
    assert code == 0, err
    assert [each.where.device for each in parsed(out)] == [ULTRA, "Samsung Galaxy S24"]
    assert (len(hub.models), len(hub.jobs)) == (2, 4)


def test_ai_hub_can_compile_for_a_phone_that_the_bundle_is_not_for(bench, hub: Hub) -> None:
    """What was uploaded is whole: the phone runs it."""
    code, _, err = bench("galaxy s25")
    assert (code, "Samsung Galaxy S25 has sm8750: export it for that phone" in err) == (2, True), err
    code, out, err = bench("Samsung Galaxy S25", "--option", "recompile=true")
    assert code == 0, err
    (found,) = parsed(out)
    assert found.figure("logits_correlation").value > 0.999
    assert found.command.endswith("--option recompile=True")
    assert [each.options for each in hub.posted("compile_job")] == ["--target_runtime qnn_context_binary"] * 2
    assert found.where.run == "j2+j3"
    names = {Path(name).name for each in hub.archives.values() for name in each.names}
    assert names == {"prefill.onnx", "decode.onnx", "model.onnx.data"}


def test_logs_are_kept_without_the_token(bench, hub: Hub, tmp_path: Path) -> None:
    code, _, err = bench(ULTRA, "--option", f"logs={tmp_path / '로그'}")
    assert code == 0, err
    kept = {
        path.relative_to(tmp_path / "로그").as_posix(): path.read_text("utf-8")
        for path in tmp_path.rglob("로그/*/*")
    }
    assert sorted(kept) == ["j0/device.log", "j0/profile.json", "j1/device.log", "j1/profile.json"]
    assert kept["j0/device.log"] == "기기 로그: ok, authorization: token [secret]"
    assert json.loads(kept["j1/profile.json"])["execution_summary"]["all_inference_times"][0] == 4000


# what goes wrong


def test_an_unknown_phone_is_told_what_is_near(bench) -> None:
    code, _, err = bench("Galaxy S24 Ulta")
    assert (code, err) == (
        2,
        f"gochu: AI Hub has no device 'Galaxy S24 Ulta' now; it has {ULTRA}, Samsung Galaxy S25",
    )
    code, _, err = bench("Xiaomi 12")
    assert code == 2
    code, _, err = bench(None)
    assert (code, "say which with --device" in err) == (2, True)


@pytest.mark.parametrize(
    ("chipset", "chip"),
    [
        ("qualcomm-snapdragon-8gen3", "sm8650"),
        ("qualcomm-snapdragon-8-elite-for-galaxy", "sm8750"),
        ("a-new-one", None),
    ],
)
def test_a_phone_without_a_profile_has_the_chip_that_ai_hub_says(
    chipset: str, chip: str | None, hub: Hub
) -> None:
    hub.phones.append(Phone("Samsung Galaxy S42 (Family)", chipset=chipset))
    (found,) = Client().phones(["galaxy s42 (family)"])
    assert found == ai_hub.Phone("Samsung Galaxy S42 (Family)", chip)


def test_graphs_of_a_split_model_are_added_up() -> None:
    """Of each run; of the medians where one graph ran more often."""
    assert target._together([(1.0, 2.0), (0.5, 4.0)]) == [1.5, 6.0]
    assert target._together([(1.0, 2.0, 9.0), (0.5, 0.7)]) == pytest.approx([2.6])


def test_a_phone_that_is_gone(bench, hub: Hub) -> None:
    hub.gone.add(ULTRA)
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert "is not available" in err


@pytest.mark.parametrize("token", ["expired-token-of-a-test", ""])
def test_a_wrong_token(token: str, hub: Hub, hexagon: Bundle, tmp_path: Path, monkeypatch) -> None:
    with serving(hub) as url:
        write_config(tmp_path / "client.ini", url, monkeypatch, token)
        with pytest.raises(
            TargetError, match=r"takes the token for wrong or expired: .*qai-hub configure"
        ) as e:
            target.measure(hexagon.path, device=ULTRA)
    assert "expired-token-of-a-test" not in str(e.value)


@pytest.mark.parametrize("content", [f"{TOKEN}\n", f"[api]\napi_token = {TOKEN}\n", None])
def test_a_file_that_holds_no_token(content, hexagon: Bundle, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "client.ini"
    place.write_text(content) if content else place.unlink()
    with pytest.raises(TargetError, match="qai-hub configure") as error:
        target.measure(hexagon.path, device=ULTRA)
    assert TOKEN not in str(error.value)
    with pytest.raises(TargetError, match="qai-hub configure"):
        target.check()


def test_a_server_error_passes(bench, hub: Hub) -> None:
    hub.faults = {"GET /api/v1/devices/": [(500, ""), (503, "")], "GET /api/v1/jobs/j1/": [(502, "")] * 8}
    code, _, err = bench(ULTRA)
    assert code == 0, err
    assert hub.asked.count("GET /api/v1/devices/") >= 3


def test_a_server_that_goes_on_failing(bench, hub: Hub) -> None:
    hub.faults = {"GET /api/v1/devices/": [(503, TOKEN)] * 100}
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert "listing devices failed: AI Hub cannot be reached or has failed" in err


def test_a_quota_and_how_to_go_on(bench, hub: Hub) -> None:
    first = hub.new_job

    def once(job: Any) -> Any:  # the first is taken, the others are too many
        hub.faults = {"POST /api/v1/jobs/": [(429, f'{{"detail": "5 jobs at once, not {TOKEN}"}}')] * 7}
        return first(job)

    hub.new_job = once
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert "AI Hub allows no more for now (5 jobs at once, not [secret])" in err
    assert "--option run=j0" in err
    hub.faults, hub.new_job = {}, first
    code, out, err = bench(None, "--option", "run=j0")  # the device is the job's
    assert code == 0, err
    (found,) = parsed(out)
    assert (found.where.run, found.where.device, len(hub.jobs)) == ("j0+j1", ULTRA, 2)


def test_a_job_that_fails_keeps_its_words(bench, hub: Hub, tmp_path: Path) -> None:
    hub.failures = {" decode": f"Context could not be\ncreated: error 5010; sent: {TOKEN}"}
    code, out, err = bench(ULTRA, "--option", f"logs={tmp_path / 'logs'}")
    assert (code, out) == (6, "")
    assert "job j1 (decode on Samsung Galaxy S24 Ultra) failed, and says: Context could not be created" in err
    assert "--option run=j0" in err
    assert "run=j0+j1" not in err  # it would only fail again
    assert (tmp_path / "logs/j1/device.log").exists()
    (tmp_path / "file").touch()
    code, _, err = bench(ULTRA, "--option", f"logs={tmp_path / 'file'}")
    assert "says: Context could not be created" in err  # whatever else fails
    assert "logs cannot be kept in" in err


def test_time_is_up_and_the_jobs_are_fetched_later(bench, hub: Hub) -> None:
    hub.states = ("JOB_STATE_CREATED",)
    code, out, err = bench(ULTRA, "--option", "max_minutes=3")
    assert (code, out) == (6, "")
    assert "was not done after 3 minutes and goes on there" in err
    assert "--option run=j0+j1" in err
    hub.states = ("JOB_STATE_DONE",)
    code, out, err = bench(ULTRA, "--option", "run=j1+j0")
    assert code == 0, err
    assert (parsed(out)[0].where.run, len(hub.jobs)) == ("j0+j1", 2)


def test_too_many_minutes_are_refused_before_anything_is_sent(bench, hub: Hub) -> None:
    code, _, err = bench(ULTRA, "--option", "max_minutes=300")
    assert (code, "device minutes" in err) == (2, True)
    assert not hub.models


def test_ctrl_c_says_how_to_go_on(hexagon: Bundle, clock: farm.Clock, capsys) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    clock.sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        target.measure(hexagon.path, device=ULTRA)
    assert "fetch what it does with --option run=j0+j1" in capsys.readouterr().err


@pytest.mark.parametrize(("lost", "words"), [("detail", "no times"), ("outputs", "no outputs")])
def test_partial_results(lost: str, words: str, bench, hub: Hub) -> None:
    hub.lost = lost
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert f"{words}: a part of its results is missing" in err
    assert "--option run=j0+j1" in err


def test_a_layer_on_the_cpu(bench, hub: Hub) -> None:
    hub.phones[0].units = ("NPU", "CPU", "CPU")
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert "2 of prefill on the CPU, 2 of decode on the CPU" in err
    code, out, err = bench(ULTRA, "--allow-fallback")  # as the command that repeats it says
    (found,) = parsed(out)
    assert (code, found.marks) == (0, ("cpu_fallback",))
    assert found.command.endswith("--allow-fallback")
    assert found.where.backend.effective["decode"] == {"NPU": 1, "CPU": 2}


def test_other_logits_than_the_cpus(bench, hub: Hub) -> None:
    hub.phones[0].noise = 0.2
    code, out, err = bench(ULTRA)
    assert (code, out) == (6, "")
    assert "does not compute what the same graph computes on the CPU" in err


def test_a_phone_that_becomes_slower(bench, hub: Hub) -> None:
    hub.phones[0].times = (*[4000] * 5, *[5000] * 5)
    assert parsed(bench(ULTRA)[1])[0].marks == ("throttled",)


def test_what_is_not_told_is_said(bench, hub: Hub, monkeypatch) -> None:
    """No layers, and no library here to check the answer with."""
    hub.phones[0].units = ()
    monkeypatch.setattr("runtimes.hexagon.runs_on_cpu", missing)
    (found,) = parsed(bench(ULTRA)[1])
    assert found.where.backend.effective == {}
    assert found.figure("logits_correlation") is None
    assert "AI Hub did not tell which processor computed what" in found.how.notes
    assert any("random inputs" in note and "onnxruntime_qnn" in note for note in found.how.notes)
    assert not hub.datasets


def missing(*rest: object) -> Any:
    from runtimes.errors import MissingExtra

    raise MissingExtra("onnxruntime_qnn is not installed; install it with `pip install 'gochu[hexagon]'`")


def test_an_older_qairt_than_the_compilers(bench, hub: Hub) -> None:
    hub.qairt = (("2.45", "default"), ("2.50", "latest"))
    code, _, err = bench(ULTRA)
    assert (code, "AI Hub's newest is 2.50, which cannot load it" in err) == (6, True)
    hub.qairt = (("2.51", "default"), ("2.60", "latest"))
    assert bench(ULTRA)[0] == 0
    assert hub.posted("inference_job")[0].options == "--compute_unit npu"


def test_a_job_of_another_bundle(bench, hub: Hub, hexagon: Bundle, tmp_path: Path) -> None:
    assert bench(ULTRA)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(hexagon.path, other)
    (other / "manifest.json").write_text((hexagon.path / "manifest.json").read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(UsageError, match=r"job j1 .* did not run this bundle"):
        target.measure(other, device=ULTRA, run="j1")
    with pytest.raises(UsageError, match=r"job j1 .* is none of what was asked for"):
        target.measure(hexagon.path, device="Samsung Galaxy S25", run="j1", recompile=True)
    code, _, err = bench(None, "--option", "run=j7")
    assert (code, "'j7' could not be found" in err) == (6, True)


def test_a_bundle_for_the_cpu_alone(hexagon: Bundle, toy: Path, hub: Hub) -> None:
    with pytest.raises(BundleError, match=r"no variant for Qualcomm's NPU, only cpu: export one with"):
        target.measure(toy, device=ULTRA)
    with pytest.raises(
        BundleError, match="graphs of any length, and Qualcomm's NPU takes graphs of fixed shapes"
    ):
        target.measure(hexagon.path, device=ULTRA, variant=hexagon.manifest.variants[-1].name)
    assert not hub.asked


def test_the_inputs_that_are_sent_are_those_of_a_real_step(hexagon: Bundle, monkeypatch) -> None:
    """The cache of the decode graph holds the chunk before it, and its logits are the engine's; also where the engine
    puts new rows into the cache that it gave, as it does with integers."""
    from runtimes.engines import qnn
    from runtimes.workload import prompt_ids

    remembered = qnn.remembered

    def placed(cache: Any, new: Any, *rest: int) -> Any:
        cache[...] = -1
        return remembered(cache, new, *rest)

    monkeypatch.setattr(qnn, "remembered", placed)
    variant = hexagon.manifest.variants[0]
    runs = runs_on_cpu(hexagon, variant)
    assert set(runs) == {"prefill", "decode"}
    assert runs["decode"].inputs["attention_mask"].sum() == 17
    assert (runs["prefill"].inputs["past_key_values.0.key"] == 0).all()
    assert (runs["decode"].inputs["past_key_values.0.key"] == runs["prefill"].outputs["present.0.key"]).all()
    engine = open_engine(hexagon, variant.name, exact=True, on="htp-simulator")
    logits = engine.prefill(prompt_ids(17, hexagon.manifest.model.vocab))
    assert (runs["decode"].outputs["logits"].reshape(-1) == logits).all()
