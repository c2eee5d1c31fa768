"""The arguments that every public function shares: the same names, order, defaults, annotations and lines of the docstring."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import pytest

import pysal
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.methods.registry import METHODS
from pysal.methods.traits import BY_NAME, TRAITS

TAIL = tuple(field.name for field in fields(Running))
# `gradient` is the source of what is shared; beside its tail, of how a target is said.
SOURCE = pysal.gradient
# Methods that are none of all.
UNLISTED = tuple(BY_NAME)
# What a figure, an explanation and a set of maps is explained by, where it is not what the method itself would take.
OF_A_METHOD = ("explain", "grid_pointing_game", "max_sensitivity", "parameter_randomisation", "per_image")
SCORES = {"interactions": "auto", "rise": "auto", "shapley": "auto", **dict.fromkeys(OF_A_METHOD)}


def sharing() -> dict[str, Callable[..., Any]]:
    """Return every public function that runs a model on images by all that a call can say about it."""
    found: dict[str, Callable[..., Any]] = {}
    for module in ("pysal", "pysal.metrics", "pysal.plots"):
        for name in importlib.import_module(module).__all__:
            function = getattr(importlib.import_module(module), name)
            if inspect.isfunction(function) and "extra_inputs" in inspect.signature(function).parameters:
                found[name] = function
    return found


FUNCTIONS = sharing()


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function, with what their annotations stand for."""
    return inspect.signature(function, eval_str=True).parameters


def arguments_of(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring of a function says of each argument, in one line."""
    assert function.__doc__ is not None
    section = re.search(r"\n    Args:\n(.*?)\n\n", function.__doc__, re.DOTALL)
    assert section is not None
    parts = re.split(r"^ {8}(\w+): ", section[1], flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def test_all_that_share_are_found() -> None:
    assert set(TRAITS) <= set(FUNCTIONS)
    assert {"explain", "class_gradients", "deletion", "insertion", "infidelity", "per_image", "converge"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_end_alike(name: str) -> None:
    parameters, source = parameters_of(FUNCTIONS[name]), parameters_of(SOURCE)
    tail = TAIL if name in (*METHODS, *UNLISTED, "class_gradients") else TAIL[:-1]  # figures and explanations have one dtype
    assert tuple(parameters)[-len(tail) :] == tail
    for argument in tail:
        assert parameters[argument].kind is inspect.Parameter.KEYWORD_ONLY
    for argument in tail[1:]:
        assert parameters[argument] == source[argument]
    score = parameters["score"]
    if name in METHODS:
        usual: str | None = METHODS[name].score
    else:
        usual = SCORES.get(name, "logit" if name in (*UNLISTED, "class_gradients", "converge") else "auto")
    assert score.default == usual
    assert score.annotation == (ScoreKind if usual is not None else ScoreKind | None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_begins_with_model_images_and_target(name: str) -> None:
    parameters = parameters_of(FUNCTIONS[name])
    required = [one.name for one in parameters.values() if one.default is one.empty]
    positional = [one.name for one in parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    begins = positional[1:] if name == "per_image" else positional
    assert begins[0] == "model"
    assert begins[1] in ("inputs", "images", "image")
    if name != "class_gradients":  # whose classes stand in its place
        assert positional == [*required, "target"]
        assert parameters["target"] == parameters_of(SOURCE)["target"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_says_what_is_shared_in_the_same_words(name: str) -> None:
    said, source = arguments_of(FUNCTIONS[name]), arguments_of(SOURCE)
    names = list(parameters_of(FUNCTIONS[name]))
    assert list(said) == names, "each argument in the order of the signature"
    for argument in ("target", *TAIL):
        if argument in said:  # more may be said after it
            assert said[argument].startswith(source[argument]), argument
