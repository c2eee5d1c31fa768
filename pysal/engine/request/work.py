"""What a method is going to do, between what it refuses and what it computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.plan import Plan
from pysal.engine.request.sweeps import Sweep


@dataclass(frozen=True)
class Work:
    """A method on a plan's images, once all is refused that can be refused without the model.

    Attributes:
        plan: of the images.
        make: `make(report) -> Attribution`, see `run`.
        wanted: the sweeps over the unchanged images that it needs; finding out may take passes on single images.
    """

    plan: Plan
    make: Callable[[bool], Attribution]
    wanted: Callable[[], Sequence[Sweep]] = tuple

    def run(self, *, report: bool) -> Attribution:
        """Return what the method finds; `report`: with what takes passes beside the map's own."""
        return self.make(report)

    def announced(self, call: Plan) -> list[tuple[Any, Sweep]]:
        """Return the kind of score and the sweeps that are wanted of the unchanged images, for `call.clean`.

        A look at the target may be what fails: then the clean pass refuses it, in the name of the call.
        """
        try:
            return [(self.plan.score.kind, sweep) for sweep in self.wanted()]
        except NotApplicable:
            raise
        except Exception as error:  # of the target, or the model's own
            failed = error
        call.clean()
        raise failed


def sweeping(plan: Plan, sweep: Sweep) -> Work:
    """Return the work of a method whose map is one sweep over the unchanged images."""

    def make(_report: bool) -> Attribution:
        ((result,),) = plan.sweeps(sweep)
        return Attribution(result.to(plan.dtype), passes=1)

    return Work(plan, make, lambda: [sweep])


def announced(works: Mapping[str, Work], call: Plan) -> list[tuple[Any, Sweep]]:
    """Return what several methods want of the unchanged images."""
    return [one for work in works.values() for one in work.announced(call)]
