"""How sure a system's answers are, and what that is worth: scores, maps to probabilities, and the map that is kept.

    python -m scripts.calibrate MODEL [key=value ...] [--way dev|heldout] [--map NAME] [--on RUN ...]

Reads the newest evaluation of the system's adapter, as MODEL and overrides say that it is asked (`--evaluation RUN`
names another). `--way dev` fits maps to dev without each question's article in turn. `--way heldout` fits them to the
newest evaluation with data.split=heldout (`--fit RUN`), whose questions have one gold answer, and corrects for dev's
several. `--other RUN`, the same questions asked by another prompt, adds whether both agree. `--on` applies the map to
evaluations of other questions. The map is written beside the adapter, the tables into the evaluation's folder; a model
is not needed.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from common.arguments import parse
from common.config import Config
from common.errors import UserError, one_line_errors
from common.files import write_text
from common.metrics import calibration, confidence
from common.metrics.calibration import Fitted
from common.metrics.confidence import LEVELS, Figure
from common.metrics.pages import Cells, markdown_table, text_table
from common.metrics.score import exact_match
from common.metrics.stats import wilson
from common.runs import adapters, calibrations, checkpoint, record
from common.runs.calibrations import Calibration
from common.runs.results import Record, Section

FEW = 200  # questions, below which a warning says how little they tell
SCORES = ("logprob", "mean", "least", "mass", "share", "margin", "entropy", "agree")
HEAD = ("ECE", "of a perfect model", "smooth ECE", "Brier", "NLL", "AURC", *(f"≥ {level} % EM" for level in LEVELS))


class Answers:
    """An evaluation's answers: features and facts by question id."""

    def __init__(self, evaluation: Record, other: Record | None = None):
        self.record, rows = evaluation, record.read_questions(evaluation)
        if evaluation["result"]["em"] is None:
            raise UserError(f"{evaluation['folder']}: of random weights, so it has no accuracy")
        beside = record.read_questions(other) if other else {}
        if other and beside.keys() != rows.keys():
            raise UserError(f"{other['folder']}: of other questions than {evaluation['folder']}")
        self.examples = {e.id: e for e in record.questions_of(evaluation).examples}
        found = {i: calibration.features(row, self.examples[i].question, beside.get(i)) for i, row in rows.items()}
        if without := sum(features is None for features in found.values()):
            raise UserError(f"{evaluation['folder']}: {without} of {len(rows)} answers have no log-probability")
        self.features = {id_: features for id_, features in found.items() if features is not None}
        self.text = {id_: str(row["text"]) for id_, row in rows.items()}
        self.right = {id_: bool(row["em"]) for id_, row in rows.items()}
        self.article = {id_: str(row["article"]) for id_, row in rows.items()}

    def figures(self, probability: Mapping[str, float]) -> dict[str, Figure]:
        return confidence.figures(probability, self.right, self.article)


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    config, args = parse("calibrate", argv)
    chosen = adapters.choose(config, args.given, args.force)
    config = chosen.config
    sha256 = checkpoint.weights_sha256(checkpoint.verified(chosen.adapter))
    evaluations = [r for r in record.read_all(Path(config.runs)) if r["kind"] == "eval"]
    evaluation = named(args.evaluation) or newest(evaluations, config, sha256, "dev")
    if evaluation["result"].get("adapter_sha256") != sha256:
        raise UserError(f"{evaluation['folder']}: of another adapter than {chosen.adapter}")
    need_split(evaluation, "dev", "--evaluation")
    if args.fit and args.way == "dev":
        raise UserError("--fit names what --way heldout fits to; --way dev fits to dev itself")
    answers = Answers(evaluation, named(args.other))
    n = len(answers.features)
    searched = all("share" in row for row in answers.features.values())
    if args.score == "share" and not searched:
        raise UserError(f"--score share: {evaluation['folder']} has no search; evaluate with decode.nbest")
    score = args.score or ("share" if searched else "logprob")
    kind = args.map or ("features" if searched else "platt")
    if n < FEW:
        low, high = wilson(sum(answers.right.values()), n)
        print(f"note: {n} questions tell little: their EM alone is known to [{100 * low:.0f}, {100 * high:.0f}]")
    report: list[str | list[Cells]] = [
        f"# Calibration of {config.title}, {n} questions of {evaluation['may_differ']['data_source']}"
    ]

    # ---- scores ----------------------------------------------------------------------------------------------------
    rows: list[Cells] = [("score", *HEAD[5:])]
    for name in (name for name in SCORES if all(name in row for row in answers.features.values())):
        found = answers.figures({id_: row[name] for id_, row in answers.features.items()})
        rows.append((name, *(shown(found, key) for key in keys(ranks_only=True))))
    report += ["How scores rank answers, the most certain first:", rows]

    # ---- maps ------------------------------------------------------------------------------------------------------
    fit_on, exponent, golds = answers, 0.0, 1
    if args.way == "heldout":
        heldout = named(args.fit) or newest(evaluations, config, sha256, "heldout")
        need_alike(heldout, evaluation)
        need_split(heldout, "heldout", "--fit")
        fit_on = Answers(heldout)
        golds = round(sum(len(e.answers) for e in answers.examples.values()) / n)
        exponent = calibration.annotators_exponent(answers.examples.values()) if golds > 1 else 0.0
    rows, mapped = [("map", *HEAD)], dict[str, dict[str, float]]()
    as_it_is = {id_: row["logprob"] for id_, row in answers.features.items()}
    mapped["none"] = {id_: calibration.probability_of(value) for id_, value in as_it_is.items()}
    fitted: dict[str, Fitted] = {}
    for name in calibration.KINDS:
        fitted[name] = calibration.fit(name, [*fit_on.features.values()], [*fit_on.right.values()], score)
        if args.way == "dev":
            mapped[name] = calibration.cross_fitted(name, answers.features, answers.right, answers.article, score)
        else:
            mapped[name] = applied(Calibration(fitted[name]), answers)
            if golds > 1:
                mapped[f"{name}, {golds} golds"] = applied(Calibration(fitted[name], golds, exponent), answers)
    figures = {name: answers.figures(probability) for name, probability in mapped.items()}
    rows += [(name, *(shown(found, key) for key in keys())) for name, found in figures.items()]
    how = "fitted without the articles of each tenth" if args.way == "dev" else f"fitted to {fit_on.record['folder']}"
    report += [f"Probabilities by maps of {score}, {how}:", rows]
    if golds > 1:
        first = 100 * sum(exact_match(answers.text[i], e.answers[0].text) for i, e in answers.examples.items()) / n
        em = 100 * sum(answers.right.values()) / n
        report.append(
            f"EM {em:.1f} by all gold answers, {first:.1f} by the first; for {golds} of them p becomes "
            f"1 − (1 − p) ** ({golds} ** {exponent:.2f}), by the annotators' own agreement."
        )

    # ---- abstention ------------------------------------------------------------------------------------------------
    key = kind if golds == 1 else f"{kind}, {golds} golds"
    rows = [("asked for", "threshold", "answered", "EM reached")]
    thresholds = {str(level): calibration.threshold(mapped[key], answers.right, level) for level in LEVELS}
    for level in LEVELS:
        share, reached = calibration.abstaining(mapped[key], answers.right, answers.article, level)
        least = thresholds[str(level)]
        cells = (f"{least:.3f}" if least <= 1 else "none", f"{share:.1%}", "–" if reached is None else f"{reached:.1f}")
        rows.append((f"{level} % EM", *cells))
    report += [f"Answering only what {kind} trusts, each tenth of dev by the others' threshold:", rows]

    # ---- other questions -------------------------------------------------------------------------------------------
    kept = Calibration(fitted[kind], golds, exponent)
    for run in args.on:
        one = named(run)
        assert one
        need_alike(one, evaluation)
        there = Answers(one)
        em = 100 * sum(there.right.values()) / len(there.right)
        before = {id_: calibration.probability_of(row["logprob"]) for id_, row in there.features.items()}
        rows = [("", *HEAD)]
        for name, probability in (("none", before), (kind, applied(kept, there))):
            found = there.figures(probability)
            rows.append((name, *(shown(found, key) for key in keys())))
        source = one["may_differ"]["data_source"]
        report += [f"{source}, {len(there.right)} questions, EM {em:.1f}:", rows]

    # ---- what is kept ----------------------------------------------------------------------------------------------
    page = Path(evaluation["folder"]) / f"calibration-{args.way}.md"
    write_text(page, "\n\n".join(p if isinstance(p, str) else markdown_table(p) for p in report) + "\n")
    write_text(page.with_name(calibrations.OF_ANSWERS), json.dumps(mapped[key], indent=0) + "\n")
    facts: Section = {
        "way": args.way,
        "questions": len(fit_on.features),
        "evaluation": evaluation["folder"],
        "thresholds": thresholds,
        "figures": {name: value.value for name, value in figures[key].items()},
    }
    where = None
    if chosen.adapter and not args.other:
        where = calibrations.write(chosen.adapter, kept, evaluation, facts)
    print("\n\n".join(p.removeprefix("# ") if isinstance(p, str) else text_table(p) for p in report) + "\n")
    why = "with --other nothing is kept: make ask asks once" if args.other else "no adapter, so nothing is kept"
    used = "make ask and make eval use it where they ask alike; make ask ARGS=ask.least=0.8 abstains below 80 %"
    print(f"{page}; {f'{where}: {used}' if where else why}")
    print(json.dumps({"page": str(page), "calibration": where and str(where), "n": n, **facts}))


