"""How do the ranks of h change while a model is trained?"""

import re
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from matplotlib.figure import Figure

from ffnprobe.analyzers.expansion import Expansion, null_of
from ffnprobe.analyzers.expansion_controls import TRAINED
from ffnprobe.errors import InputError
from ffnprobe.figure import BLACK, BLUE, GREY, ORANGE, caption, legend_below, new_figure, styled


@dataclass(frozen=True)
class Checkpoints(Expansion):
    """The table of `expansion`, of models named ...stepN."""

    name: ClassVar[str] = "checkpoints"
    question: ClassVar[str] = "How do the ranks of h change while a model is trained?"

    def through(self, measure: str, state: str = TRAINED) -> dict[int, float]:
        """The measure at each step: the median layer."""
        found = defaultdict(list)
        for row in self.rows:
            if row.state == state:
                found[step_of(row.model)].append(getattr(row, measure))
        return {step: median(found[step]) for step in sorted(found)}

    def findings(self) -> list[str]:
        soft, hard, loss = (self.through(m) for m in ("soft_rank", "participation_ratio", "loss"))
        null = self.through("soft_rank", null_of(self.arms[0]))
        first, last = min(soft), max(soft)
        sentences = [
            f"From step {first} to step {last} the soft rank of h goes from {soft[first]:.1f} to {soft[last]:.1f} "
            f"(median layer), the hard rank from {hard[first]:.1f} to {hard[last]:.1f}; random features on the "
            f"same inputs have a soft rank of {null[first]:.1f} and {null[last]:.1f}. The loss goes from "
            f"{loss[first]:.3f} to {loss[last]:.3f} nats a token."
        ]
        same = defaultdict(list)
        for step in soft:
            same[soft[step], loss[step]].append(str(step))
        # the hub has served the weights of one step under the names of others (EleutherAI/pythia, issue 205)
        sentences += [f"Steps {', '.join(s)} are the same weights." for s in same.values() if len(s) > 1]
        return sentences

    @styled
    def plot(self) -> Figure:
        figure, (ranks, loss) = new_figure(2, caption(self.settings, "median layer", "sinks set apart"))
        null = null_of(self.arms[0])
        for measure, state, colour, line, label in (
            ("soft_rank", TRAINED, BLACK, "o-", "soft rank"),
            ("participation_ratio", TRAINED, BLUE, "s-", "hard rank"),
            ("soft_rank", null, GREY, "^--", f"soft rank, {null}"),
            ("participation_ratio", null, ORANGE, "v--", f"hard rank, {null}"),
        ):
            series = self.through(measure, state)
            ranks.plot(list(series), list(series.values()), line, color=colour, label=label)
        series = self.through("loss")
        loss.plot(list(series), list(series.values()), "o-", color=BLACK, label="loss")
        for axes, title, unit in ((ranks, "Ranks of h", "rank (directions)"), (loss, "Loss", "loss (nats/token)")):
            axes.set_xscale("symlog")  # training starts at step 0
            axes.set(title=title, xlabel="training step", ylabel=unit)
        legend_below(ranks)
        return figure


def step_of(model: str) -> int:
    """The step that a checkpoint's name ends in.

    >>> step_of("pythia-70m@step1000")
    1000

    Raises:
        InputError: it ends in none.
    """
    found = re.search(r"step-?(\d+)$", model)
    if not found:
        raise InputError(f"{model} names no step: give ID@stepN, or a folder whose name ends in stepN")
    return int(found[1])
