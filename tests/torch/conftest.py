"""A small language model, its tokenizer and an adapter, as hubs lay them out; and real static embeddings.

The language model has random weights. The embeddings and their tokenizer are wordllama's.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers

from tests.packages import opened, pack

WORDLLAMA = Path(str(resources.files("wordllama")))
TEXTS = ["the bolt is loose", "the nut is tight, and the flange is not"]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("torch") / "files"
    torch.manual_seed(1)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    given = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **given)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config)
    network.generation_config.max_new_tokens = 7
    for name, size in (("one", "1GB"), ("many", "200KB")):
        network.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    half = network.to(torch.bfloat16)
    half.save_pretrained(folder / "half")
    adapter = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapter.save_pretrained(folder / "adapter")
    source = WORDLLAMA / "weights/l2_supercat_256.safetensors"
    (folder / "words").mkdir()
    (folder / "words/model.safetensors").write_bytes(source.read_bytes())
    tokens = WORDLLAMA / "tokenizers/l2_supercat_tokenizer_config.json"
    (folder / "words/tokenizer.json").write_bytes(tokens.read_bytes())
    assert len(list((folder / "many").glob("*.safetensors"))) > 1
    assert json.loads((folder / "many/model.safetensors.index.json").read_text())["weight_map"]
    return folder


@pytest.fixture(scope="session")
def packed(vendor, files):
    return pack(vendor, files.parent, {})


@pytest.fixture
def model(vendor, packed):
    with opened(vendor, packed[0], packed[1]) as model:
        yield model
