"""The findings of ``stdist check``, for programs and for people."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.markup import escape
from rich.table import Table

Severity = Literal["error", "warning", "info"]
LISTED = 10
"""Names and places that one finding lists; the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """``error``: the store is damaged or says something wrong; ``warning``: worth a look; ``info``: declared."""

    severity: Severity
    what: str
    where: str


@dataclass
class CheckReport:
    """The findings of ``check_store``. ``gaps``: every stretch without time steps; ``channels``: coverage and range."""

    store: Path
    findings: list[Finding] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, severity: Severity, what: str, where: str) -> None:
        self.findings.append(Finding(severity, what, where))

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def ok(self) -> bool:
        return not self.count("error")

    @property
    def verdict(self) -> str:
        counts = f"errors: {self.count('error')}, warnings: {self.count('warning')}"
        return f"{self.store}: {'sound' if self.ok else 'DAMAGED OR WRONG'}; {counts}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok} | asdict(self) | {"store": str(self.store)}


def listed(names: list[str]) -> str:
    """The first ``LISTED`` of many, for people."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def as_table(report: CheckReport) -> Group:
    """Errors first. Prints on any console of rich."""
    channels = Table(
        *("channel", "missing", "zero", "lowest", "highest", "period", "daily peak"),
        title=escape(str(report.store)),
        title_justify="left",
    )
    for name, summary in report.channels.items():
        bounds = ["" if summary[key] is None else f"{summary[key]:.6g}" for key in ("lowest", "highest")]
        shares = [f"{summary[key]:.3%}" for key in ("missing_share", "zero_share")]
        hours = summary.get("period_hours")
        rhythm = ["none clear" if hours is None else f"{hours:g} h", f"{summary['peak']} local"]
        channels.add_row(escape(name), *shares, *bounds, *(rhythm if "peak" in summary else ["", ""]))
    findings = Table("", "what", "where")
    for severity, style in STYLES.items():
        for finding in report.findings:
            if finding.severity == severity:
                findings.add_row(severity, escape(finding.what), escape(finding.where), style=style)
    return Group(*([channels] if report.channels else []), *([findings] if report.findings else []))
