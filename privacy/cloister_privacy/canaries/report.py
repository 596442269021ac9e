"""What a check found: p-values under the claim that the engine is sound, and a level for all of them together. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FALSE_ALARM", "Finding", "Report"]

FALSE_ALARM = 1e-4
"""The probability, by default, that a sound engine is reported as faulty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One property that was put to the test."""

    name: str
    p_value: float
    """At most the probability that a sound engine looks this odd or odder."""
    figure: str
    """What was seen, for people to read."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """What checks of one engine found. An empirical report: without faults it is not a guarantee of anything."""

    findings: tuple[Finding, ...]
    false_alarm: float = FALSE_ALARM
    """The probability that a sound engine has any fault in this report; the findings share it equally (Bonferroni)."""

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that a sound engine would not have given."""
        return tuple(each for each in self.findings if not each.p_value >= self.false_alarm / len(self.findings))

    def __repr__(self) -> str:
        faults = "; ".join(f"{each.name}: {each.figure} (p {each.p_value:.1g})" for each in self.faults)
        found = f"faults: {faults}" if faults else f"no fault found by {len(self.findings)} checks"
        return f"<Report {found}; empirical, not a privacy guarantee>"
