"""How often the gate of `make revalidate` raises an alarm where it should not, by simulation.

    python benchmarks/false_alarms.py [--runs N]

A run is two systems, each evaluated on 10,570 questions of 48 articles and timed with 400 queries. Simulated are code
that has not changed, in which a few answers flip by rounding and the whole machine is a little faster or slower each
time, or now and then twice as slow because something else runs on it; and, where alarms must come as often as the power
says, code that has become worse.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.gate import Rules
from common.stats import slower, wilson, worse

import numpy as np
from tqdm import tqdm

QUESTIONS, ARTICLES, QUERIES, SYSTEMS, TESTS = 10_570, 48, 400, 2, 3  # tests of a system: EM, F1, p95
BUSY = 2.0  # times as long, beside other work
CASES = {  # shares of answers that flip, and that turn wrong; drift of the machine, standard deviation; slowdown; busy
    "unchanged, the same card": (0.005, 0.0, 0.01, 1.0, 0.0),
    "unchanged, a machine that drifts": (0.02, 0.0, 0.03, 1.0, 0.0),
    "unchanged, one timing in 20 beside other work": (0.005, 0.0, 0.01, 1.0, 0.05),
    "0.5 EM worse, 10 % slower: all that is allowed": (0.005, 0.005, 0.0, 1.1, 0.0),
    "1 EM worse": (0.005, 0.01, 0.01, 1.0, 0.0),
    "2 EM worse": (0.005, 0.02, 0.01, 1.0, 0.0),
    "15 % slower": (0.005, 0.0, 0.01, 1.15, 0.0),
    "20 % slower": (0.005, 0.0, 0.01, 1.2, 0.0),
}


def alarmed(
    rng: np.random.Generator, rules: Rules, flips: float, lost: float, drift: float, slowdown: float, busy: float
) -> bool:
    """One revalidation: whether any test of any system raises an alarm."""
    alpha = rules.false_alarms / (SYSTEMS * TESTS)
    article = {str(i): str(a) for i, a in enumerate(np.sort(rng.integers(ARTICLES, size=QUESTIONS)))}
    for _ in range(SYSTEMS):
        off = rng.choice([1.0, 0.0, -1.0], QUESTIONS, p=[flips / 2, 1 - flips - lost, flips / 2 + lost])
        overlap = off * rng.uniform(0.5, 1, QUESTIONS)  # F1 moves with EM, by less
        for values, margin in ((off, rules.em_margin), (overlap, rules.f1_margin)):
            if worse(dict(zip(article, values.tolist(), strict=True)), article, margin / 100) < alpha:
                return True
        usual = rng.lognormal(0, 0.3, QUERIES)

        def timed(usual: np.ndarray = usual) -> np.ndarray:
            machine = rng.normal(1, drift) * (BUSY if rng.random() < busy else 1)
            return usual * machine * rng.normal(1, 0.02, QUERIES)

        old = timed().tolist()
        if all(  # an alarm is measured again
            slower(old, (timed() * slowdown).tolist(), 95, alpha, draws=1000)[1] > rules.p95_ratio for _ in range(2)
        ):
            return True
    return False


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3000, help="of each unchanged case; a tenth of the others")
    args = parser.parse_args(argv)
    rules = Rules()
    print(f"rules: {rules}")
    for name, case in CASES.items():
        n = args.runs if name.startswith("unchanged") else max(1, args.runs // 10)
        rng = np.random.default_rng(0)
        found = sum(alarmed(rng, rules, *case) for _ in tqdm(range(n), desc=name))
        low, high = wilson(found, n)
        print(f"{name}: {found} alarms in {n} runs, {found / n:.2%} [{low:.2%}, {high:.2%}]")


if __name__ == "__main__":
    main(sys.argv[1:])