def keys(ranks_only: bool = False) -> list[str]:
    """The names of the figures in `HEAD`; those of ranking alone, which a score that is no probability has too."""
    ranks = ["aurc", *(f"coverage_{level}" for level in LEVELS)]
    return ranks if ranks_only else ["ece", "perfect_ece", "smooth_ece", "brier", "nll", *ranks]


def shown(found: Mapping[str, Figure], key: str) -> str:
    """A figure with its interval: calibration errors in points and coverage in percent."""
    times, digits = (100, 1) if key.endswith("ece") or key.startswith("coverage") else (1, 4)
    value, interval = found[key]
    around = f" [{times * interval[0]:.{digits}f}, {times * interval[1]:.{digits}f}]" if interval else ""
    return f"{times * value:.{digits}f}{around}"


def applied(kept: Calibration, answers: Answers) -> dict[str, float]:
    return {id_: kept(row) for id_, row in answers.features.items()}


def named(run: Path | None) -> Record | None:
    """The record of the evaluation in a folder. Raises `UserError` where there is none."""
    if run is None:
        return None
    if not (run / "record.json").is_file():
        raise UserError(f"{run}: no finished run is there; name the folder of an evaluation")
    found = record.read_one(run / "record.json")
    if found["kind"] != "eval":
        raise UserError(f"{run}: not an evaluation")
    return found


