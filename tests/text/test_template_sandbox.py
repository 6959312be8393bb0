"""Templates that ask for too much end in one clear error, without the time and the memory they wanted."""

# ruff: noqa: E501 - one template a line

import contextlib
import resource
import sys
import threading
import time

import pytest
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS

from quire.errors import InvalidRequestError
from quire.text.chat import limits
from quire.text.chat.template import ChatTemplates

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}

TOO_LARGE = r"""
{{ 'a' * 10**9 }}
{{ 10**9 * 'a' }}
{{ [1] * 10**9 }}
{{ 'a'.center(10**9) }}
{{ 'a'.ljust(10**9) }}
{{ '7'.zfill(10**9) }}
{{ '%1000000000d' % 1 }}
{{ '%*d' % (1000000000, 1) }}
{{ '%.1000000000f' % 1.0 }}
{{ '{:1000000000}'.format('a') }}
{{ '{:{w}}'.format('a', w=10**9) }}
{{ '{0!r:{1}}'.format(messages, '1000000000') }}
{{ '%1000000000d' | format(1) }}
{{ '%(a)1000000000d' % {'a': 1} }}
{{ '%(a(b))1000000000d' % {'a(b)': 1} }}
{{ '% -#.1000000000f' % 1.5 }}
{{ 10**100000 }}
{{ 2**8000 * 2**8000 }}
{{ 2**4000 * 2**4000 * 2**4000 }}
{{ 'a\nb' | indent(10**9) }}
{{ ('a\n' * 1000000) | indent(100) }}
{{ {'a': 1} | tojson(indent=10**9) }}
{{ {'a': 1} | tojson(separators=('a' * 1000000, 'b')) }}
{{ ('\n' * 8000000) | indent(0) }}
{{ [1] | batch(10**9, 'x') | list }}
{{ [1] | slice(10**9) | list }}
{{ 1 | round(-10**9, 'floor') }}
{{ strftime_now('%Y' * 1000) }}
{{ 'a' | center(10**9) }}
{{ 'a' | map('center', 10**9) | list }}
{{ range(100000) | map('string') | map('center', 8000000) | list }}
{{ '\t\t'.expandtabs(10**9) }}
{{ '{x:1000000000}'.format_map({'x': 1}) }}
{{ ('<' | e).ljust(10**9) }}
{{ ('<' | safe) * 10**9 }}
{{ ('%1000000000d' | safe) % 1 }}
{{ ('{:1000000000}' | safe).format('a') }}
{% autoescape true %}{% set x %}a{% endset %}{{ x.ljust(10**9) }}{% endautoescape %}
{% filter center(10**9) %}a{% endfilter %}
{{ ('a' * 60000) | wordwrap(1, true, 'b' * 1000) }}
{{ ('http://a.b ' * 5000) | urlize(rel='x' * 10000) }}
{{ ('http://a.b ' * 5000) | urlize(target='x' * 10000) }}
{{ ('http://a.b ' * 8000) | urlize }}
{{ ('a-' * 400000) | wordwrap(10) }}
{{ ('<a>' * 400000) | striptags }}
{{ ('(' * 400000 ~ ')' * 400000) | urlize }}
{{ (range(2000) | list) | pprint }}
{{ {'a': 'b' * 400000} | xmlattr }}
{{ {'a': 'b' * 400000} | urlencode }}
{{ ('a ' * 400000) | wordcount }}
{{ ('\r' * 8000000) | indent }}
{{ range(100000) | unique | list }}
{{ range(60000) | map('string') | groupby('x', default='A' * 8000000) }}
{{ ([[]] * 5000) | sum(start=[]) }}
{{ dict(range(5000) | batch(2)) | length }}{{ dict(range(90000) | batch(2)) }}
{{ dict.fromkeys(range(5000)) }}
{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{% set ns = namespace(x=1) %}{% for i in range(99) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}
{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}{% set ns = namespace(x=1) %}{% for i in range(99) %}{{ f(a=ns.x, b=ns.x) }}{% endfor %}{{ ns.x }}
{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = cycler(ns.x, ns.x).items %}{% endfor %}{{ ns.x }}
{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = dict(a=ns.x.items(), b=ns.x.items()) %}{% endfor %}{{ ns.x }}
{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | batch(2) | list %}{% endfor %}{{ ns.x }}
{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | groupby(0) %}{% endfor %}{{ ns.x }}
{% set s = ({'a' * 100000: 1}.keys() - [1]) %}{{ [s] * 1000 }}
{{ raise_exception(*('a' * 8000000)) }}
{{ '{0}{0}{0}{0}{0}{0}{0}{0}{0}{0}'.format('x' * 1000000) }}
{% set a = 'a' * 8000000 %}{{ a ~ a ~ a ~ a ~ a ~ a ~ a ~ a ~ a ~ a }}
{% call(x) messages.count('a' * 10**9) %}{% endcall %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}
{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}
{% set ns = namespace(x=[1, 2]) %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}
{% set ns = namespace(x=[1, 2]) %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}
{% set ns = namespace(x=(1, 2)) %}{% for i in range(100) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}
{% set ns = namespace(x=1, y=1) %}{% for i in range(99) %}{% set ns.x, ns.y = [ns.x, ns.x], [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}
{% set ns = namespace(x={}) %}{% for i in range(100) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}
{% set ns = namespace(x={}) %}{% for i in range(100) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}
{% set a = 'a' * 4000000 %}{{ a.replace('', a) }}
{% set a = 'a' * 4000000 %}{{ a | replace('a', a) }}
{% set a = 'a' * 1000000 %}{{ a.replace('a', 'b' * 300) }}
{% set a = 'a' * 4000000 %}{{ a.join(['x'] * 100) }}
{% set a = 'a' * 100000 %}{{ (['x'] * 100000) | join(a) }}
{% set a = 'ab ' * 2500000 %}{{ a.split() | length }}
{% set a = 'ab ' * 2500000 %}{{ a.rsplit() | length }}
{% set a = 'a\n' * 4000000 %}{{ a.splitlines() | length }}
{% set a = 'a ' * 4000000 %}{{ a | title }}
{% set a = 'a' * 8000000 %}{{ a | list | length }}
{% set a = 'a' * 8000000 %}{{ a | batch(1) | list | length }}
{% set a = 'a' * 8000000 %}{{ a | select | list | length }}
{% set a = 'a' * 8000000 %}{{ a | map('upper') | list | length }}
{% set a = 'a' * 8000000 %}{{ a | sort }}
{% set a = '分' * 2000000 %}{{ [a, a, a] | tojson }}
{{ [{}] | map(attribute='ab.' * 2700000) | list }}
{{ [{}] | sort(attribute='ab,' * 2700000) }}
{{ (' ' * 60000) | wordwrap(1) }}
{% set a = range(90000) | list %}{{ dict(b=1).keys() - a }}
{% set a = 'a' * 1000000 %}{{ a.rfind('a' * 500000 ~ 'b' ~ 'a' * 10) }}
{% set a = 'a' * 1000000 %}{{ a.rsplit('a' * 500000 ~ 'b' ~ 'a' * 10) }}
{% set a = 'a' * 4000000 %}{{ a.strip('b' * 4000000 ~ 'a') }}
{% set a = 'a' * 4000000 %}{{ a | trim('b' * 4000000 ~ 'a') }}
{% set fmt = '%(a)s' * 1000000 %}{{ fmt % {'a': 'x' * 1000000} }}
{% set fmt = '{0}' * 1000000 %}{{ fmt.format('x' * 1000000) }}
{% set a = 'a' * 8000000 %}{% for i in range(100000) %}{{ a }}{% endfor %}
{% set a = 'a' * 8000000 %}{% for i in range(100000) %}{% set b = a[1:] %}{% endfor %}
{% for i in range(100000) %}{% set x = range(100000) | list %}{% endfor %}
{% macro f() %}{% for i in range(100000) %}{{ 'y' * 100 }}{% endfor %}{% endmacro %}{{ f() }}
{% filter upper %}{% for i in range(100000) %}{% for j in range(1000) %}yyyyyyyyyyyyyyyy{% endfor %}{% endfor %}{% endfilter %}
""".strip().split("\n")

