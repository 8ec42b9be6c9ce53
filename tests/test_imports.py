"""Imports run one way: ground floor ← data ← metrics ← runs ← model ← train, decode ← the loops and scripts."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

import pytest

WINGS = ("ground", "data", "metrics", "runs", "model", "train", "decode")  # each may import those before it
NEVER = {("decode", "train")}  # though train stands before it
TORCH = {
    "common.device",
    "common.torch_private",
    *(f"common.runs.{name}" for name in ("checkpoint", "ranks", "gauges")),
}
LOOPS = ("train_loop", "eval_loop", "bench_latency")
FILES = [
    *ROOT.glob("*.py"),
    *(path for folder in ("common", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def wing_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in WINGS else "ground"


MODULES = {module_of(path): path for path in FILES}


def imports_of(module: str) -> set[str]:
    """Modules that `module` imports anywhere, those of this repository by their full name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= whole & MODULES.keys() or {node.module or ""}
    return found


COMMON = sorted(name for name in MODULES if name.startswith("common."))


@pytest.mark.parametrize("module", COMMON)
def test_imports_of_common_run_one_way(module):
    mine = wing_of(module)
    for other in imports_of(module):
        assert other.partition(".")[0] not in ("scripts", "benchmarks", "tests", *LOOPS), other
        if other.startswith("common."):
            theirs = wing_of(other)
            assert WINGS.index(theirs) <= WINGS.index(mine), other
            assert (mine, theirs) not in NEVER, other


@pytest.mark.parametrize("module", sorted(MODULES.keys() - set(COMMON)))
def test_scripts_never_import_each_other(module):
    ours = {other for other in imports_of(module) if other.partition(".")[0] in ("scripts", *LOOPS)}
    allowed = {"benchmarks.profile_step": {"train_loop"}}  # it watches the loop itself
    assert ours - {"scripts"} <= allowed.get(module, set())


def test_no_modules_import_each_other_in_a_circle():
    seen: dict[str, bool] = {}  # False: on the way

    def visit(module: str) -> None:
        assert seen.get(module, True), f"{module} is in a circle"
        if module not in seen:
            seen[module] = False
            for other in imports_of(module) & MODULES.keys():
                visit(other)
            seen[module] = True

    for module in sorted(MODULES):
        visit(module)


def test_what_reads_plans_and_scores_needs_no_torch():
    free = [name for name in COMMON if wing_of(name) in ("ground", "data", "metrics", "runs") and name not in TORCH]
    free += ["common.decode.hosted", "common.decode.responses", "scripts.report", "scripts.sweep", "scripts.revalidate"]
    code = (
        f"import sys, {', '.join(free)}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