def need_alike(one: Record, other: Record) -> None:
    """Raises `UserError` for evaluations of two adapters, or that were asked in two ways."""
    a, b = ({"adapter": r["result"].get("adapter_sha256")} | calibrations.asked_in(r) for r in (one, other))
    if differ := [name for name in a if a[name] != b[name]]:
        raise UserError(f"{one['folder']}: another {' and '.join(differ)} than {other['folder']}; evaluate it alike")


def need_split(evaluation: Record, split: str, flag: str) -> None:
    """Raises `UserError` for an evaluation of the other split."""
    if (found := evaluation["config"]["data"]["split"]) != split:
        raise UserError(f"{flag} {evaluation['folder']}: of data.split={found}; name one of data.split={split}")


def newest(evaluations: list[Record], config: Config, sha256: str | None, split: str) -> Record:
    """The newest evaluation of an adapter that was asked as `config` says, on its dev set or on what was held out.

    Raises `UserError` where there is none.
    """
    data = asdict(config.data)

    def alike_in(r: Record) -> bool:
        was = r["config"]["data"]
        same = split == "heldout" or all(was[key] == data[key] for key in ("dev", "dev_questions", "fix_offsets"))
        return same and was["split"] == split and calibrations.asked_in(r) == calibrations.asked(config)

    own = (r for r in evaluations if (r["system"], r["result"].get("adapter_sha256")) == (config.system, sha256))
    alike = [r for r in own if alike_in(r)]
    if not alike:
        words = " data.split=heldout" * (split == "heldout")
        again = f"make eval MODEL={config.system} with the same ARGS{words}"
        where = config.data.dev if split == "dev" else "held-out articles"
        raise UserError(f"{config.system} has no evaluation of {where} under {config.runs}/ that is asked so: {again}")
    return alike[-1]


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