TOO_LONG = (
    r"""
{% set ns = namespace(t=()) %}{% for i in range(100000) %}{% set ns.t = (ns.t, i) %}{% endfor %}{{ ns.t }}
{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}
{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}
{% set a = range(90000) | list %}{% set b = range(90000) | list %}{% for i in range(9999) %}{% if a == b %}{% endif %}{% endfor %}
{% set a = 'a' * 8000000 %}{% for x in [a] recursive %}{{ loop(a) if loop.depth0 < 2 }}{% endfor %}
{% for i in range(1000) %}{{ range(100000) | map('abs') | map('abs') | map('abs') | max }}{% endfor %}
{% set a = range(90000) | map('string') | list %}{% set b = range(90000) | map('string') | list %}{% for i in range(15) %}{{ MANY }}{% endfor %}
""".replace("MANY", "a == b == a" + " == b == a" * 300)
    .strip()
    .split("\n")
)

REFUSED = {
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "nests too deeply",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}": "nests too deeply",
    "{{ [].__class__.__base__.__subclasses__() }}": "unsafe",
    "{{ (messages | attr('__class__'))() }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ self.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__.os }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format(1) }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].update(a=1) }}": "unsafe",
    "{{ (1).to_bytes(10**9) }}": "unsafe",
    "{{ 'a'.translate({97: 'b'}) }}": "unsafe",
    "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}": "unsafe",
    "{{ {}.fromkeys([1]) }}": "unsafe",
    "{{ 'a'.encode() }}": "unsafe",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}": "underscore",
    "{{ namespace(_x=1) }}": "underscore",
    "{% include 'x' %}": "no loader",
    "{% import 'x' as y %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{% include 'x' ignore missing %}": "no loader",
    "{{ 'a' | nothing }}": "No filter named 'nothing'",
    "{{ lipsum(10**9) }}": "'lipsum' is undefined",
    "{{ raise_exception('this conversation is refused') }}": "this conversation is refused",
    "{{ 1 / 0 }}": "division by zero",
    "{{ [1] | batch('a' * 60000) | list }}": "cannot be interpreted as an integer",
    "{{ [1] | slice('a' * 60000) | list }}": "cannot be interpreted as an integer",
    "{{ '\\t'.expandtabs('a' * 8000000) }}": "cannot be interpreted as an integer",
    "{{ raise_exception(cycler('a')) }}": "Cycler object>",
    "{% if %}": "not valid, line 1",
    "{{ messages[0].nothing.more }}": "has no attribute 'nothing'",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}": "nests too deeply",
    ("{{ a" + "|e" * 100 + " }}") * 40: "nests expressions too deeply",
    "{{a}}" * 20_000: "more than 16384 tokens",
    "{{ 1" + "+1" * 20_000 + " }}": "more than 16384 tokens",
    "x" * 300_000: "more than 262144 characters",
    "{{ " + "9" * 100_000 + " }}": "Exceeds the limit",
    "x" * 100_000 + "{% for i in range(100) %}" + "y" * 100_000 + "{% endfor %}": "writes more than 8 MB",
}


