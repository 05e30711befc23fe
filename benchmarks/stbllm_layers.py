"""Layer errors of STBLLM and of the codebook method at honest bits, on the layers of `billm_layers.py`.

    python benchmarks/stbllm_layers.py --calibration CALIBRATION.txt --held-out OTHER.txt

Writes benchmarks/results/stbllm_layers.json: stored bits, error and seconds of each row on synthetic layers and, with
the texts and the model package, on real layers of SmolLM2-135M.
"""

from __future__ import annotations

from billm_layers import Row, run

ROWS: list[Row] = [
    ("GPTQ 2 bits, group 64", "gptq", {"bits": 2, "group_size": 64}),
    ("BiLLM official", "billm", {"variant": "official"}),
    ("BiLLM whit", "billm", {}),
    ("STBLLM released 4:8", "stbllm", {"variant": "released"}),
    ("STBLLM whit 6:8", "stbllm", {"pattern": "6:8"}),
    ("STBLLM whit 5:8", "stbllm", {"pattern": "5:8"}),
    ("STBLLM whit 4:8", "stbllm", {}),
    ("STBLLM whit 4:8, tied", "stbllm", {"trisection": "tied"}),
    ("STBLLM whit 4:8, tied, no passes", "stbllm", {"trisection": "tied", "passes": 0}),
    ("STBLLM whit 4:8, free, no passes", "stbllm", {"passes": 0}),
    ("STBLLM whit 4:8, scalars per 128", "stbllm", {"block_size": 128}),
    ("STBLLM whit 4:8, Wanda", "stbllm", {"score": "wanda"}),
    ("STBLLM whit 4:8, magnitude", "stbllm", {"score": "magnitude"}),
    ("STBLLM whit 4:8, paper-literal", "stbllm", {"score": "paper-literal"}),
    ("STBLLM whit 6:8, two magnitudes", "stbllm", {"pattern": "6:8", "regions": 2}),
    ("STBLLM whit 4:8, two magnitudes", "stbllm", {"regions": 2}),
    ("STBLLM whit 2:8", "stbllm", {"pattern": "2:8"}),
    ("STBLLM whit 2:8, two magnitudes", "stbllm", {"pattern": "2:8", "regions": 2}),
    ("STBLLM whit 4:8, sign and row scale", "stbllm", {"regions": 1}),
    ("STBLLM whit 1:2, sign and row scale", "stbllm", {"pattern": "1:2", "regions": 1}),
    ("STBLLM whit 2:8, sign and row scale", "stbllm", {"pattern": "2:8", "regions": 1}),
    ("STBLLM whit 1:4, sign and row scale", "stbllm", {"pattern": "1:4", "regions": 1}),
    ("codebook 256 of width 4", "codebook", {"width": 4}),
    ("codebook 256 of width 6", "codebook", {"width": 6}),
    ("codebook 256 of width 8", "codebook", {"width": 8}),
    ("codebook 64 of width 8", "codebook", {"codes": 64, "width": 8}),
    ("codebook 256 of width 12", "codebook", {}),
    ("codebook 256 of width 16", "codebook", {"width": 16}),
    ("codebook 16 of width 8", "codebook", {"codes": 16, "width": 8}),
    ("ternary 256 of width 8", "codebook", {"patterns": "ternary"}),
    ("ternary 64 of width 8", "codebook", {"patterns": "ternary", "codes": 64}),
    ("codebook 256 of width 8, one round", "codebook", {"width": 8, "rounds": 1}),
    ("codebook 256 of width 8, one round, no passes", "codebook", {"width": 8, "rounds": 1, "passes": 0}),
]


if __name__ == "__main__":
    run(__doc__, ROWS, "stbllm_layers.json")
