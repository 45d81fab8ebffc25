"""How many steps a run takes, and the learning rate that follows from it.

The rate rises, stays at its peak, and falls along half a cosine. Only the fall needs to know where the end is, so a
time budget is turned into a number of steps as late as that: by then nearly half of the time has been measured, and
a computer that was busy for a moment spoils nothing. The plan is made once and kept; time decides nothing else.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from npmamba.autodiff.optim import warmup_cosine
from npmamba.settings import TrainConfig

HELD = 0.45  # share of the steps, or of the time, after which the rate falls
FLOOR = 0.02  # it ends at this fraction of its peak
LEAST = 20  # steps that must have been timed before a plan is made


class Plan(NamedTuple):
    """The number of steps after which the learning rate begins to fall, and of all steps."""

    held: int
    total: int


def warmup_steps(config: TrainConfig) -> int:
    """Return the length of the warm-up; a budget cannot shorten it, as that would need its number of steps."""
    return config.warmup if config.budget else min(config.warmup, (config.steps or 0) // 5)


def given_plan(config: TrainConfig) -> Plan | None:
    """Return the plan where the settings alone decide it: without a time budget, or with very few steps."""
    if config.steps is None or (config.budget and config.steps > LEAST):
        return None
    return Plan(max(warmup_steps(config), int(HELD * config.steps)), config.steps)


def is_due(config: TrainConfig, step: int, seconds: float) -> bool:
    """Tell whether it is time to make a plan, `step` steps and `seconds` seconds after the start."""
    share = max(seconds / (config.budget or math.inf), step / (config.steps or math.inf))
    return step >= LEAST and share >= HELD


def settle(config: TrainConfig, step: int, each: float, left: float, validation: int, last: int) -> Plan:
    """Turn the rest of a time budget into steps.

    Parameters
    ----------
    config : TrainConfig
    step : int
        Steps done.
    each, left : float
        Seconds that a step takes, and that are left.
    validation, last : int
        Tokens predicted for a validation loss on the way, and for the last one.

    Examples
    --------
    >>> settle(TrainConfig(eval_every=0), step=500, each=0.1, left=64.0, validation=0, last=0)
    Plan(held=500, total=1100)
    """
    token = each / (3 * config.batch * config.context)  # a forward pass is about a third of a step
    end = token * last + 4.0  # the sample and the report
    if config.eval_every:
        each += token * validation / config.eval_every
    total = step + max(0, int((left - end) / each))
    return Plan(step, min(total, config.steps or total))


def learning_rate(step: int, config: TrainConfig, plan: Plan | None) -> float:
    """Return the learning rate of the update after `step` updates.

    Parameters
    ----------
    step : int
        Updates made so far.
    config : TrainConfig
    plan : Plan or None
        None until it is made, which is before the rate falls.

    Examples
    --------
    >>> config = TrainConfig(lr=1.0, warmup=9, steps=100)
    >>> [round(learning_rate(s, config, given_plan(config)), 3) for s in (0, 8, 9, 45, 72, 100)]
    [0.1, 0.9, 1.0, 1.0, 0.524, 0.02]
    """
    rise = config.lr * min(1.0, (step + 1) / (warmup_steps(config) + 1))
    if plan is None or step < plan.held:
        return rise
    fall = warmup_cosine(rise, 0, max(1, plan.total - plan.held), final=FLOOR * rise)
    return fall(step - plan.held)
