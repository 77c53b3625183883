"""Templates are strangers' programs: they reach nothing, and they end."""

from __future__ import annotations

import json

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.sandbox import Template


def render(source: str, **values: object) -> str:
    return Template(source, "a test").render(values, 100)


BOMBS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a macro that calls itself for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a long loop that writes": "{% for i in range(90000) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}",
    "a text times a number": "{{ 'x' * 10 ** 9 }}",
    "a list times a number": "{{ ([0] * 10 ** 9) | length }}",
    "a number with a billion digits": "{{ 10 ** (10 ** 9) }}",
    "shifts by factors": "{% set ns = namespace(n=2) %}{% for i in range(9999) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "doubling by ~": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(s=[0]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by blocks": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set x %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = x %}{% endfor %}",
    "squaring by replace": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
    "squaring by the filter": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s | replace('x', ns.s) %}{% endfor %}",
    "squaring by join": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.join(ns.s | list) %}{% endfor %}",
    "squaring by the filter join": "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = (ns.s | list) | join(ns.s) %}{% endfor %}",
    "JSON of lists of lists": "{% set ns = namespace(s=['x' * 1000]) %}{% for i in range(40) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
    "texts of lists of lists": "{% set ns = namespace(s=['x' * 1000]) %}{% for i in range(40) %}"
    "{% set ns.s = {'a': ns.s, 'b': (ns.s, 1)} %}{% endfor %}{{ ns.s }}",
    "a list of one long list": "{% set ns = namespace(s=[]) %}{% for i in range(9) %}{% set ns.s = [ns.s] * 100 %}"
    "{% endfor %}{{ ns.s }}",
    "doubling by dict": "{% set ns = namespace(s={}) %}{% for i in range(40) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}"
    "{% endfor %}{{ ns.s }}",
    "squaring by %": "{% set ns = namespace(s='%s%s') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('%', '%') "
    "% (ns.s, ns.s) %}{% endfor %}",
    "a format with a width by a method": "{{ '{:>1000000000}'.format(1) }}",
    "JSON with wide margins": "{{ [1] | tojson(indent=10 ** 8) }}",
    "a format with a width": "{{ '%1000000000d' % 1 }}",
    "a width behind a name": "{{ '%(a)300000000s' % {'a': ''} }}",
    "JSON with wide margins of text": "{{ ([1] * 2000) | tojson(indent='x' * 200000) }}",
    "work that margins below nothing pay for": "{% set x = ([1] * 100000) | tojson(indent=-1000000) %}"
    "{% set s = 'ab' * 2000000 %}{% for i in range(300) %}{% set t = s | upper %}{% endfor %}",
    "JSON of lists in lists, in lines": "{% set ns = namespace(s=[1]) %}{% for i in range(12) %}"
    "{% set ns.s = [ns.s, ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson(indent=64) }}",
    "rounding to a million digits": "{{ 1 | round(20000000, 'ceil') }}",
    "a number of a million letters": "{{ ('f' * 2000000) | int(base=16) }}",
    "doubling by varargs": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ m(40, 'xxxxxxxx') }}",
    "the filters read a long text for ever": "{% set s = 'ab' * 2000000 %}{% for i in range(300) %}"
    "{% set t = s | upper %}{% endfor %}",
    "a width from outside": "{{ '%*d' % (10 ** 9, 1) }}",
    "a range without end": "{{ range(10 ** 12) | list | length }}",
    "reading a long text for ever": "{% set s = 'x' * 4000000 %}{% for i in range(99999) %}{{ s.count('y') }}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_grows_without_bound_is_stopped(name: str) -> None:
    with pytest.raises(UserError, match=r"the chat template (was stopped|refuses)"):
        render(BOMBS[name])


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__", "''['__class__']", "'' | attr('__class__')", "messages.__len__", "(1).__class__.__mro__",
        "self.__init__", "cycler.__init__.__globals__", "namespace.__init__", "range.__self__",
        "'{0.__class__}'.format(1)", "'x'.ljust(9)", "'x'.center(9)", "'x'.zfill(9)", "'x'.encode()",
        "messages.append(1)", "messages.clear()", "values.update({})", "(5).to_bytes(9, 'big')", "caller()",
        "namespace(_x=1)", "namespace(**{'__class__': 1})", "lipsum()", "raise_exception.__globals__",
        "strftime_now.__func__",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(expression: str) -> None:
    try:
        assert render("{{ " + expression + " }}", messages=[1, 2], values={"a": 1}) == ""
    except UserError:
        return
    # A name that was only looked at is undefined; nothing can be done with it.
    with pytest.raises(UserError):
        render("{{ (" + expression + ").x }}", messages=[1, 2], values={"a": 1})


