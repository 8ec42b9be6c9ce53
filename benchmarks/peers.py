"""One training stack, one process: time optimizer steps on the rows of a job file, print one JSON line.

    python -m benchmarks.peers  hf|trl|unsloth|matmul|base JOB.json        (started by train_throughput.py)

Each trains the same LoRA on the same base with the same paged 8-bit optimizer, on one row a question, sorted by length
within the measurement so that little is padding. Only the stack differs: `hf` is a plain loop of transformers and PEFT
with logits of the answers alone; `trl` is its SFTTrainer; `unsloth` its FastLanguageModel with the SFTTrainer.
`matmul` measures the rate that matrix products reach on this device; `base` writes the random base that all load.
"""

import importlib.metadata
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.records import Figures, PeerResult, TrainJob, reason

if TYPE_CHECKING:
    from common.model.llama import Model

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

SEARCH_STEPS, WARMUP_STEPS, LEAST_STEPS = 3, 2, 4
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "unsloth", "unsloth_zoo", "triton")

Rows = list[dict[str, list[int]]]
Mark = Callable[[], None]


class Peer(Protocol):
    def train(self, rows: Rows, batch: int, mark: Mark) -> None:
        """Train on the rows in order, `batch` of them per step; call `mark` before the first step and after each."""


def main(stack: str, job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    result: PeerResult
    try:
        if stack == "unsloth":
            import unsloth  # noqa: F401 - before transformers and TRL, which it patches
        import torch

        if stack == "matmul":
            result = {"tflops": matmul_rate()}
        elif stack == "base":
            result = {"folder": write_base(job["base"], job["model"])}
        else:
            torch.manual_seed(job["seed"])
            stacks: dict[str, Callable[[TrainJob], Peer]] = {"hf": HfLoop, "trl": Trl, "unsloth": Unsloth}
            result = measure(stacks[stack](job), job)
        result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    except Exception as error:  # whatever stands in a peer's way is its result
        result = {"failed": reason(error)}
    print(json.dumps({"stack": stack, **result, "versions": installed(PACKAGES)}), flush=True)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def measure(peer: Peer, job: TrainJob) -> PeerResult:
    """Figures of the batch sizes that are searched, if the job names some, and of the best or the named by budget."""
    import torch

    searched: list[Figures] = []
    timed = job["timed"]
    for batch in job["search"]:
        try:
            searched.append(timed_steps(peer, job, batch, 1, SEARCH_STEPS))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if searched[-1]["allocated_gib"] > max(job["budgets"]):
            break
    if job["search"]:
        fits = {b: [s for s in searched if s["allocated_gib"] <= 0.98 * b] for b in job["budgets"]}
        timed = {str(b): max(f, key=lambda s: s["questions_per_s"])["batch"] for b, f in fits.items() if f}
    found = {
        batch: timed_steps(peer, job, batch, WARMUP_STEPS, max(LEAST_STEPS, job["questions"] // batch))
        for batch in sorted(set(timed.values()))
    }
    return {"searched": searched, "timed": {budget: found[batch] for budget, batch in timed.items()}}


def timed_steps(peer: Peer, job: TrainJob, batch: int, warmup: int, steps: int) -> Figures:
    """Questions/s and tokens/s (padding aside) of `steps` optimizer steps after `warmup`, and the peak of all."""
    import torch

    rows = rows_of(job, batch, warmup) + rows_of(job, batch, steps)
    cuda = torch.cuda.is_available()
    marks: list[float] = []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def mark() -> None:
        if cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    peer.train(rows, batch, mark)
    seconds = marks[warmup + steps] - marks[warmup]
    tokens = sum(len(row["input_ids"]) for row in rows[warmup * batch :])
    gib = 2.0**30
    return {
        "batch": batch,
        "steps": steps,
        "questions": len(rows),
        "seconds": round(seconds, 3),
        "questions_per_s": batch * steps / seconds,
        "tokens_per_s": tokens / seconds,
        "allocated_gib": torch.cuda.max_memory_allocated() / gib if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / gib if cuda else 0.0,
    }


def rows_of(job: TrainJob, batch: int, steps: int) -> Rows:
    """Rows of so many batches in order, each of similar lengths, the batches shuffled.

    They are evenly spaced in the job's rows by length, so that every batch size sees the same lengths.
    """
    made: Rows = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in job["rows"]]
    made.sort(key=lambda row: len(row["input_ids"]))
    wanted = batch * steps
    rows = [made[i * (len(made) - 1) // max(1, wanted - 1)] for i in range(wanted)]
    batches = [rows[i : i + batch] for i in range(0, wanted, batch)]
    random.Random(job["seed"]).shuffle(batches)
    return [row for members in batches for row in members]


# ---- the stacks ----------------------------------------------------------------------------------------------------


def load(path: str) -> "PreTrainedModel":
    """The base in NF4, quantised while it loads unless it is stored so; transformers' own layers and attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    options: dict[str, object] = {
        "dtype": dtype,
        "attn_implementation": "sdpa",
        "device_map": {"": 0 if cuda else "cpu"},
    }
    if not hasattr(AutoConfig.from_pretrained(path), "quantization_config"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class HfLoop:
    def __init__(self, job: TrainJob):
        import bitsandbytes as bnb
        from peft import LoraConfig, get_peft_model

        self.max_grad_norm = job["max_grad_norm"]
        self.model = get_peft_model(load(job["model"]), LoraConfig(task_type="CAUSAL_LM", **job["lora"]))
        if job["checkpointing"]:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = bnb.optim.PagedAdamW8bit(self.weights, lr=job["lr"], weight_decay=job["weight_decay"])

    def train(self, rows: Rows, batch: int, mark: Mark) -> None:
        import torch
        import torch.nn.functional as F

        device = self.weights[0].device
        causal = self.model.get_base_model()
        mark()
        for i in range(0, len(rows), batch):
            members = rows[i : i + batch]
            width = max(len(row["input_ids"]) for row in members)
            # padding is on the right, where causal attention hides it from every real token
            ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in members])
            labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in members])
            ids, labels = ids.to(device, non_blocking=True), labels[:, 1:].to(device, non_blocking=True)
            keep = labels != -100
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = causal.model(input_ids=ids).last_hidden_state[:, :-1]
                logits = causal.lm_head(hidden[keep]).float()
            F.cross_entropy(logits, labels[keep]).backward()
            torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            mark()


class Trl:
    def __init__(self, job: TrainJob):
        from peft import LoraConfig

        self.job, self.model = job, load(job["model"])
        self.adapter: dict[str, object] = {"peft_config": LoraConfig(task_type="CAUSAL_LM", **job["lora"])}

    def train(self, rows: Rows, batch: int, mark: Mark) -> None:
        checkpointing = self.job["checkpointing"]
        self.model = train_sft(
            self.model,
            self.job,
            rows,
            batch,
            mark,
            self.adapter,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        self.adapter = {}  # it is on the model now


class Unsloth:
    def __init__(self, job: TrainJob):
        import torch
        from unsloth import FastLanguageModel

        self.job = job
        model, _ = FastLanguageModel.from_pretrained(
            job["model"], max_seq_length=job["window"], dtype=torch.bfloat16, load_in_4bit=True
        )
        lora = {**job["lora"], "lora_dropout": 0.0, "bias": "none", "random_state": job["seed"]}
        checkpointing = "unsloth" if job["checkpointing"] else False
        self.model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=checkpointing, **lora)

    def train(self, rows: Rows, batch: int, mark: Mark) -> None:
        from transformers import DataCollatorForSeq2Seq

        collator = DataCollatorForSeq2Seq(padding_tokenizer(self.job["model"]))
        train_sft(self.model, self.job, rows, batch, mark, {"data_collator": collator})


def padding_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; Llama-2's own has no token to pad with, and a base that is saved may have lost one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def train_sft(
    model: "Model",
    job: TrainJob,
    rows: Rows,
    batch: int,
    mark: Mark,
    trainer_takes: dict[str, object],
    **config_takes: object,
) -> "Model":
    """The trained model, with the adapter that SFTTrainer may have put on it."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            mark()

        def on_step_end(self, *_: object, **__: object) -> None:
            mark()

    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=job["work"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_steps=len(rows) // batch,
        train_sampling_strategy="sequential",
        learning_rate=job["lr"],
        optim="paged_adamw_8bit",
        bf16=cuda,
        use_cpu=not cuda,
        max_grad_norm=job["max_grad_norm"],
        weight_decay=job["weight_decay"],
        max_length=job["window"],
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        seed=job["seed"],
        **config_takes,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=padding_tokenizer(job["model"]),
        callbacks=[Marks()],
        **trainer_takes,
    )
    trainer.train()
    return trainer.model


def write_base(section: dict[str, Any], folder: str) -> str:
    """The folder, with random weights of the base's shapes, quantised, in it: what every stack can load."""
    from common.config import Base
    from common.device import pick_device
    from common.model.load import load_base, load_tokenizer

    base = Base(**section)
    model = load_base(base, pick_device())
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    load_tokenizer(base.tokenizer or base.path).save_pretrained(folder)
    return folder


def matmul_rate() -> float:
    """TFLOP/s of a large square product, over a second or so, after as long a warm-up."""
    from common.device import pick_device
    from common.model.estimate import products_per_second

    import torch

    device = pick_device()
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    return products_per_second(device, dtype, n, seconds=1) / 1e12


if __name__ == "__main__":
    main(*sys.argv[1:])
