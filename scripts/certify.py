"""Certify one evaluation: score its predictions again, derive its fingerprint again, answer some questions again.

    python -m scripts.certify runs/SYSTEM-s0-HASH-eval-001 [key=value ...] [--questions 50]

Overrides name new places: data.dev, adapter, base.path, base.tokenizer, window.tokenizer. The last line but one is
CERTIFIED (exit code 0), or what does not fit (1). A hosted model's whole transcript is replayed. In fp32 all answers
must be equal. In 16 bits rounding can flip a token, so as many may differ as chance allows if a tenth flip.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import Config, flat, load
from common.config_file import of_dict
from common.data import squad
from common.data.tokens import Tokenizers
from common.data.trees import parts_read, prompt_texts
from common.decode import hosted, predict, snap
from common.device import describe_device, pick_device
from common.errors import UserError, one_line_errors
from common.files import sha256
from common.metrics import score
from common.model.load import compute_dtype, load_system, load_tokenizers, tokenizer_sha256
from common.parser import Parser
from common.runs import checkpoint, preflight, record
from common.runs.results import Record, Section

import torch
from scipy import stats

# what may have another name by now
MOVED = ("data.dev", "adapter", "base.path", "base.tokenizer", "window.tokenizer", "runs")
CHANGED_BY_ROUNDING, CONFIDENCE = 0.1, 0.999
Found = dict[str, str | None]  # check → what does not fit


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of an evaluation")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--questions", type=int, default=50, help="how many are answered again, drawn anew each time")
    args = parser.parse_intermixed_args(argv)
    if args.questions < 1:
        raise UserError("--questions: at least one is answered again")
    if not (args.run / "record.json").is_file():
        raise UserError(f"{args.run}: no finished run is there; RUN=runs/… names the folder of an evaluation")
    was = record.read_one(args.run / "record.json")
    if was["kind"] != "eval" or was["result"]["em"] is None:
        raise UserError(f"{args.run}: not an evaluation with an accuracy")
    if others := [word for word in args.overrides if word.partition("=")[0] not in MOVED]:
        raise UserError(f"{others[0]}: only where things are may be said anew: {', '.join(MOVED)}")
    config = load(str(args.run / "config.yaml"), args.overrides)
    result: Section = {**was["result"]}
    found: Found = {}

    # ---- what is stored --------------------------------------------------------------------------------------------
    begun, ended = load(str(args.run / "config.yaml")), of_dict(Config, was["config"], f"{args.run}/record.json")
    # limits and fields of requests may change between two sittings of a run: its hash leaves them out
    alike, mine = begun.hash("eval") == ended.hash("eval"), flat(begun.to_dict())
    other = [f"{key} is {mine.get(key)}, was {v}" for key, v in flat(was["config"]).items() if mine.get(key) != v]
    found["configuration"] = None if alike else "; ".join(other)
    preflight.check(config)
    dev = squad.evaluated(config.data, config.early_stop)
    tokenizers = load_tokenizers(config)
    now = record.must_match(config, dev, tokenizer_sha256(tokenizers.window))
    unlike = record.mismatch(was, {**was, "must_match": now})
    found |= {name: f"{new}, was {old}" for name, (old, new) in unlike.items()}
    texts = score.read_predictions(args.run / "predictions.json")
    scored = score.score(dev.examples, texts)
    again = {"em": scored.em, "f1": scored.f1, "n": scored.n}
    wrong = [
        f"{key} {value}, was {result[key]}" for key, value in again.items() if not abs(value - result[key]) <= 1e-9
    ]
    found["score of the predictions"] = "; ".join(wrong) or None
    found["questions.jsonl"] = by_question(args.run / "questions.jsonl", scored)

    # ---- what answers ----------------------------------------------------------------------------------------------
    device, some, exact = pick_device(), dev.examples, True
    if config.api:
        answers = replayed(config, tokenizers, args.run, result, some, found)
    else:
        some = random.SystemRandom().sample(some, min(args.questions, len(some)))
        adapter = Path(config.adapter or result["adapter"]) if result["adapter"] else None
        found["adapter"] = changed(adapter, result["adapter_sha256"]) if adapter else None
        some = [] if found.get("adapter") else some  # what another adapter answers says nothing
        answers = answered(config, tokenizers, adapter, dev.examples, some, bool(result.get("forced")))
        exact = compute_dtype(config.base, device) == torch.float32 and in_fp32(was)
    ids_by = tokenizer_sha256(tokenizers.own)
    if was["may_differ"].get("tokenizer", ids_by) != ids_by:  # older records do not say it
        found["tokenizer"] = f"sha256 {ids_by}, was {was['may_differ']['tokenizer']}"
    different = [e.id for e in some if answers[e.id] != texts.get(e.id)]
    may = 0 if exact else min(int(stats.binom.ppf(CONFIDENCE, len(some), CHANGED_BY_ROUNDING)), len(some) - 1)
    shown = ", ".join(f"{id_}: {answers[id_]!r}, was {texts.get(id_)!r}" for id_ in different[:3])
    told = f"{len(different)} of {len(some)} differ"
    found["answers"] = f"{told}, at most {may} may: {shown}" if some and len(different) > may else None

    # ---- verdict ---------------------------------------------------------------------------------------------------
    then = {**was["may_differ"], "device": was["may_differ"]["device"]["name"]}
    here = config.api.url if config.api else describe_device(device)["name"]
    for name, new in zip(("commit", "dirty", "device"), (*record.code(), here), strict=True):
        print(f"{name}: {new}" if new == then[name] else f"{name}: {new}, was {then[name]} (which may be)")
    print(f"answers: {told}" + (f" ({shown})" if different else ""))
    misfits = {name: what for name, what in found.items() if what}
    for name, what in misfits.items():
        print(f"{name}: {what}")
    print(f"CERTIFIED: EM {scored.em:.2f} F1 {scored.f1:.2f}, {args.run}" if not misfits else "NOT CERTIFIED")
    print(json.dumps({"run": str(args.run), "certified": not misfits, "misfits": misfits, "different": different}))
    sys.exit(bool(misfits))


def answered(
    config: Config,
    tokenizers: Tokenizers,
    adapter: Path | None,
    examples: Sequence[squad.Example],
    some: Sequence[squad.Example],
    force: bool,
) -> dict[str, str]:
    """Answers to `some` of the examples by id, of a model that runs here."""
    if not some:
        return {}
    model = load_system(config, adapter, pick_device(), force)
    found = predict.answers(model, tokenizers, examples, config, only=[e.id for e in some])
    return {id_: answer.text for id_, answer in found.items()}


def by_question(file: Path, scored: score.Score) -> str | None:
    """How the lines of questions differ from the score; None if they do not."""
    if not file.is_file():
        return "it is gone"
    try:
        rows = {row["id"]: row["em"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error!r})"
    odd = [id_ for id_ in scored.correct.keys() | rows.keys() if rows.get(id_) != scored.correct.get(id_)]
    return f"{len(odd)} of {scored.n} questions are scored otherwise, such as {min(odd)}" if odd else None


def replayed(
    config: Config, tokenizers: Tokenizers, run: Path, result: Section, examples: Sequence[squad.Example], found: Found
) -> dict[str, str]:
    """Answers of a hosted model by id, from its transcript; what does not fit of that is added to `found`."""
    folder = Path(result["replayed"]) if result["replayed"] else run
    if not (folder / "transcript.jsonl").is_file():
        raise UserError(f"{folder}/transcript.jsonl: no such file, so nothing that was said can be replayed")
    client = hosted.Client(config, folder / "transcript.jsonl", replay=True)
    now, then = sha256(client.transcript), result["transcript_sha256"]
    found["transcript"] = None if now == then else f"sha256 {now}, was {then}"
    prompts, _ = prompt_texts(examples, tokenizers.window, config.window, config.prompt)
    answers = {id_: reply.text for id_, reply in hosted.ask_all(client, dict(prompts), progress=None).items()}
    client.close()
    if config.decode.snap:
        read = parts_read(examples, tokenizers.window, config.window, config.prompt)
        answers = {id_: (snap.nearest(read[id_], text) or (text, None))[0] for id_, text in answers.items()}
    return answers


def changed(adapter: Path, before: str) -> str | None:
    """How an adapter's folder differs from what was measured; None if it does not."""
    try:
        checkpoint.verified(adapter)
    except UserError as error:
        return str(error)
    now = checkpoint.weights_sha256(adapter)
    if now is None:
        raise UserError(f"{adapter}: its weights are gone; adapter=folder says where it is now")
    return None if now == before else f"sha256 {now}, was {before}"


def in_fp32(was: Record) -> bool:
    dtype = was["config"]["base"]["dtype"]
    return dtype == "fp32" or (dtype == "auto" and was["may_differ"]["device"]["name"].startswith("CPU"))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
