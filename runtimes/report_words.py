"""The words of reports, in English and Korean. Numbers and units are the same in both."""

from runtimes.errors import UsageError

LANGUAGES = ("en", "ko")

_WORDS: dict[str, tuple[str, str]] = {
    # figures
    "load_time": ("load time", "로딩 시간"),
    "compile_time": ("compile time", "컴파일 시간"),
    "ttft": ("TTFT", "TTFT"),
    "prefill_speed": ("prefill speed", "프리필 속도"),
    "decode_speed": ("decode speed", "디코딩 속도"),
    "prefill_instructions": ("prefill instructions", "프리필 명령어 수"),
    "decode_instructions": ("decode instructions", "디코딩 명령어 수"),
    "peak_memory": ("peak memory", "최대 메모리"),
    "peak_anonymous_memory": ("peak anonymous memory", "최대 익명 메모리"),
    "peak_mapped_memory": ("peak mapped memory", "최대 매핑 메모리"),
    "peak_accelerator_memory": ("peak accelerator memory", "최대 가속기 메모리"),
    "idle_memory": ("idle memory", "로딩 전 메모리"),
    "energy": ("energy of a token", "토큰당 에너지"),
    "npu_share": ("operations on the NPU", "NPU에서 하는 연산"),
    "logits_correlation": ("logits with the CPU's", "CPU 로짓과의 상관"),
    "column load_time": ("load", "로딩"),
    "column ttft": ("TTFT", "TTFT"),
    "column prefill_speed": ("prefill tok/s", "프리필 tok/s"),
    "column decode_speed": ("decode tok/s", "디코딩 tok/s"),
    "column peak_memory": ("peak memory", "최대 메모리"),
    "column peak_anonymous_memory": ("of it anonymous", "그중 익명"),
    # kinds and marks
    "measured": ("measured", "측정"),
    "emulated": ("emulated", "에뮬레이션"),
    "simulated": ("simulated", "시뮬레이션"),
    "predicted": ("predicted", "예측"),
    "published": ("published", "공개 자료"),
    "measured, means": ("by a clock, on the device itself", "기기 자체에서 시계로 잰 값"),
    "emulated, means": (
        "another machine's instructions, of which the number is true and the time is not",
        "다른 기계가 대신 실행한 명령어: 개수는 맞고 시간은 맞지 않음",
    ),
    "simulated, means": ("what a simulator of an NPU says", "NPU 시뮬레이터가 알려 준 값"),
    "predicted, means": ("by a formula; nothing was run", "공식으로 계산한 값이며 실행하지 않음"),
    "published, means": ("by someone else", "다른 사람이 공개한 값"),
    "interrupted": ("interrupted", "중단됨"),
    "throttled": ("throttled", "스로틀링"),
    "cpu_fallback": ("CPU fallback", "CPU로 대체"),
    "interrupted, means": (
        "stopped before its end: fewer samples than asked for",
        "끝나기 전에 멈춤: 표본이 요청보다 적음",
    ),
    "throttled, means": (
        "it became slower while it ran, or the device said that it was hot",
        "실행 중에 느려졌거나 기기가 뜨겁다고 알림",
    ),
    "cpu_fallback, means": (
        "another processor computed than the one asked for",
        "요청한 것과 다른 프로세서가 계산함",
    ),
    # columns and conditions
    "model": ("model", "모델"),
    "bundle": ("bundle", "번들"),
    "variant": ("variant", "변형"),
    "format": ("format", "형식"),
    "scheme": ("scheme", "양자화 방식"),
    "bytes": ("size", "크기"),
    "target": ("on", "대상"),
    "device": ("device", "기기"),
    "chip": ("chip", "칩"),
    "os": ("system", "운영체제"),
    "engine": ("engine", "엔진"),
    "threads": ("threads", "스레드"),
    "threads, counted": ("{n} threads", "스레드 {n}개"),
    "thread, counted": ("1 thread", "스레드 1개"),
    "backend": ("processors", "프로세서"),
    "asked for": ("asked for {requested}; operations: {effective}", "요청: {requested}; 연산: {effective}"),
    "function's": ("{function}'s on ", "{function}: "),
    "unknown": ("unknown", "알 수 없음"),
    "run": ("run", "실행 번호"),
    "workload": ("workload", "워크로드"),
    "context": ("context", "컨텍스트"),
    "warmup": ("warm-up", "워밍업"),
    "repeats": ("repeats", "반복"),
    "start": ("start", "시작"),
    "cold": ("cold", "콜드"),
    "warm": ("warm", "웜"),
    "minutes": ("minutes", "분"),
    "cool_down": ("rest before, s", "사전 휴식(초)"),
    "in → out": ("in → out", "입력 → 출력"),
    "marks": ("marks", "표시"),
    "notes": ("notes", "비고"),
    "time": ("time", "시각"),
    "command": ("command", "명령"),
    "before": ("before", "전"),
    "after": ("after", "후"),
    "answers": ("answers", "답변"),
    "toolchain": ("toolchain", "도구"),
    "thermal": ("thermal", "발열"),
    "battery": ("battery", "배터리"),
    "charging": ("charging", "충전 중"),
    "conditions": ("conditions", "조건"),
    "figure": ("figure", "지표"),
    "verdict": ("verdict", "판정"),
    "tokens": ("tokens", "토큰"),
    # the page
    "title": ("Measurements", "측정 결과"),
    "lede": (
        "{measurements} on {devices}, {days}",
        "{measurements}, {devices}, {days}",
    ),
    "days": ("{first} to {last}", "{first} ~ {last}"),
    "measurements, counted": ("{n} measurements", "측정 {n}건"),
    "measurement, counted": ("1 measurement", "측정 1건"),
    "devices, counted": ("{n} devices", "기기 {n}대"),
    "device, counted": ("1 device", "기기 1대"),
    "at a glance": ("At a glance", "한눈에 보기"),
    "glance": (
        "Of each, the measured case that decodes fastest.",
        "기기마다 측정한 것 중 디코딩이 가장 빠른 경우입니다.",
    ),
    "decode and memory": ("Decode speed and peak memory", "디코딩 속도와 최대 메모리"),
    "decode and memory, how": (
        "Up and to the left is better. Hollow: not measured.",
        "왼쪽 위로 갈수록 좋습니다. 속이 빈 점은 측정값이 아닙니다.",
    ),
    "prefill by length": ("Prefill speed by prompt length", "프롬프트 길이별 프리필 속도"),
    "prefill by length, how": (
        "Medians; the bars span the 5th to the 95th percentile. Higher is better.",
        "중앙값이며 막대는 5~95 백분위수입니다. 높을수록 좋습니다.",
    ),
    "over time": ("Sustained decode speed", "지속 디코딩 속도"),
    "over time, how": (
        "Points: every sample. Lines: medians of their neighbours. A line that falls is a device that throttles.",
        "점은 모든 표본, 선은 이웃한 표본의 중앙값입니다. 내려가는 선은 스로틀링을 뜻합니다.",
    ),
    "predicted and measured": ("Predicted and measured", "예측과 측정"),
    "predicted and measured, how": (
        "Prediction as a share of the measurement; 100% is right.",
        "측정값에 대한 예측값의 비율이며 100%면 정확합니다.",
    ),
    "before and after": ("Before and after", "전과 후"),
    "before and after, how": (
        "Change from {a} to {b}, with its {level} interval. Grey: no more than noise, or too noisy to tell.",
        "{a}에서 {b}로의 변화와 {level} 구간입니다. "
        "회색은 잡음을 넘는 차이가 없거나 잡음이 커서 알 수 없음을 뜻합니다.",
    ),
    "nothing in common": (
        "The two files have no figure in common: nothing was measured in both.",
        "두 파일에 공통된 지표가 없습니다. 양쪽에서 모두 측정한 것이 없습니다.",
    ),
    "all": ("All measurements", "모든 측정"),
    "all, how": (
        "Medians, ± half of what lies between the 5th and the 95th percentile. The command under a row repeats it.",
        "중앙값이며 ±는 5~95 백분위수 구간의 절반입니다. 행 아래의 명령으로 다시 측정할 수 있습니다.",
    ),
    "what the words mean": ("What the words mean", "용어"),
    "better": ("better", "좋아짐"),
    "worse": ("worse", "나빠짐"),
    "footer": (
        "Made by gochu report. Nothing is loaded from elsewhere.",
        "gochu report가 만들었습니다. 외부에서 불러오는 것이 없습니다.",
    ),
    "tokens in the prompt": ("tokens in the prompt", "프롬프트 토큰 수"),
    "minutes since the start": ("minutes since the start", "시작 후 시간(분)"),
    # comparison
    "no difference": ("no difference", "차이 없음"),
    "undecided": ("undecided", "판정 불가"),
    "faster": ("faster by {x}", "{x} 빨라짐"),
    "slower": ("slower by {x}", "{x} 느려짐"),
    "less": ("less by {x}", "{x} 줄어듦"),
    "more": ("more by {x}", "{x} 늘어남"),
    "interval": ("{low} to {high}", "{low} ~ {high}"),
    "median": ("median", "중앙값"),
    "fastest tenth": ("fastest tenth", "가장 빠른 10%"),
    "samples": ("samples", "표본"),
    "change, certain": ("change ({level})", "변화({level})"),
    "runs": ("runs", "실행"),
    "decided by": ("by", "기준"),
    "differs": ("differs: {name}: {a} → {b}", "다른 점: {name}: {a} → {b}"),
    "skipped": ("not compared: {what}: {why}", "비교하지 않음: {what}: {why}"),
    "only in A": ("only in A", "A에만 있음"),
    "only in B": ("only in B", "B에만 있음"),
    "marked": ("a marked run is not like the others", "표시가 있는 실행은 다른 실행과 같지 않음"),
    "of two kinds": ("figures of different kinds", "종류가 다른 지표"),
    "zero": ("a figure that is not above zero", "0보다 크지 않은 지표"),
    "few runs": (
        "fewer than {n} runs on a side: how far runs scatter is assumed, not seen. Measure both in turns, several "
        "times, into the same two files.",
        "한쪽의 실행이 {n}회보다 적어 실행 간 산포를 관찰하지 못하고 가정했습니다. "
        "둘을 번갈아 여러 번 측정해 같은 두 파일에 더하세요.",
    ),
    # what fits where
    "fit": ("What fits where", "어떤 모델이 어디에 들어가나"),
    "fit, lede": (
        "{models} on {devices}: {fits} fit, {tight} are tight, {no} do not fit",
        "{models}, {devices}: 들어감 {fits}, 빠듯함 {tight}, 안 됨 {no}",
    ),
    "models, counted": ("{n} models", "모델 {n}개"),
    "model, counted": ("1 model", "모델 1개"),
    "fit, glance": (
        "Of each device, the largest model that fits, as it would be planned.",
        "기기마다 들어가는 가장 큰 모델과 그 계획입니다.",
    ),
    "fit, largest": ("the largest that fits", "들어가는 가장 큰 모델"),
    "fit, none": ("none", "없음"),
    "fit, fits": ("fits", "들어감"),
    "fit, tight": ("tight", "빠듯함"),
    "fit, no": ("does not fit", "안 됨"),
    "fit, memory": ("Memory that it needs", "필요한 메모리"),
    "fit, memory, how": (
        "As a share of what the model may use on the device. Beyond 100% it does not fit; beyond 80% it is tight.",
        "기기에서 모델이 쓸 수 있는 메모리에 대한 비율입니다. 100%를 넘으면 들어가지 않고, 80%를 넘으면 빠듯합니다.",
    ),
    "fit, speed": ("Decode speed and memory", "디코딩 속도와 메모리"),
    "fit, speed, how": (
        "Predicted, with the interval of each. Up and to the left is better.",
        "예측값이며 막대는 구간입니다. 왼쪽 위로 갈수록 좋습니다.",
    ),
    "fit, all": ("All", "전체"),
    "fit, all, how": (
        "Predictions of the planner (gochu plan), with the rules that decided. Nothing was run.",
        "계획기(gochu plan)의 예측과 판단에 쓴 규칙입니다. 실행한 것은 없습니다.",
    ),
    "fit, budget": ("may use", "쓸 수 있음"),
    "fit, of": ("{needed} of {budget}", "{budget} 중 {needed}"),
    "fit, verdict": ("fits?", "들어가나"),
    "fit, backend": ("backend", "백엔드"),
    "fit, why": ("why", "이유"),
    "fit, needs": ("needs", "필요한 메모리"),
    "fit, footer": (
        "Made by gochu fit. Nothing is loaded from elsewhere.",
        "gochu fit이 만들었습니다. 외부에서 불러오는 것이 없습니다.",
    ),
}


class Words:
    """`words["decode_speed"]`, `words("few runs", n=5)`: the words of one language.

    What has no entry, as a figure of another package's target, is shown by its own name.
    """

    def __init__(self, lang: str) -> None:
        if lang not in LANGUAGES:
            raise UsageError(f"there are no reports in {lang!r}; there are {' and '.join(LANGUAGES)}")
        self.lang = lang
        self._place = LANGUAGES.index(lang)

    def __getitem__(self, key: str) -> str:
        return _WORDS[key][self._place] if key in _WORDS else key.replace("_", " ")

    def __call__(self, key: str, **values: object) -> str:
        return self[key].format(**values)

    def counted(self, key: str, n: int) -> str:
        """So many of something: the singular has its own entry."""
        return self(f"{key}, counted" if n == 1 else f"{key}s, counted", n=n)


ENGLISH = Words("en")
