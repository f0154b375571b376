"""Templates that attack: the child dies, the server does not."""

from __future__ import annotations

import time

import pytest

from vkllm.errors import RequestError
from vkllm.serve.render import TemplateWorker

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = "{% set ns = namespace(x='x' * 1000) %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
MESSAGES = [{"role": "user", "content": "Hi\n\u2028 <b>"}]


@pytest.mark.parametrize("template", [ENDLESS, GREEDY, ESCAPE])
def test_an_attack_is_stopped_and_the_next_conversation_works(template: str) -> None:
    hostile = (
        "{% if messages[0].content == 'evil' %}" + template + "{% else %}{{ bos_token }}{{ messages[0].content }}{% endif %}"
    )
    worker = TemplateWorker(hostile, "<s>", "</s>", deadline_s=1.0)
    try:
        worker.start()
        assert worker.render(MESSAGES) == "<s>Hi\n\u2028 <b>"
        started = time.perf_counter()
        with pytest.raises(RequestError, match="chat template"):
            worker.render([{"role": "user", "content": "evil"}])
        assert time.perf_counter() - started < 20
        assert worker.render(MESSAGES) == "<s>Hi\n\u2028 <b>"
    finally:
        worker.close()
