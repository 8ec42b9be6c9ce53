"""What one layer's 4-bit products take, by how many tokens share them and by the way they are computed.

    python -m benchmarks.products [--shape configs/shapes/llama-2-7b] [--tokens 1 4 ...] [--quant fp4]

The ways: ours (`common.model.nf4_kernels`: for few tokens its products, else its dequantisation and a product);
bitsandbytes' choice (`matmul_4bit`), its fused kernel whatever the number of tokens, its dequantisation and a product;
dequantisation written in torch and compiled; and a product of 16-bit weights, which the rest is measured against.
Prints a table of microseconds a layer and one JSON line. Every way is one CUDA graph over several layers' weights:
launches cost nothing, and the cache helps little.
"""

import json
import statistics
import sys
from collections.abc import Callable
from unittest import mock

from common.device import describe_device, pick_device
from common.errors import UserError, one_line_errors
from common.model.linears import MergedLinear
from common.model.nf4 import ABSMAX_BLOCK, MATMUL_TOKENS
from common.parser import Parser

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import AutoConfig

LAYERS, REPEATS = 4, 9
DTYPE = torch.bfloat16


def main(argv: list[str]) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="configs/shapes/llama-2-7b", help="a folder with a config.json")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 5, 7, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--quant", choices=("nf4", "fp4"), default="nf4", help="the weights' 4-bit numbers")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device, and this measures a GPU's kernels")
    c, device = AutoConfig.from_pretrained(args.shape), pick_device()
    kv = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    shapes = {  # columns, rows of every matrix that reads them
        "q, k, v": (c.hidden_size, [c.hidden_size, kv, kv]),
        "o": (c.hidden_size, [c.hidden_size]),
        "gate, up": (c.hidden_size, [c.intermediate_size] * 2),
        "down": (c.intermediate_size, [c.hidden_size]),
    }
    ways: dict[str, Callable[[Weights, Tensor], Tensor]] = {
        "ours": lambda w, x: w.kernels(x) if len(x) <= MATMUL_TOKENS else x @ w.ours.dense().T,
        "bitsandbytes": lambda w, x: w.theirs.matmul(x),
        "its fused kernel": lambda w, x: w.fused(x),
        "dequantised": lambda w, x: x @ w.theirs.dense().T,
        "compiled": lambda w, x: x @ w.compiled().T,
        "16 bits": lambda w, x: x @ w.plain.T,
    }
    groups: dict[str, dict[str, float]] = {}
    print(f"{describe_device(device)['name']}: microseconds a layer")
    print(f"{'':18}{'tokens':>8}" + "".join(f"{name:>18}" for name in ways))
    totals = {n: dict.fromkeys(ways, 0.0) for n in args.tokens}
    for group, (columns, rows) in shapes.items():
        layers = [Weights(columns, rows, device, args.quant) for _ in range(LAYERS)]
        for tokens in args.tokens:
            x = torch.randn(tokens, columns, device=device, dtype=DTYPE)
            took = {name: microseconds(way, layers, x) for name, way in ways.items()}
            groups[f"{group} {tokens}"] = took
            print(f"{group:18}{tokens:8}" + "".join(f"{value:18.1f}" for value in took.values()), flush=True)
            for name, value in took.items():
                totals[tokens][name] += value
    for tokens, took in totals.items():
        print(f"{'a layer':18}{tokens:8}" + "".join(f"{value:18.1f}" for value in took.values()))
    print(json.dumps({"groups": groups, "layer": totals}))


class Weights:
    """One layer's matrices that share their input, every way."""

    def __init__(self, columns: int, rows: list[int], device: torch.device, quant: str):
        linears = []
        for n in rows:
            linear = bnb.nn.Linear4bit(columns, n, bias=False, compute_dtype=DTYPE, quant_type=quant)
            linears.append(linear.to(device, DTYPE))
        self.ours, self.theirs = MergedLinear(linears, DTYPE), MergedLinear(linears, DTYPE)
        if not self.ours.kernels:
            raise UserError("this GPU cannot run common.model.nf4_kernels: compute capability 8.0 is needed")
        self.theirs.kernels = None
        self.plain = self.ours.dense()
        w = self.ours.nf4
        assert w
        assert w.absmax2 is not None  # double quantisation is bitsandbytes' default
        assert w.code2 is not None
        assert w.offset is not None
        absmax = w.code2[w.absmax.int()].view(-1, ABSMAX_BLOCK) * w.absmax2[:, None] + w.offset[:, None]
        self.parts = w.packed, absmax.view(-1), w.code, w.blocksize

    def kernels(self, x: Tensor) -> Tensor:
        assert self.ours.kernels
        return self.ours.kernels.matmul(x, self.ours.nf4, self.ours.shape[0])

    def fused(self, x: Tensor) -> Tensor:
        from bitsandbytes.backends.cuda import ops  # cannot be imported without a GPU

        with mock.patch.object(ops, "_gemm_4bit_use_custom_fn", return_value=True):
            return self.theirs.matmul(x)

    def compiled(self) -> Tensor:
        """The matrix [rows, columns] by torch.compile; its absmaxes were dequantised before."""
        return dequantised(*self.parts).view(self.ours.shape)


@torch.compile
def dequantised(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Two numbers a byte, the first in the upper half."""
    packed = codes.view(-1).int()
    numbers = code[torch.stack([packed >> 4, packed & 15], dim=1)]
    return (numbers.view(-1, blocksize) * absmax[:, None]).to(DTYPE)


def microseconds(way: Callable[[Weights, Tensor], Tensor], layers: list[Weights], x: Tensor) -> float:
    """Microseconds of one layer's products with x [T, K]: the median of several runs of a graph over all layers."""
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for w in layers:
                way(w, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for w in layers:
                way(w, x)
    took = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(1000 * start.elapsed_time(end) / len(layers))
    return statistics.median(took)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
