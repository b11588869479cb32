"""Converts a GGUF file into a Hugging Face folder: `python -m pagedcore.serve.convert_gguf FILE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path


def convert_gguf(source: Path, destination: Path) -> None:
    """Write `source`'s weights (dequantized to bfloat16), tokenizer and generation config into `destination`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    AutoTokenizer.from_pretrained(**location).save_pretrained(destination)
    model = AutoModelForCausalLM.from_pretrained(
        **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(destination)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
