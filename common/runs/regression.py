"""Whether what was measured anew is as good as what was accepted: by tests, not by bare differences. Imports no torch.

An alarm needs evidence: EM or F1 lower by more than a margin, p95 higher by more than a ratio, at a level that all
tests of a run share, so that a run in which nothing has changed raises one as seldom as `false_alarms` says (p95 by
more than a standard error over processes too, and twice). What a GPU allocates at the peak is no random quantity, and
what must match for a comparison must match.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.config import Rules
from common.errors import UserError
from common.metrics.stats import differences, slower, worse
from common.runs import record
from common.runs.results import Record

MIB = 2**20
KINDS = ("eval", "bench")


@dataclass(frozen=True)
class Check:
    system: str
    what: str
    fine: bool
    words: str


Measured = dict[tuple[str, str], dict[int, Record]]  # (system, kind) → seed → record


def measured(runs: Path, again: bool = False) -> Measured:
    """The newest evaluations and timings below a folder; with `again` those measured once more, where there are any."""
    out: Measured = {}
    more = record.read_all(once_more(runs)) if again else []
    for r in [*record.read_all(runs), *more]:
        if r["kind"] in KINDS:
            out.setdefault((r["system"], r["kind"]), {})[r["seed"]] = r
    return out


def once_more(folder: Path) -> Path:
    """The folder of the second measurement of what raised an alarm in `folder`."""
    return folder.with_name(f"{folder.name}-again")


def compare(accepted: Path, new: Path, rules: Rules, kinds: Sequence[str] = KINDS) -> list[Check]:
    """All checks of what was accepted against what is new. Raises `UserError` where something was not measured anew."""
    was, now = measured(accepted, again=True), measured(new)
    if not was:
        raise UserError(f"{accepted}: what was accepted is gone; accept another one")
    checks: list[Check] = []
    alpha = rules.false_alarms / max(1, sum(2 if kind == "eval" else 1 for _, kind in was))
    for (system, kind), by_seed in was.items():
        if kind not in kinds:
            continue
        if missing := sorted(by_seed.keys() - now.get((system, kind), {}).keys()):
            raise UserError(f"{new}: {kind} of {system} is missing for seed {', '.join(map(str, missing))}")
        pairs = [(r, now[system, kind][seed]) for seed, r in by_seed.items()]
        if unlike := {key: both for pair in pairs for key, both in record.mismatch(*pair).items()}:
            words = "; ".join(f"{key} is {b}, accepted was {a}" for key, (a, b) in unlike.items())
            checks.append(Check(system, "comparable", False, words))
        elif kind == "bench" and (words := _other_device(pairs)):
            checks.append(Check(system, "comparable", False, words))
            continue
        elif kind == "eval":
            checks += _answers(system, pairs, rules, alpha)
        else:
            checks += _latency(system, pairs, rules, alpha)
        checks += _memory(system, kind, pairs, rules)
    return checks


def confirmed(checks: Sequence[Check], again: Sequence[Check]) -> list[Check]:
    """`checks`, of which an alarm of p95 stands only if the one `again` is an alarm too."""
    second = {check.system: check for check in again if check.what == "p95"}
    return [
        replace(check, fine=other.fine, words=f"{check.words}; measured again: {other.words}")
        if check.what == "p95" and not check.fine and (other := second.get(check.system))
        else check
        for check in checks
    ]


Pairs = list[tuple[Record, Record]]  # (accepted, new), seed by seed


def _answers(system: str, pairs: Pairs, rules: Rules, alpha: float) -> list[Check]:
    out = []
    margins: dict[Literal["em", "f1"], float] = {"em": rules.em_margin, "f1": rules.f1_margin}
    for what, margin in margins.items():
        if pairs[0][0]["result"][what] is None:  # random weights
            continue
        sums: dict[str, float] = {}
        article: dict[str, str] = {}
        for a, b in pairs:
            old, new = (record.read_questions(r) for r in (a, b))
            article |= {id_: row["article"] for id_, row in old.items()}
            apart = differences(*({id_: float(row[what]) for id_, row in rows.items()} for rows in (new, old)))
            for id_, d in apart.items():
                sums[id_] = sums.get(id_, 0.0) + d / len(pairs)
        if len(set(article.values())) < 2:
            article = {id_: id_ for id_ in article}
        p = worse(sums, article, margin / 100)
        gain = 100 * sum(sums.values()) / len(sums)
        words = f"{what.upper()} {gain:+.2f} over {len(pairs)} seeds; p of more than {margin:g} lower {p:.2g}"
        out.append(Check(system, what, p >= alpha, words))
    return out


def _other_device(pairs: Pairs) -> str:
    """Why times, and what a GPU allocates for them, say nothing; empty where the device is the same."""
    then, now = ({r["may_differ"]["device"]["name"] for r in side} for side in zip(*pairs, strict=True))
    return "" if then == now else f"timed on {', '.join(sorted(now))}, accepted on {', '.join(sorted(then))}"


def _latency(system: str, pairs: Pairs, rules: Rules, alpha: float) -> list[Check]:
    was, now = (_processes([pair[side] for pair in pairs]) for side in (0, 1))
    queries = was[0]["ids"]
    if others := [process["ids"] for process in was + now if process["ids"] != queries]:
        words = f"other queries were timed than then ({len(others[0])}, then {len(queries)}): "
        words += f"bench.queries={len(queries)} asks as many again; or accept what is new"
        return [Check(system, "comparable", False, words)]
    # [processes, queries], seconds
    old, new = ([[query["total"] for query in process["modes"]["natural"]] for process in side] for side in (was, now))
    ratio, low = slower(old, new, 95, alpha)
    words = f"p95 {ratio:.3f} times as long, at least {low:.3f}; {rules.p95_ratio:g} is allowed"
    load_then, load_now = (max(_loads([pair[side] for pair in pairs]), default=None) for side in (0, 1))
    if load_then is not None and load_now is not None:
        words += f"; load of the host up to {load_now:.1f}, then {load_then:.1f}"
    return [Check(system, "p95", low <= rules.p95_ratio, words)]


def _loads(timings: list[Record]) -> list[float]:
    """The number of busy processes on the host before each timing, ours included; older records do not say."""
    return [host["load"] for r in timings if (host := r["result"].get("host"))]


def _processes(timings: list[Record]) -> list[dict[str, Any]]:
    """The samples of every process of all seeds."""
    files = [file for r in timings for file in Path(r["folder"]).glob("process-*.json")]
    found = [json.loads(file.read_text()) for file in files if not file.name.endswith(".nvml.json")]
    if not found:
        raise UserError(f"{timings[0]['folder']}: its samples are gone")
    return found


def _memory(system: str, kind: str, pairs: Pairs, rules: Rules) -> list[Check]:
    """The check of the GPU allocator's peak. Empty on a CPU: a resident set varies by itself (340 MiB of 1,200)."""
    old, new = ([pair[side]["result"]["peak"]["allocated_bytes"] or 0 for pair in pairs] for side in (0, 1))
    if not all(old + new):
        return []
    more = (max(new) - max(old)) / MIB
    words = f"peak of {kind} {max(new) / MIB:,.0f} MiB, {more:+,.0f}; {rules.memory_mib:g} more are allowed"
    return [Check(system, f"memory of {kind}", more <= rules.memory_mib, words)]