def test_a_namespace_is_no_text_that_doubles() -> None:
    doubled = "{% for i in range(40) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}"
    assert render("{% set n = namespace(x='a') %}" + doubled + "{{ n.x }}{{ n.x | string }}") == "<Namespace>" * 2


@pytest.mark.parametrize("source", ["{% include 'a' %}", "{% import 'a' as b %}", "{% extends 'a' %}"])
def test_a_template_reads_no_file(source: str) -> None:
    with pytest.raises(UserError):
        render(source)


@pytest.mark.parametrize("name", ["center", "format", "wordwrap", "pprint", "random", "batch", "slice", "xmlattr"])
def test_a_filter_that_pads_or_draws_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="the chat template is no Jinja"):
        render("{{ 'x' | " + name + " }}")


def test_a_fault_of_a_template_names_its_line() -> None:
    with pytest.raises(UserError) as caught:
        Template("a\nb\n{% if %}", "my.jinja")
    assert caught.value.where == "my.jinja, line 3"


def test_json_is_written_as_transformers_writes_it() -> None:
    value = {"b": ["<&>'\u6625", None, True, 1.5], "a": {}}
    assert render("{{ x | tojson }}", x=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ x | tojson(indent=2) }}", x=value) == json.dumps(value, ensure_ascii=False, indent=2)
    spelled = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ": "))
    assert render("{{ x | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ': ')) }}", x=value) == spelled


HARMLESS = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m ~ loop.index }}{% break %}{% endfor %}",
    "{%- macro say(x, y='!') -%}  {{ x }}{{ y }}  {%- endmacro -%}{{ say('a') }}\n  {% if true %}\n  b\n  "
    "{% endif %}\nc",
    "{% set ns = namespace(a=1) %}{% for m in messages[::-1] %}{% set ns.a = ns.a + loop.index0 %}{% endfor %}"
    "{{ ns.a }}",
    "{{ messages | map('upper') | join(', ') }}{{ messages | selectattr('x', 'undefined') | list | length }}",
    "{{ messages | join('-') | replace('a', 'b') | title | trim }}{{ d.items() | list }}{{ d | items | list }}",
    "{{ 'a,b'.split(',')[-1].strip() ~ 1 ~ none }}{{ '%s and %d' % ('x', 3) }}{{ 7 // 2 ** 2 % 5 * 3 }}",
    "{{ 'x\ny' | indent(2) }}{{ 'x\ny' | indent(2, true) }}{{ 'x\n\ny' | indent('> ', blank=true) }}",
    "{% set x %}a{{ d.k }}b{% endset %}{{ x | length }}{{ d.get('no', 'z') }}{{ d['k'] is string }}{{ d | tojson }}",
    "{% call(u) say2() %}{{ u }}{% endcall %}{% macro say2() %}[{{ caller(1) }}]{% endmacro %}",
    "{% generation %}{{ messages[0] }}{% endgeneration %}{% filter upper %}x{{ d.k }}{% endfilter %}",
    "{{ ('<b>' | safe) ~ '<i>' }}{{ ('<b>' | safe) + '<i>' }}{{ '<b>' | escape }}{{ x is defined }}{{ x }}",
    "{% for k, v in d | dictsort %}{{ k }}={{ v }}{% else %}none{% endfor %}{{ dict(a=1).a }}{{ [1, 2] + [3] }}",
]


@pytest.mark.parametrize("source", HARMLESS)
def test_what_templates_do_is_what_transformers_makes_of_it(source: str) -> None:
    utilities = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="its renderer is the oracle"
    )
    values = {"d": {"k": "v", "a": 1}}
    if "say2" in source:
        source = source[source.index("{% macro") :] + source[: source.index("{% macro")]
    (theirs,), _ = utilities.render_jinja_template([[{"role": "a", "content": "b"}]], chat_template=source, **values)
    assert render(source, messages=[{"role": "a", "content": "b"}], **values) == theirs
