"""The most probable answers beside greedy ones: what each way to choose changes, and what the search takes.

    python -m benchmarks.nbest [MODEL] [key=value ...] [--rounds 1]

Both decode spans, by the batched engine, one after the other in each round. The differences in EM and F1 are paired,
their intervals are by article. `data.split=heldout` is for choosing a rule, dev for one look at what was chosen.
"""

import json
import statistics
import sys
from dataclasses import replace

from common.config import Decode
from common.config import load as load_config
from common.config_file import given_keys
from common.data import cache, squad
from common.data.trees import Tree
from common.data.window import answer_limit
from common.decode import batched, nbest, nbest_batched, predict
from common.decode.answers import Task, stop_tokens
from common.decode.forward import Decoder
from common.device import pick_device
from common.errors import UserError, one_line_errors
from common.metrics.score import score
from common.metrics.stats import clustered, differences
from common.model.load import load_system, load_tokenizers
from common.parser import Parser
from common.runs import adapters, checkpoint, gauges

import numpy as np

RULES = [(by, exponent) for by in ("mass", "risk", "path") for exponent in (0.0, 0.25, 0.5, 1.0)]


def main(argv: list[str]) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-qlora")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=1, help="the ratio of times is their median's")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        raise UserError("--rounds must be 1 or more")
    config = load_config(args.model, args.overrides)
    chosen = adapters.choose(config, given_keys(args.overrides))
    config = replace(chosen.config, decode=replace(config.decode, spans=True, nbest=config.decode.nbest or 8))
    data = squad.evaluated(config.data, config.early_stop)
    tokenizers, device = load_tokenizers(config), pick_device()
    model = load_system(config, checkpoint.verified(chosen.adapter), device, False)
    if predict.engine_of(model, config.eval) == "plain":
        raise UserError("a Llama is needed, and eval.engine=auto")
    trees = cache.build_trees(data, tokenizers, config.window, config.prompt, train=False).trees
    trees = sorted(trees, key=len, reverse=True)
    sizes = predict.sizes_of(model, config.eval)

    def task(decode: Decode) -> Task:
        quotes = predict.quotes_of(model, tokenizers.own, decode, [tree.context for tree in trees])
        stops, limit = stop_tokens(tokenizers.own, model, decode), answer_limit(config.window, decode)
        return Task(
            tokenizers.own, stops, limit, config.eval, lambda: None, {}, "", lambda t: quotes(t.context), decode
        )

    def decoder() -> Decoder:
        return Decoder(model, sizes.cache_tokens, sizes.pass_tokens if sizes.capture else 0)

    def greedily(trees: list[Tree]) -> int:
        return sum(
            1 for _ in batched.answers(decoder(), trees, task(replace(config.decode, nbest=None)), sizes.pass_tokens)
        )

    def searched(trees: list[Tree]) -> list[nbest_batched.Question]:
        return list(nbest_batched.answers(decoder(), trees, task(config.decode), sizes.pass_tokens))

    # ---- times -----------------------------------------------------------------------------------------------------
    took: dict[str, list[float]] = {"greedy": [], "nbest": []}
    found: list[nbest_batched.Question] = []
    greedily(trees[:20]), searched(trees[:20])  # compiles, loads kernels
    for _ in range(args.rounds):
        began = gauges.now(device)
        greedily(trees)
        between = gauges.now(device)
        found = searched(trees)
        took["greedy"].append(between - began)
        took["nbest"].append(gauges.now(device) - between)
    seconds = {name: statistics.median(times) for name, times in took.items()}
    n, ratio = len(data.examples), seconds["nbest"] / seconds["greedy"]
    expanded, rest = np.mean([(q.search.expanded, q.search.rest) for q in found], axis=0).tolist()
    print(f"{n} questions; greedy {n / seconds['greedy']:.1f} questions/s, n-best search {ratio:.2f} × as long")
    print(f"{expanded:.1f} paths expanded per question; at most {rest:.3f} of the probability not found")

    # ---- rules -----------------------------------------------------------------------------------------------------
    article = {e.id: e.title for e in data.examples}
    greedy = score(data.examples, {q.branch.id: q.search.quote(q.search.greedy).text for q in found if q.search.greedy})
    print(f"{'greedy':12} EM {greedy.em:6.2f}               F1 {greedy.f1:6.2f}")
    rows = []
    for by, exponent in RULES:
        texts = {}
        for q in found:
            best = q.search.answers[nbest.choose(q.search, by, exponent)].best
            texts[q.branch.id] = q.search.quote(best.path).text
        scored = score(data.examples, texts)
        gains = differences(scored.correct, greedy.correct), differences(scored.overlap, greedy.overlap)
        em, f1 = ([100 * x for x in clustered(gain, article) or (0.0, 0.0)] for gain in gains)
        gain_em, gain_f1 = scored.em - greedy.em, scored.f1 - greedy.f1
        print(
            f"{by:6} {exponent:<5} EM {gain_em:+6.2f} [{em[0]:+.2f}, {em[1]:+.2f}]  "
            f"F1 {gain_f1:+6.2f} [{f1[0]:+.2f}, {f1[1]:+.2f}]"
        )
        rows.append(
            {
                "choose": by,
                "length_exponent": exponent,
                "em": gain_em,
                "em_interval": em,
                "f1": gain_f1,
                "f1_interval": f1,
            }
        )
    print(json.dumps({"n": n, "seconds": took, "ratio": ratio, "expanded": expanded, "em": greedy.em, "rules": rows}))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
