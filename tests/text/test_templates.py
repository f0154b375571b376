"""Chat templates of real models: written here from the documented formats, in the constructs that their files use.

Every expected prompt is written out by hand from the model's documentation, with tools where the model has them.
"""

from __future__ import annotations

import os
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from vkllm.chat import render
from vkllm.errors import RequestError

Message = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                },
                "required": ["city"],
            },
        },
    }
]
TOOL_JSON = (
    '{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": '
    '"object", "properties": {"city": {"type": "string", "description": "Its name"}, "unit": {"type": "string", '
    '"enum": ["c", "f"], "default": "c"}}, "required": ["city"]}}}'
)


class Clock(datetime):
    """Stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> Clock:
        return cls(2026, 1, 2, 3, 4, tzinfo=tz)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vkllm.chat.datetime", Clock)


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abc123def", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
}
RESULT: Message = {"role": "tool", "tool_call_id": "abc123def", "name": "get_weather", "content": "21 °C"}

# -- Qwen2.5: ChatML; tools in the system message, calls as <tool_call>, results in the user's turn -----------------------------
QWEN_TOOLS = r"""
{%- macro told(tools) %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within " }}
    {{- "<tool_call></tool_call> XML tags:\n<tool_call>\n" }}
    {{- "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}
{%- endmacro %}
{%- macro calls(message) %}
    {%- for call in message.tool_calls %}
        {%- if call.function is defined %}
            {%- set call = call.function %}
        {%- endif %}
        {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
        {{- call.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""
QWEN_RESULT = r"""
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
"""
QWEN25 = (
    QWEN_TOOLS
    + r"""
{%- set own = messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\n' }}
{{- messages[0]['content'] if own else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
{%- if tools %}
    {{- told(tools) }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
        (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {{- calls(message) + '<|im_end|>\n' }}
"""
    + QWEN_RESULT
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
)
QWEN_TOLD = f"""# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{TOOL_JSON}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call><|im_end|>
"""
QWEN_CALLED = """<|im_start|>user
How warm?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
21 °C
</tool_response><|im_end|>
<|im_start|>assistant
"""


def test_qwen_2_5() -> None:
    assert render(QWEN25, [user("Hi"), assistant("Hello!"), user("<b>?")]) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n<b>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    asked = [system("Be brief."), user("How warm?"), CALL, RESULT]
    assert render(QWEN25, asked, tools=TOOLS) == f"<|im_start|>system\nBe brief.\n\n{QWEN_TOLD}{QWEN_CALLED}"


# -- Qwen3: as before, and what the model thought in earlier turns is left out --------------------------------------------------
QWEN3 = (
    QWEN_TOOLS
    + r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content }}
    {%- endif %}
    {{- told(tools).lstrip('\n') if messages[0].role != 'system' else told(tools) }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '\n<think>\n' + thought.strip('\n') + '\n</think>\n' }}
        {%- endif %}
        {%- if content %}
            {{- '\n' + content }}
        {%- endif %}
        {{- calls(message) + '<|im_end|>\n' }}
"""
    + QWEN_RESULT
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
)


def test_qwen_3() -> None:
    thought = [user("1+1?"), assistant("<think>\nAdd.\n</think>\n\n2"), user("2+2?")]
    without = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
    assert render(QWEN3, thought) == without + "<|im_start|>assistant\n"
    assert render(QWEN3, thought, options={"enable_thinking": False}) == (
        without + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert render(QWEN3, [user("How warm?"), CALL, RESULT], tools=TOOLS) == f"<|im_start|>system\n{QWEN_TOLD}{QWEN_CALLED}"
    in_between = [user("How warm?"), CALL | {"reasoning_content": "Ask."}, RESULT]
    assert "<|im_start|>assistant\n<think>\nAsk.\n</think>\n\n<tool_call>\n" in render(QWEN3, in_between)


# -- Llama 3.x: headers; tools in the first user message as indented JSON, results by "ipython" ---------------------------------
LLAMA3 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if not tools is none %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven these functions, answer with JSON for a call.\n\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA3_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"


def test_llama_3() -> None:
    def prompt(messages: list[Message], **options: Any) -> str:
        return render(LLAMA3, messages, bos_token="<|begin_of_text|>", options={"date_string": "26 Jul 2024"}, **options)

    assert prompt([system(" Be brief. "), user("Hi"), assistant("Hello!"), user("Bye")]) == (
        f"{LLAMA3_HEAD}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt([user("How warm?"), CALL, RESULT], tools=[{"name": "é<", "parameters": {}}]) == (
        f"{LLAMA3_HEAD}Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven these functions, answer with JSON for a call.\n\n"
        '{\n    "name": "é<",\n    "parameters": {}\n}\n\nHow warm?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "get_weather", "parameters": {"city": "Zürich"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"21 °C"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert "Today Date: 02 Jan 2026\n" in render(LLAMA3, [user("Hi")])
    with pytest.raises(RequestError, match="single tool-calls"):
        prompt([user("x"), CALL | {"tool_calls": CALL["tool_calls"] * 2}])


# -- Mistral v1: [INST] with spaces; v3 and Tekken: none, and control tokens round tools, calls and results ---------------------
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_TEKKEN = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif (message.tool_calls is defined and message.tool_calls is not none) %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""


def test_mistral_v1() -> None:
    asked = [user("Hi"), assistant("Hello!"), user("Bye")]
    assert render(MISTRAL_V1, asked, bos_token="<s>", eos_token="</s>") == "<s> [INST] Hi [/INST] Hello!</s> [INST] Bye [/INST]"
    with pytest.raises(RequestError, match="must alternate"):
        render(MISTRAL_V1, [user("1"), user("2")])


def test_mistral_tekken() -> None:
    def prompt(messages: list[Message], **options: Any) -> str:
        return render(MISTRAL_TEKKEN, messages, bos_token="<s>", eos_token="</s>", **options)

    assert prompt([system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]) == (
        "<s>[INST]Hi[/INST]Hello!</s>[INST]Be brief.\n\nBye[/INST]"
    )
    assert prompt([user("How warm?"), CALL, RESULT, assistant("Warm."), user("Sure?")], tools=TOOLS) == (
        '<s>[INST]How warm?[/INST][TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Zürich"}, "id": "abc123def"}]</s>'
        f'[TOOL_RESULTS]{{"content": 21 °C, "call_id": "abc123def"}}[/TOOL_RESULTS]Warm.</s>'
        f"[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS][INST]Sure?[/INST]"
    )
    with pytest.raises(RequestError, match="length 9"):
        prompt([user("x"), CALL | {"tool_calls": [CALL["tool_calls"][0] | {"id": "1"}]}])


# -- Gemma: turns of "user" and "model"; Gemma 2 has no system message, Gemma 3 puts it before the first turn -------------------
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model
' }}
{%- endif -%}
"""


def test_gemma() -> None:
    asked = [user("Hi "), assistant("Hello!\n"), user("Bye")]
    turns = (
        "<start_of_turn>user\n{}Hi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert render(GEMMA2, asked, bos_token="<bos>") == "<bos>" + turns.format("")
    with pytest.raises(RequestError, match="System role not supported"):
        render(GEMMA2, [system("x"), *asked])
    assert render(GEMMA3, [system("Be brief."), *asked], bos_token="<bos>") == "<bos>" + turns.format("Be brief.\n\n")
    parts = [{"type": "image"}, {"type": "text", "text": " What? "}]
    assert render(GEMMA3, [system([{"type": "text", "text": "S"}]), user(parts)], bos_token="<bos>") == (
        "<bos><start_of_turn>user\nS\n\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\n"
    )


# -- Phi-3: <|role|> and <|end|>, each followed by a newline --------------------------------------------------------------------
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_phi_3() -> None:
    asked = [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]
    turns = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n"
    assert render(PHI3, asked) == turns + "<|assistant|>\n"
    assert render(PHI3, asked, add_generation_prompt=False, eos_token="<|endoftext|>") == turns + "<|endoftext|>"


# -- Granite 3: roles between tokens, tools in a role of their own, a date in the system message --------------------------------
GRANITE = r"""
{%- if tools and not available_tools -%}
    {%- set available_tools = tools -%}
{%- endif -%}
{%- if messages[0]['role'] == 'system' %}
     {%- set system_message = messages[0]['content'] %}
     {%- set loop_messages = messages[1:] %}
 {%- else %}
     {%- set system_message = "Knowledge Cutoff Date: April 2024. Today's Date: " + strftime_now('%B %d, %Y') + "." %}
     {%- if available_tools and documents %}
         {%- set system_message = system_message + " Tools and documents." %}
     {%- elif available_tools %}
         {%- set system_message = system_message + " Tools." %}
     {%- endif %}
     {%- if 'citations' in controls and documents %}
         {%- set system_message = system_message + " Cite." %}
     {%- endif %}
     {%- set loop_messages = messages %}
 {%- endif %}
 {{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>
' }}
 {%- if available_tools %}
     {{- '<|start_of_role|>available_tools<|end_of_role|>' }}
     {{- available_tools | tojson(indent=4) }}
     {{- '<|end_of_text|>
' }}
 {%- endif %}
 {%- for message in loop_messages %}
     {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>
' }}
     {%- if loop.last and add_generation_prompt %}
         {{- '<|start_of_role|>assistant' }}
             {%- if controls %}
                 {{- ' ' + controls | tojson()}}
             {%- endif %}
         {{- '<|end_of_role|>' }}
     {%- endif %}
 {%- endfor %}
"""


def test_granite() -> None:
    asked = [system("Be brief."), user("How warm?"), assistant('<|tool_call|>[{"name": "x"}]'), RESULT]
    assert render(GRANITE, asked, tools=[{"name": "x"}], options={"controls": {"length": "short"}}) == (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        '<|start_of_role|>available_tools<|end_of_role|>[\n    {\n        "name": "x"\n    }\n]<|end_of_text|>\n'
        "<|start_of_role|>user<|end_of_role|>How warm?<|end_of_text|>\n"
        '<|start_of_role|>assistant<|end_of_role|><|tool_call|>[{"name": "x"}]<|end_of_text|>\n'
        "<|start_of_role|>tool<|end_of_role|>21 °C<|end_of_text|>\n"
        '<|start_of_role|>assistant {"length": "short"}<|end_of_role|>'
    )
    assert "Today's Date: January 02, 2026. Tools.<|end_of_text|>" in render(GRANITE, [user("Hi")], tools=TOOLS)


# -- gpt-oss (harmony): channels, a developer message, tools as a TypeScript namespace ------------------------------------------
HARMONY = r"""
{%- macro type_of(spec, required) -%}
    {%- if spec.type == "array" -%}
        {{- type_of(spec['items'], required) + "[]" if spec['items'] else "any[]" }}
    {%- elif spec.type == "string" -%}
        {{- '"' + spec.enum|join('" | "') + '"' if spec.enum else "string" }}
    {%- elif spec.type in ["number", "integer"] -%}
        {{- "number" }}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\n" }}
        {%- for name, inner in spec.properties.items() -%}
            {{- name + ("?" if name not in (spec.required or []) else "") + ": " + type_of(inner, spec.required or []) }}
            {%- if not loop.last -%}
                {{-", " }}
            {%- endif -%}
        {%- endfor -%}
        {{- "}" }}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}
{%- macro namespace_of(name, tools) -%}
    {{- "## " + name + "\n\nnamespace " + name + " {\n\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\n" }}
        {{- "type "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: {\n" }}
            {%- for param, spec in tool.parameters.properties.items() %}
                {%- if spec.description %}
                    {{- "// " + spec.description + "\n" }}
                {%- endif %}
                {{- param }}
                {%- if param not in (tool.parameters.required or []) -%}
                    {{- "?" }}
                {%- endif -%}
                {{- ": " + type_of(spec, tool.parameters.required or []) }}
                {%- if spec.default is defined -%}
                    {{- ", // default: " + (spec.default if spec.enum else spec.default|tojson) }}
                {%- endif -%}
                {{- "\n" if spec.default is defined else ",\n" }}
            {%- endfor %}
            {{- "}) => any;\n\n" }}
        {%- else -%}
            {{- "() => any;\n\n" }}
        {%- endif -%}
    {%- endfor %}
    {{- "} // namespace " + name }}
{%- endmacro -%}
{%- macro system_message() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are ChatGPT, a large language model trained by OpenAI." %}
    {%- endif %}
    {{- model_identity + "\nKnowledge cutoff: 2024-06\nCurrent date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\n\n" }}
    {{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
    {%- if tools -%}
        {{- "\nCalls to these tools must go to the commentary channel: 'functions'." }}
    {%- endif -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system_message() + "<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
    {%- set developer_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer_message %}
        {{- "# Instructions\n\n" + developer_message + "\n\n" }}
    {%- endif %}
    {%- if tools -%}
        {{- "# Tools\n\n" + namespace_of("functions", tools) }}
    {%- endif -%}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' and "tool_calls" in message -%}
        {%- set later = namespace(found=false) %}
        {%- for other in loop_messages[loop.index:] %}
            {%- if other.role == 'assistant' and "tool_calls" not in other %}
                {%- set later.found = true %}
            {%- endif %}
        {%- endfor %}
        {%- set call = message.tool_calls[0].function %}
        {%- if message.thinking and not later.found %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
        {{- call.arguments|tojson + "<|call|>" }}
        {%- set last_call.name = call.name %}
    {%- elif message.role == 'assistant' -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- elif message.role == 'tool' -%}
        {%- if last_call.name is none %}
            {{- raise_exception("Message has tool role, but there was no previous assistant message with a tool call!") }}
        {%- endif %}
        {{- "<|start|>functions." + last_call.name }}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""


def harmony_system(effort: str, tools: bool) -> str:
    """The system message of the day."""
    to_functions = "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else ""
    return (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        f"Current date: 2026-01-02\n\nReasoning: {effort}\n\n"
        f"# Valid channels: analysis, commentary, final. Channel must be included for every message.{to_functions}<|end|>"
    )


def test_harmony() -> None:
    asked = [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]
    turns = (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|end|>"
        "<|start|>user<|message|>Bye<|end|>"
    )
    developer = "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n"
    assert render(HARMONY, asked, options={"reasoning_effort": "high"}) == (
        harmony_system("high", tools=False) + f"{developer}<|end|>{turns}<|start|>assistant"
    )
    called = [system("Be brief."), user("How warm?"), CALL | {"thinking": "Ask."}, RESULT]
    assert render(HARMONY, called, tools=TOOLS) == (
        harmony_system("medium", tools=True) + f"{developer}# Tools\n\n## functions\n\nnamespace functions {{\n\n"
        "// Weather of a city\ntype get_weather = (_: {\n// Its name\ncity: string,\n"
        'unit?: "c" | "f", // default: c\n}) => any;\n\n} // namespace functions<|end|>'
        "<|start|>user<|message|>How warm?<|end|><|start|>assistant<|channel|>analysis<|message|>Ask.<|end|>"
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Zürich"}<|call|>'
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"21 °C"<|end|><|start|>assistant'
    )
    answered = render(HARMONY, [*called, assistant("21 °C.")], tools=TOOLS, add_generation_prompt=False)
    assert answered.endswith("<|channel|>final<|message|>21 °C.<|return|>") and "analysis<|message|>Ask" not in answered
    with pytest.raises(RequestError, match="no previous assistant message"):
        render(HARMONY, [user("x"), RESULT])


# -- the files themselves, against transformers ---------------------------------------------------------------------------------
CONVERSATIONS: list[list[Message]] = [
    [user("Hi <b> é")],
    [system(" Be brief. "), user(" 1 "), assistant(" <think>\nhm\n</think>\n\n2"), user("3")],
    [user("How warm?"), CALL, RESULT],
    [system("x"), user("How warm?"), CALL | {"content": None}, RESULT, assistant("21"), user("Sure?")],
]


def test_templates_of_real_models_as_transformers_renders_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every template of a llama.cpp checkout, where there is one; both refuse the same conversations."""
    folder = os.environ.get("LLAMA_CPP_MODELS")
    if not folder:
        pytest.skip("LLAMA_CPP_MODELS is not set to the folder `models` of a llama.cpp checkout")
    theirs = pytest.importorskip("transformers.utils.chat_template_utils", reason="pip install transformers")
    monkeypatch.setattr("vkllm.chat.datetime", datetime)
    paths = sorted(Path(folder, "templates").glob("*.jinja"))
    assert len(paths) > 30
    n_rendered = 0
    for path in paths:
        template = path.read_text()
        for messages, tools, prompt in product(CONVERSATIONS, (None, TOOLS), (True, False)):
            tokens = {"bos_token": "<s>", "eos_token": "</s>"}
            try:
                expected = theirs._compile_jinja_template(template).render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **tokens
                )
            except Exception:  # whatever a template's expressions raise
                with pytest.raises(RequestError):
                    render(template, messages, tools=tools, add_generation_prompt=prompt, **tokens)
                continue
            found = render(template, messages, tools=tools, add_generation_prompt=prompt, **tokens)
            assert found == expected, (path.name, messages, bool(tools), prompt)
            n_rendered += 1
    assert n_rendered > len(paths)
