"""What came of the mutants, as two sections of docs/parity.md."""

from collections.abc import Mapping

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.rooms import ALL, ROOMS
from tests.mutants.rooms.public import NO_PLACE
from tests.mutants.warm import Verdict

PAGE = ROOT / "docs" / "parity.md"
Verdicts = Mapping[Mutant, Verdict]

_INTRODUCTION = """
A proof is worth what it notices. Each line below is a part of the package in which plausible mistakes were planted,
one at a time, as tests/mutants/rooms lists them: off by one, a wrong dim, group, sign or scale, a lost gradient, stale
state. A mutant is seen when one of the few tests that are named for it fails. `python -m tests.mutants.run` writes this
section, in about {minutes:.0f} minutes of one core; one mutant of each line runs with every test run.
"""
_PUBLIC = """
Silent bugs that others reported of their trainers, most of them of several axes at once, each planted here where it has
a place: the mutants of tests/mutants/rooms/public.py, and the test that fails.
"""


def write(verdicts: Verdicts) -> None:
    """Puts both sections in the place of those that the page has, or at its end."""
    text = PAGE.read_text(encoding="utf-8")
    for title, body in (("Mutants", mutants(verdicts)), ("Others' silent bugs", public(verdicts))):
        text = _replaced(text, f"## {title}\n", f"## {title}\n{body}")
    PAGE.write_text(text, encoding="utf-8")


def mutants(verdicts: Verdicts) -> str:
    seconds = sum(verdict.seconds for verdict in verdicts.values())
    rows = [_row(room, found, verdicts) for room, found in ROOMS.items()]
    rows.append(_row("**all**", ALL, verdicts))
    survivors = [mutant for mutant, verdict in verdicts.items() if not verdict.seen]
    lines = [
        _INTRODUCTION.format(minutes=seconds / 60),
        "| part | mutants | run | seen | |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    if survivors:
        lines += ["What no test sees, and why:", "", "| where | mistake | why it is not seen |", "|---|---|---|"]
        lines += [f"| `{m.file}` | {_code(m.old)} → {_code(m.new)} | {m.survives or 'a hole'} |" for m in survivors]
        lines.append("")
    return "\n".join(lines)


def public(verdicts: Verdicts) -> str:
    lines = [_PUBLIC, "| bug | planted in | seen by |", "|---|---|---|"]
    for mutant in ROOMS["public"]:
        if mutant in verdicts:
            verdict = verdicts[mutant]
            seen = f"`{verdict.by.removeprefix('tests/')}`" if verdict.seen else "**nothing**"
            lines.append(f"| {mutant.public} | `{mutant.file}` | {seen} |")
    lines += ["", "Without a place here:", ""]
    lines += [f"- {bug}: {reason}." for bug, reason in NO_PLACE.items()]
    return "\n".join([*lines, ""])


def _row(room: str, mutants: list[Mutant], verdicts: Verdicts) -> str:
    run = [verdicts[mutant].seen for mutant in mutants if mutant in verdicts]
    return f"| {room} | {len(mutants)} | {len(run)} | {sum(run)} | {sum(run) / max(len(run), 1):.1%} |"


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", "\\|") if text.strip() else "nothing"


def _replaced(text: str, heading: str, section: str) -> str:
    """``text`` with ``section`` for the one that begins with ``heading``, up to the next of its rank."""
    before, found, after = text.partition(heading)
    if not found:
        return f"{text.rstrip()}\n\n{section}"
    _, following, rest = after.partition("\n## ")
    return f"{before}{section}" + (f"\n## {rest}" if following else "")