def peak_mb():
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.mark.parametrize("template", TOO_LARGE)
def test_no_value_grows_beyond_its_bound(template, monkeypatch):
    # The bound of size is what ends it, however slow the machine is.
    monkeypatch.setattr(limits, "MAX_CPU_SECONDS", 20.0)
    before = peak_mb()
    with pytest.raises(InvalidRequestError, match=r"more than|too large|too long|too many|apart") as caught:
        ChatTemplates().render(template, MESSAGES)
    assert "longer than" not in str(caught.value)
    assert peak_mb() - before < 96


@pytest.mark.parametrize("template", TOO_LONG)
def test_no_loop_runs_beyond_its_time(template, monkeypatch):
    monkeypatch.setattr(limits, "MAX_CPU_SECONDS", 0.2)
    before, begin_s = peak_mb(), time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.2 s"):
        ChatTemplates().render(template, MESSAGES)
    assert time.thread_time() - begin_s < 1.5
    assert peak_mb() - before < 96


def test_every_filter_and_test_of_jinja_is_there():
    environment = ChatTemplates()._environment
    assert set(DEFAULT_FILTERS) <= set(environment.filters)
    assert set(DEFAULT_TESTS) <= set(environment.tests)


@pytest.mark.parametrize("name", [*DEFAULT_FILTERS, *(f"method {name}" for name in sorted(limits.METHODS[str]))])
def test_no_filter_or_method_grows_by_large_arguments(name, monkeypatch):
    """Those of jinja and of Python as they are, also ones that this test does not know by name."""
    monkeypatch.setattr(limits, "MAX_CPU_SECONDS", 0.05)
    variables = {**MESSAGES, "lines": "a\n" * 30_000, "list": [["b"]] * 9000, "long": "c" * 1_000_000}
    templates = ChatTemplates()
    before = peak_mb()
    for value in ("lines", "list", "long"):
        for arguments in ("", "(10**9)", "(long)", "('a', long)", "(10**9, long)", "(long, long)"):
            call = f"{value}|{name}{arguments}"
            if name.startswith("method"):
                call = f"{value}.{name.split()[1]}{arguments or '()'}"
            with contextlib.suppress(InvalidRequestError):
                assert len(templates.render(f"{{{{ {call} }}}}", variables)) <= limits.MAX_VALUE_BYTES
    assert peak_mb() - before < 96


