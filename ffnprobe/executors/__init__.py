"""Where are shards computed? An executor takes shard numbers and hands back an entry for each finished file."""

from ..errors import InputError
from .base import Executor as Executor
from .base import Make as Make
from .base import Start as Start
from .inline import Inline as Inline
from .process import Processes as Processes
from .rank import Rank as Rank
from .ray import Ray as Ray


def executor_of(name: str, workers: int = 2) -> Executor:
    """The executor that the command line names.

    Raises:
        InputError: there is none of that name, or no launcher for `rank`.
    """
    if name == "inline":
        return Inline()
    if name == "process":
        return Processes.sharing(workers)
    if name == "rank":
        return Rank.from_environment()
    if name == "ray":
        return Ray.sharing(workers)
    raise InputError(f"executor {name!r} is unknown: choose from inline, process, rank, ray")
