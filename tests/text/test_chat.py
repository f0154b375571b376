"""Chat templates: what Hugging Face's templates expect works; what a hostile one tries is refused."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vkllm.chat import Conversation, prompt_ids, render, renderer
from vkllm.cli import app
from vkllm.errors import ConfigError, RequestError
from vkllm.tokenizer import Tokenizer
from vkllm.vocab.bpe import BYTE_OF
from vkllm.vocab.special import CONTROL, NORMAL

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "Hi <b>"}]


def tokenizer(template: str | None = CHATML, add_bos: bool = False) -> Tokenizer:
    """Bytes and three control tokens."""
    tokens = [*BYTE_OF, "<|im_start|>", "<|im_end|>", "<s>"]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * 256 + [CONTROL] * 3),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
    return Tokenizer.from_gguf(metadata | ({"tokenizer.chat_template": template} if template else {}))


def test_chatml() -> None:
    assert render(CHATML, USER) == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, USER, add_generation_prompt=False).endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ tools | tojson }}", '[{"name": "é<"}]'),
        ("{{ tools | tojson(indent=1) }}", '[\n {\n  "name": "é<"\n }\n]'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", ""),
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
        ("{% generation %}y{% endgeneration %}", "y"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a * 3 }}{{ '-' * 4 }}", "6----"),
        ("{{ messages[0]['content'].split(' ')[0] }}", "Hi"),
    ],
)
def test_helpers(template: str, expected: str) -> None:
    assert render(template, USER, bos_token="<s>", eos_token="</s>", tools=[{"name": "é<"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ messages[0].content.nothing.more }}", "chat template"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ 'x' * 1000000000 }}", "refuses"),
        ("{{ [1] * 1000000000 }}", "refuses"),
        ("{{ 9 ** 999999999 }}", "refuses"),
        ("{% for i in range(10000000000) %}{% endfor %}", "chat template"),
        ("{% include '/etc/passwd' %}", "chat template"),
        ("{% import 'os' as os %}", "chat template"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe"),
        ("{{ messages.sort() }}", "unsafe"),
        ("{{ messages.pop() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
        ("{{ lipsum.__globals__['os'] }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ self._TemplateReference__context.eval_ctx }}", "unsafe"),
        ("{{ [1]|tojson(indent=1000000000) }}", "refuses"),
        ("{{ [1]|tojson(default=range) }}", "TypeError"),
    ],
)
def test_a_failing_or_hostile_template_is_a_request_error(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(template, list(USER))


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "x"}], [{"role": 3}]])
def test_bad_messages(messages: list[dict[str, object]]) -> None:
    with pytest.raises(RequestError, match="role"):
        render(CHATML, messages)


def test_without_a_template() -> None:
    with pytest.raises(ConfigError) as e:
        render(None, USER)
    assert e.value.hint
    with pytest.raises(ConfigError):
        Conversation(tokenizer(None))


def test_ids_have_special_tokens_and_one_bos() -> None:
    def encode(t: Tokenizer) -> list[int]:
        return prompt_ids(t, renderer(t)(USER))

    t = tokenizer()
    ids = encode(t)
    assert ids[0] == 256 and ids.count(256) == 2 and ids.count(257) == 1
    assert t.decode(ids, skip_special=False) == render(CHATML, USER)
    assert encode(tokenizer(add_bos=True)) == [258, *ids]
    assert encode(tokenizer("{{ bos_token }}" + CHATML, add_bos=True)) == [258, *ids]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ (messages|first)|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|first }}",
        "{{ messages|groupby('__class__')|length - 1 or '' }}",
    ],
)
def test_what_the_sandbox_hides_is_undefined(template: str) -> None:
    assert render(template, USER) == ""


def test_the_caller_s_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    template = "{% set m = messages[0] %}{% set m = {'role': 'x'} %}{% set messages = [] %}{{ m.role }}"
    assert render(template, messages) == "x" and messages == [{"role": "user", "content": "Hi"}]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_vkllm_chat_outlives_an_endless_template(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        tokenizer = tokenizer("{% if messages[0].content == 'evil' %}" + ENDLESS + "{% else %}" + CHATML + "{% endif %}")
        config, device = SimpleNamespace(name="fake"), SimpleNamespace(info=SimpleNamespace(name="none"))

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None: ...

        def stream(self, ids: list[int], _: object) -> list[object]:
            return [SimpleNamespace(text=self.tokenizer.decode(ids), result=None)]

    monkeypatch.setattr("vkllm.engine.LLMEngine.init_model", lambda *_: Engine())
    result = CliRunner().invoke(app, ["chat", "hostile.gguf"], input="evil\ngood\n")
    assert "gave no prompt within" in result.stderr and result.exit_code == 0
    assert "good" in result.stdout


def test_conversation() -> None:
    t = tokenizer()
    chat = Conversation(t, "Be brief.")

    def text(ids: list[int]) -> str:
        return t.decode(ids, skip_special=False)

    first = text(chat.ask("One?"))
    assert first.startswith("<|im_start|>system\nBe brief.") and first.endswith("One?<|im_end|>\n<|im_start|>assistant\n")
    assert "One?" not in text(chat.ask("Two?"))  # the first was never answered
    chat.answered("2")
    assert "Two?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nThree?" in text(chat.ask("Three?"))
    chat.reset()
    assert "Two?" not in text(chat.ask("Four?")) and len(chat.messages) == 2
