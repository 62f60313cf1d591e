"""YAML with lines: every key and value knows its place, and what would surprise is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.faults import Faulty
from config.yaml_source import MAX_BYTES, read_yaml

TREES = st.recursive(
    st.just(None),
    lambda children: (
        st.lists(children, min_size=1, max_size=3) | st.dictionaries(st.integers(), children, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


def named(tree: Any, counter: Iterator[int]) -> Any:
    """The tree with a name of its own for every key and leaf."""
    if isinstance(tree, dict):
        return {f"key{next(counter)}": named(child, counter) for child in tree.values()}
    if isinstance(tree, list):
        return [named(child, counter) for child in tree]
    return f"leaf{next(counter)}"


def places(tree: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, bool]]:
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield (*loc, key), key, True
            yield from places(child, (*loc, key))
    elif isinstance(tree, list):
        for index, child in enumerate(tree):
            yield from places(child, (*loc, index))
    else:
        yield loc, tree, False


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=TREES, flow=st.sampled_from([True, False, None]), indent=st.integers(2, 6), blank=st.integers(0, 3))
def test_every_key_and_value_knows_its_line(
    tree: Any, flow: bool | None, indent: int, blank: int, tmp_path: Path
) -> None:
    """In block and in flow style, after comments, at any depth."""
    counter = iter(range(1000, 2000))
    expected = named(tree, counter)
    text = "# a comment\n" * blank + yaml.safe_dump(expected, default_flow_style=flow, indent=indent, width=30)
    path = tmp_path / "file.yaml"
    path.write_text(text)
    file = read_yaml(path, "f")
    assert file.data == expected
    lines = text.splitlines()
    for loc, name, is_key in places(expected):
        assert name in lines[file.line(loc, key=is_key) - 1]
        assert file.at(loc, key=is_key) == f"f:{file.line(loc, key=is_key)}"
        if is_key:  # of what is missing, the line of what it is missing from
            assert file.line((*loc, "missing", 7)) == file.line(loc, key=True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb: [", "f:2: the YAML is broken"),
        ("a: 1\n\tb: 2", "f:2: the YAML is broken"),
        ("a: b: c", "f:1: the YAML is broken"),
        ("a: 1\n---\nb: 2", "f:2: the YAML is broken"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", "f:5: the key 'c' is already on line 3. Remove one of the two."),
        ("a: &x 1\nb: *x", "f:2: the alias '*x' is not allowed. Write the value out."),
        ("a: &x [*x]", "f:1: the alias '*x' is not allowed"),
        ("a: 1\non: push", 'f:2: the key on is read as bool. Put it in quotes: "on".'),
        ("a: 1\n? [b]\n: c", "f:2: a key must be a plain word"),
        ("1: 2", "f:1: the key 1 is read as int"),
        ("a: !!python/object/apply:os.system [x]", "f:1: the tag python/object/apply:os.system is not allowed"),
        ("a: !!binary aGk=", "f:1: the tag binary is not allowed"),
        ("a: !secret x", "f:1: the tag !secret is not allowed"),
        ("a:\n- .nan", "f:2: '.nan' is not a finite number"),
        ("a: !!int x", "f:1: 'x' cannot be read as int. Put it in quotes."),
        ("[" * 60 + "]" * 60, "f:1: it is nested deeper than 40 levels"),
        ("[" * 100_000, "f:1: it is nested deeper than 40 levels"),
        ("a: \x07", "f: the YAML is broken"),
        ("a: '" + "x" * MAX_BYTES + "'", "f: it is larger than 1 MiB"),
    ],
)
def test_what_would_surprise_is_refused_with_its_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(Faulty) as caught:
        read_yaml(path, "f")
    assert str(caught.value.faults[0]).startswith(fault)


def test_all_faults_of_a_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\na: .inf\n2: x")
    with pytest.raises(Faulty) as caught:
        read_yaml(path, "f")
    assert [fault.where for fault in caught.value.faults] == ["f:2", "f:2", "f:3"]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(Faulty, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_dates_stay_text_and_an_empty_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("\ufeffmodel: 2024-08-06\nbad: 2024-13-99")
    assert read_yaml(path).data == {"model": "2024-08-06", "bad": "2024-13-99"}
    path.write_text("# nothing\n")
    file = read_yaml(path, "f")
    assert file.data is None
    assert file.at(["x"]) == "f:1"
