"""What a training prints: of an evaluation, at its end, and of a loss that is not finite."""

from pathlib import Path

from common.data.trees import Branch
from common.errors import UserError
from common.model.memory import GIB
from common.runs.checkpoint import State
from common.runs.results import TrainResult
from common.train.early_stopping import Evaluation

import torch

ENDLESS = 0.5  # share of answers that run into the limit, above which an evaluation says so


def evaluated(step: int, found: Evaluation, split: str, better: bool) -> str:
    row = found.row
    figures = f"loss {row['dev_loss']:.4f}" if "dev_loss" in row else f"EM {row['em']:.2f} F1 {row['f1']:.2f}"
    endless = f"; {found.cut:.0%} of the answers never stop by themselves" if found.cut > ENDLESS else ""
    best = ", best so far" if better else ""
    return f"step {step}: {figures} on {row['n']} ({split}){best}{endless}"


def ending(state: State, result: TrainResult) -> str:
    best = "no accuracy" if result["selected_on"] else "not evaluated, kept"
    if state.best_em is not None:
        best = f"best EM {state.best_em:.2f} F1 {state.best_f1:.2f}"
    elif state.best_loss is not None:
        best = f"least loss {state.best_loss:.4f}"
    planned, took = result["planned_bytes"], result["gpu_bytes"]
    memory = f"{took / GIB:.2f} GiB of the GPU at the peak, {planned / GIB:.2f} planned; " if planned and took else ""
    return (
        f"{best} at step {state.best_step}; {result['questions_per_s']} questions/s; evaluations took "
        f"{state.evaluation_seconds / state.seconds:.0%} of {state.seconds:.0f} s; {memory}adapter in "
        f"{result['run']}/best"
    )


def not_finite(
    step: int, loss: float, grad_norm: float, run: Path, branches: list[Branch], dtype: torch.dtype
) -> UserError:
    # no learning rate is to blame before the first update
    advice = ["set base.dtype=bf16 or fp32, for fp16 overflows"] * (dtype == torch.float16)
    advice += ["lower train.lr"] * (step > 1)
    advice += [f"look at these questions: {', '.join(branch.id for branch in branches)}"]
    return UserError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped, and what {run} holds is whole, from before it; "
        f"{', or '.join(advice)}"
    )
