"""How often the gate of `make revalidate` raises an alarm where it should not, by simulation.

    python -m benchmarks.false_alarms [--runs N] [--queries N]

A run is two systems, each evaluated on 10,570 questions of 48 articles and timed with 1,000 queries in each of three
processes. Simulated are code that has not changed, in which a few answers flip by rounding and each process is a little
faster or slower, or now and then a whole timing twice as slow because something else runs on the machine; and, where
alarms must come as often as the power says, code that has become worse for both systems. Processes and queries vary as
they did on an idle H100 (docs/log.md).
"""

import sys
from concurrent.futures import ProcessPoolExecutor

from common.config import Rules
from common.errors import one_line_errors
from common.metrics.stats import slower, wilson, worse
from common.parser import Parser

import numpy as np

QUESTIONS, ARTICLES, PROCESSES, SYSTEMS = 10_570, 48, 3, 2
TESTS = 3  # of a system: EM, F1, p95
NOISE, HELD_UP, FOR = 0.03, 0.04, (1.2, 2.5)  # of a query: standard deviation; share held up; how many times as long
LARGE, SMALL = 0.02, 0.07  # how far processes' p50 are apart, standard deviation: of a 7B model's shapes, of SmolLM2
BUSY = 2.0  # times as long, beside other work
CASES = {  # shares of answers that flip, and that turn wrong; processes apart; slowdown; share of timings beside others
    "unchanged, a 7B model": (0.005, 0.0, LARGE, 1.0, 0.0),
    "unchanged, a small model, 2 % flip": (0.02, 0.0, SMALL, 1.0, 0.0),
    "unchanged, one timing in 20 beside other work": (0.005, 0.0, LARGE, 1.0, 0.05),
    "0.5 EM worse, 10 % slower: all that is allowed": (0.005, 0.005, LARGE, 1.1, 0.0),
    "1 EM worse": (0.005, 0.01, LARGE, 1.0, 0.0),
    "2 EM worse": (0.005, 0.02, LARGE, 1.0, 0.0),
    "15 % slower": (0.005, 0.0, LARGE, 1.15, 0.0),
    "20 % slower": (0.005, 0.0, LARGE, 1.2, 0.0),
    "20 % slower, small models": (0.005, 0.0, SMALL, 1.2, 0.0),
}


def alarmed(
    rng: np.random.Generator,
    rules: Rules,
    queries: int,
    flips: float,
    lost: float,
    apart: float,
    slowdown: float,
    busy: float,
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
        usual = rng.lognormal(0, 0.3, queries)

        def timed(usual: np.ndarray = usual) -> np.ndarray:
            machine = BUSY if rng.random() < busy else 1.0
            shape = (PROCESSES, queries)
            held_up = np.where(rng.random(shape) < HELD_UP, rng.uniform(*FOR, shape), 1.0)
            process = rng.normal(1, apart, (PROCESSES, 1))
            return usual * machine * process * held_up * rng.normal(1, NOISE, shape)

        def too_long(old: np.ndarray, new: np.ndarray) -> bool:
            was, now = (np.percentile(np.median(side, axis=0), 95) for side in (old, new))
            if now <= rules.p95_ratio * was:  # the bound is lower still
                return False
            return slower(old.tolist(), new.tolist(), 95, alpha, draws=6000)[1] > rules.p95_ratio

        old = timed()
        if all(too_long(old, timed() * slowdown) for _ in range(2)):  # an alarm is measured again
            return True
    return False


def counted(name: str, runs: int, queries: int) -> str:
    """A case's line."""
    n = runs if name.startswith("unchanged") else max(1, runs // 20)
    rng = np.random.default_rng(0)
    found = sum(alarmed(rng, Rules(), queries, *CASES[name]) for _ in range(n))
    low, high = wilson(found, n)
    return f"{name}: {found} alarms in {n} runs, {found / n:.2%} [{low:.2%}, {high:.2%}]"


def main(argv: list[str]) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3000, help="of each unchanged case; a twentieth of the others")
    parser.add_argument("--queries", type=int, default=1000, help="of a timing")
    args = parser.parse_args(argv)
    print(f"rules: {Rules()}; {args.queries} queries", flush=True)
    with ProcessPoolExecutor() as pool:
        for line in pool.map(counted, CASES, [args.runs] * len(CASES), [args.queries] * len(CASES)):
            print(line, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
