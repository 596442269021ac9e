"""A row of the audit log as a line that other tools read: JSON (jsonlines.org) or syslog (RFC 5424). Knows formats alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from typing import Any, Literal

from cloister_server.store.audit_log import Entry

__all__ = ["FORMATS", "Format", "json_line", "syslog_line", "told"]

Format = Literal["jsonl", "syslog"]

_FACILITY = 13 * 8  # 'log audit': RFC 5424, table 1
_NOTICE, _WARNING = 5, 4  # table 2
_SD_ID = "cloister@32473"
"""Structured data of ours: 32473 is the enterprise number of examples (RFC 5612), since we have none."""

_MSGID = re.compile(r"[!-~]{1,32}")


def told(entry: Entry) -> dict[str, Any]:
    """What is said of a row: its outcome as one word, and the reason of a denial beside it."""
    outcome, _, reason = entry.outcome.partition(": ")
    return {
        "time": f"{entry.time.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        "tenant": entry.tenant,
        "tenant_name": entry.tenant_name,
        "principal": entry.principal,
        "verb": entry.verb,
        "resource": entry.resource,
        "outcome": outcome,
        "reason": reason or None,
        "grant": entry.grant,
        "request_id": entry.request_id,
        "id": entry.id,
        "link": entry.link,
    }


def json_line(entry: Entry) -> str:
    """One JSON object on one line."""
    return json.dumps(told(entry))


def syslog_line(entry: Entry) -> str:
    """One message of RFC 5424: facility 13, severity notice for what was allowed and warning for what was denied.

    The message says it for people, and the structured data says all of it for machines.
    """
    values = told(entry)
    severity = _NOTICE if values["outcome"] == "allowed" else _WARNING
    message_id = entry.verb if _MSGID.fullmatch(entry.verb) else "-"
    params = "".join(f' {name}="{_escaped(value)}"' for name, value in values.items() if value not in (None, ""))
    message = _printable(f"{entry.principal} {entry.verb} {entry.resource}: {entry.outcome}")
    return f"<{_FACILITY + severity}>1 {values['time']} - cloister - {message_id} [{_SD_ID}{params}] {message}"


FORMATS: Mapping[Format, Callable[[Entry], str]] = {"jsonl": json_line, "syslog": syslog_line}


def _escaped(value: Any) -> str:
    """RFC 5424, section 6.3.3."""
    return re.sub(r'(["\\\]])', r"\\\1", _printable(str(value)))


def _printable(text: str) -> str:
    """A line is one message: whatever would end it, or move a terminal, is told as a blank."""
    return "".join(each if each.isprintable() else " " for each in text)
