"""A certificate as one page for people: HTML without a script or anything to fetch. Knows words; verifies nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from cloister.wire.certificate import Certificate
from cloister.wire.plans import Event

__all__ = ["html"]

_CSS = """
:root { color-scheme: light dark; }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
body { background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.promise { font-size: 1.1rem; border-left: .3rem solid #4a7; padding: .2rem 0 .2rem 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #8885; }
th { font-weight: 600; width: 34%; } td, code { overflow-wrap: anywhere; } code { font-size: .9em; }
.note { opacity: .8; font-size: .9rem; }
@media print { body { margin: 0; max-width: none; } }
"""

_UNITS = {"row": ("one row", "row", "rows"), "user": ("all rows of one user", "user", "users")}
_LARGEST_TOLD = 20.0
"""Beyond it e^epsilon is a number that tells nobody anything."""


def html(certificate: Certificate, *, digest: str | None = None, signer: str | None = None) -> str:
    """The page of a certificate that was verified: what is promised, what that rests on, what is not covered, the digests.

    `digest` is the certificate's `digest_of`, `signer` the id of the key that signed it; what is None is left out.
    """
    title = f"{certificate.name}, version {certificate.version}"
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Privacy certificate: {escape(title)}</title><style>{_CSS}</style></head><body>\n"
        f"<h1>Privacy certificate: {escape(title)}</h1>\n"
        f'<p class="promise">{_promise(certificate)}</p>\n'
        f"<h2>What was done</h2>\n{_table(_mechanism(certificate))}"
        f"<h2>What the promise rests on</h2>\n{_list(_assumptions(certificate))}"
        f"<h2>What it does not cover</h2>\n{_list(_limits(certificate))}"
        f"<h2>What it is about</h2>\n{_table(_identity(certificate))}"
        f"<h2>Digests (SHA-256)</h2>\n{_table(_digests(certificate, digest))}"
        f"{_events(certificate)}"
        f"<h2>How to check it</h2>\n{_check(signer)}"
        "</body></html>\n"
    )


def _promise(certificate: Certificate) -> str:
    epsilon, delta = _number(certificate.epsilon), _number(certificate.delta)
    claim = f"epsilon = {epsilon} at delta = {delta}"
    if certificate.unit not in _UNITS or certificate.adjacency != "add_remove":
        return (
            f"The weights of this version are differentially private: <strong>{claim}</strong>, for the unit "
            f"{_code(certificate.unit)} under the adjacency {_code(certificate.adjacency)}, which this page has no words for."
        )
    whose = _UNITS[certificate.unit][0]
    factor = f"e<sup>{epsilon}</sup>"
    if certificate.epsilon <= _LARGEST_TOLD:
        factor += f", about {_rounded_up(math.exp(certificate.epsilon))}"
    return (
        f"The weights of this version are differentially private: <strong>{claim}</strong>, for {whose} added or removed. "
        f"Whether {whose} was in the data or not, the probability of whatever anyone sees in the weights changes by a factor "
        f"of at most {factor}, and by {delta} on top of it."
    )


def _mechanism(certificate: Certificate) -> Iterable[tuple[str, str]]:
    event = certificate.event
    yield "Mechanism", _mechanism_in_words(event)
    yield "Noise multiplier (sigma)", _number(event.noise_multiplier)
    yield "Sampling rate (q)", _number(event.sampling_rate)
    if certificate.sampler is not None:
        yield "Sampler", _code(certificate.sampler)
    yield "Steps", _number(event.steps)
    yield "Clip: the largest norm of a unit's gradient", _number(certificate.clip)
    yield "Unit", _code(certificate.unit)
    yield "Adjacency", _code(certificate.adjacency)
    yield "Nominal size (declared, public)", _number(certificate.nominal_size)
    if certificate.capacity is not None:
        yield "Capacity: the most units there can be (declared, public)", _number(certificate.capacity)
    if certificate.rows_per_unit is not None:
        yield "Rows that a step reads of a unit, at most", _number(certificate.rows_per_unit)
    if event.overflow:
        yield "What overflowing steps may add to delta, at most", _number(event.overflow)
    yield "Accountant", _code(certificate.accountant)
    yield "Engine", ", ".join(_code(f"{name} {version}") for name, version in sorted(certificate.engine.items()))
    if certificate.code_version is not None:
        yield "Version of the service's code", _code(certificate.code_version)


def _mechanism_in_words(event: Event) -> str:
    if event.mechanism != "poisson_subsampled_gaussian":
        return _code(event.mechanism)
    return (
        "DP-SGD: each step draws every unit on its own with probability q, clips its gradient, and adds Gaussian noise of "
        f"sigma times the clip to the sum ({_code(event.mechanism)})."
    )


def _assumptions(certificate: Certificate) -> Iterable[str]:
    units = _UNITS.get(certificate.unit, ("", "unit", "units"))[2]
    yield "The operator of the service is trusted: whoever controls it can see the rows and the weights."
    yield "Rows did not change in response to what was published."
    if certificate.capacity is not None:
        yield f"There were at most {_number(certificate.capacity)} {units}, as the data's owner declared."
    yield "The noise is floating point, made of a cryptographic keystream; it is not a discrete mechanism with a proof."
    yield "The sizes above are public numbers, which the owner would tell a stranger."
    yield f"{_code('docs/assumptions.md')} of Cloister has the whole list, with the reasons."


def _limits(certificate: Certificate) -> Iterable[str]:
    start = {
        "drawn": "The weights that the run started from were drawn at random, so they knew nobody.",
        "uploaded": "The weights that the run started from were uploaded. Whatever they were trained on before is not covered.",
    }
    yield start.get(
        certificate.initial or "",
        "What the weights that the run started from were trained on before, if anything, is not covered.",
    )
    yield "Other runs on the same people cost more. The source's budget bounds them all together; this page is about one."
    yield "People who are in another source too are protected there by its own budget."
    yield "What holds for people in general can be learned from the model, and is then known of each of them too."
    yield "How accurate the model is, and for whom: noise and clipping cost small groups more than large ones."


def _identity(certificate: Certificate) -> Iterable[tuple[str, str]]:
    yield "Model", _code(certificate.model)
    yield "Version", _number(certificate.version)
    yield "Tenant", _code(certificate.tenant)
    yield "Job", _code(certificate.job)
    yield "Source", _code(certificate.source)
    yield "Datasets", ", ".join(map(_code, certificate.datasets or (certificate.dataset,)))
    yield "Issued", f"<time>{escape(certificate.issued.isoformat())}</time>"


def _digests(certificate: Certificate, digest: str | None) -> Iterable[tuple[str, str]]:
    told = {
        "This certificate": digest,
        "The weights, as plain safetensors": certificate.weights_digest,
        "The sealed object that holds them": certificate.sealed_digest,
        "The architecture": certificate.architecture_digest,
        "The weights before the first step": certificate.initial_digest,
        "Everything that was installed": certificate.environment_digest,
    }
    return [(what, _code(value)) for what, value in told.items() if value is not None]


def _events(certificate: Certificate) -> str:
    if not certificate.events:
        return ""
    rows = [(row.id, f"block {row.block}, {_code(row.digest)}") for row in certificate.events]
    return f"<h2>The ledger's rows that charged it</h2>\n{_table(rows)}"


def _check(signer: str | None) -> str:
    by = "" if signer is None else f" When this page was made, the signature of the key {_code(signer)} held."
    command = _code("cloister verify certificate.json --keys keys.json --weights weights.safetensors")
    return (
        f"<p>This page proves nothing; the signed file that it was made of does.{by} Get the service's public keys from "
        f"somewhere better than whoever gave you the file, and run {command}, or {_code('docs/verify.py')}, which needs "
        "no Cloister.</p>\n"
        '<p class="note">Epsilon is a bound that was proven under the assumptions above, and no measurement.</p>\n'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name, as text, and a value, as HTML."""
    return "\n".join(
        ["<table>", *(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in rows), "</table>\n"]
    )


def _list(items: Iterable[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{item}</li>" for item in items), "</ul>\n"])


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _number(value: float) -> str:
    """All of its digits: a rounded epsilon could be a smaller one."""
    return f"{value:,}" if isinstance(value, int) else repr(value)


def _rounded_up(value: float) -> str:
    """Three digits, never below the value."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / scale) * scale:,.6g}"
