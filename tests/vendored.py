"""Somebody's copies of the stand-ins' files, changed or not; and what the tests of several libraries share."""

import types
from pathlib import Path

import pytest


def copy_of(module, *changes, name=None):
    """A module with the text of ``module``, some of it replaced, under the ``name`` that the file has there."""
    text = Path(module.__file__).read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    name = name or module.__name__.rpartition(".")[2]
    copy = types.ModuleType(f"somebody.networks.{name}")
    copy.__package__ = module.__package__
    exec(compile(text, module.__file__, "exec"), vars(copy))
    return copy


def refusal(module, *arguments):
    """What ``module`` says where it refuses its arguments."""
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError)) as caught:
        module(*arguments)
    assert str(caught.value)
    return str(caught.value)