@pytest.mark.parametrize("template", REFUSED, ids=lambda template: template[:60])
def test_refusals_are_clear(template):
    with pytest.raises(InvalidRequestError, match=REFUSED[template]) as caught:
        ChatTemplates().render(template, MESSAGES)
    assert "0x" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_long_chain_of_branches_is_rendered_or_refused():
    """Which of them is up to Python's compiler: that of 3.13 takes more than those before it."""
    template = "{% if a %}" + "{% elif a %}" * 3000 + "{% endif %}x"
    try:
        found = ChatTemplates().render(template, MESSAGES)
    except InvalidRequestError as error:
        found = str(error)
    assert found in ("x", "the chat template failed: it nests too deeply")


def test_long_numbers_in_text_are_no_widths():
    template = "{{ 'Since 2024 %s, 100000%% of %5.2f' % ('x', 1.5) }}{{ '2024 {:>5}'.format('é') }}"
    assert ChatTemplates().render(template, MESSAGES) == "Since 2024 x, 100000% of  1.502024     é"


def test_every_operation_is_metered():
    """No node that computes reaches the compiler without a hook: the sandbox's own, or an internal filter."""
    source = "{% for x in a %}{{ [x] }}{{ (x, x) }}{{ {x: x} }}{{ x == x }}{{ x ~ x }}{{ x[1:] }}{% endfor %}"
    tree = ChatTemplates()._environment.parse(source)
    wrapped = {type(node.node) for node in tree.find_all(nodes.Filter) if node.name.startswith(" ")}
    assert {nodes.List, nodes.Tuple, nodes.Dict, nodes.Concat, nodes.Getitem, nodes.Name} <= wrapped
    assert all(isinstance(node, nodes.Filter) for tilde in tree.find_all(nodes.Concat) for node in tilde.nodes)


def test_a_spent_budget_is_not_the_next_ones():
    templates = ChatTemplates()
    for _ in range(3):
        with pytest.raises(InvalidRequestError):
            templates.render("{% set a = 'a' * 8000000 %}" + "{% set b = a[1:] %}" * 10, MESSAGES)
        assert templates.render("{{ messages[0].content }}", MESSAGES) == "hi"


def test_budgets_are_of_one_thread():
    templates = ChatTemplates()
    template = "{% for i in range(20) %}{% set b = ('a' * 1000000)[1:] %}{% endfor %}{{ messages[0].content }}"
    results = []
    threads = [threading.Thread(target=lambda: results.append(templates.render(template, MESSAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["hi"] * 4


def test_compiled_templates_are_kept_within_a_bound():
    templates = ChatTemplates()
    for number in range(20):
        templates.render(f"{number}", {})
        templates.render(f"{number}", {})
    info = templates._compiled.cache_info()
    assert (info.currsize, info.misses, info.hits) == (8, 20, 20)
