"""What a call held is free when it returns or raises: nothing waits for Python's cyclic collector, which knows no sizes."""

import ast
import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import pysal
from tests.every_call import FACES, IMAGES, MODEL, WORK
from tests.methods.calls import VARIANTS, Watched


@contextlib.contextmanager
def no_collector() -> Iterator[Callable[[], list[str]]]:
    """Switch the cyclic collector off and return what says which tensors and objects of ours have been left since."""

    def left() -> list[str]:
        own = (one for one in gc.get_objects() if isinstance(one, Tensor) or type(one).__module__.startswith("pysal"))
        return sorted(f"{type(one).__name__} {tuple(getattr(one, 'shape', ()))}" for one in own)

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield left
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def thaw() -> Iterator[None]:
    """Let the collector see again what is frozen here, once and not test by test, so that it never looks at all of torch."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what tests/conftest.py froze


def left_by(call: Callable[[Tensor], Any]) -> list[str]:
    """Return what a call with images of its own leaves when its images and its result are dropped."""
    call(IMAGES.clone())  # what is made once for all calls is no part of this
    with no_collector() as left:
        call(IMAGES.clone())
        return left()


@pytest.mark.parametrize("name", [*WORK, *FACES])
def test_a_call_leaves_nothing(name: str) -> None:
    work = WORK.get(name) or FACES[name]
    assert left_by(lambda images: work(MODEL, images)) == []


@pytest.mark.parametrize("name", [*VARIANTS, "class_gradients", "explain"])
def test_a_call_of_a_prepared_model_leaves_nothing(name: str) -> None:
    prepared = pysal.prepare(MODEL, IMAGES)
    assert left_by(lambda images: WORK[name](prepared, images)) == []


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("name", [*WORK, *FACES])
def test_a_call_that_raises_leaves_nothing_but_its_traceback(name: str, passes: int) -> None:
    work = WORK.get(name) or FACES[name]

    class Stop(BaseException): ...  # as Ctrl-C is none: nothing asks the model why

    def run(images: Tensor) -> None:
        count = 0

        def before(_: Tensor) -> None:
            nonlocal count
            count += 1
            if count > passes:
                raise Stop

        with contextlib.suppress(Stop):
            work(Watched(MODEL, before), images)

    assert left_by(run) == []


def test_the_traceback_is_what_holds_the_images_of_a_call_that_raised() -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with no_collector() as left:
        with pytest.raises(RuntimeError, match="broken") as caught:
            pysal.gradient(broken, IMAGES.clone())
        assert any(name.startswith("Plan") for name in left())
        del caught
        assert left() == []


def test_no_function_inside_another_calls_itself() -> None:
    """It would hold itself, and all that it closes over."""
    for path in Path(pysal.__file__).parent.rglob("*.py"):
        for outer in ast.walk(ast.parse(path.read_text())):
            if not isinstance(outer, ast.FunctionDef):
                continue
            for inner in ast.walk(outer):
                if isinstance(inner, ast.FunctionDef) and inner is not outer:
                    used = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name)}
                    assert inner.name not in used, f"{path.name}: {inner.name} in {outer.name}"
