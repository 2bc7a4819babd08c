"""transformers: networks, tokenizers and adapters of a package. Importing raises EXTRA_MISSING, EXTRA_UNSUPPORTED.

Of what configurations name, only what lies in the package is used: nothing is downloaded, no code run. No file is
written. Weights lie in memory of the network's own, decrypted there once where their type stays; they live on when the
model is closed, and are zeroed with the last of the tensors that share a file.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.integrations.extras import check_model, extra, require

with extra("transformers", "transformers", "torch", "tokenizers", "safetensors"):
    import safetensors as _safetensors  # noqa: F401  # before the module that names its own extra
    import tokenizers
    import torch
    import transformers

from hwlicense.integrations.safetensors import load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.device.model import Model

require("transformers", "transformers", transformers.__version__, "4.57")

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
CONTAINED: Final = {
    "LORA", "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA",
    "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT",
    "OSF", "P_TUNING", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "RANDLORA", "ROAD",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""peft's adapters, to 0.21, of which all is in their own file. XLORA, SHADOW, MULTITASK_PROMPT_TUNING name others."""
N = TypeVar("N")


def from_pretrained(model: Model, kind: type[N], subfolder: str = "", **options: Any) -> N:  # noqa: ANN401
    """A network of the class `kind` (such as AutoModelForCausalLM), as its `from_pretrained` makes it of a folder.

    Members are named as there: config.json, generation_config.json, model.safetensors or its parts with their index.
    `options` are `kind.from_pretrained`'s (dtype=..., attn_implementation=...). Raises as `Model.read`, DamagedError
    MEMBER_MALFORMED, UsageError EXTRA_UNSUPPORTED, and what transformers itself raises.
    """
    where = _Folder(model, subfolder)
    config = options.pop("config", None) or configuration(model, subfolder)
    made: Any = kind
    if not issubclass(made, transformers.PreTrainedModel):  # an auto class looks for files: only its choice is taken
        with torch.device("meta"):
            made = type(made.from_config(config, trust_remote_code=False))
    network = made.from_pretrained(None, config=config, state_dict=where.weights(WEIGHTS), **options)
    if where.has("generation_config.json") and network.can_generate():
        said = {"_from_model_config": False} | where.json("generation_config.json")
        network.generation_config.update(**said)
    found: N = network
    return found


def configuration(model: Model, subfolder: str = "") -> transformers.PreTrainedConfig:
    """What config.json says, for one of transformers' own classes. Raises as above, and EXTRA_UNSUPPORTED."""
    where = _Folder(model, subfolder)
    said = where.json("config.json")
    if elsewhere := next(_elsewhere(said), None):
        raise where.not_contained("config.json", repr(elsewhere))
    try:
        known = transformers.CONFIG_MAPPING[str(said.get("model_type"))]
    except KeyError:
        what = f"transformers {transformers.__version__} has no model of the type {said.get('model_type')!r}."
        raise UsageError(Reason.EXTRA_UNSUPPORTED, what, "Use the version that the model was made with.") from None
    return known.from_dict(said)


def tokenizer(model: Model, subfolder: str = "", **options: Any) -> transformers.PreTrainedTokenizerFast:  # noqa: ANN401
    """The tokenizer in tokenizer.json, with what tokenizer_config.json says of it. Raises as above."""
    where = _Folder(model, subfolder)
    said = where.json("tokenizer_config.json") if where.has("tokenizer_config.json") else {}
    if where.has("chat_template.jinja"):
        said["chat_template"] = str(where.read("chat_template.jinja"), "utf-8")
    left_out = ("tokenizer_class", "auto_map", "added_tokens_decoder", "tokenizer_file")
    given = {key: value for key, value in said.items() if key not in left_out}
    made = tokenizers.Tokenizer.from_buffer(bytes(where.read("tokenizer.json")))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **given | options)


def adapted(network: Any, model: Model, subfolder: str = "", **options: Any) -> Any:  # noqa: ANN401  # a PeftModel
    """`network` with the adapter (LoRA and others of peft's) in adapter_config.json and adapter_model.safetensors.

    `model` may be another package than the network's. `options` are PeftModel's. Raises as above, MEMBER_MALFORMED also
    where the adapter lacks a tensor, as one for other layers does.
    """
    with extra("transformers", "peft"):
        import peft  # noqa: PLC0415  # most applications have no adapter
    where = _Folder(model, subfolder)
    said = where.json("adapter_config.json")
    if not isinstance(kind := said.get("peft_type"), str) or kind not in CONTAINED:
        raise where.not_contained("adapter_config.json", f"what adapters of the type {kind!r} name")
    config = peft.PeftConfig.from_peft_type(**said)
    config.inference_mode = True
    wrapped = peft.PeftModel if config.task_type is None else peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
    made = wrapped(network, config, **options)
    lacking = peft.set_peft_model_state_dict(made, where.weights(ADAPTER)).missing_keys
    # Of the network's own and other names of what was loaded, too: the adapter's are what peft would save of it.
    saved = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    for name in ("".join(key.rsplit(".default", 1)) for key in lacking):
        if name in saved:
            raise where.malformed(ADAPTER, f"it has no tensor {name!r}")
    return made.eval()


def _elsewhere(said: dict[str, Any], within: str = "") -> Iterator[str]:
    """What a configuration would have transformers take from a hub or the disk: kernels, which are code, and networks.

    Implementations and architectures of its own and of timm's have neither slash nor colon in their names. A backbone
    that is named is asked for at the hub, whatever its name.
    """
    for key, value in said.items():
        if isinstance(value, dict):  # of one kernel for each of its networks, or of another network
            yield from _elsewhere(value, key if "_implementation" in key else within)
        elif isinstance(value, str) and (
            key == "backbone"
            or (set(value) & set("/:") and ("_implementation" in key + within or key == "architecture"))
        ):
            yield value


class _Folder:
    """Members below one folder of a package, as hubs lay them out."""

    def __init__(self, model: Model, subfolder: str) -> None:
        check_model(model)
        self._model = model
        self._start = "" if posixpath.normpath(subfolder) == "." else posixpath.normpath(subfolder) + "/"

    def has(self, name: str) -> bool:
        return self._start + name in self._model.names

    def read(self, name: str) -> memoryview:
        return self._model.read(self._start + name)

    def json(self, name: str) -> dict[str, Any]:
        try:
            return msgspec.json.decode(self.read(name), type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.malformed(name, str(error)) from error

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors, of one file or of those that an index names."""
        index = f"{name}.index.json"
        if not self.has(index):
            return load(self._model, self._start + name, "pt")
        parts = self.json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise self.malformed(index, "it has no weight_map of names to files")
        found: dict[str, torch.Tensor] = {}
        for part in dict.fromkeys(parts.values()):
            found |= load(self._model, self._start + part, "pt")
        if missing := parts.keys() - found:
            raise self.malformed(index, f"its files have no tensor {min(missing)!r}")
        return found

    def not_contained(self, name: str, what: str) -> UsageError:
        said = f"The member {self._start + name!r} asks for {what}, which is not in the package."
        return UsageError(Reason.EXTRA_UNSUPPORTED, said, "Nothing is taken from a hub or the disk: ask the vendor.")

    def malformed(self, name: str, why: str) -> DamagedError:
        what = f"The member {self._start + name!r} is not as transformers writes it: {why}."
        return DamagedError(Reason.MEMBER_MALFORMED, what, "Ask the vendor for a package with a sound one.")
