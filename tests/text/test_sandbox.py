"""What a chat template may make: everything ordinary, and nothing huge."""

from __future__ import annotations

import tracemalloc

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.chat import render

TALK = [{"role": "user", "content": "Hi"}]
TWICE = {  # each makes of its text `ns.x` one that is twice as long, or longer
    "plus": "{% set ns.x = ns.x + ns.x %}",
    "tilde": "{% set ns.x = ns.x ~ ns.x %}",
    "long tilde": "{% set ns.x = ns.x ~ '-' ~ ns.x ~ ns.x %}",
    "block": "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    "macro": "{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns.x = f(ns.x) %}",
    "filter block": "{% set y %}{% filter upper %}{{ ns.x * 2 }}{% endfilter %}{% endset %}"
    "{% set ns.x = y %}",
    "times": "{% set ns.x = ns.x * 2 %}",
    "join": "{% set ns.x = [ns.x, ns.x] | join %}",
    "join method": "{% set ns.x = ''.join([ns.x, ns.x]) %}",
    "replace": "{% set ns.x = ns.x | replace('a', 'aa') %}",
    "replace method": "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "format": "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}",
    "percent": "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
    "format method": "{% set ns.x = '{0}{0}'.format(ns.x) %}",
    "format map": "{% set ns.x = '{a}{a}'.format_map({'a': ns.x}) %}",
    "json": "{% set ns.x = ('\"' ~ ns.x) | tojson | tojson %}",
    "quotes": "{% set ns.x = [ns.x ~ '\\\\'] | string %}",
    "list": "{% set ns.x = [ns.x, ns.x] %}",
    "mapping": "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
    "lists": "{% set ns.l = ns.l + ns.l %}",
    "sum": "{% set ns.l = [ns.l, ns.l] | sum(start=[]) %}",
    "numbers": "{% set ns.n = ns.n * ns.n %}",
}  # fmt: skip


@pytest.mark.parametrize("step", TWICE.values(), ids=TWICE)
def test_doubling_ends_before_the_memory_does(step: str) -> None:
    template = (
        "{% set ns = namespace(x='a', l=[1], n=9) %}{% for i in range(60) %}"
        + step
        + "{% endfor %}"
        "{{ ns.x }}{{ ns.l | length }}"
    )
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"refused because it .*(huge|more than|adds up)"):
            render(TALK, template)
        assert tracemalloc.get_traced_memory()[1] < 500e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "step", ["ns.l + [s ~ i]", "[ns.l, s[1:]]", "[ns.l, s.upper()]", "[ns.l, s | lower]"]
)
def test_many_long_texts_are_as_bad_as_one(step: str) -> None:
    start = "{% set ns = namespace(l=[]) %}{% set s = 'a' * 1000000 %}"
    loop = f"{{% for i in range(50000) %}}{{% set ns.l = {step} %}}{{% endfor %}}"
    with pytest.raises(
        UserError, match=r"refused because it makes (a huge text|texts of more than)"
    ):
        render(TALK, start + loop)


def test_long_conversations_are_no_attack() -> None:
    """A megabyte in two hundred messages, gathered the slow way, as some templates do."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": "words " * 900} for i in range(200)]
    gather = (
        "{% set ns = namespace(all='') %}{% for m in messages %}"
        "{% set ns.all = ns.all + m['role'] ~ ': ' + m['content'] | trim + '\n' %}{% endfor %}"
        "{{ ns.all }}"
    )
    assert len(render(talk, gather)) > 1_000_000


def test_filters_and_methods_do_what_they_did() -> None:
    shown = render(
        [{"role": "user", "content": " a-b "}],
        "{% set c = messages[0].content %}{{ c.strip().split('-') | join('+') }} "
        "{{ c.replace(' ', '').replace('-', '', 0) }} {{ '%d%%' | format(5) }} {{ 7 % 4 }} "
        "{{ '{}{x}'.format(1, x=2) }} {{ [1, 2.5] | sum }} {{ 2.56 | round(1) }} {{ [1, 'a'] }} "
        "{{ {'k': ['é']} | tojson(indent=1) }} {{ ', '.join(['x', 'y']) }} {{ c[1:-1][::-1] }} "
        "{{ dict(a=1) }} {{ [3, 1] | sort | list }} {{ 'x' ~ 1 ~ none }} {{ undefined_name }}| "
        "{{ messages | map(attribute='role') | join(',') }} {{ 'ab' | replace('a', 'b') }}",
    )
    assert shown == (
        "a+b a-b 5% 3 12 3.5 2.6 [1, 'a'] {\n \"k\": [\n  \"é\"\n ]\n} x, y b-a {'a': 1} [1, 3] "
        "x1None | user bb"
    )
