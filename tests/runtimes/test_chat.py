"""Chat templates: the same text as transformers renders, and no way out of the sandbox."""

import json
from pathlib import Path

import pytest

from runtimes.chat import MAX_OUTPUT, ChatTemplate
from runtimes.errors import TemplateError, UsageError

# Templates with the structure of the families' own; the wording is this test's.
LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nDate: " + strftime_now("%Y") + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {{- head + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('no system role here') }}{% endif %}
{%- for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

PHI_3 = """{% for message in messages %}{% if message['role'] in ['system', 'user'] %}
{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}
{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

OTHERS = """{%- set ns = namespace(count=0, first=true) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if ns.count > 3 %}{% break %}{% endif %}
    {%- generation %}{{ m | tojson }}{{ [ns.count, "<한글>"] | tojson(indent=2) }}{% endgeneration %}
{%- endfor %}
{% macro turn(role) %}<{{ role }}>{% endmacro %}
{{ turn('assistant') if add_generation_prompt }}{{ 3 * 'ab' }}{{ 2 ** 10 }}{{ dict(a=1) }}
"""

TEMPLATES = {"llama 3": LLAMA_3, "qwen 2.5": QWEN_2_5, "gemma 2": GEMMA_2, "phi 3": PHI_3, "others": OTHERS}

SYSTEM = {"role": "system", "content": " 짧게 답해. "}
USER = {"role": "user", "content": ' <b>매운</b> "고추"\n{{ 7 * 7 }} '}
ASSISTANT = {"role": "assistant", "content": "네."}
CONVERSATIONS = [[USER], [USER, ASSISTANT, USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]]


def refuses(name: str, messages: list[dict]) -> bool:
    return name == "gemma 2" and messages[0]["role"] == "system"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda m: "-".join(t["role"] for t in m))
@pytest.mark.parametrize("add", [True, False])
def test_same_text_as_transformers(name: str, messages: list[dict], add: bool, byte_level: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(byte_level), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name]
    )
    ours = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    if refuses(name, messages):
        with pytest.raises(TemplateError, match="no system role here"):
            ours.render(messages, add_generation_prompt=add)
        return
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
    assert ours.render(messages, add_generation_prompt=add) == expected
    assert "한글" in expected or "매운" in expected, "Korean stands as it is"


def test_a_message_is_text_and_no_program() -> None:
    assert "{{ 7 * 7 }}" in ChatTemplate(QWEN_2_5).render([USER])


BREAKOUTS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ (messages | attr('__class__')).__name__ }}",
    "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list }}{{ 1 / 0 }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}{{ ('%s' | format(1)).__class__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__html__ = messages.clear %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'root'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * ['a'] }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ nothing.at.all }}",
    "{{ no_such_function() }}",
]


@pytest.mark.parametrize("source", BREAKOUTS)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(messages)
    assert "\n" not in str(caught.value)
    assert "root:" not in str(caught.value)
    assert messages == [{"role": "user", "content": "hi"}]


def test_output_up_to_the_bound_is_fine() -> None:
    source = f"{{% for i in range(8) %}}{{{{ 'a' * {MAX_OUTPUT // 8} }}}}{{% endfor %}}"
    assert len(ChatTemplate(source).render([USER])) == MAX_OUTPUT
    with pytest.raises(TemplateError, match="wrote more than"):
        ChatTemplate(source + "b").render([USER])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{% endfor %}", "{% unknown %}", "{{ 'a' | nofilter }}"]
)
def test_a_malformed_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(TemplateError, match="is malformed"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "x"}],
        ["text"],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
    ],
)
def test_messages_that_are_not_text_are_refused(messages: list) -> None:
    with pytest.raises(UsageError):
        ChatTemplate(QWEN_2_5).render(messages)


def test_json_as_templates_expect_it() -> None:
    text = ChatTemplate("{{ messages[0] | tojson }}").render([USER])
    assert json.loads(text) == USER
    assert "<b>매운</b>" in text
