"""What reads, plans and scores needs no torch, and data flows one way."""

import ast
import subprocess
import sys

from tests.conftest import ROOT

TORCH_FREE = (
    "config", "config_file", "errors", "data.squad", "data.prompt", "data.cache", "data.plan", "metrics.score",
    "metrics.error_analysis", "metrics.stats", "metrics.compare", "metrics.plots", "decode.hosted", "runs.record",
    "runs.sweeps", "runs.ledger", "runs.regression", "runs.nvml",
)  # fmt: skip
SCRIPTS = ("train_loop", "eval_loop", "bench_latency", "scripts")


def imported(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_modules_that_need_no_torch_do_not_import_it():
    modules = ", ".join(f"common.{name}" for name in TORCH_FREE)
    heavy = "('torch', 'transformers', 'datasets')"
    code = f"import sys, {modules}, scripts.report; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_scripts_never_import_each_other_and_common_imports_no_script():
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        assert not imported(path) & set(SCRIPTS), path
