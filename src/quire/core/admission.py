"""Admission rules: what else than a row, blocks and budget a request may have to wait for before it runs.

A feature brings its rule and `quire.compose` hands it to the scheduler: a grammar that is still compiling, no free slot
for an adapter, the budget of an encoder. The scheduler asks the rules about a request when its turn to enter comes,
also when it comes back after preemption. A request that a rule refuses is *held*: it leaves the queue, so that those
behind it may enter, and the rules are asked about it again in every step. Once none refuses it, it takes its old place
in the queue, where the first request is never overtaken for want of a row or blocks.

**Fairness.** What a held request lacks would not come sooner if the others waited, too; so they pass it, unless the
policy has `waits_for_held`. A caller whose requests are all held counts as idle: it is lifted when one of them is
released (see `quire.core.fair_shares`), so that it neither saves up a claim meanwhile nor holds back the lift of
others. A rule over something that running requests use up must see to it that nothing starves: see
`AdmissionRule.ready`.
"""

from collections.abc import Sequence
from typing import Protocol

from quire.core.request import Request


class AdmissionRule(Protocol):
    """One thing that a request may have to wait for."""

    def ready(self, request: Request) -> str | None:
        """Whether `request` may enter now.

        The answer holds for this step alone, and entering may still fail for want of blocks. Requests are asked about
        in the order of the queue, those held first. A rule lets each request go at some time. Where it hands out what
        running requests hold, it must refuse those that come after one that it refused and that still waits
        (`request.status`), at the latest after a bounded time. What it raises fails that request alone.

        Returns:
            None, or the reason in one short word (`grammar`, `adapter_slot`), which is written into the `StepRecord`
            and shown by `explain`.
        """


def refusal(rules: Sequence[AdmissionRule], request: Request) -> str | None:
    """The first reason for which `request` may not enter."""
    for rule in rules:
        reason = rule.ready(request)
        if reason is not None:
            return reason
    return None
