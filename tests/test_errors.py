"""The tree of exceptions is the one drawn at the top of errors.py, and each says what it carries."""

from __future__ import annotations

import inspect
import re

import pytest

from virtmig import errors
from virtmig.errors import MigrationError, PlanRefused, RequestError
from virtmig.progress import Whereabouts

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, MigrationError)]


def drawn_tree() -> dict[str, str]:
    """Class name -> name of its parent, read from the indentation of the module's docstring."""
    parents: dict[str, str] = {}
    open_names: list[tuple[int, str]] = []
    for indent, name in re.findall(
        r"^( +)([A-Z]\w+)  +\S", inspect.cleandoc(errors.__doc__ or "") + "\n", re.MULTILINE
    ):
        depth = len(indent)
        while open_names and open_names[-1][0] >= depth:
            open_names.pop()
        parents[name] = open_names[-1][1] if open_names else "Exception"
        open_names.append((depth, name))
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn_tree() == {each.__name__: each.__mro__[1].__name__ for each in CLASSES}


@pytest.mark.parametrize("kind", [each for each in CLASSES if each is not PlanRefused], ids=lambda each: each.__name__)
def test_text_and_hint_come_from_the_attributes(kind: type[MigrationError]) -> None:
    error = kind("what happened", hint="what to try")
    assert str(error) == error.message == "what happened"
    assert error.hint == "what to try"
    assert error.guest is kind.default_guest
    assert error.exit_status == 1
    assert kind.__doc__


def test_errors_before_the_start_say_that_the_guest_is_on_the_source() -> None:
    assert RequestError("x").guest is Whereabouts.SOURCE
    assert PlanRefused([]).guest is Whereabouts.SOURCE
    assert errors.GuestDoubled("x").guest is Whereabouts.DOUBLED
    assert errors.PostcopyInterrupted("x").guest is Whereabouts.SPLIT
    assert errors.MigrationFailed("x", guest=Whereabouts.UNKNOWN).guest is Whereabouts.UNKNOWN


def test_a_refused_plan_says_every_reason_and_each_way_out_once() -> None:
    error = PlanRefused([("parallel", "one core", "leave it out"), ("tls", "no key", "leave it out"), ("x", "y", "")])
    assert str(error) == "one core; no key; y"
    assert error.hint == "leave it out"
    assert str(PlanRefused([])) == "the plan was refused"


def test_a_request_error_names_its_option() -> None:
    error = RequestError("wrong", option="bandwidth", hint="smaller")
    assert error.problems == (("bandwidth", "wrong", "smaller"),)
