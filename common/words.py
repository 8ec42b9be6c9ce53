"""The known word that a mistyped one is nearest to, and the names that other tools give to our settings.

    python -m common.words variable NAME KNOWN ...        (or: target NAME KNOWN ...)

prints the error for a variable or target that the Makefile does not have. Imports the standard library alone.
"""

import difflib
import os
import sys
from collections.abc import Iterable

# names in transformers, PEFT, TRL, axolotl and LLaMA-Factory
ELSEWHERE = {
    "lr": "train.lr",
    "learning_rate": "train.lr",
    "batch_size": "train.questions_per_step",
    "per_device_train_batch_size": "train.questions_per_step",
    "micro_batch_size": "train.pack_tokens",
    "gradient_accumulation_steps": "train.pack_tokens",
    "epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "warmup_ratio": "train.warmup",
    "label_smoothing_factor": "train.label_smoothing",
    "eval_steps": "train.eval_every",
    "save_steps": "train.eval_every",
    "rank": "lora.rank",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "max_length": "window.context",
    "max_seq_length": "window.context",
    "max_seq_len": "window.context",
    "sequence_len": "window.context",
    "cutoff_len": "window.context",
    "doc_stride": "window.stride",
    "max_new_tokens": "window.answer",
    "max_tokens": "window.answer",
    "max_answer_length": "window.answer",
    "load_in_4bit": "base.quant",
    "bnb_4bit_quant_type": "base.quant",
    "bnb_4bit_use_double_quant": "base.double_quant",
    "bnb_4bit_compute_dtype": "base.dtype",
    "torch_dtype": "base.dtype",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "base_model": "base.path",
    "model_name_or_path": "base.path",
    "adapter_name_or_path": "adapter",
    "output_dir": "runs",
    "report_to": "tracker",
    "early_stopping_patience": "early_stop.patience",
}
# what other tools let choose, and this project does not
FIXED = {
    "optim": "the optimizer is bitsandbytes' paged AdamW in 8 bits",
    "optimizer": "the optimizer is bitsandbytes' paged AdamW in 8 bits",
    "lr_scheduler_type": "the rate rises over train.warmup, then falls by a cosine",
    "lr_scheduler": "the rate rises over train.warmup, then falls by a cosine",
    "logging_steps": "every step is logged",
    "load_in_8bit": "base.quant is nf4, fp4 or none",
    "temperature": "every system decodes greedily",
    "top_p": "every system decodes greedily",
    "top_k": "every system decodes greedily",
    "do_sample": "every system decodes greedily",
    "num_beams": "every system decodes greedily",
    "packing": "questions of a paragraph share it: train.share_prefixes",
}
OF_MAKE = {"model": "MODEL", "seeds": "SEED", "adapter_path": "ADAPTER", "config": "MODEL", "gpus": "PROCESSES"}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that names the nearest known word, or what is fixed here; empty if none is near.

    A key's last part decides before its spelling: "learning_rate", "lr" and "trian.lr" all mean "train.lr".
    """
    words = list(known)
    last = word.rpartition(".")[2]
    same = [ELSEWHERE.get(last.lower(), ""), *(w for w in words if w.rpartition(".")[2] == last)]
    if last.lower() in FIXED and last not in words:
        return f"; {FIXED[last.lower()]}"
    close = [w for w in same if w in words] or difflib.get_close_matches(word, words, 1, cutoff=0.5)
    return f' — did you mean "{close[0]}"?' if close else ""


def main(kind: str, word: str, known: list[str]) -> None:
    """Print the error for a variable or target of make that is not known."""
    setting, fixed = word if "." in word else ELSEWHERE.get(word.lower()), FIXED.get(word.lower())
    if kind == "variable" and setting:
        hint = f'; it is a setting: ARGS="{setting}=…"'
    elif kind == "variable" and fixed:
        hint = f"; {fixed}"
    elif kind == "target" and os.path.exists(f"configs/{word}.yaml"):
        hint = f"; it is a system: MODEL={word}"
    else:
        hint = nearest(OF_MAKE.get(word.lower(), word.upper()) if kind == "variable" else word, known)
    print(f'error: {kind} "{word}" is not known{hint or "; make alone lists what is"}', file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
