"""Tiny CLIP and SigLIP models of transformers with random weights, and tokenizers that are trained on a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

TEXTS = [
    "a photo of a lymphocyte",
    "a microscopy image of a monocyte in blood",
    "a chest x-ray of no finding",
    "a cell with a round nucleus",
    "a box or the rest of a wall in an empty image",
]
NORM = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def _byte_pairs() -> tokenizers.Tokenizer:
    """As CLIP's: byte pairs in small letters, and the two marks at the end of the vocabulary."""
    own = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    own.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=320,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(TEXTS, trainer)
    values = json.loads(own.to_str())
    begin, end = (len(values["model"]["vocab"]) + more for more in range(2))
    values["model"]["vocab"] |= {BEGIN: begin, END: end}
    values["model"]["unk_token"] = END
    own = tokenizers.Tokenizer.from_str(json.dumps(values))
    own.add_special_tokens([BEGIN, END])
    own.post_processor = processors.RobertaProcessing((END, end), (BEGIN, begin), add_prefix_space=False)
    return own


def _pieces() -> tokenizers.Tokenizer:
    own = tokenizers.Tokenizer(models.Unigram())
    own.normalizer = normalizers.Lowercase()
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    own.train_from_iterator([text.replace("-", "") for text in TEXTS], trainer)
    own.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", own.token_to_id("</s>"))]
    )
    return own


def config(kind: str, own: tokenizers.Tokenizer) -> Any:
    """Of a model whose text tower knows the tokenizer."""
    end = own.token_to_id(END if kind == "clip" else "</s>")
    text = {**SHAPE, "vocab_size": own.get_vocab_size(), "max_position_embeddings": 24, "eos_token_id": end}
    vision = {**SHAPE, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        text |= {"bos_token_id": own.token_to_id(BEGIN), "pad_token_id": end, "projection_dim": 24}
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return transformers.SiglipConfig(
        text_config=text | {"pad_token_id": end, "bos_token_id": end, "projection_size": 32}, vision_config=vision
    )


def save(folder: Path, kind: str) -> Any:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``; the stock model."""
    own = _byte_pairs() if kind == "clip" else _pieces()
    build: Any = transformers.CLIPModel if kind == "clip" else transformers.SiglipModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stock: nn.Module = build(config(kind, own))
        for name, parameter in stock.named_parameters():
            if "logit" not in name:
                nn.init.normal_(parameter, std=0.4)
        logit: Any = stock
        logit.logit_scale.data.fill_(2.5)
        if kind == "siglip":
            logit.logit_bias.data.fill_(-1.5)
    stock.eval()
    made: Any = stock
    made.save_pretrained(folder)
    own.save(str(folder / "tokenizer.json"))
    return made


def ids(folder: Path, kind: str, sentences: list[str]) -> torch.Tensor:
    """What transformers' own tokenizer class makes of sentences. Shapes: (S, L)."""
    end = END if kind == "clip" else "</s>"
    own: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token=end, eos_token=end
    )
    way = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": 24}
    found: torch.Tensor = own(sentences, return_tensors="pt", **way).input_ids
    return found
